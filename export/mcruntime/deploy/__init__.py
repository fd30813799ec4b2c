"""Package a bundle for what runs it elsewhere: a Triton model repository, an image for docker, or files for KServe.

A package is a folder that appears whole or not at all. ``mcdeploy-package.json`` in it lists every file with its hash,
so that packaging again replaces what mcdeploy wrote and nothing else: what was changed or added is never touched.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcruntime.bundle import MANIFEST, SIGNATURE, Bundle, load_bundle
from mcruntime.errors import BundleError, InputError

LIST = "mcdeploy-package.json"


@dataclass(frozen=True)
class Packaged:
    """What was written, and what a user should know about it, a sentence each."""

    folder: Path
    notes: tuple[str, ...]


@contextmanager
def new_folder(out: Path, kind: str, bundle: Bundle, chosen: dict[str, Any]) -> Iterator[Path]:
    """A folder to fill that takes the place of ``out`` at the end, together with its list of files.

    Args:
        kind: "triton", "docker" or "kserve".
        chosen: what was decided on the way, for the reader of the list; filled in before the end.

    Raises:
        InputError: ``out`` holds something that mcdeploy did not write, or that was changed since.
    """
    out = out.resolve()
    _refuse_foreign(out)
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        facts = {
            "kind": kind,
            "bundle": bundle.manifest.id,
            "model": bundle.key,
            "chosen": chosen,
            "files": _hashes(part),
        }
        (part / LIST).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if out.exists():  # moved aside, not deleted: at every moment one whole package is there
            out.rename(old)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def copy_bundle_file(bundle: Bundle, name: str, copy: Path) -> None:
    """Copy a file that the manifest lists and hold the copy against its hash.

    Raises:
        BundleError: the file changed since the bundle was loaded.
    """
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bundle.folder / name, copy)
    if _sha256(copy) != bundle.manifest.files[name].sha256:
        raise BundleError(f"{bundle.folder}: {name} changed while it was copied; copy the bundle again")


def copy_bundle(bundle: Bundle, folder: Path) -> None:
    """Copy a whole bundle, with its signature if it has one.

    Raises:
        BundleError: the bundle changed since it was loaded.
    """
    for name in bundle.manifest.files:
        copy_bundle_file(bundle, name, folder / name)
    for name in (MANIFEST, SIGNATURE):
        if (bundle.folder / name).is_file():
            shutil.copyfile(bundle.folder / name, folder / name)
    if load_bundle(folder).manifest.id != bundle.manifest.id:
        raise BundleError(f"{bundle.folder}: changed while it was copied; package it again")


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; a package is a folder, give another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        known = json.loads((out / LIST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{out}: holds what 'mcdeploy package' did not write, so it is not overwritten; give another --out"
        ) from None
    found = _hashes(out)
    found.pop(LIST, None)
    for name in sorted(found.keys() | known.keys()):
        if found.get(name) != known.get(name):
            what = "was changed or added" if name in found else "was removed"
            raise InputError(
                f"{out}: {name} {what} since it was packaged, so nothing there is overwritten; give another --out"
            )


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file, by name; a link stands for where it points."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path.relative_to(folder).as_posix()] = f"link to {path.readlink()}"
        elif not path.is_dir():
            found[path.relative_to(folder).as_posix()] = _sha256(path)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
