"""Multi-branch residual nets {D, w, C}: ResNeXt with every branch's own way out, registered with timm.

Plain, as built here, a net is the ResNeXt of Xie et al. 2017 (https://arxiv.org/abs/1611.05431) in its form

    x(i) = relu(P(x(i-1)) + sum_k F_k(x(i-1))),    F_k = BN(1x1, w -> c) o relu(BN(3x3, w -> w)) o relu(BN(1x1, c -> w))

with C branches F_k of bottleneck width w a module and one identity or projection P. ``connectivity.gateconnect`` wires
the branches of adjacent modules to each other ("Connectivity Learning in Multi-Branch Networks", arXiv 1709.09582).
All branches run as grouped convolutions. A branch reads c channels, so the first convolution of a module whose branches
all read the same tensor has one group, and C groups when every branch has an input of its own; the weight is the same.

The names are ``multibranch<D>_<C>x<w>d``. What the paper leaves open and its parameter counts settle:

- Widths are w, 2w, 4w (8w) a branch and c, 2c, 4c (8c) a module. c = 64 for {20,4,8} and {29,8,8}, as the text says
  for its figure; c = 256 for {29,64,8} and on ImageNet, as in ResNeXt.
- The BN after a branch's last convolution is the branch's own, which 0.28 M and 0.86 M need: ResNeXt has one after the
  sum, and with that the two would be 0.27 M and 0.84 M. (34.4 M is ResNeXt's own figure, with one BN and 10 classes.)
- At a stage change the shortcut is one 1x1 convolution of stride 2 with BN, shared by all branches: one for each branch
  would add a third to {29,8,8}. {29,64,8} has another one from the stem's 64 channels to 256.
- The stem is 3x3 with 64 channels (ImageNet: 7x7, stride 2, and a max pooling); strides sit in the 3x3 convolutions.

With these, for 100 classes, {20,4,8} has 285,348, {29,8,8} 861,604 and {29,64,8} 34,594,212 parameters (published:
0.28 M, 0.86 M, 34.4 M); with one BN a module and 10 classes the last has 34,426,698. On ImageNet one BN a module gives
the counts of timm's resnext50_32x4d, resnext101_32x4d and resnext101_64x4d.
"""

# B = batch, C = channels of one branch, K = branches, H/W = height/width.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from mcdeploy.backbones.cifar_resnet import IMAGENET_MEAN, IMAGENET_STD, register


