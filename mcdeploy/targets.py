"""What a user can name on the command line, as a runner: a run, a bundle, a model file, or a backbone.

runs/digits           a run folder: the trained, frozen model
runs/digits/bundle    a bundle folder: the model it serves, hashes checked; runs/digits/bundle@int8 is another one of it
model.onnx            an ONNX file
compiled.pt2          an ExportedProgram, as prune-export leaves it in the run folder
resnet20_cifar        a timm name: the backbone as timm builds it, with random weights unless given some
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
import timm
import torch
from google.protobuf.message import DecodeError
from mcruntime.batches import AnyBatch
from mcruntime.bundle import load_bundle, split_key
from mcruntime.cgroup import available_threads
from mcruntime.engine import Batches, OnnxRunner, Provider, Runner, Types
from mcruntime.preprocess import Preprocessing
from rich.console import Console
from rich.progress import Progress, track
from torch import nn

from mcdeploy.backbones.nnmass_cells import Cell, CellNet, Links
from mcdeploy.backbones.sparsenet import SparseNet
from mcdeploy.backends.onnx import export_onnx
from mcdeploy.backends.pytorch import TorchRunner
from mcdeploy.bench import compare_latency
from mcdeploy.bench_images import ImagesReport, compare_over_images
from mcdeploy.bench_report import BenchReport, check_comparable
from mcdeploy.checkpoint import FILE_NAME, load_checkpoint
from mcdeploy.compile.dynamic import count_wirings, open_everything
from mcdeploy.compile.prune import count_macs, count_parameters, freeze
from mcdeploy.connectivity.ddw import DynamicStage, adjacencies, dynamic_stages
from mcdeploy.connectivity.nnmass import describe_mass, nn_mass_of_model
from mcdeploy.connectivity.stages import find_stages
from mcdeploy.connectivity.topology import Node, StageWiring, Topology, chain_reads, count_edges
from mcdeploy.connectivity.wiring import candidates_of, gate_values, topology_of, wired_stages
from mcdeploy.data import Loaders
from mcdeploy.draw import EdgeValues, draw_wiring, gate_values_of, joins_of, open_shares_of, wiring_page
from mcdeploy.errors import BackendError, InputError, WiringError
from mcdeploy.evaluate import Accuracy, evaluate
from mcdeploy.gpu_state import GpuWatch
from mcdeploy.memory import peak_activation_bytes
from mcdeploy.profile import Profile, check_profiled, profile_module, profile_onnx, profile_openvino
from mcdeploy.wiring_file import last_gates

Backend = Literal[
    "onnx", "openvino", "pytorch", "compiled", "onnx-cuda", "onnx-tensorrt", "tensorrt", "pytorch-cuda", "compiled-cuda"
]
BACKENDS: tuple[str, ...] = get_args(Backend)
# What the runner must say it runs on; PyTorch's says it of its own tensors and is held to its device on loading.
PROVIDER_OF = {
    "onnx": "cpu",
    "openvino": "cpu",
    "onnx-cuda": "cuda",
    "onnx-tensorrt": "tensorrt",
    "tensorrt": "tensorrt",
    "pytorch": "cpu",
    "compiled": "cpu",
    "pytorch-cuda": "cuda",
    "compiled-cuda": "cuda",
}
DEVICE_TIMED = ("tensorrt", "pytorch-cuda", "compiled-cuda")  # by the GPU's own clock
ONNX_PROVIDERS: dict[str, Provider] = {"onnx": "cpu", "onnx-cuda": "cuda", "onnx-tensorrt": "tensorrt"}
KINDS = "a run folder, a bundle folder, an .onnx or .pt2 file, or a timm model name"


@dataclass(frozen=True)
class Target:
    """One of ``module``, ``onnx`` and ``engine``; ``labels`` and ``preprocessing`` when the target knows them."""

    name: str
    module: nn.Module | None = None
    onnx: Path | None = None
    engine: Path | None = None  # a TensorRT plan, for the GPU that it was built on
    batches: Batches | None = None  # of the engine: smallest, usual, largest
    image_size: int | None = None
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    has_weights: bool = True  # False: a backbone with random ones, good for timing only
    has_data: bool = False  # knows the images it was trained on


def kind_of(text: str) -> Literal["run", "bundle", "onnx", "pt2", "backbone"]:
    """What kind of thing a user named.

    Raises:
        InputError: none that we know; says what can be named.
    """
    path, (folder, key) = Path(text), split_key(text)
    if (folder / "manifest.json").exists():
        return "bundle"
    if key is not None and (folder / FILE_NAME).exists():
        raise InputError(
            f"{text}: a run has no models of several precisions, its bundle has; name {folder}/bundle@{key}"
        )
    if (path / FILE_NAME).exists():
        return "run"
    if path.suffix == ".onnx" and path.is_file():
        return "onnx"
    if path.suffix == ".pt2" and path.is_file():
        return "pt2"
    if timm.is_model(text):
        return "backbone"
    there = "holds neither a checkpoint nor a manifest" if path.is_dir() else "no such file, folder or timm model"
    raise InputError(f"{text}: {there}; give {KINDS}")


def open_file(text: str) -> Target:
    """A bundle, an .onnx or a .pt2 file.

    Raises:
        BundleError: the bundle is not what its manifest says.
        InputError: the .pt2 file cannot be read.
    """
    path = Path(text)
    match kind_of(text):
        case "bundle":
            bundle = load_bundle(path)
            manifest = bundle.manifest
            is_engine = bundle.model.backend == "tensorrt"
            return Target(
                text,
                onnx=None if is_engine else bundle.model_path,
                engine=bundle.model_path if is_engine else None,
                batches=bundle.model.engine.batch if bundle.model.engine else None,
                image_size=manifest.preprocessing.image_size,
                labels=manifest.labels,
                preprocessing=manifest.preprocessing,
            )
        case "onnx":
            if (path.parent / "manifest.json").exists():  # a model inside a bundle
                models = load_bundle(path.parent).manifest.models
                key = next((key for key, model in models.items() if model.file == path.name), None)
                return replace(open_file(f"{path.parent}@{key}" if key else str(path.parent)), name=text)
            return Target(text, onnx=path, image_size=_square([axis.dim_value for axis in _input_axes(path)[2:]]))
        case "pt2":
            try:
                with _quiet():
                    program = torch.export.load(path)
                shape = program.example_inputs[0][0].shape
                target = Target(text, module=program.module(), image_size=_square(shape[2:]))
                if (path.parent / FILE_NAME).exists():  # beside the run it was compiled from
                    header = load_checkpoint(path.parent).header
                    how = Preprocessing.model_validate_json(json.dumps(header["preprocessing"]))
                    target = replace(target, labels=tuple(header["classes"]), preprocessing=how)
                return target
            except Exception as error:  # torch.export's loader raises many kinds
                raise InputError(f"{text}: not a complete ExportedProgram ({type(error).__name__})") from None
    raise InputError(f"{text}: expected a bundle folder, an .onnx or a .pt2 file")


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs the traceback of what it raises; ours is the one sentence about it."""
    logger = logging.getLogger("torch.export")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def _input_axes(path: Path) -> Sequence[Any]:
    try:
        return onnx.load(path, load_external_data=False).graph.input[0].type.tensor_type.shape.dim
    except (DecodeError, IndexError, OSError) as error:
        raise InputError(f"{path}: not a complete ONNX model ({type(error).__name__})") from None


