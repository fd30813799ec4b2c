"""Measure how long one inference takes, fairly: side by side, interleaved, with the uncertainty beside every number.

The machine's speed drifts (clocks, heat, neighbours), so timing A and then B compares two moments, not two models: on a
shared machine that once showed 0.64x where the truth was 0.98x. Here the runners take turns in short rounds, and the
ratio is taken within rounds, where drift cancels. What a model's memory and threads happen to look like differs from
load to load, so the models are loaded anew many times, and the intervals come from the differences between loads.
``METHOD`` says in words what is inside the timed region; every report carries it.
"""

# B = batch, A = runners, R = rounds, K = recorded inferences of one turn.
from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import ceil
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from mcruntime.cgroup import available_threads
from mcruntime.engine import Runner
from numpy.typing import NDArray

from mcdeploy.bench_report import ENOUGH_FOR_P99, BenchReport, Latency, Measured
from mcdeploy.errors import BackendError, InputError
from mcdeploy.gpu_state import BLIND_SECONDS, GpuWatch
from mcdeploy.intervals import Interval, interval_of_units
from mcdeploy.surroundings import (
    busy_warnings,
    describe_afterwards,
    describe_machine,
    load_average_number,
    pinned,
    resident_bytes,
)

TURN_SECONDS = 0.02  # a turn records as many inferences as fit in this, at least 1 ...
MAX_PER_TURN = 8  # ... and at most this many
MAX_SAMPLES = 100_000  # of one runner and batch size
MIN_WARMUP_RUNS = 3
RELOAD_WARMUP = 0.1  # seconds; the machine is warm by then, only the model is new
MIN_SECTIONS, MAX_SECTIONS = 10, 20  # of a batch size's budget; the stop rule may end it from the 10th on
ENOUGH_LOADS = 5  # fewer, and the intervals come from the sections instead
POINTS = (50.0, 90.0, 99.0)  # percentiles

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
    "loads": (
        "the time is cut into 10 to 20 sections; between sections all models are dropped and loaded anew, in another "
        "order and at other addresses, unless loading takes longer than measuring; then every few sections, or never "
        "where one load costs more than the whole budget"
    ),
    "stop": (
        "after 10 sections or more, once the 95 % interval of every ratio is narrower than the share asked for (2 % of "
        "the ratio by default), or when the time is up"
    ),
    "excluded": (
        "loading, and a warm-up by time of every runner at every batch size after every load; garbage collection is off"
    ),
    "interval": (
        "95 %: Student's t over the loads, each load's own value against that of the whole (over the sections where "
        "there are fewer than 5 loads): how much the number would change if the bench were run again on this machine "
        "in the same state; neighbours that resemble each other count for less; not how much another machine would "
        "change it"
    ),
    "ratio": (
        "in every round, the median time of the runner's turn over that of the first runner's; of these the median "
        "over all rounds; below 1 is faster. Both turns are milliseconds apart, so a slow moment slows both"
    ),
    "throughput": "batch size divided by mean host or device latency; one caller, no overlap of requests",
    "threads": (
        "while measuring, all threads of the process are held to as many physical cores as inference may use threads, "
        "where the system permits; the machine's row affinity says to which"
    ),
    "gpu": (
        "warmed until its clock stands still; clock, heat, power and the reasons for slowing down are read after every "
        "section, as far as it tells them: locked, floating, or throttled. Energy: every runner alone for a second at "
        "the end, the GPU's own counter over the number of inferences, idle power included"
    ),
    "l2": (
        "a GPU's level-2 cache, in each runner's facts. warm: as the inference before it left it, so a small net's "
        "weights may still be there. cold (--cold-l2): before the first event of every inference, twice the cache's "
        "size is overwritten and waited for, so weights and images come from the GPU's memory; that is outside the "
        "timed region, but inside host_p50_ms and the energy"
    ),
    "memory": (
        "growth of the whole process's resident memory while the runner was first loaded (load) and while it warmed up "
        "at all batch sizes (run); libraries count for the first runner that needs them, and memory on a GPU not at all"
    ),
}


