"""What a measurement stands in: the machine in words, who else uses it, and the CPUs that the process is held to.

Everything is read, nothing is changed but the process's own CPU affinity, which is put back.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mcruntime.cgroup import ROOT, available_threads, core_of, read_text

from mcdeploy.errors import MissingExtraError


def describe_machine(root: Path = ROOT) -> dict[str, str]:
    """The machine in words; its name is nobody's business.

    Args:
        root: where /proc and /sys are found.
    """
    allowed = _allowed_cpus()
    return {
        "cpu": _cpu_model(root / "proc/cpuinfo"),
        "cores usable": str(available_threads(root)),
        "cores": str(os.cpu_count()),
        "cpu governor": _governor(root, allowed),
        "cpu frequency before": _frequency(root, allowed),
        "system": f"{platform.system()} {platform.machine()}",
        "load average before": load_average(),
    }


def describe_afterwards(root: Path = ROOT) -> dict[str, str]:
    """What may have changed while measuring."""
    return {"load average after": load_average(), "cpu frequency after": _frequency(root, _allowed_cpus())}


def busy_warnings(before: float | None, threads: int, cores: int) -> list[str]:
    """Says when somebody else was using the cores that the measurement wanted.

    Args:
        before: load average of the last minute, before the measurement.
        threads: CPU threads of the runner that uses most.
        cores: CPUs that the process may use.
    """
    found = []
    if before is not None and before + min(threads, cores) > cores + 0.5:
        found.append(
            f"other programs kept {before:.1f} of {cores} cores busy in the minute before: with {threads} thread(s) of "
            "ours, the models waited for the CPU at times, which counts as latency and draws ratios to 1; close them"
        )
    if threads > cores:
        found.append(f"{threads} threads on {cores} cores: they take turns; give --threads {cores}")
    return found


def load_average() -> str:
    """Of the last minute; "unknown" where the system does not say."""
    found = load_average_number()
    return "unknown" if found is None else f"{found:.2f}"


def load_average_number() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


@contextmanager
def pinned(threads: int, root: Path = ROOT) -> Iterator[str]:
    """Hold every thread of this process, and those it starts, to ``threads`` CPUs, one a physical core; put it back.

    A thread that wanders between cores finds cold caches, and two runs then differ by where it happened to be. Yields
    in words what was done, or why nothing was.
    """
    allowed = _allowed_cpus()
    chosen = _one_a_core(allowed, threads, root)
    if not hasattr(os, "sched_setaffinity"):
        yield "not pinned: this system has no CPU affinity"
        return
    if len(chosen) < threads:
        yield f"not pinned: {threads} threads, {len(chosen)} physical cores allowed"
        return
    before = {task: os.sched_getaffinity(task) for task in _tasks()}
    try:
        for task in before:
            with suppress(OSError):  # it ended a moment ago
                os.sched_setaffinity(task, chosen)
        yield f"pinned to CPU {', '.join(map(str, sorted(chosen)))}"
    finally:
        for task in _tasks():  # those started meanwhile inherited the narrow set
            with suppress(OSError):
                os.sched_setaffinity(task, before.get(task, allowed))


def resident_bytes() -> int:
    """Of the whole process.

    Raises:
        MissingExtraError: psutil is not installed.
    """
    try:
        import psutil
    except ImportError:
        raise MissingExtraError("mcdeploy bench", "psutil", "train") from None
    return psutil.Process().memory_info().rss


def _allowed_cpus() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _tasks() -> list[int]:
    """The kernel's ids of this process's threads."""
    folder = Path("/proc/self/task")
    return [int(path.name) for path in folder.iterdir()] if folder.is_dir() else [0]


def _one_a_core(allowed: set[int], count: int, root: Path) -> set[int]:
    """The highest-numbered CPUs, one a physical core: interrupts tend to land on the lowest."""
    chosen: dict[str, int] = {}
    for cpu in sorted(allowed, reverse=True):
        chosen.setdefault(core_of(cpu, root), cpu)
    return set(list(chosen.values())[:count])


def _governor(root: Path, cpus: set[int]) -> str:
    folder = root / "sys/devices/system/cpu"
    found = {text for cpu in cpus if (text := read_text(folder / f"cpu{cpu}/cpufreq/scaling_governor"))}
    boost = read_text(folder / "cpufreq/boost")
    boosts = {"0": ", boost off", "1": ", boost on"}.get(boost or "", "")
    return ", ".join(sorted(found)) + boosts if found else "not readable (a virtual machine or container)"


def _frequency(root: Path, cpus: set[int]) -> str:
    folder = root / "sys/devices/system/cpu"
    found = [
        int(text) for cpu in cpus if (text := read_text(folder / f"cpu{cpu}/cpufreq/scaling_cur_freq") or "").isdigit()
    ]
    if found:
        low, high = min(found) / 1e6, max(found) / 1e6
        return f"{low:.2f} GHz" if high - low < 0.01 else f"{low:.2f} to {high:.2f} GHz"
    lines = (read_text(root / "proc/cpuinfo") or "").splitlines()
    said = [line.partition(":")[2].strip() for line in lines if line.startswith("cpu MHz")]
    return f"{float(said[0]) / 1e3:.2f} GHz, as /proc/cpuinfo says" if said else "not readable"


def _cpu_model(cpuinfo: Path) -> str:
    for line in (read_text(cpuinfo) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
