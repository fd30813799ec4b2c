"""Freeze a net whose wiring depends on the image: what calibration images never vary is decided for good.

On calibration images, in float64, per stage and with A the edge weights of ``connectivity.ddw``:

    an edge that is open for no image           goes; a router keeps only the rows it still decides
    an edge always open where its source runs, A constant    becomes that constant
    the only edge a node still has, always open, aggregate: mean     becomes 1, since A / A = 1
    a node without a way to the output          loses its edges; ``drop_dead_blocks`` removes it

Exact on the calibration images but for the constants, which move by at most ``TOLERANCE``; another image may have
wanted an edge that is gone. Compile counts that on the images it is given, and prune-export on the whole validation
set. A stage with nothing left to decide becomes a plain one: ``WiredStage`` where its edges weigh the same, else
``WeightedStage``.
"""

# B = images, E = edges of a stage, N = nodes of a stage with its input and its output, K = classes, R = router rows

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mcdeploy.compile.certify import Check, double_copy
from mcdeploy.compile.prune import count_macs
from mcdeploy.connectivity.ddw import OUTPUT, DynamicStage, Edge, dynamic_stages
from mcdeploy.connectivity.stages import Source
from mcdeploy.connectivity.topology import Node, StageWiring
from mcdeploy.connectivity.wiring import FixedEdges, WiredModule, WiredStage
from mcdeploy.errors import ParityError, WiringError

TOLERANCE = 1e-6  # weights of an edge that lie within this share of the largest count as one constant
RTOL_CONSTANTS = 100 * TOLERANCE  # of the logits, for putting constants in the place of weights
NEAR_THRESHOLD = 1e-4  # |alpha - tau| below which rounding in another backend may open or close the edge
BATCH = 64  # images of one pass


@dataclass(frozen=True)
class Record:
    """What images did to every dynamic stage, by module path, in the order of its edges and nodes."""

    open_BE: dict[str, Tensor]  # bool
    weights_BE: dict[str, Tensor]  # 0 where closed
    executed_BN: dict[str, Tensor]  # bool
    alpha_BE: dict[str, Tensor]  # before the threshold; NaN where the router was not called
    margin_B: Tensor  # smallest |alpha - tau| of the image over all edges that a router decides
    logits_BK: Tensor


@dataclass(frozen=True)
class Calibration:
    """How a net with per-image wirings was frozen, in numbers for the certificate; shares are 0..1."""

    images: int
    wirings: int  # different ones, of the whole net
    wiring_unchanged: float  # share of the calibration images that open the same edges as before
    near_threshold: int  # calibration images with an edge within 1e-4 of the threshold
    skipped_macs: int  # of the blocks that are left, what an image does not execute, mean
    decisions: tuple[int, int]  # edges that a router decides, before and after

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def record(model: nn.Module, images: Tensor) -> Record:
    """Run images through a model with dynamic stages, as it is, and keep how they were wired.

    Args:
        model: in evaluation mode, with at least one dynamic stage.
        images: [B, C, H, W], B >= 1, of the model's type and on its device.
    """
    stages = dynamic_stages(model)
    logits: list[Tensor] = []
    margins: list[Tensor] = []
    kinds: tuple[dict[str, list[Tensor]], ...] = tuple({name: [] for name in stages} for _ in range(4))
    with torch.no_grad(), _listening(stages) as heard:
        for batch in images.split(BATCH):
            heard.clear()
            logits.append(model(batch))
            margin_B = torch.full((len(batch),), torch.inf, dtype=batch.dtype, device=batch.device)
            for name, stage in stages.items():
                last, alpha_BE = stage.last, _alphas(name, stage, heard, len(batch))
                found = (last.open[stage.index], last.weights[stage.index], last.executed[stage.index], alpha_BE)
                for kind, tensor in zip(kinds, found, strict=True):
                    kind[name].append(tensor)
                decided = [e for e, edge in enumerate(stage.edges) if edge not in stage.constant]
                distance_BE = (alpha_BE[:, decided] - stage.tau).abs().nan_to_num(nan=torch.inf)
                margin_B = torch.minimum(margin_B, distance_BE.amin(1)) if decided else margin_B
            margins.append(margin_B)
    whole = [{name: torch.cat(parts) for name, parts in kind.items()} for kind in kinds]
    return Record(whole[0], whole[1], whole[2], whole[3], torch.cat(margins), torch.cat(logits))