def _square(sizes: Sequence[int]) -> int | None:
    """The side of square images, or None when the model takes any or other ones."""
    return int(sizes[0]) if len(sizes) == 2 and sizes[0] == sizes[1] and sizes[0] > 0 else None


def as_backend(text: str) -> Backend:
    """The backend of that name.

    Raises:
        InputError: there is none; says which there are.
    """
    for backend in get_args(Backend):
        if backend == text:
            return backend
    raise InputError(f"unknown backend {text!r}; valid are {', '.join(BACKENDS)}")


def pairs_of(targets: Sequence[Target], backends: Sequence[str]) -> list[tuple[Target, Backend]]:
    """What will run on what: every target on every backend, but an engine on ``tensorrt`` alone.

    A target that is named twice is measured twice, which shows what a difference of nothing looks like; the second is
    called ``X (2)``.

    Raises:
        InputError: an unknown backend.
        BackendError: an engine, and ``tensorrt`` is not among the backends.
    """
    found: list[tuple[Target, Backend]] = []
    names: set[str] = set()
    for target in targets:
        if target.engine is not None and "tensorrt" not in backends:
            raise BackendError(
                f"{target.name}: is a TensorRT engine; ask for --backend tensorrt, or name another model"
            )
        for backend in map(as_backend, backends):
            if target.engine is not None and backend != "tensorrt":
                continue
            twin, number = target, 1
            while runner_name(twin, backend) in names:
                number += 1
                twin = replace(target, name=f"{target.name} ({number})")
            names.add(runner_name(twin, backend))
            found.append((twin, backend))
    return found


