"""Measure how long one inference takes, fairly: side by side, interleaved, with the uncertainty beside every number.

The machine's speed drifts (clocks, heat, neighbours), so timing A and then B compares two moments, not two models: on a
shared machine that once showed 0.64x where the truth was 0.98x. Here the runners take turns in short rounds, and the
ratio is taken within rounds, where drift cancels. ``METHOD`` says in words what is inside the timed region; every
report carries it.
"""

# B = batch, R = rounds, K = recorded inferences of one turn, X = bootstrap draws, P = percentiles.
from __future__ import annotations

import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from mcruntime.engine import Runner, available_threads
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from mcdeploy.errors import BackendError, InputError, MissingExtraError, SlowerError

TURN_SECONDS = 0.02  # a turn records as many inferences as fit in this, at least 1 ...
MAX_PER_TURN = 8  # ... and at most this many
MAX_SAMPLES = 10_000  # of one runner and batch size; more would not narrow the intervals that matter
MIN_WARMUP_RUNS = 3
ENOUGH_FOR_P99 = 1000  # fewer samples hold fewer than 10 beyond p99
RESAMPLES = 1000
POINTS = (50.0, 90.0, 99.0)  # percentiles
# Okabe and Ito's colours: told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

METHOD = {
    "timed region, host": (
        "one call of infer on one caller's thread: from float32 images in host memory to float32 logits in host "
        "memory, with the runner's own input and output checks and, on a GPU, both copies; decoding and resizing of "
        "images are outside"
    ),
    "timed region, device": (
        "between two CUDA events around the model: images and logits stay on the GPU, no copies and no checks; used "
        "only when every runner can, else all are timed on the host; host_p50_ms is the median time of the same calls "
        "on the host's clock, with copies, and much larger when launching kernels is the bottleneck"
    ),
    "order": (
        "rounds; in each, every runner takes one turn, and the order of turns changes from round to round. A turn "
        "opens with one inference that is not recorded, so that recorded ones find their own model's caches and "
        "threads"
    ),
    "excluded": "loading, and a warm-up by time of every runner at every batch size; garbage collection is off",
    "interval": (
        "95 %, bootstrap over rounds (1000 draws): how much the number would change if this machine were measured "
        "again in the same state; not how much another machine or another load would change it"
    ),
    "ratio": "median latency divided by the first runner's, both from the same rounds; below 1 is faster",
    "throughput": "batch size divided by mean host or device latency; one caller, no overlap of requests",
    "memory": (
        "growth of the whole process's resident memory while the runner was loaded (load) and while it warmed up at "
        "all batch sizes (run); libraries count for the first runner that needs them, and memory on a GPU not at all"
    ),
}


@runtime_checkable
class DeviceTimer(Protocol):
    """A runner that can time itself with the device's own clock."""

    def time_on_device(self, images: NDArray[np.float32]) -> float | None:
        """Milliseconds of one inference on the device; None when the model runs on the host after all."""


