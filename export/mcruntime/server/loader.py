"""From a bundle on disk to a model that may answer: check every byte, open it, let it prove itself, warm it up."""

from __future__ import annotations

import ctypes
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mcruntime.batches import AnyBatch
from mcruntime.bundle import MANIFEST, Bundle, load_bundle, read_manifest, split_key
from mcruntime.deploy.triton import choose_batches, in_manifest
from mcruntime.engine import DEFAULT_BATCHES, OnnxRunner, Runner
from mcruntime.errors import BundleError, InputError
from mcruntime.server.models import Model, Source
from mcruntime.server.options import ServerOptions
from mcruntime.server.tensors import ModelSpec
from mcruntime.signature import verify_signature
from mcruntime.tensorrt import TensorRTRunner

WARM_UP_RUNS = 3  # of one image, after the self-test; the largest batch is run once
DEFAULT_MAX_BATCH = 32  # where the bundle holds no measurement
logger = logging.getLogger("mcruntime.server")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TARGET = re.compile(rf"(?:(?P<name>{NAME.pattern})(?::(?P<version>[1-9][0-9]{{0,8}}))?=)?(?P<path>.+)", re.DOTALL)


@dataclass(frozen=True)
class Target:
    """A bundle to serve, as the user wrote it: ``[NAME[:VERSION]=]FOLDER[@MODEL]``."""

    path: Path
    name: str = ""  # "": the bundle's own
    version: str = "1"


def parse_target(text: str | Path, version: str = "1") -> Target:
    """Read ``digits:2=runs/new/bundle@int8``; all but the folder may be left out.

    Args:
        version: where the text gives none.

    Raises:
        InputError: nothing after the "=".
    """
    if Path(text).exists():
        return Target(Path(text), version=version)
    match = TARGET.fullmatch(str(text))
    if match is None:
        raise InputError(f"{text!r}: expected [NAME[:VERSION]=]FOLDER[@MODEL]")
    return Target(Path(match["path"]), match["name"] or "", match["version"] or version)


