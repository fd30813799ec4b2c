"""Compile: freeze, prune, fold, certify. What comes out is a plain module that computes the same function with less.

freeze   learned gates become a fixed wiring            exact
         per-image wirings lose what calibration        on the calibration images: float64, relative 1e-4
         images never vary (``compile.dynamic``)
prune    dead blocks and their parameters go            exact
         static stages of such a net become plain       float64, relative 1e-10
unwrap   stages that read like a chain become plain     exact
fold     batch norm goes into the convolution before;   float64, relative 1e-10
         branches that are only added up become one
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mcdeploy.compile.branches import merge_summed_branches
from mcdeploy.compile.certify import RTOL_FLOAT32, Certificate, Check, check_close, check_equal, double_copy
from mcdeploy.compile.dynamic import Calibration, mean_macs, narrow, open_everything, settle, settled
from mcdeploy.compile.fold import Pairs, find_foldable, fold_batch_norms
from mcdeploy.compile.prune import count_macs, count_parameters, drop_dead_blocks, freeze, unwrap_chains
from mcdeploy.connectivity.ddw import dynamic_stages
from mcdeploy.connectivity.wiring import topology_of, wired_stages
from mcdeploy.errors import ParityError

__all__ = ["Certificate", "compile_model", "compile_with_certificate"]


def compile_model(model: nn.Module, example: Tensor, calibration: Tensor | None = None) -> nn.Module:
    """Compile a trained model and prove it; the given model stays as it is.

    Args:
        model: wired or not, in any mode.
        example: images [B, C, H, W] as the model sees them, B >= 2.
        calibration: for a net with per-image wirings, the images that show what really varies; default: the example.

    Returns:
        A plain module in evaluation mode without gates, dead blocks or foldable BNs.

    Raises:
        ParityError: a step changed the function.
    """
    return compile_with_certificate(model, example, calibration)[0]


def compile_with_certificate(
    model: nn.Module, example: Tensor, calibration: Tensor | None = None
) -> tuple[nn.Module, Certificate]:
    """``compile_model`` with its certificate.

    Raises:
        ParityError: a step changed the function.
    """
    given = copy.deepcopy(model).eval()
    frozen, removed, calibrated, freeze_check = _freeze(given, example, example if calibration is None else calibration)
    if calibrated is not None:
        example = _settled_example(frozen, example, calibration)
    topology = topology_of(frozen).to_json() if wired_stages(frozen) else {"aggregate": "mean", "stages": []}
    small = copy.deepcopy(frozen)
    removed |= _prune(small)
    check_pruned = check_equal if calibrated is None else partial(check_close, rtol=RTOL_FLOAT32)
    checks = [freeze_check, check_pruned(frozen, small, example, "prune", "as trained")]
    pairs = find_foldable(small, example)
    for scrambled in (False, True):
        checks += _check_on_copies(frozen, pairs, example.double().cpu(), scrambled, is_exact=calibrated is None)
    removed["batch norm folded into the convolution before it"] = fold_batch_norms(small, pairs)
    removed["convolution in groups whose branches are only added up"] = merge_summed_branches(small)
    checks.append(check_close(frozen, small, example, "fold", "as trained", RTOL_FLOAT32))
    before = frozen if calibrated is None else given
    certificate = Certificate(
        removed={reason: names for reason, names in removed.items() if names},
        parameters=(count_parameters(before), count_parameters(small)),
        macs=(count_macs(_everything(before), example), mean_macs(small, example, calibrated)),
        topology=topology,
        checks=tuple(checks),
        calibration=None if calibrated is None else calibrated.to_json(),
    )
    return small, certificate


def _freeze(
    given: nn.Module, example: Tensor, calibration: Tensor
) -> tuple[nn.Module, dict[str, list[str]], Calibration | None, Check]:
    """The frozen copy, what went, and the check; dead nodes stay in it."""
    frozen = copy.deepcopy(given)
    freeze(frozen)
    if not dynamic_stages(frozen):
        return frozen, {}, None, check_equal(given, frozen, example, "freeze", "as trained")
    return frozen, *narrow(frozen, calibration)


def _prune(model: nn.Module) -> dict[str, list[str]]:
    return {
        "dead: no stage output depends on it": drop_dead_blocks(model),
        "wiring that no longer depends on the image": settle(model),
        "wiring that reads like a chain": unwrap_chains(model),
    }


def _check_on_copies(
    frozen: nn.Module, pairs: Pairs, example: Tensor, scrambled: bool, *, is_exact: bool
) -> list[Check]:
    bn = "scrambled" if scrambled else "as trained"
    before = double_copy(frozen, scrambled=scrambled)
    after = copy.deepcopy(before)
    _prune(after)
    check_pruned: Callable[..., Check] = check_equal if is_exact else check_close
    pruned = check_pruned(before, after, example, "prune", bn)
    fold_batch_norms(after, pairs)
    merge_summed_branches(after)
    return [pruned, check_close(before, after, example, "fold", bn)]


def _settled_example(frozen: nn.Module, example: Tensor, calibration: Tensor | None) -> Tensor:
    """As many images as the example has that rounding cannot wire otherwise.

    Raises:
        ParityError: fewer than 2 of all images.
    """
    images = example if calibration is None else torch.cat([example, calibration.to(example)])
    fit = images[settled(frozen, images)][: len(example)]
    if len(fit) < 2:
        raise ParityError(
            f"compile: all but {len(fit)} of {len(images)} images have an edge within 1e-4 of the threshold, so "
            "rounding decides their wiring; train on, or with another connectivity.tau"
        )
    return fit


def _everything(model: nn.Module) -> nn.Module:
    """The model with everything run after all, dead blocks and closed edges too: what it costs before compile."""
    model = open_everything(model)
    for stage in wired_stages(model).values():
        stage.skip = frozenset()
    return model
