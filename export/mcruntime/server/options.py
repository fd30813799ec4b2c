"""Everything that can be set about a server, with its default and its range. The command lines are made from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mcruntime.engine import Provider
from mcruntime.errors import InputError

MIB = 1 << 20


@dataclass(frozen=True)
class ServerOptions:
    """How to serve; times in seconds.

    Attributes:
        port: 0 for any free one.
        grpc_port: of the gRPC service; 0 for any free one, None for no gRPC.
        threads: of one inference on the CPU; None: all physical cores this process may use.
        max_batch: images the server puts together for one inference; None: the bundle's best by its own bench, else 32.
        max_delay_ms: how long an idle engine waits for more requests; 0: not at all.
        buckets: batch sizes that are run, smaller ones filled up; empty: any size.
        max_batch_size: images a client may send in one request.
        max_queue: requests of one model that may wait; more are answered 503.
        timeout_s: a request not answered by then is answered 504.
        max_body_bytes: of one request, also after unpacking; more is answered 413.
        max_inflight_bytes: of all request bodies together; more is answered 503.
        max_pixels: of one image; more is answered 413 before it is decoded.
        max_connections: more are answered 503.
        body_timeout_s: in which a request's header, and then its body, must arrive (408).
        drain_s: how long requests in flight may take after the stop signal.
        api_keys: file with one key a line; every request but health probes and the page itself needs one of them.
        control_keys: the same for loading and unloading models, which is off without it.
        tls_cert, tls_key: PEM files; tls_client_ca: ask clients for a certificate of this authority (mTLS).
        repository: a folder of bundles, or of folders of versions, that clients may load by name.
        split: shares of the requests that name no version: {"model": {"1": 90.0, "2": 10.0}}.
        shadows: bundles that get copies of the requests; their answers are compared, never sent.
        shadow_share: of the requests that are copied, 0..1.
        require_signature: a public key; a bundle that its holder did not sign is refused before anything is loaded.
        access_log: write one line for every request; log_json: write logs as JSON.
        otlp: OpenTelemetry collector that gets traces, such as http://127.0.0.1:4318; needs the extra [trace].

    Raises:
        InputError: a value outside its range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    threads: int | None = None
    provider: Provider = "cpu"
    max_batch: int | None = None
    max_delay_ms: float = 0.0
    buckets: tuple[int, ...] = ()
    max_batch_size: int = 64
    max_queue: int = 256
    timeout_s: float = 30.0
    max_body_bytes: int = 32 * MIB
    max_inflight_bytes: int = 512 * MIB
    max_pixels: int = 50_000_000
    max_connections: int = 1024
    body_timeout_s: float = 30.0
    drain_s: float = 25.0
    api_keys: Path | None = None
    control_keys: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    repository: Path | None = None
    split: dict[str, dict[str, float]] = field(default_factory=dict)
    shadows: tuple[str, ...] = ()
    shadow_share: float = 1.0
    require_signature: Path | None = None
    access_log: bool = False
    log_json: bool = False
    otlp: str | None = None

    def __post_init__(self) -> None:
        least = {
            "max_batch_size": 1, "max_queue": 0, "max_delay_ms": 0, "max_body_bytes": 1024, "max_inflight_bytes": 1024,
            "max_pixels": 1, "max_connections": 1, "drain_s": 0,
        }  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise InputError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        for name in ("timeout_s", "body_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}: expected more than 0 seconds, got {getattr(self, name)}")
        if self.max_batch is not None and self.max_batch < 1:
            raise InputError(f"max_batch: expected at least 1, got {self.max_batch}")
        if any(size < 1 for size in self.buckets):
            raise InputError(f"buckets: expected sizes of at least 1, got {min(self.buckets)}")
        if not 0 <= self.shadow_share <= 1:
            raise InputError(f"shadow_share: expected 0 to 1, got {self.shadow_share}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("tls_cert and tls_key: give both, or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise InputError("tls_client_ca: needs tls_cert and tls_key; client certificates are part of TLS")
