"""The form in which a stage with per-image wirings is exported: few operators, an ``If`` around what may be skipped.

``DynamicStage`` routes edge by edge. In ONNX Runtime every operator costs some microseconds however small its tensor,
so here the whole stage is routed at once, with the edges as a vector and the graph as a matrix. For every image, with
A in [E] the weights that reach tau, D the constant that places edges in a matrix, and P = (I + D A > 0)^N,

    runs_j    = some seed s has P_sj > 0        seeds: the input, and the nodes that must run
    w_ij      = A_ij if runs_i;  where a node that must run has none, its newest running source, whatever its weight
    wanted_i  = the same P of w has P_i,output > 0
    x_j       = f_j( sum_i w_ij x_i [/ sum_i w_ij] )      only if some image of the batch has runs_j and wanted_j

Batch 1 skips exactly; a larger batch computes the masked sum inside the same file.
"""

# B = images, R = edges that a router decides, E = edges of the stage, N = nodes with the input and the output

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from mcdeploy.connectivity.ddw import DynamicStage, dynamic_stages


def export_form(model: nn.Module, *, skip: bool) -> nn.Module:
    """The model as it is to be exported: the same function with few operators; itself where nothing is dynamic.

    Args:
        skip: wrap every node that some image does not need in ``torch.cond``, which ONNX calls ``If``.
    """
    if isinstance(model, WiringForm) or not dynamic_stages(model):
        return model
    form = copy.deepcopy(model)
    for name, stage in dynamic_stages(form).items():
        if stage.known_at_start:
            form.set_submodule(name, ExportedStage(stage, skip=skip).train(stage.training))
        else:  # a node's own feature decides, so there is nothing to route at once
            stage.conditional = skip
    return form


LEAST = 1e-6  # what an open edge weighs at least, where weights are told


