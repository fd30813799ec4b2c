"""NN-Mass: one number that says how well skip connections let gradients through, from the shape of a net alone.

"How does topology influence gradient propagation and model performance of deep networks with DenseNet-type skip
connections?" (Bhardwaj, Li and Marculescu, CVPR 2021). A net is a run of cells; skips stay inside a cell. The density
rho_c of a cell is the share of its possible skips that exist, and the mass adds density times size:

    concatenated    m = sum_c w_c d_c rho_c    rho_c = 2 sum_{i=2..d_c-1} min{w_c (i-1), t_c} / (w_c (d_c-1) (d_c-2))
    added           m = sum_c i_c rho_c        i_c = total input channels of the cell's layers

(eq. 1, 2 and 3). The average degree of a cell is  k = w_c + m_c / 2  (Prop. 1). At one width, accuracy follows log m
(sec. 4). The first half of this file is plain arithmetic; the second recognises the cells of built models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from timm.models import _efficientnet_blocks as blocks
from timm.models import densenet, efficientnet, resnet
from torch import Tensor, nn

from mcdeploy.backbones import cifar_resnet, multibranch, nnmass_cells, sparsenet
from mcdeploy.connectivity.topology import Node, StageWiring, Topology
from mcdeploy.connectivity.wiring import topology_of, wired_stages
from mcdeploy.errors import WiringError


@dataclass(frozen=True)
class Cell:
    """A cell with concatenated skips: w_c channels a layer, d_c layers, at most t_c skip channels read by a layer."""

    width: int
    depth: int
    skips: int

    def num_skips(self) -> int:
        """Skip channels of all layers: sum over i = 2 .. d_c - 1 of min{w_c (i - 1), t_c}."""
        return sum(nnmass_cells.num_skips(self.width, i, self.skips) for i in range(self.depth))

    def density(self) -> float:
        """rho_c, 0..1 (eq. 1); 0 for a cell too shallow for a skip."""
        possible = self.width * (self.depth - 1) * (self.depth - 2) / 2
        return self.num_skips() / possible if possible else 0.0

    def mass(self) -> float:
        """w_c d_c rho_c (eq. 2)."""
        return self.width * self.depth * self.density()


def nn_mass(cells: Iterable[Cell]) -> float:
    """m of eq. 2."""
    return sum(cell.mass() for cell in cells)


def bottleneck_mass(outer: int, inner: int) -> float:
    """m of a bottleneck or inverted residual: (W1 + 2 W2) W1 / (2 W1 + W2), outer W1 and inner W2 channels (eq. 3)."""
    return (outer + 2 * inner) * outer / (2 * outer + inner)


def average_degree(width: float, mass: float) -> float:
    """k = w + m / 2 (Prop. 1): channels that a channel of the next layer reads, on average over a cell."""
    return width + mass / 2


def ldi_bounds(width: float, mass: float, variance: float) -> tuple[float, float]:
    """Between what the mean singular value of a deep linear net's layers lies at initialisation (Prop. 2).

    sqrt(q (w + m/2)) - sqrt(q w) <= E[sigma] <= sqrt(q (w + m/2)) + sqrt(q w),  q = ``variance`` of the weights.
    """
    wide, narrow = math.sqrt(variance * average_degree(width, mass)), math.sqrt(variance * width)
    return wide - narrow, wide + narrow


@dataclass(frozen=True)
class CellMass:
    """One cell as measured: ``channels`` is w_c d_c (concat) or i_c (add), ``width`` the mean of its layers."""

    name: str  # module path of the cell, or of the stage
    join: Literal["concat", "add"]
    width: float
    channels: int
    density: float  # 0..1

    def mass(self) -> float:
        return self.channels * self.density

    def degree(self) -> float:
        """Average degree of the cell, Prop. 1."""
        return average_degree(self.width, self.mass())


@dataclass(frozen=True)
class Mass:
    """The cells of a net in the order of execution."""

    cells: tuple[CellMass, ...]

    def total(self) -> float:
        """NN-Mass of the net."""
        return sum(cell.mass() for cell in self.cells)

    def density(self) -> float:
        """The cells' densities, averaged with their channels as weights; 0..1."""
        channels = sum(cell.channels for cell in self.cells)
        return self.total() / channels if channels else 0.0

    def degree(self) -> float:
        """The cells' average degrees, averaged with their channels as weights."""
        channels = sum(cell.channels for cell in self.cells)
        return sum(cell.degree() * cell.channels for cell in self.cells) / channels if channels else 0.0

    def by_container(self) -> dict[str, Mass]:
        """The cells of every parent module together; for printing a net of many cells."""
        groups: dict[str, list[CellMass]] = {}
        for cell in self.cells:
            groups.setdefault(cell.name.rpartition(".")[0] or cell.name, []).append(cell)
        return {name: Mass(tuple(cells)) for name, cells in groups.items()}

    def lines(self) -> tuple[str, ...]:
        """NN-Mass, density and average degree of every cell, or of every container where there are many."""
        groups = {cell.name: Mass((cell,)) for cell in self.cells} if len(self.cells) <= 4 else self.by_container()
        return tuple(
            f"  {name}: NN-Mass {group.total():,.1f}, density {group.density():.3f}, "
            f"average degree {group.degree():,.1f}"
            for name, group in groups.items()
        )