def runner_name(target: Target, backend: Backend) -> str:
    """What tables call a target on a backend."""
    return f"{target.name} [{backend}]"


def open_runner(
    target: Target,
    backend: Backend,
    stack: ExitStack,
    *,
    image_size: int,
    threads: int | None,
    batches: Sequence[int] = (1,),
    cold_l2: bool = False,
    progress: Callable[[str, float], None] | None = None,
) -> Runner:
    """A runner on the backend that was asked for, not yet entered. A module is exported first where ONNX is needed.

    Args:
        stack: owns the temporary folder of such an export.
        batches: what will be run; TensorRT engines are built for these, and tuned for the largest.
        cold_l2: of the backends in ``DEVICE_TIMED``: overwrite the GPU's L2 cache before every timed inference.
        progress: is told how far the building of an engine is, 0 to 1.

    Raises:
        BackendError: the target has no form for that backend, or TensorRT could not build it.
    """
    name = runner_name(target, backend)
    if target.engine is not None:
        if backend != "tensorrt":
            raise BackendError(
                f"{target.name}: is a TensorRT engine; ask for --backend tensorrt, or name another model"
            )
        from mcruntime.tensorrt import TensorRTRunner

        return TensorRTRunner(target.engine, name=name, cold_l2=cold_l2)
    if backend in ONNX_PROVIDERS or backend in ("openvino", "tensorrt"):
        path = _onnx_of(target, stack, image_size)
        if backend == "openvino":
            from mcdeploy.backends.openvino import OpenVINORunner

            return OpenVINORunner(path, name=name, threads=threads)
        span = (min(batches), max(batches), max(batches))
        if backend.endswith("tensorrt"):
            _refuse_cpu_int8(path, target.name)
        if backend == "tensorrt":
            return _native_tensorrt(path, name, span, cold_l2, progress)
        types = _types_of(path) if backend == "onnx-tensorrt" else "fp32"
        return OnnxRunner(path, name=name, provider=ONNX_PROVIDERS[backend], threads=threads, batches=span, types=types)
    if target.module is None:
        raise BackendError(f"{target.name}: has no PyTorch form; give the run folder or its compiled.pt2 for {backend}")
    return TorchRunner(
        target.module,
        name=name,
        mode="compiled" if backend.startswith("compiled") else "eager",
        device="cuda" if backend.endswith("-cuda") else "cpu",
        threads=threads,
        cold_l2=cold_l2,
    )


def _onnx_of(target: Target, stack: ExitStack, image_size: int) -> Path:
    """The target's ONNX file, or its module exported to one that lives as long as ``stack``."""
    if target.onnx is not None:
        return target.onnx
    assert target.module is not None
    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.onnx"
    export_onnx(target.module.eval(), path, torch.zeros(2, 3, image_size, image_size))
    return path


