"""Find the stages of any timm model by watching one forward pass.

A stage is a container whose children are called once each, one after the other: child i's output is child i + 1's only
input, the container's input is the first child's and the last child's output is the container's. ``nn.Sequential`` in
ResNet, ConvNeXt, ViT, Swin and MobileNet is one, ``RegStage`` in RegNet is one; no list of names is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mcdeploy.connectivity.topology import Node
from mcdeploy.errors import WiringError

Shape = tuple[int, ...]  # without the batch


@dataclass(frozen=True)
class Stage:
    """What tracing learned about one container. Shapes leave the batch out."""

    name: str  # module path
    blocks: tuple[str, ...]  # child names, in the order of execution
    shapes: tuple[Shape, ...]  # shapes[0] is the stage's input, shapes[i] the output of block i
    wirable: tuple[bool, ...]  # a block proper: at least two weight matrices of its own

    def num_choices(self) -> int:
        """Blocks that could read more than one node of this stage."""
        return sum(len(self.sources_of(i)) > 1 for i in range(1, len(self.blocks) + 1))

    def sources_of(self, index: int) -> tuple[int, ...]:
        """Nodes of this stage that block ``index`` (from 1) may read: the one before, and every one of equal shape."""
        if not self.wirable[index - 1]:
            return (index - 1,)
        return tuple(i for i in range(index) if self.shapes[i] == self.shapes[index - 1])


class Source(NamedTuple):
    """A node as one reader sees it: average-pooled by ``pool`` and zero-padded by ``pad`` channels to fit."""

    node: Node
    pool: int = 1
    pad: int = 0


class _Call(NamedTuple):
    name: str
    input: Tensor | None
    output: Tensor | None
    writes_input: bool  # changes its input in place, so that other readers would see the change


def find_stages(model: nn.Module, example: Tensor) -> tuple[Stage, ...]:
    """Trace one forward pass and return the stages in the order of execution.

    Where containers nest, the level with more wirable blocks is taken; on a tie the outer one.

    Args:
        example: images [B, C, H, W], B >= 1; its values do not matter.

    Raises:
        WiringError: the model has no stage, or does not run on ``example``.
    """
    calls = _trace(model, example)
    modules = dict(model.named_modules())
    found = {name: stage for name in modules if name and (stage := _as_stage(name, modules[name], calls))}
    chosen = _finest(found)
    if not chosen:
        raise WiringError(
            f"{type(model).__name__} has no wirable stage: no container calls two blocks one after the other "
            "with feature maps of one shape (DenseNet, for one, concatenates); pick another backbone"
        )
    order = {name: i for i, name in enumerate(calls)}
    return tuple(sorted(chosen, key=lambda stage: order[f"{stage.name}.{stage.blocks[0]}"]))


def candidate_sources(stages: tuple[Stage, ...], scope: str) -> tuple[tuple[tuple[Source, ...], ...], ...]:
    """What every block of every stage may read: ``[stage][block][candidate]``, sorted by node.

    ``scope: stage`` offers earlier nodes of the same stage. ``scope: network`` also offers the blocks of earlier
    stages, average-pooled and zero-padded to fit, without parameters; the first block of a stage always reads the
    stage's input.

    Raises:
        WiringError: ``scope: network`` on feature maps that are not [B, C, H, W].
    """
    if scope == "network" and any(len(shape) != 3 for stage in stages for shape in stage.shapes):
        raise WiringError("scope: network needs [B, C, H, W] feature maps in every stage; use scope: stage")
    table = []
    for s, stage in enumerate(stages):
        rows = []
        for index in range(1, len(stage.blocks) + 1):
            own = tuple(Source(Node(s, i)) for i in stage.sources_of(index))
            earlier: tuple[Source, ...] = ()
            if scope == "network" and index > 1 and stage.wirable[index - 1]:
                earlier = tuple(_earlier_sources(stages, s, index))
            rows.append(tuple(sorted(earlier + own)))
        table.append(tuple(rows))
    return tuple(table)


def _earlier_sources(stages: tuple[Stage, ...], reader: int, index: int) -> Iterator[Source]:
    wanted = stages[reader].shapes[index - 1]
    reads_stage_input = 0 in stages[reader].sources_of(index)
    for s, stage in enumerate(stages[:reader]):
        for i in range(1, len(stage.blocks) + 1):
            is_stage_input = s == reader - 1 and i == len(stage.blocks) and stage.shapes[i] == stages[reader].shapes[0]
            source = align(Node(s, i), stage.shapes[i], wanted)
            if source and not (is_stage_input and reads_stage_input):  # not the same tensor under two names
                yield source


def align(node: Node, shape: Shape, wanted: Shape) -> Source | None:
    """How a [C, H, W] feature map becomes ``wanted`` without parameters; None when it cannot."""
    channels, height, width = shape
    pool = height // wanted[1]
    if pool < 1 or height != pool * wanted[1] or width != pool * wanted[2] or channels > wanted[0]:
        return None
    return Source(node, pool, wanted[0] - channels)


def _trace(model: nn.Module, example: Tensor) -> dict[str, list[_Call]]:
    """Module path to its calls. Tensors are kept, so identity means "the very same tensor"."""
    calls: dict[str, list[_Call]] = {}
    versions: list[int] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = _only_tensor(args, kwargs)
        versions.append(tensor._version if tensor is not None else 0)

    def after(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tensor, version = _only_tensor(args, kwargs), versions.pop()
            wrote = tensor is not None and tensor._version != version
            calls.setdefault(name, []).append(
                _Call(name, tensor, output if isinstance(output, Tensor) else None, wrote)
            )

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(example)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise WiringError(
            f"{type(model).__name__} does not run on images of shape {list(example.shape[1:])}: {error}"
        ) from error
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return calls


def _only_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 and args and isinstance(args[0], Tensor) else None


def _as_stage(name: str, container: nn.Module, calls: dict[str, list[_Call]]) -> Stage | None:
    children = [child for child, _ in container.named_children()]
    path = [calls.get(f"{name}.{child}", []) for child in children]
    own = calls.get(name, [])
    if len(children) < 2 or len(own) != 1 or any(len(called) != 1 for called in path):
        return None
    steps = [called[0] for called in path]
    tensor = own[0].input
    for step in steps:
        if step.input is None or step.output is None or step.input is not tensor or step.writes_input:
            return None
        tensor = step.output
    if own[0].output is not tensor or own[0].input is None:
        return None
    assert tensor is not None
    shapes = tuple(tuple(t.shape[1:]) for t in (own[0].input, *(step.output for step in steps)) if t is not None)
    stage = Stage(name, tuple(children), shapes, tuple(_is_block(container.get_submodule(child)) for child in children))
    keeps_shape = sum(wirable and shapes[i] == shapes[i + 1] for i, wirable in enumerate(stage.wirable))
    return stage if sum(stage.wirable) >= 2 and keeps_shape else None


def _is_block(module: nn.Module) -> bool:
    """A norm, an activation or a single convolution is no block: a block has two weight matrices or more."""
    return sum(parameter.ndim >= 2 for parameter in module.parameters()) >= 2 and any(module.children())


def _finest(found: dict[str, Stage]) -> list[Stage]:
    """Of nested stages, keep the level that leaves more blocks that keep their shape."""

    def worth(stage: Stage) -> int:
        return sum(w and stage.shapes[i] == stage.shapes[i + 1] for i, w in enumerate(stage.wirable))

    def best(names: list[str]) -> list[Stage]:
        chosen: list[Stage] = []
        tops = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
        for top in tops:
            inner = best([name for name in names if name.startswith(f"{top}.")])
            outer = found[top]
            chosen += inner if sum(map(worth, inner)) > worth(outer) else [outer]
        return chosen

    return best(list(found))
