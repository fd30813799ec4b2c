"""Everything that KServe needs to serve a bundle: by its own Triton runtime, and by the mcdeploy server.

OUT/README.md                           which command to run in which order
OUT/storage/triton/, storage/bundle/    to copy to where ``storageUri`` points: a Triton model repository, the bundle
OUT/standard/, OUT/knative/             triton.yaml and server.yaml, an InferenceService each, for KServe's two modes
OUT/runtime.yaml                        the ServingRuntime of the mcdeploy server

What always holds is YAML in templates/; names and addresses are put into the parsed tree and written by
``yaml.safe_dump``, so that no value can become another key. The server's part is left out without an image for it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import yaml

from mcruntime.bundle import Bundle
from mcruntime.deploy import Packaged, copy_bundle, new_folder
from mcruntime.deploy.triton import Batching, batching_of, external_data, write_repository
from mcruntime.errors import InputError
from mcruntime.manifest import SCHEMA_VERSION
from mcruntime.server.options import ServerOptions

MODES = ("standard", "knative")
# KServe's own default, 23.05, is older than ONNX opset 20 (October 2023), which bundles use.
TRITON_RELEASE = "26.09-py3"
LONGEST_NAME = 40  # with "-triton" and the "-predictor-00001" of KServe and Knative it stays within DNS's 63
MIB = 1 << 20
SERVER_BYTES = 256 * MIB  # of the server itself, without model and requests
# Up to 16 bytes a pixel are held while an image is decoded (WebP; JPEG and PNG 8), and each core decodes one. The
# server's own limit would ask for 2 GiB; this one takes what cameras make.
MAX_PIXELS, BYTES_A_PIXEL, CORES = 25_000_000, 16, 2
MODEL_COPIES = 4  # the file as it is read, the engine's own form of it, and what it computes with
# One folder at a time can be fetched from these; oci:// and hf:// name one thing that has to be made elsewhere.
STORAGE = re.compile(
    r"(?:(?P<scheme>s3|gs|pvc|hdfs|webhdfs)://|https://[a-z0-9]+\.blob\.core\.windows\.net/)"
    r"(?P<rest>[A-Za-z0-9][A-Za-z0-9._~%+=@:-]*(?:/[A-Za-z0-9._~%+=@:-]+)*)/?"
)
PART = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
IMAGE = re.compile(
    rf"{PART}(?::[0-9]{{1,5}}/{PART})?(?:/{PART})*"
    r"(?P<tag>:[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?(?P<digest>@sha256:[0-9a-f]{64})?"
)
COPY = {  # by scheme
    "s3": "aws s3 sync storage {uri}",
    "gs": "gcloud storage rsync --recursive storage {uri}",
    "hdfs": "hdfs dfs -mkdir -p {uri} && hdfs dfs -put storage/* {uri}",
    "webhdfs": "hdfs dfs -mkdir -p {uri} && hdfs dfs -put storage/* {uri}",
    "https": "az storage copy --recursive --source 'storage/*' --destination {uri}",
    "pvc": "kubectl cp storage/. POD:MOUNT/{path}   # POD mounts the claim {claim} at MOUNT",
}
NOT_RUN = "no KServe ran it here: the files are held against KServe's types and CRDs only, so try them first"


def package_kserve(
    bundle: Bundle,
    out: Path | str,
    *,
    storage_uri: str,
    image: str = "",
    name: str = "",
    bench: Path | str | None = None,
) -> Packaged:
    """Write a folder that brings the bundle's model ``bundle.key`` to KServe.

    Args:
        storage_uri: where its ``storage/`` will be copied to, as the cluster reads it: s3://, gs://, pvc://, hdfs://,
            webhdfs:// or an Azure blob's https://.
        image: the mcdeploy server's image with tag or digest, as ``package --to docker`` lets one build it; "": only
            Triton's part is written.
        name, bench: as for ``package_triton``; batch sizes also say how many requests a pod shall have in flight.

    Raises:
        InputError: an address or image that KServe could not use, a TensorRT engine with an image, ``out`` holds
            something else, or what ``package_triton`` raises.
    """
    uri = check_storage(storage_uri)
    if image:
        check_image(image)
        if bundle.model.engine is not None:
            raise InputError(
                f"{bundle.folder}: the model {bundle.key!r} is a TensorRT engine, which runs on one kind of GPU only "
                "and is in no image; leave --image away to have it served by Triton"
            )
    batching = batching_of(bundle, name, bench)
    service = kubernetes_name(bundle.manifest.name)
    chosen: dict[str, Any] = {
        "batching": asdict(batching),
        "storage_uri": uri,
        "image": image,
        "service": service,
        "triton_release": TRITON_RELEASE,
        "ran_in_kserve": False,
    }
    with new_folder(Path(out), "kserve", bundle, chosen) as folder:
        write_repository(bundle, folder / "storage" / "triton", batching)
        for mode in MODES:
            (folder / mode).mkdir()
            _write(folder / mode / "triton.yaml", _triton_service(bundle, service, uri, mode, _target(batching)))
            if image:
                _write(folder / mode / "server.yaml", _server_service(bundle, service, uri, mode, _target(batching)))
        if image:
            copy_bundle(bundle, folder / "storage" / "bundle")
            _write(folder / "runtime.yaml", _runtime(bundle, image))
        (folder / "README.md").write_text(_readme(bundle, service, uri, image, batching), encoding="utf-8")
    notes = [
        f"InferenceServices {f'{service} (mcdeploy server) and ' if image else ''}{service}-triton, "
        f"{_target(batching)} requests in flight a pod on Knative: {_why(batching)}"
    ]
    if not image:
        notes.append("only Triton's part was written; give --image to have the mcdeploy server's, too")
    if bundle.model.engine is not None:
        notes.append(_engine_note(bundle))
    notes += [f"next: {Path(out) / 'README.md'}", NOT_RUN]
    return Packaged(Path(out), tuple(notes))


def kubernetes_name(name: str) -> str:
    """A bundle's name as KServe takes it for an InferenceService: a-z, 0-9 and "-", a letter first, 40 at most.

    Names that are too long are cut and end in six digits of their hash, so that they stay apart.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"m-{plain}".rstrip("-")
    if len(plain) > LONGEST_NAME:
        plain = f"{plain[: LONGEST_NAME - 7].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
    return plain


