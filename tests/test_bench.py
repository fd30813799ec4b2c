"""Bench counts what it says, in the order it says, and refuses what would mislead. No test here measures real time."""

from __future__ import annotations

import gc
import json
import platform
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from rich.console import Console

from mcdeploy import bench
from mcdeploy.bench import compare_latency, order_of_round
from mcdeploy.bench_report import BenchReport, check_baseline, read_report
from mcdeploy.errors import BackendError, InputError, SlowerError
from mcdeploy.intervals import Interval


class Clock:
    """Time that passes only when a fake runner says so."""

    def __init__(self):
        self.now = 0.0
        self.calls = []  # names of the runners, one entry an inference

    def __call__(self):
        return self.now


class Fake:
    """A runner whose inference takes ``takes(number of the call, images)`` seconds."""

    def __init__(self, name, clock, takes, provider="cpu"):
        self.name, self.clock, self.takes, self.provider = name, clock, takes, provider
        self.log = []
        self.entered = 0
        self.loads = 0
        self.load_seconds = 0.0

    def __enter__(self):
        self.entered += 1
        self.loads += 1
        self.clock.now += self.load_seconds
        return self

    def __exit__(self, *exc):
        self.entered -= 1

    def infer(self, images):
        assert self.entered
        seconds = self.takes(len(self.log), images)
        self.log.append(seconds)
        self.clock.calls.append(self.name)
        self.clock.now += seconds
        return np.zeros((len(images), 2), np.float32)

    def facts(self):
        return {"backend": "fake", "provider": self.provider, "threads": "1"}


class FakeOnDevice(Fake):
    """Its device's clock shows half of what the host's does."""

    def time_on_device(self, images):
        self.infer(images)
        return self.log[-1] * 1e3 / 2


@pytest.fixture
def clock():
    return Clock()


def constant(seconds):
    return lambda number, images: seconds


def batches(*sizes):
    return {size: np.zeros((size, 3, 2, 2), np.float32) for size in sizes}


def measure(clock, *runners, sizes=(1,), **options):
    """One load and the whole budget, unless asked otherwise."""
    options = {"seconds": 1.0, "warmup_seconds": 0.0, "reload": False, "until": 0, **options}
    return compare_latency(runners, batches(*sizes), clock=clock, **options)


def pair(clock, first_s=0.010, second_s=0.005, sizes=(1,), **options):
    return measure(
        clock, Fake("big", clock, constant(first_s)), Fake("small", clock, constant(second_s)), sizes=sizes, **options
    )


# ----------------------------------------------------------------------------------------------------------- numbers


def test_percentiles_are_those_of_the_recorded_latencies(clock):
    takes = np.random.default_rng(3).lognormal(-5, 0.5, 10_000)
    runner = Fake("a", clock, lambda number, images: takes[number])
    row = measure(clock, runner, seconds=5.0).latencies[0]
    per_turn = row.num_samples // row.num_rounds
    turns = np.array(runner.log[bench.MIN_WARMUP_RUNS :]).reshape(row.num_rounds, 1 + per_turn)
    recorded_ms = turns[:, 1:] * 1e3
    for interval, point in ((row.p50_ms, 50), (row.p90_ms, 90), (row.p99_ms, 99)):
        assert interval.value == pytest.approx(np.percentile(recorded_ms, point))
        assert interval.low < interval.value < interval.high
    assert row.min_ms == pytest.approx(recorded_ms.min())
    assert row.mean_ms == pytest.approx(recorded_ms.mean())
    assert row.quantiles_ms[0] == pytest.approx(recorded_ms.min(), abs=1e-6)
    assert row.quantiles_ms[100] == pytest.approx(np.median(recorded_ms), abs=1e-6)
    assert row.quantiles_ms[200] == pytest.approx(recorded_ms.max(), abs=1e-6)


def test_the_p50_interval_covers_the_true_median_about_as_often_as_it_says(clock):
    rng = np.random.default_rng(0)
    runners = [Fake(f"r{i}", clock, lambda number, images: rng.lognormal(-4, 0.4)) for i in range(100)]
    rows = measure(clock, *runners, min_rounds=40, seconds=0.0).latencies
    covered = sum(row.p50_ms.low <= np.exp(-4) * 1e3 <= row.p50_ms.high for row in rows)
    assert 88 <= covered <= 99  # 95 expected; an interval that is always right would be too wide


