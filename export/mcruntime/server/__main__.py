"""``python -m mcruntime.server BUNDLE ...``: the server without mcdeploy's command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mcruntime.engine import PROVIDERS
from mcruntime.errors import McdeployError
from mcruntime.server import serve


def main(arguments: list[str] | None = None) -> int:
    """Parse, serve, and return the exit code: 0 done, 1 a promise failed, 2 the input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m mcruntime.server", description="Serve bundles over HTTP.")
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE", help="a bundle folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", default=8000, type=int, help="0 for any free one (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of one inference (default: all physical cores)")
    parser.add_argument("--provider", choices=list(PROVIDERS), default="cpu", help="(default: %(default)s)")
    parser.add_argument("--max-batch-size", default=64, type=int, help="images in a request (default: %(default)s)")
    parser.add_argument("--max-queue", default=64, type=int, help="requests that may wait (default: %(default)s)")
    parser.add_argument("--require-signature", type=Path, metavar="KEY.pub", help="refuse what this key did not sign")
    try:
        serve(**vars(parser.parse_args(arguments)))
    except McdeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
