"""Any batch on a runner that takes a span of batch sizes only, such as a TensorRT engine with its profile.

Larger batches are split, smaller ones are filled up with copies of their last image, whose answers are dropped. That is
right for evaluating, proving and serving. It is wrong for timing, so ``bench`` uses the runner itself.
"""

# B = batch, C = channels, H/W = height/width, N = classes.
from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from mcruntime.engine import Batches, Runner, check_batches


class AnyBatch:
    """A runner for any batch around one for batches of ``smallest`` to ``largest`` images.

    Args:
        runner: not entered yet; entered and left with this one.
        batches: smallest, usual, largest.

    Raises:
        InputError: sizes that are not 1 <= smallest <= usual <= largest.
    """

    def __init__(self, runner: Runner, batches: Batches) -> None:
        check_batches(batches)
        self._runner = runner
        self._smallest, _, self._largest = batches

    @property
    def name(self) -> str:
        return self._runner.name

    def __enter__(self) -> Self:
        self._runner.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._runner.__exit__(*exc)

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See ``Runner``."""
        if not isinstance(images, np.ndarray) or images.ndim != 4 or not len(images):
            return self._runner.infer(images)  # which says what is wrong with them
        if self._smallest <= len(images) <= self._largest:
            return self._runner.infer(images)
        parts = [images[start : start + self._largest] for start in range(0, len(images), self._largest)]
        return np.concatenate([self._filled(part_BCHW) for part_BCHW in parts])

    def _filled(self, images_BCHW: NDArray[np.float32]) -> NDArray[np.float32]:
        missing = max(0, self._smallest - len(images_BCHW))
        padded_BCHW = np.concatenate([images_BCHW, np.repeat(images_BCHW[-1:], missing, axis=0)])
        return self._runner.infer(padded_BCHW)[: len(images_BCHW)]

    def facts(self) -> dict[str, str]:
        return self._runner.facts()
