"""Prometheus metrics at ``/metrics``: read from what the server counts anyway, at the moment somebody asks.

Two sets of names. ``mcdeploy_*`` is ours, in seconds and with histograms. ``nv_*`` are Triton's, with its labels and
units, so that dashboards and autoscaling rules written for Triton go on working; they have no ``_total``, which
OpenMetrics asks of counters, and so are given without a type.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder, gzip_accepted
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector

from mcruntime.server.models import Model
from mcruntime.server.shadow import DIFFERENCE_BOUNDS, Shadow, Shadows
from mcruntime.server.statistics import BOUNDS_S, Histogram, Statistics
from mcruntime.server.tracing import GRPC_CODES
from mcruntime.server.web import Request, Response, Route

if TYPE_CHECKING:
    from mcruntime.server.app import App

BATCH_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128)
LABELS = ("model", "version")
# Our reasons in Triton's words.
NV_REASONS = {"rejected": "REJECTED", "timeout": "REJECTED", "canceled": "CANCELED", "internal": "BACKEND"}
NV_DURATIONS = {
    "nv_inference_queue_duration_us": ("queue", "Time requests spent in the queue"),
    "nv_inference_compute_input_duration_us": ("compute_input", "Time spent putting batches together"),
    "nv_inference_compute_infer_duration_us": ("compute_infer", "Time spent in the engine"),
    "nv_inference_compute_output_duration_us": ("compute_output", "Time spent handing answers out"),
}
ID_LENGTH = 12  # characters of a bundle's id; enough to tell bundles apart, as in the lines printed at start


def routes(app: App, shadows: Shadows | None = None) -> list[Route]:
    """``GET /metrics``, for ``App``; like all but the probes it asks for an API key where there are keys."""
    registry = CollectorRegistry()
    registry.register(ServerCollector(app, shadows))
    ProcessCollector(registry=registry)

    async def answer(request: Request) -> Response:
        # In a thread: half a millisecond for every version is too much for the loop when there are many.
        return await asyncio.to_thread(render, registry, request.header("accept"), request.header("accept-encoding"))

    return [Route("/metrics", {"GET": answer})]


def render(registry: CollectorRegistry, accept: str, accept_encoding: str) -> Response:
    """All metrics in the form a client asks for: OpenMetrics or Prometheus' text, packed or not."""
    try:
        encode, content_type = choose_encoder(accept)
    except (ValueError, TypeError):  # a version that is no number; the oldest form is what everyone reads
        encode, content_type = choose_encoder("")
    body = encode(registry)
    headers: tuple[tuple[str, str], ...] = (("vary", "Accept, Accept-Encoding"), ("cache-control", "no-store"))
    if gzip_accepted(accept_encoding):
        body, headers = gzip.compress(body, 1), (*headers, ("content-encoding", "gzip"))
    return Response(body, 200, content_type, headers)


class ServerCollector(Collector):
    """What the server knows of itself, as metric families. Reads in any thread, and so copies what others write before
    it looks at it; each statistics' lock is held for one copy."""

    def __init__(self, app: App, shadows: Shadows | None = None) -> None:
        self._app = app
        self._shadows = shadows
        self._cpu = CpuUse()

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._of_server()
        totals = [
            (labels, Totals.of(statistics)) for labels, statistics in sorted(dict(self._app.models.statistics).items())
        ]
        yield from _of_requests(totals)
        yield from _of_triton(totals)
        yield from _of_loaded(list(self._app.models))
        if self._shadows is not None:
            yield from _of_shadows(self._shadows.all)
        yield from _of_machine(self._cpu)

    def _of_server(self) -> Iterator[Metric]:
        from mcruntime.server.app import VERSION

        app = self._app
        yield InfoMetricFamily("mcdeploy_build", "The server", {"version": VERSION})
        answers = CounterMetricFamily("mcdeploy_http_responses", "HTTP answers by status", labels=["status"])
        for status, count in sorted(dict(app.answered).items()):
            answers.add_metric([str(status)], count)
        yield answers
        calls = CounterMetricFamily("mcdeploy_grpc_responses", "gRPC answers by code", labels=["code"])
        codes: Counter[str] = Counter()
        for status, count in dict(app.grpc_answered).items():
            codes[GRPC_CODES.get(status, "INTERNAL")] += count
        for code, count in sorted(codes.items()):
            calls.add_metric([code], count)
        yield calls
        yield GaugeMetricFamily(
            "mcdeploy_requests_in_flight", "POST requests and gRPC work without an answer yet", app.in_flight
        )
        yield GaugeMetricFamily("mcdeploy_draining", "1 while the server is being stopped", int(app.draining))
        if app.connections is not None:
            yield GaugeMetricFamily("mcdeploy_http_connections", "Open HTTP connections", app.connections())


