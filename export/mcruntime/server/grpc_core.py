"""A setting of grpc's core, apart from all that imports grpc: the core looks at it once, when it is imported."""

from __future__ import annotations

import os

VARIABLE = "GRPC_EXPERIMENTS"
LISTENER = "event_engine_listener"


def read_in_place() -> None:
    """Let the thread that waits for calls read the sockets itself, as grpcio did for years. Call it before ``grpc`` is
    imported; later it changes nothing.

    Otherwise threads of grpc's own, the "event engine", read them and hand on what came: more changes of thread for
    each call, and more threads beside those of the model. A grpcio that does not know the setting says so in a line on
    stderr, and reads as it likes.
    """
    given = os.environ.get(VARIABLE, "")
    if LISTENER not in given:  # who sets it themselves knows why
        os.environ[VARIABLE] = f"{given},-{LISTENER}".lstrip(",")
