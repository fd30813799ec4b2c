"""All rules by name: the options of each, and the function that wires a model by it.

A new rule is one file beside this one, with its options and its function, and one line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from mcdeploy.connectivity import ddw, fixed, gateconnect, maskconnect, sparse
from mcdeploy.connectivity.stages import Stage, candidate_sources, find_stages
from mcdeploy.connectivity.wiring import Sources, Wired, install
from mcdeploy.errors import WiringError
from mcdeploy.section import RuleConfig

Fill = Callable[[tuple[Stage, ...], tuple[Sources, ...], Any], Wired]
Install = Callable[[nn.Module, Tensor, Any], None]


class Rule(NamedTuple):
    """``install(model, example, config)`` wires a model in place; example: images [B, C, H, W]."""

    config: type[RuleConfig]
    install: Install


def by_stages(fill: Fill, *, needs_choices: bool = True) -> Install:
    """An ``install`` for a rule that only says what every block reads, given what it may read, and what joins it.

    Args:
        fill: takes the stages, their candidates and the rule's options; returns sources and edges, one a stage.
        needs_choices: refuse a model in which no block can read more than the one before it; else such a model, also
            one without any stage such as a DenseNet, stays as it is.
    """

    def install_rule(model: nn.Module, example: Tensor, config: Any) -> None:
        stages = find_stages(model, example, may_have_none=not needs_choices)
        scope = getattr(config, "scope", "stage")
        if scope == "stage" and needs_choices:
            stages = tuple(stage for stage in stages if stage.num_choices())
        candidates = candidate_sources(stages, scope)
        if needs_choices and all(len(row) < 2 for rows in candidates for row in rows):
            raise WiringError(
                f"{type(model).__name__}: no block can read more than the one before it, so there is nothing to wire; "
                "pick a deeper backbone or scope: network"
            )
        sources, edges = fill(stages, candidates, config)
        install(model, stages, sources, edges)

    return install_rule


RULES: dict[str, Rule] = {
    "chain": Rule(fixed.ChainConfig, by_stages(fixed.chain, needs_choices=False)),
    "all": Rule(fixed.AllConfig, by_stages(fixed.all_sources)),
    "random": Rule(fixed.RandomConfig, by_stages(fixed.random)),
    "sparse": Rule(sparse.SparseConfig, by_stages(sparse.sparse)),
    "drop": Rule(fixed.DropConfig, by_stages(fixed.drop)),
    "maskconnect": Rule(maskconnect.MaskConnectConfig, by_stages(maskconnect.maskconnect)),
    "gateconnect": Rule(gateconnect.GateConnectConfig, gateconnect.install),
    "ddw": Rule(ddw.DdwConfig, ddw.install),
}
