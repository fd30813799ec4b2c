"""SparseNet, the form by concatenation, and the DenseNets it is compared with, registered with timm.

Zhu et al., "Sparsely Aggregated Convolutional Networks", ECCV 2018, after the authors' code,
https://github.com/Lyken17/SparseNet (``denselink.py``). A stage keeps a list of feature maps, its input first, and

    y_l = F_l(concat(y_{l-1}, y_{l-2}, y_{l-4}, ..., y_{l-2^k})),   2^k <= l,   newest first.

The stage hands on the same fetch over all of its outputs, so the transition and the classifier see only that set too.
A plain unit F is BN-ReLU-Conv3x3(k); a bottleneck (B) is BN-ReLU-Conv1x1(4k)-BN-ReLU-Conv3x3(k); a transition is
BN-ReLU-Conv1x1-AvgPool2 that keeps the fraction theta of the channels (C: theta = 0.5 with bottlenecks, else 1). The
list is fetched from as it is; no large tensor is sliced. Reading *every* offset instead gives DenseNet
(https://arxiv.org/abs/1608.06993). timm's own class has a stem of stride 4 and bottlenecks only, so it cannot express
the DenseNets for CIFAR, and they are here too.

What had to be settled, and by what:

- CIFAR stem: 3x3 to 2k channels. The released code has k, which its author calls a mistake. The same for the DenseNets:
  16 channels, as in the DenseNet paper, would not meet the counts in this paper's tables.
- ImageNet: a 7x7 stem of k channels (not 2k), theta = 0.5, bottlenecks of 4k, and a classifier that is fed a 3x3 grid
  (average pooling by 2 of 7x7), so nine times the final channels. Only this meets the published parameter counts to the
  last digit. ``global_pool="avg"`` is the usual head.
- One growth a stage, such as {16, 32, 64}, has the same number of units in each.

Parameter counts, ours against the published ones (100 classes, 1000 for ImageNet), agree but for these rows:
100 {32, 64, 128} has 28.73 M against 27.72 M; BC 100 {32, 64, 128} 17.34 M against 16.72 M (others got 17.34 M too);
BC 100 {16, 32, 64} 4.365 M against 4.38 M; BC 100 k = 12 0.373 M against 0.40 M; 40 k = 12 0.194 M against 0.8 M, which
seems to be the figure of k = 24. Dropout in the units, off by default in the authors' code, is left out.
"""

# B = batch, C = channels, H/W = height/width.

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mcdeploy.backbones.cifar_resnet import IMAGENET_MEAN, IMAGENET_STD
from mcdeploy.connectivity.sparse import offsets
from mcdeploy.connectivity.topology import Node, StageWiring

GRID = 3  # height and width of what the published ImageNet classifier is fed


class Unit(nn.Sequential):
    """BN-ReLU-Conv3x3, with a 1x1 bottleneck of 4k channels before it if asked for."""

    def __init__(self, in_channels: int, growth: int, bottleneck: bool) -> None:
        parts: list[tuple[str, nn.Module]] = []
        channels = in_channels
        if bottleneck:
            channels = 4 * growth
            parts += _norm_act_conv(1, in_channels, channels, kernel=1)
        parts += _norm_act_conv(2 if bottleneck else 1, channels, growth, kernel=3)
        super().__init__(OrderedDict(parts))


def _norm_act_conv(number: int, in_channels: int, out_channels: int, kernel: int) -> list[tuple[str, nn.Module]]:
    return [
        (f"norm{number}", nn.BatchNorm2d(in_channels)),
        (f"act{number}", nn.ReLU(inplace=True)),  # on what the BN, or the convolution it was folded into, has made
        (f"conv{number}", nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)),
    ]


class SparseStage(nn.Module):
    """Units that each read the concatenation of some earlier outputs; so does whatever comes after the stage.

    Args:
        in_channels: of the stage's input, node 0.
        num_units: units, nodes 1 to num_units.
        growth: channels that each unit puts out, k.
        bottleneck: units of the form B.
        base: offsets are base^0, base^1, ...; None: every offset, which is DenseNet.
    """

    def __init__(self, in_channels: int, num_units: int, growth: int, bottleneck: bool, base: int | None) -> None:
        super().__init__()
        self.base = base
        self.widths = (in_channels, *(growth for _ in range(num_units)))  # channels of every node
        for index in range(1, num_units + 1):
            width = sum(self.widths[node] for node in self.reads(index))
            self.add_module(f"unit{index}", Unit(width, growth, bottleneck))
        self.out_channels = sum(self.widths[node] for node in self.reads(num_units + 1))

    def reads(self, index: int) -> tuple[int, ...]:
        """The nodes that node ``index`` concatenates, newest first; ``num_units + 1`` is what reads the stage."""
        back = range(1, index + 1) if self.base is None else offsets(index, self.base)
        return tuple(index - offset for offset in back)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        nodes = [x_BCHW]
        for unit in self.children():
            nodes.append(unit(self._fetch(nodes)))
        return self._fetch(nodes)

    def _fetch(self, nodes: list[Tensor]) -> Tensor:
        fetched = [nodes[index] for index in self.reads(len(nodes))]
        return torch.cat(fetched, 1) if len(fetched) > 1 else fetched[0]


