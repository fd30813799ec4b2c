"""mcdeploy's server against others, as shares of what a loop around ONNX Runtime does on the same cores; by hand.

    PYTHONPATH=tests python -m serving_speed WORK [--servers ours,triton,...] [--rounds 3] [--seconds 4]
        [--parts compare,overhead,pair,image] [--connections 1,8,32] [--tries 3] [--patience 30] [--venvs DIR]
        [--json FILE]

WORK is any folder; the nets are made there once, logs are written there. Debian: apt-get install wrk nghttp2-client.
The competitors' virtual environments are made by hand, once: ``speed_servers`` says how; a server without one is an
error, not left out. All of it listens on 127.0.0.1 only. 3 rounds of everything take about 30 minutes.

    compare   resnet18, one 49 KB tensor a request, every server, every payload it takes, at each number of connections
    overhead  a 40 us net: what the server adds to it at one connection
    pair      a net and its pruned form: how much of the speed-up is left when served
    image     a JPEG to /predict, against a loop that decodes and runs

Right before and after each load, the raw loop is timed at batch 1 and 8: R1 and R8 are requests a second divided by
the mean of the two. The load generator shares the cores with the server. A sample during which other processes had
more than 6 % of the cores never counts; it is taken again, after a wait for a quiet machine (--tries, --patience). Nor
does one count with an answer that was not right. Servers take turns within each round; the figures are medians over
the rounds. CPU is the processor time of a server for each request, over all cores.
mcdeploy's server runs with an API key, its limits and its metrics on.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from mcruntime.bundle import load_bundle
from mcruntime.preprocess import open_image, prepare
from PIL import Image
from rich.console import Console
from rich.table import Table
from speed_load import MAX_FOREIGN, Images, Load, Raw, as_json, h2load, loop, marked, open_session, wait_for_quiet, wrk
from speed_models import make_bundle, model_file
from speed_servers import BARE, OURS, SERVERS, Logits, Model, Running, ServerFailed, Way, make_ways, running

from mcdeploy.surroundings import describe_afterwards, describe_machine

PARTS = ("compare", "overhead", "pair", "image")
PAIR = ("resnet34", "resnet34_pruned")
GRPC_HEADERS = {"content-type": "application/grpc", "te": "trailers"}
PACKAGES = ("litserve", "nvidia-pytriton", "mlserver", "kserve", "bentoml", "ray", "onnxruntime", "uvicorn")


@dataclass(frozen=True)
class Net:
    """A model to serve, what it is asked, what it must answer, and the raw loops around it."""

    model: Model
    ways: dict[str, Way]
    logits: Logits
    shares: Logits  # logarithms, for the JPEG
    raw_tensor: tuple[Callable[[], object], Callable[[], object]]  # batch 1, batch 8
    raw_jpeg: Callable[[], object]

    def expected(self, way: Way) -> Logits:
        return self.shares if way.name == "jpeg" else self.logits


@dataclass(frozen=True)
class Job:
    """One server, started once a round with one net."""

    part: str
    server: str
    net: str
    ways: tuple[str, ...]
    connections: tuple[int, ...]


@dataclass(frozen=True)
class RawPair:
    """The raw loop at batch 1 and 8, one right after the other; of a JPEG only the first."""

    one: Raw
    eight: Raw | None

    @property
    def foreign(self) -> float:
        return max(self.one.foreign, self.eight.foreign if self.eight else 0.0)


def open_net(name: str, work: Path, threads: int) -> Net:
    """Make it, or find it made; open it for the raw loops."""
    bundle = make_bundle(name, work)
    file = model_file(bundle)
    session = open_session(file, threads)
    key, output = session.get_inputs()[0].name, session.get_outputs()[0]
    images = np.random.default_rng(0).standard_normal((8, 3, 64, 64)).astype(np.float32)
    jpeg, how = _jpeg(), load_bundle(bundle).manifest.preprocessing

    def run(inputs: Images) -> Images:
        return session.run(None, {key: inputs})[0]

    def decode_and_run() -> Images:
        return run(prepare(open_image(jpeg), how)[np.newaxis])

    of_jpeg = decode_and_run()[0].astype(np.float64)
    model = Model(name, bundle, file, key, output.name, output.shape[1])
    return Net(
        model,
        make_ways(model, images[:1], jpeg),
        run(images[:1])[0],
        (of_jpeg - np.log(np.exp(of_jpeg - of_jpeg.max()).sum()) - of_jpeg.max()).astype(np.float32),
        (lambda: run(images[:1]), lambda: run(images)),
        decode_and_run,
    )


def _jpeg() -> bytes:
    """500 x 375 pixels, about as large a file as a photograph of that size."""
    coarse = np.random.default_rng(0).integers(0, 256, (47, 63, 3), dtype=np.uint8)
    fine = np.random.default_rng(1).normal(0, 6, (375, 500, 3))
    smooth = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), np.float64)
    stream = io.BytesIO()
    Image.fromarray((smooth + fine).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=88)
    return stream.getvalue()


def make_jobs(parts: Sequence[str], servers: Sequence[str], connections: tuple[int, ...]) -> list[Job]:
    """What one round does, in order."""
    jobs = []
    if "compare" in parts:
        jobs += [Job("compare", name, "resnet18", SERVERS[name].ways, connections) for name in servers]
    if "overhead" in parts:
        jobs += [Job("overhead", name, "tiny", SERVERS[name].ways[:1], (1,)) for name in servers]
    if "pair" in parts and OURS in servers:
        jobs += [Job("pair", OURS, net, ("binary",), (1, 32)) for net in PAIR]
    if "image" in parts and OURS in servers:
        jobs.append(Job("image", OURS, "resnet18", ("jpeg",), (1, 8)))
    return jobs


class Run:
    """All that one call of this script measures.

    Attributes:
        samples: every load that was measured, also those that do not count.
        starts: cold start and memory, every time a server was started.
        failures: in words.
    """

    def __init__(self, work: Path, venvs: Path, options: argparse.Namespace) -> None:
        self.samples: list[dict[str, Any]] = []
        self.starts: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self._work, self._venvs = work, venvs
        self._threads, self._seconds = options.threads, options.seconds
        self._tries, self._patience = options.tries, options.patience
        self._nets: dict[str, Net] = {}

    def do(self, job: Job, number: int) -> None:
        """Start the server, load it in every way, stop it; what goes wrong is kept in words."""
        if job.net not in self._nets:
            self._nets[job.net] = open_net(job.net, self._work, self._threads)
        net, mark = self._nets[job.net], uuid.uuid4().hex
        label = {"round": number, "part": job.part, "server": job.server, "net": job.net}
        try:
            server = SERVERS[job.server]
            with running(server, net.model, self._threads, self._work, self._venvs, mark) as server_running:
                server_running.wait(net.ways[job.ways[0]])
                for name in job.ways:
                    self._load_all(server_running, net, net.ways[name], job.connections, label, mark)
                self.starts.append(
                    label | {
                        "cold_start_s": round(server_running.cold_start_s, 3),
                        "memory_mb": round(server_running.memory_mb(), 1),
                    }
                )  # fmt: skip
        except (ServerFailed, OSError) as error:
            self._fail(f"{job.server}, {job.net}: {error}")
        if marked(mark):
            self._fail(f"{job.server}: some of its processes would not end")

    def _load_all(
        self, server: Running, net: Net, way: Way, connections: tuple[int, ...], label: dict[str, Any], mark: str
    ) -> None:
        try:
            answer_bytes = server.check(way, net.expected(way))
            self._load(server, way, 8, max(1.0, self._seconds / 4), answer_bytes, mark)  # warm-up
            before = self._raw(net, way, mark)
            for count in connections:
                for number in range(self._tries):
                    if number:
                        wait_for_quiet(self._patience, mark)
                        before = self._raw(net, way, mark)
                    load = self._load(server, way, count, self._seconds, answer_bytes, mark)
                    after = self._raw(net, way, mark)
                    sample = label | {"way": way.name, "connections": count} | _figures(before, load, after)
                    self.samples.append(sample)
                    print(_line(sample), flush=True)
                    before = after
                    if sample["counts"] or load.errors:
                        break
        except Exception as error:  # of whatever library is asked; the other ways are still measured
            self._fail(f"{label['server']}, {label['net']}, {way.name}: {type(error).__name__}: {error}")

    def _raw(self, net: Net, way: Way, mark: str) -> RawPair:
        seconds = max(0.5, self._seconds / 4)
        if way.name == "jpeg":
            return RawPair(loop(net.raw_jpeg, 1, seconds, mark), None)
        one, eight = net.raw_tensor
        return RawPair(loop(one, 1, seconds, mark), loop(eight, 8, seconds, mark))

    def _load(self, server: Running, way: Way, count: int, seconds: float, answer_bytes: int, mark: str) -> Load:
        if not way.is_grpc:
            return wrk(server.url(way), server.headers(way), way.body, count, seconds, mark)
        frame = b"\0" + len(way.body).to_bytes(4, "big") + way.body  # gRPC: not compressed, length, message
        headers = GRPC_HEADERS | server.headers(way)
        return h2load(server.url(way), headers, frame, answer_bytes + 5, count, seconds, mark)

    def _fail(self, said: str) -> None:
        said = " ".join(said.split())[:300]
        print(f"FAILED {said}", flush=True)
        self.failures.append(said)


def _figures(before: RawPair, load: Load, after: RawPair) -> dict[str, Any]:
    raw1 = (before.one.images_per_s + after.one.images_per_s) / 2
    figures = {
        "r1": load.requests_per_s / raw1,
        "requests_per_s": load.requests_per_s,
        "raw1": raw1,
        "p50_us": load.p50_us,
        "p99_us": load.p99_us,
        "tail": load.p99_us / load.p50_us if load.p50_us else 0.0,
        "cpu_us": load.cpu_us,
        "raw1_cpu_us": (before.one.cpu_us + after.one.cpu_us) / 2,
        "added_p50_us": load.p50_us - (before.one.p50_us + after.one.p50_us) / 2,
        "errors": load.errors,
        "foreign": max(before.foreign, load.foreign, after.foreign),
    }
    if before.eight is not None and after.eight is not None:
        figures["raw8"] = (before.eight.images_per_s + after.eight.images_per_s) / 2
        figures["r8"] = load.requests_per_s / figures["raw8"]
    rounded = {key: round(value, 4) for key, value in figures.items()}
    counts = load.errors == 0 and load.requests > 0 and figures["foreign"] <= MAX_FOREIGN
    return rounded | {"counts": counts, "load": as_json(load), "before": _raws(before), "after": _raws(after)}


def _raws(raw: RawPair) -> list[dict[str, float]]:
    return [as_json(one) for one in (raw.one, raw.eight) if one is not None]


def _line(sample: dict[str, Any]) -> str:
    r8 = f" R8 {sample['r8']:.2f}" if "r8" in sample else ""
    note = "" if sample["counts"] else "  DOES NOT COUNT"
    return (
        f"{sample['round']} {sample['part']:8} {sample['server']:15} {sample['net']:15} {sample['way']:13} "
        f"c={sample['connections']:<2} {sample['requests_per_s']:7.0f}/s R1 {sample['r1']:.2f}{r8} "
        f"p50 {sample['p50_us'] / 1e3:.2f} ms p99 {sample['p99_us'] / 1e3:.2f} ms errors {sample['errors']} "
        f"CPU {sample['cpu_us'] / 1e3:.2f} ms (raw1 {sample['raw1_cpu_us'] / 1e3:.2f}) "
        f"foreign {sample['foreign']:.1%}{note}"
    )


Key = tuple[str, str, str, str, int]  # part, server, net, way, connections
FIGURES = ("r1", "r8", "requests_per_s", "raw1", "raw8", "p50_us", "p99_us", "tail", "added_p50_us", "cpu_us")


def summarise(samples: Sequence[dict[str, Any]]) -> dict[Key, dict[str, float]]:
    """Medians of the samples that count; of those where none counts, nothing."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for sample in samples:
        if sample["counts"]:
            key = tuple(sample[name] for name in ("part", "server", "net", "way", "connections"))
            groups.setdefault(key, []).append(sample)
    medians = {}
    for key, group in groups.items():
        names = [name for name in FIGURES if name in group[0]]
        medians[key] = {name: statistics.median(sample[name] for sample in group) for name in names}
        medians[key]["samples"] = len(group)
    return medians


