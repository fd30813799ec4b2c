"""Compile: freeze, prune, fold, certify. What comes out is a plain module that computes the same function with less.

freeze   learned gates become a fixed wiring            exact
prune    dead blocks and their parameters go            exact
unwrap   stages that read like a chain become plain     exact
fold     batch norm goes into the convolution before    float64, relative 1e-10
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from mcdeploy.compile.certify import RTOL_FLOAT32, Certificate, Check, check_close, check_equal, double_copy
from mcdeploy.compile.fold import Pairs, find_foldable, fold_batch_norms
from mcdeploy.compile.prune import count_macs, count_parameters, drop_dead_blocks, freeze, unwrap_chains
from mcdeploy.connectivity.wiring import topology_of, wired_stages

__all__ = ["Certificate", "compile_model", "compile_with_certificate"]


def compile_model(model: nn.Module, example: Tensor) -> nn.Module:
    """Compile a trained model and prove it; the given model stays as it is.

    Args:
        model: wired or not, in any mode.
        example: images [B, C, H, W] as the model sees them, B >= 2.

    Returns:
        A plain module in evaluation mode without gates, dead blocks or foldable BNs.

    Raises:
        ParityError: a step changed the function.
    """
    return compile_with_certificate(model, example)[0]


def compile_with_certificate(model: nn.Module, example: Tensor) -> tuple[nn.Module, Certificate]:
    """``compile_model`` with its certificate.

    Raises:
        ParityError: a step changed the function.
    """
    frozen = copy.deepcopy(model).eval()
    freeze(frozen)
    topology = topology_of(frozen).to_json() if wired_stages(frozen) else {"aggregate": "mean", "stages": []}
    small = copy.deepcopy(frozen)
    removed = _prune(small)
    given = copy.deepcopy(model).eval()
    checks = [
        check_equal(given, frozen, example, "freeze", "as trained"),
        check_equal(frozen, small, example, "prune", "as trained"),
    ]
    pairs = find_foldable(small, example)
    for scrambled in (False, True):
        checks += _check_on_copies(frozen, pairs, example.double().cpu(), scrambled)
    removed["batch norm folded into the convolution before it"] = fold_batch_norms(small, pairs)
    checks.append(check_close(frozen, small, example, "fold", "as trained", RTOL_FLOAT32))
    certificate = Certificate(
        removed={reason: names for reason, names in removed.items() if names},
        parameters=(count_parameters(frozen), count_parameters(small)),
        macs=(count_macs(_everything(frozen), example), count_macs(small, example)),
        topology=topology,
        checks=tuple(checks),
    )
    return small, certificate


def _prune(model: nn.Module) -> dict[str, list[str]]:
    return {
        "dead: no stage output depends on it": drop_dead_blocks(model),
        "wiring that reads like a chain": unwrap_chains(model),
    }


def _check_on_copies(frozen: nn.Module, pairs: Pairs, example: Tensor, scrambled: bool) -> list[Check]:
    bn = "scrambled" if scrambled else "as trained"
    before = double_copy(frozen, scrambled=scrambled)
    after = copy.deepcopy(before)
    _prune(after)
    exact = check_equal(before, after, example, "prune", bn)
    fold_batch_norms(after, pairs)
    return [exact, check_close(before, after, example, "fold", bn)]


def _everything(frozen: nn.Module) -> nn.Module:
    """The frozen model with its dead blocks run after all: what it costs before compile."""
    model = copy.deepcopy(frozen)
    for stage in wired_stages(model).values():
        stage.skip = frozenset()
    return model
