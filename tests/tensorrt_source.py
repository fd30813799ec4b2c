"""Hold source code against the public names of TensorRT 10.16 and 11.4, of cuda-python and of NVML.

There is no GPU where the tests run, so nothing tells a misspelt or removed name at run time. Here every attribute of
every variable that holds something of TensorRT is looked up in both versions, and every call is bound to the published
parameters. ``VARIABLES`` says which variable holds what; a variable or function that is in neither table is an error,
so the tables cannot fall behind.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

import pynvml
from cuda.bindings import runtime as real_cuda
from recording_tensorrt import NAMES, cuda_arity, signature_of

VARIABLES = {
    "trt": "trt", "cudart": "cudart", "pynvml": "pynvml", "logger": "ILogger", "builder": "Builder",
    "network": "INetworkDefinition", "parser": "OnnxParser", "parser_error": "ParserError", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "tensor": "ITensor", "timings": "ITimingCache", "built": "IHostMemory",
    "monitor": "IProgressMonitor", "runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext",
    "inspector": "EngineInspector",
}  # fmt: skip
FUNCTIONS = {
    "load_tensorrt": "trt", "load_cudart": "cudart", "shared_logger": "ILogger", "new_runtime": "Runtime",
    "_configure": "IBuilderConfig", "_new_context": "IExecutionContext",
}  # fmt: skip
# Any, and nothing of TensorRT: CUDA's own handles and results, which have no members that we use, and our own classes.
OTHERS = {"result", "kind", "severity", "checked", "_event", "_capture", "graph", "of_the_engine"}
OWN_MEMBERS = {"ILogger": {"errors", "warnings"}}  # of our subclasses
CLASSES = {name for names in NAMES.values() for name in names if name}


def problems(source: str) -> list[str]:
    """What in a module is not in the published names, line by line."""
    tree = ast.parse(source)
    return sorted(set(_untold(tree)) | set(_unknown(tree)) | set(_misnamed(tree)))


def _kind(node: ast.expr | None) -> str | None:
    """What an expression holds: "trt", "cudart", a class of TensorRT, "enum X", or None where it is none of these."""
    match node:
        case ast.Name(id=name):
            return VARIABLES.get(name)
        case ast.Attribute(value=base, attr=attr):
            owner = _kind(base)
            if owner == "trt" and attr in CLASSES:
                return f"type {attr}"
            if owner is None:
                return VARIABLES.get(attr.lstrip("_"))
            return f"cudart.{attr}" if owner == "cudart" else None
        case ast.Call(func=ast.Name(id=name)):
            return FUNCTIONS.get(name)
        case ast.Call(func=ast.Attribute(value=base, attr=attr) as called):
            made = _kind(called)
            if made is not None and made.startswith("type "):
                return made.removeprefix("type ")
            owner = _kind(base)
            text = NAMES["11.4"].get(owner, {}).get(attr, "")
            returned = text.rpartition(" -> ")[2]
            return returned if returned in CLASSES else FUNCTIONS.get(attr)
        case ast.IfExp(body=body, orelse=other):
            return _kind(body) or _kind(other)
    return None


def _untold(tree: ast.Module) -> Iterator[str]:
    """Parameters and functions of any type that the tables do not know."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            for argument in arguments:
                if _is_any(argument.annotation) and argument.arg not in VARIABLES.keys() | OTHERS:
                    yield f"line {node.lineno}: what does the parameter {argument.arg} of {node.name} hold?"
            if _is_any(node.returns) and node.name not in FUNCTIONS.keys() | OTHERS | VARIABLES.keys():
                yield f"line {node.lineno}: what does {node.name} return?"
        elif isinstance(node, ast.AnnAssign) and _is_any(node.annotation):
            name = node.target.attr if isinstance(node.target, ast.Attribute) else getattr(node.target, "id", "")
            if name.lstrip("_") not in VARIABLES.keys() | OTHERS:
                yield f"line {node.lineno}: what does {name} hold?"


def _is_any(annotation: ast.expr | None) -> bool:
    return isinstance(annotation, ast.Name) and annotation.id == "Any"


def _unknown(tree: ast.Module) -> Iterator[str]:
    """Variables that are given something of TensorRT and are not in the table as that."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for to, value in pairs:
                kind = _kind(value)
                if (
                    kind is None
                    or kind.startswith(("cudart.", "type "))
                    or not isinstance(to, ast.Name | ast.Attribute)
                ):
                    continue
                name = to.id if isinstance(to, ast.Name) else to.attr.lstrip("_")
                if VARIABLES.get(name) != kind and not isinstance(to, ast.Attribute):
                    yield f"line {node.lineno}: {name} is given a {kind}, but is not in the table as that"
                if isinstance(to, ast.Attribute) and _kind(to.value) is None and VARIABLES.get(name) != kind:
                    yield f"line {node.lineno}: {name} is given a {kind}, but is not in the table as that"


def _misnamed(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield from (f"line {node.lineno}: {text}" for text in _lookup(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield from (f"line {node.lineno}: {text}" for text in _bind(node, node.func))


def _lookup(node: ast.Attribute) -> Iterator[str]:
    owner = _kind(node.value)
    if owner is None:
        return
    if owner == "pynvml" or owner.startswith("cudart"):
        there: Any = pynvml if owner == "pynvml" else real_cuda
        for part in owner.split(".")[1:]:
            there = getattr(there, part, None)
        if not hasattr(there, node.attr):
            yield f"{owner} has no {node.attr}"
        return
    for version, names in NAMES.items():
        if owner == "trt":
            known = node.attr in names or node.attr == "__version__"
        else:
            of = owner.removeprefix("type ")
            known = node.attr in names[of] or node.attr in OWN_MEMBERS.get(of, set())
        if not known:
            yield f"TensorRT {version}: {owner} has no {node.attr}"


def _bind(node: ast.Call, called: ast.Attribute) -> Iterator[str]:
    owner = _kind(called.value)
    if any(isinstance(argument, ast.Starred) for argument in node.args):
        if owner is not None:
            yield f"{called.attr}: cannot count the arguments"
        return
    if owner == "cudart":
        if not hasattr(real_cuda, called.attr):
            return  # _lookup has said so
        if len(node.args) != cuda_arity(called.attr) or node.keywords:
            yield f"cudart.{called.attr} takes {cuda_arity(called.attr)} arguments"
        return
    made = _kind(called)
    for version, names in NAMES.items():
        if made is not None and made.startswith("type "):
            text = names.get(made.removeprefix("type "), {}).get("__init__", "(*)")
            own_self = 0
        elif owner is not None and owner.startswith("type ") and called.attr == "__init__":
            text, own_self = names.get(owner.removeprefix("type "), {}).get("__init__", "(*)"), 1
        elif owner in CLASSES:
            text, own_self = names.get(owner, {}).get(called.attr, "(*)"), 0
        else:
            continue
        signature = signature_of(text) if text.startswith("(") else None
        if signature is None:
            continue
        try:
            signature.bind(*node.args[own_self:], **{word.arg: word.value for word in node.keywords if word.arg})
        except TypeError as error:
            yield f"TensorRT {version}: {called.attr}{text}: {error}"
