"""The certificate: proof that a compiled model computes what the frozen one did.

Removal is exact, so it is held to bit-equality. Folding is algebra, so it is held to a relative 1e-10 in float64, where
rounding cannot hide a mistake. Both are checked twice: on the model as it is, and with every BN scrambled, since a
fresh timm ResNet has gamma = 0 in the last BN of every block and would pass any test.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcdeploy.errors import ParityError

RTOL = 1e-10  # of the largest output, float64
RTOL_FLOAT32 = 1e-3  # the same for what is handed on; a mistake shows in float64 first


@dataclass(frozen=True)
class Check:
    """One comparison. ``max_relative`` is the largest difference divided by the largest output."""

    step: str
    bn: str  # "as trained" or "scrambled"
    must_be: str  # such as "bit-equal in float32" or "within 1e-10 in float64"
    max_relative: float


@dataclass(frozen=True)
class Certificate:
    """What compile removed and why, what it cost before and after, and the checks that passed."""

    removed: dict[str, list[str]]  # reason to module paths
    parameters: tuple[int, int]  # before, after
    macs: tuple[int, int]  # one image, before, after
    topology: dict[str, Any]
    checks: tuple[Check, ...]
    calibration: dict[str, Any] | None = None  # for per-image wirings: how they were frozen

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``certificate.json``."""
        return asdict(self)


def scramble(model: nn.Module, seed: int = 0) -> None:
    """Give every norm statistics and scales away from their defaults, in place; every other parameter stays."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return (torch.rand(like.shape, generator=generator, dtype=torch.float64) * (high - low) + low).to(like)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.copy_(uniform(module.running_mean, -0.2, 0.2))
                    module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))
                if module.weight is not None:
                    module.weight.copy_(uniform(module.weight, 0.5, 1.5))
                    module.bias.copy_(uniform(module.bias, -0.2, 0.2))


def check_equal(before: nn.Module, after: nn.Module, example: Tensor, step: str, bn: str) -> Check:
    """Exact steps: the outputs must be bit-equal.

    Raises:
        ParityError: they are not, or are not finite.
    """
    difference = _difference(before, after, example, step)
    if difference != 0:
        raise ParityError(
            f"compile: {step} must be bit-equal but differs by {difference:.2e} (BN {bn}); nothing was written"
        )
    return Check(step, bn, f"bit-equal in {_dtype(example)}", difference)


def check_close(before: nn.Module, after: nn.Module, example: Tensor, step: str, bn: str, rtol: float = RTOL) -> Check:
    """Algebraic steps: within ``rtol`` of the largest output.

    Raises:
        ParityError: they are not, or are not finite.
    """
    difference = _difference(before, after, example, step)
    if difference > rtol:
        raise ParityError(
            f"compile: {step} is off by {difference:.2e}, allowed is {rtol} (BN {bn}); nothing was written"
        )
    return Check(step, bn, f"within {rtol:g} in {_dtype(example)}", difference)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def double_copy(model: nn.Module, *, scrambled: bool) -> nn.Module:
    """A float64 copy on the CPU in evaluation mode, with BN scrambled if asked."""
    copied = copy.deepcopy(model).double().cpu().eval()
    if scrambled:
        scramble(copied)
    return copied


def _difference(before: nn.Module, after: nn.Module, example: Tensor, step: str) -> float:
    with torch.no_grad():
        expected, actual = before(example), after(example)
    if expected.shape != actual.shape:
        raise ParityError(f"compile: {step} changed the output from {list(expected.shape)} to {list(actual.shape)}")
    if not (torch.isfinite(expected).all() and torch.isfinite(actual).all()):
        raise ParityError(f"compile: {step}: the output holds NaN or infinity")
    return float((expected - actual).abs().max() / expected.abs().max().clamp_min(1e-30))