def test_throughput_is_images_over_mean_latency(clock):
    report = pair(clock, sizes=(1, 8))
    assert report.at("big", 1).images_per_second == pytest.approx(100)
    assert report.at("small", 8).images_per_second == pytest.approx(1600)


def test_the_ratio_of_a_runner_to_its_twin_contains_one_about_as_often_as_it_says():
    held = 0
    for seed in range(60):
        rng, clock = np.random.default_rng(seed), Clock()
        runners = [Fake(name, clock, lambda number, images, rng=rng: 0.005 * rng.lognormal(0, 0.2)) for name in "ab"]
        first, twin = measure(clock, *runners, min_rounds=60, seconds=0.0).latencies
        assert first.ratio == Interval(1, 1, 1)
        held += twin.ratio.low < 1 < twin.ratio.high
    assert 53 <= held <= 60  # 57 expected


class Moody(Fake):
    """Its speed depends on how it was loaded, and drifts: what follows each other resembles each other."""

    def __init__(self, name, clock, rng, base=0.01, load_sd=0.02, drift_sd=0.004, memory=0.98):
        super().__init__(name, clock, self.take)
        self.rng, self.base, self.load_sd, self.drift_sd, self.memory = rng, base, load_sd, drift_sd, memory
        self.of_load = self.drift = 0.0

    def __enter__(self):
        self.of_load = self.load_sd * self.rng.standard_normal()
        return super().__enter__()

    def take(self, number, images):
        self.drift = self.memory * self.drift + self.drift_sd * self.rng.standard_normal()
        return self.base * np.exp(self.of_load + self.drift + 0.01 * self.rng.standard_normal())


def bootstrap_over_rounds(ratios_R, draws=200):
    """The naive interval: every round counts as independent."""
    drawn = np.random.default_rng(0).integers(len(ratios_R), size=(draws, len(ratios_R)))
    return np.percentile(np.median(ratios_R[drawn], axis=1), (2.5, 97.5))


