"""Where the time of one inference goes, by the names of the PyTorch blocks, and the same for two models side by side.

ONNX Runtime's own profiler says how long each of its nodes took. Nodes that it fused lose their name and carry that of
the tensor they write; the file says which node wrote that tensor, and our files name their nodes after modules.
OpenVINO says of each of its layers how long it took and which nodes of the file went into it. In PyTorch, hooks around
the leaf modules read the clock. All of that costs time itself, so the shares count, and the latency is ``bench``'s.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from mcdeploy.errors import BackendError, InputError, MissingExtraError

WARMUP_RUNS = 3
ROUNDING = ("QuantizeLinear", "DequantizeLinear")
PROFILED = ("onnx", "openvino", "pytorch")  # backends
OWN = "(added by the runtime)"  # nodes that no node of the file stands for: reordering of memory
# As timm names blocks: layer1.0, blocks.1.0, stages.0.blocks.1; what comes before the first number has no blocks.
BLOCK = re.compile(r"^(?:[A-Za-z_]\w*\.)*?[A-Za-z_]\w*(?:\.\d+)+(?:\.blocks\.\d+)?(?=[./#]|$)")


@dataclass(frozen=True)
class LayerTime:
    """One node or module: median microseconds of one inference."""

    name: str
    block: str
    kind: str  # operator or class
    microseconds: float


@dataclass(frozen=True)
class Profile:
    """One model at one batch size, in the order of running."""

    name: str
    batch: int
    runs: int
    layers: tuple[LayerTime, ...]

    @property
    def total_us(self) -> float:
        return sum(layer.microseconds for layer in self.layers)

    def by_block(self) -> dict[str, float]:
        """Microseconds by block, in the order of running."""
        found: dict[str, float] = defaultdict(float)
        for layer in self.layers:
            found[layer.block] += layer.microseconds
        return dict(found)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {**asdict(self), "total_us": self.total_us, "by_block": self.by_block()}


def profile_onnx(
    path: Path | str, images: NDArray[np.float32], *, name: str, threads: int | None = None, runs: int = 30
) -> Profile:
    """Run a file under ONNX Runtime's profiler on the CPU.

    Args:
        images: [B, C, H, W] float32.
        threads: of one inference; None: ``available_threads()``.
        runs: inferences that count; the time of a node is the median over them.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BackendError: it cannot load or run the model.
        InputError: fewer than 1 run.
    """
    _check_runs(runs)
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("a profile of an ONNX model", "onnxruntime", "cpu") from None
    from mcruntime.cgroup import available_threads

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            feed = {session.get_inputs()[0].name: images}
            for _ in range(WARMUP_RUNS + runs):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        except Exception as error:  # onnxruntime's errors share no base class but this
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise BackendError(f"{path}: ONNX Runtime cannot profile the model ({reason}); export it again") from error
    times, kinds = _node_times(events, WARMUP_RUNS)
    names = _names_in_file(Path(path), kinds)
    layers = tuple(
        LayerTime(names[node], block_of(names[node]), kinds[node], median(took)) for node, took in times.items()
    )
    return Profile(name, len(images), runs, layers)


def profile_openvino(
    path: Path | str, images: NDArray[np.float32], *, name: str, threads: int | None = None, runs: int = 30
) -> Profile:
    """Run a file in OpenVINO on the CPU, compiled as for ``bench`` but with OpenVINO's own clock around each layer.

    That clock counts whole microseconds. A layer counts under the first node of the file that went into it: a
    convolution with what was fused behind it. What OpenVINO added itself is under ``OWN``.

    Args:
        images: [B, C, H, W] float32.
        threads: of one inference; None: ``available_threads()``.
        runs: inferences that count; the time of a layer is the median over them.

    Raises:
        MissingExtraError: openvino is not installed.
        BundleError, BackendError: it cannot load or run the model.
        InputError: fewer than 1 run, or images that the model does not take.
    """
    from mcdeploy.backends.openvino import OpenVINORunner

    _check_runs(runs)
    times: dict[str, list[float]] = {}
    with OpenVINORunner(path, name=name, threads=threads, profile=True) as runner:
        for run in range(WARMUP_RUNS + runs):
            runner.infer(images)
            if run < WARMUP_RUNS:
                continue
            layers = runner.layer_times()
            for layer in layers:  # a layer may be listed twice
                took = times.setdefault(layer.name, [])
                took += [0.0] * (run - WARMUP_RUNS + 1 - len(took))
                took[-1] += layer.microseconds
    named, writer = _nodes_of(Path(path))
    found = []
    for layer in {layer.name: layer for layer in layers}.values():
        if any(times[layer.name]):  # else fused into another one
            node = _origin(layer.name, layer.origins, named, writer)
            found.append(LayerTime(node, block_of(node), layer.kind, median(times[layer.name])))
    return Profile(name, len(images), runs, tuple(found))


def profile_module(module: Any, images: NDArray[np.float32], *, name: str, threads: int, runs: int = 30) -> Profile:
    """Run a PyTorch module eagerly on the CPU, with a clock around each leaf module.

    What runs between modules (additions, activations called as functions) is under ``(between modules)``.

    Args:
        module: takes images [B, C, H, W].
        threads: of torch's pool, put back afterwards.

    Raises:
        InputError: fewer than 1 run.
    """
    import torch

    _check_runs(runs)
    found: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    begun: dict[str, float] = {}
    hooks = []
    for path, leaf in module.named_modules():
        if path and not any(True for _ in leaf.children()):
            kinds[path] = type(leaf).__name__

            def before(_: Any, __: Any, path: str = path) -> None:
                begun[path] = time.perf_counter()

            def after(_: Any, __: Any, ___: Any, path: str = path) -> None:
                found[path][-1] += (time.perf_counter() - begun[path]) * 1e6

            hooks += [leaf.register_forward_pre_hook(before), leaf.register_forward_hook(after)]
    was, training = torch.get_num_threads(), module.training
    wholes = []
    module.eval()
    try:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            for _ in range(WARMUP_RUNS + runs):
                for path in kinds:
                    found[path].append(0.0)
                start = time.perf_counter()
                module(torch.from_numpy(images))
                wholes.append((time.perf_counter() - start) * 1e6)
    finally:
        for hook in hooks:
            hook.remove()
        torch.set_num_threads(was)
        module.train(training)
    times = {path: median(took[WARMUP_RUNS:]) for path, took in found.items() if any(took)}
    layers = [LayerTime(path, block_of(path), kinds[path], took) for path, took in times.items()]
    rest = median(wholes[WARMUP_RUNS:]) - sum(times.values())
    return Profile(
        name, len(images), runs, (*layers, LayerTime("(between modules)", "(between modules)", "", max(0.0, rest)))
    )


def block_of(name: str) -> str:
    """``layer1.0`` of ``layer1.0.conv1`` or ``layer1.0/add``; the module itself where there is no block."""
    if name.startswith("("):
        return name
    found = BLOCK.match(name)
    return found.group() if found else re.split(r"[./#]", name)[0]


def profile_table(profiles: Sequence[Profile]) -> Table:
    """Microseconds and shares by block, one pair of columns a model; blocks of one name stand in one row."""
    heads, rows = profile_rows(profiles)
    table = Table(title="Where the time goes, by block", title_style="bold", caption_justify="left")
    for i, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    table.caption = Text("under a profiler, which costs time: read the shares, and take latencies from the bench")
    return table


def profile_rows(profiles: Sequence[Profile]) -> tuple[list[str], list[list[str]]]:
    """The same as plain text: heads, and rows that end with the total."""
    blocks = ordered_blocks(profiles)
    heads = ["block", *(f"{profile.name}, batch {profile.batch}, us (share)" for profile in profiles)]
    found = [(profile.by_block(), profile.total_us) for profile in profiles]
    rows = [[block, *(_cell(times.get(block), total) for times, total in found)] for block in blocks]
    return heads, [*rows, ["all", *(f"{total:,.0f}" for _, total in found)]]


def ordered_blocks(profiles: Sequence[Profile]) -> list[str]:
    """All blocks: in the first model's order, each block that only a later model has after the one before it there."""
    order: list[str] = []
    for profile in profiles:
        place = 0
        for block in profile.by_block():
            if block in order:
                place = order.index(block) + 1
            else:
                order.insert(place, block)
                place += 1
    return order


