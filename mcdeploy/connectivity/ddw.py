"""DDW: every image gets its own wiring, from a router (Differentiable Dynamic Wirings, Yuan et al., ICCV 2021).

Only the abstract of the paper (DG-Net, arXiv 2010.01097) is verified; the equations are ours after ``facts/papers.md``
section 5. A stage is a complete graph over its nodes: 0 is its input, i its i-th block, and one more node, ``output``,
only joins. For image b, with alpha in (0, 1) from a linear router on globally averaged features,

    z_ij[b]     = v_ij . GAP(x_r)[b] + c_ij        r = i (router: node)  or  r = 0 (router: stage, all at once)
    alpha_ij[b] = sigmoid(z_ij[b] / T)
    open_ij[b]  = (alpha_ij[b] >= tau) and runs_i[b]
    runs_j[b]   = or_i open_ij[b],                 runs_0 = 1
    A_ij[b]     = alpha_ij[b] if open_ij[b] else 0
    x_j[b]      = f_j( sum_i A_ij[b] x_i[b] )      aggregate: sum, as published
    x_j[b]      = f_j( sum_i A_ij[b] x_i[b] / sum_i A_ij[b] )         aggregate: mean; one open edge is a plain call

A node that does not run emits nothing. The output, a block that changes the shape, and what a block without a choice
reads must run: where none of their edges is open, the one from the newest running node opens. With ``router: stage``
all this is known before a block runs, so nodes that no open path leads from to the output are not executed either.
A block that changes the shape and has one source reads it with the constant weight 1. Blocks keep their own shortcuts.

The whole batch is computed with zeros where an image takes no part, so in training a block's BN also sees those zeros.
In evaluation outside torch.compile and torch.export, a node that no image of the batch needs is not called at all.

A closed edge gets no gradient from the task. The penalty reaches it: with o_ij = sigmoid((z_ij - z_tau) / T_P), where
sigmoid(z_tau / T) = tau, the same rules on chances give each node's chance e_j of being executed (edges taken as
independent), and

    penalty = weight * (mean_b sum_j macs_j executed_j[b] / sum_j macs_j - target_open)^2

has the really executed share as its value and the gradient of e_j. It acts from both sides of the target: below it,
nothing else could open an edge again.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mcdeploy.connectivity.stages import Stage, find_stages
from mcdeploy.connectivity.topology import Node, StageWiring
from mcdeploy.connectivity.wiring import WiredModule, wired_stages
from mcdeploy.errors import WiringError
from mcdeploy.section import Finite, Fraction, NotNegative, Positive, RuleConfig

# B = images, N = nodes of a stage with its input and its output, E = edges of a stage, S = edges into one node,
# C = channels, R = edges that one router decides

Edge = tuple[int, int]  # source and reader, by position in the stage
OUTPUT = "output"  # the name of the last node of every stage
PENALTY_TEMPERATURE = 1.0  # T_P


class DdwConfig(RuleConfig):
    """Every image has its own wiring, from routers (Differentiable Dynamic Wirings, ICCV 2021)."""

    rule: Literal["ddw"]
    router: Literal["stage", "node"] = "stage"  # what is averaged: the stage's input, or each node's own feature
    tau: Annotated[float, Field(ge=0, lt=1)] = 0.5  # an edge is open when its weight reaches it; 0: always
    aggregate: Literal["mean", "sum"] = "mean"
    temperature: Positive = 1.0  # T
    temperature_end: Positive | None = None  # T in the last epoch, reached geometrically
    open_bias: Finite = 1.0  # c at the start, where v = 0
    warm_up: Annotated[int, Field(ge=0)] = 0  # epochs with every edge open
    target_open: Fraction | None = None  # share of the blocks' MACs to execute, 0..1
    penalty: NotNegative = 1.0  # weight of the squared distance from target_open

    @model_validator(mode="after")
    def _starts_open(self) -> DdwConfig:
        start = 0.5 * (1 + math.tanh(self.open_bias / self.temperature / 2))
        if start < self.tau:
            raise ValueError(f"open_bias {self.open_bias} starts every edge at {start:.3f}, closed by tau {self.tau}")
        if self.target_open is not None and self.tau == 0:
            raise ValueError("target_open needs edges that can close; set tau above 0")
        return self


class LastPass:
    """What the last forward pass left behind, by stage; shared by the stages of a model. A copy starts empty."""

    def __init__(self) -> None:
        self.block_macs: dict[int, tuple[int, ...]] = {}  # of one image; kept in copies
        self.weights: dict[int, Tensor] = {}  # A, [B, E]
        self.open: dict[int, Tensor] = {}  # bool, [B, E]
        self.executed: dict[int, Tensor] = {}  # bool, [B, N]
        self.logits: dict[int, Tensor] = {}  # z of all routers, [B, R], with gradient; in training with a target
        self.macs: dict[int, Tensor] = {}  # while the penalty is being gathered

    def __deepcopy__(self, memo: dict[int, object]) -> LastPass:
        memo[id(self)] = fresh = LastPass()
        for index, macs in self.block_macs.items():
            fresh.expect(index, macs)
        return fresh

    def expect(self, index: int, macs: tuple[int, ...]) -> None:
        """Make a place for a stage; torch.compile records a forward pass anew when places appear later."""
        self.block_macs[index] = macs
        for kept in (self.weights, self.open, self.executed):
            kept[index] = torch.empty(0)

    def executed_share(self, stages: Collection[int]) -> Tensor:
        """Executed share of the blocks' MACs of these stages, 0..1, one number an image, [B]."""
        done = [self.executed[s][:, 1:-1].double() @ _macs(self.block_macs[s], self.executed[s]) for s in stages]
        return torch.stack(done).sum(0) / max(1, sum(sum(self.block_macs[s]) for s in stages))


