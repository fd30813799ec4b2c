"""Verify: the same images through two runners, at several batch sizes, and how far apart the answers are.

It runs after every hop. A NaN, an infinity or another shape is an error, never a large number. When two are too far
apart, ``departure`` looks for the place where it started.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from mcruntime.engine import Runner
from numpy.typing import NDArray

from mcdeploy.errors import ParityError

# B = batch, C = channels, H/W = height/width, N = classes
BATCHES = (1, 2, 3, 7)
Images = NDArray[np.float32]


@dataclass(frozen=True)
class Parity:
    """How two runners compare on one batch, or on a whole validation set."""

    hop: str  # what was done between the two, such as "onnx"
    batch: int
    images: str  # "validation" or "noise"
    max_abs: float  # largest difference of a logit, relative to the largest |logit|
    p99: float  # what 99 % of the differences stay within, on the same scale
    cosine: float  # smallest over the images
    top1_agreement: float  # share of images with the same predicted class
    passed: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Agreement:
    """Two runners on a labelled validation set; shares are 0..1."""

    images: int
    accuracy_before: float
    accuracy_after: float
    top1_agreement: float


def verify(
    expected: Runner,
    actual: Runner,
    images: Images,
    *,
    hop: str,
    max_abs: float,
    batches: Sequence[int] = BATCHES,
    seed: int = 0,
) -> list[Parity]:
    """Compare on real images and on noise, at several batch sizes.

    Args:
        images: prepared validation images [B, C, H, W]; where a batch is larger they come round again.
        max_abs: allowed difference, relative to the largest |logit|.

    Returns:
        A comparison for every batch size and kind of images, all passed.

    Raises:
        ParityError: further apart than allowed, another shape, or not finite.
    """
    noise = np.random.default_rng(seed).standard_normal((max(batches), *images.shape[1:])).astype(np.float32)
    return verify_on(
        expected, actual, {"validation": images, "noise": noise}, hop=hop, max_abs=max_abs, batches=batches
    )


def verify_on(
    expected: Runner,
    actual: Runner,
    sources: Mapping[str, Images],
    *,
    hop: str,
    max_abs: float,
    batches: Sequence[int] = BATCHES,
) -> list[Parity]:
    """``verify`` on images of one's own choice, by kind.

    Raises:
        ParityError: as ``verify``.
    """
    found = [
        _compare(expected, actual, np.resize(source, (batch, *source.shape[1:])), hop, kind, max_abs)
        for kind, source in sources.items()
        for batch in batches
    ]
    failed = [parity for parity in found if not parity.passed]
    if failed:
        worst = max(failed, key=lambda parity: parity.max_abs)
        raise ParityError(
            f"{hop}: {actual.name} is {worst.max_abs:.1e} away from {expected.name} "
            f"(batch {worst.batch}, {worst.images}; allowed {max_abs:.1e} of the largest logit)"
        )
    return found


def agree(expected: Runner, actual: Runner, batches: Iterable[tuple[Images, NDArray[np.int64]]]) -> Agreement:
    """Run a whole validation set through both.

    Args:
        batches: images [B, C, H, W] and labels [B].

    Raises:
        ParityError: another shape, or an output is not finite.
    """
    return agree_all(expected, {"": actual}, batches)[""]


def agree_all(
    expected: Runner, actual: Mapping[str, Runner], batches: Iterable[tuple[Images, NDArray[np.int64]]]
) -> dict[str, Agreement]:
    """``agree`` with several runners at once, by name.

    Raises:
        ParityError: as ``agree``.
    """
    images = right_before = 0
    right_after, same = dict.fromkeys(actual, 0), dict.fromkeys(actual, 0)
    for images_BCHW, labels_B in batches:
        before_BN = expected.infer(images_BCHW)
        images += len(labels_B)
        right_before += int((before_BN.argmax(1) == labels_B).sum())
        for name, runner in actual.items():
            _, after_BN = _checked(expected, before_BN, runner, runner.infer(images_BCHW), "validation")
            right_after[name] += int((after_BN.argmax(1) == labels_B).sum())
            same[name] += int((before_BN.argmax(1) == after_BN.argmax(1)).sum())
    return {
        name: Agreement(images, right_before / images, right_after[name] / images, same[name] / images)
        for name in actual
    }


def accuracy(runner: Runner, batches: Iterable[tuple[Images, NDArray[np.int64]]]) -> float:
    """Share of images whose largest logit is that of their label, 0 to 1; an entered runner."""
    images = right = 0
    for images_BCHW, labels_B in batches:
        images += len(labels_B)
        right += int((runner.infer(images_BCHW).argmax(1) == labels_B).sum())
    return right / images


def _compare(expected: Runner, actual: Runner, images_BCHW: Images, hop: str, kind: str, max_abs: float) -> Parity:
    before_BN, after_BN = _answers(expected, actual, images_BCHW, hop)
    differences_BN = np.abs(before_BN - after_BN) / max(np.abs(before_BN).max(), 1e-12)
    difference, p99 = float(differences_BN.max()), float(np.percentile(differences_BN, 99))
    norms_B = np.linalg.norm(before_BN, axis=1) * np.linalg.norm(after_BN, axis=1)
    cosine = float(((before_BN * after_BN).sum(1) / np.maximum(norms_B, 1e-30)).min())
    same = float((before_BN.argmax(1) == after_BN.argmax(1)).mean())
    return Parity(hop, len(images_BCHW), kind, difference, p99, min(cosine, 1.0), same, difference <= max_abs)


def _answers(expected: Runner, actual: Runner, images: Images, hop: str) -> tuple[NDArray[Any], NDArray[Any]]:
    return _checked(expected, expected.infer(images), actual, actual.infer(images), hop)


def _checked(
    expected: Runner, before: NDArray[Any], actual: Runner, after: NDArray[Any], hop: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    if before.shape != after.shape:
        raise ParityError(
            f"{hop}: {actual.name} answers with shape {list(after.shape)}, {expected.name} with {list(before.shape)}"
        )
    for runner, logits in ((expected, before), (actual, after)):
        if not np.isfinite(logits).all():
            raise ParityError(f"{hop}: the output of {runner.name} holds NaN or infinity (batch {len(logits)})")
    return before.astype(np.float64), after.astype(np.float64)