def _types_of(path: Path) -> Types:
    """The lowest type that a heavy node of the file computes in."""
    from mcdeploy.backends.readback import read_facts

    lowest = read_facts(path).precision.split()[0]
    return "fp16" if lowest == "fp16" else "int8" if lowest == "int8" else "fp32"


def _refuse_cpu_int8(path: Path, name: str) -> None:
    """TensorRT takes signed 8 bits with zero point 0 only; the int8 file for ONNX Runtime's CPU kernels is another.

    Raises:
        BackendError: it is such a file.
    """
    graph = onnx.load(path, load_external_data=False).graph
    unsigned = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.UINT8}
    if any(node.op_type == "QuantizeLinear" and unsigned & set(node.input[2:]) for node in graph.node):
        raise BackendError(
            f"{name}: its int8 file is the one for CPUs, which TensorRT refuses; "
            "prune-export --backend tensorrt --precision int8 makes an engine"
        )


def _native_tensorrt(
    path: Path,
    name: str,
    batches: tuple[int, int, int],
    cold_l2: bool,
    progress: Callable[[str, float], None] | None,
) -> Runner:
    from mcruntime.tensorrt import TensorRTRunner

    from mcdeploy.backends.tensorrt import EngineOptions, cached_engine

    plan, _ = cached_engine(path, EngineOptions(batches=batches), precision=_types_of(path), progress=progress)
    return TensorRTRunner(plan, name=name, cold_l2=cold_l2)


def _with_precision(report: BenchReport, runners: Sequence[tuple[Runner, Backend, Path | None]]) -> BenchReport:
    """Adds to the facts in which type the heavy nodes of an ONNX file really run, where the runtime tells; ONNX
    Runtime's TensorRT provider does not, so there the facts give the file's types and say so."""
    from mcdeploy.backends.readback import precision_of, read_facts, running_types

    found: dict[str, str] = {}
    for runner, backend, path in runners:
        if path is not None and backend in ("onnx", "onnx-cuda"):
            running = running_types(path, "cpu" if backend == "onnx" else "cuda")
            found[runner.name] = precision_of(read_facts(path).nodes, running)
        elif path is not None and backend == "onnx-tensorrt":
            found[runner.name] = f"{read_facts(path).precision}, not readable from the engine"
    return replace(
        report,
        runners=tuple(
            replace(row, facts={"precision": found[row.name], **row.facts}) if row.name in found else row
            for row in report.runners
        ),
    )


def measure(
    targets: Sequence[Target],
    backends: Sequence[str],
    batches: Sequence[int],
    *,
    seconds: float,
    threads: int | None,
    image_size: int | None = None,
    until: float = 0.02,
    lock_clocks: bool = False,
    cold_l2: bool = False,
    baseline: BenchReport | None = None,
) -> BenchReport:
    """Time every target on every backend against the first, on noise, with interleaved rounds; see ``bench``.

    What runs on what is in ``pairs_of``. The facts of an ONNX file in ONNX Runtime say in which type its heavy nodes
    run after the runtime's own passes.

    Args:
        baseline: an earlier report that this one will be held against; one that cannot be is refused before the work.

    Raises:
        InputError: the targets disagree on the image size, or none of them says one; a GPU's clock or cache shall be
            held where a backend has none; the baseline is one of other models or batch sizes.
        BackendError: a target has no form for a backend, or the machine lacks it.
    """
    pairs = pairs_of(targets, backends)
    if baseline is not None:
        check_comparable([runner_name(*pair) for pair in pairs], batches, baseline)
    on_gpu = any(PROVIDER_OF[backend] != "cpu" for _, backend in pairs)
    if lock_clocks and not on_gpu:
        raise InputError("--lock-clocks: holds a GPU's clock, but no backend runs on a GPU; name one, or leave it out")
    if cold_l2 and (others := sorted({*backends} - {*DEVICE_TIMED})):
        raise InputError(
            f"--cold-l2: empties a GPU's cache between inferences that the GPU itself times, and the host times "
            f"{', '.join(others)}; ask for {', '.join(DEVICE_TIMED)} alone, or leave it out"
        )
    sizes = {target.image_size for target in targets if target.image_size} if image_size is None else {image_size}
    if len(sizes) != 1:
        found = ", ".join(f"{target.name}: {target.image_size or 'unknown'}" for target in targets)
        raise InputError(f"bench: the models need one image size ({found}); give --image-size")
    size = sizes.pop()
    noise = np.random.default_rng(0).standard_normal((max(batches), 3, size, size)).astype(np.float32)
    progress = Progress(transient=True, disable=not Console().is_terminal)
    with ExitStack() as stack, progress:
        bar = progress.add_task("bench", total=1.0)

        def tell(what: str, share: float) -> None:
            progress.update(bar, description=what, completed=share)

        opened = []
        for target, backend in pairs:
            needs_file = target.engine is None and ("onnx" in backend or target.module is None)
            path = _onnx_of(target, stack, size) if needs_file else None
            runner = open_runner(
                target if path is None else replace(target, onnx=path),
                backend,
                stack,
                image_size=size,
                threads=threads,
                batches=batches,
                cold_l2=cold_l2,
                progress=tell,
            )
            opened.append((runner, backend, path))
        report = compare_latency(
            [runner for runner, _, _ in opened],
            {batch: noise[:batch] for batch in batches},
            seconds=seconds,
            until=until,
            threads=threads,
            gpu=GpuWatch(lock_clocks=lock_clocks) if on_gpu else None,
            providers={runner.name: PROVIDER_OF[backend] for runner, backend, _ in opened},
            progress=tell,
        )
        return _with_precision(report, opened)