class Seen:
    """The wirings of some images: what ``statistics`` sums up."""

    def __init__(self) -> None:
        self.patterns: list[Tensor] = []  # [B] each
        self.opens: list[Tensor] = []  # share of the images of a batch, [E] each
        self.executed: list[Tensor] = []  # mean over a batch, scalars

    def add(self, open_BE: Tensor, executed_B: Tensor) -> None:
        """One batch."""
        self.patterns.append(pattern_ids(open_BE))
        self.opens.append(open_BE.double().sum(0))
        self.executed.append(executed_B.sum())

    def num_images(self) -> int:
        return sum(len(pattern_B) for pattern_B in self.patterns)

    def open_share(self) -> Tensor:
        """Share of the images, 0..1, for which each edge was open, [E]."""
        return torch.stack(self.opens).sum(0) / self.num_images()

    def summary(self) -> dict[str, float]:
        """Entropy of the wirings in bits, their number, and the executed share of MACs."""
        _, count_W = torch.cat(self.patterns).unique(return_counts=True)
        share_W = count_W.double() / count_W.sum()
        return {
            "entropy_bits": float(-(share_W * share_W.log2()).sum()) + 0.0,
            "wirings": float(len(count_W)),
            "executed": float(torch.stack(self.executed).sum()) / self.num_images(),
        }


@dataclass
class Routing:
    """One forward pass through one stage."""

    logits: dict[int, Tensor] = field(default_factory=dict)  # z, [B, R] by node with a router
    alpha: dict[Edge, Tensor] = field(default_factory=dict)  # [B, 1] by edge
    weights: dict[int, Tensor] = field(default_factory=dict)  # A, [B, S] by reader
    open: dict[int, Tensor] = field(default_factory=dict)  # bool, [B, S] by reader
    runs: dict[int, Tensor] = field(default_factory=dict)  # bool, [B, 1] by node
    executed: dict[int, Tensor] = field(default_factory=dict)  # bool, [B, 1] by node


