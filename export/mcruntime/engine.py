"""One loaded model behind one interface, the same for verify, bench and serve: enter, infer, leave.

Nothing falls back in silence. The provider that was asked for is the provider that runs every node, or entering the
runner is an error that says what to do.
"""

# B = batch, C = channels, H/W = height/width.
from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mcruntime.cgroup import available_threads
from mcruntime.errors import BackendError, BundleError, InputError, MissingExtraError, ParityError
from mcruntime.gpu import cache_folder, content_sha256, describe_device, installed_versions, tensorrt_mismatch

Provider = Literal["cpu", "cuda", "tensorrt"]
Types = Literal["fp32", "fp16", "int8"]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
# TensorRT behind ONNX Runtime is not strongly typed: it uses a lower type only where an option permits it.
TENSORRT_TYPES: dict[Types, dict[str, str]] = {
    "fp32": {}, "fp16": {"trt_fp16_enable": "1"}, "int8": {"trt_int8_enable": "1"},
}  # fmt: skip
Batches = tuple[int, int, int]  # the smallest, the one to tune for, the largest
DEFAULT_BATCHES: Batches = (1, 8, 32)


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

    The GPU providers are written against ONNX Runtime's documented options and have never run on a GPU.

    Args:
        path: a model with one input [B, C, H, W] and one output [B, num_classes], both float32; files of external data
            lie beside it.
        provider: "cpu", or "cuda" or "tensorrt" through the execution providers of onnxruntime-gpu.
        threads: of one inference on the CPU; None: ``available_threads()``.
        name: for messages; None: the file name without its suffix.
        spinning: let idle threads burn the CPU while they wait: faster alone, slower beside anything else, so the
            server turns it off.
        batches: with "tensorrt", the batch sizes that its engine is built for; others are refused, since ONNX Runtime
            would build a new engine in the middle of an inference.
        types: with "tensorrt", the lowest type of the file, which the provider must be allowed to use; without it an
            fp16 file runs in fp32, and an int8 file does not load. The provider may still choose a higher type for a
            layer, and does not tell. Has never run. The other providers take the types of the file.
        cache: with "tensorrt", where engines are kept; None: ``cache_folder("onnxruntime-tensorrt")``. Every model gets
            a folder of its own there, since ONNX Runtime's key ignores the weights
            (https://github.com/microsoft/onnxruntime/issues/6455).
        finite: refuse images and logits that are NaN or infinite; off: hand them on, as a server does that has looked
            at the images when they came.

    Raises:
        InputError: fewer than 1 thread, an unknown provider or type, batches that are not 1 <= min <= opt <= max.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        provider: Provider = "cpu",
        threads: int | None = None,
        name: str | None = None,
        spinning: bool = True,
        batches: Batches = DEFAULT_BATCHES,
        types: Types = "fp32",
        cache: Path | None = None,
        finite: bool = True,
    ) -> None:
        check_batches(batches)
        if threads is not None and threads < 1:
            raise InputError(f"threads: expected at least 1, got {threads}")
        if provider not in PROVIDERS:
            raise InputError(f"unknown provider {provider!r}; valid are {', '.join(PROVIDERS)}")
        if types not in TENSORRT_TYPES:
            raise InputError(f"unknown types {types!r}; valid are {', '.join(TENSORRT_TYPES)}")
        self._path = Path(path)
        self._provider = provider
        self._threads = threads or available_threads()
        self._name = name or self._path.stem
        self._spinning = spinning
        self._batches = batches
        self._types = types
        self._cache = cache
        self._finite = finite
        self._session: Any = None
        self._input_name = self._output_name = ""
        self._shape: tuple[int | None, ...] = ()  # [B, C, H, W]; None where the model takes any size
        self._image_shape: tuple[int | None, ...] = ()  # [C, H, W], if any batch may come with it

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
                f"{self._gpu_advice()}, or ask for cpu"
            )
        self._check_every_node(session)
        self._input_name, self._shape = self._only("input", session.get_inputs(), 4)
        self._output_name, _ = self._only("output", session.get_outputs(), 2)
        self._image_shape = () if self._shape[0] is not None else self._shape[1:]
        self._session = session
        return self

    def __exit__(self, *exc: object) -> None:
        self._session = None

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._session is None:
            raise RuntimeError("enter the runner before infer")
        # A server's way through here is as short as the model it runs; what is not plainly right is looked at closely.
        is_plain = type(images) is np.ndarray and images.dtype == np.float32 and len(images) > 0
        if self._finite or not is_plain or images.shape[1:] != self._image_shape:
            check_images(self._name, images, self._shape, finite=self._finite)
        smallest, _, largest = self._batches
        if self._provider == "tensorrt" and not smallest <= len(images) <= largest:
            raise InputError(
                f"{self._name}: TensorRT was set up for batches of {smallest} to {largest}, got {len(images)}; "
                "give other batches, or split the batch"
            )
        return check_logits(self._name, self._run(np.ascontiguousarray(images)), len(images), finite=self._finite)

    def facts(self) -> dict[str, str]:
        import onnxruntime

        if self._session is None:
            raise RuntimeError("enter the runner before asking what runs")
        facts = {
            "backend": "onnxruntime",
            "provider": next(short for short, long in PROVIDERS.items() if long == self._session.get_providers()[0]),
            "threads": str(self._threads),
            "spinning": "on" if self._spinning else "off",
            "onnxruntime": str(onnxruntime.__version__),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        }
        if self._provider == "cuda":
            facts["tf32"] = "off"
        if self._provider == "tensorrt":
            # The provider has no option for TF32; the variable is NVIDIA's own switch for all its libraries.
            facts["tf32"] = "off" if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0" else "on"
            facts["types allowed"] = "fp32" if self._types == "fp32" else f"fp32 and {self._types}"
            facts["batches"] = f"{self._batches[0]} to {self._batches[2]}"
        return facts

    def _make_session(self) -> Any:
        try:
            import onnxruntime
        except ImportError:
            extra = "cpu" if self._provider == "cpu" else "gpu"
            raise MissingExtraError("running an ONNX model", "onnxruntime", extra) from None
        wanted = PROVIDERS[self._provider]
        if self._provider != "cpu":
            preload_cuda_libraries()
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
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # see _check_every_node
        if self._provider != "cpu":
            # With this, a node that the provider cannot run is an error. It forbids naming the CPU as second choice.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            session = onnxruntime.InferenceSession(
                str(self._path), options, providers=[self._provider_with_options(wanted)], enable_fallback=0
            )
        except (BackendError, MissingExtraError):
            raise
        except Exception as error:  # onnxruntime's errors share no base class but this
            said = f"{self._path}: ONNX Runtime cannot load the model on {self._provider} ({_reason(error)}); "
            if self._provider == "cpu":
                raise BundleError(said + "export it again") from error
            raise BackendError(said + f"{self._gpu_advice()}; or export the model again, or ask for cpu") from error
        session.disable_fallback()
        return session

    def _provider_with_options(self, provider: str) -> str | tuple[str, dict[str, str]]:
        """A provider as a session takes it."""
        if self._provider == "cpu":
            return provider
        if self._provider == "cuda":
            return provider, {"device_id": "0", "use_tf32": "0"}
        options = {"device_id": "0", "trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"}
        options |= TENSORRT_TYPES[self._types]
        # Explicit profiles: without them, a batch size that is new makes the provider build an engine.
        name, image = self._image_input()
        for key, batch in zip(("min", "opt", "max"), self._batches, strict=True):
            options[f"trt_profile_{key}_shapes"] = f"{name}:{'x'.join(map(str, (batch, *image)))}"
        folder = self._engine_folder(options)
        folder.mkdir(parents=True, exist_ok=True)
        return provider, options | {"trt_engine_cache_path": str(folder), "trt_timing_cache_path": str(folder)}

    def _image_input(self) -> tuple[str, tuple[int, ...]]:
        """Name and [C, H, W] of the model's input, read by the CPU provider, which builds nothing."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(self._path), options, providers=[PROVIDERS["cpu"]])
        name, shape = self._only("input", session.get_inputs(), 4)
        image = [size for size in shape[1:] if size is not None]
        if len(image) != 3:
            raise BackendError(f"{self._path}: TensorRT needs a fixed image size; export the model with one")
        return name, tuple(image)

    def _engine_folder(self, options: dict[str, str]) -> Path:
        """A folder that no other model, option, version or GPU shares."""
        import onnxruntime

        device = describe_device()
        parts = [
            content_sha256(self._path), options, str(onnxruntime.__version__), installed_versions(),
            device.name, device.compute_capability, device.driver,
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return (self._cache or cache_folder("onnxruntime-tensorrt")) / key

    def _check_every_node(self, session: Any) -> None:
        """Refuse a session with a node on another provider. An older ONNX Runtime cannot say where its nodes are; there
        its own check that none is on the CPU (see ``_make_session``) has to do."""
        if not hasattr(session, "get_provider_graph_assignment_info"):
            return
        wanted = PROVIDERS[self._provider]
        strays = [
            f"{node.name or node.op_type} on {part.ep_name}"
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name != wanted
            for node in part.get_nodes()
        ]
        if strays:
            more = f" and {len(strays) - 5} more" if len(strays) > 5 else ""
            raise BackendError(
                f"{self._name}: asked for provider {self._provider}, which leaves out {', '.join(strays[:5])}{more}; "
                "export the model without these, or ask for cpu"
            )

    def _gpu_advice(self) -> str:
        """What is wrong with the GPU packages, as far as it can be seen."""
        mismatch = tensorrt_mismatch() if self._provider == "tensorrt" else None
        printed = preload_cuda_libraries()
        if mismatch:
            return mismatch
        return "install the driver and CUDA libraries that this onnxruntime-gpu needs" + (
            f" ({printed})" if printed else ""
        )

    def _only(self, what: str, tensors: list[Any], num_axes: int) -> tuple[str, tuple[int | None, ...]]:
        """Name and shape of the model's only float32 input or output."""
        found = ", ".join(f"{tensor.name}: {tensor.type} {list(tensor.shape)}" for tensor in tensors)
        if len(tensors) != 1 or tensors[0].type != "tensor(float)" or len(tensors[0].shape) != num_axes:
            raise BackendError(
                f"{self._path}: expected one float32 {what} with {num_axes} axes, found {found or 'none'}; "
                "export an image classifier"
            )
        return tensors[0].name, tuple(size if isinstance(size, int) else None for size in tensors[0].shape)

    def _run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """The one call into the session; device-bound buffers (IOBinding) would go here."""
        try:
            logits: NDArray[np.float32] = self._session.run([self._output_name], {self._input_name: images})[0]
        except Exception as error:  # see _make_session
            raise BackendError(
                f"{self._name}: ONNX Runtime stopped at batch {len(images)} ({_reason(error)})"
            ) from error
        return logits


