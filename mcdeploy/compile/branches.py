"""Merge branches whose outputs are only added up into one convolution. Algebra, not exact: the sums round differently.

Once the BN behind a branch's last convolution is folded, sum_k (W_k h_k + b_k) is one ungrouped convolution of all h,

    W' = [W_1, W_2, ..., W_C],     b' = sum_k b_k,

ResNeXt's own form. It applies to the last module of a wired net, to every module whose readers all read all of it, and
to every module of a net that runs as a plain chain.
"""

from __future__ import annotations

import torch
from torch import nn

from mcdeploy.backbones.multibranch import BranchModule
from mcdeploy.connectivity.gateconnect import BranchStack
from mcdeploy.connectivity.wiring import WiredStage


def merge_summed_branches(model: nn.Module) -> list[str]:
    """Merge, in place, where the BN is folded and nothing but the sum reads the branches.

    Returns:
        Module paths of the convolutions that were merged, empty when nothing changed.
    """
    summed = {module for parent in model.modules() for module in _summed_modules(parent)}
    merged = []
    for name, module in model.named_modules():
        if isinstance(module, BranchModule) and module in summed and module.conv3.groups > 1:
            if not isinstance(module.bn3, nn.Identity) or module.conv3.bias is None:
                continue
            module.conv3 = _ungrouped(module.conv3)
            merged.append(f"{name}.conv3")
    return merged


def _summed_modules(parent: nn.Module) -> list[nn.Module]:
    """The children of which nothing but the sum of their branches is read; none where a forward is not known."""
    if isinstance(parent, BranchStack):
        return [child for child, is_summed in parent.summed() if is_summed]
    is_called = isinstance(parent, WiredStage) or type(parent) is nn.Sequential
    return list(parent.children()) if is_called else []


def _ungrouped(conv: nn.Conv2d) -> nn.Conv2d:
    assert conv.bias is not None
    out_channels = conv.out_channels // conv.groups
    with torch.device("meta"):
        merged = nn.Conv2d(conv.in_channels, out_channels, 1)
    weight = torch.cat(conv.weight.detach().split(out_channels), dim=1)
    merged.weight = nn.Parameter(weight.contiguous(), conv.weight.requires_grad)
    merged.bias = nn.Parameter(conv.bias.detach().view(conv.groups, -1).sum(0), conv.bias.requires_grad)
    return merged.train(conv.training)
