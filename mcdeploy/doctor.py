"""Doctor: what can run on this machine, and why the rest cannot.

Nothing is trusted that can be tried: a provider counts when a tiny model ran on it. What may hang or crash (torch,
CUDA, drivers) is tried in a process of its own with a time limit. Nothing on the machine is changed, and neither torch
nor onnx is needed, so that a serving image can be asked as well.
"""

from __future__ import annotations

import base64
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mcruntime.cgroup import ROOT, cpu_quota, memory_limit, read_text

from mcdeploy.surroundings import describe_machine

TIME_LIMIT_S = 60.0  # of one probe
LOW_DISK_BYTES, LOW_MEMORY_BYTES = 2 << 30, 1 << 30
EXTRAS = ("train", "cpu", "gpu", "openvino", "sign", "serve", "grpc", "trace")
SERVER_MODULES = (
    "uvicorn",
    "uvloop",
    "httptools",
    "orjson",
    "starlette.applications",
    "python_multipart",
    "prometheus_client",
)
GRPC_MODULES = ("grpc", "grpc_health.v1", "grpc_reflection.v1alpha", "google.protobuf")
TRACE_MODULES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
SIGN_MODULES = ("cryptography.hazmat.primitives.asymmetric.ed25519",)
# What it is called, the package that tells whether its extra is there, the extra, and what must load.
MODULES = (
    ("server", "uvicorn", "serve", SERVER_MODULES),
    ("gRPC", "grpcio-reflection", "grpc", GRPC_MODULES),
    ("traces", "opentelemetry-exporter-otlp-proto-http", "trace", TRACE_MODULES),
    ("signatures", "cryptography", "sign", SIGN_MODULES),
)
# Conv of ones [1, 1, 3, 3], Flatten: images [b, 1, 3, 3] to logits [b, 1], their sums. As bytes, since a serving image
# has no package onnx to make it with; a test makes it again.
TINY_MODEL = base64.b64decode(
    "CAo6pgEKFgoGaW1hZ2VzCgF3EgNzdW0iBENvbnYKFgoDc3VtEgZsb2dpdHMiB0ZsYXR0ZW4SAWcqMwgBCAEIAwgDEAFCAXdKJAAAgD8AAIA/AA"
    "CAPwAAgD8AAIA/AACAPwAAgD8AAIA/AACAP1ohCgZpbWFnZXMSFwoVCAESEQoDEgFiCgIIAQoCCAMKAggDYhkKBmxvZ2l0cxIPCg0IARIJCgMS"
    "AWIKAggBQgQKABAU"
)
TINY_SUM = 36.0  # of the pixels 0, 1, ..., 8

Status = Literal["ok", "no", "warn"]
Answer = dict[str, Any]  # of a probe; {"error": sentence} where it failed
Probe = Callable[..., Answer]


@dataclass(frozen=True)
class Row:
    """One thing that was looked at."""

    name: str
    status: Status
    found: str
    advice: str = ""  # what to do, where there is something to do
    promised: bool = False  # an installed package is there for this: a "no" is a failure

    @property
    def sentence(self) -> str:
        return f"{self.found}; {self.advice}" if self.advice else self.found


@dataclass(frozen=True)
class Diagnosis:
    """All rows."""

    rows: tuple[Row, ...]

    @property
    def broken(self) -> tuple[Row, ...]:
        """What an installed package promises and this machine does not keep."""
        return tuple(row for row in self.rows if row.promised and row.status == "no")

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        rows = [asdict(row) for row in self.rows]
        return {"kind": "mcdeploy doctor", "version": 1, "ok": not self.broken, "rows": rows}

    def summary(self) -> str:
        """One line."""
        if self.broken:
            return f"installed, but does not work: {', '.join(row.name for row in self.broken)}; its row says why"
        return "everything that the installed packages are for works"


