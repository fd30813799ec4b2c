"""A Triton model repository from a bundle.

    OUT/mcdeploy-package.json      what was written and why; Triton only looks at folders
    OUT/<name>/config.pbtxt
    OUT/<name>/labels.txt
    OUT/<name>/1/model.onnx        with its .data file, if it has one; or model.plan

``config.pbtxt`` is text that we write ourselves, since Triton's protobuf is not installed where this runs; the tests
parse it back with the real one. Images come to Triton prepared: how, is in the parameter ``mcdeploy_preprocessing``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mcruntime.bundle import Bundle, split_key
from mcruntime.deploy import Packaged, copy_bundle_file, new_folder
from mcruntime.errors import InputError
from mcruntime.manifest import Manifest

# Without a measurement: room for 8 images, and batches of 4 or 8 where they wait anyway.
DEFAULT_MAX_BATCH, DEFAULT_PREFERRED = 8, (4, 8)
WORTH_IT = 0.95  # of the best images/s: a batch size that reaches this share is worth waiting for
# What ``tests/triton_package.py`` did with packages of this kind, and where it stopped.
NOT_RUN = (
    "no Triton ran this package: Triton 2.51 took the config of others like it and answered right with their model, on "
    "the CPU by its Python backend instead of ONNX Runtime's; try it before you rely on it"
)
NO_ENGINE_RUN = (
    "no Triton ran any engine here: the config.pbtxt is checked against Triton's protobuf only; try it before you rely "
    "on it"
)


@dataclass(frozen=True)
class Batching:
    """Batch sizes for Triton, and where they come from."""

    largest: int
    preferred: tuple[int, ...]  # empty: larger batches gain nothing, so requests are not put together
    source: str  # in words
    is_default: bool = False  # nothing was measured


def package_triton(bundle: Bundle, out: Path | str, *, name: str = "", bench: Path | str | None = None) -> Packaged:
    """Write a Triton model repository that holds the bundle's model ``bundle.key``.

    Args:
        name: what the user called the bundle (``FOLDER@int8``), to find it in ``bench``; default: its folder.
        bench: JSON of ``mcdeploy bench --json``; default: the latency in the manifest, or else documented defaults.

    Raises:
        InputError: ``out`` holds something else; ``bench`` is not a bench of this model; a label of several lines.
    """
    model, batching = bundle.model, batching_of(bundle, name, bench)
    notes = [
        f"max_batch_size {batching.largest}, preferred {list(batching.preferred) or 'none'}: {batching.source}",
        f"model {bundle.key} for Triton's {_backend(bundle)} backend, on {'GPU' if model.engine else 'CPU'}",
    ]
    if model.engine is not None:
        notes.append(
            f"the engine runs on {model.engine.gpu} with TensorRT {model.engine.tensorrt} only; "
            "take the Triton release that has this TensorRT"
        )
    notes.append(NOT_RUN if model.engine is None else NO_ENGINE_RUN)
    chosen = {"batching": asdict(batching), "ran_in_triton": False}
    with new_folder(Path(out), "triton", bundle, chosen) as folder:
        write_repository(bundle, folder, batching)
    return Packaged(Path(out), tuple(notes))


def batching_of(bundle: Bundle, name: str = "", bench: Path | str | None = None) -> Batching:
    """Batch sizes by a bench, by the latency in the manifest, or by our defaults; see ``package_triton``.

    Raises:
        InputError: ``bench`` is not a bench of this model; an engine that takes no single image.
    """
    measured = (
        read_bench(Path(bench), name or str(bundle.folder), bundle)
        if bench is not None
        else in_manifest(bundle.manifest, bundle)
    )
    batching = choose_batches(*measured)
    engine = bundle.model.engine
    return batching if engine is None else _within_engine(batching, engine.batch)


def write_repository(bundle: Bundle, folder: Path, batching: Batching) -> None:
    """Write the model into the model repository ``folder``.

    Raises:
        InputError: a label of several lines.
        BundleError: the bundle changed since it was loaded.
    """
    home = folder / bundle.manifest.name
    copy_bundle_file(bundle, bundle.model.file, home / "1" / model_name(bundle))
    for data in external_data(bundle):
        copy_bundle_file(bundle, data, home / "1" / PurePosixPath(data).name)
    (home / "labels.txt").write_text(_labels(bundle.manifest), encoding="utf-8")
    (home / "config.pbtxt").write_text(config_text(bundle, batching), encoding="utf-8")


def model_name(bundle: Bundle) -> str:
    """What the model is called in the repository."""
    return "model.plan" if bundle.model.engine is not None else "model.onnx"


def external_data(bundle: Bundle) -> list[str]:
    """The .data files beside the model whose names are in it: ONNX names the files of its weights in plain text."""
    if bundle.model.engine is not None:
        return []
    content, folder = bundle.model_path.read_bytes(), PurePosixPath(bundle.model.file).parent
    files = [PurePosixPath(name) for name in bundle.manifest.files if name.endswith(".data")]
    return [str(file) for file in files if file.parent == folder and file.name.encode() in content]


def config_text(bundle: Bundle, batching: Batching) -> str:
    """``config.pbtxt``: the model as Triton's ModelConfig in protobuf's text format."""
    manifest, model = bundle.manifest, bundle.model
    backend = _backend(bundle)
    shape = ", ".join(map(str, manifest.input.shape))
    sizes = sorted({1, *batching.preferred, batching.largest})
    parts = [
        f"name: {quote(manifest.name)}",
        f"platform: {quote('tensorrt_plan' if model.engine else 'onnxruntime_onnx')}",
        f"backend: {quote(backend)}",
        f"default_model_filename: {quote(model_name(bundle))}",
        f"max_batch_size: {batching.largest}",
        "version_policy { latest { num_versions: 1 } }",
        f"input [\n  {{ name: {quote(manifest.input.name)} data_type: TYPE_FP32 dims: [ {shape} ] }}\n]",
        f"output [\n  {{ name: {quote(manifest.output.name)} data_type: TYPE_FP32 "
        f"dims: [ {manifest.output.num_classes} ] label_filename: {quote('labels.txt')} }}\n]",
        f"instance_group [\n  {{ kind: {'KIND_GPU' if model.engine else 'KIND_CPU'} count: 1 }}\n]",
    ]
    if batching.preferred:
        preferred = ", ".join(map(str, batching.preferred))
        parts.append(
            "# A batch is made of what waits already; nobody is kept waiting for more.\n"
            f"dynamic_batching {{ preferred_batch_size: [ {preferred} ] max_queue_delay_microseconds: 0 }}"
        )
    parts.append("model_warmup [\n" + ",\n".join(_warm_up(manifest, size) for size in sizes) + "\n]")
    how = manifest.preprocessing.model_dump_json()
    parts += [_parameter("mcdeploy_bundle", manifest.id), _parameter("mcdeploy_preprocessing", how)]
    return "\n".join(parts) + "\n"


def quote(text: str) -> str:
    """A string literal of protobuf's text format; everything but plain ASCII as octal bytes."""
    plain = "".join(
        chr(byte) if 32 <= byte < 127 and byte not in b'\\"' else f"\\{byte:03o}" for byte in text.encode("utf-8")
    )
    return f'"{plain}"'


