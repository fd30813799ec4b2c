"""What a GPU does while it is measured, through NVML: clocks, heat, power, why it slows down, energy of an inference.

A GPU changes its clock with load and heat, so a latency without its clock cannot be compared. The clock is locked where
that is asked for and permitted, and always let go again; elsewhere it is recorded, and the result is called floating,
or throttled when the GPU slowed itself down. Written against the documented NVML and checked against the names and
arguments of nvidia-ml-py; it has never run on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from mcdeploy.errors import BackendError, MissingExtraError

STEADY_MHZ = 15  # one step of an SM clock
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
    """One look at the GPU."""

    sm_mhz: int
    celsius: int
    watts: float
    slowdowns: frozenset[str]


@dataclass
class GpuWatch:
    """One GPU from before the warm-up to after the last inference; a context manager.

    Args:
        index: of the GPU, as NVML counts.
        lock_clocks: hold the SM clock at its maximum while inside.
        nvml: the pynvml module; tests bring their own.

    Raises:
        MissingExtraError: nvidia-ml-py is not installed.
        BackendError: on entering: NVML finds no driver or no such GPU, or locking was asked for and is not permitted.
    """

    index: int = 0
    lock_clocks: bool = False
    nvml: Any = None
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
            self._handle = self.nvml.nvmlDeviceGetHandleByIndex(self.index)
            if self.lock_clocks:
                self._lock()
        except self.nvml.NVMLError as error:
            self.nvml.nvmlShutdown()
            raise BackendError(f"gpu {self.index}: not readable through NVML ({error})") from error
        except BackendError:
            self.nvml.nvmlShutdown()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if self.locked_mhz is not None:
                self.nvml.nvmlDeviceResetGpuLockedClocks(self._handle)
        finally:
            self.nvml.nvmlShutdown()

    def look(self) -> Sample:
        """Read and remember the state of this moment."""
        nvml, handle = self.nvml, self._handle
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        sample = Sample(
            sm_mhz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
            celsius=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            watts=nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            slowdowns=frozenset(
                words for name, words in SLOWDOWNS.items() if reasons & getattr(nvml, f"nvmlClocksEventReason{name}")
            ),
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
    ) -> bool:
        """Call ``run`` until the SM clock stood still for three looks, 0.1 s apart; False when it never did.

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
                seen = [*seen, self.look().sm_mhz][-3:]
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
        if any(sample.slowdowns for sample in self.samples):
            return "throttled"
        return "floating" if self.locked_mhz is None else "locked"

    def facts(self) -> dict[str, str]:
        """In words, for a report."""
        name = self.nvml.nvmlDeviceGetName(self._handle)
        facts = {
            "name": name.decode() if isinstance(name, bytes) else str(name),
            "driver": str(self.nvml.nvmlSystemGetDriverVersion()),
            "state": self.state(),
        }
        if self.locked_mhz is not None:
            facts["clock locked to"] = f"{self.locked_mhz} MHz"
        if self.samples:
            facts |= {
                "sm clock": _span([sample.sm_mhz for sample in self.samples], "MHz"),
                "temperature": _span([sample.celsius for sample in self.samples], "C"),
                "power": _span([round(sample.watts) for sample in self.samples], "W"),
                "slowed down by": ", ".join(sorted(set().union(*(s.slowdowns for s in self.samples)))) or "nothing",
            }
        return facts

    def _lock(self) -> None:
        nvml = self.nvml
        highest = nvml.nvmlDeviceGetMaxClockInfo(self._handle, nvml.NVML_CLOCK_SM)
        try:
            nvml.nvmlDeviceSetGpuLockedClocks(self._handle, highest, highest)
        except nvml.NVMLError as error:
            raise BackendError(
                f"gpu {self.index}: --lock-clocks is not permitted here ({error}); run it as root, or leave it out: "
                "the clock is then recorded and the result called floating"
            ) from error
        self.locked_mhz = highest


def _span(numbers: list[int], unit: str) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"