class WiringForm(nn.Module):
    """A model with dynamic stages, as a function from images to the weights of their edges; for export.

    Args:
        model: stays as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for stage in dynamic_stages(self.model).values():
            stage.tells = True
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """x: images [B, C, H, W]; returns [B, E], 0 where an edge is closed, stage after stage in their own order."""
        self.model(x)
        stages = dynamic_stages(self.model).values()
        return torch.cat([told(stage.last.open[stage.index], stage.last.weights[stage.index]) for stage in stages], 1)


def told(open_BE: Tensor, weights_BE: Tensor) -> Tensor:
    """Weights from which can be seen what is open, too.

    An edge that is open because its node must run may weigh next to nothing, or 0 by one backend's sigmoid.
    """
    return torch.where(open_BE, weights_BE.clamp_min(LEAST), torch.zeros_like(weights_BE))


class ExportedStage(nn.Module):
    """A ``DynamicStage`` whose edges are all decided by its input, for export.

    Args:
        skip: see ``export_form``.
    """

    def __init__(self, stage: DynamicStage, *, skip: bool) -> None:
        super().__init__()
        for name in stage.block_names:
            self.add_module(name, stage.get_submodule(name))
        self.block_names = stage.block_names
        self.sources = stage.sources
        self.aggregate = stage.aggregate
        self.channel_axis = stage.channel_axis
        self.skips = frozenset(range(1, len(stage.block_names))) - stage.always if skip else frozenset()
        self.plain = frozenset(j for j in range(1, len(stage.sources)) if stage.is_plain(j))
        self.edges = stage.edges  # sorted by reader
        self.readers = [j for j in range(1, len(stage.sources)) if stage.sources[j]]
        self.fan_ins = [len(stage.sources[j]) for j in self.readers]
        self.router = nn.ModuleDict(dict(stage.router.items()))
        size, position = len(stage.sources), {edge: e for e, edge in enumerate(stage.edges)}
        routed = stage.routed.get(0, ())
        certain = {j for i, j in stage.constant if i == 0 or i in stage.required}
        self.may_starve = tuple(sorted(({j for _, j in stage.edges} & stage.required) - certain))
        self.doublings = math.ceil(math.log2(size - 1))
        one = torch.ones((), dtype=stage.tau.dtype)
        constants = {
            "tau": stage.tau.clone(),
            "temperature": stage.temperature.clone(),
            "place_RE": _ones(one, len(routed), len(self.edges), [(r, position[e]) for r, e in enumerate(routed)]),
            "constant_E": torch.tensor([stage.constant.get(edge, 0.0) for edge in self.edges], dtype=one.dtype),
            "matrix_EM": _ones(
                one, len(self.edges), size**2, [(e, i * size + j) for e, (i, j) in enumerate(self.edges)]
            ),
            "identity_M": torch.eye(size, dtype=one.dtype).flatten(),
            "reader_EE": one * torch.tensor([[j == other for _, other in self.edges] for _, j in self.edges]),
            "seed_N": one * torch.tensor([node == 0 or node in stage.required for node in range(size)]),
        }
        for name, tensor in constants.items():
            self.register_buffer(name, tensor.to(stage.tau.device), persistent=False)
        self.register_buffer("source_E", torch.tensor([i for i, _ in self.edges]), persistent=False)
        self.tau: Tensor
        self.temperature: Tensor
        self.place_RE: Tensor
        self.constant_E: Tensor
        self.matrix_EM: Tensor
        self.identity_M: Tensor
        self.reader_EE: Tensor
        self.seed_N: Tensor
        self.source_E: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x: the stage's input, [B, C, H, W] or whatever the host's blocks hand on; returns the output node."""
        weights_BE, executed_N = self.route(x)
        by_reader = weights_BE.to(x.dtype).reshape(-1, len(self.edges), *[1] * (x.dim() - 2)).split(self.fan_ins, 1)
        weights = dict(zip(self.readers, by_reader, strict=True))
        features = {0: x}
        for j, name in enumerate(self.block_names, start=1):
            if j not in weights:
                continue
            block, inputs = self.get_submodule(name), [features[i] for i in self.sources[j]]
            if j in self.plain:
                features[j] = block(inputs[0])
                continue
            if j in self.skips:
                features[j] = _run_if(executed_N[j], block, weights[j], inputs)
            else:
                features[j] = block(_join(weights[j], *inputs))
        return features[len(self.block_names)]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What every node weighs its sources by, [B, E], and which nodes some image executes, bool [N]."""
        dims = [dim for dim in range(1, x.dim()) if dim != self.channel_axis % x.dim()]
        z_BR = self.router["0"](x.mean(dims, dtype=self.tau.dtype))
        alpha_BR = torch.sigmoid(z_BR / self.temperature)
        passing_BR = alpha_BR * (alpha_BR >= self.tau).to(alpha_BR.dtype)
        passing_BE = passing_BR @ self.place_RE + self.constant_E
        runs_BN = ((self.seed_N @ self._ways(passing_BE)) > 0).to(passing_BE.dtype)
        runs_BE = runs_BN.index_select(1, self.source_E)
        weights_BE = passing_BE * runs_BE
        if self.may_starve:
            weights_BE = self._with_newest(weights_BE, runs_BE, alpha_BR @ self.place_RE + self.constant_E)
        wanted_BN = self._ways(weights_BE).select(2, len(self.sources) - 1)
        executed_N = (runs_BN * wanted_BN).amax(0) > 0
        if self.aggregate == "mean":
            weights_BE = weights_BE / (weights_BE @ self.reader_EE).clamp_min(1e-30)
        return weights_BE, executed_N

    def _ways(self, weights_BE: Tensor) -> Tensor:
        """Number of ways, or 1, from every node to every other along edges with a weight, [B, N, N]; 0: none."""
        size = len(self.sources)
        open_BE = (weights_BE > 0).to(weights_BE.dtype)
        ways_BNN = (open_BE @ self.matrix_EM + self.identity_M).reshape(-1, size, size)
        for _ in range(self.doublings):
            ways_BNN = ways_BNN @ ways_BNN
            if size > 48:  # at most 2^(2 size) ways, and float32 ends at 2^128
                ways_BNN = ways_BNN.clamp_max(1.0)
        return ways_BNN

    def _with_newest(self, weights_BE: Tensor, runs_BE: Tensor, alpha_BE: Tensor) -> Tensor:
        """Open the edge from the newest running source where a node that must run has no open one."""
        parts = [part.split(self.fan_ins, 1) for part in (weights_BE, runs_BE, alpha_BE)]
        found = []
        for j, weights_BS, runs_BS, alpha_BS in zip(self.readers, *parts, strict=True):
            if j not in self.may_starve:
                found.append(weights_BS)
                continue
            order_BS = runs_BS * torch.arange(1, runs_BS.shape[1] + 1, dtype=runs_BS.dtype, device=runs_BS.device)
            is_newest_BS = (order_BS == order_BS.amax(1, keepdim=True)).to(runs_BS.dtype) * runs_BS
            starves_B1 = (weights_BS.amax(1, keepdim=True) == 0).to(runs_BS.dtype)
            found.append(weights_BS + starves_B1 * is_newest_BS * alpha_BS)
        return torch.cat(found, 1)


def _join(weights: Tensor, *inputs: Tensor) -> Tensor:
    """Weighted sum of S inputs, weights [B, S, 1, ...]."""
    if len(inputs) == 1:
        return inputs[0] * weights
    terms = [feature * weight for feature, weight in zip(inputs, weights.split(1, 1), strict=True)]
    joined = terms[0]
    for term in terms[1:]:
        joined = joined + term
    return joined


def _run_if(condition: Tensor, block: nn.Module, weights: Tensor, inputs: list[Tensor]) -> Tensor:
    """torch.cond takes no two views of one tensor, so the weights of a node come in one piece."""

    def run(weights: Tensor, *inputs: Tensor) -> tuple[Tensor]:
        return (block(_join(weights, *inputs)),)

    def skip(weights: Tensor, *inputs: Tensor) -> tuple[Tensor]:
        return (torch.zeros_like(inputs[0]),)  # a block that changes the shape always runs

    return torch.cond(condition, run, skip, (weights, *inputs))[0]


def _ones(one: Tensor, rows: int, columns: int, places: list[tuple[int, int]]) -> Tensor:
    matrix = one.new_zeros(rows, columns)
    for row, column in places:
        matrix[row, column] = 1
    return matrix