def examine(
    *,
    root: Path = ROOT,
    packages: Mapping[str, str] | None = None,
    requirements: Iterable[str] | None = None,
    probe: Probe | None = None,
) -> Diagnosis:
    """Look at this machine.

    Args:
        root: where /proc and /sys are found.
        packages: installed packages and their versions; default: as they are.
        requirements: of mcdeploy, as its package metadata has them; default: as they are.
        probe: runs ``PROBES[name](*arguments)``; default: in a process of its own, with a time limit.
    """
    packages = installed_packages() if packages is None else packages
    needed = read_extras(_requirements() if requirements is None else requirements)
    run = probe or run_probe
    questions = _questions(packages)
    with ThreadPoolExecutor(max_workers=2) as pool:
        answers = dict(zip(questions, pool.map(lambda words: run(*words), questions), strict=True))
    return Diagnosis(
        (
            *_about_python(packages),
            *_about_extras(needed, packages),
            *_about_torch(packages, answers),
            *_about_onnx_runtime(packages, answers),
            *_about_tensorrt(packages, answers),
            *_about_gpu(packages, answers),
            *_about_others(packages, answers),
            *_about_machine(root),
        )
    )


def installed_packages() -> dict[str, str]:
    """Every installed package, by its name in lower case with "-"."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(_plain(name), distribution.version)
    return found


def read_extras(requirements: Iterable[str]) -> dict[str, dict[str, str]]:
    """Extra to package to its least version, from lines such as ``torch>=2.9; extra == 'train'``."""
    found: dict[str, dict[str, str]] = {}
    for line in requirements:
        match = re.match(
            r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*(?:>=\s*([0-9.]+))?.*;.*extra\s*==\s*['\"](\w+)['\"]", line
        )
        if match and match[3] in EXTRAS:
            found.setdefault(match[3], {})[_plain(match[1])] = match[2] or "0"
    return found


def run_probe(name: str, *arguments: str, time_limit_s: float = TIME_LIMIT_S) -> Answer:
    """Run ``PROBES[name]`` in a process of its own; a crash or a hang becomes an answer too."""
    command = [sys.executable, "-P", "-m", "mcdeploy.doctor", name, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=time_limit_s
        )
    except subprocess.TimeoutExpired:
        return {"error": f"did not answer within {time_limit_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        answer: Answer = json.loads(lines[-1])  # libraries may print as well; ours is the last line
        return answer
    if done.returncode < 0:
        return {"error": f"crashed with signal {-done.returncode}"}
    return {"error": (done.stderr.strip().splitlines() or ["ended without an answer"])[-1][:300]}


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """A table on a terminal, plain lines elsewhere."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        for row in diagnosis.rows:
            print(f"{row.status:4} {row.name}: {row.sentence}")
        return
    table = Table(show_header=False, box=None, padding=(0, 1))
    for row in diagnosis.rows:
        colour = {"ok": "green", "warn": "yellow", "no": "bold red" if row.promised else "dim"}[row.status]
        table.add_row(Text(row.status, style=colour), Text(row.name), Text(row.sentence))
    console.print(table)


# ------------------------------------------------------------------------------------------------- from answers to rows