def check_storage(uri: str) -> str:
    """The address without a slash at its end.

    Raises:
        InputError: not an address that KServe fetches a folder from.
    """
    match = STORAGE.fullmatch(uri)
    if match is None or any(part in (".", "..") for part in match["rest"].split("/")):
        raise InputError(
            f"--storage-uri {uri!r}: is no folder that KServe reads; give one such as s3://BUCKET/FOLDER, gs://, "
            "pvc://CLAIM/FOLDER, hdfs://, webhdfs:// or https://ACCOUNT.blob.core.windows.net/CONTAINER/FOLDER"
        )
    return uri.rstrip("/")


def check_image(image: str) -> None:
    """Refuse what is no image, or one that may be another tomorrow.

    Raises:
        InputError: not an image's name, or one without tag and digest.
    """
    match = IMAGE.fullmatch(image)
    if match is None:
        raise InputError(f"--image {image!r}: is no image's name; give one such as registry.example.com/classifier:1")
    if match["tag"] in (None, ":latest") and match["digest"] is None:
        raise InputError(f"--image {image}: may be another one tomorrow; add a tag (not latest) or a digest")


def _runtime_name(bundle: Bundle) -> str:
    if bundle.key == bundle.manifest.serve:
        return "mcdeploy"
    return kubernetes_name(f"mcdeploy-{bundle.key}")


