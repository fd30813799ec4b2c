"""What a user can name on the command line, as a runner: a run, a bundle, a model file, or a backbone.

runs/digits           a run folder: the trained, frozen model
runs/digits/bundle    a bundle folder: its ONNX model, hashes checked
model.onnx            an ONNX file
compiled.pt2          an ExportedProgram, as prune-export leaves it in the run folder
resnet20_cifar        a timm name: the backbone as timm builds it, with random weights unless given some
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import timm
import torch
from google.protobuf.message import DecodeError
from mcruntime.bundle import load_bundle
from mcruntime.engine import OnnxRunner, Provider, Runner
from mcruntime.preprocess import Preprocessing
from rich.console import Console
from rich.progress import Progress, track
from torch import nn

import mcdeploy.backbones  # noqa: F401  registers our nets with timm
from mcdeploy.backends.onnx import export_onnx
from mcdeploy.backends.pytorch import TorchRunner
from mcdeploy.bench import BenchReport, compare_latency
from mcdeploy.checkpoint import FILE_NAME, load_checkpoint
from mcdeploy.compile.prune import count_macs, count_parameters
from mcdeploy.connectivity.stages import find_stages
from mcdeploy.connectivity.topology import StageWiring, Topology, chain_reads, count_edges
from mcdeploy.connectivity.wiring import topology_of, wired_stages
from mcdeploy.data import Loaders
from mcdeploy.errors import BackendError, InputError
from mcdeploy.evaluate import Accuracy, evaluate

Backend = Literal["pytorch", "compiled", "onnx", "cuda", "tensorrt", "pytorch-cuda", "compiled-cuda"]
BACKENDS = ("onnx", "pytorch", "compiled", "cuda", "tensorrt", "pytorch-cuda", "compiled-cuda")
KINDS = "a run folder, a bundle folder, an .onnx or .pt2 file, or a timm model name"


@dataclass(frozen=True)
class Target:
    """One of ``module`` and ``onnx`` is given. ``labels`` and ``preprocessing`` when the target knows them."""

    name: str
    module: nn.Module | None = None
    onnx: Path | None = None
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
    path = Path(text)
    if (path / "manifest.json").exists():
        return "bundle"
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
            return Target(
                text,
                onnx=bundle.model_path,
                image_size=manifest.preprocessing.image_size,
                labels=manifest.labels,
                preprocessing=manifest.preprocessing,
            )
        case "onnx":
            if (path.parent / "manifest.json").exists():  # the model inside a bundle
                return replace(open_file(str(path.parent)), name=text)
            return Target(text, onnx=path, image_size=_square([axis.dim_value for axis in _input_axes(path)[2:]]))
        case "pt2":
            try:
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


def _input_axes(path: Path) -> Sequence[Any]:
    try:
        return onnx.load(path, load_external_data=False).graph.input[0].type.tensor_type.shape.dim
    except (DecodeError, IndexError, OSError) as error:
        raise InputError(f"{path}: not a complete ONNX model ({type(error).__name__})") from None


def _square(sizes: Sequence[int]) -> int | None:
    """The side of square images, or None when the model takes any or other ones."""
    return int(sizes[0]) if len(sizes) == 2 and sizes[0] == sizes[1] and sizes[0] > 0 else None


def open_runner(target: Target, backend: Backend, stack: ExitStack, *, image_size: int, threads: int | None) -> Runner:
    """A runner on the backend that was asked for, not yet entered. A module on an ONNX backend is exported first.

    Args:
        stack: owns the temporary folder of such an export.

    Raises:
        BackendError: the target has no form for that backend.
    """
    name = f"{target.name} [{backend}]"
    if backend in ("onnx", "cuda", "tensorrt"):
        path = target.onnx
        if path is None:
            assert target.module is not None
            path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.onnx"
            export_onnx(target.module.eval(), path, torch.zeros(2, 3, image_size, image_size))
        provider: Provider = "cpu" if backend == "onnx" else backend
        return OnnxRunner(path, name=name, provider=provider, threads=threads)
    if target.module is None:
        raise BackendError(f"{target.name}: has no PyTorch form; give the run folder or its compiled.pt2 for {backend}")
    return TorchRunner(
        target.module,
        name=name,
        mode="compiled" if backend.startswith("compiled") else "eager",
        device="cuda" if backend.endswith("-cuda") else "cpu",
        threads=threads,
    )


def measure(
    targets: Sequence[Target],
    backends: Sequence[str],
    batches: Sequence[int],
    *,
    seconds: float,
    threads: int | None,
    image_size: int | None = None,
) -> BenchReport:
    """Time every target on every backend against the first, on noise, with interleaved rounds; see ``bench``.

    Raises:
        InputError: the targets disagree on the image size, or none of them says one.
        BackendError: a target has no form for a backend, or the machine lacks it.
    """
    sizes = {target.image_size for target in targets if target.image_size} if image_size is None else {image_size}
    if len(sizes) != 1:
        found = ", ".join(f"{target.name}: {target.image_size or 'unknown'}" for target in targets)
        raise InputError(f"bench: the models need one image size ({found}); give --image-size")
    size = sizes.pop()
    noise = np.random.default_rng(0).standard_normal((max(batches), 3, size, size)).astype(np.float32)
    progress = Progress(transient=True, disable=not Console().is_terminal)
    with ExitStack() as stack, progress:
        bar = progress.add_task("bench", total=1.0)
        runners = [
            open_runner(target, backend, stack, image_size=size, threads=threads)  # type: ignore[arg-type]
            for target in targets
            for backend in backends
        ]
        asked = {"onnx": "cpu", "cuda": "cuda", "tensorrt": "tensorrt"}
        providers = {
            f"{target.name} [{backend}]": asked[backend]
            for target in targets
            for backend in backends
            if backend in asked
        }
        return compare_latency(
            runners,
            {batch: noise[:batch] for batch in batches},
            seconds=seconds,
            providers=providers,
            progress=lambda what, share: progress.update(bar, description=what, completed=share),
        )


def evaluate_target(target: Target, loaders: Loaders, *, image_size: int) -> Accuracy:
    """Top-1 of a target in fp32 on the CPU, over all validation images.

    Raises:
        InputError: the data's classes are not the target's.
    """
    if target.labels is not None and list(target.labels) != loaders.classes:
        odd = sorted(set(target.labels) ^ set(loaders.classes))
        raise InputError(
            f"{target.name}: was trained on other classes than the data has, such as {(odd or ['order'])[0]}"
        )
    with ExitStack() as stack:
        backend: Backend = "pytorch" if target.module is not None else "onnx"
        runner = stack.enter_context(open_runner(target, backend, stack, image_size=image_size, threads=None))
        return evaluate(
            lambda images: torch.from_numpy(runner.infer(images.numpy())),
            track(loaders.val, "evaluating", transient=True, disable=not Console().is_terminal),
        )


def describe_model(target: Target, image_size: int) -> Topology:
    """Print stages, parameters and MACs of a model, and return its wiring; a plain backbone's is a chain.

    Raises:
        InputError: only a run or a backbone still has blocks.
        WiringError: the backbone has no stage to wire.
    """
    model = target.module
    if model is None:
        raise InputError(f"{target.name}: an exported graph has no blocks left to show; give the run folder")
    example = torch.zeros(2, 3, image_size, image_size)
    if wired_stages(model):
        topology = topology_of(model)
    else:
        stages = find_stages(model, example)
        topology = Topology(
            tuple(
                StageWiring(stage.name, stage.blocks, chain_reads(s, len(stage.blocks)))
                for s, stage in enumerate(stages)
            )
        )
    live = topology.live()
    print(f"{target.name}: {count_parameters(model):,} parameters, {count_macs(model, example):,} MACs an image")
    print(
        f"{len(topology.edges())} blocks, {len(topology.dead_blocks())} of them dead, "
        f"{count_edges(topology, live)} live edges"
    )
    for stage in topology.stages:
        print(f"  {stage.name}")
        for name, reads in zip(stage.blocks, stage.reads, strict=True):
            sources = ", ".join(topology.describe(node) for node in reads)
            dead = "" if any(topology.describe(node) == f"{stage.name}.{name}" for node in live) else "  (dead)"
            print(f"    {name} reads {sources}{dead}")
    return topology
