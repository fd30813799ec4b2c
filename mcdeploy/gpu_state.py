"""What a GPU does while it is measured, through NVML: clocks, heat, power, why it slows down, energy of an inference.

A GPU changes its clock with load and heat, so a latency without its clock cannot be compared. The clock is locked where
that is asked for and permitted, and always let go again; elsewhere it is recorded, and the result is called floating,
or throttled when the GPU slowed itself down. What a GPU does not tell, as under MIG or a hypervisor, is called not
readable and stops nothing. Written against the documented NVML and checked against the names and arguments of
nvidia-ml-py; ran on an H100 once, but for the locking of clocks.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from mcruntime.gpu import checked, load_cudart

from mcdeploy.errors import BackendError, MissingExtraError

STEADY_MHZ = 15  # one step of an SM clock
BLIND_SECONDS = 2.0  # of warm-up where the clock is not readable; clocks rise within one
NOT_READABLE = "not readable"
# Reasons for which a GPU runs slower than it could; idling or a lock that we asked for is none.
SLOWDOWNS = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "heat (software)",
    "HwThermalSlowdown": "heat (hardware)",
    "HwPowerBrakeSlowdown": "power brake",
}


@dataclass(frozen=True)
class Sample:
    """One look at the GPU; None: it does not tell."""

    sm_mhz: int | None
    celsius: int | None
    watts: float | None
    slowdowns: frozenset[str] | None


@dataclass
class GpuWatch:
    """One GPU from before the warm-up to after the last inference; a context manager.

    Args:
        index: of the GPU, as CUDA counts. NVML counts in another order and does not know CUDA_VISIBLE_DEVICES, so the
            GPU is looked up by its place on the PCI bus.
        lock_clocks: hold the SM clock at its maximum while inside.
        nvml: the pynvml module; tests bring their own.
        bus_id_of: the place on the PCI bus of the GPU with CUDA's number, such as "0000:3b:00.0".

    Raises:
        MissingExtraError: nvidia-ml-py is not installed, or neither PyTorch nor cuda-python can ask CUDA.
        BackendError: on entering: NVML finds no driver or no such GPU, or locking was asked for and is not permitted.
    """

    index: int = 0
    lock_clocks: bool = False
    nvml: Any = None
    bus_id_of: Callable[[int], str] = field(default_factory=lambda: pci_bus_id)
    samples: list[Sample] = field(default_factory=list)
    locked_mhz: int | None = None
    _handle: Any = None

    def __enter__(self) -> Self:
        if self.nvml is None:
            try:
                import pynvml
            except ImportError:
                raise MissingExtraError("the state of the GPU", "nvidia-ml-py", "gpu") from None
            self.nvml = pynvml
        try:
            self.nvml.nvmlInit()
        except self.nvml.NVMLError as error:
            raise BackendError(f"gpu {self.index}: NVML does not start ({error}); install the NVIDIA driver") from error
        try:
            self._handle = self._find()
            if self.lock_clocks:
                self._lock()
        except BaseException:
            self.nvml.nvmlShutdown()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if self.locked_mhz is not None:
                self.nvml.nvmlDeviceResetGpuLockedClocks(self._handle)
        except self.nvml.NVMLError as error:  # the measurement is done, and must not be lost for it
            warnings.warn(
                f"gpu {self.index}: its clock is still locked ({error}); 'nvidia-smi --reset-gpu-clocks' lets it go",
                stacklevel=2,
            )
        finally:
            self.nvml.nvmlShutdown()

    def look(self) -> Sample:
        """Read and remember the state of this moment, as far as the GPU tells."""
        nvml, handle = self.nvml, self._handle
        milliwatts = self._read("nvmlDeviceGetPowerUsage", handle)
        reasons = self._read("nvmlDeviceGetCurrentClocksEventReasons", handle)
        sample = Sample(
            sm_mhz=self._read("nvmlDeviceGetClockInfo", handle, nvml.NVML_CLOCK_SM),
            celsius=self._read("nvmlDeviceGetTemperature", handle, nvml.NVML_TEMPERATURE_GPU),
            watts=None if milliwatts is None else milliwatts / 1e3,
            slowdowns=None if reasons is None else self._slowdowns(reasons),
        )
        self.samples.append(sample)
        return sample

    def warm_until_steady(
        self,
        run: Callable[[], object],
        *,
        at_least: float = 0.2,
        at_most: float = 10.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> bool | None:
        """Call ``run`` until the SM clock stood still for three looks, 0.1 s apart; False when it never did.

        None where the clock is not readable: then it runs for ``BLIND_SECONDS``.

        Args:
            run: one inference.
            at_least, at_most: seconds.
        """
        start = looked = clock()
        seen: list[int] = []
        while clock() - start < at_most:
            run()
            if clock() - looked >= 0.1:
                looked = clock()
                now = self.look().sm_mhz
                if now is None:
                    while clock() - start < min(BLIND_SECONDS, at_most):
                        run()
                    self.samples.clear()
                    return None
                seen = [*seen, now][-3:]
                if len(seen) == 3 and max(seen) - min(seen) <= STEADY_MHZ and clock() - start >= at_least:
                    self.samples.clear()  # what came before the clock was steady says nothing of the measurement
                    return True
        return False

    def energy_of(
        self, run: Callable[[], object], *, seconds: float = 1.0, clock: Callable[[], float] = time.perf_counter
    ) -> float | None:
        """Millijoules of one call: the GPU's energy counter over many calls, idle power included; None: no counter.

        Args:
            run: one inference, waited for.
            seconds: how long; the counter moves in steps of some ten milliseconds.
        """
        try:
            before = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            start, runs = clock(), 0
            while clock() - start < seconds:
                run()
                runs += 1
            spent = self.nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) - before
        except self.nvml.NVMLError:
            return None  # before Volta there is no such counter; the report leaves the line out
        return float(spent) / runs if runs else None

    def state(self) -> str:
        """ "throttled" when it slowed itself down, "locked" when its clock is held, "floating" otherwise."""
        if any(sample.slowdowns for sample in self.samples):  # what is not readable is told in the facts
            return "throttled"
        return "floating" if self.locked_mhz is None else "locked"

    def facts(self) -> dict[str, str]:
        """In words, for a report."""
        facts = {
            "name": _text(self._read("nvmlDeviceGetName", self._handle)),
            "driver": _text(self._read("nvmlSystemGetDriverVersion")),
            "state": self.state(),
        }
        if self.locked_mhz is not None:
            facts["clock locked to"] = f"{self.locked_mhz} MHz"
        if self.samples:
            known = [sample.slowdowns for sample in self.samples if sample.slowdowns is not None]
            slowdowns = ", ".join(sorted(frozenset[str]().union(*known))) or "nothing"
            facts |= {
                "sm clock": _span([sample.sm_mhz for sample in self.samples], "MHz"),
                "temperature": _span([sample.celsius for sample in self.samples], "C"),
                "power": _span([sample.watts for sample in self.samples], "W"),
                "slowed down by": slowdowns if known else NOT_READABLE,
            }
        return facts

    def _find(self) -> Any:
        """NVML's handle of the GPU that CUDA calls ``index``."""
        bus_id = self.bus_id_of(self.index)
        try:
            return self.nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
        except self.nvml.NVMLError as error:
            raise BackendError(
                f"gpu {self.index}: NVML does not find it at {bus_id} on the PCI bus ({error}); compare with "
                "'nvidia-smi -L', a container may hide it from NVML"
            ) from error

    def _read(self, name: str, *arguments: Any) -> Any:
        """What NVML answers, or None where this GPU, driver or virtual machine does not tell."""
        try:
            return getattr(self.nvml, name)(*arguments)
        except self.nvml.NVMLError:
            return None

    def _slowdowns(self, reasons: int) -> frozenset[str]:
        return frozenset(
            words for name, words in SLOWDOWNS.items() if reasons & getattr(self.nvml, f"nvmlClocksEventReason{name}")
        )

    def _lock(self) -> None:
        nvml = self.nvml
        try:
            highest = nvml.nvmlDeviceGetMaxClockInfo(self._handle, nvml.NVML_CLOCK_SM)
            nvml.nvmlDeviceSetGpuLockedClocks(self._handle, highest, highest)
        except nvml.NVMLError as error:
            raise BackendError(
                f"gpu {self.index}: --lock-clocks is not permitted here ({error}); run it as root, or leave it out: "
                "the clock is then recorded and the result called floating"
            ) from error
        self.locked_mhz = highest


def pci_bus_id(index: int) -> str:
    """Where the GPU sits on the PCI bus that CUDA gives this number, in this process.

    PyTorch is asked where it can use CUDA, since cuda-python may want a newer driver than it does.

    Raises:
        MissingExtraError: neither PyTorch with CUDA nor cuda-python is installed.
        BackendError: CUDA finds no such GPU.
    """
    try:
        import torch
    except ImportError:
        has_cuda = False
    else:
        has_cuda = torch.cuda.is_available()
    if has_cuda:
        found: Any = torch.cuda.get_device_properties(index)
        if hasattr(found, "pci_bus_id"):  # newer PyTorch
            return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"
    cudart = load_cudart()
    padded = checked(cudart, cudart.cudaDeviceGetPCIBusId(32, index), f"say where GPU {index} sits on the PCI bus")
    return str(padded.split(b"\0")[0].decode("ascii"))


def _text(value: bytes | str | None) -> str:
    if value is None:
        return NOT_READABLE
    return value.decode() if isinstance(value, bytes) else str(value)


def _span(readings: Sequence[float | None], unit: str) -> str:
    numbers = [round(reading) for reading in readings if reading is not None]
    if not numbers:
        return NOT_READABLE
    low, high = min(numbers), max(numbers)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"