@dataclass(frozen=True)
class Interval:
    """A measured value with its bootstrap 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """One runner at one batch size; times in milliseconds."""

    runner: str
    batch: int
    num_samples: int
    num_rounds: int
    timed: Literal["host", "device"]
    p50_ms: Interval
    p90_ms: Interval
    p99_ms: Interval
    p99_is_rough: bool  # fewer than 1000 samples
    min_ms: float
    mean_ms: float
    images_per_second: float
    ratio: Interval  # of medians, to the first runner; below 1 is faster
    host_p50_ms: float  # the same calls on the host's clock; equal to p50_ms unless timed on the device
    quantiles_ms: tuple[float, ...]  # at 0, 0.5, 1, ... 100 %: the distribution, for plots


@dataclass(frozen=True)
class Measured:
    """What ran: a runner's facts, and how much the process's resident memory grew for it."""

    name: str
    facts: dict[str, str]
    load_bytes: int
    run_bytes: int


@dataclass(frozen=True)
class BenchReport:
    """Everything one comparison found, as plain data."""

    created: str  # UTC
    runners: tuple[Measured, ...]  # the first one is the yardstick
    latencies: tuple[Latency, ...]  # by batch size, then in the order of the runners
    machine: dict[str, str]
    method: dict[str, str]  # what the numbers mean

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {"kind": "mcdeploy bench", "version": 1, **asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> BenchReport:
        """The inverse of ``to_json``.

        Raises:
            ValueError: not a bench report of this version.
        """
        try:
            if (data["kind"], data["version"]) != ("mcdeploy bench", 1):
                raise ValueError(f"expected a mcdeploy bench of version 1, got {data['kind']!r} {data['version']!r}")
            return BenchReport(
                data["created"],
                tuple(Measured(**row) for row in data["runners"]),
                tuple(_latency_from_json(row) for row in data["latencies"]),
                dict(data["machine"]),
                dict(data["method"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a bench report: {error!r}") from None

    def at(self, runner: str, batch: int) -> Latency | None:
        """One runner's numbers at one batch size; None when that was not measured."""
        return next((row for row in self.latencies if (row.runner, row.batch) == (runner, batch)), None)

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title="Latency in milliseconds, with 95 % intervals", title_style="bold", caption_justify="left")
        table.add_column("batch", justify="right")
        table.add_column("runner", overflow="fold")
        for head in ("p50", "p90", "p99", "min", "img/s", f"x {self.runners[0].name}", "n"):
            table.add_column(Text(head), justify="right")
        for row in self.latencies:
            new_batch = row.runner == self.runners[-1].name
            rough = "~" if row.p99_is_rough else ""
            table.add_row(
                str(row.batch),
                Text(row.runner),
                with_interval(row.p50_ms),
                with_interval(row.p90_ms),
                rough + with_interval(row.p99_ms),
                _digits(row.min_ms),
                f"{row.images_per_second:,.0f}" if row.images_per_second >= 100 else _digits(row.images_per_second),
                with_interval(row.ratio) if row.runner != self.runners[0].name else "1",
                str(row.num_samples),
                end_section=new_batch,
            )
        table.caption = Text("\n".join(self._notes()))
        return table

    def _notes(self) -> list[str]:
        timed = sorted({row.timed for row in self.latencies})
        notes = [f"timed on the {' and '.join(timed)}; a ratio below 1 is faster than {self.runners[0].name}"]
        if any(row.p99_is_rough for row in self.latencies):
            notes.append(f"~ rough: p99 from fewer than {ENOUGH_FOR_P99} samples")
        for runner in self.runners:
            facts = [runner.facts[key] for key in ("backend", "mode", "provider", "precision") if key in runner.facts]
            threads = f", {runner.facts['threads']} thread(s)" if "threads" in runner.facts else ""
            memory = f"memory +{runner.load_bytes / 2**20:.0f} MiB loaded, +{runner.run_bytes / 2**20:.0f} MiB running"
            notes.append(f"{runner.name}: {' '.join(facts)}{threads}; {memory}")
        notes.append("; ".join(f"{key} {value}" for key, value in self.machine.items()))
        return notes

    def plot(self, path: Path | str) -> None:
        """Draw the distribution of every runner's latency, one panel a batch size, into a .png, .svg or .pdf file.

        Raises:
            MissingExtraError: matplotlib is not installed.
            InputError: another kind of file.
        """
        batches = list(dict.fromkeys(row.batch for row in self.latencies))
        figure = figure_for(path, (7.5, 0.8 + 3.3 * len(batches)))
        for axes, batch in zip(np.atleast_1d(figure.subplots(len(batches), 1)), batches, strict=True):
            rows = [row for row in self.latencies if row.batch == batch]
            for i, row in enumerate(rows):
                style = style_of(i)
                shares, times_ms = distribution(row)
                label = f"{row.runner}: p50 {with_interval(row.p50_ms)} ms, n = {row.num_samples}"
                axes.plot(times_ms, shares, linewidth=2, label=label, **style)
                axes.plot([row.p50_ms.value], [50], marker="o", markersize=6, color=style["color"])
            axes.set_xlim(left=0)
            axes.set_ylim(0, 100)
            axes.set_title(f"batch {batch}", loc="left", fontsize=11)
            axes.set_xlabel(f"latency, ms ({rows[0].timed} clock, up to p99)")
            axes.set_ylabel("inferences at most\nthis slow, %")
            axes.grid(alpha=0.3)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False, fontsize=9)
        figure.suptitle("Latency of one inference; the dot is the median", fontsize=12)
        figure.savefig(path, dpi=150)