class DynamicStage(WiredModule):
    """A stage whose wiring depends on the image.

    Args:
        index: position of this stage in the topology.
        blocks: child name to block, in the order of execution; the node ``output`` is added behind them.
        routers: node to the edges that its feature decides and the layer [C] -> [R] that does so.
        constant: edges that are always open, with their weights. An edge in neither is closed for good.
        required: nodes that run for every image.
        macs: multiply-accumulates of each block for one image.
        channel_axis: of a feature map, 1 or -1.
        last: shared by all dynamic stages of the model; the last one of them has ``is_last``.
    """

    is_dynamic = True

    def __init__(
        self,
        index: int,
        blocks: Mapping[str, nn.Module],
        routers: Mapping[int, tuple[tuple[Edge, ...], nn.Linear]],
        constant: Mapping[Edge, float],
        *,
        required: frozenset[int],
        macs: tuple[int, ...],
        channel_axis: int,
        config: DdwConfig,
        last: LastPass,
        is_last: bool,
    ) -> None:
        super().__init__()
        for name, block in blocks.items():
            self.add_module(name, block)
        self.output = nn.Identity()
        self.router = nn.ModuleDict({str(node): linear for node, (_, linear) in routers.items()})
        self.index = index
        self.block_names = (*blocks, OUTPUT)
        self.routed = {node: edges for node, (edges, _) in routers.items()}
        self.constant = dict(constant)
        self.required = required
        self.macs = macs
        last.expect(index, macs)
        self.channel_axis = channel_axis
        self.config = config
        self.aggregate = config.aggregate
        self.last = last
        self.is_last = is_last
        decided = [edge for edges in self.routed.values() for edge in edges]
        self.edges = tuple(sorted((*decided, *constant), key=lambda edge: (edge[1], edge[0])))
        self.sources = tuple(tuple(i for i, j in self.edges if j == node) for node in range(len(blocks) + 2))
        self.known_at_start = set(self.routed) <= {0}
        self.conditional = False  # whether torch.export wraps the nodes that are not in ``always`` in torch.cond
        self.tells = False  # whether an export, too, leaves behind how an image was wired
        self.always = _always_executed(len(blocks) + 1, self.edges, required)
        self.register_buffer("tau", torch.tensor(config.tau), persistent=False)
        self.register_buffer(
            "temperature", torch.tensor(config.temperature_end or config.temperature), persistent=False
        )
        self.register_buffer("open_share_E", torch.ones(len(self.edges)))  # of the last epoch, for logs and drawings
        self.tau: Tensor
        self.temperature: Tensor
        self.open_share_E: Tensor
        self._seen, self._seen_network = Seen(), Seen()

    def forward(self, x: Tensor) -> Tensor:
        """x: the stage's input, [B, C, H, W] or whatever the host's blocks hand on; returns the output node."""
        nodes = range(1, len(self.sources))
        features, routing = {0: x}, self._start(x)
        self._route(0, x, routing)
        if self.known_at_start:
            for j in nodes:
                self._open(j, routing)
            self._keep_wanted(routing)
        for j, name in zip(nodes, self.block_names, strict=True):
            if not self.known_at_start:
                self._open(j, routing)
            if not self.sources[j] or self._is_idle(routing.executed[j]):
                continue
            features[j] = self._execute(j, name, features, routing)
            self._route(j, features[j], routing)
        self._remember(routing)
        return features[len(self.block_names)]

    def _start(self, x: Tensor) -> Routing:
        """Node 0 runs, and the constant edges are open, for every image."""
        always_B1 = torch.ones(x.shape[0], 1, dtype=torch.bool, device=x.device)
        routing = Routing(runs={0: always_B1}, executed={0: always_B1})
        for edge, weight in self.constant.items():
            routing.alpha[edge] = weight * always_B1.to(self.tau.dtype)
        return routing

    def _route(self, node: int, feature: Tensor, routing: Routing) -> None:
        """The weights of the edges that this node's feature decides; not in half precision, whatever autocast says."""
        if node not in self.routed:
            return
        dims = [dim for dim in range(1, feature.dim()) if dim != self.channel_axis % feature.dim()]
        pooled_BC = feature.mean(dims, dtype=self.tau.dtype)
        with _without_autocast(feature.device.type):
            routing.logits[node] = self.router[str(node)](pooled_BC)
        alpha_BR = torch.sigmoid(routing.logits[node] / self.temperature)
        routing.alpha.update(zip(self.routed[node], alpha_BR.split(1, 1), strict=True))

    def _open(self, j: int, routing: Routing) -> None:
        """Which edges into node j are open, their weights, and whether j runs."""
        edges = [(i, j) for i in self.sources[j]]
        if not edges:
            routing.runs[j] = routing.executed[j] = torch.zeros_like(routing.runs[0])
            return
        zero_B1 = torch.zeros_like(routing.runs[0], dtype=self.tau.dtype)  # from a node that was not called
        alpha_BS = torch.cat([routing.alpha.get(edge, zero_B1) for edge in edges], 1)
        runs_BS = torch.cat([routing.runs[i] for i in self.sources[j]], 1)
        open_BS = alpha_BS >= self.tau
        if any(edge in self.constant for edge in edges):
            open_BS = open_BS | torch.tensor([edge in self.constant for edge in edges], device=open_BS.device)
        open_BS = open_BS & runs_BS
        if j in self.required:
            later_BS = runs_BS.flip(1).cumsum(1).flip(1) - runs_BS.long()  # running sources after this one
            open_BS = open_BS | (~open_BS.any(1, keepdim=True) & runs_BS & (later_BS == 0))
        routing.open[j] = open_BS
        routing.weights[j] = torch.where(open_BS, alpha_BS, torch.zeros_like(alpha_BS))
        routing.runs[j] = routing.executed[j] = open_BS.any(1, keepdim=True)

    def _keep_wanted(self, routing: Routing) -> None:
        """Execute only what an open path leads from to the output; by walking backwards."""
        output = len(self.block_names)
        for i in range(output - 1, 0, -1):
            wanted_B1 = torch.zeros_like(routing.runs[0])
            for j in range(i + 1, output + 1):
                if i in self.sources[j]:
                    position = self.sources[j].index(i)
                    wanted_B1 = wanted_B1 | (routing.open[j][:, position : position + 1] & routing.executed[j])
            routing.executed[i] = routing.runs[i] & wanted_B1

    def _join(self, j: int, features: Mapping[int, Tensor], routing: Routing) -> Tensor:
        """What node j receives; zeros for an image whose edges into j are all closed."""
        weights_BS, sources = routing.weights[j], self.sources[j]
        if self.is_plain(j):
            return features[sources[0]]
        if self.aggregate == "mean":
            total_B1 = weights_BS.sum(1, keepdim=True)
            weights_BS = weights_BS / torch.where(total_B1 > 0, total_B1, torch.ones_like(total_B1))
        joined = None
        for position, i in enumerate(sources):
            if i not in features or self._is_idle(routing.open[j][:, position]):
                continue
            weight_B = weights_BS[:, position].to(features[i].dtype)
            term = weight_B.view(-1, *[1] * (features[i].dim() - 1)) * features[i]
            joined = term if joined is None else joined + term
        assert joined is not None
        return joined

    def _execute(self, j: int, name: str, features: Mapping[int, Tensor], routing: Routing) -> Tensor:
        """The node's block on what it receives; in an export with ``conditional`` only if some image needs it."""
        block, sources = self.get_submodule(name), self.sources[j]
        if j in self.always or not (self.conditional and torch.compiler.is_exporting()):
            return block(self._join(j, features, routing))

        def run(weights_BS: Tensor, *inputs: Tensor) -> tuple[Tensor]:
            here = Routing(weights={j: weights_BS}, open={j: weights_BS > 0})
            return (block(self._join(j, dict(zip(sources, inputs, strict=True)), here)),)

        def skip(weights_BS: Tensor, *inputs: Tensor) -> tuple[Tensor]:
            return (torch.zeros_like(inputs[0]),)  # a block that changes the shape always runs

        inputs = [features[i] for i in sources]
        return torch.cond(routing.executed[j].any(), run, skip, (routing.weights[j], *inputs))[0]

    def is_plain(self, j: int) -> bool:
        """Whether node j receives the very tensor of its only source, for every image."""
        sources = self.sources[j]
        if len(sources) != 1 or (sources[0], j) not in self.constant:
            return False
        weighs_one = self.aggregate == "mean" or self.constant[sources[0], j] == 1
        return weighs_one and (sources[0] == 0 or sources[0] in self.required)

    def _is_idle(self, wanted: Tensor) -> bool:
        """Nothing to do for any image of the batch: skipped in evaluation, where no graph is being recorded."""
        return not self.training and not torch.compiler.is_compiling() and not bool(wanted.any())

    def _remember(self, routing: Routing) -> None:
        if torch.compiler.is_exporting() and not self.tells:
            return
        nodes = [j for j in range(1, len(self.sources)) if self.sources[j]]
        open_BE = torch.cat([routing.open[j] & routing.executed[j] for j in nodes], 1)
        weights_BE = torch.cat([routing.weights[j].detach() for j in nodes], 1)
        self.last.open[self.index] = open_BE
        self.last.weights[self.index] = torch.where(open_BE, weights_BE, torch.zeros_like(weights_BE))
        executed_BN = torch.cat([routing.executed[node] for node in range(len(self.sources))], 1)
        self.last.executed[self.index] = executed_BN
        if self.training and self.config.target_open is not None:
            self.last.logits[self.index] = torch.cat(list(routing.logits.values()), 1)

    def expected_macs(self, z_BR: Tensor) -> Tensor:
        """The rules of a forward pass on chances: expected MACs of the blocks, mean over images; differentiable.

        Args:
            z_BR: what the routers said, one column an edge that they decide, in the order of ``routed``.
        """
        threshold = self.temperature * torch.logit(self.tau)
        one_B1 = torch.ones_like(z_BR[:, :1])
        one_B = one_B1[:, 0]
        order = [edge for edges in self.routed.values() for edge in edges] + list(self.constant)
        chance_BE = torch.sigmoid((z_BR - threshold) / PENALTY_TEMPERATURE)
        chance_BE = torch.cat([chance_BE, *[one_B1] * len(self.constant)], 1)[:, [order.index(e) for e in self.edges]]
        open_BNN = self._dense(chance_BE)
        output = len(self.block_names)

        runs, none_before, none_open_BN = [one_B], [], torch.ones_like(open_BNN[:, 0])
        for i in range(output):  # none_open: of the edges from the nodes up to i
            none_before.append(none_open_BN)
            none_open_BN = none_open_BN * (1 - open_BNN[:, i] * runs[i][:, None])
            runs.append(one_B if i + 1 in self.required else 1 - none_open_BN[:, i + 1])
        if not self.known_at_start:
            return self._macs_of(runs)

        # An edge into a required node also opens when none before it has and no later source runs.
        is_required_N = torch.tensor([j in self.required for j in range(output + 1)], device=one_B.device)
        exists_NN = self._dense(torch.ones_like(chance_BE[:1]))[0]
        none_later_BN = torch.ones_like(none_open_BN)
        passes: list[Tensor] = []
        for i in range(output - 1, -1, -1):
            forced_BN = exists_NN[i] * is_required_N * none_before[i] * none_later_BN
            passes.append(open_BNN[:, i] + (1 - open_BNN[:, i]) * forced_BN)
            none_later_BN = none_later_BN * (1 - exists_NN[i] * runs[i][:, None])
        wanted = {output: one_B}
        for i, passes_BN in zip(range(output - 1, 0, -1), passes, strict=False):
            unread_B = one_B
            for j in range(i + 1, output + 1):
                if (i, j) in self.edges:
                    unread_B = unread_B * (1 - passes_BN[:, j] * wanted[j])
            wanted[i] = 1 - unread_B
        return self._macs_of([runs[0], *(runs[i] * wanted[i] for i in range(1, output + 1))])

    def _macs_of(self, executed: list[Tensor]) -> Tensor:
        """Mean over images of the blocks' MACs; ``executed`` has a chance, [B], for every node."""
        blocks_BN = torch.stack(executed[1:-1], 1)
        return (blocks_BN * torch.tensor(self.macs, dtype=blocks_BN.dtype, device=blocks_BN.device)).sum(1).mean()

    def _dense(self, columns_BE: Tensor) -> Tensor:
        """One column an edge, placed in [B, N, N]; zero where there is no edge."""
        size = len(self.sources)
        flat_BM = columns_BE.new_zeros(len(columns_BE), size * size)
        places_E = torch.tensor([i * size + j for i, j in self.edges], device=columns_BE.device)
        return flat_BM.index_copy(1, places_E, columns_BE).view(-1, size, size)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Set the threshold and the temperature of an epoch, 0 to ``epochs`` - 1."""
        config = self.config
        end = config.temperature_end or config.temperature
        progress = 1.0 if epochs == 1 else epoch / (epochs - 1)
        self.tau.fill_(0.0 if epoch < config.warm_up else config.tau)
        self.temperature.fill_(config.temperature ** (1 - progress) * end**progress)

    def penalty(self) -> Tensor:
        """What the whole model's last forward pass adds to the loss, a scalar; the last stage asked answers for all."""
        last, target = self.last, self.config.target_open
        if target is None or self.index not in last.logits:
            return torch.zeros((), device=self.tau.device)
        expected = self.expected_macs(last.logits.pop(self.index))
        really = self._macs_of(list(last.executed[self.index].to(expected.dtype).unbind(1)))
        last.macs[self.index] = expected + (really - expected).detach()
        if last.logits:  # other stages have still to be asked
            return torch.zeros((), device=self.tau.device)
        share = torch.stack(list(last.macs.values())).sum() / max(1, sum(map(sum, last.block_macs.values())))
        last.macs.clear()
        return self.config.penalty * (share - target).square()

    def after_step(self) -> None:
        """Count the wirings of the last batch, without waiting for the device."""
        self._seen.add(self.last.open[self.index], self.last.executed_share([self.index]))
        if self.is_last:
            self._seen_network.add(
                torch.cat(list(self.last.open.values()), 1), self.last.executed_share(self.last.open)
            )

    def statistics(self) -> dict[str, float | list[list[float]]]:
        """The training images since the last call: how the edges stood, and how many wirings there were.

        Returns:
            open: for each node the share of images, 0..1, for which each edge into it was open; entropy_bits and
            wirings: of this stage's wirings; executed: share of its blocks' MACs. The last stage adds network_...: the
            same for all stages together. Empty when there was no image.
        """
        if not self._seen.patterns:
            return {}
        self.open_share_E.copy_(self._seen.open_share())
        found: dict[str, float | list[list[float]]] = {"open": self.gate_values(), **self._seen.summary()}
        if self.is_last:
            found |= {f"network_{what}": number for what, number in self._seen_network.summary().items()}
        self._seen, self._seen_network = Seen(), Seen()
        return found

    def wirings(self) -> Wirings:
        """What the last forward pass did."""
        open_BE, executed_BN = self.last.open[self.index], self.last.executed[self.index]
        open_BNN = self._dense(open_BE)
        weights_BNN = self._dense(self.last.weights[self.index])
        return Wirings(weights_BNN, open_BNN, executed_BN, pattern_ids(open_BE))

    def gate_values(self) -> list[list[float]]:
        """For each node the share of the last epoch's images, 0..1, for which each edge into it was open."""
        share = dict(zip(self.edges, self.open_share_E.tolist(), strict=True))
        return [[share[i, j] for i in self.sources[j]] for j in range(1, len(self.sources))]

    def wiring(self, name: str) -> StageWiring:
        """Every edge that may open; the node ``output`` is the last block.

        A node without an edge, which never runs, reads the one before it: a topology has no block without a source.
        """
        rows = [row or (j - 1,) for j, row in enumerate(self.sources[1:], start=1)]
        reads = tuple(tuple(Node(self.index, i) for i in row) for row in rows)
        return StageWiring(name, self.block_names, reads)

    def candidates(self, name: str) -> StageWiring:
        return self.wiring(name)

    def fix(self, wiring: StageWiring, aggregate: Literal["mean", "sum"], live: frozenset[int]) -> None:
        raise WiringError(f"{wiring.name}: its wiring depends on the image, so it cannot be fixed to one")

    def pruned(self, kept: tuple[int, ...], moved: Mapping[Node, Node]) -> DynamicStage:
        inside = {0, *kept}
        routed = [edge for edges in self.routed.values() for edge in edges if inside.issuperset(edge)]
        return self.smaller(kept, routed, {e: weight for e, weight in self.constant.items() if inside.issuperset(e)})

    def smaller(self, nodes: tuple[int, ...], routed: Collection[Edge], constant: Mapping[Edge, float]) -> DynamicStage:
        """The same stage with fewer nodes and fewer decisions; it shares the blocks and has routers of its own.

        Args:
            nodes: the blocks that stay, by their position here, ascending; the output is one of them.
            routed: edges between them that their router goes on deciding.
            constant: edges between them that are open for every image from now on, with their weights.

        Raises:
            WiringError: the output is missing, or an edge ends at a node that is.
        """
        place = {0: 0, **{old: new for new, old in enumerate(nodes, start=1)}}
        if len(self.block_names) not in place or not all(place.keys() >= set(edge) for edge in (*routed, *constant)):
            raise WiringError("a smaller stage needs the output, and both ends of every edge")
        routers = {}
        for node, edges in self.routed.items():
            rows = [row for row, edge in enumerate(edges) if edge in set(routed)]
            if rows:
                moved = tuple((place[edges[row][0]], place[edges[row][1]]) for row in rows)
                routers[place[node]] = (moved, _rows_of(self.router[str(node)], rows))
        stage = DynamicStage(
            self.index,
            {self.block_names[i - 1]: self[i - 1] for i in nodes[:-1]},
            routers,
            {(place[i], place[j]): weight for (i, j), weight in constant.items()},
            required=frozenset(place[j] for j in self.required if j in place),
            macs=tuple(self.macs[i - 1] for i in nodes[:-1]),
            channel_axis=self.channel_axis,
            config=self.config,
            last=self.last,
            is_last=self.is_last,
        )
        stage.tau, stage.temperature = self.tau.clone(), self.temperature.clone()
        stage.always |= {place[j] for j in self.always if j in place}
        return stage.to(self.tau.device).train(self.training)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self.get_submodule(name) for name in self.block_names)

    def __len__(self) -> int:
        return len(self.block_names)

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(self.block_names[index])


