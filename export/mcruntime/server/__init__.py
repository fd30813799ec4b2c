"""Serve bundles over HTTP: the Open Inference Protocol v2, and an image in, a label out.

Modules: ``protocol`` (bytes to arrays and back), ``executor`` (the queue), ``app`` (routes), ``run`` (load, listen,
drain). Only this one may be imported without the extra [serve].
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from mcruntime.engine import Provider
from mcruntime.errors import MissingExtraError

MAX_BODY_BYTES = 32 << 20  # JSON of some 16 images of 3 x 224 x 224; parsing more would hold up the health probes
NEEDED = {"uvicorn": "uvicorn", "starlette": "starlette", "python_multipart": "python-multipart"}


def serve(
    bundles: Sequence[Path],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    threads: int | None = None,
    provider: Provider = "cpu",
    max_batch_size: int = 64,
    max_queue: int = 64,
    max_body_bytes: int = MAX_BODY_BYTES,
    drain_s: float = 25.0,
    require_signature: Path | None = None,
) -> None:
    """Check, prove and warm up every bundle, then serve until SIGTERM or Ctrl-C; prints one line each and the address.

    Args:
        port: 0 for any free one.
        threads: of one inference on the CPU; None: all physical cores this process may use.
        max_batch_size: images in one infer request.
        max_queue: requests of one model that may wait; more are answered 503 with Retry-After.
        max_body_bytes: of one request; more is answered 413.
        drain_s: how long, in seconds, requests in flight may take after the stop signal.
        require_signature: a public key; what its holder did not sign is refused before anything in it is loaded.

    Raises:
        MissingExtraError: the packages of the extra [serve] are not installed.
        InputError: no bundle, two of one name, or an address that cannot be listened on.
        BundleError, BackendError, ParityError: a bundle that is damaged, cannot run here, or fails its self-test.
        McdeployError: requests were cut off because they took longer than ``drain_s``.
    """
    for module, package in NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError:
            raise MissingExtraError("mcdeploy serve", package, "serve") from None
    from mcruntime.server.run import run

    run(
        [Path(bundle) for bundle in bundles],
        host,
        port,
        threads=threads,
        provider=provider,
        max_batch_size=max_batch_size,
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        drain_s=drain_s,
        require_signature=require_signature,
    )
