"""Give what ``mcdeploy package --to triton`` writes to a real Triton: does it read it, and does it answer right?

    PYTHONPATH=tests python -m triton_package TRITON OUT.json [BUNDLE ...]     a tiny bundle is tried in any case

TRITON is the environment that ``oracle`` says how to make: a real Triton on the CPU, without the ONNX Runtime backend.
So, for each bundle:

1. The repository as it was written: Triton must take its config and then find no backend of that name.
2. The same with a preferred batch above the largest: Triton must refuse the config. Without this, 1 would show nothing.
3. The same with Triton's Python backend in place of ``onnxruntime``, running the very ``model.onnx`` that was packaged;
   batching, warm-up, labels and everything else as written. It must answer the bundle's self-test, all images at once,
   one by one, and 64 single ones at the same time, and name the classes as the bundle does.

What stays open is the C++ backend of ONNX Runtime itself, and every engine: those need Triton's own image, and a GPU.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from mcruntime.bundle import Bundle, load_bundle
from mcruntime.deploy.triton import package_triton
from oracle import Step, send, triton
from tiny_onnx import write_bundle
from tritonclient.http import InferenceServerClient, InferenceServerException, InferInput, InferRequestedOutput

SINGLES, CLIENTS = 64, 8
MODEL_PY = '''\
"""The packaged ONNX model through onnxruntime."""

import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        folder = os.path.join(args["model_repository"], args["model_version"])
        self.session = onnxruntime.InferenceSession(os.path.join(folder, "model.onnx"))

    def execute(self, requests):
        images = [pb_utils.get_input_tensor_by_name(request, {input!r}).as_numpy() for request in requests]
        (logits,) = self.session.run([{output!r}], {{{input!r}: np.concatenate(images)}})
        parts = np.split(logits, np.cumsum([len(part) for part in images])[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor({output!r}, part)]) for part in parts]
'''


def try_bundle(venv: Path, bundle: Bundle, work: Path) -> dict[str, Any]:
    """The three steps for one bundle; what was asked and what came back."""
    name = bundle.manifest.name
    as_written = work / "as_written"
    package_triton(bundle, as_written)
    wrong = shutil.copytree(as_written, work / "wrong")
    _change(wrong / name / "config.pbtxt", "preferred_batch_size: [ ", "preferred_batch_size: [ 4096, ")
    served = shutil.copytree(as_written, work / "served")
    config = served / name / "config.pbtxt"
    _change(config, 'backend: "onnxruntime"', 'backend: "python"')
    _change(config, 'platform: "onnxruntime_onnx"\n', "")
    _change(config, 'default_model_filename: "model.onnx"\n', "")
    names = {"input": bundle.manifest.input.name, "output": bundle.manifest.output.name}
    (served / name / "1" / "model.py").write_text(MODEL_PY.format(**names), encoding="utf-8")
    found: dict[str, Any] = {
        "bundle": bundle.manifest.id,
        "model": f"{name}, {bundle.key}",
        "as_written": _load(venv, as_written, name),
        "preferred_batch_above_largest": _load(venv, wrong, name),
    }
    with triton(venv, served) as (port, _), _client(port) as client:
        client.load_model(name)
        found["triton"] = client.get_server_metadata()["version"]
        found["served"] = _ask(client, bundle)
    found["passed"] = _passed(found)
    return found


def _client(port: int) -> InferenceServerClient:
    return InferenceServerClient(f"127.0.0.1:{port}", concurrency=CLIENTS, network_timeout=120)


def _change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise SystemExit(f"{old!r} is {text.count(old)} times in config.pbtxt, expected once")
    path.write_text(text.replace(old, new), encoding="utf-8")


def _load(venv: Path, repository: Path, name: str) -> dict[str, Any]:
    """What Triton answers to the request to load; its words without the place of the repository."""
    with triton(venv, repository) as (port, _):
        answer = send(port, Step(f"/v2/repository/models/{name}/load", "POST"))
    return {"status": answer["status"], "error": answer["json"]["error"].replace(str(repository), "REPOSITORY")}


def _ask(client: InferenceServerClient, bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    with np.load(bundle.folder / manifest.selftest, allow_pickle=False) as arrays:
        images, expected = arrays["images"], arrays["logits"]
    scale = float(np.abs(expected).max()) or 1.0

    def start(images: Any, classes: int = 0) -> Any:
        tensor = InferInput(manifest.input.name, list(images.shape), "FP32")
        tensor.set_data_from_numpy(images)
        output = InferRequestedOutput(manifest.output.name, class_count=classes)
        return client.async_infer(manifest.name, [tensor], outputs=[output])

    def infer(images: Any, classes: int = 0) -> Any:
        return start(images, classes).get_result().as_numpy(manifest.output.name)

    config = client.get_model_config(manifest.name)
    largest = config["max_batch_size"]
    parts = [images[start : start + largest] for start in range(0, len(images), largest)]
    whole = np.concatenate([infer(part) for part in parts])
    singles = np.concatenate([infer(images[i : i + 1]) for i in range(len(images))])
    before = _batches(client, manifest.name, 2 * len(images))
    order = [i % len(images) for i in range(SINGLES)]
    started = [start(images[i : i + 1]) for i in order]
    together = np.concatenate([one.get_result().as_numpy(manifest.output.name) for one in started])
    after = _batches(client, manifest.name, 2 * len(images) + SINGLES)
    (named,) = infer(images[:1], classes=3)
    top = [item.decode().split(":", 2) for item in named.ravel()]
    return {
        "max_batch_size": largest,
        "preferred_batch_size": config.get("dynamic_batching", {}).get("preferred_batch_size", []),
        "warmed_up": [one["batch_size"] for one in config["model_warmup"]],
        "images": len(images),
        "difference_allowed": bundle.model.selftest_max_abs,
        "difference_largest_batches": float(np.abs(whole - expected).max() / scale),
        "difference_one_by_one": float(np.abs(singles - expected).max() / scale),
        "difference_at_the_same_time": float(np.abs(together - expected[order]).max() / scale),
        "single_requests": SINGLES,
        "batches_that_ran_them": {size: count for size in after if (count := after[size] - before.get(size, 0))},
        "classes_named_as_in_the_bundle": all(manifest.labels[int(index)] == label for _, index, label in top)
        and [int(index) for _, index, _ in top] == np.argsort(-singles[0], kind="stable")[:3].tolist(),
    }


def _batches(client: InferenceServerClient, name: str, images: int) -> dict[int, int]:
    """How often each batch size ran, once this many images are counted: Triton counts after it has answered."""
    for _ in range(100):
        (one,) = client.get_inference_statistics(name)["model_stats"]
        if int(one["inference_count"]) >= images:
            break
        time.sleep(0.05)
    return {int(batch["batch_size"]): int(batch["compute_infer"]["count"]) for batch in one["batch_stats"]}


def _passed(found: dict[str, Any]) -> bool:
    as_written, wrong, served = found["as_written"], found["preferred_batch_above_largest"], found["served"]
    return bool(
        as_written["status"] == 400
        and "unable to find backend library for backend 'onnxruntime'" in as_written["error"]
        and wrong["status"] == 500
        and "failed to poll" in wrong["error"]
        and all(served[key] <= served["difference_allowed"] for key in served if key.startswith("difference_l"))
        and max(served["difference_one_by_one"], served["difference_at_the_same_time"]) <= served["difference_allowed"]
        and sum(size * count for size, count in served["batches_that_ran_them"].items()) == served["single_requests"]
        and max(served["batches_that_ran_them"]) <= served["max_batch_size"]
        and served["classes_named_as_in_the_bundle"]
    )


def main(arguments: list[str]) -> int:
    """See the docstring of the module."""
    if len(arguments) < 2:
        print(__doc__)
        return 2
    venv, out, bundles = Path(arguments[0]).resolve(), Path(arguments[1]), arguments[2:]
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        tiny = write_bundle(Path(scratch) / "tiny")
        for number, folder in enumerate((str(tiny), *bundles)):
            try:
                results.append(try_bundle(venv, load_bundle(folder), Path(scratch) / str(number)))
            except InferenceServerException as error:
                raise SystemExit(f"{folder}: Triton does not serve it: {error}") from None
    tree = {
        "command": "PYTHONPATH=tests python -m triton_package TRITON OUT.json [BUNDLE ...]",
        "what": "the repository of 'mcdeploy package --to triton', read and served by a real Triton on the CPU",
        "not_run": "Triton's ONNX Runtime and TensorRT backends; its Python backend ran the same model.onnx instead",
        "passed": all(result["passed"] for result in results),
        "bundles": results,
    }
    out.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))
    return 0 if tree["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
