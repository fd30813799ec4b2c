"""The CIFAR ResNets of He et al. 2016, section 4.2, registered with timm.

Three stages of n blocks, depth 6n + 2, widths 16, 32, 64, shortcuts without parameters (option A of the paper):
https://arxiv.org/abs/1512.03385. State-dict keys are those of akamaster/pytorch_resnet_cifar10, so its weights load.
Stages are plain ``nn.Sequential`` of ``BasicBlock``. No activation changes a block's input in place.
"""

# B = batch, C = channels, H/W = height/width.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

Entry = TypeVar("Entry", bound=Callable[..., nn.Module])
register: Callable[[Entry], Entry] = register_model  # timm's decorator, with its type

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels scaled to 0..1


class SubsampleAndPad(nn.Module):
    """Option A: take every ``stride``-th pixel, add zero channels evenly before and after. No parameters."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.pad(x_BCHW[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        same = in_channels == out_channels and stride == 1
        self.shortcut = nn.Identity() if same else SubsampleAndPad(in_channels, out_channels, stride)
        self.act2 = nn.ReLU(inplace=True)  # on the sum, which is a new tensor

    def forward(self, x_BCHW: Tensor) -> Tensor:
        branch_BCHW = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x_BCHW)))))
        return self.act2(branch_BCHW + self.shortcut(x_BCHW))


class CifarResNet(nn.Module):
    """A ResNet for small images: a 3x3 stem, three stages (strides 1, 2, 2), global pooling, a linear head.

    Args:
        num_blocks: blocks in each of the three stages; the depth is 6 * num_blocks + 2.
        widths: channels of the three stages.
        num_classes: outputs; 0 leaves the head out.
        drop_rate: dropout before the head, 0..1.
        global_pool: timm's pooling type, or "" for none.
    """

    def __init__(
        self,
        num_blocks: int,
        widths: tuple[int, int, int] = (16, 32, 64),
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[2]
        self.drop_rate = drop_rate
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        self.layer1 = _make_stage(widths[0], widths[0], num_blocks, stride=1)
        self.layer2 = _make_stage(widths[0], widths[1], num_blocks, stride=2)
        self.layer3 = _make_stage(widths[1], widths[2], num_blocks, stride=2)
        self.feature_info = [
            {"num_chs": width, "reduction": 2**i, "module": f"layer{i + 1}"} for i, width in enumerate(widths)
        ]
        self.global_pool, self.linear = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)  # He et al. 2015, https://arxiv.org/abs/1502.01852
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def get_classifier(self) -> nn.Module:
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        self.num_classes = num_classes
        self.global_pool, self.linear = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.act1(self.bn1(self.conv1(images_BCHW)))
        return self.layer3(self.layer2(self.layer1(x_BCHW)))

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        pooled_BC = self.global_pool(x_BCHW)
        if self.drop_rate:
            pooled_BC = F.dropout(pooled_BC, self.drop_rate, self.training)
        return pooled_BC if pre_logits else self.linear(pooled_BC)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images_BCHW))


def _make_stage(in_channels: int, out_channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1)))


def _cfg(size: int) -> dict[str, Any]:
    return {
        "input_size": (3, size, size),
        "fixed_input_size": False,
        "num_classes": 10,
        "pool_size": (size // 4, size // 4),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "conv1",
        "classifier": "linear",
    }


default_cfgs = generate_default_cfgs(
    {
        "resnet20_cifar": _cfg(32),
        "resnet32_cifar": _cfg(32),
        "resnet44_cifar": _cfg(32),
        "resnet56_cifar": _cfg(32),
        "resnet110_cifar": _cfg(32),
        "resnet_digits": _cfg(16),
    }
)


def _build(variant: str, pretrained: bool, num_blocks: int, **kwargs: Any) -> CifarResNet:
    stages = {"out_indices": (0, 1, 2)}
    return build_model_with_cfg(CifarResNet, variant, pretrained, feature_cfg=stages, num_blocks=num_blocks, **kwargs)


@register
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR, 0.27 M parameters."""
    return _build("resnet20_cifar", pretrained, num_blocks=3, **kwargs)


@register
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for CIFAR, 0.46 M parameters."""
    return _build("resnet32_cifar", pretrained, num_blocks=5, **kwargs)


@register
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 for CIFAR, 0.66 M parameters."""
    return _build("resnet44_cifar", pretrained, num_blocks=7, **kwargs)


@register
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for CIFAR, 0.85 M parameters."""
    return _build("resnet56_cifar", pretrained, num_blocks=9, **kwargs)


@register
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for CIFAR, 1.7 M parameters."""
    return _build("resnet110_cifar", pretrained, num_blocks=18, **kwargs)


@register
def resnet_digits(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """The same net with four blocks a stage, for scikit-learn's digits enlarged to 16x16."""
    return _build("resnet_digits", pretrained, num_blocks=4, **kwargs)