def coverage(load_sd, monkeypatch):
    """Of 60 comparisons with a true ratio of 0.8, how many intervals hold it: ours, and the naive ones."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # slow, and nothing here depends on it
    kept = []
    whole = bench._ratios
    monkeypatch.setattr(bench, "_ratios", lambda times: kept.append(times) or whole(times))
    ours = naive = 0
    for seed in range(60):
        rng, clock = np.random.default_rng(seed), Clock()
        runners = (Moody("a", clock, rng, 0.010, load_sd), Moody("b", clock, rng, 0.008, load_sd))
        kept.clear()
        ratio = measure(clock, *runners, seconds=10.0, reload=True).at("b", 1).ratio
        turns_AR = np.median(max(kept, key=np.size), axis=2)
        low, high = bootstrap_over_rounds(turns_AR[1] / turns_AR[0])
        ours += ratio.low <= 0.8 <= ratio.high
        naive += low <= 0.8 <= high
    return ours, naive


@pytest.mark.parametrize("load_sd", [0.0, 0.02])
def test_intervals_hold_under_drift_and_where_loads_differ_while_naive_ones_do_not(load_sd, monkeypatch):
    ours, naive = coverage(load_sd, monkeypatch)
    assert ours >= 53  # 57 of 60 expected
    assert naive <= 42


def test_drift_of_the_machine_cancels_in_the_ratio(clock):
    speed = np.random.default_rng(1).uniform(1, 5, 1000)  # of the machine, another one each round

    def drifting(base):
        return lambda number, images: base * speed[max(0, number - bench.MIN_WARMUP_RUNS) // 2]

    # 20 ms and more: one recorded inference a turn, so two calls a round.
    runners = (Fake("a", clock, drifting(0.02)), Fake("b", clock, drifting(0.03)))
    row = measure(clock, *runners, seconds=10.0).latencies[1]
    assert row.num_samples == row.num_rounds > 20
    assert (row.ratio.low, row.ratio.value, row.ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert row.p50_ms.high / row.p50_ms.low > 1.1


@pytest.mark.parametrize(("rounds", "rough"), [(999, True), (1000, False)])
def test_p99_from_fewer_than_1000_samples_is_flagged(clock, rounds, rough):
    row = measure(clock, Fake("a", clock, constant(0.02)), seconds=0.0, min_rounds=rounds).latencies[0]
    assert row.num_samples == rounds
    assert row.p99_is_rough is rough


# ------------------------------------------------------------------------------------------------------------- order


def test_two_runners_take_turns_and_the_order_alternates(clock):
    measure(clock, Fake("A", clock, constant(0.1)), Fake("B", clock, constant(0.1)), seconds=0.0, min_rounds=8)
    in_rounds = "".join(clock.calls[2 * bench.MIN_WARMUP_RUNS :])
    assert in_rounds == "AABB BBAA BBAA AABB AABB BBAA BBAA AABB".replace(" ", "")


@pytest.mark.parametrize("num_runners", [2, 3, 4])
def test_every_runner_stands_at_every_place_equally_often(num_runners):
    orders = np.array([order_of_round(number, num_runners) for number in range(2 * num_runners)])
    for place in orders.T:
        assert np.bincount(place, minlength=num_runners).tolist() == [2] * num_runners
    assert all(sorted(order) == list(range(num_runners)) for order in orders)


def test_the_warm_up_is_not_recorded_and_lasts_as_long_as_asked(clock):
    runner = Fake("a", clock, lambda number, images: 0.05 if number < 10 else 0.001)
    row = measure(clock, runner, warmup_seconds=0.5).latencies[0]
    assert row.quantiles_ms[-1] == pytest.approx(1.0)


def test_the_first_inference_of_a_turn_is_not_recorded(clock):
    def slow_after_another(name):
        return lambda number, images: 0.001 if clock.calls and clock.calls[-1] == name else 0.5

    for row in measure(clock, *(Fake(n, clock, slow_after_another(n)) for n in "ab"), seconds=20.0).latencies:
        assert row.quantiles_ms[-1] == pytest.approx(1.0)


def test_fast_models_take_several_inferences_a_turn_and_slow_ones_one(clock):
    pair(clock, first_s=0.004, second_s=0.004)
    turns = [len(list(calls)) for _, calls in groupby(clock.calls[2 * bench.MIN_WARMUP_RUNS :])]
    assert min(turns) == 1 + 5  # 20 ms of 4 ms each, and one to settle
    clock.calls.clear()
    pair(clock, first_s=0.5, second_s=0.001)
    assert min(len(list(calls)) for _, calls in groupby(clock.calls[2 * bench.MIN_WARMUP_RUNS :])) == 2


def test_a_runner_slower_than_the_budget_still_gets_its_rounds(clock):
    assert [row.num_rounds for row in pair(clock, first_s=60.0, seconds=1.0, min_rounds=7).latencies] == [7, 7]


def test_measuring_stops_when_the_budget_is_spent(clock):
    pair(clock, first_s=0.03, second_s=0.02, seconds=2.0)
    warm_up = bench.MIN_WARMUP_RUNS * 0.05
    assert 2.0 <= clock.now - warm_up <= 2.0 + 0.1  # one round is 0.1 s


def test_measuring_stops_early_with_samples_enough(clock, monkeypatch):
    monkeypatch.setattr(bench, "MAX_SAMPLES", 160)
    assert pair(clock, seconds=1e6).at("big", 1).num_samples == 160  # 20 sections of 4 rounds of 2


def test_measuring_stops_once_every_ratio_is_known_well_enough_and_says_so(clock):
    rng = np.random.default_rng(2)

    def noisy(spread):
        return lambda number, images: 0.01 * rng.lognormal(0, spread)

    narrow = measure(clock, Fake("a", clock, noisy(0.002)), Fake("b", clock, noisy(0.002)), seconds=40.0, until=0.02)
    wide = measure(clock, Fake("a", clock, noisy(0.5)), Fake("b", clock, noisy(0.5)), seconds=40.0, until=0.02)
    assert {row.stopped for row in narrow.latencies} == {"narrow"}
    assert narrow.latencies[1].ratio.width < 0.02
    assert narrow.latencies[1].num_rounds < 0.6 * wide.latencies[1].num_rounds  # 10 of 20 sections
    assert {row.stopped for row in wide.latencies} == {"budget"}
    assert wide.latencies[1].ratio.width > 0.02


def test_one_batch_size_may_stop_while_another_goes_on(clock):
    rng = np.random.default_rng(2)

    def noisy_at_two(number, images):
        return 0.01 * rng.lognormal(0, 0.002 if len(images) == 1 else 0.5)

    runners = (Fake("a", clock, noisy_at_two), Fake("b", clock, noisy_at_two))
    report = measure(clock, *runners, sizes=(1, 2), seconds=40.0, until=0.02, reload=True)
    assert [row.stopped for row in report.latencies] == ["narrow", "narrow", "budget", "budget"]
    assert [row.num_loads for row in report.latencies] == [10, 10, 20, 20]


def test_models_are_loaded_anew_for_every_section(clock):
    runners = (Fake("a", clock, constant(0.01)), Fake("b", clock, constant(0.01)))
    report = measure(clock, *runners, seconds=10.0, reload=True)
    assert [runner.loads for runner in runners] == [20, 20]
    assert {(row.num_loads, row.units) for row in report.latencies} == {(20, "load")}


@pytest.mark.parametrize(
    ("load_seconds", "loads", "units"), [(0.75, 6, "load"), (2.0, 3, "section"), (9.0, 1, "section")]
)
def test_models_that_load_slowly_are_loaded_less_often(clock, load_seconds, loads, units):
    runners = (Fake("a", clock, constant(0.01)), Fake("b", clock, constant(0.01)))
    for runner in runners:
        runner.load_seconds = load_seconds
    report = measure(clock, *runners, seconds=10.0, reload=True)
    assert {(row.num_loads, row.units) for row in report.latencies} == {(loads, units)}


def test_garbage_collection_is_off_while_timing_and_back_afterwards(clock):
    seen = []
    measure(clock, Fake("a", clock, lambda number, images: seen.append(gc.isenabled()) or 0.01), min_rounds=3)
    assert not any(seen[bench.MIN_WARMUP_RUNS :])
    assert gc.isenabled()


def test_after_an_error_garbage_collection_is_back_and_the_runner_is_left(clock):
    def breaks(number, images):
        return 0.01 if number < 5 else 1 / 0

    runner = Fake("a", clock, breaks)
    with pytest.raises(ZeroDivisionError):
        measure(clock, runner)
    assert gc.isenabled()
    assert runner.entered == 0


def test_progress_grows_to_one(clock):
    told = []
    pair(clock, sizes=(1, 2), progress=lambda what, share: told.append((what, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert told[0] == ("batch 1: warm-up", 0.0)
    assert told[-1] == ("done", 1.0)
    assert {what for what, _ in told} == {f"batch {n}: {what}" for n in (1, 2) for what in ("warm-up", "measuring")} | {
        "done"
    }


# ------------------------------------------------------------------------------------------------------ device clock


def test_the_devices_clock_is_used_when_every_runner_has_one(clock):
    runners = (FakeOnDevice("a", clock, constant(0.01)), FakeOnDevice("b", clock, constant(0.02)))
    rows = measure(clock, *runners).latencies
    assert [row.timed for row in rows] == ["device", "device"]
    assert [row.p50_ms.value for row in rows] == pytest.approx([5, 10])
    assert [row.host_p50_ms for row in rows] == pytest.approx([10, 20])


def test_the_hosts_clock_is_used_for_all_when_one_runner_has_no_other(clock):
    rows = measure(clock, FakeOnDevice("a", clock, constant(0.01)), Fake("b", clock, constant(0.02))).latencies
    assert [row.timed for row in rows] == ["host", "host"]
    assert [row.p50_ms.value for row in rows] == pytest.approx([10, 20])


def test_a_runner_that_could_but_runs_on_the_host_is_timed_by_the_host(clock):
    runner = FakeOnDevice("a", clock, constant(0.01))
    runner.time_on_device = lambda images: None
    assert measure(clock, runner).latencies[0].timed == "host"


# --------------------------------------------------------------------------------------------------------------- gpu


def test_the_state_of_the_gpu_and_the_energy_of_an_inference_are_in_the_report(clock):
    pytest.importorskip("pynvml")
    from test_gpu_state import GpuWatch, double

    nvml = double(nvmlDeviceGetTotalEnergyConsumption=lambda: int(clock.now * 100_000))  # 100 W
    runners = (FakeOnDevice("a", clock, constant(0.01)), FakeOnDevice("b", clock, constant(0.02)))
    report = measure(clock, *runners, gpu=GpuWatch(lock_clocks=True, nvml=nvml))
    assert [row.energy_mj for row in report.latencies] == pytest.approx([1000, 2000], rel=0.01)
    assert report.gpu["state"] == "locked"
    assert report.warnings == tuple(w for w in report.warnings if "GPU" not in w)
    assert nvml.names()[-2:] == ["nvmlDeviceResetGpuLockedClocks", "nvmlShutdown"]
    assert BenchReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_throttled_gpu_is_a_warning(clock):
    pynvml = pytest.importorskip("pynvml")
    from test_gpu_state import GpuWatch, double

    nvml = double(
        nvmlDeviceGetCurrentClocksEventReasons=pynvml.nvmlClocksEventReasonSwPowerCap,
        nvmlDeviceGetTotalEnergyConsumption=0,
    )
    report = measure(clock, Fake("a", clock, constant(0.01)), gpu=GpuWatch(nvml=nvml))
    assert report.gpu["state"] == "throttled"
    assert any("slowed itself down" in warning and "power cap" in warning for warning in report.warnings)


def test_a_gpu_that_tells_nothing_is_measured_all_the_same_and_named_in_a_warning(clock):
    pytest.importorskip("pynvml")
    from test_gpu_state import NOT_SUPPORTED, READINGS, GpuWatch, double

    nvml = double(**dict.fromkeys([*READINGS, "nvmlDeviceGetTotalEnergyConsumption"], NOT_SUPPORTED))
    report = measure(clock, Fake("a", clock, constant(0.01)), gpu=GpuWatch(nvml=nvml))
    assert report.gpu["sm clock"] == report.gpu["name"] == "not readable"
    assert report.latencies[0].energy_mj is None
    assert any("does not tell its clock" in warning for warning in report.warnings)


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_runner_on_another_provider_than_asked_is_refused(clock):
    runner = Fake("small", clock, constant(0.01), provider="cpu")
    with pytest.raises(BackendError, match="small: asked for provider cuda, but it runs on cpu"):
        measure(clock, runner, providers={"small": "cuda"})
    assert clock.calls == []
    assert measure(clock, runner, providers={"small": "cpu"}).runners[0].facts["provider"] == "cpu"


def test_a_runner_that_changes_its_provider_while_measured_is_refused(clock):
    runner = Fake("a", clock, constant(0.01), provider="cuda")

    def falls_back(number, images):
        runner.provider = "cuda" if number < 20 else "cpu"
        return 0.01

    runner.takes = falls_back
    with pytest.raises(BackendError, match="changed while it was measured"):
        measure(clock, runner, providers={"a": "cuda"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"runners": ()}, "nothing to measure"),
        ({"images": {}}, "nothing to measure"),
        ({"runners": ("a", "a")}, "two runners are called 'a'"),
        ({"images": {3: np.zeros((2, 3, 2, 2), np.float32)}}, r"batch 3 has images of shape \[2, 3, 2, 2\]"),
        ({"min_rounds": 1}, "min_rounds >= 2"),
        ({"seconds": float("nan")}, "seconds >= 0"),
        ({"providers": {"b": "cpu"}}, "'b', which is not measured"),
    ],
)
def test_input_that_cannot_be_measured_is_refused(clock, change, words):
    given = {"runners": ("a",), "images": batches(1), **change}
    runners = [Fake(name, clock, constant(0.01)) for name in given.pop("runners")]
    with pytest.raises(InputError, match=words):
        compare_latency(runners, given.pop("images"), clock=clock, **given)


# --------------------------------------------------------------------------------------------------------- baseline


def test_the_same_ratio_passes_the_baseline_on_a_machine_half_as_fast(clock):
    lines = check_baseline(pair(clock, 0.020, 0.010), pair(clock, 0.010, 0.005), 0.05)
    assert lines == ["small at batch 1: 0.500 [0.500, 0.500] times big, baseline 0.500, allowed up to 0.525"]


def test_a_ratio_that_grew_more_than_allowed_fails_the_baseline(clock):
    baseline = pair(clock, 0.010, 0.005)
    check_baseline(pair(clock, 0.010, 0.0052), baseline, 0.05)
    with pytest.raises(SlowerError, match=r"small at batch 1: 0.530 .* times big, baseline 0.500, allowed up to 0.525"):
        check_baseline(pair(clock, 0.010, 0.0053), baseline, 0.05)


def test_a_ratio_whose_interval_reaches_the_allowed_one_passes(clock):
    baseline, report = pair(clock, 0.010, 0.005), pair(clock, 0.010, 0.006)
    unsure = replace(report.latencies[1], ratio=Interval(0.6, 0.51, 0.7))
    check_baseline(replace(report, latencies=(report.latencies[0], unsure)), baseline, 0.05)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda report: replace(report, runners=report.runners[:1]), "at least two runners"),
        (lambda report: replace(report, runners=report.runners[::-1]), "ratios are to big, this report's to small"),
        (
            lambda report: replace(
                report, runners=(replace(report.runners[0], facts={"backend": "x"}), report.runners[1])
            ),
            "big: the baseline has backend fake, this report x",
        ),
        (
            lambda report: replace(
                report, runners=tuple(replace(runner, facts=runner.facts | {"l2": "cold"}) for runner in report.runners)
            ),
            "big: the baseline has l2 None, this report cold",
        ),
        (lambda report: replace(report, latencies=(replace(report.latencies[1], batch=9),)), "no small at batch 9"),
        (
            lambda report: replace(report, latencies=(replace(report.latencies[1], timed="device"),)),
            "timed on the device",
        ),
    ],
)
def test_a_report_that_does_not_match_the_baseline_is_refused(clock, change, words):
    report = pair(clock)
    with pytest.raises(InputError, match=words):
        check_baseline(change(report), report, 0.05)


@pytest.mark.parametrize("allowed", [-0.1, float("nan")])
def test_an_allowance_that_is_no_fraction_is_refused(clock, allowed):
    report = pair(clock)
    with pytest.raises(InputError, match="at least 0"):
        check_baseline(report, report, allowed)


# ------------------------------------------------------------------------------------------------------------ output


def test_a_report_survives_json(clock, tmp_path):
    report = pair(clock, sizes=(1, 4))
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report.to_json(), allow_nan=False))
    assert read_report(path) == report


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kind": "mcdeploy bench", "version": 1}'])
def test_what_is_no_report_is_refused(tmp_path, text):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(InputError, match="not a bench report"):
        read_report(path)


def test_a_missing_report_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read the bench report"):
        read_report(tmp_path / "none.json")


def test_from_json_wants_every_field(clock):
    data = pair(clock).to_json()
    del data["latencies"][0]["p99_ms"]
    with pytest.raises(ValueError, match="p99_ms"):
        BenchReport.from_json(data)


def test_the_report_says_what_was_timed_and_where_but_not_the_machines_name(clock):
    report = pair(clock)
    assert {"timed region, host", "interval", "ratio", "memory"} <= set(report.method)
    assert {"cpu", "cores usable", "affinity", "cpu governor", "load average before", "load average after"} <= set(
        report.machine
    )
    assert report.machine["cpu"]
    assert platform.node() not in report.machine.values()


def test_memory_is_the_growth_of_the_process_while_loading_and_running(clock, monkeypatch):
    resident = iter([1000, 1700, 5000, 5040])  # before and after entering, before and after the warm-up
    monkeypatch.setattr(bench, "resident_bytes", lambda: next(resident))
    runner = measure(clock, Fake("a", clock, constant(0.01))).runners[0]
    assert (runner.load_bytes, runner.run_bytes) == (700, 40)


def test_the_table_shows_every_runner_literally(clock):
    report = measure(clock, Fake("big", clock, constant(0.010)), Fake("[red]x[/nonsense]", clock, constant(0.005)))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(report.table())
    text = console.export_text()
    assert "[red]x[/nonsense]" in text
    assert "0.500 [0.500, 0.500]" in text
    assert "10.0 [10.0, 10.0]" in text
    assert "rough: p99 from fewer than 1000 samples" in text


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_plot_is_a_picture(clock, tmp_path, suffix):
    path = tmp_path / f"latency{suffix}"
    pair(clock, sizes=(1, 2)).plot(path)
    head = path.read_bytes()[:200]
    assert head.startswith(b"\x89PNG") if suffix == ".png" else b"<?xml" in head


def test_a_plot_of_an_unknown_kind_is_refused(clock, tmp_path):
    with pytest.raises(InputError, match=r"a plot is a \.png, \.svg or \.pdf"):
        pair(clock).plot(tmp_path / "latency.bmp")
