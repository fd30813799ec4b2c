"""What KServe takes, as far as we use it, and how it puts a runtime and a service together. Plain data and functions.

Written down by hand from KServe 0.21: pkg/apis/serving/v1beta1 (component.go, predictor_model.go) and
v1alpha1/servingruntime_types.go; containers as in Kubernetes' core/v1. In a tree of types a name that ends in "!" must
be there, [x] is a list of x, {"*": x} a map of x, and a set holds the values that are allowed.
"""

from __future__ import annotations

import copy
from typing import Any

QUANTITIES = {"*": str}
PROBE = {
    "httpGet!": {"path!": str, "port!": int}, "periodSeconds": int, "timeoutSeconds": int, "failureThreshold": int,
    "initialDelaySeconds": int,
}  # fmt: skip
CONTAINER = {
    "image": str, "command": [str], "args": [str], "env": [{"name!": str, "value": str}],
    "readinessProbe": PROBE, "livenessProbe": PROBE, "startupProbe": PROBE,
    "ports": [{"name!": {"http1", "h2c"}, "containerPort!": int, "protocol!": {"TCP"}}],
    "resources": {"requests": QUANTITIES, "limits": QUANTITIES},
    "lifecycle": {"preStop": {"exec!": {"command!": [str]}}},
    "securityContext": {
        "runAsNonRoot": bool, "runAsUser": int, "runAsGroup": int, "readOnlyRootFilesystem": bool,
        "allowPrivilegeEscalation": bool, "privileged": bool, "capabilities": {"drop": [str]},
        "seccompProfile": {"type!": {"RuntimeDefault"}},
    },
}  # fmt: skip
PROTOCOLS = {"v1", "v2", "grpc-v1", "grpc-v2"}
SERVICE = {
    "apiVersion!": {"serving.kserve.io/v1beta1"},
    "kind!": {"InferenceService"},
    "metadata!": {"name!": str, "annotations": {"*": str}},
    "spec!": {
        "predictor!": {
            "minReplicas": int, "maxReplicas": int, "scaleTarget": int, "timeout": int,
            "scaleMetric": {"cpu", "memory", "concurrency", "rps"}, "terminationGracePeriodSeconds": int,
            "model": CONTAINER | {
                "modelFormat!": {"name!": str, "version": str}, "runtime": str, "runtimeVersion": str,
                "protocolVersion": PROTOCOLS, "storageUri": str,
            },
        },
    },
}  # fmt: skip
RUNTIME = {
    "apiVersion!": {"serving.kserve.io/v1alpha1"},
    "kind!": {"ServingRuntime"},
    "metadata!": {"name!": str},
    "spec!": {
        "annotations": {"*": str},
        "supportedModelFormats": [{"name!": str, "version": str, "autoSelect": bool, "priority": int}],
        "protocolVersions": [PROTOCOLS],
        "containers!": [CONTAINER | {"name!": {"kserve-container"}}],
    },
}  # fmt: skip


def misfits(tree: Any, form: Any, place: str = "") -> list[str]:
    """What is missing, unknown or of another type, a line each."""
    if isinstance(form, list):
        if not isinstance(tree, list):
            return [f"{place}: {tree!r} is no list"]
        return [line for number, item in enumerate(tree) for line in misfits(item, form[0], f"{place}[{number}]")]
    if isinstance(form, set):
        return [] if tree in form else [f"{place}: {tree!r} is none of {sorted(form)}"]
    if isinstance(form, type):
        return [] if type(tree) is form else [f"{place}: {tree!r} is no {form.__name__}"]
    if not isinstance(tree, dict):
        return [f"{place}: {tree!r} is no map"]
    known = {key.removesuffix("!"): inner for key, inner in form.items()}
    lines = [f"{place}.{key}: missing".lstrip(".") for key in _needed(form) if key not in tree]
    for key, value in tree.items():
        inner = known.get(key, known.get("*"))
        where = f"{place}.{key}".lstrip(".")
        lines += [f"{where}: unknown"] if inner is None else misfits(value, inner, where)
    return lines


def _needed(form: dict[str, Any]) -> list[str]:
    return [key.removesuffix("!") for key in form if key.endswith("!")]


def applied(runtime: dict[str, Any], service: dict[str, Any]) -> dict[str, Any]:
    """The runtime with the container fields of the service's model laid over its container, as KServe does it.

    Arguments are appended, ports are merged by their number, trees are merged, all else is replaced.
    """
    tree = copy.deepcopy(runtime)
    container = tree["spec"]["containers"][0]
    for key, value in service["spec"]["predictor"]["model"].items():
        if key not in CONTAINER:
            continue
        if key == "args":
            container[key] = [*container.get(key, []), *value]
        elif key == "ports":
            merged = {port["containerPort"]: port for port in container.get(key, [])}
            container[key] = list((merged | {port["containerPort"]: port for port in value}).values())
        else:
            container[key] = _laid_over(container.get(key), value)
    return tree


def _laid_over(base: Any, more: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(more, dict)):
        return copy.deepcopy(more)
    return {key: _laid_over(base.get(key), more.get(key, base.get(key))) for key in base | more}
