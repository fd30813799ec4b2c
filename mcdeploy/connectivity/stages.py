"""Find the stages of any timm model by watching one forward pass.

A stage is a run of children of one container, each called once with what the one before returned, the very same tensor,
which no other code reads. The host drives them in one of two ways:

- it calls the container, with one tensor, and gets what the last child returned: ``nn.Sequential`` in ResNet, ConvNeXt,
  ViT, Swin and MobileNet, ``RegStage`` in RegNet;
- it walks the container, ``for block in self.blocks: x = block(x, rope)``: ``nn.ModuleList`` in BEiT, EVA, Swin V2.

No list of names is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

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
    loop: tuple[str, ...] = ()  # all children, when a loop of the host calls them; empty when the container is called

    def num_kept(self) -> int:
        """Blocks that keep the shape of what they receive."""
        return sum(wirable and self.shapes[i] == self.shapes[i + 1] for i, wirable in enumerate(self.wirable))

    def is_worth_wiring(self) -> bool:
        return sum(self.wirable) >= 2 and self.num_kept() > 0

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
    input: Tensor | None  # the first argument
    others: tuple[Any, ...]  # the further arguments
    output: Tensor | None
    writes_input: bool  # changes its input in place, so that other readers would see the change


class _Trace(TorchFunctionMode):
    """One forward pass as hooks and torch functions see it.

    Outputs of modules are kept, so identity means "the very same tensor". ``readers`` says, for each of them, in which
    code something is computed from it, ``measurers`` where its shape is looked at; code is the paths of what runs.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: dict[str, list[_Call]] = {}
        self.kept: dict[int, Tensor] = {}
        self.readers: dict[int, set[tuple[str, ...]]] = {}
        self.measurers: dict[int, set[tuple[str, ...]]] = {}
        self.running: list[tuple[str, int]] = []  # module path, version of its input
        self.handles = []
        for name, module in model.named_modules():
            self.handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave(name), with_kwargs=True))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves(result)
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            log = self.readers
        elif any(type(leaf) is int for leaf in leaves) and func != Tensor._version.__get__:  # type: ignore[attr-defined]
            log = self.measurers
        else:  # dtype, device, our own look at the version
            return result
        for tensor in tree_leaves((args, kwargs)):
            if id(tensor) in self.kept:
                log.setdefault(id(tensor), set()).add(self._where())
        return result

    def _enter(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.running.append((name, args[0]._version if args and isinstance(args[0], Tensor) else 0))

        return hook

    def _leave(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            version = self.running.pop()[1]
            tensor = args[0] if args and isinstance(args[0], Tensor) else None
            wrote = tensor is not None and tensor._version != version
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor):
                    if not isinstance(output, Tensor):  # handed out among others
                        self.readers.setdefault(id(leaf), set()).add((*self._where(), name))
                    self.kept[id(leaf)] = leaf
            others = tuple(tree_leaves((args[1:], kwargs)))
            self.calls.setdefault(name, []).append(
                _Call(tensor, others, output if isinstance(output, Tensor) else None, wrote)
            )

        return hook

    def _where(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.running)

    def is_read_outside(self, tensor: Tensor, blocks: set[str], *, shape_too: bool) -> bool:
        """Whether code other than the ``blocks``' (module paths) computes something from a tensor."""
        readers = self.readers.get(id(tensor), set()) | (self.measurers.get(id(tensor), set()) if shape_too else set())
        return any(blocks.isdisjoint(running) for running in readers)


def find_stages(model: nn.Module, example: Tensor, *, may_have_none: bool = False) -> tuple[Stage, ...]:
    """Trace one forward pass and return the stages in the order of execution.

    Where containers nest, the level with more blocks that keep their shape is taken; on a tie the outer one.

    Args:
        example: images [B, C, H, W], B >= 1; its values do not matter.
        may_have_none: return no stages for a model that has none.

    Raises:
        WiringError: the model has no stage, or does not run on ``example``.
    """
    trace = _trace(model, example)
    modules = dict(model.named_modules())
    found = {name: stage for name in modules if name and (stage := _as_stage(name, modules[name], trace))}
    chosen = _finest(found)
    if not chosen and not may_have_none:
        raise WiringError(
            f"{type(model).__name__} has no wirable stage: {_why_none(modules, trace)}; pick another backbone"
        )
    order = {name: i for i, name in enumerate(trace.calls)}
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


def _trace(model: nn.Module, example: Tensor) -> _Trace:
    training = model.training
    model.eval()
    trace = _Trace(model)
    try:
        with torch.no_grad(), trace:
            model(example)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise WiringError(
            f"{type(model).__name__} does not run on images of shape {list(example.shape[1:])}: {error}"
        ) from error
    finally:
        model.train(training)
        for handle in trace.handles:
            handle.remove()
    return trace


def _as_stage(name: str, container: nn.Module, trace: _Trace) -> Stage | None:
    """The container as a stage: called with one tensor, or walked by a loop of the host."""
    own = trace.calls.get(name, [])
    runs = _runs(name, container, trace)
    if not own and isinstance(container, nn.ModuleList | nn.Sequential):
        loop = tuple(child for child, _ in container.named_children())
        found = [_stage(name, container, run, trace, loop) for run in runs]
    elif len(own) == 1 and len(runs) == 1 and len(runs[0]) == len(list(container.children())):
        steps = [trace.calls[f"{name}.{child}"][0] for child in runs[0]]
        is_plain = own[0].input is steps[0].input and own[0].output is steps[-1].output
        has_extras = own[0].others or any(step.others for step in steps)
        found = [_stage(name, container, runs[0], trace, ())] if is_plain and not has_extras else []
    else:
        found = []
    return max((stage for stage in found if stage.is_worth_wiring()), key=Stage.num_kept, default=None)


def _why_none(modules: dict[str, nn.Module], trace: _Trace) -> str:
    """What stands in the way, by the first containers that hold blocks of one kind."""
    for name, container in modules.items():
        blocks = {child: module for child, module in container.named_children() if _is_block(module)}
        if not name or len(blocks) < 2 or len({type(block) for block in blocks.values()}) > 1:
            continue
        calls = [call for child in blocks for call in trace.calls.get(f"{name}.{child}", [])]
        if any(call.input is None or call.output is None for call in calls):
            return f"the blocks in {name!r} take or return more than one feature map"
        if any(len(run) > 1 for run in _runs(name, container, trace)):
            return f"the blocks in {name!r} all change the shape of what they receive"
    return (
        "no container runs two blocks, of at least two weight matrices each, one after the other "
        "with nothing else reading what is between"
    )


def _runs(name: str, container: nn.Module, trace: _Trace) -> list[list[str]]:
    """The children in runs: each called once, with what the one before returned and no other code reads."""
    runs: list[list[str]] = []
    paths = {f"{name}.{child}" for child, _ in container.named_children()}
    previous: _Call | None = None
    start = torch.empty(0)  # what the run receives; a host that walks its blocks sees this shape all along
    made: set[int] = set()  # feature maps of this container
    for child, _ in container.named_children():
        calls = trace.calls.get(f"{name}.{child}", [])
        call = calls[0] if len(calls) == 1 else None
        if call is None or call.input is None or call.output is None or call.writes_input:
            previous = None
            continue
        if any(id(other) in made for other in call.others):
            return []  # a block that reads two of them is no link of a chain
        made |= {id(call.input), id(call.output)}
        joint = call.input
        if (
            previous is not None
            and previous.output is joint
            and not trace.is_read_outside(joint, paths, shape_too=joint.shape != start.shape)
        ):
            runs[-1].append(child)
        else:
            runs.append([child])
            start = joint
        previous = call
    return runs


def _stage(name: str, container: nn.Module, blocks: list[str], trace: _Trace, loop: tuple[str, ...]) -> Stage:
    steps = [trace.calls[f"{name}.{block}"][0] for block in blocks]
    tensors = [steps[0].input, *(step.output for step in steps)]
    shapes = tuple(tuple(tensor.shape[1:]) for tensor in tensors if tensor is not None)
    return Stage(
        name, tuple(blocks), shapes, tuple(_is_block(container.get_submodule(block)) for block in blocks), loop
    )


def _is_block(module: nn.Module) -> bool:
    """A norm, an activation or a single convolution is no block: a block has two weight matrices or more."""
    return sum(parameter.ndim >= 2 for parameter in module.parameters()) >= 2 and any(module.children())


def _finest(found: dict[str, Stage]) -> list[Stage]:
    """Of nested stages, keep the level that leaves more blocks that keep their shape."""

    def best(names: list[str]) -> list[Stage]:
        chosen: list[Stage] = []
        tops = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
        for top in tops:
            inner = best([name for name in names if name.startswith(f"{top}.")])
            outer = found[top]
            chosen += inner if sum(map(Stage.num_kept, inner)) > outer.num_kept() else [outer]
        return chosen

    return best(list(found))