@dataclass(frozen=True)
class Wirings:
    """What one stage did with some images; N counts its input, its blocks and its output."""

    weights_BNN: Tensor  # A[b, i, j]: what node j weighs node i by, before dividing by the sum; 0 where closed
    open_BNN: Tensor  # bool
    executed_BN: Tensor  # bool
    patterns_B: Tensor  # int64, equal where the same edges are open


def adjacencies(model: nn.Module, images_BCHW: Tensor) -> dict[str, Wirings]:
    """The wiring that each image gets from every dynamic stage, by module path, in evaluation mode.

    Edges into nodes that are not executed for an image count as closed. The whole batch is run at once.
    """
    training = model.training
    model.eval()
    with torch.no_grad():
        model(images_BCHW)
    model.train(training)
    return {name: stage.wirings() for name, stage in dynamic_stages(model).items()}


def dynamic_stages(model: nn.Module) -> dict[str, DynamicStage]:
    """The dynamic stages of a model by module path, in the order of execution."""
    return {name: stage for name, stage in wired_stages(model).items() if isinstance(stage, DynamicStage)}


def pattern_ids(open_BE: Tensor) -> Tensor:
    """One integer an image, [B]: a random odd 64-bit number for every open edge, summed modulo 2^64."""
    generator = torch.Generator().manual_seed(0)
    keys_E = torch.randint(-(2**62), 2**62, (open_BE.shape[1],), generator=generator) * 2 + 1
    return (open_BE.long() * keys_E.to(open_BE.device)).sum(1)