def check_batches(batches: Batches) -> None:
    """Refuse batch sizes that are not 1 <= smallest <= best <= largest.

    Raises:
        InputError: with what was given.
    """
    smallest, best, largest = batches
    if not 1 <= smallest <= best <= largest:
        raise InputError(f"batches: expected 1 <= min <= opt <= max, got {smallest}, {best}, {largest}")


def check_images(name: str, images: NDArray[np.float32], shape: tuple[int | None, ...], *, finite: bool = True) -> None:
    """Refuse images that a model does not take.

    Args:
        name: the runner's, for the message.
        shape: [B, C, H, W]; None where any size fits.
        finite: refuse NaN and infinity; off: they have been looked for.

    Raises:
        InputError: not float32, another shape, no image at all, or not finite.
    """
    if not isinstance(images, np.ndarray) or images.dtype != np.float32:
        kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise InputError(f"{name}: expected float32 images, got {kind}")
    fits = images.ndim == 4 and all(want in (None, got) for want, got in zip(shape, images.shape, strict=True))
    if not fits or len(images) == 0:
        expected = ", ".join(str(size or axis) for size, axis in zip(shape, "BCHW", strict=True))
        raise InputError(f"{name}: expected images [{expected}], got {list(images.shape)}")
    if finite and not np.isfinite(images).all():
        raise InputError(f"{name}: the images hold NaN or infinite values; send finite pixels")


def check_logits(name: str, logits: NDArray[np.float32], batch: int, *, finite: bool = True) -> NDArray[np.float32]:
    """The logits, once they are [B, N] and, unless ``finite`` is off, finite.

    Raises:
        ParityError: they are not.
    """
    if logits.ndim != 2 or len(logits) != batch:
        raise ParityError(f"{name}: expected logits [{batch}, classes], got {list(logits.shape)}")
    if finite and not np.isfinite(logits).all():
        raise ParityError(f"{name}: an output is NaN or infinite for finite images; export the model again")
    return logits


@functools.cache
def preload_cuda_libraries() -> str:
    """Let ONNX Runtime find CUDA and cuDNN among the installed packages, once, before the first session on a GPU.

    Returns:
        What it printed: it does so where a library is missing, and raises nothing. "" when all went well.
    """
    import onnxruntime

    printed = io.StringIO()
    if hasattr(onnxruntime, "preload_dlls"):  # 1.21 and later
        with contextlib.redirect_stdout(printed):
            onnxruntime.preload_dlls()
    return " ".join(re.sub(r"\x1b\[\d+m", "", printed.getvalue()).split())


def _reason(error: Exception) -> str:
    """ONNX Runtime's own words without its tags, on one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])[:200].rstrip(" .")
