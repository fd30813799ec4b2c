"""Who reads whom: plain data without torch, and what can be known from it alone.

A node is ``(stage, index)``. Index 0 is what the stage receives; index i is the output of its i-th block. Node i of a
stage reads at least one earlier node. The host model calls the stages in order and needs the output of each, which is
its last block; a block that no stage's last block depends on is dead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


class Node(NamedTuple):
    """A place in the graph: index 0 is the input of the stage, index i its i-th block."""

    stage: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which no one needs on a node


@dataclass(frozen=True)
class StageWiring:
    """One stage: the module path of its container, the names of its blocks, and what each block reads."""

    name: str
    blocks: tuple[str, ...]
    reads: tuple[tuple[Node, ...], ...]  # one entry a block, sorted


@dataclass(frozen=True)
class Topology:
    """The wiring of a whole model.

    ``aggregate`` says how a block with several sources joins them: ``sum``, or ``mean`` (divided by their number).

    Raises:
        ValueError: a block without a source, a source that is not earlier, or a source that does not exist.
    """

    stages: tuple[StageWiring, ...]
    aggregate: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        for node, sources in self.edges().items():
            name = self.describe(node)
            if not sources:
                raise ValueError(f"{name} reads nothing")
            for source in sources:
                if source >= node:
                    raise ValueError(f"{name} reads {self.describe(source)}, which is not earlier")
                if source.index > len(self.stages[source.stage].blocks) or min(source) < 0:
                    raise ValueError(f"{name} reads {source}, which does not exist")

    def edges(self) -> dict[Node, tuple[Node, ...]]:
        """Every block with its sources, in the order of execution."""
        return {
            Node(s, i): sources for s, stage in enumerate(self.stages) for i, sources in enumerate(stage.reads, start=1)
        }

    def outputs(self) -> tuple[Node, ...]:
        """The last block of every stage: what the host model takes from it."""
        return tuple(Node(s, len(stage.blocks)) for s, stage in enumerate(self.stages))

    def live(self) -> frozenset[Node]:
        """The nodes that an output depends on, by walking backwards from every stage's last block."""
        edges = self.edges()
        live: set[Node] = set()
        pending = list(self.outputs())
        while pending:
            node = pending.pop()
            if node not in live:
                live.add(node)
                pending.extend(edges.get(node, ()))
        return frozenset(live)

    def dead_blocks(self) -> tuple[Node, ...]:
        """Blocks that nothing depends on, in order."""
        live = self.live()
        return tuple(node for node in self.edges() if node not in live)

    def is_chain(self, stage: int) -> bool:
        """Whether the live blocks of a stage read each other one after the other and nothing else."""
        live = [i for i in range(1, len(self.stages[stage].blocks) + 1) if Node(stage, i) in self.live()]
        previous = 0
        for index in live:
            if self.stages[stage].reads[index - 1] != (Node(stage, previous),):
                return False
            previous = index
        return True

    def without_dead_blocks(self) -> tuple[Topology, dict[Node, Node]]:
        """The same function with the dead blocks gone, and where each live node went."""
        live = self.live()
        moved: dict[Node, Node] = {}
        for s, stage in enumerate(self.stages):
            moved[Node(s, 0)] = Node(s, 0)
            kept = [i for i in range(1, len(stage.blocks) + 1) if Node(s, i) in live]
            moved |= {Node(s, old): Node(s, new) for new, old in enumerate(kept, start=1)}
        stages = tuple(
            StageWiring(
                stage.name,
                tuple(name for i, name in enumerate(stage.blocks, start=1) if Node(s, i) in live),
                tuple(
                    tuple(moved[source] for source in sources)
                    for i, sources in enumerate(stage.reads, start=1)
                    if Node(s, i) in live
                ),
            )
            for s, stage in enumerate(self.stages)
        )
        return Topology(stages, self.aggregate), moved

    def describe(self, node: Node) -> str:
        """A node in words a user knows: ``layer1.2``, or ``input of layer1``."""
        stage = self.stages[node.stage]
        if node.index == 0:
            return f"input of {stage.name}"
        return f"{stage.name}.{stage.blocks[node.index - 1]}" if node.index <= len(stage.blocks) else str(tuple(node))

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file: a source in the same stage is its index, one in another is ``"stage:index"``."""

        def source(reader: int, node: Node) -> int | str:
            return node.index if node.stage == reader else f"{node.stage}:{node.index}"

        return {
            "aggregate": self.aggregate,
            "stages": [
                {
                    "name": stage.name,
                    "blocks": list(stage.blocks),
                    "reads": [[source(s, node) for node in sources] for sources in stage.reads],
                }
                for s, stage in enumerate(self.stages)
            ],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Topology:
        """The inverse of ``to_json``.

        Raises:
            ValueError: not a topology.
        """

        def node(reader: int, source: int | str) -> Node:
            if isinstance(source, int):
                return Node(reader, source)
            stage, _, index = source.partition(":")
            return Node(int(stage), int(index))

        try:
            return Topology(
                tuple(
                    StageWiring(
                        stage["name"],
                        tuple(stage["blocks"]),
                        tuple(tuple(sorted(node(s, source) for source in sources)) for sources in stage["reads"]),
                    )
                    for s, stage in enumerate(data["stages"])
                ),
                data["aggregate"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a topology: {error!r}") from None


def chain_reads(stage: int, num_blocks: int) -> tuple[tuple[Node, ...], ...]:
    """Every block reads the one before it."""
    return tuple((Node(stage, i),) for i in range(num_blocks))


def count_edges(topology: Topology, only: Iterable[Node] | None = None) -> int:
    """Number of edges into blocks, into the given ones if any are given."""
    wanted = None if only is None else set(only)
    return sum(len(sources) for node, sources in topology.edges().items() if wanted is None or node in wanted)