def install(model: nn.Module, example: Tensor, config: DdwConfig) -> None:
    """The rule: every stage in which some block could be skipped becomes a ``DynamicStage``, in place.

    Raises:
        WiringError: there is none, or the model has a child named ``output`` or ``router`` in one.
    """
    # a container that the host walks has no forward whose blocks a router could choose from
    found = tuple(stage for stage in find_stages(model, example) if not stage.loop)
    stages = [stage for stage in found if len(_sources(stage, len(stage.blocks) + 1)) > 1]
    if not stages:
        raise WiringError(
            f"{type(model).__name__}: no container that is called as a whole has a block that keeps the shape, "
            "so there is nothing to decide"
        )
    macs = _block_macs(model, example)
    channel_axis = _channel_axis(found)
    last = LastPass()
    for s, stage in enumerate(stages):
        container = model.get_submodule(stage.name)
        taken = {OUTPUT, "router"} & set(stage.blocks)
        if taken:
            raise WiringError(f"{stage.name}: has a block named {taken.pop()}, which rule: ddw uses itself")
        edges = [(i, j) for j in range(1, len(stage.blocks) + 2) for i in _sources(stage, j)]
        required = _required(stage)
        constant = {(i, j): 1.0 for i, j in edges if j in required and len(_sources(stage, j)) == 1}
        dynamic = DynamicStage(
            s,
            {name: container.get_submodule(name) for name in stage.blocks},
            _routers(stage, [edge for edge in edges if edge not in constant], channel_axis, config),
            constant,
            required=required,
            macs=tuple(macs.get(f"{stage.name}.{name}", 0) for name in stage.blocks),
            channel_axis=channel_axis,
            config=config,
            last=last,
            is_last=s == len(stages) - 1,
        )
        model.set_submodule(stage.name, dynamic.to(example.device, example.dtype).train(container.training))


