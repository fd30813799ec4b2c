"""Build TensorRT engines from ONNX, prove the precision that came out, and keep them by what they were built from.

One builder for TensorRT 10.12 to 11.x: the network is strongly typed, so the precision is that of the ONNX file and of
nothing else. Written against the published names of 10.16 and 11.4; it has never run on a GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from mcruntime.engine import DEFAULT_BATCHES, Batches, check_batches
from mcruntime.gpu import (
    Device,
    cache_folder,
    checked,
    content_sha256,
    describe_device,
    load_cudart,
    load_tensorrt,
)
from mcruntime.manifest import Precision
from mcruntime.tensorrt import (
    Compatibility,
    EngineFacts,
    facts_path,
    in_words,
    inspect_layers,
    new_runtime,
    quote,
    read_engine,
    shared_logger,
)

from mcdeploy.errors import BackendError, BundleError, InputError

Progress = Callable[[str, float], None]
PLAN = "engine.plan"


@dataclass(frozen=True)
class EngineOptions:
    """How to build.

    Raises:
        InputError: a value outside its range.
    """

    batches: Batches = DEFAULT_BATCHES  # smallest, the one to tune for, largest
    workspace_bytes: int | None = None  # scratch memory a layer may use; None: all that the GPU has
    optimization_level: int = 3  # 0..5: how long to search for faster kernels
    tf32: bool = False  # let fp32 layers multiply in TF32, with 10 bits of mantissa
    version_compatible: bool = False  # also for later TensorRT, with the lean runtime library of this one; slower
    hardware_compatible: Compatibility = "none"  # also for other GPUs; slower
    timing_cache: Path | None = None  # what kernels took, from build to build; makes the next build shorter

    def __post_init__(self) -> None:
        check_batches(self.batches)
        if not 0 <= self.optimization_level <= 5:
            raise InputError(f"optimization_level: expected 0 to 5, got {self.optimization_level}")
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise InputError(f"workspace_bytes: expected at least 1, got {self.workspace_bytes}")
        if self.hardware_compatible not in get_args(Compatibility):
            raise InputError(
                f"unknown hardware_compatible {self.hardware_compatible!r}; "
                f"valid are {', '.join(get_args(Compatibility))}"
            )

    def of_the_engine(self) -> dict[str, Any]:
        """What decides which engine comes out: everything but the timing cache."""
        return {
            "batches": self.batches,
            "workspace_bytes": self.workspace_bytes,
            "optimization_level": self.optimization_level,
            "tf32": self.tf32,
            "version_compatible": self.version_compatible,
            "hardware_compatible": self.hardware_compatible,
        }


def build_engine(
    onnx: Path,
    out: Path,
    options: EngineOptions,
    *,
    precision: Precision,
    progress: Progress | None = None,
    trt: Any = None,
    device: Device | None = None,
) -> EngineFacts:
    """Build an engine and write it with its facts beside it, each in one step.

    Args:
        onnx: one input [batch, C, H, W] and one output, float32; its own types decide the precision.
        out: the plan; ``facts_path(out)`` is written too.
        precision: what the file holds; what the engine computes in must be the same.
        progress: called with what goes on and the share done, 0 to 1. An exception in it ends the build.
        trt: TensorRT's module; default: the installed one.
        device: where to build; default: GPU 0.

    Raises:
        InputError: no such file, or an unknown precision.
        MissingExtraError: TensorRT or cuda-python is not installed.
        BackendError: no usable GPU, TensorRT cannot parse or build the file, or the engine computes in another type.
        KeyboardInterrupt: Ctrl-C; the build was ended and nothing written.
    """
    if precision not in get_args(Precision):
        raise InputError(f"unknown precision {precision!r}; valid are {', '.join(get_args(Precision))}")
    if not onnx.is_file():
        raise InputError(f"{onnx}: no such file; give the path of an .onnx file")
    trt = load_tensorrt() if trt is None else trt
    device = describe_device() if device is None else device
    plan, layers = _in_a_thread(lambda stop: _build(trt, onnx, options, device, _Monitoring(progress, stop)))
    _check_precision(onnx, precision, layers, options)
    facts = EngineFacts(
        tensorrt=str(trt.__version__),
        gpu=device.name,
        compute_capability=device.compute_capability,
        driver=device.driver,
        onnx_sha256=content_sha256(onnx),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        precision=precision,
        layers=layers,
        **options.of_the_engine(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Facts and plan cannot be replaced together; in between, their hashes disagree and nobody loads either.
    _write(facts_path(out), (facts.model_dump_json(indent=2) + "\n").encode())
    _write(out, plan)
    return facts


def cached_engine(
    onnx: Path,
    options: EngineOptions,
    *,
    precision: Precision,
    cache: Path | None = None,
    progress: Progress | None = None,
    trt: Any = None,
    device: Device | None = None,
) -> tuple[Path, EngineFacts]:
    """The engine of this file, options and machine: from the cache, or built into it.

    An entry is a folder named by ``cache_key``, moved there whole, so that processes side by side never see half of
    one. An entry that is damaged or not what its name says is named in a warning and built again.

    Args:
        cache: a folder; default: ``cache_folder("engines")``.

    Raises:
        InputError, MissingExtraError, BackendError: as ``build_engine``.
    """
    if not onnx.is_file():
        raise InputError(f"{onnx}: no such file; give the path of an .onnx file")
    trt = load_tensorrt() if trt is None else trt
    device = describe_device() if device is None else device
    folder = cache_folder("engines") if cache is None else cache
    key = cache_key(onnx, options, precision=precision, tensorrt=str(trt.__version__), device=device)
    entry = folder / key
    expected = _expected(onnx, options, precision, str(trt.__version__), device)
    if entry.exists():
        try:
            return entry / PLAN, _read_entry(entry, expected)
        except BundleError as error:
            warnings.warn(f"the cached engine is not used: {error}", stacklevel=2)
    folder.mkdir(parents=True, exist_ok=True)
    if options.timing_cache is None:
        machine = hashlib.sha256(f"{trt.__version__} {device.name} {device.driver}".encode()).hexdigest()[:16]
        options = replace(options, timing_cache=folder / f"timing-{machine}.cache")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".building-") as temporary:
        built = Path(temporary) / key
        facts = build_engine(
            onnx, built / PLAN, options, precision=precision, progress=progress, trt=trt, device=device
        )
        return entry / PLAN, _move(built, entry, facts, expected)


def cache_key(onnx: Path, options: EngineOptions, *, precision: Precision, tensorrt: str, device: Device) -> str:
    """Hash over all that decides which engine comes out: content, options, TensorRT, driver and GPU.

    The weights count, in the file or beside it: two nets of one shape never share an engine.
    """
    parts = _expected(onnx, options, precision, tensorrt, device)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ building


def _build(
    trt: Any, onnx: Path, options: EngineOptions, device: Device, monitoring: _Monitoring
) -> tuple[bytes, dict[str, int]]:
    """The plan, and its layers by type."""
    cudart = load_cudart()
    checked(cudart, cudart.cudaSetDevice(device.index), f"use GPU {device.index}")
    logger = shared_logger(trt)
    logger.errors.clear()
    logger.warnings.clear()
    try:
        builder = trt.Builder(logger)
    except TypeError:  # "factory function returned nullptr": the reason is in the log
        raise BackendError(f"TensorRT {trt.__version__} does not start: {quote(logger.errors)}") from None
    # 11.x has no other kind of network and ignores the flag; 10.x would choose precisions of its own without it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)  # owns the weights, so it lives until the engine is built
    _parse(trt, parser, logger, onnx)
    config = _configure(trt, builder, network, onnx, options)
    _load_timing_cache(config, logger, options.timing_cache)
    monitor = monitoring.monitor(trt)
    config.progress_monitor = monitor
    logger.errors.clear()
    built = builder.build_serialized_network(network, config)
    monitoring.raise_if_stopped()
    if built is None:
        raise BackendError(f"{onnx}: TensorRT {trt.__version__} built no engine: {quote(logger.errors)}")
    plan = bytes(built)
    if options.timing_cache is not None:
        timings = config.get_timing_cache()
        _write(options.timing_cache, bytes(timings.serialize()))
    return plan, _inspect(trt, logger, plan, network, options, onnx)


def _parse(trt: Any, parser: Any, logger: Any, onnx: Path) -> None:
    if not parser.parse_from_file(str(onnx)):  # by path: external data is found beside it
        found = []
        for i in range(parser.num_errors):
            parser_error = parser.get_error(i)
            node = f"{parser_error.node_operator()} {parser_error.node_name()}".strip()
            found.append(f"{node or 'the model'}: {' '.join(parser_error.desc().split())}")
        raise BackendError(
            f"{onnx}: TensorRT {trt.__version__} cannot parse it: {'; '.join(found) or quote(logger.errors)}"
        )


def _configure(trt: Any, builder: Any, network: Any, onnx: Path, options: EngineOptions) -> Any:
    config = builder.create_builder_config()
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector knows names only
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # TensorRT's default is on
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # With it, the plan would hold a library that runs on the host, which the runner never allows.
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    config.hardware_compatibility_level = {
        "none": trt.HardwareCompatibilityLevel.NONE,
        "same-compute-capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        "ampere-plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }[options.hardware_compatible]
    name, image = _image_input(network, onnx)
    profile = builder.create_optimization_profile()
    smallest, best, largest = ((batch, *image) for batch in options.batches)
    profile.set_shape(name, smallest, best, largest)
    if config.add_optimization_profile(profile) < 0:
        raise BackendError(f"{onnx}: TensorRT does not take images {list(smallest)} to {list(largest)}")
    return config


def _image_input(network: Any, onnx: Path) -> tuple[str, tuple[int, ...]]:
    """Name and [C, H, W] of the only input, whose batch is open."""
    tensors = []
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        tensors.append((str(tensor.name), tuple(int(size) for size in tensor.shape)))
    fits = len(tensors) == 1 and len(tensors[0][1]) == 4 and tensors[0][1][0] == -1 and min(tensors[0][1][1:]) > 0
    if not fits:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in tensors)
        raise BackendError(
            f"{onnx}: expected one input [batch, C, H, W] with an open batch and a fixed image size, "
            f"found {found or 'none'}; export it again"
        )
    name, shape = tensors[0]
    return name, shape[1:]


def _load_timing_cache(config: Any, logger: Any, path: Path | None) -> None:
    """Use the cache of an earlier build; one that TensorRT does not take is replaced, since it only saves time."""
    if path is None:
        return
    if path.is_file():
        timings = config.create_timing_cache(path.read_bytes())
        if timings is not None and config.set_timing_cache(timings, ignore_mismatch=False):
            return
        warnings.warn(
            f"{path}: TensorRT does not take this timing cache ({quote([*logger.errors, *logger.warnings])}), so it "
            "starts a new one there",
            stacklevel=2,
        )
    timings = config.create_timing_cache(b"")
    if not config.set_timing_cache(timings, ignore_mismatch=False):
        raise BackendError(f"TensorRT does not take an empty timing cache ({quote(logger.errors)})")


def _inspect(trt: Any, logger: Any, plan: bytes, network: Any, options: EngineOptions, onnx: Path) -> dict[str, int]:
    """The layers of the plan by type, with the shapes of the batch that it was tuned for."""
    runtime = new_runtime(trt, logger)
    engine = runtime.deserialize_cuda_engine(plan)
    context = None if engine is None else engine.create_execution_context()
    name, image = _image_input(network, onnx)
    if context is None or not context.set_input_shape(name, (options.batches[1], *image)):
        raise BackendError(f"{onnx}: TensorRT does not load the engine that it built: {quote(logger.errors)}")
    return inspect_layers(trt, engine, context)


def _check_precision(onnx: Path, precision: Precision, layers: Mapping[str, int], options: EngineOptions) -> None:
    """Refuse an engine of another precision than was asked for; TensorRT itself builds it without a word."""
    found = in_words(layers)
    if precision != "fp32" and not layers.get(precision):
        raise BackendError(
            f"{onnx}: asked for {precision}, but no layer of the engine computes in it (found {found}); "
            f"TensorRT takes the types from the ONNX file, so give one that was converted to {precision}"
        )
    narrower = {word: count for word, count in layers.items() if word not in ("fp32", "tf32", "unknown")}
    if precision == "fp32" and narrower:
        raise BackendError(
            f"{onnx}: asked for fp32, but the engine also computes in {in_words(narrower)}; give the fp32 ONNX file, "
            f"or ask for {next(iter(narrower))}"
        )
    if layers.get("tf32") and not options.tf32:
        raise BackendError(f"{onnx}: TF32 was switched off, but {layers['tf32']} layers of the engine compute in it")


class _Monitoring:
    """Progress, and a way to stop: TensorRT asks after each step whether to go on."""

    def __init__(self, progress: Progress | None, stop: threading.Event) -> None:
        self._progress = progress
        self._stop = stop
        self._error: BaseException | None = None

    def monitor(self, trt: Any) -> Any:
        """What TensorRT calls, on any thread."""
        step, stop = self._step, self._stop

        class Monitor(trt.IProgressMonitor):
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)
                self.steps: dict[str, int] = {}

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                self.steps[phase_name] = num_steps
                step(phase_name, 0.0)

            def step_complete(self, phase_name: str, step_number: int) -> bool:
                step(phase_name, min(1.0, (step_number + 1) / max(1, self.steps.get(phase_name, 1))))
                return not stop.is_set()

            def phase_finish(self, phase_name: str) -> None:
                step(phase_name, 1.0)
                self.steps.pop(phase_name, None)

        return Monitor()

    def raise_if_stopped(self) -> None:
        """What stopped the build, once TensorRT has returned."""
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise KeyboardInterrupt

    def _step(self, phase: str, share: float) -> None:
        """An exception must not reach TensorRT's own frames: keep it, and ask TensorRT to stop."""
        if self._progress is None or self._stop.is_set():
            return
        try:
            self._progress(phase, share)
        except BaseException as error:
            self._error = error
            self._stop.set()


