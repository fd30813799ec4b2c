"""Serve bundles: the Open Inference Protocol v2 over HTTP and gRPC, an image in and a label out, and a page for people.

The way of a request: ``run`` (listen, drain) - ``app`` (one door, routes) - ``body`` (limits) - ``protocol`` and
``tensors`` (bytes to arrays and back), or ``images`` - ``models`` (names, versions) - ``batcher`` (dynamic batching).
Only this module and ``options`` may be imported without the extra [serve].
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from mcruntime.errors import MissingExtraError
from mcruntime.server.options import ServerOptions

NEEDED = {
    "uvicorn": "uvicorn", "uvloop": "uvloop", "httptools": "httptools", "orjson": "orjson", "starlette": "starlette",
    "python_multipart": "python-multipart", "prometheus_client": "prometheus-client",
}  # fmt: skip


def serve(bundles: Sequence[Path | str], options: ServerOptions | None = None) -> None:
    """Check, prove and warm up every bundle, then serve until SIGTERM or Ctrl-C; prints one line each and the address.

    Args:
        bundles: folders, each as ``[NAME[:VERSION]=]FOLDER[@MODEL]``.
        options: default: ``ServerOptions()``.

    Raises:
        MissingExtraError: the packages of the extra [serve] are not installed.
        InputError: no bundle, two of one name and version, or an address that cannot be listened on.
        BundleError, BackendError, ParityError: a bundle that is damaged, cannot run here, or fails its self-test.
        McdeployError: requests were cut off because they took longer than ``drain_s``.
    """
    for module, package in NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError:
            raise MissingExtraError("mcdeploy serve", package, "serve") from None
    from mcruntime.server.run import run

    run(bundles, options or ServerOptions())