def _sources(stage: Stage, node: int) -> tuple[int, ...]:
    """What a node may read: a block every node of its input's shape, the output every node of the last one's."""
    if node <= len(stage.blocks):
        return stage.sources_of(node)
    if not stage.wirable[-1]:
        return (node - 1,)
    return tuple(i for i in range(node) if stage.shapes[i] == stage.shapes[-1])


def _required(stage: Stage) -> frozenset[int]:
    """The output, blocks that change the shape, and children that are no blocks, such as norms, with what they read."""
    output = len(stage.blocks) + 1
    fixed = [j for j, wirable in enumerate((*stage.wirable, stage.wirable[-1]), start=1) if not wirable]
    changing = [j for j in range(1, output) if stage.shapes[j] != stage.shapes[j - 1]]
    return frozenset({output, *changing, *fixed, *(j - 1 for j in fixed)} - {0})


def _always_executed(output: int, edges: Collection[Edge], required: frozenset[int]) -> frozenset[int]:
    """Nodes that every image executes because no way from the input to the output goes past them, and required ones."""

    def is_bypassed(node: int) -> bool:
        reached = {0}
        for i, j in sorted(edges):
            if i in reached and j != node:
                reached.add(j)
        return output in reached

    return required | {node for node in range(1, output) if not is_bypassed(node)}


