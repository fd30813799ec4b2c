"""What this process may use is what its affinity, its cgroup and all cgroups above it leave."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from mcruntime.cgroup import available_threads, core_of, cpu_quota, memory_limit, read_text


def machine(root, num_cpus=8, siblings=1, **files):
    """A made-up /sys and /proc; ``siblings`` hardware threads share a core."""
    for cpu in range(num_cpus):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        first = cpu - cpu % siblings
        (topology / "thread_siblings_list").write_text(f"{first}-{first + siblings - 1}\n")
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize(
    ("siblings", "files", "expected"),
    [
        (1, {}, 8),
        (2, {}, 4),
        (1, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        (1, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        (1, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "350000 100000\n"}, 3),
        (1, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        (2, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "600000 100000\n"}, 4),
        (1, {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
             "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 2),
        (1, {"proc/self/cgroup": "0::/host/only\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (1, {"proc/self/cgroup": "3:cpu,cpuacct:/job\n", "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "400000\n",
             "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n"}, 4),
        (1, {"proc/self/cgroup": "3:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
             "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ],
)  # fmt: skip
def test_available_threads_are_cores_within_affinity_and_quota(tmp_path, monkeypatch, siblings, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert available_threads(machine(tmp_path, siblings=siblings, **files)) == expected


def test_available_threads_keep_to_the_affinity(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 6})
    assert available_threads(machine(tmp_path, siblings=2)) == 2
    assert available_threads(tmp_path / "no such machine") == 3


def test_limits_of_a_container_are_read_in_both_versions_of_cgroups(tmp_path):
    second = machine(
        tmp_path / "2",
        **{"proc/self/cgroup": "0::/pod/app\n",
         "sys/fs/cgroup/pod/cpu.max": "150000 100000", "sys/fs/cgroup/pod/app/cpu.max": "max 100000",
         "sys/fs/cgroup/pod/memory.max": str(2 << 30), "sys/fs/cgroup/pod/app/memory.max": "max"},
    )  # fmt: skip
    assert (cpu_quota(second), memory_limit(second)) == (1.5, 2 << 30)
    first = machine(
        tmp_path / "1",
        **{"proc/self/cgroup": "5:cpu,cpuacct:/app\n4:memory:/app\n",
         "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_quota_us": "50000",
         "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_period_us": "100000",
         "sys/fs/cgroup/cpu/app/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/app/cpu.cfs_period_us": "100000",
         "sys/fs/cgroup/memory/app/memory.limit_in_bytes": str(1 << 30),
         "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"},
    )  # fmt: skip
    assert (cpu_quota(first), memory_limit(first)) == (0.5, 1 << 30)
    free = machine(
        tmp_path / "0",
        **{
            "proc/self/cgroup": "4:memory:/\n0::/\n",
            "sys/fs/cgroup/cpu.max": "max 100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
    )
    assert (cpu_quota(free), memory_limit(free)) == (None, None)


def test_a_machine_that_says_nothing_has_no_limits_and_each_cpu_is_a_core(tmp_path):
    assert (cpu_quota(tmp_path), memory_limit(tmp_path), core_of(5, tmp_path)) == (None, None, "5")
    assert read_text(tmp_path / "nothing") is None


def test_the_limits_can_be_read_where_nothing_is_installed():
    heavy = "{'numpy', 'pydantic', 'onnxruntime', 'torch'}"
    code = f"import sys, mcruntime.cgroup as c; c.available_threads(); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
