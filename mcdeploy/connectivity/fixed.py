"""Wirings that are decided before training: the baselines of MaskConnect.

A rule takes the stages and what every block may read, and returns what it does read, with the module that joins it.
"""

from __future__ import annotations

import random as stdlib_random
from typing import Annotated, Literal

from pydantic import Field

from mcdeploy.connectivity.stages import Stage
from mcdeploy.connectivity.wiring import FixedEdges, Sources, Wired
from mcdeploy.errors import WiringError
from mcdeploy.section import Count, RuleConfig


class ChainConfig(RuleConfig):
    """Every block reads the one before it: the backbone as it is."""

    rule: Literal["chain"] = "chain"


class AllConfig(RuleConfig):
    """Every block reads every earlier block of the same shape."""

    rule: Literal["all"]
    aggregate: Literal["mean", "sum"] = "mean"
    scope: Literal["stage", "network"] = "stage"


class RandomConfig(RuleConfig):
    """Every block reads K earlier blocks, drawn once."""

    rule: Literal["random"]
    fan_in: Count
    wiring_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    aggregate: Literal["mean", "sum"] = "mean"
    scope: Literal["stage", "network"] = "stage"


class DropConfig(RuleConfig):
    """A chain without the named blocks: block removal that was decided elsewhere, such as examples/rank_blocks.py."""

    rule: Literal["drop"]
    blocks: Annotated[tuple[str, ...], Field(min_length=1)]  # such as "layer1.3"; not the last of a stage


def chain(stages: tuple[Stage, ...], candidates: tuple[Sources, ...], config: ChainConfig) -> Wired:
    """Every block reads the one before it (Fixed-Prev): the backbone as it is."""
    return _fixed(tuple(tuple((row[-1],) for row in rows) for rows in candidates), "mean")


def all_sources(stages: tuple[Stage, ...], candidates: tuple[Sources, ...], config: AllConfig) -> Wired:
    """Every block reads everything it may (Fixed-All)."""
    return _fixed(candidates, config.aggregate)


def random(stages: tuple[Stage, ...], candidates: tuple[Sources, ...], config: RandomConfig) -> Wired:
    """Every block reads ``min(fan_in, candidates)`` sources, drawn once (Fixed-Random)."""
    draw = stdlib_random.Random(config.wiring_seed)
    picked = tuple(
        tuple(tuple(sorted(draw.sample(row, min(config.fan_in, len(row))))) for row in rows) for rows in candidates
    )
    return _fixed(picked, config.aggregate)


def drop(stages: tuple[Stage, ...], candidates: tuple[Sources, ...], config: DropConfig) -> Wired:
    """A chain that steps over the named blocks, which are then dead.

    Raises:
        WiringError: no such block, the last block of a stage (its output), or one whose successor has another shape.
    """
    unknown = set(config.blocks)
    table = []
    for stage, rows in zip(stages, candidates, strict=True):
        kept, picked = 0, []
        for index, (name, row) in enumerate(zip(stage.blocks, rows, strict=True), start=1):
            source = [candidate for candidate in row if candidate.node.index == kept]
            if not source:
                raise WiringError(
                    f"connectivity.blocks: {stage.name}.{name} needs the block before it, of another shape"
                )
            picked.append((source[0],))
            unknown.discard(f"{stage.name}.{name}")
            if f"{stage.name}.{name}" not in config.blocks:
                kept = index
        if kept != len(stage.blocks):
            raise WiringError(
                f"connectivity.blocks: {stage.name}.{stage.blocks[-1]} is what the stage hands on; keep it"
            )
        table.append(tuple(picked))
    if unknown:
        raise WiringError(f"connectivity.blocks: no wirable stage has a block {sorted(unknown)[0]!r}")
    return _fixed(tuple(table), "mean")


def _fixed(sources: tuple[Sources, ...], aggregate: Literal["mean", "sum"]) -> Wired:
    return sources, [FixedEdges([len(row) for row in rows], aggregate) for rows in sources]