def _cell(microseconds: float | None, total: float) -> str:
    return "-" if microseconds is None else f"{microseconds:,.0f} ({microseconds / total:.1%})"


def check_profiled(backends: Sequence[str]) -> None:
    """Refuse a backend that cannot be looked into.

    Raises:
        InputError: there is one.
    """
    if others := sorted({*backends} - {*PROFILED}):
        raise InputError(f"--profile: knows how to look into {', '.join(PROFILED)}, not into {', '.join(others)}")


def _check_runs(runs: int) -> None:
    if runs < 1:
        raise InputError(f"profile: expected 1 run or more, got {runs}")


def _node_times(events: Sequence[Mapping[str, Any]], skip: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Microseconds of every node in every run but the first ones, and its operator; by the name in the profile."""
    times: dict[str, list[float]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for event in events:
        name = str(event["name"])
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            node = name.removesuffix("_kernel_time")
            times[node].append(float(event["dur"]))
            kinds[node] = str(event["args"]["op_name"])
    return {node: took[skip:] for node, took in times.items()}, kinds


def _names_in_file(path: Path, kinds: Mapping[str, str]) -> dict[str, str]:
    """For every node of the profile the node of the file that it stands for.

    A fused node is called after the tensor it writes. It stands for the nearest node of its own operator on the way
    back from there that no other one stands for: Conv, not the Relu or Add that was drawn into it.
    """
    named, writer = _nodes_of(path)
    taken = {name for name in kinds if name in named}
    found = {}
    for name, kind in kinds.items():
        tensor = name.removesuffix("_nchwc")
        if name in named:
            found[name] = name
        elif tensor in writer:
            found[name] = _nearest(writer[tensor], kind.removeprefix("Fused"), writer, taken)
            taken.add(found[name])
        else:
            found[name] = OWN
    return found


def _nodes_of(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The nodes of a file, by their names and by the tensors they write."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return {node.name: node for node in graph.node}, {output: node for node in graph.node for output in node.output}


def _origin(layer: str, origins: Sequence[str], named: Mapping[str, Any], writer: Mapping[str, Any]) -> str:
    """The node of the file that a layer of OpenVINO stands for; the one that writes an output is called after it.

    OpenVINO calls what it splits a node into NODE/WithoutBiases and so on. A layer that computes and rounds in one go
    stands for the node that computes.
    """
    names = [name.partition("/WithoutBiases")[0] for name in (layer, *origins)]
    nodes = [table[name] for table in (named, writer) for name in names if name in table]
    nodes.sort(key=lambda node: node.op_type in ROUNDING)
    return str(nodes[0].name) if nodes else OWN


def _nearest(start: Any, kind: str, writer: Mapping[str, Any], taken: set[str]) -> str:
    """At most three nodes back; the node that wrote the tensor where there is none."""
    level = [start]
    for _ in range(4):
        for node in level:
            if node.op_type == kind and node.name not in taken:
                return str(node.name)
        level = [writer[tensor] for node in level for tensor in node.input if tensor in writer]
    return str(start.name)
