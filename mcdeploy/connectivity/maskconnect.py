"""MaskConnect: every block learns which K earlier blocks to read (Ahmed and Torresani, ECCV 2018).

The method section of the paper could not be read; this follows its verified predecessor by the same authors, whose
algorithm is in ``gates.py``: with y_j the output of node j and m_i the mask of block i,

    x_i = sum_j m_ij y_j   (or their mean),    sum_j m_ij = min(K, candidates of block i).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mcdeploy.connectivity.gates import Gates
from mcdeploy.connectivity.stages import Stage
from mcdeploy.connectivity.wiring import FixedEdges, Sources, Wired
from mcdeploy.errors import WiringError
from mcdeploy.section import Count, GatedConfig


class MaskConnectConfig(GatedConfig):
    """Every block learns which K earlier blocks to read (MaskConnect, ECCV 2018)."""

    rule: Literal["maskconnect"]
    fan_in: Count
    aggregate: Literal["mean", "sum"] = "mean"
    scope: Literal["stage", "network"] = "stage"
    gate_init: Literal["uniform", "chain"] = (
        "uniform"  # chain: half of the mass on the block before; for trained weights
    )


class MaskEdges(Gates):
    """The gates of one stage, and how they join what a block may read."""

    def __init__(
        self, sources: Sources, fan_in: int, aggregate: Literal["mean", "sum"], init: Literal["uniform", "chain"]
    ) -> None:
        super().__init__([len(row) for row in sources], fan_in, init)
        self.aggregate = aggregate

    def forward(self, block: int, inputs: list[Tensor]) -> Tensor:
        n = len(inputs)
        if n == 1:
            return inputs[0]
        joined = _masked_sum(self.mask_of(block), inputs)
        return joined / min(self.fan_in, n) if self.aggregate == "mean" else joined


def maskconnect(stages: tuple[Stage, ...], candidates: tuple[Sources, ...], config: MaskConnectConfig) -> Wired:
    """The rule: every block may read all its candidates; one set of gates a stage.

    Raises:
        WiringError: no block has more than K candidates.
    """
    most = max(len(row) for rows in candidates for row in rows)
    if most <= config.fan_in:
        raise WiringError(
            f"connectivity.fan_in: {config.fan_in} leaves nothing to learn, no block has more than {most} candidates; "
            "lower it, or take rule: all"
        )
    edges: list[nn.Module] = [
        MaskEdges(rows, config.fan_in, config.aggregate, config.gate_init)
        if any(len(row) > 1 for row in rows)
        else FixedEdges([1] * len(rows), config.aggregate)
        for rows in candidates
    ]
    return candidates, edges


def _masked_sum(mask_N: Tensor, inputs: list[Tensor]) -> Tensor:
    """sum_j m_j y_j over all candidates, so that backward leaves <dL/dx, y_j> for closed gates too."""
    total = mask_N[0].to(inputs[0].dtype) * inputs[0]
    for position in range(1, len(inputs)):
        total = torch.addcmul(total, mask_N[position].to(inputs[position].dtype), inputs[position])
    return total