def profile_targets(
    targets: Sequence[Target],
    backends: Sequence[str],
    batch: int,
    *,
    threads: int | None,
    image_size: int | None = None,
) -> list[Profile]:
    """Where the time goes in every target, by block, on the backends in ``PROFILED``; see ``profile``.

    Raises:
        InputError: another backend, or no image size.
        BackendError: a target has no form for a backend.
    """
    check_profiled(backends)
    found = []
    for target, backend in pairs_of(targets, backends):
        size = image_size or target.image_size
        if size is None:
            raise InputError(f"{target.name}: does not say its image size; give --image-size")
        noise = np.random.default_rng(0).standard_normal((batch, 3, size, size)).astype(np.float32)
        name = runner_name(target, backend)
        if backend in ("onnx", "openvino"):
            look = profile_onnx if backend == "onnx" else profile_openvino
            with ExitStack() as stack:
                found.append(look(_onnx_of(target, stack, size), noise, name=name, threads=threads))
        elif target.module is None:
            raise BackendError(f"{target.name}: has no PyTorch form; give the run folder or its compiled.pt2")
        else:
            found.append(profile_module(target.module, noise, name=name, threads=threads or available_threads()))
    return found


def measure_over_images(
    targets: Sequence[Target],
    backends: Sequence[str],
    loaders: Loaders,
    count: int,
    *,
    threads: int | None,
    rounds: int = 5,
) -> ImagesReport:
    """Time every target on every backend on validation images, one at a time; see ``bench_images``.

    Before a run with per-image wirings comes its all-open net: the same weights, every edge open, nothing skipped. The
    first runner is what the others are held against.

    Args:
        count: how many images, spread evenly over the validation set; all of them if there are fewer.

    Raises:
        BackendError: a target has no form for a backend, or the machine lacks it.
    """
    dataset, size = loaders.val.dataset, loaders.preprocessing.image_size
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int))  # type: ignore[arg-type]
    images = dataset.__getitems__(chosen.tolist())[0]  # type: ignore[attr-defined]
    everything: list[Target] = []
    wirings: dict[int, int] = {}  # by the module's id
    for target in targets:
        dynamic = target.module is not None and dynamic_stages(target.module)
        if target.module is not None and dynamic:
            everything.append(replace(target, name=f"{target.name}, all open", module=open_everything(target.module)))
            wirings[id(target.module)] = count_wirings(target.module.eval(), images)
        everything.append(target)
    progress = Progress(transient=True, disable=not Console().is_terminal)
    with ExitStack() as stack, progress:
        bar = progress.add_task("bench", total=1.0)

        def tell(what: str, share: float) -> None:
            progress.update(bar, description=what, completed=share)

        pairs = sorted(pairs_of(everything, backends), key=lambda pair: backends.index(pair[1]))
        runners = [
            open_runner(target, backend, stack, image_size=size, threads=threads, progress=tell)
            for target, backend in pairs
        ]
        return compare_over_images(
            runners,
            images.numpy().astype(np.float32),
            wirings={
                runner_name(target, backend): wirings[id(target.module)]
                for target, backend in pairs
                if id(target.module) in wirings
            },
            rounds=rounds,
            providers={runner_name(target, backend): PROVIDER_OF[backend] for target, backend in pairs},
            progress=tell,
        )