@dataclass(frozen=True)
class Target:
    """One line of the issue, and what became of it."""

    what: str
    limit: float | None  # None: for information
    at_most: bool
    figure: float | None  # None: not measured

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not measured"
        if self.limit is None:
            return ""
        return "met" if (self.figure <= self.limit if self.at_most else self.figure >= self.limit) else "NOT MET"


def judge(samples: Sequence[dict[str, Any]], starts: Sequence[dict[str, Any]]) -> list[Target]:
    """The issue's figures, one by one."""
    found = summarise(samples)

    def figure(part: str, net: str, way: str, count: int, name: str, server: str = OURS) -> float | None:
        return found.get((part, server, net, way, count), {}).get(name)

    def least(what: str, limit: float | None, value: float | None) -> Target:
        return Target(what, limit, False, value)

    def most(what: str, limit: float | None, value: float | None) -> Target:
        return Target(what, limit, True, value)

    def compare(way: str, count: int, name: str) -> float | None:
        return figure("compare", "resnet18", way, count, name)

    targets = [
        least("binary, 1 connection, of raw1", 0.90, compare("binary", 1, "r1")),
        least("binary, 8 connections, of raw1", 1.05, compare("binary", 8, "r1")),
        least("binary, 32 connections, of raw8", 1.05, compare("binary", 32, "r8")),
        most("binary, 32 connections, p99 / p50", 1.5, compare("binary", 32, "tail")),
        least("JSON, 32 connections, of raw8", 0.80, compare("json", 32, "r8")),
        least("gRPC, 1 connection, of raw1", 0.75, compare("grpc", 1, "r1")),
        least("gRPC, 32 connections, of raw1", 1.2, compare("grpc", 32, "r1")),
        most("added to a 40 us net, p50, us", 100, figure("overhead", "tiny", "binary", 1, "added_p50_us")),
        most("the same of a bare app, us", None, figure("overhead", "tiny", "raw", 1, "added_p50_us", BARE)),
    ]
    for count in (1, 8, 32):
        for rival in _rivals(found):
            limit = 1.0 if rival == "triton" else 1.5
            share = _share(count)
            ours, theirs = compare("binary", count, share), _best(found, rival, count, grpc=None)
            if rival == "triton":
                theirs = _best(found, rival, count, grpc=False)
                grpc_ratio = _ratio(compare("grpc", count, share), _best(found, rival, count, grpc=True))
                targets.append(least(f"gRPC / triton's gRPC, {count} connections", None, grpc_ratio))
            targets.append(least(f"binary / {rival}'s best, {count} connections", limit, _ratio(ours, theirs)))
    for count, name in ((1, "r1"), (32, "r8")):
        dense, pruned = (figure("pair", net, "binary", count, name) for net in PAIR)
        targets.append(least(f"pruned speed-up kept, {count} connections", 0.9, _ratio(pruned, dense)))
    ours_started = [start for start in starts if start["server"] == OURS and start["part"] == "compare"]
    for what, limit, name in (("cold start, s", 1.5, "cold_start_s"), ("memory, MB (10^6 bytes)", 250, "memory_mb")):
        values = [start[name] for start in ours_started]
        targets.append(most(what, limit, statistics.median(values) if values else None))
    for count in (1, 8):
        share = figure("image", "resnet18", "jpeg", count, "r1")
        targets.append(least(f"JPEG, {count} connections, of decode-and-run", None, share))
    return targets


