"""What is known of a request when it is over: one record for logs, traces and counters, of HTTP and gRPC alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mcruntime.server.web import Timing


@dataclass(slots=True)
class Seen:
    """A finished request.

    Attributes:
        protocol: "http" or "grpc".
        method: of HTTP, or gRPC's method name.
        status: HTTP status, also for gRPC (by the table in ``grpc_server``).
        started: time.time_ns() when its header was there; ``seconds``: until its answer was handed over.
        parent: the W3C ``traceparent`` that came with it, or "".
        error: what the client was told, or "".
    """

    protocol: str
    method: str
    path: str
    status: int
    request_id: str
    client: str
    started: int
    seconds: float
    model: str = ""
    version: str = ""
    images: int = 0
    timing: Timing = field(default_factory=Timing)
    parent: str = ""
    error: str = ""


Observer = Callable[[Seen], None]
