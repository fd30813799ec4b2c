"""Remove what the output does not depend on: dead blocks with their parameters, gates, and wiring that became a chain.

Exact: what is removed is not run by the frozen model, so the output is bit-identical.
"""

from __future__ import annotations

import torch
from torch import nn

from mcdeploy.connectivity.topology import Node
from mcdeploy.connectivity.wiring import WiredStage, fix, topology_of, wired_stages


def freeze(model: nn.Module) -> list[str]:
    """Fix every learned wiring to its top K sources; the gates go.

    Returns:
        The stages that had gates.
    """
    stages = wired_stages(model)
    learned = [name for name, stage in stages.items() if not stage.is_dynamic and stage.gate_values() is not None]
    if learned:
        fix(model, topology_of(model))
    return learned


def drop_dead_blocks(model: nn.Module) -> list[str]:
    """Delete the blocks that no stage output depends on. Live blocks keep their names, and so their state-dict keys.

    Returns:
        Module paths of the blocks removed, empty when nothing changed.
    """
    stages = wired_stages(model)
    if not stages:
        return []
    topology = topology_of(model)
    dead = topology.dead_blocks()
    _, moved = topology.without_dead_blocks()
    for s, (name, stage) in enumerate(stages.items()):
        kept = tuple(i for i in range(1, len(topology.stages[s].blocks) + 1) if Node(s, i) in moved)
        model.set_submodule(name, stage.pruned(kept, moved).train(stage.training))
    return [topology.describe(node) for node in dead]


def unwrap_chains(model: nn.Module) -> list[str]:
    """Turn every stage that reads like a chain back into a plain container, unless another stage reads its blocks.

    Returns:
        Module paths of the stages unwrapped, empty when nothing changed.
    """
    stages = wired_stages(model)
    if not stages:
        return []
    topology = topology_of(model)
    lenders = {
        source.stage for node, sources in topology.edges().items() for source in sources if source.stage != node.stage
    }
    plain = [
        s
        for s, stage in enumerate(stages.values())
        if isinstance(stage, WiredStage) and topology.is_chain(s) and s not in lenders
    ]
    for s in plain:
        stage = stages[topology.stages[s].name]
        assert isinstance(stage, WiredStage)
        model.set_submodule(topology.stages[s].name, stage.unwrapped().train(stage.training))
    _renumber(model)
    return [topology.stages[s].name for s in plain]


def _renumber(model: nn.Module) -> None:
    """Stages are numbered by their order; after some were unwrapped, the others move up. The last empties the tape."""
    left = list(wired_stages(model).values())
    number = {stage.index: new for new, stage in enumerate(left)}
    for stage in left:
        stage.index = number[stage.index]
        if not isinstance(stage, WiredStage):
            continue
        stage.sources = tuple(
            tuple(s._replace(node=s.node._replace(stage=number[s.node.stage])) for s in row) for row in stage.sources
        )
        stage.is_last = stage is left[-1]


def count_parameters(model: nn.Module) -> int:
    """Numbers in weights and biases; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, example: torch.Tensor) -> int:
    """Multiply-accumulates of one image, by torch's own counter (convolutions, linear layers, attention)."""
    from torch.utils.flop_counter import FlopCounterMode

    # the counter hooks into autograd: without it, it fails on blocks that receive a slice of a parameter
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model(example[:1])
    return counter.get_total_flops() // 2
