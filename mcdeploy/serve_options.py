"""The parameters of ``mcdeploy serve``: one for each option of the server, so that both command lines say the same."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer
from mcruntime.server.options import flags

METAVAR = "BUNDLE"
BUNDLES = "[NAME[:VERSION]=]FOLDER[@MODEL]: a bundle, under another name, as a version, another of its models."


def signature_of_serve() -> inspect.Signature:
    """What typer reads the command line from; keyword parameters named as the fields of ``ServerOptions``."""
    kinds: list[tuple[str, Any, Any]] = [
        (
            "bundles",
            Annotated[list[str] | None, typer.Argument(metavar=METAVAR, help=BUNDLES, show_default=False)],
            None,
        )
    ]
    for flag in flags():
        option = typer.Option(
            flag.flag,
            help=flag.help[0].upper() + flag.help[1:] + ".",
            metavar=flag.metavar or None,
            show_default=flag.default is not None and flag.type is not bool,
        )
        kind: Any = list[flag.type] if flag.many else flag.type  # type: ignore[name-defined]
        kinds.append((flag.name, Annotated[kind | None if flag.default is None else kind, option], flag.default))
    return inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, kind, default in kinds
        ]
    )
