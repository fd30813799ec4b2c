"""Fold batch norm into the convolution before it. Algebra, not exact: the sums round differently.

A BN in evaluation computes  y = gamma (x - mean) / sqrt(var + eps) + beta. With x = W * u + b this is the convolution

    W' = W gamma / sqrt(var + eps)         b' = (b - mean) gamma / sqrt(var + eps) + beta.

The data flow is read from ``torch.export``'s graph, not guessed from names or the order of modules.
"""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrize import is_parametrized

Pairs = tuple[tuple[str, str], ...]  # module paths of a convolution and of the BN behind it


def find_foldable(model: nn.Module, example: Tensor) -> Pairs:
    """(convolution, BN) where the BN's only input is a convolution that nothing else reads.

    A BN stays when its convolution has other readers, when either module is used more than once or has two names, when
    the BN keeps no running statistics, or when the convolution does more than convolve.

    Args:
        model: in evaluation mode.
        example: images [B, C, H, W], B >= 2.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own deprecations
        exported = torch.export.export(model, (example,), strict=False)
    owner = {**exported.graph_signature.inputs_to_parameters, **exported.graph_signature.inputs_to_buffers}
    nodes = [node for node in exported.graph.nodes if node.op == "call_function"]
    names = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    uses = Counter(_module_of(node, owner) for node in nodes)
    pairs = []
    for node in nodes:
        if node.target is not torch.ops.aten.batch_norm.default:
            continue
        before = node.args[0]
        if before.target is not torch.ops.aten.conv2d.default or len(before.users) != 1:
            continue
        conv_name, bn_name = _module_of(before, owner), _module_of(node, owner)
        if conv_name and bn_name and uses[conv_name] == uses[bn_name] == 1:
            conv, bn = model.get_submodule(conv_name), model.get_submodule(bn_name)
            if names[conv] == names[bn] == 1 and _is_plain(conv) and _has_statistics(bn):
                pairs.append((conv_name, bn_name))
    return tuple(pairs)


def fold_batch_norms(model: nn.Module, pairs: Pairs) -> list[str]:
    """Fold each pair of ``find_foldable``, in place. timm's ``BatchNormAct2d`` leaves its activation behind.

    Returns:
        Module paths of the BNs that are gone, empty when nothing changed.
    """
    for conv_name, bn_name in pairs:
        conv, bn = model.get_submodule(conv_name), model.get_submodule(bn_name)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(bn, nn.BatchNorm2d)
        model.set_submodule(conv_name, fuse_conv_bn_eval(conv, bn))
        model.set_submodule(bn_name, _what_follows(bn))
    return [bn_name for _, bn_name in pairs]


def _what_follows(bn: nn.BatchNorm2d) -> nn.Module:
    """timm's BatchNormAct2d applies ``drop`` and ``act`` after normalising; a plain BN nothing."""
    drop, act = getattr(bn, "drop", None), getattr(bn, "act", None)
    left = [module for module in (drop, act) if module is not None and not isinstance(module, nn.Identity)]
    if not left:
        return nn.Identity()
    return left[0] if len(left) == 1 else nn.Sequential(*left)


def _is_plain(conv: nn.Module) -> bool:
    """Some timm convolutions standardise their weight or pad in ``forward``; only the usual ones are folded."""
    return isinstance(conv, nn.Conv2d) and type(conv).forward is nn.Conv2d.forward and not is_parametrized(conv)


def _has_statistics(bn: nn.Module) -> bool:
    return isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None


def _module_of(node: torch.fx.Node, owner: dict[str, str]) -> str | None:
    """The module whose weight a graph node uses: the path of its first parameter or buffer, without the last name."""
    for argument in node.all_input_nodes:
        if argument.name in owner:
            return owner[argument.name].rpartition(".")[0]
    return None
