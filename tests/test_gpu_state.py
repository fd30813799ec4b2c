"""NVML is called by names that exist, clocks are always let go, and a slowed GPU is called one. No GPU is involved."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from mcruntime import gpu as runtime_gpu

from mcdeploy import gpu_state
from mcdeploy.errors import BackendError, MissingExtraError
from mcdeploy.gpu_state import SLOWDOWNS, pci_bus_id

pynvml = pytest.importorskip("pynvml")
from recording_nvml import RecordingNvml  # noqa: E402

BUS = "0000:3b:00.0"
GpuWatch = functools.partial(gpu_state.GpuWatch, bus_id_of=lambda index: BUS)
NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
ANSWERS = {
    "nvmlDeviceGetHandleByPciBusId": "handle",
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


# ---------------------------------------------------------------------------------------------------- which GPU it is


def test_the_gpu_is_the_one_that_cuda_counts_and_not_the_one_that_nvml_does():
    nvml = double()
    with gpu_state.GpuWatch(2, lock_clocks=True, nvml=nvml, bus_id_of=lambda index: f"0000:0{index}:00.0"):
        pass
    assert ("nvmlDeviceGetHandleByPciBusId", "0000:02:00.0") in nvml.calls
    assert "nvmlDeviceGetHandleByIndex" not in nvml.names()
    assert ("nvmlDeviceSetGpuLockedClocks", "handle", 1980, 1980) in nvml.calls


def test_a_gpu_that_nvml_does_not_find_is_an_error_with_its_place():
    nvml = double(nvmlDeviceGetHandleByPciBusId=pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND))
    with pytest.raises(BackendError, match=f"gpu 0: NVML does not find it at {BUS} on the PCI bus"):
        GpuWatch(nvml=nvml).__enter__()
    assert nvml.names()[-1] == "nvmlShutdown"


def test_where_cuda_cannot_be_asked_nvml_is_let_go_again():
    def fail(index):
        raise MissingExtraError("running on a GPU", "cuda-python", "gpu")

    nvml = double()
    with pytest.raises(MissingExtraError):
        gpu_state.GpuWatch(nvml=nvml, bus_id_of=fail).__enter__()
    assert nvml.names() == ["nvmlInit", "nvmlShutdown"]


def test_pytorch_is_asked_for_the_place_where_it_has_cuda(monkeypatch):
    asked = []

    def properties(index):
        asked.append(index)
        return SimpleNamespace(pci_domain_id=1, pci_bus_id=0x3B, pci_device_id=10)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert pci_bus_id(3) == "0001:3b:0a.0"
    assert asked == [3]
    # The names are those of the real class, in builds that have it.
    real = getattr(torch._C, "_CudaDeviceProperties", None)
    assert real is None or {"pci_domain_id", "pci_bus_id", "pci_device_id"} <= set(dir(real))


@pytest.mark.parametrize("torch_cuda", [False, True])
def test_cuda_python_is_asked_where_pytorch_cannot_tell(monkeypatch, torch_cuda):
    from recording_tensorrt import FakeCuda, Machine

    class Cuda(FakeCuda):
        def _cudaDeviceGetPCIBusId(self, length, index):
            return f"0000:0{index + 4}:00.0".encode() + b"\0" + b" " * (length - 13)  # as cuda-python pads it

    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_cuda)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="older PyTorch"))
    cuda = Cuda(Machine())
    monkeypatch.setattr(gpu_state, "load_cudart", lambda: cuda)
    assert pci_bus_id(1) == "0000:05:00.0"
    cuda.fail["cudaDeviceGetPCIBusId"] = runtime_gpu.load_cudart().cudaError_t.cudaErrorInvalidDevice
    with pytest.raises(BackendError, match=r"say where GPU 1 sits on the PCI bus \(cudaErrorInvalidDevice"):
        pci_bus_id(1)


# ------------------------------------------------------------------------------------- a GPU that does not tell, as MIG

READINGS = [name for name in ANSWERS if "Handle" not in name and "Max" not in name]


@pytest.mark.parametrize("missing", [*([name] for name in READINGS), READINGS])
def test_what_a_gpu_does_not_tell_is_called_not_readable_and_stops_nothing(missing):
    labels = {
        "nvmlDeviceGetClockInfo": "sm clock",
        "nvmlDeviceGetTemperature": "temperature",
        "nvmlDeviceGetPowerUsage": "power",
        "nvmlDeviceGetCurrentClocksEventReasons": "slowed down by",
        "nvmlDeviceGetName": "name",
        "nvmlSystemGetDriverVersion": "driver",
    }
    with GpuWatch(nvml=double(**dict.fromkeys(missing, NOT_SUPPORTED))) as watch:
        watch.look()
        facts = watch.facts()
    assert {label for label, value in facts.items() if value == "not readable"} == {labels[name] for name in missing}
    assert facts["state"] == "floating"


def test_a_reading_that_fails_once_does_not_hide_the_others():
    nvml = double()
    with GpuWatch(nvml=nvml) as watch:
        watch.look()
        nvml.answers |= dict.fromkeys(READINGS, NOT_SUPPORTED)
        watch.look()
        facts = watch.facts()
    assert (facts["sm clock"], facts["power"], facts["slowed down by"]) == ("1410 MHz", "250 W", "nothing")


def test_a_clock_that_is_not_readable_is_warmed_for_two_seconds_and_told():
    clock = Clock(0.05)
    with GpuWatch(nvml=double(nvmlDeviceGetClockInfo=NOT_SUPPORTED)) as watch:
        assert watch.warm_until_steady(clock.run, clock=clock) is None
        assert clock.now == pytest.approx(2.0)
        assert watch.samples == []


@pytest.mark.parametrize("call", ["nvmlDeviceGetMaxClockInfo", "nvmlDeviceSetGpuLockedClocks"])
def test_a_lock_that_the_gpu_does_not_know_is_an_error(call):
    nvml = double(**{call: NOT_SUPPORTED})
    with pytest.raises(BackendError, match="--lock-clocks is not permitted here"):
        GpuWatch(lock_clocks=True, nvml=nvml).__enter__()
    assert nvml.names()[-1] == "nvmlShutdown"


def test_a_clock_that_cannot_be_let_go_is_a_warning_and_does_not_cost_the_measurement():
    nvml = double(nvmlDeviceResetGpuLockedClocks=NOT_SUPPORTED)
    told = pytest.warns(UserWarning, match="still locked .*'nvidia-smi --reset-gpu-clocks'")
    with told, GpuWatch(lock_clocks=True, nvml=nvml):
        pass
    assert nvml.names()[-1] == "nvmlShutdown"
