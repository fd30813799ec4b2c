"""The cell nets of "How does topology influence gradient propagation and model performance of deep networks with
DenseNet-type skip connections?" (Bhardwaj, Li and Marculescu, CVPR 2021), and its MobileNetV2s, registered with timm.

A net is N_c cells of width w_c, depth d_c and t_c skip channels. Inside a cell layer i reads the layer before it and a
fixed random subset of the channels of all layers before that:

    x_{i-1} = concat( s_{i-1},  min{ w_c (i - 1), t_c } channels of s_0 .. s_{i-2} ),   i = 2 .. d_c - 1    (sec. 3.1)

Layers 0 and 1 are  s = BN(conv(.))  and  s = BN(conv(ReLU(.))), later ones  s = conv(ReLU(BN(x))),  as in
https://github.com/SLDGroup/NN_Mass. A convolution is 3x3, or pointwise-depthwise-pointwise with BN. Layer 0 of every
cell but the first has stride 2. The head averages 2x2 pixels and feeds all that is left to a linear layer.

Not taken over from that code: its BNs never train, its CNNs draw links from layers 1..i-1 instead of 0..i-2, it reseeds
Python's global generator, it computes BN in vain where t_c is 0, and it hard-codes the width.

The links are drawn once from ``wiring_seed`` and the shape of the net, by a generator of their own, and rebuilt
whenever the net is: they are no part of the weights. Every link is static: a whole feature map, a slice where the
channels are neighbours, or one gather. No layer is ever dead, since each is read by the next one.
"""

# B = batch, C = channels, H/W = height/width.

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from mcdeploy.backbones.cifar_resnet import IMAGENET_MEAN, IMAGENET_STD, register

Links = tuple[tuple[tuple[int, ...], ...], ...]  # [layer][source layer]: the channels read, ascending
Conv = Literal["plain", "depthwise"]


def num_skips(width: int, layer: int, skips: int) -> int:
    """Channels that layer ``layer`` of a cell reads beside those of the layer before it: min{w_c (i - 1), t_c}."""
    return min(width * (layer - 1), skips) if layer >= 2 else 0


def draw_links(width: int, depth: int, skips: int, generator: random.Random) -> Links:
    """For every layer of a cell and every layer 0 .. i-2, the channels it reads, uniform without replacement."""
    return tuple(_draw_layer(width, layer, num_skips(width, layer, skips), generator) for layer in range(depth))