def evaluate_target(target: Target, loaders: Loaders, *, image_size: int) -> Accuracy:
    """Top-1 of a target over all validation images, in the types that it holds: a module in PyTorch and a file in
    ONNX Runtime, both on the CPU, an engine in TensorRT on its GPU.

    Raises:
        InputError: the data's classes are not the target's.
        BackendError: an engine, and no GPU that it was built for.
    """
    if target.labels is not None and list(target.labels) != loaders.classes:
        odd = sorted(set(target.labels) ^ set(loaders.classes))
        raise InputError(
            f"{target.name}: was trained on other classes than the data has, such as {(odd or ['order'])[0]}"
        )
    with ExitStack() as stack:
        backend: Backend = "pytorch" if target.module is not None else "tensorrt" if target.engine else "onnx"
        runner = open_runner(target, backend, stack, image_size=image_size, threads=None)
        runner = stack.enter_context(AnyBatch(runner, target.batches) if target.batches else runner)
        return evaluate(
            lambda images: torch.from_numpy(runner.infer(images.numpy())),
            track(loaders.val, "evaluating", transient=True, disable=not Console().is_terminal),
        )


@dataclass(frozen=True)
class Inspection:
    """What ``inspect`` knows of one target."""

    name: str
    numbers: dict[str, float]  # parameters, macs, ...: as ``NUMBERS`` describes them
    topology: Topology | None  # None: nothing to draw
    candidates: Topology | None = None  # what each block could have read, where that is known
    values: EdgeValues | None = None
    notes: tuple[str, ...] = ()  # what is missing or has another meaning, and why
    masses: tuple[str, ...] = ()  # NN-Mass by cell, in words

    def to_json(self) -> dict[str, Any]:
        wiring = None if self.topology is None else self.topology.to_json()["stages"]
        said = {"notes": list(self.notes), "masses": list(self.masses)}
        return {"name": self.name, **self.numbers, "stages": wiring, **said}


NUMBERS = {
    "parameters": "parameters",
    "macs": "MACs an image",
    "peak_activation_bytes": "peak activation bytes",
    "nn_mass": "NN-Mass",
    "density": "density of skips",
    "average_degree": "average degree",
    "blocks": "blocks",
    "dead_blocks": "dead blocks",
    "live_edges": "live edges",
}


