"""What the GPU side of this machine has: the device, TensorRT, and whether the installed packages fit together.

Written against the published names of TensorRT, cuda-python and NVML. ``describe_device`` ran on an H100, the rest
never on a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mcruntime.errors import BackendError, MissingExtraError

OLDEST_TENSORRT, FIRST_UNKNOWN_TENSORRT = (10, 12), (12, 0)
TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
PROVIDER_LIBRARY = "libonnxruntime_providers_tensorrt.so"


@dataclass(frozen=True)
class Device:
    """One GPU and its driver, as a TensorRT engine depends on them."""

    index: int
    name: str  # such as "NVIDIA L4"
    compute_capability: str  # such as "8.9"
    driver: str  # such as "580.65.06 (CUDA 13.0)"; without NVML only what CUDA says: "CUDA 13.0"


def load_cudart() -> Any:
    """The CUDA runtime of cuda-python.

    Raises:
        MissingExtraError: cuda-python is not installed.
    """
    try:
        from cuda.bindings import runtime as cudart
    except ImportError:
        raise MissingExtraError("running on a GPU", "cuda-python", "gpu") from None
    return cudart


def load_tensorrt() -> Any:
    """TensorRT's Python module, of a version that this code was written for.

    Raises:
        MissingExtraError: tensorrt is not installed.
        BackendError: its libraries do not load, or it is older than 10.12 or newer than 11.x.
    """
    try:
        import tensorrt as trt
    except ModuleNotFoundError:
        raise MissingExtraError("a TensorRT engine", "tensorrt", "gpu") from None
    except (ImportError, OSError) as error:
        raise BackendError(
            f"TensorRT is installed, but does not load ({error}); install its libraries with: "
            "pip install 'mcdeploy[gpu]'"
        ) from error
    version = parse_version(trt.__version__)
    if version[:2] < OLDEST_TENSORRT:
        raise BackendError(
            f"TensorRT {trt.__version__} is too old: the networks here are strongly typed, which needs 10.12 or newer; "
            "install tensorrt>=10.12"
        )
    if version[:2] >= FIRST_UNKNOWN_TENSORRT:
        raise BackendError(
            f"TensorRT {trt.__version__} is newer than 11.x, the last that mcdeploy was written for; "
            "install 'tensorrt<12', or a newer mcdeploy"
        )
    return trt


def parse_version(text: str) -> tuple[int, ...]:
    """The numbers of a version such as 11.4.0.106."""
    return tuple(int(part) for part in re.findall(r"\d+", text))


def checked(cudart: Any, result: tuple[Any, ...], what: str) -> Any:
    """What a CUDA call returned beside its error code: nothing, one value, or a tuple.

    Args:
        result: as cuda-python returns it, the error code first.
        what: what was tried, in words.

    Raises:
        BackendError: the code is not success; with CUDA's own name and words for it.
    """
    code, *values = result
    if code != cudart.cudaError_t.cudaSuccess:
        name, words = (_text(cudart.cudaGetErrorName(code)[1]), _text(cudart.cudaGetErrorString(code)[1]))
        raise BackendError(f"CUDA could not {what} ({name}: {words}); 'nvidia-smi' shows the state of the GPU")
    return values[0] if len(values) == 1 else tuple(values) or None


def describe_device(index: int = 0) -> Device:
    """The GPU of this number.

    Raises:
        MissingExtraError: cuda-python is not installed.
        BackendError: no usable GPU, or none with this number.
    """
    cudart = load_cudart()
    code, count = cudart.cudaGetDeviceCount()
    if code != cudart.cudaError_t.cudaSuccess or count == 0:
        why = _text(cudart.cudaGetErrorString(code)[1]) if code != cudart.cudaError_t.cudaSuccess else "it counts none"
        raise BackendError(f"CUDA finds no usable NVIDIA GPU ({why}); install a driver, or ask for a CPU backend")
    if not 0 <= index < count:
        raise BackendError(f"GPU {index}: this machine has {count}; give a number from 0 to {count - 1}")
    properties = checked(cudart, cudart.cudaGetDeviceProperties(index), f"read the properties of GPU {index}")
    newest = checked(cudart, cudart.cudaDriverGetVersion(), "read the driver's version")
    cuda = f"CUDA {newest // 1000}.{newest % 1000 // 10}"
    driver = _nvml_driver()
    return Device(
        index,
        _text(properties.name).rstrip("\0"),
        f"{properties.major}.{properties.minor}",
        f"{driver} ({cuda})" if driver else cuda,
    )


def content_sha256(path: Path) -> str:
    """Hash of an ONNX model: the file and all external data that it names and has, in the order of the names."""
    model = path.read_bytes()
    digest = hashlib.sha256(hashlib.sha256(model).digest())
    for location in sorted(_external_locations(model)):
        data = path.parent / location
        if data.is_file():  # else whoever reads the model refuses it, or it was no external data
            with data.open("rb") as file:
                digest.update(location.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def cache_folder(kind: str) -> Path:
    """Where built engines are kept: $XDG_CACHE_HOME/mcdeploy/KIND, or ~/.cache/mcdeploy/KIND."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mcdeploy" / kind


