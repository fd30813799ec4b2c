"""The folder that ships: a model, the proof that it is the right one, and a manifest with the hash of every file.

    manifest.json       what this is; sha256 and size of every other file
    manifest.sig        optional: who says so (``mcruntime.signature``)
    model.onnx          the model; model.fp16.onnx, model.int8.onnx, ... where other forms were asked for
    certificate.json    the proof that compiling kept the function
    selftest.npz        images [N, C, H, W] and the trained model's logits [N, num_classes], both float32
    wiring.json         optional: what the blocks could have read, for drawings; wiring.onnx: the edges an image opens
    ...                 reports

The promise: loading, checking and serving a bundle runs no code from it. There is no pickle in it (an .npz is read with
``allow_pickle=False``), every file is of a kind in ``SUFFIXES``, is a plain file inside the folder, is listed, and is
byte for byte what was sealed; no model in it takes its weights from a file outside. Hashes find damage and mix-ups;
they do not say who sealed the bundle, a signature does. An .html report is for a browser, which trusts it as far as
any page: mcruntime never opens one. A TensorRT engine (.plan) is machine code for a GPU, so it is only allowed where
the manifest names it as a model, and code for the host in it is never switched on: take engines from people you trust.
"""

# B = batch, N = images in the self-test, C = channels, H/W = height/width.
from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mcruntime.engine import Runner
from mcruntime.errors import BundleError, InputError, ParityError
from mcruntime.external import external_files
from mcruntime.manifest import SCHEMA_VERSION, FileFact, Manifest, ModelFile

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
CERTIFICATE = "certificate.json"
WIRING = "wiring.json"  # what prune-export knows of the wiring beyond the certificate
WIRING_MODEL = "wiring.onnx"  # images to the weights of their edges, where these depend on the image
# Data only. A .pt2 or .pt holds pickles and compiled code, so it stays out.
SUFFIXES = (".onnx", ".data", ".json", ".npz", ".html", ".svg", ".png", ".md", ".txt")
ENGINE = ".plan"
MAX_NPZ_BYTES = 1 << 30  # of all arrays of one file, unpacked


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every file was checked."""

    folder: Path
    manifest: Manifest
    key: str  # which of the manifest's models is meant

    @property
    def model(self) -> ModelFile:
        return self.manifest.models[self.key]

    @property
    def model_path(self) -> Path:
        return self.folder / self.model.file

    def selftest(self, runner: Runner) -> float:
        """Let a runner answer the stored images, all at once and the first alone, as the trained model did.

        Returns:
            The largest difference of a logit, relative to the largest |logit|.

        Raises:
            BundleError: the model does not take the images that the manifest describes.
            ParityError: an answer of another shape, not finite, or further off than the manifest allows.
        """
        allowed = self.model.selftest_max_abs
        arrays = _read_npz(self.folder / self.manifest.selftest)
        images, expected = arrays["images"], arrays["logits"]
        scale = float(np.abs(expected).max()) or 1.0
        worst = 0.0
        for batch in (len(images), 1):
            try:
                answer = runner.infer(images[:batch])
            except InputError as error:
                raise BundleError(f"{self.folder}: the model is not what {MANIFEST} says ({error})") from None
            if answer.shape != expected[:batch].shape:
                raise ParityError(
                    f"{self.folder}: self-test: expected logits {list(expected[:batch].shape)}, "
                    f"got {list(answer.shape)}; export the bundle again"
                )
            if not np.isfinite(answer).all():
                raise ParityError(f"{self.folder}: self-test: an output is NaN or infinite; export the bundle again")
            worst = max(worst, float(np.abs(answer - expected[:batch]).max()) / scale)
        if worst > allowed:
            raise ParityError(
                f"{self.folder}: self-test: logits differ from the trained model's by {worst:.1e} of the largest, "
                f"more than {allowed:.1e}; use another provider or export the bundle again"
            )
        return worst


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file in ``folder``, write the manifest last and in one step, and load the bundle once to be sure.

    A bundle that was not sealed to the end has no manifest and is refused. Sealing twice is allowed.

    Returns:
        The manifest as written, with ``created`` and ``files``.

    Raises:
        BundleError: ``load_bundle`` would refuse the folder; no manifest is left in it then.
    """
    target, part = folder / MANIFEST, folder / f".{MANIFEST}.part"
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder; write the model into it before sealing it")
    target.unlink(missing_ok=True)
    (folder / SIGNATURE).unlink(missing_ok=True)  # of a manifest that is no more
    part.unlink(missing_ok=True)
    files = {name: FileFact(sha256=_sha256(path), bytes=path.stat().st_size) for name, path in _walk(folder)}
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    sealed = manifest.model_copy(update={"created": now, "files": files})
    text = json.dumps({"id": sealed.id, **sealed.model_dump(mode="json")}, indent=2, ensure_ascii=False)
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, target)
    try:
        return load_bundle(folder).manifest
    except BundleError:
        target.unlink(missing_ok=True)
        raise