def _draw_layer(width: int, layer: int, count: int, generator: random.Random) -> tuple[tuple[int, ...], ...]:
    """The first ``count`` steps of a Fisher-Yates shuffle. Only ``random()`` is stable between Python versions."""
    channels = list(range(width * max(layer - 1, 0)))
    for i in range(count):
        other = i + int(generator.random() * (len(channels) - i))
        channels[i], channels[other] = channels[other], channels[i]
    chosen = sorted(channels[:count])
    return tuple(
        tuple(channel - width * source for channel in chosen if channel // width == source)
        for source in range(max(layer - 1, 0))
    )


class Pick(nn.Module):
    """The given channels of a feature map: itself, a slice, or one gather."""

    index_K: Tensor | None

    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.start, self.stop = channels[0], channels[-1] + 1
        self.is_whole = len(channels) == width
        index = None if self.stop - self.start == len(channels) else torch.tensor(channels)
        self.register_buffer("index_K", index, persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.is_whole:
            return x_BCHW
        if self.index_K is None:
            return x_BCHW[:, self.start : self.stop]
        return x_BCHW.index_select(1, self.index_K)


class Layer(nn.Module):
    """One layer of a cell: reads the layer before it and what ``links`` say of the earlier ones.

    Args:
        links: channels to read of each of the layers 0 .. i-2.
        norm_first: BN and ReLU come before the convolution, on all that is read; else ReLU before and BN after it.
    """

    def __init__(self, width: int, links: tuple[tuple[int, ...], ...], conv: Conv, *, norm_first: bool) -> None:
        super().__init__()
        self.sources = tuple(source for source, channels in enumerate(links) if channels)
        self.picks = nn.ModuleList(Pick(channels, width) for channels in links if channels)
        in_channels = width + sum(map(len, links))
        self.norm_first = norm_first
        self.norm = nn.BatchNorm2d(in_channels if norm_first else width)
        self.act = nn.ReLU()  # not in place: later layers read the same map
        self.conv = _make_conv(in_channels, width, 1, conv)

    def forward(self, layers: list[Tensor]) -> Tensor:
        """layers: the outputs [B, C, H, W] of layers 0 .. i-1 of the cell."""
        skips = [pick(layers[source]) for source, pick in zip(self.sources, self.picks, strict=True)]
        x_BCHW = torch.cat([layers[-1], *skips], dim=1) if skips else layers[-1]
        if self.norm_first:
            return self.conv(self.act(self.norm(x_BCHW)))
        return self.norm(self.conv(self.act(x_BCHW)))


class Cell(nn.Module):
    """Layers that read each other at random; layer 0 is what the cell receives, or a convolution of stride 2 of it.

    Args:
        in_channels: of the cell's input; None: the input is layer 0 already.
        width: w_c, channels of every layer.
        depth: d_c, layers, layer 0 included; at least 2.
        skips: t_c, how many channels of earlier layers one layer reads at most.
        links: see ``draw_links``.
    """

    def __init__(
        self, in_channels: int | None, width: int, depth: int, skips: int, links: Links, conv: Conv = "plain"
    ) -> None:
        super().__init__()
        self.width, self.depth, self.skips, self.links = width, depth, skips, links
        self.first = nn.Identity() if in_channels is None else _first_layer(in_channels, width, 2, conv)
        self.layers = nn.ModuleList(Layer(width, links[i], conv, norm_first=i >= 2) for i in range(1, depth))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        layers = [self.first(x_BCHW)]
        for layer in self.layers:
            layers.append(layer(layers))
        return layers[-1]


class FlattenPool(nn.Module):
    """Average 2x2 pixels and flatten: 16 C numbers from a map of 8x8."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(x_BCHW, 2).flatten(1)


class CellNet(nn.Module):
    """A net of cells: a first layer (layer 0 of the first cell), the cells, a linear head.

    Args:
        widths, depths, skips: w_c, d_c and t_c, one number a cell.
        conv: ``plain`` 3x3 convolutions, or ``depthwise`` for pointwise-depthwise-pointwise ones.
        wiring_seed: the links are drawn from it and from the shape of the net.
        head: ``flatten`` averages 2x2 pixels and keeps the rest, as published; ``global`` averages all of them.
        img_size: height and width of the images; the head of ``flatten`` depends on it.
        num_classes: outputs; 0 leaves the head out.
        drop_rate: dropout before the head, 0..1.

    Raises:
        ValueError: the three lists differ in length, a number is out of range, or the image is too small to halve.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128),
        depths: Sequence[int] = (13, 13, 13),
        skips: Sequence[int] = (40, 80, 125),
        conv: Conv = "plain",
        wiring_seed: int = 0,
        head: Literal["flatten", "global"] = "flatten",
        img_size: int | tuple[int, int] = 32,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        size = img_size if isinstance(img_size, int) else img_size[0]
        _check(widths, depths, skips, conv, head, size)
        generator = random.Random(wiring_seed)
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.head_type, self.final_size = head, size // 2 ** (len(widths) - 1)
        self.stem = _first_layer(in_chans, widths[0], 1, "plain")
        self.cells = nn.Sequential()
        for i, (width, depth, most) in enumerate(zip(widths, depths, skips, strict=True)):
            links = draw_links(width, depth, most, generator)
            self.cells.append(Cell(widths[i - 1] if i else None, width, depth, most, links, conv))
        self.num_features = widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": 2**i, "module": f"cells.{i}"} for i, width in enumerate(widths)
        ]
        self.global_pool: nn.Module
        self.linear: nn.Module
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)  # He et al. 2015, https://arxiv.org/abs/1502.01852
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def get_classifier(self) -> nn.Module:
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """``global_pool``: a pooling type of timm's, "" for none; default: that of the head given at first."""
        self.num_classes = num_classes
        if global_pool is None and self.head_type == "flatten":
            self.head_hidden_size = self.num_features * (self.final_size // 2) ** 2
            self.global_pool = FlattenPool()
            self.linear = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
            return
        self.head_hidden_size = self.num_features
        self.global_pool, self.linear = create_classifier(
            self.num_features, num_classes, pool_type="avg" if global_pool is None else global_pool
        )

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        return self.cells(self.stem(images_BCHW))

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        pooled_BC = self.global_pool(x_BCHW)
        if self.drop_rate:
            pooled_BC = F.dropout(pooled_BC, self.drop_rate, self.training)
        return pooled_BC if pre_logits else self.linear(pooled_BC)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images_BCHW))


def _first_layer(in_channels: int, width: int, stride: int, conv: Conv) -> nn.Sequential:
    return nn.Sequential(_make_conv(in_channels, width, stride, conv), nn.BatchNorm2d(width))


def _make_conv(in_channels: int, width: int, stride: int, conv: Conv) -> nn.Module:
    if conv == "plain":
        return nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False), nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width),
    )  # fmt: skip


def _check(widths: Sequence[int], depths: Sequence[int], skips: Sequence[int], conv: str, head: str, size: int) -> None:
    if not len(widths) == len(depths) == len(skips) >= 1:
        raise ValueError(
            f"widths, depths and skips need one number a cell, got {len(widths)}, {len(depths)} and {len(skips)}"
        )
    if min(widths) < 1 or min(depths) < 2 or min(skips) < 0:
        raise ValueError("a cell needs a width of at least 1, a depth of at least 2 and no negative number of skips")
    if conv not in ("plain", "depthwise"):
        raise ValueError(f"conv must be 'plain' or 'depthwise', got {conv!r}")
    if head not in ("flatten", "global"):
        raise ValueError(f"head must be 'flatten' or 'global', got {head!r}")
    halvings = len(widths) - 1 + (head == "flatten")
    if size % 2**halvings:
        raise ValueError(f"images of {size} pixels cannot be halved {halvings} times; take a multiple of {2**halvings}")