def nn_mass_of_topology(
    topology: Topology,
    widths: Sequence[Sequence[int]],
    *,
    join: Literal["add", "concat"] = "add",
    offered: Topology | None = None,
) -> Mass:
    """NN-Mass of a wiring, with a stage as a cell and its blocks as layers.

    A skip link is a read of any node of the same stage but the one just before. Block j has j - 1 possible ones, or as
    many as ``offered`` gives it, so a chain has density 0 and a stage in which every block reads everything density 1.
    Reads of other stages are no skips of the cell and do not count. Dead blocks count like others: for the net that
    is left, pass ``topology.without_dead_blocks()[0]``.

    With ``join="add"`` this is eq. 3, m_c = i_c rho_c: what is added has one width, and i_c adds up what the blocks
    receive, the widths of nodes 0 .. n-1. What a block has inside, such as its own shortcut, is no link of the wiring.
    With ``join="concat"`` a link weighs as many channels as it carries and m_c = rho_c times the widths of nodes
    0 .. n, which is eq. 2 with node 0 as layer 0 and d_c = n + 1.

    Args:
        widths: for every stage the channels of nodes 0 .. n; node 0 is the stage's input.
        offered: everything that the blocks may read; default: every earlier node of the stage.

    Raises:
        ValueError: ``widths`` does not fit the topology.
    """
    if [len(stage.blocks) + 1 for stage in topology.stages] != [len(row) for row in widths]:
        raise ValueError("widths needs one number for the input of every stage and one for every block")
    cells = []
    for s, stage in enumerate(topology.stages):
        row = widths[s]
        weight: Callable[[int], int] = row.__getitem__ if join == "concat" else (lambda _: 1)
        all_reads = None if offered is None else offered.stages[s].reads
        actual = possible = 0
        for j, reads in enumerate(stage.reads, start=1):
            may = [Node(s, i) for i in range(j)] if all_reads is None else all_reads[j - 1]
            actual += sum(weight(node.index) for node in reads if node.stage == s and node.index < j - 1)
            possible += sum(weight(node.index) for node in may if node.stage == s and node.index < j - 1)
        layers = row if join == "concat" else row[:-1]
        density = actual / possible if possible else 0.0
        cells.append(CellMass(stage.name, join, sum(layers) / len(layers), sum(layers), density))
    return Mass(tuple(cells))


# ----------------------------------------------------------------------------------------------------- of built models


def nn_mass_of_model(model: nn.Module) -> Mass:
    """NN-Mass of a model's own cells, by block structure; wired and compiled models too.

    Recognised: BasicBlock and Bottleneck (ResNet, Wide ResNet, ResNeXt; projection blocks count, groups do not matter),
    inverted residuals of MobileNetV2 and its kin (those with a real shortcut), and dense blocks, where a layer with its
    1x1 convolution is one layer and the channels are growth times layers: DenseNet (density 1), SparseNet, cell nets.

    Raises:
        WiringError: the model has other blocks; says which. Nothing is guessed.
    """
    kind = type(model)
    if kind not in BESIDE_CELLS:
        names = ", ".join(sorted(known.__name__ for known in BESIDE_CELLS))
        raise WiringError(f"NN-Mass: the cells of {kind.__name__} are not recognised; known are those of {names}")
    found = {name: cells for name, module in model.named_modules() if (cells := _cells_of(name, module)) is not None}
    for name, module in model.named_modules():
        known = name.startswith((*BESIDE_CELLS[kind], *(f"{block}." for block in found)))
        if isinstance(module, nn.Conv2d | nn.Linear) and not known:
            raise WiringError(f"NN-Mass: {name} of {kind.__name__} is in no cell of a kind that is recognised")
    return Mass(tuple(cell for cells in found.values() for cell in cells))


def nn_mass_of_wiring(model: nn.Module, example: Tensor) -> Mass:
    """NN-Mass of the live part of a wired model's wiring (eq. 3); possible skips are those of equal shape.

    Args:
        example: images [B, C, H, W]; its values do not matter.

    Raises:
        WiringError: the model is not wired, or its nodes are not modules of their own.
    """
    if not wired_stages(model):
        raise WiringError(f"NN-Mass: {type(model).__name__} is not wired; call mcdeploy.wire first")
    topology = topology_of(model)
    live, moved = topology.without_dead_blocks()
    shapes = _trace_nodes(model, topology, example)
    known = {new: shapes[old] for old, new in moved.items() if old in shapes}
    if len(known) != len(moved):
        raise WiringError("NN-Mass: the nodes of this wiring are no modules with one feature map each")
    last = -1 if example.ndim != 4 or getattr(model, "output_fmt", "NCHW") == "NHWC" else 0
    widths, stages = [], []
    for s, stage in enumerate(live.stages):
        row = [known[Node(s, i)] for i in range(len(stage.blocks) + 1)]
        widths.append([shape[last if len(shape) == 3 else -1] for shape in row])
        reads = tuple(
            tuple(Node(s, i) for i in range(j) if row[i] == row[j - 1]) for j in range(1, len(stage.blocks) + 1)
        )
        stages.append(StageWiring(stage.name, stage.blocks, reads))
    return nn_mass_of_topology(live, widths, offered=Topology(tuple(stages), topology.aggregate))