def _rivals(found: dict[Key, dict[str, float]]) -> list[str]:
    """Families: litserve and litserve-single are one rival, at its best."""
    return sorted({key[1].partition("-")[0] for key in found if key[0] == "compare" and key[1] not in (OURS, BARE)})


def _best(found: dict[Key, dict[str, float]], rival: str, count: int, grpc: bool | None) -> float | None:
    shares = [
        row[_share(count)]
        for (part, server, _, way, connections), row in found.items()
        if part == "compare" and server.partition("-")[0] == rival and connections == count
        if grpc is None or (way == "grpc") == grpc
    ]
    return max(shares, default=None)


def _share(count: int) -> str:
    """What a server with this many connections is held against: it can only batch where enough requests wait."""
    return "r8" if count >= 32 else "r1"


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def show(run: Run, targets: Sequence[Target]) -> None:
    """Both tables."""
    console = Console(width=150 if not sys.stdout.isatty() else None)
    table = Table(title="Medians of the samples that count")
    for column in (
        "part",
        "server",
        "net",
        "payload",
        "c",
        "req/s",
        "R1",
        "R8",
        "p50 ms",
        "p99 ms",
        "CPU ms",
        "samples",
    ):
        table.add_column(column)
    for (part, server, net, way, count), row in sorted(summarise(run.samples).items()):
        r8 = f"{row['r8']:.2f}" if "r8" in row else ""
        cells = (f"{row['requests_per_s']:.0f}", f"{row['r1']:.2f}", r8)
        times = [f"{row[name] / 1e3:.2f}" for name in ("p50_us", "p99_us", "cpu_us")]
        table.add_row(part, server, net, way, str(count), *cells, *times, str(row["samples"]))
    console.print(table)
    table = Table(title="Targets")
    for column in ("what", "wanted", "measured", ""):
        table.add_column(column)
    for target in targets:
        wanted = "" if target.limit is None else f"{'<=' if target.at_most else '>='} {target.limit:.4g}"
        table.add_row(target.what, wanted, "" if target.figure is None else f"{target.figure:.3g}", target.verdict)
    console.print(table)
    for failure in run.failures:
        console.print(f"FAILED {failure}", markup=False)


