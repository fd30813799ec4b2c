"""What the commands check of their options before they work, in one sentence to the user; nothing heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mcdeploy.errors import InputError, MissingExtraError


@contextmanager
def needs_extra(command: str, extra: str) -> Iterator[None]:
    """A missing package becomes the sentence that names the extra to install.

    Raises:
        MissingExtraError: an import inside failed for a package that is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).startswith(("mcdeploy", "mcruntime")):
            raise
        raise MissingExtraError(command, str(error.name), extra) from None


def check_known(option: str, given: list[str], known: list[str]) -> None:
    """Refuse a value of an option that is none of the known ones.

    Raises:
        InputError: names the option, the value and what is known.
    """
    for value in given:
        if value not in known:
            raise InputError(f"{option} {value}: not available; this version has {', '.join(known)}")


def percentage(text: str, option: str = "--fail-if-slower") -> float:
    """``5%`` or ``5`` is 0.05.

    Raises:
        InputError: no number, or a negative or endless one.
    """
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        raise InputError(f"{option} {text}: expected a percentage such as 5%") from None
    if not 0 <= share < float("inf"):  # NaN fits nowhere
        raise InputError(f"{option} {text}: expected 0% or more")
    return share


def whole_range(option: str, text: str) -> range:
    """``5:9`` is 5, 6, 7, 8, 9.

    Raises:
        InputError: not two whole numbers in that order.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise InputError(f"{option} {text}: expected two whole numbers A:B with A <= B, such as 5:9")
    return range(int(first), int(last) + 1)


def check_folder(path: Path | None) -> None:
    """Look before the work rather than after it whether a file can be written; None is no file.

    Raises:
        InputError: its folder is not there.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent} to write it into")


def write_json(path: Path | None, data: dict[str, Any]) -> None:
    """What ``--json FILE`` asks for; None writes nothing."""
    if path is not None:
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def recipe_folder() -> Path:
    """The recipes that ship: beside the package in a checkout, inside it when installed."""
    beside = Path(__file__).parents[1] / "recipes"
    return beside if (beside / "digits.yaml").exists() else Path(__file__).parent / "recipes"


def find_recipe(given: Path) -> Path:
    """A path as it is, or the shipped recipe of that name."""
    shipped = recipe_folder() / f"{given}.yaml"
    return shipped if not given.is_file() and shipped.is_file() else given