def load_bundle(path: Path | str) -> Bundle:
    """Read a bundle and check all that its manifest promises; see the head of this module.

    Args:
        path: a bundle folder; ``FOLDER@int8`` means the model of that key instead of the one it serves by default.

    Raises:
        BundleError: no such folder or manifest; not JSON, another schema version, a wrong key; a file that is missing,
            not listed, changed, of another size, not a plain file, or of a kind that does not belong in a bundle; an
            array file with a pickle in it; a parity check that did not pass. One sentence: what, where, what to do.
    """
    folder, key = split_key(path)
    manifest = read_manifest(folder)
    for parity in manifest.parity:
        if not parity.passed:
            raise BundleError(f"{folder}: parity after {parity.hop!r} did not pass; export the bundle again")
    for needed in (*(model.file for model in manifest.models.values()), manifest.selftest, CERTIFICATE):
        if needed not in manifest.files:
            raise BundleError(f"{folder}: {MANIFEST} does not list {needed}; export the bundle again")
    _check_files(folder, manifest.files)
    engines = {model.file for model in manifest.models.values()}
    for name in manifest.files:
        if name.endswith(ENGINE) and name not in engines:
            raise BundleError(f"{folder}: {name} is an engine that no model names; export the bundle again")
        if name.endswith(".npz"):
            _read_npz(folder / name)
        if name.endswith(".onnx"):
            _check_external(folder, name, manifest.files)
    _check_selftest(folder, manifest)
    if key is not None and key not in manifest.models:
        raise BundleError(f"{folder}: has no model {key!r}; ask for {' or '.join(manifest.models)}, or export it")
    return Bundle(folder, manifest, key or manifest.serve)


def split_key(path: Path | str) -> tuple[Path, str | None]:
    """``FOLDER@int8`` is the model "int8" of the bundle FOLDER; a folder of that very name goes first."""
    folder, at, key = str(path).rpartition("@")
    return (Path(folder), key) if at and folder and not Path(path).exists() else (Path(path), None)


