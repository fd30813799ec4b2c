"""The machine is read from where it is written, and the CPU affinity is put back."""

from __future__ import annotations

import os

import pytest

from mcdeploy.surroundings import busy_warnings, describe_machine, pinned


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_machine_is_named_as_linux_names_it(tmp_path):
    cpu = min(os.sched_getaffinity(0))
    folder = f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
    write(
        tmp_path,
        {
            "proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast CPU @ 9 GHz\n",
            f"{folder}/scaling_governor": "powersave\n",
            f"{folder}/scaling_cur_freq": "3400000\n",
            "sys/devices/system/cpu/cpufreq/boost": "0\n",
        },
    )
    found = describe_machine(tmp_path)
    assert found["cpu"] == "Fast CPU @ 9 GHz"
    assert found["cpu governor"] == "powersave, boost off"
    assert found["cpu frequency before"] == "3.40 GHz"


def test_what_cannot_be_read_is_said(tmp_path):
    found = describe_machine(tmp_path)
    assert found["cpu governor"].startswith("not readable")
    assert found["cpu frequency before"] == "not readable"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_the_process_is_held_to_so_many_cpus_and_let_go():
    before = os.sched_getaffinity(0)
    with pinned(1) as words:
        assert len(os.sched_getaffinity(0)) == 1
        assert words == f"pinned to CPU {min(os.sched_getaffinity(0))}"
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ZeroDivisionError), pinned(1):
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_more_threads_than_cores_are_not_pinned_and_it_is_said():
    before = os.sched_getaffinity(0)
    with pinned(1000) as words:
        assert "not pinned: 1000 threads" in words
        assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("load", "threads", "cores", "says"),
    [
        (0.2, 1, 2, []),
        (1.2, 1, 2, []),
        (1.9, 1, 2, ["close them"]),
        (None, 2, 2, []),
        (0.0, 4, 2, ["give --threads 2"]),
        (3.0, 4, 2, ["close them", "give --threads 2"]),
    ],
)
def test_busy_cores_are_a_warning(load, threads, cores, says):
    found = busy_warnings(load, threads, cores)
    assert len(found) == len(says)
    assert all(word in text for word, text in zip(says, found, strict=True))