def versions(venvs: Path, servers: Sequence[str]) -> dict[str, dict[str, str]]:
    """Of the packages that matter, in each virtual environment."""
    asked = (
        "import importlib.metadata, json\n"
        "found = {d.metadata['Name'].lower(): d.version for d in importlib.metadata.distributions()}\n"
        f"print(json.dumps({{n: found[n] for n in {PACKAGES!r} if n in found}}))"
    )
    told = {"mcdeploy": {name: version(name) for name in ("onnxruntime", "uvicorn")}}
    for venv in {SERVERS[name].venv for name in servers} - {""}:
        done = subprocess.run([venvs / venv / "bin/python", "-c", asked], capture_output=True, text=True, check=True)
        told[venv] = json.loads(done.stdout)
    return told


def _listed(possible: Sequence[str]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in possible]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(possible)}")
        return chosen

    return read


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving_speed", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("work", type=Path, help="folder for nets and logs")
    parser.add_argument("--servers", type=_listed(list(SERVERS)), default=list(SERVERS), help="(default: all)")
    parser.add_argument("--parts", type=_listed(PARTS), default=list(PARTS), help="(default: all)")
    parser.add_argument("--connections", type=lambda text: tuple(map(int, text.split(","))), default=(1, 8, 32))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of each load; raw loops take a quarter")
    parser.add_argument("--tries", type=int, default=3, help="of a sample that others disturb")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait for a quiet machine, each time")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of ONNX Runtime, everywhere")
    parser.add_argument("--venvs", type=Path, help="where the competitors are installed (default: WORK/venvs)")
    parser.add_argument("--json", type=Path, help="where to write all samples")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a server failed, whatever the figures are."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped then, too
    options.work.mkdir(parents=True, exist_ok=True)
    work, venvs = options.work.resolve(), (options.venvs or options.work / "venvs").resolve()
    for venv in sorted({SERVERS[name].venv for name in options.servers} - {""}):
        if not (venvs / venv / "bin/python").exists():
            sys.exit(f"{venvs / venv}: there is no such virtual environment; speed_servers.py says how to make it")
    about: dict[str, Any] = {
        "command": "python -m serving_speed WORK " + _flags(options),
        "machine": describe_machine(),
        "threads": options.threads,
        "versions": versions(venvs, options.servers),
    }
    run = Run(work, venvs, options)
    for number in range(1, options.rounds + 1):
        for job in make_jobs(options.parts, options.servers, options.connections):
            run.do(job, number)
            targets = judge(run.samples, run.starts)
            if options.json is not None:
                _write(options.json, about, run, targets)
    show(run, targets)
    return 1 if run.failures else 0


def _flags(options: argparse.Namespace) -> str:
    lists = {name: ",".join(map(str, getattr(options, name))) for name in ("servers", "parts", "connections")}
    numbers = {name: str(getattr(options, name)) for name in ("rounds", "seconds", "threads", "tries", "patience")}
    return " ".join(f"--{name} {value}" for name, value in (lists | numbers).items())


def _write(path: Path, about: dict[str, Any], run: Run, targets: Sequence[Target]) -> None:
    rows = [
        dict(zip(("part", "server", "net", "way", "connections"), key, strict=True)) | _rounded(row)
        for key, row in sorted(summarise(run.samples).items())
    ]
    judged = [
        {"what": target.what, "wanted": target.limit, "at_most": target.at_most, "measured": target.figure}
        | {"verdict": target.verdict}
        for target in targets
    ]
    tree = about | describe_afterwards() | {"targets": judged, "medians": rows, "starts": run.starts}
    text = json.dumps(tree | {"failures": run.failures, "samples": run.samples}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def _rounded(row: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in row.items()}


if __name__ == "__main__":
    sys.exit(main())
