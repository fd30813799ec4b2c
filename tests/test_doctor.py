"""Doctor says what runs here and why the rest does not, and fails where a package does not keep its promise."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from mcruntime.cgroup import available_threads
from onnx import TensorProto, helper, numpy_helper

from mcdeploy import cli, doctor
from mcdeploy.doctor import (
    TINY_MODEL,
    Diagnosis,
    Row,
    answer_probe,
    examine,
    read_extras,
    run_probe,
)

ROOT = Path(__file__).parents[1]
REQUIREMENTS = [
    "numpy>=1.26", "torch>=2.9; extra == 'train'", 'timm>=1.0.20 ; extra == "train"',
    "onnxruntime>=1.20; extra == 'cpu'", "onnxruntime-gpu>=1.20; extra == 'gpu'", "tensorrt>=10.12; extra == 'gpu'",
    "uvicorn>=0.30; extra == 'serve'", "tritonclient[grpc]>=2.50; extra == 'dev'", "types_PyYAML; extra == 'dev'",
]  # fmt: skip
NO_CUDA = {"error": "a tiny model: asked for provider cuda, which this onnxruntime was built without; ask for cpu"}
NO_DRIVER = {"error": "NVML Shared Library Not Found"}


def answers(**changes):
    """A probe that answers as a healthy machine without a GPU does; ``changes`` by the name of the probe."""
    healthy = {
        "torch": {"version": "2.14.1", "cuda": None, "gpus": [], "reason": "this torch is a CPU build"},
        "provider_cpu": {}, "provider_cuda": NO_CUDA, "provider_tensorrt": NO_CUDA, "mismatch": {"mismatch": None},
        "cudnn": {"error": "not found"}, "nvml": NO_DRIVER, "modules": {}, "openvino": {"devices": ["CPU"]},
        "tensorrt": {"version": "10.16.1.11"},
    }  # fmt: skip

    def probe(name, *arguments):
        return (healthy | changes)["_".join([name, *arguments]) if name == "provider" else name]

    return probe


def diagnose(packages, **changes):
    have = {"mcdeploy": "0.1.0", **{name: "99.0" for name in packages}}
    return examine(packages=have, requirements=REQUIREMENTS, probe=answers(**changes))


def row(diagnosis, name):
    (found,) = [row for row in diagnosis.rows if row.name == name]
    return found


def broken(diagnosis):
    return [row.name for row in diagnosis.broken]


def test_a_healthy_cpu_machine_has_nothing_broken_and_says_why_no_gpu(capsys):
    found = diagnose(["torch", "timm", "onnxruntime", "uvicorn", "nvidia-ml-py", "openvino"])
    assert broken(found) == []
    assert row(found, "extra train").status == "ok"
    assert row(found, "extra gpu").status == "no"
    assert "lacks onnxruntime-gpu, tensorrt" in row(found, "extra gpu").found
    assert row(found, "ONNX Runtime on cpu").status == "ok"
    assert "built without" in row(found, "ONNX Runtime on cuda").sentence
    assert row(found, "torch on CUDA").found == "this torch is a CPU build"
    assert "NVML Shared Library Not Found" in row(found, "GPU").found
    assert row(found, "GPU clocks").status == "no"
    doctor.print_diagnosis(found)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(found.rows), "off a terminal every row is one plain line"
    assert all("\n" not in one.sentence for one in found.rows)


@pytest.mark.parametrize(
    ("packages", "changes", "name"),
    [
        (["torch"], {"torch": {"error": "libtorch.so: cannot open shared object file"}}, "torch"),
        (["onnxruntime"], {"provider_cpu": {"error": "crashed with signal 4"}}, "ONNX Runtime on cpu"),
        (["onnxruntime-gpu"], {}, "ONNX Runtime on cuda"),
        (["onnxruntime-gpu", "nvidia-ml-py"], {"provider_cuda": {}}, "GPU"),
        (["onnxruntime-gpu", "tensorrt"], {"provider_cuda": {}}, "ONNX Runtime on tensorrt"),
        (["tensorrt"], {"tensorrt": {"error": "libnvinfer.so.11: cannot open"}}, "TensorRT"),
        (["openvino"], {"openvino": {"error": "no plugin"}}, "OpenVINO"),
        (["uvicorn"], {"modules": {"error": "No module named 'starlette'"}}, "server"),
        (["cryptography"], {"modules": {"error": "no Rust"}}, "signatures"),
    ],
)
def test_an_installed_package_that_does_not_work_is_a_failure_by_name(packages, changes, name):
    found = diagnose(packages, **changes)
    assert broken(found) == [name]
    assert found.to_json()["ok"] is False
    assert name in found.summary()


def test_what_is_not_installed_is_told_and_is_no_failure():
    found = diagnose([])
    assert broken(found) == []
    for name in ("torch", "ONNX Runtime", "TensorRT"):
        assert row(found, name).status == "no"
        assert "pip install 'mcdeploy[" in row(found, name).advice


def test_both_onnx_runtimes_at_once_are_a_conflict():
    found = diagnose(["onnxruntime", "onnxruntime-gpu"], provider_cuda={}, nvml=NO_DRIVER)
    assert "ONNX Runtime" in broken(found)
    assert "overwrite each other's files" in row(found, "ONNX Runtime").found
    assert "pip uninstall onnxruntime onnxruntime-gpu" in row(found, "ONNX Runtime").advice


def test_the_gpu_extra_beside_the_cpu_one_is_not_advised_without_uninstalling():
    found = diagnose(["onnxruntime"])
    assert "pip uninstall onnxruntime" in row(found, "extra gpu").advice
    assert row(diagnose(["onnxruntime-gpu"]), "extra cpu").found == "onnxruntime-gpu takes its place"


def test_the_tensorrt_trap_is_explained():
    trap = (
        "the TensorRT provider of onnxruntime-gpu 1.31.1 is linked against TensorRT 10, but tensorrt 11.4 is installed"
    )
    found = diagnose(["onnxruntime-gpu", "tensorrt"], provider_cuda={}, mismatch={"mismatch": trap})
    assert row(found, "TensorRT for ONNX Runtime").found == trap
    assert "TensorRT for ONNX Runtime" in broken(found)
    fine = diagnose(["onnxruntime-gpu", "tensorrt"], provider_cuda={})
    assert not [one for one in fine.rows if one.name == "TensorRT for ONNX Runtime"]


def test_another_package_of_tensorrt_counts_as_tensorrt():
    found = diagnose(["onnxruntime-gpu", "tensorrt-cu13"])
    assert row(found, "extra gpu").status == "ok"
    assert row(found, "TensorRT").status == "ok"


def test_a_gpu_is_named_and_its_clocks_are_judged_by_who_asks():
    gpu = {"gpus": ["NVIDIA L4 (22.5 GiB)"], "driver": "580.65.06", "is_root": False}
    found = diagnose(["nvidia-ml-py"], nvml=gpu)
    assert row(found, "GPU").found == "NVIDIA L4 (22.5 GiB), driver 580.65.06"
    assert row(found, "GPU clocks").status == "warn"
    assert row(diagnose(["nvidia-ml-py"], nvml=gpu | {"is_root": True}), "GPU clocks").status == "ok"


def test_a_package_that_is_too_old_is_lacking():
    found = examine(packages={"torch": "2.8.1", "timm": "1.0.31"}, requirements=REQUIREMENTS, probe=answers())
    assert "torch 2.9 or newer (found 2.8.1)" in row(found, "extra train").found
    assert row(found, "mcdeploy").status == "warn", "not installed here"


def test_extras_are_read_from_the_lines_of_the_package_metadata():
    assert read_extras(REQUIREMENTS) == {
        "train": {"torch": "2.9", "timm": "1.0.20"}, "cpu": {"onnxruntime": "1.20"},
        "gpu": {"onnxruntime-gpu": "1.20", "tensorrt": "10.12"}, "serve": {"uvicorn": "0.30"},
    }  # fmt: skip


def test_every_extra_of_the_project_but_dev_has_a_row():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"dev"}
    lines = [
        f"{need}; extra == '{extra}'" for extra, needs in project["optional-dependencies"].items() for need in needs
    ]
    assert {extra: len(needs) for extra, needs in read_extras(lines).items()} == {
        extra: len(needs) for extra, needs in project["optional-dependencies"].items() if extra != "dev"
    }


# ------------------------------------------------------------------------------------------------------------- probes


def test_the_tiny_model_is_the_one_that_its_comment_describes():
    model = onnx.load_from_string(TINY_MODEL)
    onnx.checker.check_model(model, full_check=True)
    nodes = [helper.make_node("Conv", ["images", "w"], ["sum"]), helper.make_node("Flatten", ["sum"], ["logits"])]
    ones = numpy_helper.from_array(np.ones((1, 1, 3, 3), dtype=np.float32), "w")
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", 1, 3, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 1])
    assert model.graph == helper.make_graph(nodes, "g", [images], [logits], [ones])


def test_the_cpu_provider_is_proven_by_an_inference():
    assert run_probe("provider", "cpu") == {}


def test_a_provider_that_computes_something_else_is_an_error(monkeypatch):
    monkeypatch.setattr(doctor, "TINY_SUM", 37.0)
    assert answer_probe("provider", "cpu") == {"error": "computes 36 where 37 is right"}


def test_a_provider_that_is_only_listed_does_not_count(monkeypatch):
    """ONNX Runtime lists a provider whose library cannot be loaded; only a session of it is proof."""
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    error = answer_probe("provider", "cuda")["error"]
    assert "asked for provider cuda" in error or "cannot load the model on cuda" in error


def test_openvino_runs_the_tiny_model():
    assert "CPU" in run_probe("openvino")["devices"]


def test_torch_says_why_it_sees_no_gpu(monkeypatch):
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    assert answer_probe("torch")["reason"] == "this torch is a CPU build"

    def no_driver():
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that you have a GPU")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    answer = answer_probe("torch")
    assert answer["reason"] == "built for CUDA 13.0, but: Found no NVIDIA driver on your system"
    found = diagnose(["torch"], torch=answer)
    assert row(found, "torch on CUDA").advice == "if there is a GPU, install an NVIDIA driver for CUDA 13.0"


def test_gpus_are_read_through_nvml_and_nothing_is_set(monkeypatch):
    """A double of NVML that knows the calls that read; any other one is an AttributeError, and so an error here."""
    reading = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=24 << 30),
        "nvmlDeviceGetName": lambda handle: b"NVIDIA L4",
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
    }
    real = importlib.import_module("pynvml")
    assert all(hasattr(real, name) for name in reading)
    monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(**reading))
    answer = answer_probe("nvml")
    assert answer["gpus"] == ["NVIDIA L4 (24.0 GiB)"]
    assert answer["driver"] == "580.65.06"
    tree = ast.parse((ROOT / "mcdeploy/doctor.py").read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pynvml"
    }
    assert used == set(reading)


def test_a_probe_that_hangs_crashes_or_fails_is_an_answer(tmp_path, monkeypatch):
    bodies = {
        "hangs": "import time; time.sleep(60)",
        "crashes": "import os; os.abort()",
        "leaves": "import sys; sys.exit('gone')",
        "raises": "raise OSError('no such library')",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    assert run_probe("modules", "hangs", time_limit_s=2) == {"error": "did not answer within 2 s"}
    assert run_probe("modules", "crashes") == {"error": "crashed with signal 6"}
    assert run_probe("modules", "leaves") == {"error": "gone"}
    assert run_probe("modules", "raises") == {"error": "no such library"}
    assert run_probe("modules", "no_such_module") == {"error": "No module named 'no_such_module'"}


def test_a_file_in_the_current_folder_does_not_take_the_place_of_a_package(tmp_path, monkeypatch):
    (tmp_path / "uvicorn.py").write_text("raise RuntimeError('not the server')")
    monkeypatch.chdir(tmp_path)
    assert run_probe("modules", "uvicorn") == {}


# ------------------------------------------------------------------------------------------------------------ machine


def machine(tmp_path, cgroup, files):
    """A root folder with /proc and /sys as far as they matter."""
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_rows_of_the_machine_say_quota_threads_and_memory(tmp_path):
    root = machine(
        tmp_path,
        "0::/\n",
        {"sys/fs/cgroup/cpu.max": "50000 100000", "sys/fs/cgroup/memory.max": str(512 << 20),
         "proc/meminfo": "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n",
         "proc/cpuinfo": "model name\t: Tiny CPU\n"},
    )  # fmt: skip
    found = examine(root=root, packages={}, requirements=[], probe=answers())
    assert available_threads(root) == 1
    cpu, memory = row(found, "CPU"), row(found, "memory")
    assert (cpu.status, memory.status) == ("warn", "warn")
    assert "Tiny CPU" in cpu.found
    assert "the cgroup allows 0.5 CPUs: 1 threads for one inference" in cpu.found
    assert memory.found == "16.0 GiB, 8.0 GiB free, the cgroup allows 0.5 GiB"


def test_a_full_disk_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=1 << 30))
    found = examine(packages={}, requirements=[], probe=answers())
    for name in ("disk, temporary files", "disk, this folder"):
        assert (row(found, name).status, row(found, name).found) == ("warn", "1.0 GiB free")
    assert broken(found) == []


# ------------------------------------------------------------------------------------------------------------ command


def run_doctor(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mcdeploy", "doctor", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as left:
        return left.code or 0
    return 0


@pytest.mark.parametrize("status", ["ok", "no"])
def test_the_command_exits_by_what_is_promised_and_writes_json(tmp_path, monkeypatch, capsys, status):
    rows = (Row("engine", status, "found", "do this", True), Row("elsewhere", "no", "not installed"))
    monkeypatch.setattr(doctor, "examine", lambda: Diagnosis(rows))
    code = run_doctor(monkeypatch, "--json", tmp_path / "d.json")
    said = capsys.readouterr()
    tree = json.loads((tmp_path / "d.json").read_text())
    assert tree["kind"] == "mcdeploy doctor"
    assert [one["name"] for one in tree["rows"]] == ["engine", "elsewhere"]
    assert said.out.splitlines()[:2] == [f"{status:4} engine: found; do this", "no   elsewhere: not installed"]
    if status == "ok":
        assert (code, tree["ok"], said.err) == (0, True, "")
    else:
        assert (code, tree["ok"]) == (1, False)
        assert said.err == "error: installed, but does not work: engine; its row says why\n"


def test_a_result_with_nowhere_to_go_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: pytest.fail("looked at the machine first"))
    assert run_doctor(monkeypatch, "--json", tmp_path / "nowhere" / "d.json") == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_table_is_drawn_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    doctor.print_diagnosis(Diagnosis((Row("engine [a]", "no", "found", promised=True),)))
    out = capsys.readouterr().out
    assert "engine [a]" in out
    assert "\x1b[" in out


def test_it_works_in_a_serving_install_without_torch_and_onnx(tmp_path):
    """A new Python whose packages are this one's without the extra [train]: neither modules nor metadata are there."""
    site = tmp_path / "site"
    site.mkdir()
    gone = ("torch", "timm", "onnx-", "onnx_", "onnxscript", "accelerate", "functorch", "nvidia", "sklearn", "scikit")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        is_editable = "mcdeploy" in entry.name and entry.suffix != ".dist-info"
        if not (entry.name.startswith(gone) or entry.name in ("onnx", "distutils-precedence.pth") or is_editable):
            (site / entry.name).symlink_to(entry)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    environment = {**os.environ, "PYTHONPATH": f"{site}:{ROOT}:{ROOT / 'export'}"}
    done = subprocess.run(
        [str(tmp_path / "venv/bin/python"), "-m", "mcdeploy.cli", "doctor", "--json", str(tmp_path / "d.json")],
        env=environment, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {one["name"]: one for one in json.loads((tmp_path / "d.json").read_text())["rows"]}
    assert rows["torch"]["found"] == "not installed"
    assert rows["extra train"]["status"] == "no"
    assert rows["ONNX Runtime on cpu"]["status"] == "ok"
    assert rows["server"]["status"] == "ok"


def test_doctor_itself_imports_neither_torch_nor_onnx():
    code = "import sys, mcdeploy.doctor; print(sorted({'torch', 'onnx', 'onnxruntime', 'pynvml'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'export'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