def distribution(row: Latency) -> tuple[list[float], list[float]]:
    """Shares, 0 to 99 %, and the latency in ms that this share of inferences does not exceed."""
    shares = [0.5 * i for i in range(len(row.quantiles_ms))]
    keep = [i for i, share in enumerate(shares) if share <= 99]  # the last 1 % would squeeze the rest into a corner
    return [shares[i] for i in keep], [row.quantiles_ms[i] for i in keep]


def compare_latency(
    runners: Sequence[Runner],
    images: Mapping[int, NDArray[np.float32]],
    *,
    seconds: float = 5.0,
    warmup_seconds: float = 0.5,
    min_rounds: int = 10,
    providers: Mapping[str, str] | None = None,
    progress: Callable[[str, float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> BenchReport:
    """Time runners against each other in interleaved rounds; see ``METHOD``.

    Args:
        runners: not entered yet; all are held at once. The first one is the yardstick of the ratios.
        images: batch size to images [B, C, H, W] float32.
        seconds: budget of one batch size, for all runners together, after the warm-up.
        warmup_seconds: of every runner at every batch size; at least 3 inferences.
        min_rounds: measured even where the budget is too short for them.
        providers: the provider asked for, by runner name; a runner that says otherwise is refused.
        progress: is told what is going on and which share of the whole, 0 to 1, is done.
        clock: seconds; tests bring their own.

    Raises:
        InputError: nothing to measure, two runners of one name, a batch of another size than its key.
        BackendError: a runner runs on another provider than asked, or changed what it runs on.
        MissingExtraError: psutil is not installed.
    """
    _check_input(runners, images, seconds, warmup_seconds, min_rounds, providers or {})
    tell = progress or (lambda what, share: None)
    machine = describe_machine()
    with ExitStack() as stack:
        measured = []
        for runner in runners:
            before = _resident_bytes()
            stack.enter_context(runner)
            measured.append(Measured(runner.name, runner.facts(), _resident_bytes() - before, 0))
        check_providers(measured, providers or {})
        latencies: list[Latency] = []
        for done, (batch, batch_images) in enumerate(sorted(images.items())):
            share = done / len(images)
            tell(f"batch {batch}: warm-up", share)
            timers = _choose_timers(runners, batch_images, clock)
            slowest = 0.0
            for i, runner in enumerate(runners):
                before = _resident_bytes()
                slowest = max(slowest, _warm_up(timers[runner.name], warmup_seconds, clock))
                grown = _resident_bytes() - before
                measured[i] = replace(measured[i], run_bytes=measured[i].run_bytes + grown)
            per_turn = max(1, min(MAX_PER_TURN, int(TURN_SECONDS / slowest))) if slowest > 0 else MAX_PER_TURN

            def report(fraction: float, batch: int = batch, share: float = share) -> None:
                tell(f"batch {batch}: measuring", share + fraction / len(images))

            samples = _interleave(timers, per_turn, seconds, min_rounds, clock, report)
            latencies += _summarise(samples, batch, "device" if _device_timed(timers) else "host")
        for before_run, runner in zip(measured, runners, strict=True):
            if runner.facts() != before_run.facts:
                raise BackendError(
                    f"{runner.name}: what it runs on changed while it was measured, from {before_run.facts} "
                    f"to {runner.facts()}; the numbers were thrown away, measure again"
                )
    tell("done", 1.0)
    machine["load average after"] = load_average()
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return BenchReport(created, tuple(measured), tuple(latencies), machine, dict(METHOD))


def read_report(path: Path | str) -> BenchReport:
    """Read what ``to_json`` gave.

    Raises:
        InputError: no such file, or not a bench report.
    """
    try:
        return BenchReport.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(
            f"{path}: cannot read the bench report ({error.strerror}); 'mcdeploy bench --json' makes one"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not a bench report ({error}); 'mcdeploy bench --json' makes one") from None


def check_baseline(report: BenchReport, baseline: BenchReport, fail_if_slower: float) -> list[str]:
    """Hold a report against an earlier one, of the same runners in the same order.

    Ratios are compared, not milliseconds, since the two may come from different machines: each runner's latency over
    the first runner's, now and then. A runner is slower when even the lower end of its ratio's interval lies above the
    baseline's ratio times ``1 + fail_if_slower``. A ratio can differ between processors too, so keep a baseline for
    each kind; and a change that slows all runners alike is not seen.

    Args:
        fail_if_slower: a fraction; 0.05 allows 5 %.

    Returns:
        One line for each runner and batch size that was held against the baseline.

    Raises:
        SlowerError: at least one is slower.
        InputError: a single runner, a yardstick or backend other than the baseline's, or something that the baseline
            does not hold.
    """
    if not fail_if_slower >= 0:
        raise InputError(f"fail-if-slower: expected a fraction of at least 0, got {fail_if_slower}")
    if len(report.runners) < 2:
        raise InputError("a baseline compares ratios, so it needs at least two runners; the first is the yardstick")
    _check_same_kind(report, baseline)
    lines, slower = [], []
    for now in report.latencies:
        if now.runner == report.runners[0].name:
            continue
        then = baseline.at(now.runner, now.batch)
        if then is None or then.timed != now.timed:
            raise InputError(
                f"the baseline holds no {now.runner} at batch {now.batch} timed on the {now.timed}; "
                "measure what it holds, or measure a new baseline"
            )
        allowed = then.ratio.value * (1 + fail_if_slower)
        line = (
            f"{now.runner} at batch {now.batch}: {with_interval(now.ratio)} times {report.runners[0].name}, "
            f"baseline {_digits(then.ratio.value)}, allowed up to {_digits(allowed)}"
        )
        lines.append(line)
        if now.ratio.low > allowed:
            slower.append(line)
    if slower:
        raise SlowerError(
            f"slower than the baseline: {'; '.join(slower)}; find what changed, or measure a new baseline"
        )
    return lines


# ---------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class _Timer:
    """One runner with one batch: ``run()`` gives (latency on the chosen clock, the same on the host's), in seconds."""

    run: Callable[[], tuple[float, float]]
    on_device: bool


@dataclass(frozen=True)
class _Samples:
    """Latencies of one runner in seconds, [R, K]."""

    runner: str
    chosen_RK: NDArray[np.float64]
    host_RK: NDArray[np.float64]


def _check_input(
    runners: Sequence[Runner],
    images: Mapping[int, NDArray[np.float32]],
    seconds: float,
    warmup_seconds: float,
    min_rounds: int,
    providers: Mapping[str, str],
) -> None:
    names = [runner.name for runner in runners]
    if not runners or not images:
        raise InputError("bench: nothing to measure; give at least one runner and one batch of images")
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"bench: two runners are called {name!r}; give them different names")
    for name in providers:
        if name not in names:
            raise InputError(
                f"bench: a provider is given for {name!r}, which is not measured; runners: {', '.join(names)}"
            )
    for batch, batch_images in images.items():
        if batch < 1 or batch_images.shape[:1] != (batch,):
            raise InputError(f"bench: batch {batch} has images of shape {list(batch_images.shape)}")
    if not (seconds >= 0 and warmup_seconds >= 0 and min_rounds >= 2):
        raise InputError(
            f"bench: expected seconds >= 0, warmup_seconds >= 0 and min_rounds >= 2, "
            f"got {seconds}, {warmup_seconds} and {min_rounds}"
        )


def figure_for(path: Path | str, size: tuple[float, float]) -> Any:
    """An empty matplotlib figure for a file; size: width and height in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: another kind of file than .png, .svg or .pdf.
    """
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"{path}: a plot is a .png, .svg or .pdf file; give it one of these suffixes")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("a latency plot", "matplotlib", "train") from None
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style_of(line: int) -> dict[str, Any]:
    """Colour and dashes of a plot's n-th line."""
    return {"color": COLOURS[line % len(COLOURS)], "linestyle": ("-", "--", "-.", ":")[line // len(COLOURS) % 4]}


def check_providers(measured: Sequence[Measured], providers: Mapping[str, str]) -> None:
    for runner in measured:
        wanted, used = providers.get(runner.name), runner.facts.get("provider")
        if wanted is not None and used != wanted:
            raise BackendError(
                f"{runner.name}: asked for provider {wanted}, but it runs on {used or 'an unknown one'}; "
                f"install what {wanted} needs ('mcdeploy doctor' lists it), or ask for {used or 'another provider'}"
            )


def _choose_timers(
    runners: Sequence[Runner], images: NDArray[np.float32], clock: Callable[[], float]
) -> dict[str, _Timer]:
    """The device's clock when every runner has one, the host's for all otherwise; both in one table would mislead."""
    on_device = all(isinstance(runner, DeviceTimer) and runner.time_on_device(images) is not None for runner in runners)

    def timer_of(runner: Runner) -> _Timer:
        def on_host() -> tuple[float, float]:
            start = clock()
            runner.infer(images)
            took = clock() - start
            return took, took

        def with_device() -> tuple[float, float]:
            assert isinstance(runner, DeviceTimer)
            start = clock()
            milliseconds = runner.time_on_device(images)
            took = clock() - start
            assert milliseconds is not None  # it was not a moment ago
            return milliseconds / 1e3, took

        return _Timer(with_device if on_device else on_host, on_device)

    return {runner.name: timer_of(runner) for runner in runners}


def _device_timed(timers: Mapping[str, _Timer]) -> bool:
    return all(timer.on_device for timer in timers.values())


def _warm_up(timer: _Timer, seconds: float, clock: Callable[[], float]) -> float:
    """Run for a while and forget the times, but for the last one on the host's clock, in seconds."""
    start, runs, last = clock(), 0, 0.0
    while runs < MIN_WARMUP_RUNS or clock() - start < seconds:
        last = timer.run()[1]
        runs += 1
    return last


def order_of_round(number: int, num_runners: int) -> list[int]:
    """Who runs when: reversed every other round and shifted every second one; for A and B that is AB BA BA AB ..."""
    shift = number // 2 % num_runners
    order = [*range(shift, num_runners), *range(shift)]
    return order[::-1] if number % 2 else order


def _interleave(
    timers: Mapping[str, _Timer],
    per_turn: int,
    seconds: float,
    min_rounds: int,
    clock: Callable[[], float],
    report: Callable[[float], None],
) -> list[_Samples]:
    """Rounds until the budget is spent or there are samples enough, but never fewer than ``min_rounds``."""
    turns = list(timers.values())
    times: list[list[list[tuple[float, float]]]] = [[] for _ in turns]
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, rounds = clock(), 0
        while rounds < min_rounds or (clock() - start < seconds and rounds * per_turn < MAX_SAMPLES):
            for i in order_of_round(rounds, len(turns)):
                turns[i].run()
                times[i].append([turns[i].run() for _ in range(per_turn)])
            rounds += 1
            spent = (clock() - start) / seconds if seconds else 1.0
            report(min(1.0, rounds / min_rounds, max(spent, rounds * per_turn / MAX_SAMPLES)))
    finally:
        if was_enabled:
            gc.enable()
    return [
        _Samples(name, *np.moveaxis(np.asarray(rows, dtype=np.float64), -1, 0))
        for name, rows in zip(timers, times, strict=True)
    ]


# --------------------------------------------------------------------------------------------------------- statistics


def _summarise(samples: Sequence[_Samples], batch: int, timed: Literal["host", "device"]) -> list[Latency]:
    rounds = len(samples[0].chosen_RK)
    # The same rounds are drawn for all runners: that is what makes the ratio paired.
    drawn_XR = np.random.default_rng(0).integers(rounds, size=(RESAMPLES, rounds))
    draws = [_percentiles_of_draws(runner.chosen_RK, drawn_XR) for runner in samples]
    latencies = []
    for runner, draw_XP in zip(samples, draws, strict=True):
        milliseconds = runner.chosen_RK.ravel() * 1e3
        p50, p90, p99 = (
            _interval(float(np.percentile(milliseconds, point)), draw_XP[:, p] * 1e3) for p, point in enumerate(POINTS)
        )
        first_ms = float(np.median(samples[0].chosen_RK)) * 1e3
        mean_ms = float(milliseconds.mean())
        latencies.append(
            Latency(
                runner=runner.runner,
                batch=batch,
                num_samples=milliseconds.size,
                num_rounds=len(runner.chosen_RK),
                timed=timed,
                p50_ms=p50,
                p90_ms=p90,
                p99_ms=p99,
                p99_is_rough=milliseconds.size < ENOUGH_FOR_P99,
                min_ms=float(milliseconds.min()),
                mean_ms=mean_ms,
                images_per_second=batch / mean_ms * 1e3,
                ratio=_interval(p50.value / first_ms, draw_XP[:, 0] / draws[0][:, 0]),
                host_p50_ms=float(np.median(runner.host_RK)) * 1e3,
                quantiles_ms=tuple(round(float(q), 6) for q in np.percentile(milliseconds, np.linspace(0, 100, 201))),
            )
        )
    return latencies


def _percentiles_of_draws(samples_RK: NDArray[np.float64], drawn_XR: NDArray[np.int64]) -> NDArray[np.float64]:
    """The ``POINTS`` of every draw of rounds, [X, P]; a chunk of draws at a time, to bound the memory."""
    at_once = max(1, 2_000_000 // samples_RK.size)
    chunks = [
        np.percentile(samples_RK[drawn_XR[x : x + at_once]].reshape(-1, samples_RK.size), POINTS, axis=1).T
        for x in range(0, len(drawn_XR), at_once)
    ]
    return np.concatenate(chunks)


def _interval(value: float, draws_X: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(draws_X, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def _latency_from_json(row: Mapping[str, Any]) -> Latency:
    intervals = {key: Interval(**row[key]) for key in ("p50_ms", "p90_ms", "p99_ms", "ratio")}
    return Latency(**{**row, **intervals, "quantiles_ms": tuple(row["quantiles_ms"])})


def _check_same_kind(report: BenchReport, baseline: BenchReport) -> None:
    """The yardstick is the baseline's, and runners of one name run on the same kind of thing."""
    if not baseline.runners or baseline.runners[0].name != report.runners[0].name:
        yardstick = baseline.runners[0].name if baseline.runners else "nothing"
        raise InputError(
            f"the baseline's ratios are to {yardstick}, this report's to {report.runners[0].name}; "
            "name the runners in the baseline's order"
        )
    then_facts = {runner.name: runner.facts for runner in baseline.runners}
    for runner in report.runners:
        for key in ("backend", "mode", "provider", "precision"):
            now, then = runner.facts.get(key), then_facts.get(runner.name, runner.facts).get(key)
            if now != then:
                raise InputError(
                    f"{runner.name}: the baseline has {key} {then}, this report {now}; "
                    "measure alike, or measure a new baseline"
                )


# ------------------------------------------------------------------------------------------------------ surroundings


def _resident_bytes() -> int:
    try:
        import psutil
    except ImportError:
        raise MissingExtraError("mcdeploy bench", "psutil", "train") from None
    return psutil.Process().memory_info().rss


def describe_machine() -> dict[str, str]:
    """The machine in words; its name is nobody's business."""
    return {
        "cpu": _cpu_model(),
        "cores usable": str(available_threads()),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
        "load average before": load_average(),
    }


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load_average() -> str:
    return f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"


def _digits(value: float) -> str:
    """Three significant digits and no exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def with_interval(interval: Interval) -> str:
    return f"{_digits(interval.value)} [{_digits(interval.low)}, {_digits(interval.high)}]"
