"""A TensorRT engine behind the runner interface, and the facts that travel beside its plan.

A plan is machine code for one GPU type and one version of TensorRT, and it does not say so in words. So the builder
(``mcdeploy.backends.tensorrt``) writes a file of facts beside it, MODEL.plan.json, and the runner holds them against
the machine before it hands the plan to TensorRT.

Written against the published names of TensorRT 10.16 and 11.4 and of cuda-python; it has never run on a GPU.
"""

# B = batch, C = channels, H/W = height/width, N = classes.
from __future__ import annotations

import functools
import hashlib
import json
import math
import platform
import re
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mcruntime.engine import check_images, check_logits
from mcruntime.errors import BackendError, BundleError, InputError
from mcruntime.gpu import Device, checked, describe_device, floats_at, load_cudart, load_tensorrt, parse_version
from mcruntime.manifest import Precision, Section, Sha256

Compatibility = Literal["none", "same-compute-capability", "ampere-plus"]
# From the narrowest type on: an engine is called after the narrowest type that its layers multiply in.
NARROWEST_FIRST = ("int8", "fp8", "fp16", "bf16", "tf32", "fp32")
_MULTIPLIES = re.compile(r"conv|gemm|mat_?mul|matrix|fully|attention|mha", re.IGNORECASE)
_BOOKKEEPING = re.compile(r"reformat|constant|no_?op|shuffle|signal|wait|identity|shape|memcpy|copy", re.IGNORECASE)
# A longer word comes before the one that it contains.
_TYPE_WORDS = (
    ("int8", ("INT8",)), ("fp8", ("FP8", "E4M3")), ("bf16", ("BF16", "BFLOAT16")),
    ("fp16", ("HALF", "FP16", "FLOAT16")), ("fp32", ("FP32", "FLOAT")),
)  # fmt: skip
_TACTICS = (
    ("int8", re.compile(r"i8i8|imma|int8")), ("tf32", re.compile("tf32")),
    ("fp16", re.compile(r"f16f16|h884|h1688|hmma|fp16")), ("fp32", re.compile(r"f32f32|sgemm|fp32")),
)  # fmt: skip


class EngineFacts(Section):
    """What a plan was built from, by what, for what; the file beside the plan."""

    kind: Literal["mcdeploy engine"] = "mcdeploy engine"
    schema_version: Literal[1] = 1
    tensorrt: str  # full version
    gpu: str
    compute_capability: str
    driver: str
    onnx_sha256: Sha256  # of the model and its external data
    plan_sha256: Sha256
    precision: Precision  # asked for, and found
    layers: dict[str, int]  # layers that multiply (all that compute, where none can be told), by the type they use
    batches: tuple[int, int, int]  # smallest, the one it was tuned for, largest
    workspace_bytes: int | None
    optimization_level: int
    tf32: bool
    version_compatible: bool
    hardware_compatible: Compatibility


def facts_path(plan: Path) -> Path:
    """The file of facts that belongs to a plan."""
    return plan.with_name(plan.name + ".json")