def _questions(packages: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The probes that this machine's packages call for, the slowest first."""
    asked: list[tuple[str, ...]] = []
    if "torch" in packages:
        asked.append(("torch",))
    if "openvino" in packages:
        asked.append(("openvino",))
    if _onnx_runtimes(packages):
        asked += [("provider", "cpu"), ("provider", "cuda"), ("provider", "tensorrt"), ("mismatch",)]
    if _tensorrts(packages):
        asked.append(("tensorrt",))
    if "nvidia-ml-py" in packages:
        asked.append(("nvml",))
    asked += [("modules", *modules) for _, package, _, modules in MODULES if package in packages]
    return [*asked, ("cudnn",)]


def _about_python(packages: Mapping[str, str]) -> list[Row]:
    version, system = platform.python_version(), f"{platform.system()} {platform.machine()}"
    fits = sys.version_info >= (3, 11)
    rows = [Row("Python", "ok" if fits else "no", f"{version} on {system}", "" if fits else "use 3.11 or newer", True)]
    ours = packages.get("mcdeploy")
    if ours is None:
        found = "runs from a folder, without being installed, so its extras are unknown"
        return [*rows, Row("mcdeploy", "warn", found, "install it with: pip install -e FOLDER")]
    return [*rows, Row("mcdeploy", "ok", ours, promised=True)]


def _about_extras(needed: Mapping[str, Mapping[str, str]], packages: Mapping[str, str]) -> list[Row]:
    rows = []
    for extra in EXTRAS:
        if extra not in needed:
            continue
        lacking = _lacking(needed[extra], packages)
        install = f"pip install 'mcdeploy[{extra}]'"
        if not lacking:
            rows.append(Row(f"extra {extra}", "ok", "all of its packages are installed"))
        elif extra == "cpu" and "onnxruntime-gpu" in packages:
            rows.append(Row("extra cpu", "ok", "onnxruntime-gpu takes its place"))
        elif extra == "gpu" and "onnxruntime" in packages and "onnxruntime-gpu" not in packages:
            first = "pip uninstall onnxruntime, which must not be beside onnxruntime-gpu, and then "
            rows.append(
                Row("extra gpu", "no", f"lacks {', '.join(lacking)}", f"to run on an NVIDIA GPU: {first}{install}")
            )
        else:
            rows.append(Row(f"extra {extra}", "no", f"lacks {', '.join(lacking)}", f"if you want it: {install}"))
    return rows


def _about_torch(packages: Mapping[str, str], answers: Mapping[tuple[str, ...], Answer]) -> list[Row]:
    if "torch" not in packages:
        return [Row("torch", "no", "not installed", "training and compiling need it: pip install 'mcdeploy[train]'")]
    answer = answers[("torch",)]
    if "error" in answer:
        return [Row("torch", "no", f"does not load ({answer['error']})", "install it again", True)]
    rows = [Row("torch", "ok", f"{answer['version']}", promised=True)]
    if answer["gpus"]:
        return [*rows, Row("torch on CUDA", "ok", f"CUDA {answer['cuda']}: {', '.join(answer['gpus'])}")]
    cure = f"install an NVIDIA driver for CUDA {answer['cuda']}" if answer["cuda"] else "install a CUDA build of torch"
    return [*rows, Row("torch on CUDA", "no", answer["reason"], f"if there is a GPU, {cure}")]


def _about_onnx_runtime(packages: Mapping[str, str], answers: Mapping[tuple[str, ...], Answer]) -> list[Row]:
    runtimes = _onnx_runtimes(packages)
    if not runtimes:
        found = "not installed"
        return [Row("ONNX Runtime", "no", found, "serving and checking need it: pip install 'mcdeploy[cpu]'")]
    said = " and ".join(f"{name} {packages[name]}" for name in runtimes)
    rows = [Row("ONNX Runtime", "ok", said, promised=True)]
    if len(runtimes) > 1:
        advice = "pip uninstall onnxruntime onnxruntime-gpu, and install the one you want again"
        rows = [Row("ONNX Runtime", "no", f"{said} overwrite each other's files", advice, True)]
    has_gpu = "onnxruntime-gpu" in packages
    promised = {"cpu": True, "cuda": has_gpu, "tensorrt": has_gpu and bool(_tensorrts(packages))}
    for word, is_promised in promised.items():
        answer = answers[("provider", word)]
        name = f"ONNX Runtime on {word}"
        if "error" in answer:
            rows.append(Row(name, "no", answer["error"].removeprefix("a tiny model: "), promised=is_promised))
        else:
            rows.append(Row(name, "ok", "ran a tiny model, every node on this provider", promised=is_promised))
    return rows


def _about_tensorrt(packages: Mapping[str, str], answers: Mapping[tuple[str, ...], Answer]) -> list[Row]:
    found = _tensorrts(packages)
    if not found:
        return [Row("TensorRT", "no", "not installed", "for engines, on an NVIDIA GPU: pip install 'mcdeploy[gpu]'")]
    answer = answers[("tensorrt",)]
    if "error" in answer:
        return [Row("TensorRT", "no", answer["error"], promised=True)]
    rows = [Row("TensorRT", "ok", f"{answer['version']}, its libraries load", promised=True)]
    mismatch = answers.get(("mismatch",), {"mismatch": None})
    if problem := mismatch.get("mismatch") or mismatch.get("error"):
        rows.append(Row("TensorRT for ONNX Runtime", "no", problem, promised="onnxruntime-gpu" in packages))
    return rows


def _about_gpu(packages: Mapping[str, str], answers: Mapping[tuple[str, ...], Answer]) -> list[Row]:
    is_wanted = "onnxruntime-gpu" in packages
    cudnn = answers[("cudnn",)]
    library = (
        Row(
            "cuDNN",
            "no",
            cudnn["error"],
            "ONNX Runtime on cuda needs cuDNN 9: pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )
        if "error" in cudnn
        else Row("cuDNN", "ok", f"{cudnn['version']} ({cudnn['from']})")
    )
    if "nvidia-ml-py" not in packages:
        how = "to see GPUs, their driver and clocks: pip install nvidia-ml-py"
        return [library, Row("GPU", "no", "not looked for: nvidia-ml-py is not installed", how)]
    answer = answers[("nvml",)]
    if "error" in answer or not answer["gpus"]:
        found = f"NVML finds none ({answer.get('error', 'it counts 0')})"
        gpu = Row("GPU", "no", found, "install the NVIDIA driver, if there is a GPU", is_wanted)
        return [library, gpu, Row("GPU clocks", "no", "no GPU whose clocks could be locked")]
    gpu = Row("GPU", "ok", f"{', '.join(answer['gpus'])}, driver {answer['driver']}", promised=is_wanted)
    if answer["is_root"]:
        found = "may probably be locked, as root may; not tried, since that would change them"
        return [library, gpu, Row("GPU clocks", "ok", found)]
    advice = "run bench as root, or let the administrator lock them with nvidia-smi -lgc; else they float"
    return [library, gpu, Row("GPU clocks", "warn", "only root may lock them", advice)]


def _about_others(packages: Mapping[str, str], answers: Mapping[tuple[str, ...], Answer]) -> list[Row]:
    rows = []
    if "openvino" in packages:
        answer = answers[("openvino",)]
        if "error" in answer:
            found = f"does not run ({answer['error']})"
            rows.append(Row("OpenVINO", "no", found, "install it again: pip install 'mcdeploy[openvino]'", True))
        else:
            found = f"{packages['openvino']} ran a tiny model on CPU; devices: {', '.join(answer['devices'])}"
            rows.append(Row("OpenVINO", "ok", found, promised=True))
    for name, package, extra, modules in MODULES:
        if package not in packages:
            continue
        error = answers[("modules", *modules)].get("error")
        found = "does not load: " + str(error) if error else "loads"
        advice = f"pip install 'mcdeploy[{extra}]'" if error else ""
        rows.append(Row(name, "no" if error else "ok", found, advice, True))
    return rows


def _about_machine(root: Path) -> list[Row]:
    machine = describe_machine(root)
    threads, cores = machine["cores usable"], machine["cores"]
    quota = cpu_quota(root)
    held = f"the cgroup allows {quota:g} CPUs" if quota is not None else "no cgroup limit on CPU time"
    cpu = Row("CPU", "ok", f"{machine['cpu']}, {cores} CPUs, {held}: {threads} threads for one inference")
    if quota is not None and quota < 1:
        cpu = Row("CPU", "warn", cpu.found, "with less than one CPU, latencies jump when the quota is used up")
    return [cpu, _about_memory(root), *_about_disks()]


def _about_memory(root: Path) -> Row:
    sizes = {
        key: int(value.split()[0]) << 10
        for key, _, value in (line.partition(":") for line in (read_text(root / "proc/meminfo") or "").splitlines())
        if key in ("MemTotal", "MemAvailable")
    }
    limit = memory_limit(root)
    if "MemTotal" not in sizes:
        return Row("memory", "warn", "/proc/meminfo says nothing")
    held = f"the cgroup allows {_size(limit)}" if limit is not None else "no cgroup limit"
    free = sizes.get("MemAvailable", sizes["MemTotal"])
    found = f"{_size(sizes['MemTotal'])}, {_size(free)} free, {held}"
    is_low = min(free, limit or free) < LOW_MEMORY_BYTES
    return Row("memory", "warn" if is_low else "ok", found, "training needs more" if is_low else "")


def _about_disks() -> list[Row]:
    rows = []
    for name, folder in (("disk, temporary files", tempfile.gettempdir()), ("disk, this folder", os.getcwd())):
        free = shutil.disk_usage(folder).free
        is_low = free < LOW_DISK_BYTES
        rows.append(Row(name, "warn" if is_low else "ok", f"{_size(free)} free", "make room" if is_low else ""))
    return rows


# ------------------------------------------------------------------------------------------------ probes, one a process


def _probe_torch() -> Answer:
    import torch

    answer: Answer = {"version": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "reason": ""}
    if torch.version.cuda is None:
        return answer | {"reason": "this torch is a CPU build"}
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
        return answer | {"gpus": [torch.cuda.get_device_name(i) for i in range(count)], "reason": "CUDA counts no GPU"}
    except Exception as error:  # torch raises RuntimeError, AssertionError and its own, all of them with a sentence
        return answer | {"reason": f"built for CUDA {torch.version.cuda}, but: {str(error).split('. ')[0].strip()}"}


def _probe_provider(word: Literal["cpu", "cuda", "tensorrt"]) -> Answer:
    """Through the runner that serves, which refuses a node on another provider."""
    import numpy as np
    from mcruntime.engine import OnnxRunner

    pixels = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.onnx"
        path.write_bytes(TINY_MODEL)
        runner = OnnxRunner(path, provider=word, threads=1, name="a tiny model", cache=Path(folder) / "engines")
        with runner:
            total = float(runner.infer(pixels)[0, 0])
    return {} if abs(total - TINY_SUM) < 1e-3 else {"error": f"computes {total:g} where {TINY_SUM:g} is right"}


def _probe_mismatch() -> Answer:
    from mcruntime.gpu import tensorrt_mismatch

    return {"mismatch": tensorrt_mismatch()}


def _probe_tensorrt() -> Answer:
    from mcruntime.gpu import load_tensorrt

    return {"version": str(load_tensorrt().__version__)}


def _probe_cudnn() -> Answer:
    import ctypes

    packaged = [path for folder in _package_folders("nvidia") for path in Path(folder).glob("cudnn/lib/libcudnn.so.?")]
    for place in (*map(str, packaged), "libcudnn.so.9", "libcudnn.so.8"):
        try:
            library = ctypes.CDLL(place)
        except OSError:
            continue
        library.cudnnGetVersion.restype = ctypes.c_size_t
        number = int(library.cudnnGetVersion())
        unit = 10_000 if number >= 90_000 else 1_000  # 9.24.0 is 92400, 8.9.7 is 8907
        version = f"{number // unit}.{number % unit // 100}.{number % 100}"
        return {"version": version, "from": "a Python package" if "/" in place else "the system"}
    return {"error": "not found, neither among the Python packages nor on the system"}


def _probe_openvino() -> Answer:
    import numpy as np
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(TINY_MODEL), "CPU")
    total = float(compiled(np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3))[0][0, 0])
    if abs(total - TINY_SUM) > 1e-3:
        return {"error": f"computes {total:g} where {TINY_SUM:g} is right"}
    return {"devices": [str(device) for device in core.available_devices]}