class Transition(nn.Sequential):
    """BN-ReLU-Conv1x1-AvgPool2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        pool = ("pool", nn.AvgPool2d(2))
        super().__init__(OrderedDict([*_norm_act_conv(1, in_channels, out_channels, kernel=1), pool]))


class GridPool(nn.Module):
    """Average-pool by 2 to a 3x3 grid and flatten, [B, C, H, W] to [B, 9C].

    Images of 224 to 255 pixels leave 7x7, of which the last row and column fall away, as published. What is not 3x3
    then, from other sizes of image, is brought there by adaptive pooling.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pooled_BCHW = F.avg_pool2d(x_BCHW, 2)
        if pooled_BCHW.shape[2:] != (GRID, GRID):
            pooled_BCHW = F.adaptive_avg_pool2d(pooled_BCHW, GRID)
        return pooled_BCHW.flatten(1)


class SparseNet(nn.Module):
    """SparseNet by concatenation; with ``base=None`` a DenseNet.

    Args:
        num_units: units of each stage.
        growth: channels a unit puts out, k: one number, or one a stage.
        bottleneck: units of the form B.
        theta: fraction of the channels that a transition keeps, above 0, at most 1.
        stem: channels of the stem.
        small_images: a 3x3 stem of stride 1 for CIFAR; else 7x7 of stride 2, BN, ReLU and max-pooling, for ImageNet.
        base: of the offsets; None reads every earlier output.
        num_classes: outputs; 0 leaves the head out.
        drop_rate: dropout before the head, 0..1.
        global_pool: timm's pooling type, "" for none, or "grid": the classifier is fed a 3x3 grid.
    """

    def __init__(
        self,
        num_units: tuple[int, ...],
        growth: int | tuple[int, ...],
        bottleneck: bool,
        theta: float,
        stem: int,
        small_images: bool,
        base: int | None = 2,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        growths = (growth,) * len(num_units) if isinstance(growth, int) else growth
        if len(growths) != len(num_units) or (base is not None and base < 2) or not 0 < theta <= 1:
            raise ValueError("growth needs one number, or one a stage; base at least 2; theta above 0 and at most 1")
        self.drop_rate = drop_rate
        self.stem = _small_stem(in_chans, stem) if small_images else _large_stem(in_chans, stem)
        channels, reduction = stem, 1 if small_images else 4
        self.feature_info: list[dict[str, Any]] = []
        for s, (units, k) in enumerate(zip(num_units, growths, strict=True), start=1):
            stage = SparseStage(channels, units, k, bottleneck, base)
            self.add_module(f"stage{s}", stage)
            channels = stage.out_channels
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"stage{s}"})
            if s < len(num_units):
                self.add_module(f"transition{s}", Transition(channels, int(channels * theta)))
                channels, reduction = int(channels * theta), 2 * reduction
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self.num_features = channels
        self.pool_type = global_pool
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():  # as in the authors' code
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def wiring(self) -> tuple[StageWiring, ...]:
        """Who concatenates whom, a stage's last entry being what reads the stage: its transition, or the final norm.

        The blocks are named as in the model. Not a ``Topology``, since concatenation is neither sum nor mean.
        """
        stages = [(name, module) for name, module in self.named_children() if isinstance(module, SparseStage)]
        wirings = []
        for s, (name, stage) in enumerate(stages):
            units = tuple(unit for unit, _ in stage.named_children())
            reader = f"transition{s + 1}" if s + 1 < len(stages) else "norm"
            reads = tuple(
                tuple(Node(s, node) for node in sorted(stage.reads(index))) for index in range(1, len(units) + 2)
            )
            wirings.append(StageWiring(name, (*units, reader), reads))
        return tuple(wirings)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.pool_type = global_pool
        self.head_hidden_size = self.num_features * (GRID**2 if self.pool_type == "grid" else 1)
        timm_pool = "avg" if self.pool_type == "grid" else self.pool_type
        self.global_pool, self.classifier = create_classifier(self.head_hidden_size, num_classes, pool_type=timm_pool)
        if self.pool_type == "grid":
            self.global_pool = GridPool()

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = images_BCHW
        for name, module in self.named_children():
            if name in ("global_pool", "classifier"):
                break
            x_BCHW = module(x_BCHW)
        return x_BCHW

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        pooled_BC = self.global_pool(x_BCHW)
        if self.drop_rate:
            pooled_BC = F.dropout(pooled_BC, self.drop_rate, self.training)
        return pooled_BC if pre_logits else self.classifier(pooled_BC)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images_BCHW))


