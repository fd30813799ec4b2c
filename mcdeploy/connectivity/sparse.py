"""Sparse aggregation at exponential offsets: SparseNet.

Zhu et al., "Sparsely Aggregated Convolutional Networks", ECCV 2018. Block l of a stage reads the nodes whose distance
is a power of the base c, node 0 being the stage's input:

    x_l = sum of y_{l - c^k} over all k >= 0 with c^k <= l,        y_l = F_l(x_l)

This is SparseNet[+], the form by addition, as a rule for any timm backbone; ``backbones.sparsenet`` has the form by
concatenation. The offsets are those of ``expFetch`` in the authors' code, https://github.com/Lyken17/SparseNet.
N layers are at most (c - 1) log_c N hops apart, least at c = 2. The paper's F has no identity of its own; a residual
block of a timm backbone keeps the one it has, as under every other rule.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mcdeploy.connectivity.stages import Source, Stage
from mcdeploy.connectivity.topology import Node
from mcdeploy.connectivity.wiring import FixedEdges, Sources, Wired
from mcdeploy.section import RuleConfig


class SparseConfig(RuleConfig):
    """Every block reads the blocks 1, 2, 4, 8, ... places before it (SparseNet, ECCV 2018)."""

    rule: Literal["sparse"]
    base: Annotated[int, Field(ge=2)] = 2  # of the offsets: base^0, base^1, ...
    aggregate: Literal["mean", "sum"] = "mean"  # the paper's is sum


def offsets(count: int, base: int = 2) -> tuple[int, ...]:
    """base^0, base^1, ... up to ``count``: how far back a reader with ``count`` earlier nodes looks, nearest first."""
    found, offset = [], 1
    while offset <= count:
        found.append(offset)
        offset *= base
    return tuple(found)


def sparse(stages: tuple[Stage, ...], candidates: tuple[Sources, ...], config: SparseConfig) -> Wired:
    """Every block reads the candidates at exponential offsets in its own stage.

    A node of another shape is no candidate and is left out; the block right before is always one.
    """
    sources = tuple(
        tuple(_at_offsets(s, index, row, config.base) for index, row in enumerate(rows, start=1))
        for s, rows in enumerate(candidates)
    )
    return sources, [FixedEdges([len(row) for row in rows], config.aggregate) for rows in sources]


def _at_offsets(stage: int, index: int, row: tuple[Source, ...], base: int) -> tuple[Source, ...]:
    wanted = {Node(stage, index - offset) for offset in offsets(index, base)}
    return tuple(source for source in row if source.node in wanted)
