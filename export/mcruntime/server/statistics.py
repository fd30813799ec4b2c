"""What one version of a model has done so far: the one source of the protocol's statistics and of the metrics.

Times are kept in nanoseconds, as the protocol counts them. Written by the batcher's threads and the event loop, read by
whoever asks; one lock, held for a few additions.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

from mcruntime.server.batcher import Ran

PARTS = ("compute_input", "compute_infer", "compute_output")
MANY = 256  # inferences
# Upper bounds of the histograms' buckets, in seconds.
BOUNDS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass
class Duration:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float, times: int = 1) -> None:
        self.count += times
        self.ns += int(seconds * 1e9)

    def as_dict(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass
class Histogram:
    """Counts by bucket, not cumulated: one for each of ``BOUNDS_S`` and one for what is longer."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds


class Statistics:
    """Of one name and version; all fields are totals since the server's start, over all loads of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: deque[tuple[float, Ran]] = deque()  # not added up yet; with the time of each, UTC
        self.last_inference_ms = 0  # UTC, milliseconds since 1970
        self.inferences = 0  # images
        self.executions = 0  # runs of the engine
        self.durations = {
            key: Duration()
            for key in (
                "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit",
                "cache_miss",
            )
        }  # fmt: skip
        self.batches: dict[int, dict[str, Duration]] = {}
        self.failures: Counter[str] = Counter()  # by reason: "rejected", "timeout", "input", "internal", "canceled"
        self.request_s = Histogram()
        self.queue_s = Histogram()
        self.compute_s = Histogram()
        self.decode_s = Histogram()  # of images that were sent as files

    def ran(self, run: Ran) -> None:
        """An inference has ended; called before its requests are answered. Many are added up at a time, or when someone
        asks: that is cheaper than one by one between inferences."""
        if run.failed:
            return
        self._new.append((time.time(), run))
        if len(self._new) >= MANY:
            with self._lock:
                self._add_new()

    @contextmanager
    def settled(self) -> Iterator[Self]:
        """The totals with all that ran, which do not change meanwhile: the one way to read them."""
        with self._lock:
            self._add_new()
            yield self

    def _add_new(self) -> None:
        while self._new:
            ended, run = self._new.popleft()
            self.last_inference_ms = max(self.last_inference_ms, int(ended * 1000))
            self._add(run)

    def _add(self, run: Ran) -> None:
        requests = len(run.queue_s)
        self.inferences += run.images
        self.executions += 1
        by_size = self.batches.get(run.images)
        if by_size is None:
            by_size = self.batches[run.images] = {key: Duration() for key in PARTS}
        for key, seconds in zip(PARTS, (run.input_s, run.compute_s, run.output_s), strict=True):
            by_size[key].add(seconds)
            self.durations[key].add(seconds * requests, requests)  # every request spent the batch's time
        self.compute_s.add(run.compute_s)
        total = run.input_s + run.compute_s + run.output_s
        for queue_s in run.queue_s:
            self.durations["queue"].add(queue_s)
            self.queue_s.add(queue_s)
            self.durations["success"].add(queue_s + total)
            self.request_s.add(queue_s + total)

    def decoded(self, seconds: float) -> None:
        """An image file was turned into a tensor."""
        with self._lock:
            self.decode_s.add(seconds)

    def failed(self, reason: str, seconds: float = 0.0) -> None:
        """A request for this model got an error."""
        with self._lock:
            self.durations["fail"].add(seconds)
            self.failures[reason] += 1

    def as_dict(self, name: str, version: str) -> dict[str, Any]:
        """As the statistics extension words it."""
        with self.settled():
            return {
                "name": name,
                "version": version,
                "last_inference": self.last_inference_ms,
                "inference_count": self.inferences,
                "execution_count": self.executions,
                "inference_stats": {key: duration.as_dict() for key, duration in self.durations.items()},
                "response_stats": {},
                "batch_stats": [
                    {"batch_size": size, **{key: duration.as_dict() for key, duration in parts.items()}}
                    for size, parts in sorted(self.batches.items())
                ],
                "memory_usage": [],
            }
