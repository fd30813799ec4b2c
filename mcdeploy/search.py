"""Choose a net by NN-Mass, without training any: enumerate, keep what the budget allows, take the highest mass.

Section 4.3 of Bhardwaj, Li and Marculescu (CVPR 2021): (i) vary {d_c, t_c} of cell nets, or {N_c} of MobileNetV2, at
one width; (ii) of the nets within the budget take the one with the highest NN-Mass; (iii) train that one. NN-Mass
compares nets of one width only, so a search is over one width. Parameters and multiply-accumulates are closed forms,
equal to the counts of the built model.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from mcdeploy.backbones.nnmass_cells import (
    MOBILENET_HEAD,
    MOBILENET_STAGES,
    MOBILENET_STEM,
    Conv,
    num_skips,
    round_width,
)
from mcdeploy.connectivity.nnmass import Cell, bottleneck_mass, nn_mass
from mcdeploy.errors import InputError

Options = dict[str, Any]  # keywords of the backbone
MOST_ROWS = 20  # of the printed table


class Cost(NamedTuple):
    """What a net costs for one image."""

    parameters: int
    macs: int


@dataclass(frozen=True)
class Candidate:
    """A net that was never built: how to build it, its NN-Mass and its costs."""

    label: str
    options: Options
    nn_mass: float
    density: float  # 0..1, mean over the cells' channels
    parameters: int
    macs: int

    def fits(self, max_parameters: float, max_macs: float) -> bool:
        return self.parameters <= max_parameters and self.macs <= max_macs


@dataclass(frozen=True)
class Found:
    """What a search returns: ``front`` holds the nets that no other one beats in mass, parameters and MACs at once."""

    family: str
    width: float
    num_candidates: int
    num_fitting: int
    front: tuple[Candidate, ...]  # within the budget, by NN-Mass
    pick: Candidate

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ------------------------------------------------------------------------------------------------------- closed forms


def cost_of_cells(
    widths: Sequence[int],
    depths: Sequence[int],
    skips: Sequence[int],
    conv: Conv = "plain",
    *,
    num_classes: int = 10,
    image_size: int = 32,
) -> Cost:
    """Parameters and MACs of ``nnmass_cells`` with its published head.

    A plain layer with k skip channels has 9 (w + k) w weights, a depthwise one (w + k) w + 9 w + w^2 and three BNs of
    its own; each has a BN of w + k channels, 2 parameters a channel. Every cell but the first halves the resolution.
    """
    parameters = macs = 0
    channels = 3
    for i, (width, depth, most) in enumerate(zip(widths, depths, skips, strict=True)):
        pixels, before = (image_size >> i) ** 2, (image_size >> max(i - 1, 0)) ** 2
        for layer in range(depth):
            extra = num_skips(width, layer, most)
            read = (width if layer else channels) + extra
            if conv == "plain" or (i == 0 and layer == 0):
                parameters += 9 * read * width
                macs += 9 * read * width * pixels
            else:  # only the depthwise convolution has the stride of a cell's first layer
                first = before if layer == 0 else pixels
                parameters += read * width + 9 * width + width**2 + 3 * 2 * width
                macs += read * width * first + (9 * width + width**2) * pixels
            parameters += 2 * (width + extra)
        channels = width
    features = channels * (image_size >> len(widths)) ** 2
    return Cost(parameters + features * num_classes + num_classes, macs + features * num_classes)


class _Stage(NamedTuple):
    """What one stage of a MobileNetV2 adds, with the resolution it hands on."""

    mass: float
    channels: int
    parameters: int
    macs: int


def _mobilenet_stage(stage: int, blocks: int, width: float, image_size: int) -> _Stage:
    expand, _, stride = MOBILENET_STAGES[stage]
    before = MOBILENET_STAGES[stage - 1][1] if stage else MOBILENET_STEM
    channels, out = round_width(before, width), round_width(MOBILENET_STAGES[stage][1], width)
    size = _size_before(stage, image_size)
    mass, seen, parameters, macs = 0.0, 0, 0, 0
    for block in range(blocks):
        step = stride if block == 0 else 1
        inner = channels * expand
        after = -(-size // step)
        if expand > 1:
            parameters += channels * inner + 2 * inner
            macs += channels * inner * size**2
        parameters += 9 * inner + 2 * inner + inner * out + 2 * out
        macs += (9 * inner + inner * out) * after**2
        if step == 1 and channels == out:
            mass += bottleneck_mass(channels, inner)
            seen += channels + 2 * inner
        channels, size = out, after
    return _Stage(mass, seen, parameters, macs)


def _size_before(stage: int, image_size: int) -> int:
    size = -(-image_size // 2)
    for _, _, stride in MOBILENET_STAGES[:stage]:
        size = -(-size // stride)
    return size


def _mobilenet_rest(width: float, num_classes: int, image_size: int) -> Cost:
    """Stem, last convolution and classifier."""
    stem, last = round_width(MOBILENET_STEM, width), round_width(MOBILENET_STAGES[-1][1], width)
    head = round_width(MOBILENET_HEAD, max(1.0, width))
    parameters = 27 * stem + 2 * stem + last * head + 2 * head + head * num_classes + num_classes
    first, final = -(-image_size // 2), _size_before(len(MOBILENET_STAGES), image_size)
    return Cost(parameters, 27 * stem * first**2 + last * head * final**2 + head * num_classes)


def mobilenet_candidate(
    depths: Sequence[int], width: float, *, num_classes: int = 1000, image_size: int = 224
) -> Candidate:
    """NN-Mass and costs of ``nnmass_mobilenet``."""
    stages = [_mobilenet_stage(s, blocks, width, image_size) for s, blocks in enumerate(depths)]
    return _as_mobilenet(tuple(depths), width, stages, _mobilenet_rest(width, num_classes, image_size))


def _as_mobilenet(depths: tuple[int, ...], width: float, stages: Iterable[_Stage], rest: Cost) -> Candidate:
    masses, channels, parameters, macs = zip(*stages, strict=True)
    seen = sum(channels)
    return Candidate(
        f"{sum(depths)} blocks ({', '.join(map(str, depths))})",
        {"depths": depths, "width": width},
        sum(masses),
        sum(masses) / seen if seen else 0.0,
        sum(parameters) + rest.parameters,
        sum(macs) + rest.macs,
    )


# -------------------------------------------------------------------------------------------------------- enumeration


def enumerate_cells(width: float, depths: range, conv: Conv = "plain") -> Iterator[Candidate]:
    """Three cells of widths w, 2w, 4w, one depth, and skips t, 2t, 4t, for t from 0 up to all there are."""
    first = int(width)
    widths = (first, 2 * first, 4 * first)
    for depth in depths:
        for most in range(0, first * (depth - 2) + 1, max(first // 4, 1)):
            skips = (most, 2 * most, 4 * most)
            cells = [Cell(w, depth, t) for w, t in zip(widths, skips, strict=True)]
            mass, cost = nn_mass(cells), cost_of_cells(widths, (depth,) * 3, skips, conv)
            yield Candidate(
                f"{3 * depth + 1} layers, t = {', '.join(map(str, skips))}",
                {"widths": widths, "depths": (depth,) * 3, "skips": skips},
                mass,
                mass / (sum(widths) * depth),
                *cost,
            )


def enumerate_mobilenets(width: float, depths: range) -> Iterator[Candidate]:
    """Every number of blocks in the six stages that can have a shortcut; the last stage keeps its one block."""
    rest = _mobilenet_rest(width, 1000, 224)
    stages = [[_mobilenet_stage(s, n, width, 224) for n in depths] for s in range(len(MOBILENET_STAGES) - 1)]
    last = _mobilenet_stage(len(MOBILENET_STAGES) - 1, 1, width, 224)
    for counts in itertools.product(range(len(depths)), repeat=len(stages)):
        chosen = [stage[i] for stage, i in zip(stages, counts, strict=True)]
        yield _as_mobilenet((*(depths[i] for i in counts), 1), width, [*chosen, last], rest)


class Family(NamedTuple):
    """A kind of net that can be searched."""

    backbone: str
    enumerate: Callable[[float, range], Iterator[Candidate]]
    width: float  # the default
    depths: range  # the default
    whole_width: bool
    least_depth: int
    most_depth: int
    recipe: str  # see ``write_recipe``


CIFAR10 = """\
# {title}
# Command:  mcdeploy train {path}
# Hardware: any; {macs:.0f}M MACs an image. Result: none yet; NN-Mass says which net to train, not how well it will do.
# Published: SGD, lr 0.1, momentum 0.9, weight decay 5e-4, cosine to 0, batch 128. Ours: 200 epochs (the paper's number
# is not known), Nesterov momentum (timm's sgd), crops and flips, norms and biases without decay.
name: {name}
data:
  source: folder
  root: data/cifar10  # train/<class>/* and val/<class>/*
  image_size: 32
  crop: pad4
  hflip: 0.5