def choose_batches(images_per_second: dict[int, float], source: str) -> Batching:
    """Batch sizes from throughput by batch size.

    Args:
        images_per_second: by batch size; empty, or of batch 1 alone: our defaults.
        source: where they come from, or why there are none.

    The largest is the largest that was measured. Preferred is every size above 1 that reaches 95 % of the best
    throughput; none, when single images reach it as well: larger batches would only add latency then.
    """
    if images_per_second.keys() <= {1}:
        found = "only batch 1 was measured" if images_per_second else source
        return Batching(DEFAULT_MAX_BATCH, DEFAULT_PREFERRED, f"our defaults, since {found}", is_default=True)
    best = max(images_per_second.values())
    good = sorted(size for size, speed in images_per_second.items() if speed >= WORTH_IT * best)
    if 1 in good:
        return Batching(max(images_per_second), (), f"{source}, where single images are as fast as batches")
    return Batching(max(images_per_second), tuple(good), f"{source}, at most {best:,.0f} images/s")


def in_manifest(manifest: Manifest, bundle: Bundle) -> tuple[dict[int, float], str]:
    """Images per second by batch size of this model, as measured when the bundle was made."""
    rows = [row for row in manifest.latency if row.model == bundle.key]
    if not rows:
        return {}, "neither the bundle nor --bench holds a measurement of it"
    first = rows[0].provider, rows[0].threads
    same = {row.batch: row.images_per_second for row in rows if (row.provider, row.threads) == first}
    return same, f"measured when the bundle was made ({first[0]})"