def inspect_target(target: Target, image_size: int, loaders: Loaders | None = None) -> Inspection:
    """Costs and wiring of a run or a backbone; a plain backbone's wiring is a chain.

    Args:
        loaders: validation images to measure a dynamic wiring on; default: what the last epoch's images showed.

    Raises:
        InputError: only a run or a backbone still has blocks, the model does not take images of that size, or its
            wiring is the same for all images and ``loaders`` were given.
    """
    model = target.module
    if model is None or isinstance(model, torch.fx.GraphModule):
        raise InputError(f"{target.name}: an exported graph has no blocks left to show; give the run folder")
    dynamic = dynamic_stages(model)
    if loaders is not None and not dynamic:
        raise InputError(f"--data: is for wirings that depend on the image, and that of {target.name} does not")
    example, topology, notes = torch.zeros(1, 3, image_size, image_size), None, []
    try:
        topology = _wiring_of(model, example)
    except WiringError as error:
        notes.append(f"no wiring to draw: {error}")
    if dynamic:
        notes.append("the wiring depends on the image; the costs are those with every edge open")
    everything = open_everything(model) if dynamic else copy.deepcopy(model)
    freeze(everything)  # what still learns costs what its best sources cost
    try:
        numbers: dict[str, float] = {"parameters": count_parameters(model), "macs": count_macs(everything, example)}
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise InputError(
            f"{target.name}: does not run on images of {image_size} pixels ({_first_line(error)})"
        ) from error
    try:
        numbers["peak_activation_bytes"] = peak_activation_bytes(everything, example)
    except Exception as error:  # torch.export raises many kinds
        notes.append(
            f"peak activation memory is not known: torch.export cannot follow the model ({_first_line(error)})"
        )
    with suppress(WiringError):  # blocks that it does not know
        mass = nn_mass_of_model(model)
        numbers["nn_mass"], numbers["density"], numbers["average_degree"] = mass.total(), mass.density(), mass.degree()
    masses = describe_mass(everything, example)
    if topology is None:
        return Inspection(target.name, numbers, None, notes=tuple(notes), masses=masses)
    numbers["blocks"] = len(topology.edges()) - len(joins_of(topology))
    numbers["dead_blocks"] = len(topology.dead_blocks())
    numbers["live_edges"] = count_edges(topology, topology.live())
    if dynamic:
        shares = _measure_wirings(model, loaders) if loaders else (gate_values(model),)
        return Inspection(target.name, numbers, topology, None, open_shares_of(topology, *shares), tuple(notes), masses)
    return Inspection(target.name, numbers, topology, *_learned(target, model), tuple(notes), masses)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _wiring_of(model: nn.Module, example: torch.Tensor) -> Topology:
    """The wiring of a model: what wires it, what a backbone says of itself, or else the chains of its stages.

    Raises:
        WiringError: none of that is there.
    """
    if wired_stages(model):
        return topology_of(model)
    if isinstance(model, SparseNet):
        return Topology(model.wiring())
    if isinstance(model, CellNet):
        return Topology(tuple(_as_stage(c, cell.links) for c, cell in enumerate(_cells(model))))
    stages = find_stages(model, example)
    return Topology(
        tuple(
            StageWiring(stage.name, stage.blocks, chain_reads(s, len(stage.blocks))) for s, stage in enumerate(stages)
        )
    )


def _cells(model: CellNet) -> list[Cell]:
    return [cell for cell in model.cells if isinstance(cell, Cell)]


def _as_stage(cell: int, links: Links) -> StageWiring:
    """A cell of random links; node i is layer i. Layers read the one before them and some channels of earlier ones."""
    reads = tuple(
        (*(Node(cell, source) for source, channels in enumerate(row) if channels), Node(cell, i - 1))
        for i, row in enumerate(links[1:], start=1)
    )
    return StageWiring(f"cells.{cell}", tuple(f"layers.{i}" for i in range(len(reads))), reads)


def _learned(target: Target, model: nn.Module) -> tuple[Topology | None, EdgeValues | None]:
    """What the blocks could have read, and the numbers of those edges: the model's own, or those of its run."""
    stages = wired_stages(model)
    if isinstance(model, CellNet) and not stages:
        return None, _channels_read(model)
    if not stages:
        return None, None
    run = Path(target.name)
    if not (run / FILE_NAME).exists():
        return candidates_of(model), gate_values_of(candidates_of(model), gate_values(model))
    candidates = Topology.from_json(load_checkpoint(run).header["candidates"])
    return candidates, gate_values_of(candidates, last_gates(run / "metrics.jsonl"))


def _channels_read(model: CellNet) -> EdgeValues:
    values, says = {}, {}
    for c, cell in enumerate(_cells(model)):
        for i, row in enumerate(cell.links[1:], start=1):
            for source, count in enumerate((*map(len, row), cell.width)):
                if count:
                    edge = Node(c, source), Node(c, i)
                    values[edge], says[edge] = count / cell.width, f"{count} of {cell.width} channels"
    return EdgeValues("share of channels that is read", values, says)