class BranchModule(nn.Module):
    """One module: ``num_branches`` bottlenecks side by side. Called alone it is a ResNeXt block on one shared input.

    Args:
        in_channels: of what one branch reads.
        out_channels: of what one branch returns.
        width: of one branch's bottleneck.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, num_branches: int, stride: int = 1) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.width = width
        self.num_branches = num_branches
        self.stride = stride
        inner, outer = num_branches * width, num_branches * out_channels
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=num_branches, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(inner, outer, 1, groups=num_branches, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.act3 = nn.ReLU()  # not in place: what it gets may be a view

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The ResNeXt block: all branches read x, their sum and the shortcut are added."""
        return self.act3(sum_branches(self.residuals(x_BCHW), self.out_channels) + self.identities(x_BCHW))

    def set_inputs(self, *, shared: bool) -> None:
        """Let all branches read one tensor, [B, C, H, W], or each its own, [B, K*C, H, W]. The weight is the same."""
        groups = 1 if shared else self.num_branches
        if self.conv1.groups == groups:
            return
        old = self.conv1
        with torch.device("meta"):
            self.conv1 = nn.Conv2d(groups * self.in_channels, old.out_channels, 1, groups=groups, bias=False)
        self.conv1.weight = old.weight
        self.conv1.train(old.training)

    def residuals(self, x: Tensor, live: tuple[int, ...] | None = None) -> Tensor:
        """F_k(x_k) of every branch, or of the ``live`` ones alone.

        Args:
            x: what each branch that runs reads, [B, K*C, H, W], or [B, C, H, W] for all of them.

        Returns:
            [B, K*C', H', W'].
        """
        x = self.act1(self._norm(self.bn1, self._convolve(self.conv1, x, live), live))
        x = self.act2(self._norm(self.bn2, self._convolve(self.conv2, x, live), live))
        return self._norm(self.bn3, self._convolve(self.conv3, x, live), live)

    def identities(self, x: Tensor) -> Tensor:
        """The shortcut of every input in x, by the one projection that all branches share; shapes as ``residuals``."""
        if isinstance(self.downsample, nn.Identity) or x.shape[1] == self.in_channels:
            return self.downsample(x)
        each = self.downsample(x.reshape(-1, self.in_channels, *x.shape[2:]))
        return each.reshape(-1, x.shape[1] // self.in_channels * self.out_channels, *each.shape[2:])

    def with_branches(self, kept: Sequence[int]) -> BranchModule:
        """This module with only some of its branches, physically; the same module when all are kept."""
        if len(kept) == self.num_branches:
            return self
        with torch.device("meta"):
            small = BranchModule(self.in_channels, self.out_channels, self.width, len(kept), self.stride)
            small.set_inputs(shared=self.conv1.groups == 1)
        small.downsample, small.act1, small.act2, small.act3 = self.downsample, self.act1, self.act2, self.act3
        for name in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"):
            source, target = self.get_submodule(name), small.get_submodule(name)
            for key, weight in source.named_parameters():
                setattr(target, key, nn.Parameter(self._rows(weight.detach(), kept), weight.requires_grad))
            for key, statistic in source.named_buffers():
                setattr(target, key, self._rows(statistic, kept) if statistic.ndim else statistic.clone())
        return small.train(self.training)

    def _rows(self, tensor: Tensor, kept: Iterable[int]) -> Tensor:
        """The part of a weight or statistic that belongs to some of the branches."""
        size = len(tensor) // self.num_branches
        return torch.cat([tensor.narrow(0, branch * size, size) for branch in kept])

    def _convolve(self, conv: nn.Conv2d, x: Tensor, live: tuple[int, ...] | None) -> Tensor:
        groups = x.shape[1] // conv.weight.shape[1]
        if live is None and groups == conv.groups:
            y: Tensor = conv(x)
            return y
        weight = conv.weight if live is None else self._rows(conv.weight, live)
        return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, groups)

    def _norm(self, bn: nn.BatchNorm2d, x: Tensor, live: tuple[int, ...] | None) -> Tensor:
        if live is None:
            y: Tensor = bn(x)
            return y
        assert bn.running_mean is not None
        assert bn.running_var is not None
        assert bn.num_batches_tracked is not None
        mean, var = self._rows(bn.running_mean, live), self._rows(bn.running_var, live)
        share = bn.momentum
        if self.training:
            bn.num_batches_tracked.add_(1)
            if share is None:  # a cumulative average, as torch's own
                share = 1.0 / float(bn.num_batches_tracked)
        scale, shift = self._rows(bn.weight, live), self._rows(bn.bias, live)
        y = F.batch_norm(x, mean, var, scale, shift, self.training, share or 0.0, bn.eps)
        if self.training:
            size = bn.num_features // self.num_branches
            with torch.no_grad():
                for old, new in ((bn.running_mean, mean), (bn.running_var, var)):
                    for part, branch in zip(new.split(size), live, strict=True):
                        old[branch * size : (branch + 1) * size] = part
        return y


def sum_branches(x: Tensor, channels: int) -> Tensor:
    """[B, K*C, H, W] to [B, C, H, W]; C is ``channels``."""
    return x if x.shape[1] == channels else x.unflatten(1, (-1, channels)).sum(1)