model:
  backbone: {backbone}
  options: {options}
train:
  epochs: 200
  batch_size: 128
  optimizer: sgd
  lr: 0.1
  momentum: 0.9
  weight_decay: 5.0e-4
  schedule: cosine
"""
IMAGENET = """\
# {title}
# Command:  mcdeploy train {path}
# Hardware: one GPU of 16 GB; {macs:.0f}M MACs an image. Result: none yet, NN-Mass says which net to train and not how
# well it will do. Published: 150 epochs, cosine, lr 0.05, weight decay 4e-5, momentum 0.9, batch 256. Ours: Nesterov
# momentum (timm's sgd), norms and biases without decay.
name: {name}
data:
  source: folder
  root: data/imagenet  # train/<class>/* and val/<class>/*
  image_size: 224
  crop_pct: 0.875
  crop: random-resized
  hflip: 0.5
  workers: 8
model:
  backbone: {backbone}
  options: {options}
train:
  epochs: 150
  batch_size: 256
  optimizer: sgd
  lr: 0.05
  momentum: 0.9
  weight_decay: 4.0e-5
  schedule: cosine
  precision: bf16
  channels_last: true
"""


def _depthwise_cells(width: float, depths: range) -> Iterator[Candidate]:
    return enumerate_cells(width, depths, "depthwise")


FAMILIES: dict[str, Family] = {
    "cells": Family("nnmass_cells", enumerate_cells, 16, range(3, 26), True, 3, 64, CIFAR10),
    "cells-depthwise": Family("nnmass_cells_depthwise", _depthwise_cells, 32, range(3, 26), True, 3, 64, CIFAR10),
    "mobilenet": Family("nnmass_mobilenet", enumerate_mobilenets, 1.0, range(1, 6), False, 1, 8, IMAGENET),
}


# ----------------------------------------------------------------------------------------------------------- choosing


def search(
    family: str,
    *,
    width: float | None = None,
    depths: range | None = None,
    max_parameters: float = float("inf"),
    max_macs: float = float("inf"),
) -> Found:
    """Enumerate a family at one width and take the highest NN-Mass within the budget; of equal ones the cheapest.

    Args:
        family: a name in ``FAMILIES``.
        width: cells: channels of the first cell; mobilenet: the width multiplier. Default: the family's own.
        depths: cells: layers of a cell; mobilenet: blocks of a stage. Default: the family's own.
        max_parameters, max_macs: the budget, for one image; MACs at 32x32 (cells) or 224x224 (mobilenet).

    Raises:
        InputError: unknown family, an impossible width or depth, or nothing fits; says the smallest net there is.
    """
    if family not in FAMILIES:
        raise InputError(f"nnmass search: unknown family {family!r}; known are {', '.join(FAMILIES)}")
    kind = FAMILIES[family]
    width = kind.width if width is None else width
    depths = kind.depths if depths is None else depths
    if not width > 0 or (kind.whole_width and width != int(width)):
        wanted = "a whole number of channels" if kind.whole_width else "a positive factor"
        raise InputError(f"nnmass search: width {width:g}: family {family} needs {wanted}")
    if not depths or depths[0] < kind.least_depth or depths[-1] > kind.most_depth:
        raise InputError(
            f"nnmass search: depths of family {family} lie between {kind.least_depth} and {kind.most_depth}"
        )
    candidates = list(kind.enumerate(width, depths))
    fitting = [candidate for candidate in candidates if candidate.fits(max_parameters, max_macs)]
    if not fitting:
        small = min(candidates, key=lambda candidate: (candidate.parameters, candidate.macs))
        raise InputError(
            f"nnmass search: no net of family {family} at width {width:g} fits the budget; the smallest of "
            f"{len(candidates):,} has {small.parameters:,} parameters and {small.macs:,} MACs ({small.label}); "
            "raise the budget or lower the width"
        )
    front = pareto_front(fitting)
    return Found(family, width, len(candidates), len(fitting), front, front[-1])


def pareto_front(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Those that no other one equals or beats in mass, parameters and MACs at once, by rising mass."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (-c.nn_mass, c.parameters, c.macs)):
        if not any(kept.parameters <= candidate.parameters and kept.macs <= candidate.macs for kept in front):
            front.append(candidate)
    return tuple(reversed(front))


def table_of(found: Found) -> Table:
    """At most twenty nets of the front, evenly taken, with the pick as the last row."""
    table = Table(
        title=f"{found.family}, width {found.width:g}: {found.num_fitting:,} of {found.num_candidates:,} nets fit"
    )
    for name in ("net", "density", "NN-Mass", "parameters", "MACs"):
        table.add_column(name, justify="left" if name == "net" else "right")
    count = min(len(found.front), MOST_ROWS)
    shown = [found.front[-1 - (len(found.front) - 1) * i // max(count - 1, 1)] for i in range(count)]
    for candidate in reversed(shown):
        table.add_row(
            f"{candidate.label}{'  <- the pick' if candidate is found.pick else ''}",
            f"{candidate.density:.3f}",
            f"{candidate.nn_mass:,.0f}",
            f"{candidate.parameters:,}",
            f"{candidate.macs:,}",
        )
    return table


def write_recipe(found: Found, path: Path) -> None:
    """A whole recipe for the pick, named after the file, with the published schedule of its data set.

    Raises:
        InputError: the file is no .yaml, or its name is no name for a run.
    """
    if path.suffix != ".yaml" or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", path.stem):
        raise InputError(f"{path}: a recipe is a .yaml file whose name has only letters, digits, '.', '_' and '-'")
    family, pick = FAMILIES[found.family], found.pick
    options = {key: list(value) if isinstance(value, tuple) else value for key, value in pick.options.items()}
    text = family.recipe.format(
        title=f"{pick.label}, width {found.width:g}: NN-Mass {pick.nn_mass:,.0f}, {pick.parameters:,} parameters.",
        path=path,
        macs=pick.macs / 1e6,
        name=path.stem,
        backbone=family.backbone,
        options=json.dumps(options).replace('"', ""),
    )
    path.write_text(text, encoding="utf-8")
