"""WiredStage: a stage that runs by a Topology instead of one block after the other.

It takes the place of the container in the host model and keeps the container's child names, so the host's forward and
its state-dict keys stay what they were. What a block receives is the business of the stage's ``edges``:

    edges(block, inputs) -> Tensor        inputs: what the block may read, in the order of its sources

``FixedEdges`` joins all inputs; a learned rule brings its own module (``maskconnect.MaskEdges``).
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from mcdeploy.connectivity.gates import Gates
from mcdeploy.connectivity.loops import Loop, Passed, Step
from mcdeploy.connectivity.stages import Source, Stage
from mcdeploy.connectivity.topology import Node, StageWiring, Topology
from mcdeploy.errors import WiringError

Sources = tuple[tuple[Source, ...], ...]  # one entry a block
Wired = tuple[tuple[Sources, ...], list[nn.Module]]  # what a rule returns: sources and edges, one entry a stage each


class Edges(Protocol):
    """Joins what a block may read into what it receives. An ``nn.Module``, so that gates can live in it."""

    aggregate: Literal["mean", "sum"]

    def __call__(self, block: int, inputs: list[Tensor]) -> Tensor: ...

    def active(self) -> tuple[tuple[int, ...], ...]:
        """For each block the positions, among its sources, that it reads outside training."""
        ...


class FixedEdges(nn.Module):
    """Sum or mean of all inputs; a single input passes through untouched."""

    def __init__(self, fan_ins: Sequence[int], aggregate: Literal["mean", "sum"]) -> None:
        super().__init__()
        self.fan_ins = tuple(fan_ins)
        self.aggregate = aggregate

    def forward(self, block: int, inputs: list[Tensor]) -> Tensor:
        joined = inputs[0]
        for other in inputs[1:]:
            joined = joined + other
        return joined / len(inputs) if self.aggregate == "mean" and len(inputs) > 1 else joined

    def active(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(range(n)) for n in self.fan_ins)


class Tape:
    """The feature maps of one forward pass, by node; shared by the stages of a model that read across stages."""

    def __init__(self) -> None:
        self.features: dict[Node, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Tape:
        """A copied model shares a tape of its own, without the feature maps of a forward pass that was cut short."""
        memo[id(self)] = fresh = Tape()
        return fresh


class WiredModule(nn.Module):
    """A container that runs by a topology: ``WiredStage``, or one of a rule's own.

    Attributes:
        index: position of this container in the topology.
        aggregate: how a node joins several sources.
        is_dynamic: whether the wiring depends on the image, so that there is nothing to fix.
        skip: nodes that are dead and therefore not run.
    """

    index: int
    aggregate: Literal["mean", "sum"]
    is_dynamic: bool = False
    skip: frozenset[int] = frozenset()

    @abstractmethod
    def wiring(self, name: str) -> StageWiring:
        """What each node reads outside training."""

    @abstractmethod
    def candidates(self, name: str) -> StageWiring:
        """Everything that each node may read."""

    @abstractmethod
    def fix(self, wiring: StageWiring, aggregate: Literal["mean", "sum"], live: frozenset[int]) -> None:
        """Run ``wiring`` for good: gates go, nodes that are not in ``live`` stay in the model but are not run.

        Raises:
            WiringError: a node cannot read what the wiring says.
        """

    @abstractmethod
    def pruned(self, kept: tuple[int, ...], moved: Mapping[Node, Node]) -> nn.Module:
        """The same function without the nodes that are not in ``kept``; ``moved``: old to new place of live nodes."""

    def gate_values(self) -> list[list[float]] | None:
        """Learned gates for logs and plots, one list a node and one number in 0..1 a candidate; None without gates."""
        return None

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch, 0 to ``epochs`` - 1; of an averaged copy too."""

    def penalty(self) -> Tensor | None:
        """What the last forward pass adds to the loss, a scalar, in training."""
        return None

    def after_step(self) -> None:
        """Called after each training step."""

    def statistics(self) -> dict[str, Any]:
        """Numbers of the epoch for the log."""
        return {}


