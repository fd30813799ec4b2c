"""GateConnect: every branch learns which K branches of the module before it reads.

"Connectivity Learning in Multi-Branch Networks", Ahmed and Torresani, arXiv 1709.09582, on the nets of
``backbones.multibranch``. With F_k(i) branch k of module i, y_k(i) what it hands on and g(i) the gates of module i,

    x_j(i) = relu(sum_k g_jk(i) y_k(i-1)),      y_k(i) = F_k(x_k(i)) + s P(x_k(i)),      sum_k g_jk(i) = K,

P being the identity or, at a stage change, the projection that all branches share. Module 0 reads the stem's output and
the last module's branches are all summed into the pooling. The gates and their updates are those of ``gates.py``; the
gradient of a gate is <dL/d(sum of x_j), y_k>, for closed gates too. The paper does not say where the ReLU sits; after
the sum it makes K = C the plain ResNeXt of the same weights. The option ``identity`` says how strong the shortcut is:

    average   s = 1/K: residuals are summed, shortcuts averaged; K = C is ResNeXt exactly
    sum       s = 1, as published: a shortcut grows K-fold with every module
    mean      s = 1 and the sum over k is divided by K

The whole trunk is one ``WiredModule``. Its nodes are the branches ``0.b0``, ``0.b1``, ..., module by module, and last
the node ``sum``; so what is dead is found by walking back from ``sum``.
"""

# B = batch, C = channels of one branch, K = branches, H/W = height/width; J = reading branches.

from __future__ import annotations

import itertools
import random as stdlib_random
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from timm.models.resnet import ResNet
from torch import Tensor, nn

from mcdeploy.backbones.multibranch import BranchModule, MultiBranchNet, as_branches, default_cfgs, sum_branches
from mcdeploy.connectivity.gates import Gates
from mcdeploy.connectivity.topology import Node, StageWiring
from mcdeploy.connectivity.wiring import WiredModule, fix, topology_of
from mcdeploy.errors import WiringError
from mcdeploy.section import Count, GatedConfig, Positive

Identity = Literal["average", "sum", "mean"]
Reads = tuple[tuple[int, ...], ...]  # for every branch of a module, the branches of the module before that it reads
Form = Literal["gather", "matmul"]
FORM_OF_ONE: Form = "gather"  # of a route with one source a branch; by measurement, see tests/branch_routes.py
FORM_OF_SEVERAL: Form = "matmul"


class GateConnectConfig(GatedConfig):
    """Every branch reads K branches of the module before: learned, drawn once, or all of them."""

    rule: Literal["gateconnect"]
    fan_in: Count | None = None  # K; not with connect: full
    connect: Literal["learned", "random", "full"] = "learned"
    identity: Identity = "average"
    gate_lr: Positive = 0.02
    gate_grad: Literal["raw", "normalised"] = "normalised"
    wiring_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _fan_in_where_it_has_a_meaning(self) -> GateConnectConfig:
        if self.connect == "full" and self.fan_in is not None:
            raise ValueError("connect: full reads all branches; leave fan_in out")
        if self.connect != "full" and self.fan_in is None:
            raise ValueError(f"connect: {self.connect} needs fan_in, how many branches each branch reads")
        return self

    def has_joint_phase(self) -> bool:
        return self.connect == "learned"


class GatedRoute(Gates):
    """The gates between two adjacent modules, [K, K], and how they mix: one small matrix over the branch axis."""

    def __init__(self, num_branches: int, fan_in: int, scale: float) -> None:
        super().__init__([num_branches] * num_branches, fan_in)
        self.scale = scale

    def forward(self, y: Tensor) -> Tensor:
        """[B, K*C, H, W] to the same shape: x_j = scale * sum_k g_jk y_k."""
        return mix(self.masks_GN() * self.scale, y)