def _runtime(bundle: Bundle, image: str) -> dict[str, Any]:
    tree = _template("kserve_runtime.yaml")
    tree["metadata"]["name"] = _runtime_name(bundle)
    tree["spec"]["supportedModelFormats"] = [_format(bundle) | {"autoSelect": True, "priority": 1}]
    (container,) = tree["spec"]["containers"]
    container["image"] = image
    container["args"] += ["--max-pixels", str(MAX_PIXELS)]
    container["resources"]["limits"]["cpu"] = str(CORES)
    if bundle.key != bundle.manifest.serve:
        container["args"][0] += f"@{bundle.key}"
    return tree


def _format(bundle: Bundle) -> dict[str, Any]:
    """The bundle as a model format of KServe: its schema is its version."""
    name = "mcdeploy" if bundle.key == bundle.manifest.serve else _runtime_name(bundle)
    return {"name": name, "version": str(SCHEMA_VERSION)}


def _memory_mib(bundle: Bundle) -> int:
    """What a pod of the server needs at most: itself, all bodies and images that it takes in, the model; by 256."""
    weights = sum(bundle.manifest.files[name].bytes for name in (bundle.model.file, *external_data(bundle)))
    requests = ServerOptions().max_inflight_bytes + CORES * MAX_PIXELS * BYTES_A_PIXEL
    total = SERVER_BYTES + requests + MODEL_COPIES * weights
    return -(-total // (256 * MIB)) * 256


def _server_service(bundle: Bundle, service: str, uri: str, mode: str, target: int) -> dict[str, Any]:
    tree = _service(service, f"{uri}/bundle", mode, target)
    memory = {"memory": f"{_memory_mib(bundle)}Mi"}
    tree["spec"]["predictor"]["model"] |= {
        "modelFormat": _format(bundle),
        "runtime": _runtime_name(bundle),
        "resources": {"requests": memory, "limits": dict(memory)},  # CPUs come from the runtime
    }
    return tree


def _triton_service(bundle: Bundle, service: str, uri: str, mode: str, target: int) -> dict[str, Any]:
    tree = _merge(_service(f"{service}-triton", f"{uri}/triton", mode, target), _template("kserve_triton.yaml"))
    model = tree["spec"]["predictor"]["model"]
    model["modelFormat"] = {"name": "tensorrt" if bundle.model.engine else "onnx"}
    model["runtimeVersion"] = TRITON_RELEASE
    if bundle.model.engine is not None:
        model["resources"] = {"limits": {"nvidia.com/gpu": "1"}}
    return tree


def _service(name: str, uri: str, mode: str, target: int) -> dict[str, Any]:
    tree = _merge(_template("kserve_service.yaml"), _template(f"kserve_{mode}.yaml"))
    tree["metadata"]["name"] = name
    predictor = tree["spec"]["predictor"]
    predictor.setdefault("scaleTarget", target)  # where CPU is what is scaled by, the template says how much
    predictor["model"]["storageUri"] = uri
    return tree


def _target(batching: Batching) -> int:
    """Requests in flight a pod is good for: one full batch, or one that runs and one that waits."""
    return max(2, *batching.preferred) if batching.preferred else 2


def _why(batching: Batching) -> str:
    return f"a batch, {batching.source}" if batching.preferred else f"one runs, one waits, {batching.source}"


def _engine_note(bundle: Bundle) -> str:
    engine = bundle.model.engine
    assert engine is not None  # asked for by callers
    return (
        f"the engine runs on {engine.gpu} with TensorRT {engine.tensorrt} only; put the Triton release that has this "
        f"TensorRT into runtimeVersion in place of {TRITON_RELEASE}"
    )


def _merge(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``more`` laid over ``base``; trees are merged, all else is replaced."""
    both = dict(base)
    for key, value in more.items():
        is_tree = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = _merge(both[key], value) if is_tree else value
    return both


def _read(name: str) -> str:
    return resources.files("mcruntime.deploy").joinpath("templates", name).read_text(encoding="utf-8")


def _template(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load(_read(name))
    return tree


def _write(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(tree, sort_keys=False, width=120), encoding="utf-8")


def _readme(bundle: Bundle, service: str, uri: str, image: str, batching: Batching) -> str:
    rows = ["| `storage/triton/` | a Triton model repository, read by `*/triton.yaml` |"]
    if image:
        rows += [
            "| `storage/bundle/` | the bundle, read by `*/server.yaml` |",
            "| `runtime.yaml` | how KServe runs the mcdeploy server, whatever bundle; once for each namespace |",
            "| `standard/server.yaml`, `knative/server.yaml` | the model on the mcdeploy server |",
        ]
    rows.append("| `standard/triton.yaml`, `knative/triton.yaml` | the model on KServe's Triton |")
    return Template(_read("kserve_readme.md")).substitute(
        model=bundle.manifest.name,
        bundle=bundle.manifest.id[:12],
        key=bundle.key,
        rows="\n".join(rows),
        target=_target(batching),
        why=_why(batching),
        steps="\n\n".join(f"{number}. {step}" for number, step in enumerate(_steps(service, uri, image), start=1)),
        notes="\n".join(f"- {note}" for note in _to_know(bundle, service, image)),
    )


def _steps(service: str, uri: str, image: str) -> list[str]:
    scheme, _, rest = uri.partition("://")
    claim, _, path = rest.partition("/")
    copy = COPY[scheme].format(uri=uri, claim=claim, path=path)
    first = "server" if image else "triton"
    applied = service if image else f"{service}-triton"
    steps = [f"Copy the files to where the cluster reads them, here run from this folder:\n\n       {copy}"]
    if image:
        steps += [
            "Build the server's image and push it (`mcdeploy package BUNDLE --to docker --out IMAGE_FOLDER` makes the "
            f"folder):\n\n       docker build -f IMAGE_FOLDER/Dockerfile.cpu -t {image} IMAGE_FOLDER\n"
            f"       docker push {image}",
            "Tell KServe how to run it, in the namespace that shall serve:\n\n       kubectl apply -f runtime.yaml",
        ]
    steps += [
        f"Start the service, in the mode that the cluster has:\n\n       kubectl apply -f standard/{first}.yaml\n"
        f"       kubectl apply -f knative/{first}.yaml   # instead, where Knative is installed",
        "Wait until it is ready, and ask it by the host in the column URL:\n\n"
        f"       kubectl wait --for=condition=Ready --timeout=300s inferenceservice/{applied}\n"
        f"       kubectl get inferenceservice {applied}\n"
        "       curl http://HOST/v2/health/ready",
    ]
    return steps


def _to_know(bundle: Bundle, service: str, image: str) -> list[str]:
    name = bundle.manifest.name
    notes = [
        f"Triton calls the model `{name}`: `/v2/models/{name}/infer`. Images come to it prepared; how, is in the "
        "parameter `mcdeploy_preprocessing` of its `config.pbtxt`.",
        f"`runtimeVersion: {TRITON_RELEASE}` asks for that release of Triton in place of KServe's default of 2023; "
        "change it to the one that your cluster has.",
        "A private bucket needs a service account with its credentials: `serviceAccountName` in `spec.predictor`.",
        "The services let in everybody who reaches them. Put KServe's gateway with authentication in front.",
    ]
    if image:
        notes.insert(
            0,
            f"The mcdeploy server calls the model `{service}`, as KServe does: `/v2/models/{service}/infer` takes "
            f"tensors, `/v2/models/{service}/predict` takes images as they are, of {MAX_PIXELS // 1_000_000} million "
            "pixels at most (`--max-pixels`, and the memory that it needs).",
        )
        notes.append(
            "Several bundles below one address: copy them to folders there, give the address as `storageUri` and put "
            "`--repository`, `/mnt/models` into `args` of `runtime.yaml` in place of the first one."
        )
    if bundle.model.engine is not None:
        notes.append(f"{_engine_note(bundle)[0].upper()}{_engine_note(bundle)[1:]}.")
    return notes