class Totals(NamedTuple):
    """A consistent copy of one ``Statistics``."""

    success: int
    failures: Mapping[str, int]
    images: int
    executions: int
    ns: Mapping[str, int]
    batches: Mapping[int, int]
    histograms: Mapping[str, tuple[list[int], float]]

    @classmethod
    def of(cls, statistics: Statistics) -> Totals:
        """Copy under its lock."""
        with statistics.settled():
            return cls(
                statistics.durations["success"].count,
                dict(statistics.failures),
                statistics.inferences,
                statistics.executions,
                {key: duration.ns for key, duration in statistics.durations.items()},
                {size: parts["compute_infer"].count for size, parts in statistics.batches.items()},
                {
                    "request": _copy(statistics.request_s),
                    "queue": _copy(statistics.queue_s),
                    "compute": _copy(statistics.compute_s),
                    "decode": _copy(statistics.decode_s),
                },
            )


AllTotals = Sequence[tuple[tuple[str, str], Totals]]


def _of_requests(totals: AllTotals) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "mcdeploy_requests",
        "Requests by outcome: success; rejected (no room), timeout, canceled, input (wrong request), internal",
        labels=[*LABELS, "outcome"],
    )
    images = CounterMetricFamily("mcdeploy_images", "Images that were inferred", labels=LABELS)
    runs = CounterMetricFamily("mcdeploy_executions", "Runs of the engine", labels=LABELS)
    batches = HistogramMetricFamily("mcdeploy_batch_size", "Images in a run of the engine, unfilled", labels=LABELS)
    for labels, total in totals:
        requests.add_metric([*labels, "success"], total.success)
        for reason in ("rejected", "timeout", "canceled", "input", "internal"):
            requests.add_metric([*labels, reason], total.failures.get(reason, 0))
        images.add_metric(labels, total.images)
        runs.add_metric(labels, total.executions)
        counts = [0] * (len(BATCH_BOUNDS) + 1)
        for size, count in total.batches.items():
            counts[bisect_left(BATCH_BOUNDS, size)] += count
        batches.add_metric(labels, _cumulated(BATCH_BOUNDS, counts), total.images)
    yield from (requests, images, runs, batches)
    for key, text in {
        "request": "From acceptance to answer, decoding apart",
        "queue": "Waiting for the engine",
        "compute": "One run of the engine",
        "decode": "An image file to a tensor",
    }.items():
        family = HistogramMetricFamily(f"mcdeploy_{key}_duration_seconds", text, labels=LABELS)
        for labels, total in totals:
            counts, total_s = total.histograms[key]
            family.add_metric(labels, _cumulated(BOUNDS_S, counts), total_s)
        yield family