def read_bench(path: Path, name: str, bundle: Bundle) -> tuple[dict[int, float], str]:
    """Images per second by batch size of one bundle, from the JSON of ``mcdeploy bench``.

    Raises:
        InputError: not a bench, or not one of this bundle.
    """
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); 'mcdeploy bench ... --json FILE' makes it"
        ) from None
    except ValueError:
        raise InputError(f"{path}: is not JSON; 'mcdeploy bench ... --json FILE' makes it") from None
    try:
        if tree["kind"] != "mcdeploy bench":
            raise ValueError(tree["kind"])
        speeds: dict[str, dict[int, float]] = {}
        for row in tree["latencies"]:
            speeds.setdefault(str(row["runner"]), {})[int(row["batch"])] = float(row["images_per_second"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path}: is no result of 'mcdeploy bench'; make one with its --json") from None
    fitting = [runner for runner in speeds if _is_run_of(runner, name, bundle)]
    if not fitting:
        raise InputError(
            f"{path}: measured {', '.join(speeds) or 'nothing'}, but not {name} on Triton's backend; "
            f"bench it with: mcdeploy bench {name} --batch 1 --batch 8 --json FILE"
        )
    return speeds[fitting[0]], f"from {path.name}, {fitting[0]}"


def _is_run_of(runner: str, name: str, bundle: Bundle) -> bool:
    """Whether bench's ``RUNNER [BACKEND]`` is the model called ``name``, on the backend that Triton will use."""
    target, _, backend = runner.rpartition(" [")
    folder, key = split_key(target)
    is_same = folder.resolve() == split_key(name)[0].resolve() and (key or bundle.manifest.serve) == bundle.key
    return is_same and backend == ("tensorrt]" if bundle.model.engine else "onnx]")


def _within_engine(batching: Batching, profile: tuple[int, int, int]) -> Batching:
    """An engine takes the batch sizes of its profile and no others."""
    least, best, most = profile
    if least != 1:
        raise InputError(
            f"the engine takes at least {least} images, and Triton sends single ones; build it for batch 1"
        )
    if batching.is_default:
        preferred = (best,) if best > 1 else ()
        return Batching(most, preferred, f"the engine's own profile, batch {least} to {most}, built for {best}")
    inside = tuple(size for size in batching.preferred if size <= most)
    return Batching(min(batching.largest, most), inside, batching.source)


def _backend(bundle: Bundle) -> str:
    return "tensorrt" if bundle.model.engine is not None else "onnxruntime"


def _warm_up(manifest: Manifest, size: int) -> str:
    shape = ", ".join(map(str, manifest.input.shape))
    return (
        f"  {{ name: {quote(f'batch_{size}')} batch_size: {size} inputs {{ key: {quote(manifest.input.name)} "
        f"value {{ data_type: TYPE_FP32 dims: [ {shape} ] random_data: true }} }} }}"
    )


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {quote(key)} value {{ string_value: {quote(value)} }} }}"


def _labels(manifest: Manifest) -> str:
    for label in manifest.labels:
        if len(label.splitlines()) > 1 or label != label.strip("\r\n"):
            raise InputError(
                f"the label {label!r} has several lines, and Triton reads one label a line; rename the class"
            )
    return "".join(f"{label}\n" for label in manifest.labels)