def _small_stem(in_chans: int, channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict([("conv", nn.Conv2d(in_chans, channels, 3, padding=1, bias=False))]))


def _large_stem(in_chans: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            [
                ("conv", nn.Conv2d(in_chans, channels, 7, 2, padding=3, bias=False)),
                ("norm", nn.BatchNorm2d(channels)),
                ("act", nn.ReLU(inplace=True)),
                ("pool", nn.MaxPool2d(3, 2, padding=1)),
            ]
        )
    )


def _cifar(depth: int, growth: int | tuple[int, ...], bottleneck: bool = False) -> dict[str, Any]:
    """Three stages; the depth counts stem, transitions, classifier, and two convolutions a bottleneck."""
    units = (depth - 4) // 3 // (2 if bottleneck else 1)
    return {
        "num_units": (units, units, units),
        "growth": growth,
        "bottleneck": bottleneck,
        "theta": 0.5 if bottleneck else 1.0,
        "stem": 2 * (growth if isinstance(growth, int) else growth[0]),
        "small_images": True,
    }


def _dense_cifar(depth: int, growth: int, bottleneck: bool = False) -> dict[str, Any]:
    return {**_cifar(depth, growth, bottleneck), "base": None}


def _imagenet(num_units: tuple[int, int, int, int], growth: int) -> dict[str, Any]:
    return {
        "num_units": num_units,
        "growth": growth,
        "bottleneck": True,
        "theta": 0.5,
        "stem": growth,
        "small_images": False,
        "global_pool": "grid",
    }


NETS: dict[str, dict[str, Any]] = {  # timm's name for it, and what it is made of
    "sparsenet40_12_cifar": _cifar(40, 12),
    "sparsenet40_24_cifar": _cifar(40, 24),
    "sparsenet100_24_cifar": _cifar(100, 24),
    "sparsenet100_36_cifar": _cifar(100, 36),
    "sparsenet100_16_32_64_cifar": _cifar(100, (16, 32, 64)),
    "sparsenet100_32_64_128_cifar": _cifar(100, (32, 64, 128)),
    "sparsenetbc100_12_cifar": _cifar(100, 12, bottleneck=True),
    "sparsenetbc100_24_cifar": _cifar(100, 24, bottleneck=True),
    "sparsenetbc100_36_cifar": _cifar(100, 36, bottleneck=True),
    "sparsenetbc100_16_32_64_cifar": _cifar(100, (16, 32, 64), bottleneck=True),
    "sparsenetbc100_32_64_128_cifar": _cifar(100, (32, 64, 128), bottleneck=True),
    "sparsenetbc400_12_cifar": _cifar(400, 12, bottleneck=True),
    "densenet40_12_cifar": _dense_cifar(40, 12),
    "densenet40_24_cifar": _dense_cifar(40, 24),
    "densenet100_12_cifar": _dense_cifar(100, 12),
    "densenet100_24_cifar": _dense_cifar(100, 24),
    "densenetbc100_12_cifar": _dense_cifar(100, 12, bottleneck=True),
    "densenetbc250_24_cifar": _dense_cifar(250, 24, bottleneck=True),
    "sparsenet121_32": _imagenet((6, 12, 24, 16), 32),
    "sparsenet169_32": _imagenet((6, 12, 32, 32), 32),
    "sparsenet201_32": _imagenet((6, 12, 48, 32), 32),
    "sparsenet201_48": _imagenet((6, 12, 48, 32), 48),
}


def _cfg(small_images: bool) -> dict[str, Any]:
    size = 32 if small_images else 224
    return {
        "input_size": (3, size, size),
        "fixed_input_size": False,
        "num_classes": 10 if small_images else 1000,
        "pool_size": (8, 8) if small_images else (7, 7),
        "crop_pct": 1.0 if small_images else 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "stem.conv",
        "classifier": "classifier",
    }


default_cfgs = generate_default_cfgs({name: _cfg(net["small_images"]) for name, net in NETS.items()})


def _entry(name: str) -> Callable[..., SparseNet]:
    """What ``timm.create_model(name)`` calls; timm reads the function's name."""

    def build(pretrained: bool = False, **kwargs: Any) -> SparseNet:
        stages = {"out_indices": tuple(range(len(NETS[name]["num_units"])))}
        return build_model_with_cfg(SparseNet, name, pretrained, feature_cfg=stages, **{**NETS[name], **kwargs})

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{name}, made of {NETS[name]}."
    return build


for _name in NETS:
    globals()[_name] = register_model(_entry(_name))