def as_branches(block: nn.Module) -> BranchModule | None:
    """A block of timm's ResNeXt as a module of branches, the same function in evaluation mode; None for other blocks.

    The BN after the sum becomes one a branch. With C branches of about equal variance each takes 1/C of the mean, of
    the variance v (of v + eps, to be exact) and of beta, and gamma / sqrt(C), so that training starts close to it, too.
    """
    if not isinstance(block, Bottleneck) or not _is_plain(block):
        return None
    old, num_branches = block.conv3.weight, block.conv2.groups
    width = block.conv2.out_channels // num_branches
    module = BranchModule(block.conv1.in_channels, block.conv3.out_channels, width, num_branches, block.stride)
    module = module.to(old.device, old.dtype).train(block.training)
    for name in ("conv1", "bn1", "conv2", "bn2"):
        module.get_submodule(name).load_state_dict(block.get_submodule(name).state_dict())
    if block.downsample is not None:
        module.downsample = block.downsample
    before, after = block.bn3, module.bn3
    assert before.running_var is not None
    assert before.running_mean is not None
    assert after.running_var is not None
    assert after.running_mean is not None
    with torch.no_grad():
        module.conv3.weight.copy_(torch.cat(old.split(width, dim=1)))
        shared_var = (before.running_var + before.eps) / num_branches - before.eps
        is_tiny = shared_var < 0  # nearly constant channels keep their variance
        gamma = torch.where(is_tiny, before.weight, before.weight * num_branches**-0.5)
        after.weight.copy_(gamma.repeat(num_branches))
        after.bias.copy_((before.bias / num_branches).repeat(num_branches))
        after.running_mean.copy_((before.running_mean / num_branches).repeat(num_branches))
        after.running_var.copy_(torch.where(is_tiny, before.running_var, shared_var).repeat(num_branches))
    return module


def _is_plain(block: Bottleneck) -> bool:
    """ResNeXt and nothing more: grouped, ReLU and BN, no attention, anti-aliasing, dilation or dropped paths."""
    norms = (block.bn1, block.bn2, block.bn3)
    acts = (block.act1, block.act2, block.act3)
    extras = (block.se, block.drop_path, block.drop_block, block.aa)
    shortcut = list(block.downsample) if isinstance(block.downsample, nn.Sequential) else block.downsample
    return (
        block.conv2.groups > 1
        and block.conv1.out_channels == block.conv2.out_channels
        and block.dilation == 1
        and all(type(norm) is nn.BatchNorm2d for norm in norms)
        and all(type(act) is nn.ReLU for act in acts)
        and all(extra is None or isinstance(extra, nn.Identity) for extra in extras)
        and (shortcut is None or [type(module) for module in shortcut] == [nn.Conv2d, nn.BatchNorm2d])
    )


