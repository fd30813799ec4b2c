"""``python -m mcruntime.server BUNDLE ...``: the server without mcdeploy's command line."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mcruntime.errors import McdeployError
from mcruntime.server import serve
from mcruntime.server.options import flags, from_flags

BUNDLES = "[NAME[:VERSION]=]FOLDER[@MODEL]: a bundle folder, under another name, as a version, another of its models"


def make_parser() -> argparse.ArgumentParser:
    """The command line, with one option for each field of ``ServerOptions``."""
    parser = argparse.ArgumentParser(
        prog="python -m mcruntime.server", description="Serve bundles over HTTP and gRPC.", allow_abbrev=False
    )
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE", help=BUNDLES)
    for flag in flags():
        more: dict[str, Any] = {"dest": flag.name, "help": flag.help}
        if flag.type is bool:
            more |= {"action": "store_true"}
        else:
            more |= {"type": flag.type, "metavar": flag.metavar, "default": flag.default}
            more |= {"action": "append"} if flag.many else {}
            more["help"] += "" if flag.default is None else " (default: %(default)s)"
        parser.add_argument(flag.flag, **more)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Parse, serve, and return the exit code: 0 done, 1 a promise failed, 2 the input is wrong."""
    values = vars(make_parser().parse_args(arguments))
    bundles = values.pop("bundles")
    try:
        serve(bundles, from_flags(values))
    except McdeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
