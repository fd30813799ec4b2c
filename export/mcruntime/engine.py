"""One loaded model behind one interface, the same for verify, bench and serve: enter, infer, leave.

Nothing falls back in silence. The provider that was asked for is the provider that runs every node, or entering the
runner is an error that says what to do.
"""

# B = batch, C = channels, H/W = height/width.
from __future__ import annotations

import math
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mcruntime.errors import BackendError, BundleError, InputError, MissingExtraError, ParityError

Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


class Runner(Protocol):
    """A model that is loaded on entering and let go on leaving; ``infer`` may be called from several threads."""

    @property
    def name(self) -> str:
        """What to call it in a table or a message."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [B, num_classes] of prepared images [B, C, H, W].

        Raises:
            InputError: not float32, not the model's shape, or not finite.
            ParityError: an answer that is not finite or not [B, num_classes].
        """

    def facts(self) -> dict[str, str]:
        """What really runs: backend, provider, threads, versions."""


class OnnxRunner:
    """An ONNX file in ONNX Runtime.

    Args:
        path: a model with one input [B, C, H, W] and one output [B, num_classes], both float32.
        provider: "cpu", or "cuda" or "tensorrt" through the execution providers of onnxruntime-gpu.
        threads: of one inference on the CPU; None: ``available_threads()``.
        name: for messages; None: the file name without its suffix.
        spinning: let idle threads burn the CPU while they wait: faster alone, slower beside anything else, so the
            server turns it off.

    Raises:
        InputError: fewer than 1 thread, or an unknown provider.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        provider: Provider = "cpu",
        threads: int | None = None,
        name: str | None = None,
        spinning: bool = True,
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads: expected at least 1, got {threads}")
        if provider not in PROVIDERS:
            raise InputError(f"unknown provider {provider!r}; valid are {', '.join(PROVIDERS)}")
        self._path = Path(path)
        self._provider = provider
        self._threads = threads or available_threads()
        self._name = name or self._path.stem
        self._spinning = spinning
        self._session: Any = None
        self._input_name = self._output_name = ""
        self._shape: tuple[int | None, ...] = ()  # [B, C, H, W]; None where the model takes any size

    @property
    def name(self) -> str:
        return self._name

    def __enter__(self) -> Self:
        """Load the model.

        Raises:
            MissingExtraError: onnxruntime is not installed.
            BackendError: the provider is not there, or cannot run every node; or the model's inputs and outputs are
                not an image classifier's.
            BundleError: no such file, or not a model that ONNX Runtime can read.
        """
        session = self._make_session()
        wanted, used = PROVIDERS[self._provider], list(session.get_providers())
        if used[0] != wanted:
            raise BackendError(
                f"{self._name}: asked for provider {self._provider}, but ONNX Runtime loaded {used[0]}; "
                "install the driver and CUDA libraries that this onnxruntime-gpu needs, or ask for cpu"
            )
        self._input_name, self._shape = self._only("input", session.get_inputs(), 4)
        self._output_name, _ = self._only("output", session.get_outputs(), 2)
        self._session = session
        return self

    def __exit__(self, *exc: object) -> None:
        self._session = None

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        self._check_images(images)
        logits = self._run(np.ascontiguousarray(images))
        if logits.ndim != 2 or len(logits) != len(images):
            raise ParityError(f"{self._name}: expected logits [{len(images)}, classes], got {list(logits.shape)}")
        if not np.isfinite(logits).all():
            raise ParityError(f"{self._name}: an output is NaN or infinite for finite images; export the model again")
        return logits

    def facts(self) -> dict[str, str]:
        import onnxruntime

        if self._session is None:
            raise RuntimeError("enter the runner before asking what runs")
        return {
            "backend": "onnxruntime",
            "provider": next(short for short, long in PROVIDERS.items() if long == self._session.get_providers()[0]),
            "threads": str(self._threads),
            "spinning": "on" if self._spinning else "off",
            "onnxruntime": str(onnxruntime.__version__),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        }

    def _make_session(self) -> Any:
        try:
            import onnxruntime
        except ImportError:
            extra = "cpu" if self._provider == "cpu" else "gpu"
            raise MissingExtraError("running an ONNX model", "onnxruntime", extra) from None
        wanted = PROVIDERS[self._provider]
        if wanted not in onnxruntime.get_available_providers():
            raise BackendError(
                f"{self._name}: asked for provider {self._provider}, which this onnxruntime was built without; "
                "install 'mcdeploy[gpu]' in place of 'mcdeploy[cpu]', or ask for cpu"
            )
        if not self._path.is_file():
            raise BundleError(f"{self._path}: no such model file; give the path of an .onnx file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # fatal: errors reach the user as sentences of ours
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self._spinning)))
        if self._provider != "cpu":
            # With this, a node that the provider cannot run is an error. It forbids naming the CPU as second choice.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            session = onnxruntime.InferenceSession(str(self._path), options, providers=[wanted], enable_fallback=0)
        except Exception as error:  # onnxruntime's errors share no base class but this
            kind = BundleError if self._provider == "cpu" else BackendError
            raise kind(
                f"{self._path}: ONNX Runtime cannot load the model on {self._provider} ({_reason(error)}); "
                "export it again" + ("" if self._provider == "cpu" else " or ask for cpu")
            ) from error
        session.disable_fallback()
        return session

    def _only(self, what: str, tensors: list[Any], num_axes: int) -> tuple[str, tuple[int | None, ...]]:
        """Name and shape of the model's only float32 input or output."""
        found = ", ".join(f"{tensor.name}: {tensor.type} {list(tensor.shape)}" for tensor in tensors)
        if len(tensors) != 1 or tensors[0].type != "tensor(float)" or len(tensors[0].shape) != num_axes:
            raise BackendError(
                f"{self._path}: expected one float32 {what} with {num_axes} axes, found {found or 'none'}; "
                "export an image classifier"
            )
        return tensors[0].name, tuple(size if isinstance(size, int) else None for size in tensors[0].shape)

    def _check_images(self, images: NDArray[np.float32]) -> None:
        if self._session is None:
            raise RuntimeError("enter the runner before infer")
        if not isinstance(images, np.ndarray) or images.dtype != np.float32:
            kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
            raise InputError(f"{self._name}: expected float32 images, got {kind}")
        fits = images.ndim == 4 and all(
            want in (None, got) for want, got in zip(self._shape, images.shape, strict=True)
        )
        if not fits or len(images) == 0:
            expected = ", ".join(str(size or axis) for size, axis in zip(self._shape, "BCHW", strict=True))
            raise InputError(f"{self._name}: expected images [{expected}], got {list(images.shape)}")
        if not np.isfinite(images).all():
            raise InputError(f"{self._name}: the images hold NaN or infinite values; send finite pixels")

    def _run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """The one call into the session; device-bound buffers (IOBinding) would go here."""
        try:
            logits: NDArray[np.float32] = self._session.run([self._output_name], {self._input_name: images})[0]
        except Exception as error:  # see _make_session
            raise BackendError(
                f"{self._name}: ONNX Runtime stopped at batch {len(images)} ({_reason(error)})"
            ) from error
        return logits


def available_threads(root: Path = Path("/")) -> int:
    """Physical cores this process may use, at least 1: its CPU affinity, and no more than its cgroup's CPU quota.

    Args:
        root: where /proc and /sys are found.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {
        _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed
    }
    quotas = [quota for folder in _cgroup_folders(root) if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([len(cores), *(math.floor(quota) for quota in quotas)]))


def _cgroup_folders(root: Path) -> list[Path]:
    """This process's CPU cgroup and those above it; a container may see its own as the top one."""
    folders = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "cpu" in controllers.split(","):  # version 2, or version 1's cpu controller
            top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
            own = top / path.lstrip("/")
            folders += [own, *(parent for parent in own.parents if parent.is_relative_to(top))]
    return folders


def _cpu_quota(folder: Path) -> float | None:
    """CPUs a cgroup may use at a time; None: no limit. Version 2 writes one file, version 1 two."""
    quota, _, period = (_read(folder / "cpu.max") or "").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us") or "", _read(folder / "cpu.cfs_period_us") or ""
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _reason(error: Exception) -> str:
    """ONNX Runtime's own words without its tags, on one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])[:200].rstrip(" .")
