"""How much of the machine this process may use: its CPU affinity, and the limits of its container (Linux cgroups).

Both versions of cgroups are read. A limit holds for everything below it, so the strictest one on the way up counts.
``root`` is where /proc and /sys are found; what cannot be read is no limit.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

ROOT = Path("/")
NO_LIMIT_BYTES = 1 << 60  # version 1 writes a number near 2^63 for "none"


def available_threads(root: Path = ROOT) -> int:
    """Physical cores this process may use, at least 1: its CPU affinity, and no more than its cgroup's CPU quota."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {core_of(cpu, root) for cpu in allowed}
    quota = cpu_quota(root)
    return max(1, len(cores) if quota is None else min(len(cores), math.floor(quota)))


def core_of(cpu: int, root: Path = ROOT) -> str:
    """The physical core of a CPU, by the list of the CPUs that share it; the CPU's own number where nothing says."""
    return read_text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs at a time that this process's cgroups allow, the strictest of them; None: no limit."""
    found = []
    for folder in cgroup_folders("cpu", root):
        quota, _, period = (read_text(folder / "cpu.max") or "").partition(" ")
        if not quota:
            quota = read_text(folder / "cpu.cfs_quota_us") or ""
            period = read_text(folder / "cpu.cfs_period_us") or ""
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def memory_limit(root: Path = ROOT) -> int | None:
    """Bytes that this process's cgroups allow, the strictest of them; None: no limit."""
    found = []
    for folder in cgroup_folders("memory", root):
        text = read_text(folder / "memory.max") or read_text(folder / "memory.limit_in_bytes") or ""
        if text.isdigit() and int(text) < NO_LIMIT_BYTES:
            found.append(int(text))
    return min(found, default=None)


def cgroup_folders(controller: str, root: Path = ROOT) -> list[Path]:
    """This process's cgroup and those above it; a container may see its own as the top one.

    Args:
        controller: of version 1, such as cpu or memory; version 2 has one folder for all.
    """
    folders = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):  # version 2, or this controller of version 1
            top = root / "sys/fs/cgroup" / (controller if controllers else "")
            own = top / path.lstrip("/")
            folders += [own, *(parent for parent in own.parents if parent.is_relative_to(top))]
    return folders


def read_text(path: Path) -> str | None:
    """A small file of /proc or /sys without the white space around it; None: not there, or not for us."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
