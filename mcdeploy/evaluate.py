"""Accuracy of anything that turns images into logits: a model in training, a compiled one, an ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mcdeploy.errors import DataError, ParityError

# B = batch, C = channels, H/W = height/width, N = classes


@dataclass(frozen=True)
class Accuracy:
    """``top1`` is a share, 0..1; ``loss`` the mean cross-entropy in nats."""

    top1: float
    loss: float
    images: int


def evaluate(
    infer: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    gather: Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]] | None = None,
) -> Accuracy:
    """Run all validation images through ``infer`` (images_BCHW to logits_BN).

    Args:
        gather: collects logits and labels of one batch from all processes, each image once.

    Raises:
        ParityError: a logit is not finite.
        DataError: a label lies outside the model's classes, or there are no images.
    """
    correct, loss, images = 0, 0.0, 0
    with torch.no_grad():
        for images_BCHW, labels_B in batches:
            logits_BN = infer(images_BCHW).float()
            labels_B = labels_B.to(logits_BN.device)
            if gather is not None:
                logits_BN, labels_B = gather((logits_BN, labels_B))
            if not torch.isfinite(logits_BN).all():
                raise ParityError("evaluation: the model's output holds NaN or infinity")
            if (highest := int(labels_B.max())) >= logits_BN.shape[1]:
                raise DataError(
                    f"evaluation: the data has class number {highest}, the model {logits_BN.shape[1]} outputs"
                )
            correct += int((logits_BN.argmax(1) == labels_B).sum())
            loss += float(F.cross_entropy(logits_BN, labels_B, reduction="sum"))
            images += len(labels_B)
    if images == 0:
        raise DataError("evaluation: there are no validation images")
    return Accuracy(correct / images, loss / images, images)
