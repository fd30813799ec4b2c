"""Signals from the first moment on: also while bundles are loaded, which may take minutes.

A container's process 1 has no default handlers: a SIGTERM that nobody handles does nothing there, and the container is
waited for and then killed. Anywhere else a SIGHUP that nobody handles ends the process. And a handler written in Python
has to wait for the library that is being called, so a thread ends the process when that takes too long.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

PATIENCE_S = 1.0  # for loading to end in good order once it shall
LAST_LINE_S = 0.1  # for the log's thread to write that it did not
STOPS = (signal.SIGINT, signal.SIGTERM)
HANG_UP = getattr(signal, "SIGHUP", None)
logger = logging.getLogger("mcruntime.server")


class Stopped(BaseException):
    """SIGTERM came before the server listened: nothing was accepted, so nothing is lost. Ends ``Signals``' block."""


class Signals:
    """What SIGTERM and SIGHUP do in the time of a block; outside of the main thread, nothing is changed.

    First, while loading, SIGTERM raises ``Stopped`` in the main thread, and ``PATIENCE_S`` seconds later ends the
    process with exit code 0, whatever it does. SIGHUP is remembered.

    Attributes:
        hung_up: SIGHUP came while loading.
    """

    def __init__(self) -> None:
        self.hung_up = False
        self._is_main = threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._is_over = threading.Event()

    def __enter__(self) -> Self:
        if self._is_main:
            ours, self._waker = socket.socketpair()
            self._waker.setblocking(False)
            threading.Thread(target=self._watch, args=(ours,), name="signals", daemon=True).start()
            self._wakeup_before = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
            self._before = {sig: signal.getsignal(sig) for sig in (*STOPS, HANG_UP) if sig is not None}
            signal.signal(signal.SIGTERM, self._stop)
            if HANG_UP is not None:
                signal.signal(HANG_UP, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self._is_main:
            self._loaded()
            self._restore()
        if kind is Stopped:
            logger.info("stopped before anything was served")
        return kind is Stopped

    @contextmanager
    def serving(self, stop: Callable[[int, FrameType | None], None]) -> Iterator[None]:
        """From now on, for the time of a block, SIGTERM and SIGINT call ``stop``, and SIGHUP is the event loop's.

        uvicorn raises the signal that stopped it again afterwards; it meets this handler, so that we exit with 0.
        """
        if not self._is_main:
            yield
            return
        for sig in STOPS:
            signal.signal(sig, stop)
        self._loaded()
        try:
            yield
        finally:
            self._restore()

    def _loaded(self) -> None:
        """Watch no more; the event loop wants to be woken by signals itself."""
        if not self._is_over.is_set():
            self._is_over.set()
            signal.set_wakeup_fd(self._wakeup_before)
            self._waker.close()

    def _restore(self) -> None:
        for sig, handler in self._before.items():
            signal.signal(sig, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.hung_up = True

    def _watch(self, told: socket.socket) -> None:
        """In a thread of its own: told by the system of every signal at once, whatever the main thread is doing."""
        with told:
            while number := told.recv(1):
                if number[0] == signal.SIGTERM and not self._is_over.wait(PATIENCE_S):
                    logger.info("stopped while a library was loading")
                    time.sleep(LAST_LINE_S)
                    os._exit(0)
