"""Wirings that are decided before training: the baselines of MaskConnect.

A rule takes what every block may read and returns what it does read, with the module that joins it.
"""

from __future__ import annotations

import random as stdlib_random
from typing import Literal

from mcdeploy.connectivity.wiring import FixedEdges, Sources, Wired
from mcdeploy.recipe import AllConfig, ChainConfig, RandomConfig


def chain(candidates: tuple[Sources, ...], config: ChainConfig) -> Wired:
    """Every block reads the one before it (Fixed-Prev): the backbone as it is."""
    return _fixed(tuple(tuple((row[-1],) for row in rows) for rows in candidates), "mean")


def all_sources(candidates: tuple[Sources, ...], config: AllConfig) -> Wired:
    """Every block reads everything it may (Fixed-All)."""
    return _fixed(candidates, config.aggregate)


def random(candidates: tuple[Sources, ...], config: RandomConfig) -> Wired:
    """Every block reads ``min(fan_in, candidates)`` sources, drawn once (Fixed-Random)."""
    draw = stdlib_random.Random(config.wiring_seed)
    picked = tuple(
        tuple(tuple(sorted(draw.sample(row, min(config.fan_in, len(row))))) for row in rows) for rows in candidates
    )
    return _fixed(picked, config.aggregate)


def _fixed(sources: tuple[Sources, ...], aggregate: Literal["mean", "sum"]) -> Wired:
    return sources, [FixedEdges([len(row) for row in rows], aggregate) for rows in sources]