def read_manifest(folder: Path) -> Manifest:
    """What the manifest says, whole and unchanged; no file is looked at. Raises BundleError."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such bundle folder; 'mcdeploy prune-export' makes one")
    if path.is_symlink() or not path.is_file():
        raise BundleError(
            f"{folder}: no {MANIFEST}, so this is no bundle or its export did not finish; export it again"
        )
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise BundleError(f"{path}: not readable as JSON; copy the bundle again") from None
    if not isinstance(tree, dict):
        raise BundleError(f"{path}: expected a JSON object, got {type(tree).__name__}; copy the bundle again")
    if tree.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema_version is {tree.get('schema_version')!r}, this mcdeploy reads {SCHEMA_VERSION}; "
            "use the version that made the bundle, or export it again"
        )
    written_id = tree.pop("id", None)
    try:
        manifest = Manifest.model_validate_json(json.dumps(tree))  # JSON mode: lists become tuples, the rest is strict
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise BundleError(f"{path}: {key + ': ' if key else ''}{problem['msg']}; export the bundle again") from None
    if written_id != manifest.id:
        raise BundleError(f"{path}: changed after it was sealed (its id does not fit); export the bundle again")
    return manifest


def _check_files(folder: Path, files: dict[str, FileFact]) -> None:
    found = dict(_walk(folder))
    for name, fact in files.items():
        path = found.pop(name, None)
        if path is None:
            raise BundleError(f"{folder}: {name} is missing; copy the bundle again")
        try:
            size, digest = path.stat().st_size, _sha256(path)
        except OSError as error:
            raise BundleError(f"{folder}: {name} cannot be read ({error.strerror}); copy the bundle again") from None
        if size != fact.bytes:
            raise BundleError(f"{folder}: {name} has {size} bytes instead of {fact.bytes}; copy the bundle again")
        if digest != fact.sha256:
            raise BundleError(f"{folder}: {name} was changed after it was sealed; copy the bundle again")
    for name in found:
        raise BundleError(f"{folder}: {name} is not listed in {MANIFEST}; remove it, or export the bundle again")


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Every file but the manifest, as (name with "/", path), in a fixed order; links and odd kinds are refused."""
    try:
        entries = sorted(os.scandir(folder / prefix), key=lambda entry: entry.name)
    except OSError as error:
        raise BundleError(
            f"{folder}: {prefix or '.'} cannot be read ({error.strerror}); copy the bundle again"
        ) from None
    for entry in entries:
        name = f"{prefix}{entry.name}"
        if entry.is_symlink():
            raise BundleError(f"{folder}: {name} is a symbolic link; put the file itself there")
        if entry.is_dir():
            yield from _walk(folder, f"{name}/")
        elif not entry.is_file():
            raise BundleError(f"{folder}: {name} is not a plain file; remove it")
        elif name not in (MANIFEST, SIGNATURE):
            if not name.endswith((*SUFFIXES, ENGINE)):
                raise BundleError(
                    f"{folder}: {name} does not belong in a bundle (only {', '.join(SUFFIXES)}); remove it"
                )
            yield name, Path(entry.path)


def _check_external(folder: Path, name: str, files: dict[str, FileFact]) -> None:
    """Refuse a model whose weights lie in a file that is not of this bundle, and so was not checked."""
    try:
        locations = external_files(folder / name)
    except (OSError, ValueError):
        raise BundleError(f"{folder}: {name} is not an ONNX model; export the bundle again") from None
    for location in locations:
        if str(PurePosixPath(name).parent / location) not in files:  # whose names hold no ".."
            raise BundleError(
                f"{folder}: {name} names {location[:100]!r} for its weights, which is no file of this bundle; do not "
                "use it, or export the bundle again"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """All arrays of a file, none of which may need a pickle or unpack to more than ``MAX_NPZ_BYTES``."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if not all(member.filename.endswith(".npy") for member in members):
            raise BundleError(f"{path}: holds something that is no array; export the bundle again")
        if sum(member.file_size for member in members) > MAX_NPZ_BYTES:
            raise BundleError(f"{path}: unpacks to more than {MAX_NPZ_BYTES >> 20} MiB; export fewer images")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        reason = "holds a pickle" if "allow_pickle" in str(error) else "is not an array file"
        raise BundleError(f"{path}: {reason}; export the bundle again") from None


def _check_selftest(folder: Path, manifest: Manifest) -> None:
    name = manifest.selftest
    arrays = _read_npz(folder / name)
    for key, shape in {"images": manifest.input.shape, "logits": (manifest.output.num_classes,)}.items():
        array = arrays.get(key)
        if array is None or array.dtype != np.float32 or array.shape[1:] != shape or not len(array):
            found = "none" if array is None else f"{array.dtype} {list(array.shape)}"
            wanted = ", ".join(["N", *map(str, shape)])
            raise BundleError(f"{folder}: {name}: expected {key} float32 [{wanted}], got {found}; export it again")
        if not np.isfinite(array).all():
            raise BundleError(f"{folder}: {name}: {key} hold NaN or infinite values; export the bundle again")
    if len(arrays["images"]) != len(arrays["logits"]):
        raise BundleError(f"{folder}: {name}: as many logits as images are needed; export the bundle again")