class StaticRoute(nn.Module):
    """A route that no longer learns.

    Args:
        reads: for every reading branch, which of the ``num_sources`` branches it reads; equally many each.
        channels: of one branch.
        form: how several sources are joined; ``gather`` adds K channel gathers, ``matmul`` multiplies by a 0-1 matrix,
            as every route does in training.
    """

    def __init__(
        self,
        reads: Reads,
        num_sources: int,
        channels: int,
        scale: float,
        device: torch.device,
        form: Form | None = None,
    ) -> None:
        super().__init__()
        self.num_sources = num_sources
        self.channels = channels
        self.fan_in = len(reads[0])
        self.scale = scale
        self.form = form or (FORM_OF_ONE if self.fan_in == 1 else FORM_OF_SEVERAL)
        self.is_shared = len(set(reads)) == 1  # one tensor for all readers, and so one group in their first convolution
        rows = reads[:1] if self.is_shared else reads
        self.is_same = self.fan_in == 1 and rows == tuple((k,) for k in range(num_sources))
        self.sums_all = self.is_shared and self.fan_in == num_sources
        matrix_JK = torch.zeros(len(rows), num_sources, device=device)
        for j, row in enumerate(rows):
            matrix_JK[j, list(row)] = 1
        self.register_buffer("matrix_JK", matrix_JK, persistent=False)
        if self.form == "gather":
            sources_JP = torch.tensor(rows, device=device)
            channels_C = torch.arange(channels, device=device)
            for position in range(self.fan_in):  # the channels of every reader's source at this position
                picked_JC = sources_JP[:, position, None] * channels + channels_C
                self.register_buffer(f"pick{position}", picked_JC.flatten(), persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        """[B, K*C, H, W] to [B, J*C, H, W], or to [B, C, H, W] when all readers read the same."""
        if self.is_same:
            return y
        if self.sums_all:
            x = sum_branches(y, self.channels)
        elif self.form == "matmul" or self.training:  # the gradient of a gather adds rows one by one
            x = mix(self.get_buffer("matrix_JK"), y)
        else:
            x = y.index_select(1, self.get_buffer("pick0"))
            for position in range(1, self.fan_in):
                x = x + y.index_select(1, self.get_buffer(f"pick{position}"))
        return x if self.scale == 1 else x * self.scale


def mix(matrix_JK: Tensor, y: Tensor) -> Tensor:
    """x_j = sum_k m_jk y_k over the branch axis. y: [B, K*C, H, W]; returns [B, J*C, H, W]."""
    num_readers, num_sources = matrix_JK.shape
    each = y.reshape(y.shape[0], num_sources, -1)
    mixed = torch.bmm(matrix_JK.to(y.dtype).expand(y.shape[0], -1, -1), each)
    return mixed.reshape(y.shape[0], y.shape[1] // num_sources * num_readers, *y.shape[2:])


class BranchStack(WiredModule):
    """The modules of a multi-branch net, every branch with an input of its own.

    Child ``i`` is module i, as in the plain trunk, so the state-dict keys stay. ``routes.i`` stands behind module i;
    the last one is the sum before the pooling.

    Args:
        modules: in the order of execution.
        names: of the branches of every module.
        reads: of module 1, module 2, ..., and last the one row of the sum.
        fan_in: K of the gates, which then learn which of ``reads`` to keep; None when ``reads`` is what is read.
    """

    def __init__(
        self,
        modules: Sequence[BranchModule],
        names: Sequence[Sequence[str]],
        reads: Sequence[Reads],
        identity: Identity,
        *,
        index: int = 0,
        fan_in: int | None = None,
    ) -> None:
        super().__init__()
        for i, module in enumerate(modules):
            self.add_module(str(i), module)
        self.index = index
        self.identity: Identity = identity
        self.names = tuple(tuple(row) for row in names)
        self.reads = tuple(reads)
        self.fan_in = fan_in
        self._skip: frozenset[int] = frozenset()
        self.routes = nn.ModuleList()
        self._build_routes()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x: the stem's output, read by all branches of module 0; returns the sum over the last module's branches."""
        routes, live = list(self.routes), self._live
        if self.fan_in is not None and not self.training:  # what ``fix`` would leave, bit by bit
            reads = self._active()
            live = _live_branches(reads)
            routes = self._static_routes(reads, live)
        x = x_BCHW
        for i, route in enumerate(routes):
            module = self._module(i)
            residuals = module.residuals(x, None if len(live[i]) == module.num_branches else live[i])
            x = module.act3(_join(route, residuals, module.identities(x), self._share(i)))
        return x

    @property
    def aggregate(self) -> Literal["mean", "sum"]:  # type: ignore[override]
        return "mean" if self.identity == "mean" else "sum"

    @property
    def skip(self) -> frozenset[int]:
        return self._skip

    @skip.setter
    def skip(self, skip: frozenset[int]) -> None:
        self._skip = skip
        self._build_routes()

    def wiring(self, name: str) -> StageWiring:
        return self._as_wiring(name, self._active())

    def candidates(self, name: str) -> StageWiring:
        """Every branch of the module before; the sum reads what it reads."""
        sizes = [len(row) for row in self.names]
        rows = [((tuple(range(before)),) * after) for before, after in itertools.pairwise(sizes)]
        return self._as_wiring(name, [*rows, self.reads[-1]])

    def fix(self, wiring: StageWiring, aggregate: Literal["mean", "sum"], live: frozenset[int]) -> None:
        if aggregate != self.aggregate:
            raise WiringError(
                f"{wiring.name}: the topology joins by {aggregate}, connectivity.identity: {self.identity} "
                f"by {self.aggregate}"
            )
        place = {node: (i, k) for i, row in enumerate(self._nodes()) for k, node in enumerate(row)}
        start = len(self.names[0])
        if any(row != (Node(self.index, 0),) for row in wiring.reads[:start]):
            raise WiringError(f"{wiring.name}: the branches of the first module read the stem and nothing else")
        reads: list[Reads] = []
        for i, size in enumerate([*(len(row) for row in self.names[1:]), 1]):
            rows = wiring.reads[start : start + size]
            start += size
            if any(place.get(node, (-1, 0))[0] != i for row in rows for node in row):
                raise WiringError(f"{wiring.name}: a branch of module {i + 1} reads something else than module {i}")
            if len({len(row) for row in rows}) > 1:
                raise WiringError(f"{wiring.name}: the branches of module {i + 1} read different numbers of branches")
            reads.append(tuple(tuple(place[node][1] for node in row) for row in rows))
        self.reads, self.fan_in = tuple(reads), None
        self.skip = frozenset(range(1, len(wiring.blocks) + 1)) - live

    def pruned(self, kept: tuple[int, ...], moved: Mapping[Node, Node]) -> nn.Module:
        live = self._not_in(frozenset(range(1, sum(map(len, self.names)) + 1)) - set(kept))
        return BranchStack(
            [self._module(i).with_branches(row) for i, row in enumerate(live)],
            [[self.names[i][k] for k in row] for i, row in enumerate(live)],
            _renumbered(self.reads, live),
            self.identity,
            index=self.index,
        )

    def gate_values(self) -> list[list[float]] | None:
        if self.fan_in is None:
            return None
        learned = [row for route in self.routes if isinstance(route, GatedRoute) for row in route.values()]
        return [[1.0]] * len(self.names[0]) + learned + [[1.0] * len(self.names[-1])]

    def summed(self) -> list[tuple[nn.Module, bool]]:
        """Every module, and whether all that reads its branches is their sum."""
        return [
            (self._module(i), isinstance(route, StaticRoute) and route.sums_all) for i, route in enumerate(self.routes)
        ]

    def _module(self, i: int) -> BranchModule:
        module = self.get_submodule(str(i))
        assert isinstance(module, BranchModule)
        return module

    def _active(self) -> list[Reads]:
        """What every branch reads outside training."""
        return [
            route.active() if isinstance(route, GatedRoute) else rows
            for route, rows in zip(self.routes, self.reads, strict=True)
        ]

    def _share(self, i: int) -> float:
        """s: how much of the shortcut a branch of module i hands on."""
        return 1 / self._fan_in_behind(i) if self.identity == "average" else 1.0

    def _fan_in_behind(self, i: int) -> int:
        return self.fan_in if self.fan_in and i < len(self.names) - 1 else len(self.reads[i][0])

    def _nodes(self) -> list[list[Node]]:
        """The node of every branch, module by module."""
        numbers = itertools.count(1)
        return [[Node(self.index, next(numbers)) for _ in row] for row in self.names]

    def _not_in(self, skip: frozenset[int]) -> list[tuple[int, ...]]:
        """The branches of every module that are not skipped."""
        return [tuple(k for k, node in enumerate(row) if node.index not in skip) for row in self._nodes()]

    def _as_wiring(self, name: str, reads: Sequence[Reads]) -> StageWiring:
        nodes = self._nodes()
        first = ((Node(self.index, 0),),) * len(nodes[0])
        rest = tuple(tuple(nodes[i][k] for k in row) for i, rows in enumerate(reads) for row in rows)
        return StageWiring(name, (*itertools.chain(*self.names), "sum"), first + rest)

    def _build_routes(self) -> None:
        """Bring routes and modules in line with ``reads``, ``fan_in`` and ``skip``."""
        self._live = self._not_in(self._skip)
        routes = self._static_routes(self.reads, self._live)
        if self.fan_in is not None:
            for i in range(len(routes) - 1):
                routes[i] = GatedRoute(self._module(i).num_branches, self.fan_in, self._scale(i))
        self._module(0).set_inputs(shared=True)
        for i, route in enumerate(routes[:-1], start=1):
            self._module(i).set_inputs(shared=isinstance(route, StaticRoute) and route.is_shared)
        self.routes = nn.ModuleList(routes).train(self.training)

    def _static_routes(self, reads: Sequence[Reads], live: Sequence[tuple[int, ...]]) -> list[nn.Module]:
        routes: list[nn.Module] = []
        for i, rows in enumerate(_renumbered(reads, live)):
            module = self._module(i)
            device = module.conv1.weight.device
            routes.append(StaticRoute(rows, len(live[i]), module.out_channels, self._scale(i), device))
        return routes

    def _scale(self, i: int) -> float:
        return 1 / self._fan_in_behind(i) if self.identity == "mean" else 1.0


def install(model: nn.Module, example: Tensor, config: GateConnectConfig) -> None:
    """The rule: wire a multi-branch net, or a ResNeXt of timm's, in place.

    A ResNeXt's blocks are taken apart into branches with their weights; its ``layer1`` then holds all of them.

    Raises:
        WiringError: another kind of backbone, or a fan-in that leaves nothing to choose.
    """
    modules, containers = _find_modules(model)
    num_branches = modules[0].num_branches
    fan_in = config.fan_in or num_branches
    if fan_in > num_branches or (config.connect != "full" and fan_in == num_branches):
        raise WiringError(
            f"connectivity.fan_in: {fan_in} leaves nothing to choose among {num_branches} branches; "
            "lower it, or take connect: full"
        )
    every = tuple(range(num_branches))
    draw = stdlib_random.Random(config.wiring_seed)
    reads = [
        tuple(tuple(sorted(draw.sample(every, fan_in))) if config.connect == "random" else every for _ in every)
        for _ in modules[1:]
    ]
    names = [[f"{i}.b{k}" for k in every] for i in range(len(modules))]
    learned = config.fan_in if config.connect == "learned" else None
    stack = BranchStack(modules, names, [*reads, (every,)], config.identity, fan_in=learned)
    model.set_submodule(containers[0], stack.train(model.training))
    for name in containers[1:]:
        model.set_submodule(name, nn.Identity())
    if learned is None:
        fix(model, topology_of(model))


def _find_modules(model: nn.Module) -> tuple[list[BranchModule], list[str]]:
    """The modules of a net, and the paths of the containers that run them."""
    if isinstance(model, MultiBranchNet) and isinstance(model.trunk, nn.Sequential):
        return [module for module in model.trunk if isinstance(module, BranchModule)], ["trunk"]
    if isinstance(model, ResNet):
        containers = ["layer1", "layer2", "layer3", "layer4"]
        modules = [as_branches(block) for name in containers for block in model.get_submodule(name).children()]
        found = [module for module in modules if module is not None]
        if len(found) == len(modules):
            return found, containers
    raise WiringError(
        f"rule: gateconnect wires the branches of a multi-branch net, which this {type(model).__name__} is not; take "
        f"a plain ResNeXt of timm's, such as resnext50_32x4d, or one of {', '.join(default_cfgs)}"
    )


def _join(route: nn.Module, residuals: Tensor, identities: Tensor, share: float) -> Tensor:
    """route(residuals + share * identities); identities may be one tensor that all branches have in common."""
    shortcut = _times(identities, share)
    if isinstance(route, StaticRoute) and route.is_shared and route.num_sources > 1:
        if identities.shape[1] == route.channels:  # the sum over branches of one and the same shortcut
            return route(residuals) + _times(identities, share * route.fan_in * route.scale)
        if residuals.shape[1] == route.channels:  # one convolution has summed the residuals, see compile.branches
            return _times(residuals, route.scale) + route(shortcut)
    num_branches = residuals.shape[1] // identities.shape[1]
    if num_branches > 1:
        each = residuals.unflatten(1, (num_branches, -1)) + shortcut.unsqueeze(1)
        return route(each.flatten(1, 2))
    return route(residuals + shortcut)


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _live_branches(reads: Sequence[Reads]) -> list[tuple[int, ...]]:
    """The branches of every module that the sum depends on, walking backwards."""
    live: list[tuple[int, ...]] = []
    readers: tuple[int, ...] = (0,)
    for rows in reversed(reads):
        readers = tuple(sorted({k for j in readers for k in rows[j]}))
        live.insert(0, readers)
    return live


def _renumbered(reads: Sequence[Reads], live: Sequence[Sequence[int]]) -> list[Reads]:
    """The rows of the live branches, by position among the live branches of the module before."""
    readers: list[Sequence[int]] = [*live[1:], (0,)]
    return [tuple(tuple(live[i].index(k) for k in rows[j]) for j in readers[i]) for i, rows in enumerate(reads)]