def _probe_nvml() -> Answer:
    """Reads only: no call of NVML that sets something is in this file."""
    import pynvml

    pynvml.nvmlInit()
    try:
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total
            gpus.append(f"{_text(pynvml.nvmlDeviceGetName(handle))} ({_size(memory)})")
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()
    return {"gpus": gpus, "driver": driver, "is_root": hasattr(os, "geteuid") and os.geteuid() == 0}


def _probe_modules(*names: str) -> Answer:
    for name in names:
        importlib.import_module(name)
    return {}


PROBES: dict[str, Probe] = {
    "torch": _probe_torch,
    "provider": _probe_provider,
    "mismatch": _probe_mismatch,
    "tensorrt": _probe_tensorrt,
    "cudnn": _probe_cudnn,
    "openvino": _probe_openvino,
    "nvml": _probe_nvml,
    "modules": _probe_modules,
}


def answer_probe(name: str, *arguments: str) -> Answer:
    """Run a probe here; whatever it raises is its answer."""
    try:
        return PROBES[name](*arguments)
    except Exception as error:  # the point of a probe: find out what fails, and say it in its own words
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return {"error": lines[0][:400]}


# -------------------------------------------------------------------------------------------------------- small change


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("mcdeploy") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _lacking(needed: Mapping[str, str], packages: Mapping[str, str]) -> list[str]:
    found = []
    for name, least in needed.items():
        have = packages.get(name)
        if name == "tensorrt" and have is None:
            have = next((packages[other] for other in _tensorrts(packages)), None)
        if have is None:
            found.append(name)
        elif _numbers(have) < _numbers(least):
            found.append(f"{name} {least} or newer (found {have})")
    return found


def _onnx_runtimes(packages: Mapping[str, str]) -> list[str]:
    return [name for name in ("onnxruntime", "onnxruntime-gpu") if name in packages]


def _tensorrts(packages: Mapping[str, str]) -> list[str]:
    return [name for name in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12") if name in packages]


def _package_folders(name: str) -> list[str]:
    spec = importlib.util.find_spec(name)
    return list(spec.submodule_search_locations or []) if spec is not None else []


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):,.1f} GiB"


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value


if __name__ == "__main__":
    print(json.dumps(answer_probe(*sys.argv[1:])))
