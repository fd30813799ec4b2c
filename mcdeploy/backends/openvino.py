"""An ONNX file in OpenVINO on the CPU: what people would try instead of ONNX Runtime, under the same rules.

OpenVINO may choose a smaller type than the file's by itself (bfloat16 on some CPUs). Here float32 is asked for, and
what the compiled model says it runs is read back. Only the runtime is used, which sends no telemetry; the converters,
which may, are never called.
"""

# B = batch, C = channels, H/W = height/width.
from __future__ import annotations

import platform
import threading
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from mcruntime.cgroup import available_threads
from mcruntime.engine import check_images, check_logits
from numpy.typing import NDArray

from mcdeploy.errors import BackendError, BundleError, InputError, MissingExtraError

HEAVY = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")  # layers that hold the multiplications
NAMES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "int8"}


@dataclass(frozen=True)
class LayerRun:
    """One layer of the compiled model in one inference."""

    name: str
    origins: tuple[str, ...]  # friendly names of what was fused into it; of a node that is the file's name for it
    kind: str
    microseconds: float


class OpenVINORunner:
    """One compiled model with a dynamic batch: every batch size runs in it, nothing is compiled again by us.

    Args:
        path: a model with one input [B, C, H, W] and one output [B, num_classes], both float32.
        name: for messages; None: the file name without its suffix.
        threads: of one inference; None: ``available_threads()``.
        profile: let OpenVINO time every layer, for ``layer_times``; that costs time itself.

    Raises:
        InputError: fewer than 1 thread.
    """

    def __init__(
        self, path: Path | str, *, name: str | None = None, threads: int | None = None, profile: bool = False
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads: expected at least 1, got {threads}")
        self._path = Path(path)
        self._name = name or self._path.stem
        self._threads = threads or available_threads()
        self._profile = profile
        self._origins: dict[str, tuple[str, ...]] = {}  # of every layer that runs, the nodes of the file in it
        self._lock = threading.Lock()  # a request serves one caller at a time
        self._request: Any = None
        self._shape: tuple[int | None, ...] = ()
        self._facts: dict[str, str] = {}

    @property
    def name(self) -> str:
        return self._name

    def __enter__(self) -> Self:
        """Compile the model and read back how.

        Raises:
            MissingExtraError: openvino is not installed.
            BundleError: no such file.
            BackendError: OpenVINO cannot compile the model, or took other threads or another type than asked for.
        """
        try:
            import openvino
        except ImportError:
            raise MissingExtraError("running a model in OpenVINO", "openvino", "openvino") from None
        if not self._path.is_file():
            raise BundleError(f"{self._path}: no such model file; give the path of an .onnx file")
        asked = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self._threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "PERF_COUNT": self._profile,
        }
        try:
            compiled = openvino.Core().compile_model(str(self._path), "CPU", asked)
        except Exception as error:  # openvino raises RuntimeError with a stack of C++ lines
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200].rstrip(" .")
            raise BackendError(
                f"{self._path}: OpenVINO cannot compile the model ({reason}); export it again"
            ) from error
        self._facts = self._read_back(compiled, openvino.__version__)
        self._origins = {
            node.get_friendly_name(): tuple(str(node.get_rt_info()["originalLayersNames"].value).split(","))
            for node in compiled.get_runtime_model().get_ordered_ops()
        }
        sizes = compiled.inputs[0].partial_shape
        self._shape = tuple(int(size.get_length()) if size.is_static else None for size in sizes)
        self._request = compiled.create_infer_request()
        return self

    def __exit__(self, *exc: object) -> None:
        self._request = None

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See ``Runner``."""
        if self._request is None:
            raise RuntimeError("enter the runner before infer")
        check_images(self._name, images, self._shape)
        with self._lock:
            try:
                self._request.infer({0: np.ascontiguousarray(images)}, share_inputs=True)
            except RuntimeError as error:
                raise BackendError(f"{self._name}: OpenVINO stopped at batch {len(images)} ({error})") from error
            logits = np.array(self._request.get_output_tensor(0).data)  # the request's own memory is used again
        return check_logits(self._name, logits, len(images))

    def facts(self) -> dict[str, str]:
        if self._request is None:
            raise RuntimeError("enter the runner before asking what runs")
        return dict(self._facts)

    def layer_times(self) -> list[LayerRun]:
        """Every layer of the last inference, in the order of running; those fused into others took no time."""
        if self._request is None or not self._profile:
            raise RuntimeError("make the runner with profile=True and enter it before asking for times")
        with self._lock:
            return [
                LayerRun(
                    info.node_name,
                    self._origins.get(info.node_name, ()),
                    info.node_type,
                    info.real_time.total_seconds() * 1e6,
                )
                for info in self._request.profiling_info
            ]

    def _read_back(self, compiled: Any, release: str) -> dict[str, str]:
        """What runs, as the compiled model says it."""
        threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
        hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if threads != self._threads or hint != "f32":
            raise BackendError(
                f"{self._name}: asked OpenVINO for {self._threads} thread(s) in f32, it took {threads} in {hint}; "
                "use another release of it"
            )
        infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
        kinds = Counter(str(info["runtimePrecision"].value) for info in infos if str(info["layerType"].value) in HEAVY)
        words = [f"{NAMES.get(kind, kind)} ({count} heavy layers)" for kind, count in kinds.most_common()]
        precision = NAMES.get(next(iter(kinds)), next(iter(kinds))) if len(kinds) == 1 else ", ".join(words)
        return {
            "backend": "openvino",
            "provider": "cpu",
            "precision": precision or "no heavy layers",
            "threads": str(threads),
            "streams": str(compiled.get_property("NUM_STREAMS")),
            "hint": str(compiled.get_property("PERFORMANCE_HINT")).rpartition(".")[2].lower(),
            "batch": "dynamic" if compiled.inputs[0].partial_shape[0].is_dynamic else "fixed",
            "openvino": release.split("-")[0],
            "numpy": version("numpy"),
            "python": platform.python_version(),
        }
