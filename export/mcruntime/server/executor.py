"""Between the event loop and a runner: one bounded queue and one worker thread for each model.

``Executor.infer`` is the one seam: dynamic batching will collect what waits here into one batch, behind the same call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from mcruntime.engine import Runner

WORKERS = 1  # one inference at a time with all cores is faster than two with half of them


class Overloaded(Exception):
    """The queue is full; the client may come back."""


class Executor:
    """Runs one model.

    Args:
        runner: entered already.
        max_queue: how many requests may wait while another runs, at least 0.
    """

    def __init__(self, runner: Runner, max_queue: int) -> None:
        self._runner = runner
        self._places = WORKERS + max_queue
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="infer")

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the queue, from admission until the answer is there.

        Raises:
            Overloaded: all places are taken; at once, without waiting.
        """
        if self._places == 0:
            raise Overloaded
        self._places -= 1  # only the event loop's thread comes here
        try:
            yield
        finally:
            self._places += 1

    async def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """``Runner.infer`` in the worker thread; call it while holding a place."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._runner.infer, images)

    def close(self) -> None:
        """Let the worker go; what it has begun is finished, what waits is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