def find_in(repository: Path) -> list[Target]:
    """The bundles of a repository: ``REPOSITORY/name`` is one, or holds one for each version, ``name/1``, ``name/2``.

    Links, hidden folders and names that a model cannot have are passed over.

    Raises:
        InputError: no such folder.
    """
    try:
        entries = sorted(os.scandir(repository), key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{repository}: cannot be read ({error.strerror}); give a folder of bundles") from None
    return [target for entry in entries for target in _bundles_of(entry)]


def _bundles_of(entry: os.DirEntry[str]) -> Iterator[Target]:
    if not NAME.fullmatch(entry.name) or not entry.is_dir(follow_symlinks=False):
        return
    if (Path(entry.path) / MANIFEST).is_file():
        yield Target(Path(entry.path), entry.name)
        return
    try:
        inside = sorted(os.scandir(entry.path), key=lambda inner: inner.name)
    except OSError as error:  # one folder that cannot be read must not hide the others
        logger.warning("%s: passed over, it cannot be read (%s)", entry.path, error.strerror)
        return
    for inner in inside:
        is_version = re.fullmatch(r"[1-9][0-9]{0,8}", inner.name) and inner.is_dir(follow_symlinks=False)
        if is_version and (Path(inner.path) / MANIFEST).is_file():
            yield Target(Path(inner.path), entry.name, inner.name)


def open_model(target: Target, options: ServerOptions) -> Model:
    """Load, prove and warm up one bundle.

    Raises:
        BundleError, BackendError, ParityError: damaged, cannot run here, or not the model it was.
        InputError: the signature that was asked for is not there; an engine and ``provider`` do not fit.
    """
    if options.require_signature is not None:
        verify_signature(target.path, options.require_signature)
    bundle = load_bundle(target.path)
    runner = _runner_of(bundle, options)
    runner.__enter__()
    try:
        worst = bundle.selftest(runner)
        max_batch, source = _max_batch(bundle, options)
        for batch in (*[1] * WARM_UP_RUNS, max_batch):
            runner.infer(np.zeros((batch, *bundle.manifest.input.shape), dtype=np.float32))
        _give_back_memory()
    except BaseException:
        runner.__exit__()
        raise
    return Model(
        _spec_of(bundle, target, options),
        runner.infer,
        bundle.manifest.preprocessing,
        release=lambda: runner.__exit__(None, None, None),
        about=_about(bundle, runner, worst, max_batch, source),
        folder=bundle.folder,
        max_batch=max_batch,
        max_queue=options.max_queue,
        max_delay_s=options.max_delay_ms / 1e3,
        buckets=options.buckets,
    )


def source_of(target: Target, options: ServerOptions) -> Source:
    """A target as what ``Models`` loads from.

    Raises:
        BundleError: its manifest cannot be read, and the target gives no name.
    """
    name = target.name or read_manifest(split_key(target.path)[0]).name
    named = Target(target.path, name, target.version)
    return Source(name, target.version, lambda: open_model(named, options), lambda: _stamp(target.path))


def check_unique(sources: Sequence[Source]) -> None:
    """Refuse two bundles for one name and version.

    Raises:
        InputError: with the way to give them versions.
    """
    seen = set()
    for source in sources:
        if (source.name, source.version) in seen:
            raise InputError(
                f"two bundles are both named {source.name!r}, version {source.version}; serve one of them, or number "
                f"them: {source.name}:1=FOLDER {source.name}:2=FOLDER"
            )
        seen.add((source.name, source.version))


def describe(model: Model) -> str:
    """One line for the user who starts the server."""
    about, spec = model.about, model.spec
    threads = f" with {about['threads']} threads" if "threads" in about else ""
    number = f" version {spec.version}" if spec.version != "1" else ""
    _, height, width = spec.shape
    return (
        f"{spec.name}{number}: bundle {about['bundle'][:12]}, model {about['model']}, {height} x {width} pixels, "
        f"{spec.num_classes} classes, {about['provider']}{threads}, batches up to {about['max_batch']} "
        f"({about['max_batch_from']}), self-test off by {about['selftest']:.1e} (at most {about['selftest_max']:.1e})"
    )


def _spec_of(bundle: Bundle, target: Target, options: ServerOptions) -> ModelSpec:
    manifest, is_engine = bundle.manifest, bundle.model.engine is not None
    return ModelSpec(
        name=target.name or manifest.name,
        version=target.version,
        input_name=manifest.input.name,
        shape=manifest.input.shape,
        output_name=manifest.output.name,
        num_classes=manifest.output.num_classes,
        max_batch_size=options.max_batch_size,
        labels=manifest.labels,
        platform="tensorrt_plan" if is_engine else "onnxruntime_onnx",
        backend="tensorrt" if is_engine else "onnxruntime",
    )


def _about(bundle: Bundle, runner: Runner, worst: float, max_batch: int, source: str) -> dict[str, Any]:
    facts = runner.facts()
    return {
        "bundle": bundle.manifest.id,
        "model": bundle.key,
        "provider": facts["provider"],
        **({"threads": int(facts["threads"])} if "threads" in facts else {}),
        "selftest": worst,
        "selftest_max": bundle.model.selftest_max_abs,
        "max_batch": max_batch,
        "max_batch_from": source,
    }


def _max_batch(bundle: Bundle, options: ServerOptions) -> tuple[int, str]:
    """How many images are worth putting together, and who says so."""
    engine = bundle.model.engine
    limit = engine.batch[2] if engine is not None else None
    if options.provider == "tensorrt":
        limit = DEFAULT_BATCHES[2]
    if options.buckets:
        limit = min(max(options.buckets), limit or max(options.buckets))
    if options.max_batch is not None:
        if limit is not None and options.max_batch > limit:
            raise InputError(
                f"max_batch: the engine or --buckets takes at most {limit} images, got {options.max_batch}"
            )
        return options.max_batch, "as asked"
    measured = choose_batches(*in_manifest(bundle.manifest, bundle))
    if measured.is_default:
        return limit or DEFAULT_MAX_BATCH, "the largest there is" if limit else "no bench in the bundle"
    best = max(measured.preferred, default=1)
    return min(best, limit or best), "the best of its bench"


def _runner_of(bundle: Bundle, options: ServerOptions) -> Runner:
    name = bundle.manifest.name
    if bundle.model.backend == "tensorrt":
        if options.provider != "cpu":
            raise InputError(
                f"{bundle.folder}: is a TensorRT engine, which runs without ONNX Runtime; leave "
                f"--provider {options.provider} away, or name another model of the bundle"
            )
        assert bundle.model.engine is not None  # the manifest holds no other
        return AnyBatch(TensorRTRunner(bundle.model_path, name=name, finite=False), bundle.model.engine.batch)
    runner = OnnxRunner(
        bundle.model_path,
        provider=options.provider,
        threads=options.threads,
        name=name,
        spinning=False,  # idle threads that burn the CPU take it from the event loop
        types=bundle.model.precision,
        finite=False,  # of numbers that no image has, a client may have what the model says; the self-test is strict
    )
    return AnyBatch(runner, DEFAULT_BATCHES) if options.provider == "tensorrt" else runner


def _stamp(path: Path) -> str:
    """Changes when the bundle is sealed anew. Files that were changed without sealing are found when it is loaded."""
    try:
        stat = (split_key(path)[0] / MANIFEST).stat()
    except OSError as error:
        raise BundleError(f"{path}: no {MANIFEST} ({error.strerror}); copy the bundle again") from None
    return f"{stat.st_ino} {stat.st_mtime_ns} {stat.st_size}"


def _give_back_memory() -> None:
    """What loading freed, to the system: of a ResNet-18, 95 MB of the file's text and unpacked weights, which glibc
    would keep. Where there is another C library, nothing happens."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