def installed_versions() -> dict[str, str]:
    """Installed packages that decide which TensorRT runs, with their versions."""
    found = {}
    for name in (*TENSORRT_PACKAGES, "onnxruntime-gpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def tensorrt_mismatch(versions: Mapping[str, str] | None = None, provider_library: Path | None = None) -> str | None:
    """Why ONNX Runtime's TensorRT provider cannot load the TensorRT that is installed, or None where nothing is wrong.

    The provider is linked against one major version of TensorRT; ``pip install tensorrt`` may bring the next one. Then
    the provider is listed as available, does not load, and the session goes on without it.

    Args:
        versions: installed packages; default: ``installed_versions()``.
        provider_library: the provider's library; default: the one inside the installed onnxruntime.
    """
    versions = installed_versions() if versions is None else versions
    linked = _linked_tensorrt(_provider_library() if provider_library is None else provider_library)
    packages = {name: version for name, version in versions.items() if name in TENSORRT_PACKAGES}
    if linked is None or not packages or any(parse_version(version)[0] == linked for version in packages.values()):
        return None
    installed = ", ".join(f"{name} {version}" for name, version in packages.items())
    runtime = f"onnxruntime-gpu {versions['onnxruntime-gpu']}" if "onnxruntime-gpu" in versions else "onnxruntime"
    package = "tensorrt-cu12" if set(packages) == {"tensorrt-cu12"} else "tensorrt-cu13"
    return (
        f"the TensorRT provider of {runtime} is linked against TensorRT {linked} (libnvinfer.so.{linked}), but "
        f"{installed} is installed; for the provider install '{package}=={linked}.*', which native engines can use too "
        "once they are built again"
    )


def _linked_tensorrt(library: Path | None) -> int | None:
    """The major version of libnvinfer that a library names; None when there is no such library or no such name."""
    if library is None or not library.is_file():
        return None
    found = re.search(rb"libnvinfer\.so\.(\d+)", library.read_bytes())
    return int(found[1]) if found else None


def _provider_library() -> Path | None:
    found = importlib.util.find_spec("onnxruntime")
    return None if found is None or found.origin is None else Path(found.origin).parent / "capi" / PROVIDER_LIBRARY


def _external_locations(model: bytes) -> set[str]:
    """External data files that a model names, relative to it.

    Read off the bytes, since onnx is not at hand where models are served: an entry of ``external_data`` is a protobuf
    message with key "location" in field 1 and the name in field 2, and writers put field 1 first.
    """
    found = set()
    for match in re.finditer(rb"\x0a\x08location\x12", model):
        length = shift = 0
        position = match.end()
        while position < len(model):  # a varint: seven bits a byte, lowest first
            byte = model[position]
            length |= (byte & 0x7F) << shift
            position, shift = position + 1, shift + 7
            if byte < 0x80:
                break
        found.add(model[position : position + length].decode("utf-8", errors="replace"))
    return found


def _nvml_driver() -> str | None:
    """The driver's own version, or None where NVML does not answer, as on embedded boards."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        try:
            return _text(pynvml.nvmlSystemGetDriverVersion())
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError, OSError):
        return None


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else value


def floats_at(address: int, count: int) -> NDArray[np.float32]:
    """A float32 array over memory that somebody else owns, such as pinned host memory."""
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))
