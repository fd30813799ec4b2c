"""What the server is timed with: the raw loop, the load generators, and a look at who else uses the processors.

``wrk`` (HTTP/1.1) and ``h2load`` (gRPC as plain HTTP/2 POSTs) share the cores with the server, as they do in every run.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
from numpy.typing import NDArray

MARK = "SPEED_RUN"  # in the environment of everything that a run starts, so that it can be told from foreign processes
MAX_FOREIGN = 0.06  # share of all cores; samples with more are left out
POST_LUA = Path(__file__).parent / "competitors" / "post.lua"

Images = NDArray[np.float32]  # [B, 3, 64, 64]


class ToolFailed(RuntimeError):
    """A load generator that could not do its work."""


@dataclass(frozen=True)
class Raw:
    """An in-process loop, at one batch size."""

    images_per_s: float
    p50_us: float  # of one call
    cpu_us: float  # processor time of an image, all cores together
    foreign: float


@dataclass(frozen=True)
class Load:
    """What a load generator saw."""

    requests_per_s: float
    p50_us: float
    p99_us: float
    requests: int
    errors: int  # anything but a whole, right answer
    cpu_us: float  # processor time that the server, all its processes, spent on a request
    foreign: float  # share of all cores that others used


@dataclass(frozen=True)
class CpuUse:
    """Between two moments."""

    foreign: float  # share of all cores, 0..1, of processes that this run did not start
    own_s: float  # of this process, with its children that have ended
    servers_s: float  # of the marked processes that live


class CpuWatch:
    """Who uses the processors from now on.

    Time in interrupts counts as a process's own, as Linux counts it unless built with CONFIG_IRQ_TIME_ACCOUNTING; where
    it is, ``foreign`` says too much rather than too little. What the machine's host took away (steal) is foreign.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._began = self._now()

    def read(self) -> CpuUse:
        """Since the beginning."""
        began, ended = self._began, self._now()
        wall, busy, own, servers = (after - before for before, after in zip(began, ended, strict=True))
        return CpuUse(max(0.0, (busy - own - servers) / (wall * (os.cpu_count() or 1))), own, servers)

    def _now(self) -> tuple[float, float, float, float]:
        total = psutil.cpu_times()
        busy = total.user + total.nice + total.system + total.irq + total.softirq + total.steal
        servers = 0.0
        for process in marked(self._mark):
            with suppress(psutil.Error):  # ended meanwhile
                servers += _seconds_of(process)
        return time.monotonic(), busy, _seconds_of(psutil.Process()), servers


def _seconds_of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system + times.children_user + times.children_system


def wait_for_quiet(patience_s: float, mark: str) -> None:
    """Until others leave the processors alone for a second, or the patience is over."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        watch = CpuWatch(mark)
        time.sleep(1.0)
        if watch.read().foreign <= MAX_FOREIGN:
            return


def marked(mark: str) -> list[psutil.Process]:
    """The living processes, other than this one, that carry the mark of this run."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):  # a kernel thread, somebody else's, or gone
            continue
    return found


def open_session(file: Path, threads: int) -> onnxruntime.InferenceSession:
    """As the servers are told to open theirs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def loop(call: Callable[[], object], images: int, seconds: float, mark: str) -> Raw:
    """Call until the time is up; ``images`` are done by each call."""
    for _ in range(5):
        call()
    watch = CpuWatch(mark)
    times = []
    began = time.perf_counter()
    last = began
    while last - began < seconds:
        call()
        now = time.perf_counter()
        times.append(now - last)
        last = now
    use, done = watch.read(), len(times) * images
    return Raw(done / (last - began), statistics.median(times) * 1e6, use.own_s / done * 1e6, use.foreign)


def wrk(url: str, headers: Mapping[str, str], body: bytes, connections: int, seconds: float, mark: str) -> Load:
    """Load with keep-alive connections, each with one request under way.

    Raises:
        ToolFailed: wrk is missing or did not finish.
    """
    with tempfile.TemporaryDirectory() as folder:
        body_file, header_file = Path(folder, "body"), Path(folder, "headers")
        body_file.write_bytes(body)
        header_file.write_text("".join(f"{name}: {value}\n" for name, value in headers.items()))
        names = {"SPEED_BODY": str(body_file), "SPEED_HEADERS": str(header_file)}
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--timeout", "10s", "-s", POST_LUA, url]
        watch = CpuWatch(mark)
        said = _run(command, mark, seconds, names)
        use = watch.read()
    line = next((line for line in said.splitlines() if line.startswith("OUTCOME ")), None)
    if line is None:
        raise ToolFailed(f"wrk: {said.strip()[-300:]}")
    told: dict[str, Any] = json.loads(line.removeprefix("OUTCOME "))
    errors = told["bad_status"] + told["socket_errors"]
    rate = told["requests"] / told["seconds"]
    cpu_us = use.servers_s / max(1, told["requests"]) * 1e6
    return Load(rate, told["p50_us"], told["p99_us"], told["requests"], errors, cpu_us, use.foreign)


def h2load(
    url: str, headers: Mapping[str, str], body: bytes, answer_bytes: int, connections: int, seconds: float, mark: str
) -> Load:
    """Load with HTTP/2 connections, each with one stream under way.

    A gRPC error is an HTTP 200 whose trailers say so, which h2load does not read; but it comes without a message, so
    the bytes that arrived tell: ``answer_bytes`` for each request.

    Raises:
        ToolFailed: h2load is missing or did not finish.
    """
    with tempfile.TemporaryDirectory() as folder:
        body_file, log = Path(folder, "body"), Path(folder, "log")
        body_file.write_bytes(body)
        command = ["h2load", f"-D{seconds:.0f}", "-t1", f"-c{connections}", "-m1", f"-d{body_file}"]
        command += [f"-H{name}: {value}" for name, value in headers.items()]
        watch = CpuWatch(mark)
        said = _run([*command, f"--log-file={log}", url], mark, seconds)
        use = watch.read()
        rows = [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []
    counts = re.search(r"requests: (\d+) total.* (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", said)
    data = re.search(r"\((\d+)\) data", said)
    if counts is None or data is None or not rows:
        raise ToolFailed(f"h2load: {said.strip()[-300:]}")
    succeeded, wrong = int(counts[2]), sum(int(counts[index]) for index in (3, 4, 5))
    missing = max(0, succeeded - int(data[1]) // answer_bytes)
    times = [int(row[2]) for row in rows if row[1] == "200"]
    wrong += missing + sum(row[1] != "200" for row in rows)
    p50, p99 = np.percentile(times, (50, 99)) if times else (0.0, 0.0)
    cpu_us = use.servers_s / max(1, succeeded) * 1e6
    return Load(succeeded / seconds, float(p50), float(p99), succeeded, wrong, cpu_us, use.foreign)


def _run(command: list[Any], mark: str, seconds: float, names: Mapping[str, str] | None = None) -> str:
    environment = os.environ | {MARK: mark} | dict(names or {})
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds + 30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolFailed(f"{command[0]}: {error}; Debian: apt-get install wrk nghttp2-client") from None
    return done.stdout + done.stderr


def as_json(figures: Raw | Load) -> dict[str, float]:
    """Rounded to what they are good for."""
    return {key: round(value, 4) for key, value in asdict(figures).items()}