def _in_a_thread(
    build: Callable[[threading.Event], tuple[bytes, dict[str, int]]],
) -> tuple[bytes, dict[str, int]]:
    """Build in a thread, so that Ctrl-C is seen at once here, and by TensorRT at its next step."""
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tensorrt") as pool:
        future = pool.submit(build, stop)
        try:
            return future.result()
        except KeyboardInterrupt:
            stop.set()
            raise  # leaving the pool waits for the build to end


# --------------------------------------------------------------------------------------------------------------- cache


def _expected(
    onnx: Path, options: EngineOptions, precision: Precision, tensorrt: str, device: Device
) -> dict[str, Any]:
    """What the facts of the right engine say, field by field."""
    return {
        **options.of_the_engine(),
        "precision": precision,
        "onnx_sha256": content_sha256(onnx),
        "tensorrt": tensorrt,
        "gpu": device.name,
        "compute_capability": device.compute_capability,
        "driver": device.driver,
    }


def _read_entry(entry: Path, expected: Mapping[str, Any]) -> EngineFacts:
    """The facts of a cache entry that is whole and what its name says.

    Raises:
        BundleError: it is not.
    """
    _, facts = read_engine(entry / PLAN)
    for field, value in expected.items():
        if getattr(facts, field) != value:
            raise BundleError(f"{entry}: {field} is {getattr(facts, field)}, but its key stands for {value}")
    return facts


def _move(built: Path, entry: Path, facts: EngineFacts, expected: Mapping[str, Any]) -> EngineFacts:
    """Put a finished entry in its place; where another process was first, theirs is the one that stays."""
    if entry.exists():
        try:
            return _read_entry(entry, expected)
        except BundleError:  # out of its place in one step, so that nobody sees it half gone
            aside = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".removed-"))
            with suppress(FileNotFoundError):  # another process was faster
                os.rename(entry, aside / entry.name)
            shutil.rmtree(aside)
    try:
        os.rename(built, entry)
    except OSError:  # it is there by now
        return _read_entry(entry, expected)
    return facts


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{threading.get_ident()}.{path.name}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