def _of_triton(totals: AllTotals) -> Iterator[Metric]:
    def family(name: str, text: str, value: Callable[[Totals], float]) -> Metric:
        made = UnknownMetricFamily(name, text, labels=LABELS)
        for labels, total in totals:
            made.add_metric(labels, value(total))
        return made

    yield family("nv_inference_request_success", "Number of successful inference requests", lambda total: total.success)
    failures = UnknownMetricFamily(
        "nv_inference_request_failure", "Number of failed inference requests", labels=[*LABELS, "reason"]
    )
    for labels, total in totals:
        by_reason = dict.fromkeys(("BACKEND", "CANCELED", "OTHER", "REJECTED"), 0)
        for reason, count in total.failures.items():
            by_reason[NV_REASONS.get(reason, "OTHER")] += count
        for reason, count in by_reason.items():
            failures.add_metric([*labels, reason], count)
    yield failures
    yield family("nv_inference_count", "Number of inferences performed (images)", lambda total: total.images)
    yield family("nv_inference_exec_count", "Number of model executions", lambda total: total.executions)
    yield family(
        "nv_inference_request_duration_us", "Cumulative request duration", lambda total: total.ns["success"] // 1000
    )
    for name, (key, text) in NV_DURATIONS.items():
        yield family(name, text, lambda total, key=key: total.ns[key] // 1000)  # type: ignore[misc]


def _of_loaded(models: Sequence[Model]) -> Iterator[Metric]:
    info = InfoMetricFamily("mcdeploy_model", "What answers", labels=LABELS)
    waiting = GaugeMetricFamily("mcdeploy_pending_requests", "Requests that wait for the engine", labels=LABELS)
    room = GaugeMetricFamily("mcdeploy_max_pending_requests", "Requests that may wait", labels=LABELS)
    pending = GaugeMetricFamily(
        "nv_inference_pending_request_count",
        "Instantaneous number of pending requests awaiting execution",
        labels=LABELS,
    )
    for model in models:
        labels = model.spec.name, model.spec.version
        facts: dict[str, str] = {
            "bundle": str(model.about.get("bundle", ""))[:ID_LENGTH],
            "file": str(model.about.get("model", "")),
        }
        for key in ("provider", "threads", "max_batch"):
            if key in model.about:
                facts[key] = str(model.about[key])
        info.add_metric(labels, facts)
        num_waiting = model.batcher.num_waiting
        waiting.add_metric(labels, num_waiting)
        room.add_metric(labels, model.batcher.max_queue)
        pending.add_metric(labels, num_waiting)
    yield from (info, waiting, room, pending)


def _of_shadows(shadows: Sequence[Shadow]) -> Iterator[Metric]:
    names = ("model", "version", "shadow")  # version: of the model whose answer is the reference

    def counter(name: str, text: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"mcdeploy_shadow_{name}", text, labels=names)

    mirrored = counter("mirrored", "Requests that were copied to the shadow")
    dropped = counter("dropped", "Requests that were not copied: no room, or other inputs")
    failed = counter("failed", "Copies that the shadow did not answer")
    compared = counter("compared_images", "Images whose two answers were compared")
    differing = counter("top1_disagreements", "Images whose best class is another")
    worst = GaugeMetricFamily("mcdeploy_shadow_relative_difference_max", "The largest so far", labels=names)
    spread = HistogramMetricFamily(
        "mcdeploy_shadow_relative_difference",
        "Of a request: the largest difference of logits, over the largest logit of the reference",
        labels=names,
    )
    compute = HistogramMetricFamily(
        "mcdeploy_shadow_compute_duration_seconds", "One run of the shadow's engine", labels=("model", "shadow")
    )
    for shadow in shadows:
        for version, seen in shadow.snapshot().items():
            labels = shadow.name, version, shadow.id
            mirrored.add_metric(labels, seen.mirrored)
            dropped.add_metric(labels, seen.dropped)
            failed.add_metric(labels, seen.failed)
            compared.add_metric(labels, seen.images)
            differing.add_metric(labels, seen.disagreements)
            worst.add_metric(labels, seen.worst)
            spread.add_metric(labels, _cumulated(DIFFERENCE_BOUNDS, seen.differences), seen.total)
        counts, total_s = Totals.of(shadow.statistics).histograms["compute"]
        compute.add_metric((shadow.name, shadow.id), _cumulated(BOUNDS_S, counts), total_s)
    yield from (mirrored, dropped, failed, compared, differing, worst, spread, compute)


def _of_machine(cpu: CpuUse) -> Iterator[Metric]:
    used = cpu.since_last()
    if used is not None:
        yield UnknownMetricFamily(
            "nv_cpu_utilization", "CPU utilization of the machine since the last look, 0..1", used
        )
    memory = _memory_bytes()
    if memory is not None:
        yield UnknownMetricFamily("nv_cpu_memory_total_bytes", "Memory of the machine", memory[0])
        yield UnknownMetricFamily("nv_cpu_memory_used_bytes", "Memory of the machine in use", memory[0] - memory[1])


class CpuUse:
    """How busy the whole machine was between two looks, as Triton counts it."""

    def __init__(self) -> None:
        self._before = _cpu_ticks()

    def since_last(self) -> float | None:
        """0..1; None where the system does not tell, or no time has passed."""
        now, before = _cpu_ticks(), self._before
        if now is None or before is None or now[1] == before[1]:
            return None
        self._before = now
        return (now[0] - before[0]) / (now[1] - before[1])


def _cpu_ticks() -> tuple[int, int] | None:
    """Busy and all ticks since boot."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = sum(ticks[3:5])  # idle, iowait
    return sum(ticks) - idle, sum(ticks)


def _memory_bytes() -> tuple[int, int] | None:
    """All and available."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in itertools.islice(file, 8))
        return page * os.sysconf("SC_PHYS_PAGES"), int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None


def _copy(histogram: Histogram) -> tuple[list[int], float]:
    return list(histogram.counts), histogram.total_s


def _cumulated(bounds: Iterable[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Buckets as Prometheus wants them: each holds all that is not larger."""
    names = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(names, itertools.accumulate(counts), strict=True))