class MultiBranchNet(nn.Module):
    """A ResNeXt by modules of branches: a stem, one run of modules (``trunk``), global pooling, a linear head.

    Args:
        num_modules: modules of every stage; each stage after the first halves the resolution.
        num_branches: C, the cardinality.
        width: w, the bottleneck width of a branch in the first stage; it doubles with every stage.
        channels: of a module's output in the first stage; they double with every stage.
        stem: ``cifar`` is a 3x3 convolution, ``imagenet`` a 7x7 one of stride 2 and a max pooling.
        num_classes: outputs; 0 leaves the head out.
        drop_rate: dropout before the head, 0..1.
        global_pool: timm's pooling type, or "" for none.
    """

    def __init__(
        self,
        num_modules: tuple[int, ...] = (2, 2, 2),
        num_branches: int = 8,
        width: int = 4,
        channels: int = 64,
        stem: Literal["cifar", "imagenet"] = "cifar",
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        stem_channels: int = 64,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(
            in_chans, stem_channels, 7 if large else 3, 2 if large else 1, padding=3 if large else 1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(stem_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        modules: list[BranchModule] = []
        before = stem_channels
        self.feature_info: list[dict[str, Any]] = []
        for stage, count in enumerate(num_modules):
            for position in range(count):
                stride = 2 if stage and not position else 1
                modules.append(BranchModule(before, channels << stage, width << stage, num_branches, stride))
                before = channels << stage
            reduction = (4 if large else 1) << stage
            self.feature_info.append({"num_chs": before, "reduction": reduction, "module": f"trunk.{len(modules) - 1}"})
        self.trunk: nn.Module = nn.Sequential(*modules)
        self.num_features = self.head_hidden_size = before
        self.global_pool, self.fc = create_classifier(before, num_classes, pool_type=global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)  # He et al. 2015, https://arxiv.org/abs/1502.01852
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            if isinstance(module, BranchModule):  # so that the sum of C branches starts with variance 1, as in ResNeXt
                nn.init.constant_(module.bn3.weight, num_branches**-0.5)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool)

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW: Tensor = self.trunk(self.maxpool(self.act1(self.bn1(self.conv1(images_BCHW)))))
        return x_BCHW

    def forward_head(self, x_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        pooled_BC: Tensor = self.global_pool(x_BCHW)
        if self.drop_rate:
            pooled_BC = F.dropout(pooled_BC, self.drop_rate, self.training)
        return pooled_BC if pre_logits else self.fc(pooled_BC)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images_BCHW))


def _cfg(size: int, num_classes: int, reduction: int) -> dict[str, Any]:
    return {
        "input_size": (3, size, size),
        "fixed_input_size": False,
        "num_classes": num_classes,
        "pool_size": (size // reduction, size // reduction),
        "crop_pct": 1.0 if size == 32 else 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "conv1",
        "classifier": "fc",
    }


default_cfgs = generate_default_cfgs(
    {
        "multibranch20_8x4d_cifar": _cfg(32, 10, 4),
        "multibranch29_8x8d_cifar": _cfg(32, 10, 4),
        "multibranch29_8x64d_cifar": _cfg(32, 10, 4),
        "multibranch50_32x4d": _cfg(224, 1000, 32),
        "multibranch101_32x4d": _cfg(224, 1000, 32),
        "multibranch101_64x4d": _cfg(224, 1000, 32),
    }
)


def _build(variant: str, pretrained: bool, **kwargs: Any) -> MultiBranchNet:
    features = {"out_indices": tuple(range(len(kwargs["num_modules"]))), "feature_cls": "hook"}
    return build_model_with_cfg(MultiBranchNet, variant, pretrained, feature_cfg=features, **kwargs)


@register
def multibranch20_8x4d_cifar(pretrained: bool = False, **kwargs: Any) -> MultiBranchNet:
    """{20,4,8} for CIFAR, 0.26 M parameters (0.29 M for 100 classes)."""
    shape = {"num_modules": (2, 2, 2), "num_branches": 8, "width": 4}
    return _build("multibranch20_8x4d_cifar", pretrained, **{**shape, **kwargs})


@register
def multibranch29_8x8d_cifar(pretrained: bool = False, **kwargs: Any) -> MultiBranchNet:
    """{29,8,8} for CIFAR, 0.86 M parameters."""
    shape = {"num_modules": (3, 3, 3), "num_branches": 8, "width": 8}
    return _build("multibranch29_8x8d_cifar", pretrained, **{**shape, **kwargs})


@register
def multibranch29_8x64d_cifar(pretrained: bool = False, **kwargs: Any) -> MultiBranchNet:
    """{29,64,8} for CIFAR, 34.4 M parameters."""
    shape = {"num_modules": (3, 3, 3), "num_branches": 8, "width": 64, "channels": 256}
    return _build("multibranch29_8x64d_cifar", pretrained, **{**shape, **kwargs})


@register
def multibranch50_32x4d(pretrained: bool = False, **kwargs: Any) -> MultiBranchNet:
    """{50,4,32} for ImageNet: ResNeXt-50 32x4d by branches."""
    shape = {"num_modules": (3, 4, 6, 3), "num_branches": 32, "width": 4, "channels": 256, "stem": "imagenet"}
    return _build("multibranch50_32x4d", pretrained, **{**shape, **kwargs})


@register
def multibranch101_32x4d(pretrained: bool = False, **kwargs: Any) -> MultiBranchNet:
    """{101,4,32} for ImageNet: ResNeXt-101 32x4d by branches."""
    shape = {"num_modules": (3, 4, 23, 3), "num_branches": 32, "width": 4, "channels": 256, "stem": "imagenet"}
    return _build("multibranch101_32x4d", pretrained, **{**shape, **kwargs})


@register
def multibranch101_64x4d(pretrained: bool = False, **kwargs: Any) -> MultiBranchNet:
    """{101,4,64} for ImageNet: ResNeXt-101 64x4d by branches."""
    shape = {"num_modules": (3, 4, 23, 3), "num_branches": 64, "width": 4, "channels": 256, "stem": "imagenet"}
    return _build("multibranch101_64x4d", pretrained, **{**shape, **kwargs})