def _trace_nodes(model: nn.Module, topology: Topology, example: Tensor) -> dict[Node, tuple[int, ...]]:
    """Shapes, without the batch, of the stages' inputs and of the blocks that are run."""
    shapes: dict[Node, tuple[int, ...]] = {}

    def note(node: Node, value: object) -> None:
        if isinstance(value, Tensor):
            shapes[node] = tuple(value.shape[1:])

    handles = []
    for s, stage in enumerate(topology.stages):
        container = model.get_submodule(stage.name)
        handles.append(container.register_forward_pre_hook(lambda _, args, node=Node(s, 0): note(node, args[0])))
        children = dict(container.named_modules())
        for i, block in enumerate(stage.blocks, start=1):
            if block in children:
                hook = lambda _, __, output, node=Node(s, i): note(node, output)  # noqa: E731
                handles.append(children[block].register_forward_hook(hook))
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return shapes


def describe_mass(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Lines for ``mcdeploy inspect``: the cells of the blocks' own skips, and of a wiring if there is one."""
    lines = _lines_of("the backbone's own skips, by cell", lambda: nn_mass_of_model(model))
    if wired_stages(model):
        lines += _lines_of("the wiring between blocks", lambda: nn_mass_of_wiring(model, example))
    return lines


def _lines_of(what: str, measure: Callable[[], Mass]) -> tuple[str, ...]:
    try:
        mass = measure()
    except WiringError as error:
        return (str(error),)
    total = f"{mass.total():,.1f}, density {mass.density():.3f}, average degree {mass.degree():,.1f}"
    return (f"NN-Mass of {what}: {total}", *mass.lines())


# Models whose cells are known, and where they keep the weights that are in no cell: stem, transitions, head.
BESIDE_CELLS: dict[type[nn.Module], tuple[str, ...]] = {
    resnet.ResNet: ("conv1", "fc"),
    efficientnet.EfficientNet: ("conv_stem", "conv_head", "classifier"),
    densenet.DenseNet: ("features.conv", "features.transition", "classifier"),
    cifar_resnet.CifarResNet: ("conv1", "linear"),
    multibranch.MultiBranchNet: ("conv1", "fc"),
    nnmass_cells.CellNet: ("stem", "linear"),
    sparsenet.SparseNet: ("stem", "transition", "classifier"),
}


def _cells_of(name: str, module: nn.Module) -> tuple[CellMass, ...] | None:
    """The cell that a block is; empty for a block without a skip, None for anything that is no known block."""
    if not isinstance(getattr(module, "se", None), nn.Identity | None):
        return None  # attention links channels in ways that eq. 3 does not count
    match module:
        case resnet.BasicBlock() | cifar_resnet.BasicBlock():
            channels = module.conv1.in_channels + module.conv2.in_channels
            return (CellMass(name, "add", channels / 2, channels, 1.0),)
        case resnet.Bottleneck():
            return (_bottleneck(name, module.conv1.in_channels, module.conv1.out_channels),)
        case multibranch.BranchModule() if module.conv1.groups == 1:
            return (_bottleneck(name, module.in_channels, module.conv1.out_channels),)
        case blocks.InvertedResidual():
            outer, inner = module.conv_pw.in_channels, module.conv_pw.out_channels
            return (_bottleneck(name, outer, inner),) if module.has_skip else ()
        case blocks.DepthwiseSeparableConv():  # an inverted residual that does not expand
            outer = module.conv_dw.in_channels
            return (_bottleneck(name, outer, outer),) if module.has_skip else ()
        case densenet.DenseBlock():
            growth, layers = next(iter(module.values())).conv2.out_channels, len(module)
            return (CellMass(name, "concat", growth, growth * layers, 1.0),)
        case sparsenet.SparseStage():
            return (_sparse_stage(name, module),)
        case nnmass_cells.Cell():
            cell = Cell(module.width, module.depth, module.skips)
            return (CellMass(name, "concat", cell.width, cell.width * cell.depth, cell.density()),)
    return None


def _bottleneck(name: str, outer: int, inner: int) -> CellMass:
    channels = outer + 2 * inner
    return CellMass(name, "add", channels / 3, channels, outer / (2 * outer + inner))


def _sparse_stage(name: str, stage: sparsenet.SparseStage) -> CellMass:
    """A dense block that reads only some of its layers; density by channels, as in eq. 1."""
    units = range(1, len(stage.widths))
    actual = sum(stage.widths[node] for index in units for node in stage.reads(index) if node < index - 1)
    possible = sum(sum(stage.widths[: index - 1]) for index in units)
    growths = stage.widths[1:]
    width = sum(growths) / len(growths)
    return CellMass(name, "concat", width, sum(growths), actual / possible if possible else 0.0)
