"""Everything that can be set about a server: default, range, help. Both command lines are made of it."""
# ruff: noqa: RUF009 -- ``_option`` makes a dataclass field, which is what belongs there

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcruntime.errors import InputError

if TYPE_CHECKING:  # the engine brings NumPy with it, and --help should be quick
    from mcruntime.engine import Provider

MIB = 1 << 20
HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.?")
MANY = ("split", "shadows", "allowed_hosts")  # may be given several times


def _option(default: Any, words: str, metavar: str = "", *, factory: Any = None) -> Any:
    about = {"help": words, "metavar": metavar}
    return field(default_factory=factory, metadata=about) if factory else field(default=default, metadata=about)


@dataclass(frozen=True)
class ServerOptions:
    """How to serve. What each field means stands beside it, as ``--help`` prints it; None: off, or found out.

    Raises:
        InputError: a value outside its range, or a combination that makes no sense.
    """

    host: str = _option("127.0.0.1", "address to listen on", "ADDRESS")
    port: int = _option(8000, "0 for any free one", "PORT")
    grpc_port: int | None = _option(None, "serve gRPC too; 0 for any free port; needs the extra [grpc]", "PORT")
    threads: int | None = _option(None, "CPU threads of one inference; default: all cores this process may use", "N")
    provider: Provider = _option("cpu", "of ONNX Runtime: cpu, cuda or tensorrt", "NAME")
    max_batch: int | None = _option(
        None, "images put together for one inference; default: the best of the bundle's own bench, else 32", "N"
    )
    max_delay_ms: float = _option(0.0, "how long an idle engine waits for a fuller batch; 0: not at all", "MS")
    buckets: tuple[int, ...] = _option(
        (), "batch sizes that are run, smaller ones filled up, such as 1,4,16; one request may be larger", "N,N"
    )
    max_batch_size: int = _option(64, "images a client may send in one request", "N")
    max_queue: int = _option(256, "requests of one model that may wait; more are answered 503", "N")
    timeout_s: float = _option(30.0, "a request without an answer by then is answered 504", "SECONDS")
    max_body_bytes: int = _option(32 * MIB, "of one request, also after unpacking; more is answered 413", "BYTES")
    max_inflight_bytes: int = _option(512 * MIB, "of all request bodies together; more is answered 503", "BYTES")
    max_pixels: int = _option(
        25_000_000, "of one image, read from its header; more is refused; decoding takes up to 16 bytes a pixel", "N"
    )
    max_connections: int = _option(1024, "at the same time; more are answered 503", "N")
    keep_alive_s: float = _option(
        75.0, "a connection without requests is closed after that; longer than the load balancer's", "SECONDS"
    )
    body_timeout_s: float = _option(30.0, "in which a request's body must arrive; else 408", "SECONDS")
    drain_s: float = _option(25.0, "how long requests in flight may take after the stop signal", "SECONDS")
    api_keys: Path | None = _option(
        None, "one key a line; all but health probes and the page itself then need one; read again on SIGHUP", "FILE"
    )
    control_keys: Path | None = _option(
        None,
        "one key a line; lets their holders load and unload models, which is off without it; read again on SIGHUP",
        "FILE",
    )
    allowed_hosts: tuple[str, ...] = _option(
        (),
        "a name that clients may ask by; else, on a loopback address without --api-keys, only localhost and addresses",
        "NAME",
    )
    tls_cert: Path | None = _option(
        None,
        "certificate chain, PEM; with --tls-key: serve HTTPS and gRPC over TLS; all TLS files are read again on SIGHUP",
        "FILE",
    )
    tls_key: Path | None = _option(None, "its private key, PEM", "FILE")
    tls_client_ca: Path | None = _option(None, "ask clients for a certificate of this authority (mTLS), PEM", "FILE")
    repository: Path | None = _option(
        None, "a folder of bundles, or of folders of versions; all in it are served, and may be loaded again", "FOLDER"
    )
    split: Mapping[str, Mapping[str, float]] = _option(
        None, "share of the requests that name no version; once for each version", "NAME:VERSION=SHARE", factory=dict
    )
    shadows: tuple[str, ...] = _option(
        (), "a bundle that gets copies of the requests; its answers are compared, never sent", "[NAME[:VERSION]=]BUNDLE"
    )
    shadow_share: float = _option(1.0, "of the requests that are copied, 0 to 1", "SHARE")
    require_signature: Path | None = _option(
        None, "refuse a bundle that the holder of this key did not sign", "KEY.pub"
    )
    access_log: bool = _option(False, "log every request")
    log_json: bool = _option(False, "write logs as one JSON object a line")
    otlp: str | None = _option(
        None,
        "send traces to this OpenTelemetry collector, such as http://127.0.0.1:4318; needs the extra [trace]",
        "URL",
    )

    def __post_init__(self) -> None:
        least = {
            "max_batch_size": 1, "max_queue": 0, "max_delay_ms": 0, "max_body_bytes": 1024, "max_inflight_bytes": 1024,
            "max_pixels": 1, "max_connections": 1, "drain_s": 0, "port": 0,
        }  # fmt: skip
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise InputError(f"{_flag(name)}: expected at least {low}, got {getattr(self, name)}")
        for name in ("timeout_s", "body_timeout_s", "keep_alive_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{_flag(name)}: expected more than 0 seconds, got {getattr(self, name)}")
        for name in ("port", "grpc_port"):
            if not 0 <= (getattr(self, name) or 0) <= 65535:
                raise InputError(f"{_flag(name)}: a port is 0 to 65535, got {getattr(self, name)}")
        for name in ("max_batch", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{_flag(name)}: expected at least 1, got {getattr(self, name)}")
        if self.provider not in ("cpu", "cuda", "tensorrt"):
            raise InputError(f"--provider: unknown provider {self.provider!r}; valid are cpu, cuda, tensorrt")
        if any(size < 1 for size in self.buckets):
            raise InputError(f"--buckets: expected sizes of at least 1, got {min(self.buckets)}")
        if self.max_inflight_bytes < self.max_body_bytes:
            raise InputError("--max-inflight-bytes: expected at least --max-body-bytes, or no large request ever fits")
        if not 0 <= self.shadow_share <= 1:
            raise InputError(f"--shadow-share: expected 0 to 1, got {self.shadow_share}")
        for name in self.allowed_hosts:
            if not HOST_NAME.fullmatch(name):
                raise InputError(
                    f"--allowed-host: expected a name without a port, such as models.example.com; got {name!r}"
                )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("--tls-cert and --tls-key: give both, or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise InputError("--tls-client-ca: needs --tls-cert and --tls-key; client certificates are part of TLS")


@dataclass(frozen=True)
class Flag:
    """One option of a command line.

    Attributes:
        name: the field of ``ServerOptions``.
        type: int, float, str, bool or Path: of one value.
        many: may be given several times.
        default: None where giving nothing means something that is found out.
    """

    name: str
    flag: str
    type: type
    many: bool
    default: Any
    help: str
    metavar: str


def flags() -> list[Flag]:
    """Every field of ``ServerOptions`` as an option, in order."""
    return [
        Flag(
            name=one.name,
            flag=_flag(one.name),
            type=_TYPES.get(str(one.type).removesuffix(" | None"), str),
            many=one.name in MANY,
            default=None if one.name in (*MANY, "buckets") else one.default,
            help=one.metadata["help"],
            metavar=one.metadata["metavar"],
        )
        for one in fields(ServerOptions)
    ]


def from_flags(values: Mapping[str, Any]) -> ServerOptions:
    """The options from what a command line read, by field name.

    Raises:
        InputError: a value that cannot be read, or is outside its range.
    """
    read = dict(values)
    read["buckets"] = _read_sizes(read.get("buckets") or "")
    read["split"] = _read_split(read.get("split") or ())
    read["shadows"] = tuple(read.get("shadows") or ())
    read["allowed_hosts"] = tuple(read.get("allowed_hosts") or ())
    return ServerOptions(**read)


def _read_sizes(text: str) -> tuple[int, ...]:
    parts = [part for part in text.split(",") if part]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise InputError(f"--buckets: expected numbers with commas between them, such as 1,4,16; got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def _read_split(rules: Sequence[str]) -> dict[str, dict[str, float]]:
    split: dict[str, dict[str, float]] = {}
    for rule in rules:
        left, _, share = rule.rpartition("=")
        name, _, version = left.rpartition(":")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not name or not version.isdecimal() or not 0 <= value < float("inf"):
            raise InputError(f"--split: expected NAME:VERSION=SHARE, such as digits:2=10; got {rule!r}")
        split.setdefault(name, {})[version] = value
    for name, shares in split.items():
        if not any(shares.values()):
            raise InputError(f"--split: all shares of {name!r} are 0; give one of them more")
    return split


def _flag(name: str) -> str:
    singular = {
        "shadows": "shadow",
        "allowed_hosts": "allowed-host",
        "timeout_s": "timeout",
        "body_timeout_s": "body-timeout",
        "drain_s": "drain",
        "keep_alive_s": "keep-alive",
    }
    return "--" + singular.get(name, name).replace("_", "-")


_TYPES: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool, "Path": Path}