@runtime_checkable
class DeviceTimer(Protocol):
    """A runner that can time itself with the device's own clock."""

    def time_on_device(self, images: NDArray[np.float32]) -> float | None:
        """Milliseconds of one inference on the device; None when the model runs on the host after all."""


def compare_latency(
    runners: Sequence[Runner],
    images: Mapping[int, NDArray[np.float32]],
    *,
    seconds: float = 5.0,
    until: float = 0.02,
    warmup_seconds: float = 0.5,
    min_rounds: int = 10,
    reload: bool = True,
    threads: int | None = None,
    gpu: GpuWatch | None = None,
    providers: Mapping[str, str] | None = None,
    progress: Callable[[str, float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> BenchReport:
    """Time runners against each other in interleaved rounds; see ``METHOD``.

    Args:
        runners: not entered yet; all are held at once. The first one is the yardstick of the ratios.
        images: batch size to images [B, C, H, W] float32.
        seconds: budget of one batch size, for all runners together, without loading and warm-up.
        until: stop before that once every ratio's interval is narrower than this share of it; 0: use the whole budget.
        warmup_seconds: of every runner at every batch size; at least 3 inferences.
        min_rounds: measured even where the budget is too short for them.
        reload: load the models anew between sections; without it the intervals know nothing of what a load changes.
        threads: physical cores that the process is held to; None: ``available_threads()``.
        gpu: the GPU that the runners use, not entered yet: it is warmed until its clock is steady, its state is
            recorded after every section, and the energy of an inference is measured at the end.
        providers: the provider asked for, by runner name; a runner that says otherwise is refused.
        progress: is told what is going on and which share of the whole, 0 to 1, is done.
        clock: seconds; tests bring their own.

    Raises:
        InputError: nothing to measure, two runners of one name, a batch of another size than its key.
        BackendError: a runner runs on another provider than asked, or changed what it runs on.
        MissingExtraError: psutil is not installed.
    """
    _check_input(runners, images, seconds, until, warmup_seconds, min_rounds, providers or {})
    courses = [_Course(batch, images[batch]) for batch in sorted(images)]
    run = _Run(runners, courses, seconds, until, warmup_seconds, min_rounds, providers or {}, progress, clock)
    machine, busy = describe_machine(), load_average_number()
    threads = threads or available_threads()
    with pinned(threads) as affinity, ExitStack() as watching:
        machine["affinity"] = affinity
        sections_a_load = 1 if reload else MAX_SECTIONS
        for load in range(MAX_SECTIONS):
            start = clock()
            with ExitStack() as stack:
                run.enter(stack, load)
                pending = [course for course in courses if not run.is_done(course)]
                for course in pending:
                    run.warm_up(course, load)
                if gpu and load == 0:  # after the runners, whose errors say more
                    watching.enter_context(gpu)
                    run.warm_gpu(gpu)
                cost = clock() - start
                if load == 0 and reload and cost > seconds * len(courses):
                    sections_a_load = MAX_SECTIONS
                elif load == 1:  # the first load also imported libraries, so the second one tells
                    sections_a_load = max(1, ceil(cost / max(1e-9, len(courses) * seconds / MAX_SECTIONS)))
                for course in pending:
                    run.measure(course, sections_a_load, gpu)
                if gpu and all(run.is_done(course) for course in courses):
                    run.measure_energy(gpu)
                run.check_facts()
            if all(run.is_done(course) for course in courses):
                break
        if gpu:
            run.close_gpu(gpu)
    latencies = [row for course in courses for row in _summarise(run.names, course)]
    run.tell("done", 1.0)
    return BenchReport(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        runners=tuple(run.measured),
        latencies=tuple(latencies),
        machine=machine | describe_afterwards(),
        method=dict(METHOD),
        warnings=(*busy_warnings(busy, threads, int(machine["cores usable"])), *run.gpu_warnings),
        gpu=run.gpu_facts,
    )


# ---------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class _Timer:
    """One runner with one batch: ``run()`` gives (latency on the chosen clock, the same on the host's), in seconds."""

    run: Callable[[], tuple[float, float]]


@dataclass
class _Course:
    """What was measured of one batch size so far. ``loads``: of every load its sections, seconds [A, R, K, 2]."""

    batch: int
    images: NDArray[np.float32]
    on_device: bool = False
    timers: list[_Timer] = field(default_factory=list)
    per_turn: int = 0
    loads: list[list[NDArray[np.float64]]] = field(default_factory=list)
    spent: float = 0.0  # seconds
    rounds: int = 0
    narrow: bool = False
    energy_mj: list[float | None] = field(default_factory=list)

    def sections(self) -> list[NDArray[np.float64]]:
        return [section for load in self.loads for section in load]


class _Run:
    """One comparison under way."""

    def __init__(
        self,
        runners: Sequence[Runner],
        courses: Sequence[_Course],
        seconds: float,
        until: float,
        warmup_seconds: float,
        min_rounds: int,
        providers: Mapping[str, str],
        progress: Callable[[str, float], None] | None,
        clock: Callable[[], float],
    ) -> None:
        self.runners, self.courses, self.seconds, self.until = runners, courses, seconds, until
        self.warmup_seconds, self.min_rounds = warmup_seconds, min_rounds
        self.providers, self.clock = providers, clock
        self.names = [runner.name for runner in runners]
        self.measured: list[Measured] = []
        self.gpu_facts: dict[str, str] = {}
        self.gpu_warnings: list[str] = []
        self.tell = progress or (lambda what, share: None)

    def enter(self, stack: ExitStack, load: int) -> None:
        """Load all runners, after the first time in another order and with the heap in another state."""
        if not self.measured:
            for runner in self.runners:
                before = resident_bytes()
                stack.enter_context(runner)
                self.measured.append(Measured(runner.name, runner.facts(), resident_bytes() - before, 0))
            check_providers(self.measured, self.providers)
            return
        draw = np.random.default_rng(load)
        ballast = []  # held while the models are loaded, so that they land elsewhere than last time
        for i in order_of_round(load, len(self.runners)):
            ballast.append(np.ones(int(draw.integers(1, 2**20)), np.uint8))
            stack.enter_context(self.runners[i])
        self.check_facts()

    def check_facts(self) -> None:
        for before, runner in zip(self.measured, self.runners, strict=True):
            if runner.facts() != before.facts:
                raise BackendError(
                    f"{runner.name}: what it runs on changed while it was measured, from {before.facts} "
                    f"to {runner.facts()}; the numbers were thrown away, measure again"
                )

    def warm_up(self, course: _Course, load: int) -> None:
        """Every runner at this batch size; decides the clock and the length of a turn the first time."""
        if not course.loads:
            self.tell_of(course, "warm-up")
            course.on_device = _all_on_device(self.runners, course.images)
        course.timers = [_timer_of(runner, course.images, course.on_device, self.clock) for runner in self.runners]
        slowest = 0.0
        for i, timer in enumerate(course.timers):
            before = resident_bytes() if load == 0 else 0
            seconds = self.warmup_seconds if load == 0 else min(RELOAD_WARMUP, self.warmup_seconds)
            slowest = max(slowest, _warm_up(timer, seconds, self.clock))
            if load == 0:
                grown = resident_bytes() - before
                self.measured[i] = replace(self.measured[i], run_bytes=self.measured[i].run_bytes + grown)
        if not course.per_turn:
            fits = int(TURN_SECONDS / slowest) if slowest > 0 else MAX_PER_TURN
            course.per_turn = max(1, min(MAX_PER_TURN, fits))

    def warm_gpu(self, gpu: GpuWatch) -> None:
        def everything() -> None:
            for course in self.courses:
                for timer in course.timers:
                    timer.run()

        steady = gpu.warm_until_steady(everything, clock=self.clock)
        if steady is None:
            self.gpu_warnings.append(
                f"the GPU does not tell its clock: it was warmed for {BLIND_SECONDS:.0f} seconds, and whether the "
                "clock stood still is not known; measure on a GPU that is not shared or virtual"
            )
        elif not steady:
            self.gpu_warnings.append("the GPU's clock never stood still while warming up; lock it with --lock-clocks")

    def measure_energy(self, gpu: GpuWatch) -> None:
        """Every runner alone for a second: the GPU's energy counter is too slow for turns."""
        for course in self.courses:
            course.energy_mj = [gpu.energy_of(timer.run, clock=self.clock) for timer in course.timers]

    def close_gpu(self, gpu: GpuWatch) -> None:
        self.gpu_facts = gpu.facts()
        if gpu.state() == "throttled":
            why = self.gpu_facts["slowed down by"]
            self.gpu_warnings.append(f"the GPU slowed itself down while it was measured ({why}); cool it, or wait")

    def measure(self, course: _Course, sections: int, gpu: GpuWatch | None) -> None:
        """So many sections of a loaded model, or fewer when it is done before."""
        course.loads.append([])
        was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            for _ in range(sections):
                course.loads[-1].append(self._section(course))
                if gpu:
                    gpu.look()
                course.narrow = self._is_narrow(course)
                self.tell_of(course, "measuring")
                if self.is_done(course):
                    break
        finally:
            if was_enabled:
                gc.enable()

    def _section(self, course: _Course) -> NDArray[np.float64]:
        """Rounds for a 20th of the budget, and so many that 10 sections hold ``min_rounds``: [A, R, K, 2]."""
        left = max(1, MIN_SECTIONS - len(course.sections()))
        at_least = max(1, ceil((self.min_rounds - course.rounds) / left))
        at_most = max(at_least, MAX_SAMPLES // MAX_SECTIONS // course.per_turn)
        lasts = min(self.seconds / MAX_SECTIONS, self.seconds - course.spent)
        times: list[list[list[tuple[float, float]]]] = [[] for _ in course.timers]
        start, rounds = self.clock(), 0
        while rounds < at_least or (self.clock() - start < lasts and rounds < at_most):
            for i in order_of_round(course.rounds + rounds, len(course.timers)):
                run = course.timers[i].run
                run()
                times[i].append([run() for _ in range(course.per_turn)])
            rounds += 1
        course.spent += self.clock() - start
        course.rounds += rounds
        return np.asarray(times, dtype=np.float64)

    def is_done(self, course: _Course) -> bool:
        if course.rounds < self.min_rounds:
            return False
        time_is_up = course.spent >= self.seconds or len(course.sections()) >= MAX_SECTIONS
        return time_is_up or course.narrow

    def _is_narrow(self, course: _Course) -> bool:
        if not self.until or len(self.runners) < 2 or len(course.sections()) < MIN_SECTIONS:
            return False
        units, _ = _units_of(course)
        whole = _ratios(np.concatenate(course.sections(), axis=1)[..., 0])
        parts = [_ratios(unit[..., 0]) for unit in units]
        return all(
            interval_of_units(whole[i], [part[i] for part in parts]).width < self.until
            for i in range(1, len(self.runners))
        )

    def tell_of(self, course: _Course, what: str) -> None:
        self.tell(f"batch {course.batch}: {what}", sum(map(self._share, self.courses)) / len(self.courses))

    def _share(self, course: _Course) -> float:
        if course.loads and self.is_done(course):
            return 1.0
        by_time = course.spent / self.seconds if self.seconds else 1.0
        return min(1.0, course.rounds / self.min_rounds, max(by_time, len(course.sections()) / MAX_SECTIONS))


def _check_input(
    runners: Sequence[Runner],
    images: Mapping[int, NDArray[np.float32]],
    seconds: float,
    until: float,
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
    if not 0 <= until < 1:
        raise InputError(f"bench: until: expected a share from 0 to below 1, such as 0.02, got {until}")
    if not (seconds >= 0 and warmup_seconds >= 0 and min_rounds >= 2):
        raise InputError(
            f"bench: expected seconds >= 0, warmup_seconds >= 0 and min_rounds >= 2, "
            f"got {seconds}, {warmup_seconds} and {min_rounds}"
        )


def check_providers(measured: Sequence[Measured], providers: Mapping[str, str]) -> None:
    """Refuse a runner that says it runs on another provider than was asked for.

    Raises:
        BackendError: one does.
    """
    for runner in measured:
        wanted, used = providers.get(runner.name), runner.facts.get("provider")
        if wanted is not None and used != wanted:
            raise BackendError(
                f"{runner.name}: asked for provider {wanted}, but it runs on {used or 'an unknown one'}; "
                f"install what {wanted} needs ('mcdeploy doctor' lists it), or ask for {used or 'another provider'}"
            )


def _all_on_device(runners: Sequence[Runner], images: NDArray[np.float32]) -> bool:
    """The device's clock when every runner has one, the host's for all otherwise; both in one table would mislead."""
    return all(isinstance(runner, DeviceTimer) and runner.time_on_device(images) is not None for runner in runners)


def _timer_of(runner: Runner, images: NDArray[np.float32], on_device: bool, clock: Callable[[], float]) -> _Timer:
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
        assert milliseconds is not None  # it was not when the clock was chosen
        return milliseconds / 1e3, took

    return _Timer(with_device if on_device else on_host)


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


# --------------------------------------------------------------------------------------------------------- statistics


def _units_of(course: _Course) -> tuple[list[NDArray[np.float64]], Literal["load", "section"]]:
    """What counts as independent, [A, R, K, 2] each: loads, or sections where loads are few."""
    if len(course.loads) >= ENOUGH_LOADS:
        return [np.concatenate(load, axis=1) for load in course.loads], "load"
    return course.sections(), "section"


def _ratios(times_ARK: NDArray[np.float64]) -> list[float]:
    """Of every runner to the first: the median over rounds of the ratio of both turns' medians."""
    turns_AR = np.median(times_ARK, axis=2)
    return [float(ratio) for ratio in np.median(turns_AR / turns_AR[0], axis=1)]


def _summarise(names: Sequence[str], course: _Course) -> list[Latency]:
    units, kind = _units_of(course)
    whole = np.concatenate(course.sections(), axis=1)
    ratios, unit_ratios = _ratios(whole[..., 0]), [_ratios(unit[..., 0]) for unit in units]
    latencies = []
    for i, name in enumerate(names):
        milliseconds = whole[i, ..., 0].ravel() * 1e3
        in_units = [unit[i, ..., 0].ravel() * 1e3 for unit in units]
        p50, p90, p99 = (_percentile(milliseconds, in_units, point) for point in POINTS)
        mean_ms = float(milliseconds.mean())
        latencies.append(
            Latency(
                runner=name,
                batch=course.batch,
                num_samples=milliseconds.size,
                num_rounds=course.rounds,
                timed="device" if course.on_device else "host",
                p50_ms=p50,
                p90_ms=p90,
                p99_ms=p99,
                p99_is_rough=milliseconds.size < ENOUGH_FOR_P99,
                min_ms=float(milliseconds.min()),
                mean_ms=mean_ms,
                images_per_second=course.batch / mean_ms * 1e3,
                ratio=interval_of_units(ratios[i], [unit[i] for unit in unit_ratios]),
                host_p50_ms=float(np.median(whole[i, ..., 1])) * 1e3,
                quantiles_ms=tuple(round(float(q), 6) for q in np.percentile(milliseconds, np.linspace(0, 100, 201))),
                num_loads=len(course.loads),
                units=kind,
                stopped="narrow" if course.narrow else "budget",
                energy_mj=course.energy_mj[i] if course.energy_mj else None,
            )
        )
    return latencies


def _percentile(whole: NDArray[np.float64], units: Sequence[NDArray[np.float64]], point: float) -> Interval:
    value = float(np.percentile(whole, point))
    return interval_of_units(value, [float(np.percentile(unit, point)) for unit in units])