@contextmanager
def _listening(stages: Mapping[str, DynamicStage]) -> Iterator[dict[tuple[str, int], Tensor]]:
    """What every router that is called answers, [B, R], by stage and node."""
    heard: dict[tuple[str, int], Tensor] = {}

    def keep(name: str, node: int) -> Any:
        def hook(_: nn.Module, __: Any, z_BR: Tensor) -> None:
            heard[name, node] = z_BR

        return hook

    handles = [
        stage.router[str(node)].register_forward_hook(keep(name, node))
        for name, stage in stages.items()
        for node in stage.routed
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _alphas(name: str, stage: DynamicStage, heard: Mapping[tuple[str, int], Tensor], count: int) -> Tensor:
    position = {edge: e for e, edge in enumerate(stage.edges)}
    alpha_BE = stage.tau.new_full((count, len(stage.edges)), torch.nan)
    for edge, weight in stage.constant.items():
        alpha_BE[:, position[edge]] = weight
    for node, edges in stage.routed.items():
        if (name, node) in heard:
            alpha_BE[:, [position[edge] for edge in edges]] = torch.sigmoid(heard[name, node] / stage.temperature)
    return alpha_BE


def settled(model: nn.Module, images: Tensor) -> Tensor:
    """Which images are wired alike by every backend: none of their edges is near the threshold, bool [B].

    Args:
        model: with dynamic stages or without.
    """
    if not dynamic_stages(model):
        return torch.ones(len(images), dtype=torch.bool)
    return record(model, images).margin_B >= NEAR_THRESHOLD


# ----------------------------------------------------------------------------------------------------------- freezing


def narrow(model: nn.Module, images: Tensor) -> tuple[dict[str, list[str]], Calibration, Check]:
    """Decide for good what the calibration images leave undecided for none of them, in place.

    Nodes that no image needs stay in the model without edges; ``drop_dead_blocks`` removes them.

    Args:
        model: in evaluation mode, with at least one dynamic stage.
        images: [B, C, H, W] as the model sees them.

    Returns:
        What went and why, the calibration in numbers, and the check that the images' logits stayed.

    Raises:
        ParityError: the logits moved although the wiring did not.
    """
    before = double_copy(model, scrambled=False)
    images = images.double().cpu()
    found = record(before, images)
    stages = dynamic_stages(model)
    removed: dict[str, list[str]] = {}
    for name, stage in stages.items():
        small, why = _narrowed(name, stage, found)
        model.set_submodule(name, small)
        for reason, what in why.items():
            removed.setdefault(f"{reason} on {len(images)} calibration images", []).extend(what)
    after = record(double_copy(model, scrambled=False), images)
    same_B = _same_wiring(found, after, stages, dynamic_stages(model))
    check = _check_same_logits(found.logits_BK[same_B], after.logits_BK[same_B], len(images))
    calibration = Calibration(
        images=len(images),
        wirings=len(torch.cat(list(after.open_BE.values()), 1).unique(dim=0)),
        wiring_unchanged=float(same_B.double().mean()),
        near_threshold=int((found.margin_B < NEAR_THRESHOLD).sum()),
        skipped_macs=round(_skipped_macs(dynamic_stages(model), after)),
        decisions=(_decisions(stages), _decisions(dynamic_stages(model))),
    )
    return {reason: what for reason, what in removed.items() if what}, calibration, check


def _same_wiring(
    before: Record, after: Record, wide: Mapping[str, DynamicStage], narrow: Mapping[str, DynamicStage]
) -> Tensor:
    """Which images open the same of the edges that are left, bool [B]; no node has gone yet."""
    same_B = torch.ones(len(before.margin_B), dtype=torch.bool)
    for name, stage in wide.items():
        left = [e for e, edge in enumerate(stage.edges) if edge in set(narrow[name].edges)]
        same_B &= (before.open_BE[name][:, left] == after.open_BE[name]).all(1)
    return same_B


def _narrowed(name: str, stage: DynamicStage, found: Record) -> tuple[DynamicStage, dict[str, list[str]]]:
    open_BE, executed_BN = found.open_BE[name], found.executed_BN[name]
    position = {edge: e for e, edge in enumerate(stage.edges)}
    ever = [edge for edge in stage.edges if bool(open_BE[:, position[edge]].any())]
    useful = _between(0, len(stage.block_names), ever)
    kept = [edge for edge in ever if useful.issuperset(edge)]
    constant: dict[Edge, float] = {}
    for edge in kept:
        if edge in stage.constant:
            constant[edge] = stage.constant[edge]
        elif (weight_B := _weights_if_always_open(name, stage, position[edge], found)) is not None:
            if stage.aggregate == "mean" and sum(j == edge[1] for _, j in kept) == 1:
                constant[edge] = 1.0
            elif float(weight_B.max() - weight_B.min()) <= TOLERANCE * float(weight_B.max()):
                constant[edge] = float(weight_B.mean())
    routed = [edge for edge in kept if edge not in constant]
    small = stage.smaller(tuple(range(1, len(stage.sources))), routed, constant)
    small.always |= {node for node in range(1, len(stage.block_names)) if bool(executed_BN[:, node].all())}

    def words(edges: list[Edge]) -> list[str]:
        names = ("input", *stage.block_names)
        return [f"{name}: {names[i]} -> {names[j]}" for i, j in edges]

    return small, {
        "edge never open": words([edge for edge in stage.edges if edge not in ever]),
        "edge that leads nowhere": words([edge for edge in ever if edge not in kept]),
        "router row, since the edge is always open at one weight": words(
            [edge for edge in constant if edge not in stage.constant]
        ),
        "router with nothing left to decide": [
            f"{name}.router.{node}" for node in stage.routed if node not in small.routed
        ],
    }


def _weights_if_always_open(name: str, stage: DynamicStage, e: int, found: Record) -> Tensor | None:
    """The weights of an edge, one an image, if it is open whenever its source runs; else None.

    Where the stage's input decides, the weight is known for every image. Where the source's own feature does, it counts
    for the images that run the source.
    """
    if bool(found.open_BE[name][:, e].all()):
        return found.weights_BE[name][:, e]
    runs_B = slice(None) if stage.known_at_start else found.executed_BN[name][:, stage.edges[e][0]]
    alpha_B = found.alpha_BE[name][runs_B, e]
    return alpha_B if bool((alpha_B >= stage.tau).all()) else None


def _between(first: int, last: int, edges: list[Edge]) -> set[int]:
    """Nodes on a way from the first to the last; these two always."""
    forward, backward = {first}, {last}
    for i, j in sorted(edges):
        forward |= {j} if i in forward else set()
    for i, j in sorted(edges, key=lambda edge: edge[1], reverse=True):
        backward |= {i} if j in backward else set()
    return (forward & backward) | {first, last}


def _check_same_logits(before_BK: Tensor, after_BK: Tensor, images: int) -> Check:
    if not len(before_BK):
        raise ParityError(
            "compile: no calibration image kept its wiring; its weights are too close to the threshold to be frozen"
        )
    difference = float((before_BK - after_BK).abs().max() / before_BK.abs().max().clamp_min(1e-30))
    if not difference <= RTOL_CONSTANTS:
        raise ParityError(
            f"compile: freezing moved the logits of calibration images by {difference:.2e}, "
            f"allowed is {RTOL_CONSTANTS:g}; nothing was written"
        )
    return Check(
        "freeze", "as trained", f"within {RTOL_CONSTANTS:g} in float64 on {len(before_BK)} of {images} "
        "calibration images, those whose wiring stays", difference,
    )  # fmt: skip


def _skipped_macs(stages: Mapping[str, DynamicStage], found: Record) -> float:
    """MACs of the nodes that still have a source and that an image does not execute, mean over the images."""
    return sum(
        stage.macs[j - 1] * float((~found.executed_BN[name][:, j]).double().mean())
        for name, stage in stages.items()
        for j in range(1, len(stage.block_names))
        if stage.sources[j]
    )


def _decisions(stages: Mapping[str, DynamicStage]) -> int:
    return sum(len(edges) for stage in stages.values() for edges in stage.routed.values())


# ------------------------------------------------------------------------------------------------------ static stages


class WeightedStage(WiredModule):
    """A stage whose nodes read the same sources for every image, with constant weights that differ.

    x_j = f_j( sum_i w_ij x_i ); with ``aggregate: mean`` the weights of a node add up to 1.

    Args:
        index: position of this stage in the topology.
        blocks: child name to block, in the order of execution, all of them live.
        reads: for each block, source to weight; source 0 is the stage's input.
    """

    def __init__(
        self,
        index: int,
        blocks: Mapping[str, nn.Module],
        reads: tuple[dict[int, float], ...],
        aggregate: Literal["mean", "sum"],
    ) -> None:
        super().__init__()
        for name, block in blocks.items():
            self.add_module(name, block)
        self.index = index
        self.block_names = tuple(blocks)
        self.reads = reads
        self.aggregate = aggregate

    def forward(self, x: Tensor) -> Tensor:
        """x: the stage's input, [B, C, H, W] or whatever the host's blocks hand on; returns the last block's output."""
        features = [x]
        for name, weights in zip(self.block_names, self.reads, strict=True):
            terms = [features[i] if weight == 1 else features[i] * weight for i, weight in weights.items()]
            joined = terms[0]
            for term in terms[1:]:
                joined = joined + term
            features.append(self.get_submodule(name)(joined))
        return features[-1]

    def wiring(self, name: str) -> StageWiring:
        reads = tuple(tuple(Node(self.index, i) for i in sorted(weights)) for weights in self.reads)
        return StageWiring(name, self.block_names, reads)

    def candidates(self, name: str) -> StageWiring:
        return self.wiring(name)

    def fix(self, wiring: StageWiring, aggregate: Literal["mean", "sum"], live: frozenset[int]) -> None:
        raise WiringError(
            f"{wiring.name}: is compiled already, so its wiring cannot be changed; wire the trained model"
        )

    def pruned(self, kept: tuple[int, ...], moved: Mapping[Node, Node]) -> WeightedStage:
        place = {0: 0, **{i: moved[Node(self.index, i)].index for i in kept}}
        reads = tuple({place[i]: weight for i, weight in self.reads[j - 1].items()} for j in kept)
        blocks = {self.block_names[j - 1]: self.get_submodule(self.block_names[j - 1]) for j in kept}
        return WeightedStage(self.index, blocks, reads, self.aggregate)


def settle(model: nn.Module) -> list[str]:
    """Turn every dynamic stage with nothing left to decide into a plain one, in place; dead nodes are gone before.

    The node ``output`` goes where it only hands on the last block.

    Returns:
        Module paths of the stages that are plain now, empty when nothing changed.
    """
    still = {name: stage for name, stage in dynamic_stages(model).items() if not stage.routed}
    for name, stage in still.items():
        model.set_submodule(name, static_stage(stage).train(stage.training))
    return list(still)


def static_stage(stage: DynamicStage) -> WiredModule:
    """A dynamic stage without routers as ``WiredStage``, or as ``WeightedStage`` where weights differ."""
    reads = []
    for j in range(1, len(stage.sources)):
        weights = {i: stage.constant[i, j] for i in stage.sources[j]}
        total = sum(weights.values()) if stage.aggregate == "mean" else 1.0
        reads.append({i: weight / total for i, weight in weights.items()})
    blocks = {name: stage.get_submodule(name) for name in stage.block_names}
    if reads[-1] == {len(reads) - 1: 1.0}:
        del blocks[OUTPUT], reads[-1]
    if all(len(set(weights.values())) == 1 for weights in reads) and (
        stage.aggregate == "mean" or all(weight == 1 for weights in reads for weight in weights.values())
    ):
        sources = tuple(tuple(Source(Node(stage.index, i)) for i in weights) for weights in reads)
        return WiredStage(stage.index, blocks, sources, FixedEdges([len(row) for row in sources], stage.aggregate))
    return WeightedStage(stage.index, blocks, tuple(reads), stage.aggregate)


# -------------------------------------------------------------------------------------------------------------- forms


def open_everything(model: nn.Module) -> nn.Module:
    """A copy with every edge open for every image: the same weights without the skipping, to compare speed with."""
    form = copy.deepcopy(model)
    for stage in dynamic_stages(form).values():
        stage.tau.fill_(0.0)
        stage.always = frozenset(range(1, len(stage.sources)))
    return form


def count_wirings(model: nn.Module, images: Tensor) -> int:
    """How many different wirings of the whole net the images have.

    Args:
        model: in evaluation mode, with at least one dynamic stage.
    """
    return len(torch.cat(list(record(model, images).open_BE.values()), 1).unique(dim=0))


def mean_macs(model: nn.Module, example: Tensor, calibration: Calibration | None) -> int:
    """Multiply-accumulates of one image, the mean over the calibration images where wirings differ."""
    everything = count_macs(open_everything(model), example)
    return everything if calibration is None else everything - calibration.skipped_macs