def _routers(
    stage: Stage, edges: list[Edge], channel_axis: int, config: DdwConfig
) -> dict[int, tuple[tuple[Edge, ...], nn.Linear]]:
    """Which node's feature decides which edges, and with what layer: v = 0, c = open_bias."""
    by_node: dict[int, list[Edge]] = {}
    for edge in edges:
        by_node.setdefault(0 if config.router == "stage" else edge[0], []).append(edge)
    routers = {}
    for node, decided in by_node.items():
        shape = stage.shapes[node]
        linear = nn.Linear(shape[channel_axis - 1 if channel_axis > 0 else channel_axis], len(decided))
        nn.init.zeros_(linear.weight)
        nn.init.constant_(linear.bias, config.open_bias)
        routers[node] = (tuple(decided), linear)
    return routers


def _channel_axis(stages: tuple[Stage, ...]) -> int:
    """1 for [B, C, H, W], -1 for [B, H, W, C] and [B, T, C]; H and W are told by being equal, as the example's are.

    Raises:
        WiringError: neither.
    """
    shapes = {shape for stage in stages for shape in stage.shapes}
    if all(len(shape) == 3 and shape[1] == shape[2] for shape in shapes):
        return 1
    if all(len(shape) == 2 or (len(shape) == 3 and shape[0] == shape[1]) for shape in shapes):
        return -1
    raise WiringError(
        f"rule: ddw cannot tell channels from pixels in feature maps of shape {sorted(shapes)[0]}; it takes "
        "[B, C, H, W], [B, H, W, C] and [B, T, C]"
    )


def _block_macs(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Multiply-accumulates of one image by module path."""
    training = model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(example)
    model.train(training)
    return {
        path.partition(".")[2]: sum(flops.values()) // (2 * len(example))
        for path, flops in counter.get_flop_counts().items()
    }


def _rows_of(linear: nn.Module, rows: list[int]) -> nn.Linear:
    assert isinstance(linear, nn.Linear)
    part = nn.Linear(linear.in_features, len(rows))
    part.weight = nn.Parameter(linear.weight.detach()[rows].clone())
    part.bias = nn.Parameter(linear.bias.detach()[rows].clone())
    return part


def _macs(macs: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.tensor(macs, dtype=torch.float64, device=like.device)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Nothing where autocast is off already, so that nothing is left of it in an exported graph."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
