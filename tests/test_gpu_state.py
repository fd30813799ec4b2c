"""NVML is called by names that exist, clocks are always let go, and a slowed GPU is called one. No GPU is involved."""

from __future__ import annotations

import pytest

from mcdeploy.errors import BackendError
from mcdeploy.gpu_state import SLOWDOWNS, GpuWatch

pynvml = pytest.importorskip("pynvml")
from recording_nvml import RecordingNvml  # noqa: E402

ANSWERS = {
    "nvmlDeviceGetHandleByIndex": "handle",
    "nvmlDeviceGetMaxClockInfo": 1980,
    "nvmlDeviceGetClockInfo": 1410,
    "nvmlDeviceGetTemperature": 61,
    "nvmlDeviceGetPowerUsage": 250_400,
    "nvmlDeviceGetCurrentClocksEventReasons": 0,
    "nvmlDeviceGetName": "GPU",
    "nvmlSystemGetDriverVersion": "580.1",
}


def double(**answers):
    return RecordingNvml(**{**ANSWERS, **answers})


class Clock:
    def __init__(self, step):
        self.now, self.step = 0.0, step

    def __call__(self):
        return self.now

    def run(self):
        self.now += self.step


def test_clocks_are_recorded_and_the_result_is_called_floating():
    nvml = double()
    with GpuWatch(nvml=nvml) as watch:
        watch.look()
        nvml.answers["nvmlDeviceGetClockInfo"] = 1500
        watch.look()
        facts = watch.facts()
    assert facts == {
        "name": "GPU",
        "driver": "580.1",
        "state": "floating",
        "sm clock": "1410 to 1500 MHz",
        "temperature": "61 C",
        "power": "250 W",
        "slowed down by": "nothing",
    }
    assert "nvmlDeviceSetGpuLockedClocks" not in nvml.names()
    assert nvml.names()[-1] == "nvmlShutdown"


@pytest.mark.parametrize("fails", [False, True])
def test_locked_clocks_are_let_go_whatever_happens(fails):
    nvml = double()
    try:
        with GpuWatch(lock_clocks=True, nvml=nvml) as watch:
            watch.look()
            assert watch.state() == "locked"
            assert watch.facts()["clock locked to"] == "1980 MHz"
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert ("nvmlDeviceSetGpuLockedClocks", "handle", 1980, 1980) in nvml.calls
    assert nvml.names()[-2:] == ["nvmlDeviceResetGpuLockedClocks", "nvmlShutdown"]


def test_a_lock_that_is_not_permitted_is_an_error_that_says_what_to_do():
    nvml = double(nvmlDeviceSetGpuLockedClocks=pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION))
    with (
        pytest.raises(BackendError, match="--lock-clocks is not permitted here"),
        GpuWatch(lock_clocks=True, nvml=nvml),
    ):
        pass
    assert nvml.names()[-1] == "nvmlShutdown"
    assert "nvmlDeviceResetGpuLockedClocks" not in nvml.names()  # what we did not set is not ours to reset


def test_no_driver_is_an_error():
    nvml = double(nvmlInit=pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED))
    with pytest.raises(BackendError, match="install the NVIDIA driver"), GpuWatch(nvml=nvml):
        pass


@pytest.mark.parametrize("name", SLOWDOWNS)
def test_a_gpu_that_slowed_itself_down_is_called_throttled_even_when_locked(name):
    bit = getattr(pynvml, f"nvmlClocksEventReason{name}")
    with GpuWatch(lock_clocks=True, nvml=double(nvmlDeviceGetCurrentClocksEventReasons=bit)) as watch:
        watch.look()
        assert watch.state() == "throttled"
        assert SLOWDOWNS[name] in watch.facts()["slowed down by"]


@pytest.mark.parametrize("name", ["GpuIdle", "UserDefinedClocks", "ApplicationsClocksSetting", "None"])
def test_idling_and_chosen_clocks_are_no_throttling(name):
    bit = getattr(pynvml, f"nvmlClocksEventReason{name}")
    with GpuWatch(nvml=double(nvmlDeviceGetCurrentClocksEventReasons=bit)) as watch:
        watch.look()
        assert watch.state() == "floating"


def test_warm_up_lasts_until_the_clock_stands_still():
    clock, readings = Clock(0.05), iter([300, 900, 1400, 1410, 1410, 1410])
    with GpuWatch(nvml=double(nvmlDeviceGetClockInfo=lambda: next(readings))) as watch:
        assert watch.warm_until_steady(clock.run, clock=clock)
        assert next(readings) == 1410  # three alike were enough: 1400, 1410, 1410
        assert watch.samples == []


def test_a_clock_that_never_stands_still_is_told():
    clock, readings = Clock(0.05), iter(range(300, 10_000, 100))
    with GpuWatch(nvml=double(nvmlDeviceGetClockInfo=lambda: next(readings))) as watch:
        assert not watch.warm_until_steady(clock.run, at_most=2.0, clock=clock)


def test_energy_is_the_counter_over_the_number_of_inferences():
    clock, counter = Clock(0.01), iter([1_000_000, 1_025_000])
    with GpuWatch(nvml=double(nvmlDeviceGetTotalEnergyConsumption=lambda: next(counter))) as watch:
        assert watch.energy_of(clock.run, seconds=0.995, clock=clock) == pytest.approx(250)  # 25 J over 100 runs
    missing = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
    with GpuWatch(nvml=double(nvmlDeviceGetTotalEnergyConsumption=missing)) as watch:
        assert watch.energy_of(clock.run, clock=clock) is None