class WiredStage(WiredModule):
    """A run of blocks, each fed by ``edges`` from earlier nodes.

    Args:
        index: position of this stage in the topology.
        blocks: child name to block, in the order of execution; dead ones may be left in, they are not run.
        sources: what each block may read.
        edges: joins them.
        tape: given when stages read across stages; the last stage passes ``is_last`` and empties it.
        loop: given when the host walks the container instead of calling it.
        others: the children that the host's loop calls and that are no blocks of this stage.
    """

    def __init__(
        self,
        index: int,
        blocks: dict[str, nn.Module],
        sources: Sources,
        edges: nn.Module,
        *,
        skip: frozenset[int] = frozenset(),
        tape: Tape | None = None,
        is_last: bool = False,
        loop: Loop | None = None,
        others: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        children = {**blocks, **(others or {})}
        for name in children if loop is None else loop.names:
            if name in children:
                self.add_module(name, children[name])
        self.index = index
        self.block_names = tuple(blocks)
        self.sources = sources
        self.edges = edges
        self.skip = skip
        self.tape = tape
        self.is_last = is_last
        self.loop = loop

    def forward(self, x: Tensor) -> Tensor:
        """x: the stage's input, [B, C, H, W] or whatever the host's blocks hand on; returns the last block's output."""
        features = {} if self.tape is None else self.tape.features
        if self.index == 0:
            features.clear()  # what a forward pass that was cut short has left
        features[Node(self.index, 0)] = x
        for i, name in enumerate(self.block_names, start=1):
            if i in self.skip:
                continue
            inputs = [fetch(features[source.node], source) for source in self.sources[i - 1]]
            block, joined = self.get_submodule(name), self.edges(i - 1, inputs)
            features[Node(self.index, i)] = block(joined) if self.loop is None else self.loop.run(name, block, joined)
        output = features[Node(self.index, len(self.block_names))]
        if self.is_last and self.tape is not None:
            self.tape.features.clear()
        return output

    def __iter__(self) -> Iterator[Any]:
        return iter([self._as_host_sees(name) for name in self._host_names()])

    def __len__(self) -> int:
        return len(self._host_names())

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def _host_names(self) -> tuple[str, ...]:
        return self.block_names if self.loop is None else self.loop.names

    def _as_host_sees(self, name: str) -> nn.Module | Step:
        if self.loop is None or name in self.others():
            return self.get_submodule(name)
        return Step(self, self.loop, name, name == self.block_names[-1])

    def others(self) -> dict[str, nn.Module]:
        """The children that are neither blocks of this stage nor its edges."""
        own = {*self.block_names, "edges"}
        return {name: child for name, child in self.named_children() if name not in own}

    @property
    def aggregate(self) -> Literal["mean", "sum"]:  # type: ignore[override]
        return self.edges.aggregate  # type: ignore[return-value]

    def wiring(self, name: str) -> StageWiring:
        edges: Edges = self.edges  # type: ignore[assignment]
        reads = tuple(
            tuple(sources[position].node for position in positions)
            for sources, positions in zip(self.sources, edges.active(), strict=True)
        )
        return StageWiring(name, self.block_names, reads)

    def candidates(self, name: str) -> StageWiring:
        return StageWiring(name, self.block_names, tuple(tuple(source.node for source in row) for row in self.sources))

    def fix(self, wiring: StageWiring, aggregate: Literal["mean", "sum"], live: frozenset[int]) -> None:
        offered = [{source.node: source for source in row} for row in self.sources]
        try:
            self.sources = tuple(
                tuple(by_node[node] for node in reads) for by_node, reads in zip(offered, wiring.reads, strict=True)
            )
        except KeyError as error:
            raise WiringError(f"{wiring.name}: a block cannot read node {error}; its shape does not fit") from None
        self.edges = FixedEdges([len(reads) for reads in wiring.reads], aggregate).train(self.training)
        self.skip = frozenset(range(1, len(self.block_names) + 1)) - live

    def pruned(self, kept: tuple[int, ...], moved: Mapping[Node, Node]) -> nn.Module:
        sources = tuple(tuple(s._replace(node=moved[s.node]) for s in self.sources[i - 1]) for i in kept)
        return WiredStage(
            self.index,
            {self.block_names[i - 1]: self.get_submodule(self.block_names[i - 1]) for i in kept},
            sources,
            FixedEdges([len(row) for row in sources], self.aggregate),
            tape=self.tape,
            is_last=self.is_last,
            loop=self.loop,
            others=self.others(),
        )

    def unwrapped(self) -> nn.Module:
        """The plain container of a stage that reads like a chain: called, or walked, as the host's own was."""
        if self.loop is None:
            return nn.Sequential(OrderedDict((name, self.get_submodule(name)) for name in self.block_names))
        walked, alive = nn.ModuleList(), {*self.block_names, *self.others()}
        for name in self.loop.names:
            walked.add_module(name, self.get_submodule(name) if name in alive else Passed())
        return walked

    def gate_values(self) -> list[list[float]] | None:
        return self.edges.values() if isinstance(self.edges, Gates) else None


def fetch(feature: Tensor, source: Source) -> Tensor:
    """A feature map as its reader needs it: average-pooled and zero-padded in channels, [B, C, H, W]."""
    if source.pool > 1:
        feature = F.avg_pool2d(feature, source.pool)
    if source.pad:
        feature = F.pad(feature, (0, 0, 0, 0, 0, source.pad))
    return feature


def wired_stages(model: nn.Module) -> dict[str, WiredModule]:
    """The wired containers of a model by module path, in the order of execution."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, WiredModule)}
    return dict(sorted(found.items(), key=lambda item: item[1].index))


def topology_of(model: nn.Module) -> Topology:
    """The wiring that a wired model runs outside training; without stages if nothing in it is wired."""
    stages = wired_stages(model)
    aggregate: Literal["mean", "sum"] = next((stage.aggregate for stage in stages.values()), "mean")
    return Topology(tuple(stage.wiring(name) for name, stage in stages.items()), aggregate)


def candidates_of(model: nn.Module) -> Topology:
    """Everything that every block of a wired model may read, as a topology."""
    aggregate = topology_of(model).aggregate
    return Topology(tuple(stage.candidates(name) for name, stage in wired_stages(model).items()), aggregate)


def gate_values(model: nn.Module) -> dict[str, list[list[float]]]:
    """The gates of every stage for logs and plots: one list a block, one number in 0..1 a source."""
    found = {name: stage.gate_values() for name, stage in wired_stages(model).items()}
    return {name: values for name, values in found.items() if values is not None}


def install(
    model: nn.Module, stages: tuple[Stage, ...], sources: tuple[Sources, ...], edges: Sequence[nn.Module]
) -> None:
    """Replace the containers of ``stages`` by wired ones, in place. One entry of ``sources`` and ``edges`` a stage."""
    across = any(source.node.stage != s for s, rows in enumerate(sources) for row in rows for source in row)
    tape = Tape() if across else None
    for s, stage in enumerate(stages):
        container = model.get_submodule(stage.name)
        children = dict(container.named_children())
        wired = WiredStage(
            s,
            {name: children.pop(name) for name in stage.blocks},
            sources[s],
            edges[s],
            tape=tape,
            is_last=s == len(stages) - 1,
            loop=Loop(stage.loop) if stage.loop else None,
            others=children,
        )
        model.set_submodule(stage.name, wired.train(container.training))

    if all(isinstance(module, FixedEdges) for module in edges):
        fix(model, topology_of(model))


def fix(model: nn.Module, topology: Topology) -> None:
    """Make a wired model run ``topology`` for good: gates go, dead blocks stay in the model but are not run.

    Raises:
        WiringError: the topology does not belong to this model.
    """
    stages = wired_stages(model)
    if list(stages) != [stage.name for stage in topology.stages]:
        raise WiringError(f"the topology wires {[s.name for s in topology.stages]}, the model has {list(stages)}")
    live = topology.live()
    for s, ((name, stage), wiring) in enumerate(zip(stages.items(), topology.stages, strict=True)):
        blocks = stage.candidates(name).blocks
        if blocks != wiring.blocks:
            raise WiringError(f"{name}: the topology has blocks {wiring.blocks}, the model {blocks}")
        stage.fix(wiring, topology.aggregate, frozenset(node.index for node in live if node.stage == s))