# t, c, n, s of MobileNetV2 (expansion, channels, blocks, stride), with the published net's n = 1, 2, 3, 4, 3, 3, 1.
MOBILENET_STAGES = (
    (1, 16, 1), (6, 24, 2), (6, 32, 2), (6, 64, 2), (6, 96, 1), (6, 160, 2), (6, 320, 1),
)  # fmt: skip
MOBILENET_V2_DEPTHS = (1, 2, 3, 4, 3, 3, 1)
MOBILENET_22_DEPTHS = (2, 3, 4, 5, 4, 3, 1)  # the 22 cells of the paper's models A and B
MOBILENET_STEM, MOBILENET_HEAD = 32, 1280


def round_width(channels: int, width: float) -> int:
    """MobileNetV2's rounding of a width multiplier: to a multiple of 8, never down by more than a tenth."""
    return int(round_channels(channels, multiplier=width))


def _mobilenet(variant: str, pretrained: bool, depths: Sequence[int], width: float, **kwargs: Any) -> EfficientNet:
    if len(depths) != len(MOBILENET_STAGES) or min(depths) < 1 or width <= 0:
        raise ValueError(f"depths needs {len(MOBILENET_STAGES)} numbers of at least 1, and width must be positive")
    stages = [
        [f"{'ds' if t == 1 else 'ir'}_r{n}_k3_s{s}{'' if t == 1 else f'_e{t}'}_c{c}"]
        for (t, c, s), n in zip(MOBILENET_STAGES, depths, strict=True)
    ]
    return build_model_with_cfg(
        EfficientNet,
        variant,
        pretrained,
        pretrained_filter_fn=None,
        block_args=decode_arch_def(stages),
        num_features=round_width(MOBILENET_HEAD, max(1.0, width)),
        stem_size=MOBILENET_STEM,
        round_chs_fn=partial(round_channels, multiplier=width),
        act_layer=nn.ReLU6,
        **kwargs,
    )


def _cell_cfg() -> dict[str, Any]:
    return {
        "input_size": (3, 32, 32),
        "fixed_input_size": True,
        "num_classes": 10,
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "stem.0",
        "classifier": "linear",
    }


def _mobilenet_cfg() -> dict[str, Any]:
    return {
        "input_size": (3, 224, 224),
        "fixed_input_size": False,
        "num_classes": 1000,
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "conv_stem",
        "classifier": "classifier",
    }


default_cfgs = generate_default_cfgs(
    {
        "nnmass_cells": _cell_cfg(),
        "nnmass_cells_depthwise": _cell_cfg(),
        "nnmass_mobilenet": _mobilenet_cfg(),
        "nnmass_mobilenet_a": _mobilenet_cfg(),
        "nnmass_mobilenet_b": _mobilenet_cfg(),
    }
)


def _cells(variant: str, pretrained: bool, **kwargs: Any) -> CellNet:
    cells = {"out_indices": (0, 1, 2), "flatten_sequential": True}
    return build_model_with_cfg(CellNet, variant, pretrained, feature_cfg=cells, **kwargs)


@register
def nnmass_cells(pretrained: bool = False, **kwargs: Any) -> CellNet:
    """Three cells of width 32, 64, 128 and depth 13; other widths, depths and skips as keywords."""
    return _cells("nnmass_cells", pretrained, **kwargs)


@register
def nnmass_cells_depthwise(pretrained: bool = False, **kwargs: Any) -> CellNet:
    """The same with pointwise-depthwise-pointwise convolutions, 867,656 parameters."""
    return _cells("nnmass_cells_depthwise", pretrained, **{"conv": "depthwise", **kwargs})


@register
def nnmass_mobilenet(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """MobileNetV2 with ``depths`` blocks in its seven stages and a ``width`` multiplier."""
    options = {"depths": MOBILENET_V2_DEPTHS, "width": 1.0, **kwargs}
    return _mobilenet("nnmass_mobilenet", pretrained, **options)


@register
def nnmass_mobilenet_a(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """The paper's model A: 22 cells at width 1.0, 3.70 M parameters."""
    options = {"depths": MOBILENET_22_DEPTHS, "width": 1.0, **kwargs}
    return _mobilenet("nnmass_mobilenet_a", pretrained, **options)


@register
def nnmass_mobilenet_b(pretrained: bool = False, **kwargs: Any) -> EfficientNet:
    """The paper's model B: 22 cells at width 0.6, 2.30 M parameters."""
    options = {"depths": MOBILENET_22_DEPTHS, "width": 0.6, **kwargs}
    return _mobilenet("nnmass_mobilenet_b", pretrained, **options)