def _measure_wirings(model: nn.Module, loaders: Loaders) -> tuple[dict[str, list[list[float]]], ...]:
    """For every edge of a dynamic wiring the share of images for which it is open, and its mean weight then."""
    opened: dict[str, torch.Tensor] = {}
    weighed: dict[str, torch.Tensor] = {}
    count = 0
    for images, _ in track(loaders.val, "measuring", transient=True, disable=not Console().is_terminal):
        count += len(images)
        for name, wirings in adjacencies(model, images).items():
            opened[name] = opened.get(name, 0) + wirings.open_BNN.double().sum(0)
            weighed[name] = weighed.get(name, 0) + (wirings.weights_BNN * wirings.open_BNN).double().sum(0)

    def by_source(name: str, stage: DynamicStage, numbers_NN: torch.Tensor) -> list[list[float]]:
        rows = stage.wiring(name).reads
        return [[float(numbers_NN[node.index, j]) for node in row] for j, row in enumerate(rows, start=1)]

    stages = dynamic_stages(model)
    return (
        {name: by_source(name, stages[name], total_NN / count) for name, total_NN in opened.items()},
        {name: by_source(name, stages[name], weighed[name] / opened[name].clamp_min(1)) for name in opened},
    )


def describe_model(found: Inspection) -> None:
    """Print what ``inspect_target`` found."""
    numbers, topology = found.numbers, found.topology
    print(f"{found.name}: {numbers['parameters']:,} parameters, {numbers['macs']:,} MACs an image")
    if "peak_activation_bytes" in numbers:
        print(f"{numbers['peak_activation_bytes']:,} bytes of feature maps alive at the peak, for one image")
    for line in found.masses:
        print(line)
    for note in found.notes:
        print(note)
    if topology is None:
        return
    print(f"{numbers['blocks']} blocks, {numbers['dead_blocks']} of them dead, {numbers['live_edges']} live edges")
    live = topology.live()
    for s, stage in enumerate(topology.stages):
        print(f"  {stage.name}")
        for i, (name, reads) in enumerate(zip(stage.blocks, stage.reads, strict=True), start=1):
            sources = ", ".join(topology.describe(node) for node in reads)
            print(f"    {name} reads {sources}{'' if Node(s, i) in live else '  (dead)'}")


def compare_costs(found: Sequence[Inspection]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a table of all numbers, one column a target, with ratios to the first target's."""
    rows = []
    for key, label in NUMBERS.items():
        if any(key in one.numbers for one in found):
            first = found[0].numbers.get(key)
            rows.append([label, *(_against(one.numbers.get(key), first, one is found[0]) for one in found)])
    return ["", *(one.name for one in found)], rows


def _against(value: float | None, first: float | None, is_first: bool) -> str:
    if value is None:
        return "-"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return text if is_first or not first else f"{text} ({value / first:.3g} x)"


def notes_on(found: Sequence[Inspection]) -> list[str]:
    """The notes of all targets, each with the name of its target."""
    return [f"{one.name}: {note}" for one in found for note in one.notes]


def draw_inspections(found: Sequence[Inspection], *, as_page: bool) -> str:
    """The wirings as an HTML page with the costs, or that of a single target as an SVG.

    Raises:
        InputError: no target has a wiring.
    """
    pictures = [
        draw_wiring(one.topology, title=one.name, candidates=one.candidates, values=one.values)
        for one in found
        if one.topology is not None
    ]
    if not pictures:
        raise InputError(f"--out: there is no wiring to draw in {', '.join(one.name for one in found)}")
    if not as_page:
        return pictures[0]
    heads, rows = compare_costs(found)
    title = " against ".join(one.name for one in found)
    return wiring_page(title, pictures, heads if len(found) > 1 else (), rows, notes=notes_on(found))