def read_engine(plan: Path) -> tuple[bytes, EngineFacts]:
    """A plan and its facts, once the bytes are those that the facts describe.

    Raises:
        BundleError: one of the two files is missing, or they do not belong together.
    """
    beside = facts_path(plan)
    for path in (plan, beside):
        if not path.is_file():
            raise BundleError(f"{path}: no such file; an engine is a .plan and its .plan.json, build it again")
    try:
        facts = EngineFacts.model_validate_json(beside.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BundleError(f"{beside}: {where}: {first['msg']}; build the engine again") from None
    content = plan.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != facts.plan_sha256:
        raise BundleError(
            f"{plan}: is not the engine that {beside.name} describes (sha256 {found[:12]}, "
            f"expected {facts.plan_sha256[:12]}); build it again"
        )
    return content, facts


def check_fits(facts: EngineFacts, plan: Path, tensorrt: str, device: Device, *, lean_runtime: bool = False) -> None:
    """Refuse an engine that was built for another TensorRT or another GPU.

    Args:
        tensorrt: the installed version.
        lean_runtime: the lean runtime of the building version will be loaded.

    Raises:
        BackendError: with both versions, or both GPUs.
    """
    built, here = parse_version(facts.tensorrt), parse_version(tensorrt)
    if built != here:
        if not facts.version_compatible:
            raise BackendError(
                f"{plan}: was built by TensorRT {facts.tensorrt}, here is {tensorrt}; build it again here, "
                f"or install tensorrt=={facts.tensorrt}"
            )
        if here < built or here[0] - built[0] > 1:
            raise BackendError(
                f"{plan}: was built by TensorRT {facts.tensorrt}, here is {tensorrt}; a version-compatible engine runs "
                "on later versions of its own and of the next major version only, so build it again here"
            )
        if not lean_runtime:
            raise BackendError(
                f"{plan}: was built by TensorRT {facts.tensorrt}, here is {tensorrt}; give the path of that version's "
                "lean runtime library (libnvinfer_lean), or build it again here"
            )
    if facts.hardware_compatible == "same-compute-capability":
        fits, needs = facts.compute_capability == device.compute_capability, f"compute {facts.compute_capability}"
    elif facts.hardware_compatible == "ampere-plus":
        fits, needs = parse_version(device.compute_capability) >= (8, 0), "compute 8.0 or later"
    else:
        fits, needs = facts.gpu == device.name, "the same GPU type"
    if not fits:
        raise BackendError(
            f"{plan}: was built on {facts.gpu} (compute {facts.compute_capability}) for {needs}, here is {device.name} "
            f"(compute {device.compute_capability}); build it again here"
        )


@functools.cache
def shared_logger(trt: Any) -> Any:
    """TensorRT's logger, which keeps the last errors in ``errors`` and warnings in ``warnings`` and prints nothing.

    One for the process, never let go: TensorRT goes on sending messages to the first logger that it was given.
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=20)
            self.warnings: deque[str] = deque(maxlen=20)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)

    return Log()


def new_runtime(trt: Any, logger: Any) -> Any:
    """TensorRT's runtime.

    Raises:
        BackendError: TensorRT makes none.
    """
    try:
        return trt.Runtime(logger)
    except TypeError:  # "factory function returned nullptr": the reason is in the log
        raise BackendError(f"TensorRT {trt.__version__} does not start: {quote(logger.errors)}") from None


def quote(errors: Iterable[str]) -> str:
    """The errors that TensorRT logged, on one line."""
    return "; ".join(" ".join(error.split()) for error in errors) or "it logged no reason"


def count_precisions(information: str) -> dict[str, int]:
    """Layers by the type that they really compute in, read from the engine inspector's JSON.

    Counted are layers that multiply: convolutions, matrix products, attention. Where none of the layers can be told to
    be one, all that compute are counted. A layer's type is that of its first input, or else of its weights, or else
    what the name of its kernel says: with a dynamic batch, tensors may be without a type in the JSON.

    Args:
        information: what ``get_engine_information`` gave; TensorRT 11 has "Datatype" where 10 has "Format/Datatype".

    Returns:
        Counts by "int8", "fp8", "fp16", "bf16", "tf32", "fp32" and "unknown"; those that are not 0.
    """
    layers = [layer if isinstance(layer, dict) else {} for layer in json.loads(information).get("Layers", [])]
    computing = [layer for layer in layers if not _BOOKKEEPING.search(str(layer.get("LayerType", "")))]
    multiplying = [layer for layer in computing if _multiplies(layer)]
    counts: dict[str, int] = {}
    for layer in multiplying or computing:
        word = _type_of(layer)
        counts[word] = counts.get(word, 0) + 1
    return counts


def precision_of(layers: Mapping[str, int]) -> str:
    """The narrowest type among the layers, "unknown" where the engine does not say."""
    return next((word for word in NARROWEST_FIRST if layers.get(word)), "unknown")


def in_words(layers: Mapping[str, int]) -> str:
    """Such as "20 fp16, 1 fp32"."""
    return ", ".join(f"{count} {word}" for word, count in layers.items()) or "none"


def inspect_layers(trt: Any, engine: Any, context: Any) -> dict[str, int]:
    """``count_precisions`` of an engine.

    Args:
        context: with its input shapes set, so that tensors have types.

    Raises:
        BackendError: what the inspector says cannot be read.
    """
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    try:
        return count_precisions(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except (ValueError, AttributeError, TypeError) as error:
        raise BackendError(f"TensorRT {trt.__version__} describes the engine in an unknown form ({error})") from error


def _multiplies(layer: Mapping[str, Any]) -> bool:
    return bool(_MULTIPLIES.search(f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}"))


def _type_of(layer: Mapping[str, Any]) -> str:
    inputs, weights = layer.get("Inputs") or [], layer.get("Weights")
    described = [one for one in (*inputs[:1], weights) if isinstance(one, dict)]
    said = (str(one.get("Datatype") or one.get("Format/Datatype") or one.get("Type") or "") for one in described)
    tactic = str(layer.get("TacticName", "")).lower()
    by_tactic = next((word for word, pattern in _TACTICS if pattern.search(tactic)), "unknown")
    found = next((word for text in said if (word := _word_in(text))), by_tactic)
    return "tf32" if found == "fp32" and by_tactic == "tf32" else found


def _word_in(text: str) -> str | None:
    return next((word for word, signs in _TYPE_WORDS if any(sign in text.upper() for sign in signs)), None)


@dataclass(frozen=True)
class _Shapes:
    """The engine's one input and one output."""

    input: str
    output: str
    image: tuple[int, ...]  # [C, H, W]
    num_classes: int
    batches: tuple[int, int, int]


@dataclass(frozen=True)
class _Ready:
    """A context whose shapes are set, and the CUDA graph that was captured from it."""

    context: Any
    graph: Any  # None: launch kernel by kernel


class _Loaded:
    """An engine on its GPU: buffers, one stream, and one context for each batch size that came.

    A CUDA graph holds the state of the context that it was captured from, so a context that has one is never changed:
    every batch size gets a context of its own. All of them share the scratch memory, since one runs at a time.
    """

    def __init__(
        self,
        trt: Any,
        cudart: Any,
        content: bytes,
        *,
        name: str,
        lean_runtime: Path | None,
        cuda_graphs: bool,
        cold_l2_on: int | None,
    ) -> None:
        self._trt, self._cudart, self._name, self._cuda_graphs = trt, cudart, name, cuda_graphs
        self._cold_l2_on = cold_l2_on  # number of the GPU; None: the L2 cache stays as it is
        self._ready: dict[int, _Ready] = {}
        self._stack = ExitStack()
        with self._stack:
            self._logger = shared_logger(trt)
            self._logger.errors.clear()
            runtime = new_runtime(trt, self._logger)
            if lean_runtime is not None:
                runtime = runtime.load_runtime(str(lean_runtime))
            self._runtime = runtime
            self._engine: Any = None if runtime is None else runtime.deserialize_cuda_engine(content)
            if self._engine is None:
                raise BackendError(
                    f"{name}: TensorRT {trt.__version__} refuses the engine ({quote(self._logger.errors)}); "
                    "build it again on this machine"
                )
            self.shapes = self._read_shapes()
            self._allocate()
            self._stack.callback(self._let_go)  # after the graphs, before the memory that the contexts use
            self.layers = inspect_layers(trt, self._engine, self._ready_for(self.shapes.batches[1]).context)
            self._stack = self._stack.pop_all()

    def close(self) -> None:
        """Free everything: graphs, contexts and engine, then their memory."""
        self._stack.close()

    def _let_go(self) -> None:
        self._ready.clear()
        self._engine = self._runtime = None

    def upload(self, images_BCHW: NDArray[np.float32]) -> None:
        """Queue the copy to the GPU."""
        size = images_BCHW.size
        self._host_images[:size] = images_BCHW.reshape(-1)
        self._copy(self._images, self._host_images_at, size, self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def launch(self, batch: int) -> None:
        """Queue one inference, all shapes prepared beforehand."""
        ready, cudart = self._ready_for(batch), self._cudart
        if ready.graph is None:
            self._execute(ready.context, batch)
        else:
            checked(cudart, cudart.cudaGraphLaunch(ready.graph, self._stream), f"launch the graph of batch {batch}")

    def download(self, batch: int) -> NDArray[np.float32]:
        """Logits [B, N], once everything that was queued is done."""
        size = batch * self.shapes.num_classes
        self._copy(self._host_logits_at, self._logits, size, self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        self._wait()
        return self._host_logits[:size].reshape(batch, -1).copy()

    def time_launch(self, batch: int) -> float:
        """Milliseconds between two events around one inference, with nothing else on the GPU's stream."""
        cudart, stream = self._cudart, self._stream
        self._ready_for(batch)
        if self._flush_size:
            flushed = cudart.cudaMemsetAsync(self._flush, 0, self._flush_size, stream)
            checked(cudart, flushed, "overwrite the L2 cache")
        self._wait()  # also for that, else the launch would hide behind it and look faster than with a warm cache
        checked(cudart, cudart.cudaEventRecord(self._start, stream), "record an event")
        self.launch(batch)
        checked(cudart, cudart.cudaEventRecord(self._end, stream), "record an event")
        checked(cudart, cudart.cudaEventSynchronize(self._end), f"finish batch {batch}")
        took = checked(cudart, cudart.cudaEventElapsedTime(self._start, self._end), "read the time between two events")
        return float(took)

    def _read_shapes(self) -> _Shapes:
        trt, engine = self._trt, self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        found = ", ".join(
            f"{name}: {engine.get_tensor_dtype(name)} {list(engine.get_tensor_shape(name))}" for name in names
        )
        wanted = f"{self._name}: expected one float32 input [B, C, H, W] and one float32 output [B, N], found {found}"
        if len(inputs) != 1 or len(outputs) != 1:
            raise BackendError(f"{wanted}; build an image classifier")
        image, logits = tuple(engine.get_tensor_shape(inputs[0])), tuple(engine.get_tensor_shape(outputs[0]))
        are_floats = all(engine.get_tensor_dtype(name) == trt.DataType.FLOAT for name in names)
        if not are_floats or len(image) != 4 or min(image[1:]) < 1 or len(logits) != 2 or logits[1] < 1:
            raise BackendError(f"{wanted}; build an image classifier")
        smallest, best, largest = (int(next(iter(shape))) for shape in engine.get_tensor_profile_shape(inputs[0], 0))
        return _Shapes(inputs[0], outputs[0], image[1:], logits[1], (smallest, best, largest))

    def _allocate(self) -> None:
        cudart, stack, largest = self._cudart, self._stack, self.shapes.batches[2]
        # Not the default stream: that one waits for others, and cannot be captured.
        self._stream = checked(
            cudart, cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking), "create a stream"
        )
        stack.callback(lambda: checked(cudart, cudart.cudaStreamDestroy(self._stream), "destroy a stream"))
        self._start, self._end = self._event(), self._event()
        num_pixels, num_logits = largest * math.prod(self.shapes.image), largest * self.shapes.num_classes
        self._images, self._logits = self._on_gpu(num_pixels * 4), self._on_gpu(num_logits * 4)
        self._scratch_bytes = max(int(self._engine.device_memory_size_v2), 256)  # CUDA has no empty memory
        self._scratch = self._on_gpu(self._scratch_bytes)
        self._flush_size = 0 if self._cold_l2_on is None else 2 * self._l2_bytes(self._cold_l2_on)
        self._flush = self._on_gpu(self._flush_size) if self._flush_size else 0
        self._host_images_at, self._host_logits_at = self._pinned(num_pixels * 4), self._pinned(num_logits * 4)
        self._host_images = floats_at(self._host_images_at, num_pixels)
        self._host_logits = floats_at(self._host_logits_at, num_logits)
        self._host_images[:] = 0  # what the first run of a batch size may find there

    def _l2_bytes(self, number: int) -> int:
        cudart = self._cudart
        answer = cudart.cudaDeviceGetAttribute(cudart.cudaDeviceAttr.cudaDevAttrL2CacheSize, number)
        size = int(checked(cudart, answer, "read the size of the L2 cache"))
        if size < 1:
            raise BackendError(
                f"{self._name}: this GPU does not say how large its L2 cache is; measure with a warm one"
            )
        return size

    def _event(self) -> Any:
        cudart = self._cudart
        event = checked(cudart, cudart.cudaEventCreate(), "create an event")
        self._stack.callback(lambda: checked(cudart, cudart.cudaEventDestroy(event), "destroy an event"))
        return event

    def _on_gpu(self, num_bytes: int) -> int:
        cudart = self._cudart
        address = checked(cudart, cudart.cudaMalloc(num_bytes), f"allocate {num_bytes:,} bytes on the GPU")
        self._stack.callback(lambda: checked(cudart, cudart.cudaFree(address), "free GPU memory"))
        return int(address)

    def _pinned(self, num_bytes: int) -> int:
        cudart = self._cudart
        address = checked(cudart, cudart.cudaMallocHost(num_bytes), f"pin {num_bytes:,} bytes of host memory")
        self._stack.callback(lambda: checked(cudart, cudart.cudaFreeHost(address), "free pinned memory"))
        return int(address)

    def _ready_for(self, batch: int) -> _Ready:
        if batch not in self._ready:
            context = self._new_context(batch)
            self._execute(context, batch)  # TensorRT initialises itself in a first run, which no graph may hold
            self._wait()
            self._ready[batch] = _Ready(context, self._capture(context, batch) if self._cuda_graphs else None)
        return self._ready[batch]

    def _new_context(self, batch: int) -> Any:
        trt, engine, shapes = self._trt, self._engine, self.shapes
        self._logger.errors.clear()
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise BackendError(f"{self._name}: TensorRT made no context ({quote(self._logger.errors)})")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        stream = int(self._stream)
        done = (
            context.set_optimization_profile_async(0, stream)
            and context.set_input_shape(shapes.input, (batch, *shapes.image))
            and not context.infer_shapes()
            and context.set_tensor_address(shapes.input, self._images)
            and context.set_tensor_address(shapes.output, self._logits)
        )
        if not done:
            raise BackendError(
                f"{self._name}: TensorRT does not take images {[batch, *shapes.image]} ({quote(self._logger.errors)})"
            )
        self._wait()  # for the profile
        return context

    def _capture(self, context: Any, batch: int) -> Any:
        cudart, stream = self._cudart, self._stream
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        checked(cudart, cudart.cudaStreamBeginCapture(stream, mode), "begin to capture a graph")
        self._logger.errors.clear()
        queued = context.execute_async_v3(stream_handle=int(stream))
        code, graph = cudart.cudaStreamEndCapture(stream)
        captured = code == cudart.cudaError_t.cudaSuccess
        if not queued or not captured:
            if captured:
                checked(cudart, cudart.cudaGraphDestroy(graph), "destroy a graph")
            raise BackendError(
                f"{self._name}: batch {batch} cannot be captured as a CUDA graph ({quote(self._logger.errors)}); "
                "a net that decides for each image what to run cannot be; ask for cuda_graphs=False"
            )
        try:
            launchable = checked(cudart, cudart.cudaGraphInstantiate(graph, 0), "make a graph ready to launch")
        finally:
            checked(cudart, cudart.cudaGraphDestroy(graph), "destroy a graph")
        self._stack.callback(lambda: checked(cudart, cudart.cudaGraphExecDestroy(launchable), "destroy a graph"))
        return launchable

    def _execute(self, context: Any, batch: int) -> None:
        self._logger.errors.clear()
        if not context.execute_async_v3(stream_handle=int(self._stream)):
            raise BackendError(f"{self._name}: TensorRT stopped at batch {batch} ({quote(self._logger.errors)})")

    def _copy(self, to: int, source: int, num_floats: int, kind: Any) -> None:
        cudart = self._cudart
        checked(
            cudart, cudart.cudaMemcpyAsync(to, source, num_floats * 4, kind, self._stream), "copy to or from the GPU"
        )

    def _wait(self) -> None:
        cudart = self._cudart
        checked(cudart, cudart.cudaStreamSynchronize(self._stream), "finish what was queued")


class TensorRTRunner:
    """A TensorRT engine with one float32 input [B, C, H, W] and one float32 output [B, N].

    ``infer`` may be called from several threads; one runs at a time. Code for the host inside a plan is never allowed
    to run.

    Args:
        path: the plan; its facts lie beside it.
        name: for messages; None: the file name without its suffix.
        device: number of the GPU.
        cuda_graphs: replay one CUDA graph for each batch size instead of launching kernel by kernel; not for nets that
            decide for each image what to run.
        lean_runtime: the lean runtime library of the TensorRT that built a version-compatible engine, where another
            version is installed here. It is loaded into this process: take it from NVIDIA's package.
        cold_l2: ``time_on_device`` first overwrites twice the size of the GPU's L2 cache, so that weights and images
            come from the GPU's memory.
        finite: refuse logits that are NaN or infinite; off: hand them on, as a server does with what it was sent.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        name: str | None = None,
        device: int = 0,
        cuda_graphs: bool = True,
        lean_runtime: Path | str | None = None,
        cold_l2: bool = False,
        finite: bool = True,
    ) -> None:
        self._path = Path(path)
        self._name = name or self._path.stem
        self._number = device
        self._cuda_graphs = cuda_graphs
        self._lean_runtime = None if lean_runtime is None else Path(lean_runtime)
        self._cold_l2 = cold_l2
        self._finite = finite
        self._lock = threading.Lock()
        self._loaded: _Loaded | None = None
        self._facts: dict[str, str] = {}

    @property
    def name(self) -> str:
        return self._name

    def __enter__(self) -> Self:
        """Load the engine.

        Raises:
            MissingExtraError: TensorRT or cuda-python is not installed.
            BundleError: the plan is missing, changed, or without its facts.
            BackendError: no usable GPU, an engine for another GPU or TensorRT, or one that TensorRT refuses.
        """
        content, facts = read_engine(self._path)
        trt, cudart, device = load_tensorrt(), load_cudart(), describe_device(self._number)
        has_lean = self._lean_runtime is not None
        check_fits(facts, self._path, trt.__version__, device, lean_runtime=has_lean)
        self._use_device()
        loaded = _Loaded(
            trt,
            cudart,
            content,
            name=self._name,
            lean_runtime=self._lean_runtime if trt.__version__ != facts.tensorrt else None,
            cuda_graphs=self._cuda_graphs,
            cold_l2_on=self._number if self._cold_l2 else None,
        )
        smallest, _, largest = loaded.shapes.batches
        self._facts = {
            "backend": "tensorrt",
            "provider": "tensorrt",
            "precision": precision_of(loaded.layers),
            "layers": in_words(loaded.layers),
            "tf32": "on" if facts.tf32 else "off",
            "batches": f"{smallest} to {largest}",
            "cuda graphs": "on" if self._cuda_graphs else "off",
            "l2": "cold" if self._cold_l2 else "warm",
            "gpu": device.name,
            "driver": device.driver,
            "tensorrt": str(trt.__version__),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        }
        self._loaded = loaded
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            if self._loaded is not None:
                loaded, self._loaded = self._loaded, None
                self._use_device()
                loaded.close()

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See ``Runner``.

        Raises:
            InputError: also for a batch outside those that the engine was built for.
            BackendError: CUDA or TensorRT failed.
        """
        with self._lock:
            loaded = self._check(images)
            loaded.upload(images)
            loaded.launch(len(images))
            return check_logits(self._name, loaded.download(len(images)), len(images), finite=self._finite)

    def time_on_device(self, images: NDArray[np.float32]) -> float | None:
        """Milliseconds that one inference takes between two CUDA events, without the copies.

        The images are on the GPU before the first event, and nothing else is queued; with ``cold_l2`` its L2 cache has
        been overwritten by then.

        Raises:
            InputError, BackendError, ParityError: as ``infer``.
        """
        with self._lock:
            loaded = self._check(images)
            loaded.upload(images)
            took_ms = loaded.time_launch(len(images))
            check_logits(self._name, loaded.download(len(images)), len(images))
            return took_ms

    def facts(self) -> dict[str, str]:
        """What really runs; the precision is read from the engine itself."""
        if self._loaded is None:
            raise RuntimeError("enter the runner before asking what runs")
        return dict(self._facts)

    def _check(self, images: NDArray[np.float32]) -> _Loaded:
        if self._loaded is None:
            raise RuntimeError("enter the runner before infer")
        shapes = self._loaded.shapes
        check_images(self._name, images, (None, *shapes.image))
        smallest, _, largest = shapes.batches
        if not smallest <= len(images) <= largest:
            raise InputError(
                f"{self._name}: this engine takes batches of {smallest} to {largest}, got {len(images)}; "
                "build it for other batches, or split the batch"
            )
        self._use_device()
        return self._loaded

    def _use_device(self) -> None:
        """The current device belongs to the calling thread."""
        cudart = load_cudart()
        checked(cudart, cudart.cudaSetDevice(self._number), f"use GPU {self._number}")
