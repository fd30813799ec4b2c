"""Where two forms of one model part: the first tensor, by name, that is further off than allowed.

Two ONNX files made from each other share the names of their values, so all float tensors can be held side by side. A
PyTorch model and its compiled or exported form share module paths: what a module hands on is compared, but not what a
convolution hands to the batch norm that compile folds into it. Tensors are fetched a few at a time, so a big net needs
no more memory than its largest few feature maps.
"""

# B = batch, C = channels, H/W = height/width.
from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mcdeploy.backends.fp16 import open_session
from mcdeploy.backends.onnx import SCOPES

AT_ONCE = 16  # tensors fetched by one run


@dataclass(frozen=True)
class Distance:
    """How far one tensor of the second model is from the first's, relative to its largest |value| in the first."""

    name: str  # of the node or module that makes it
    max_abs: float  # infinite where the second holds NaN or infinity, or has another shape

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Departure:
    """All tensors that both models have, in the order in which they are computed, and the first beyond the limit."""

    first: Distance | None  # None: none of them is, so it happens between the last one and the logits
    distances: tuple[Distance, ...]
    limit: float

    def __str__(self) -> str:
        if not self.distances:
            return "the two have no tensor in common to search by"
        if self.first is None:
            return f"none of {len(self.distances)} tensors in between is off by more than {self.limit:.1e}"
        first = self.first
        return f"the first tensor that departs is that of {first.name}, off by {first.max_abs:.1e} of its largest"

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return asdict(self)


def between_files(before: Path, after: Path, images: NDArray[np.float32], limit: float) -> Departure:
    """Two ONNX files whose values have the same names, such as one and its fp16 or int8 form.

    Args:
        images: [B, C, H, W]; two or three are enough.
        limit: what counts as a departure, relative to a tensor's largest |value|.
    """
    first, second = onnx.load(before), onnx.load(after)
    theirs = _float_values(second)
    rounded = _after_rounding(second)
    common = {value: name for value, name in _float_values(first).items() if value in theirs}

    def fetch(part: Sequence[str]) -> dict[str, NDArray[Any]]:
        values = _fetch(second, [rounded.get(name, name) for name in part], images)
        return {name: values[rounded.get(name, name)] for name in part if rounded.get(name, name) in values}

    return _departure(_pairs(common, lambda part: _fetch(first, part, images), fetch), limit)


def between_modules(before: nn.Module, after: nn.Module, images: Tensor, limit: float) -> Departure:
    """Two PyTorch models whose modules have the same paths, such as one and its compiled form."""
    theirs = set(_order(after, images)) - _before_norms(before)
    common = [name for name in _order(before, images) if name in theirs]
    found = _pairs(
        {name: name for name in common},
        lambda part: _watch(before, part, images),
        lambda part: _watch(after, part, images),
    )
    return _departure(found, limit)


def between_module_and_file(before: nn.Module, after: Path, images: Tensor, limit: float) -> Departure:
    """A PyTorch model and the ONNX file that was made from it by ``export_onnx``."""
    model = onnx.load(after)
    made_by = _values_of_modules(model)
    common = {name: name for name in _order(before, images) if name in made_by}

    def fetch(part: Sequence[str]) -> dict[str, NDArray[Any]]:
        values = _fetch(model, [made_by[name] for name in part], images.numpy())
        ours = _watch(before, part, images)  # a module may hand on another value than its last node's
        return {
            name: values[made_by[name]]
            for name in part
            if name in ours and made_by[name] in values and values[made_by[name]].shape == ours[name].shape
        }

    return _departure(_pairs(common, lambda part: _watch(before, part, images), fetch), limit)


def _departure(distances: Iterable[Distance], limit: float) -> Departure:
    found = tuple(distances)
    return Departure(next((one for one in found if not one.max_abs <= limit), None), found, limit)


def _pairs(common: Mapping[str, str], first: Any, second: Any) -> Iterator[Distance]:
    keys = list(common)
    for start in range(0, len(keys), AT_ONCE):
        part = keys[start : start + AT_ONCE]
        expected, actual = first(part), second(part)
        for key in part:
            if key in expected and key in actual:
                yield Distance(common[key], _distance(expected[key], actual[key]))


def _distance(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    if expected.shape != actual.shape or not np.isfinite(actual).all():
        return float("inf")
    if not expected.size:
        return 0.0
    wide = expected.astype(np.float64)
    return float(np.abs(wide - actual.astype(np.float64)).max() / max(np.abs(wide).max(), 1e-30))


# ---------------------------------------------------------------------------------------------------------- ONNX files


def _float_values(model: onnx.ModelProto) -> dict[str, str]:
    """Every value of the main graph that may be compared, with the name of its node, in order of computation."""
    shaped = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    skip = ("Cast", "QuantizeLinear", "DequantizeLinear", "Constant", "Shape")
    return {
        node.output[0]: node.name
        for node in model.graph.node
        if node.op_type not in skip and node.output and shaped.get(node.output[0], floats[0]) in floats
    }


def _after_rounding(model: onnx.ModelProto) -> dict[str, str]:
    """Values that are rounded to 8 bits, and the value after it. Before it, a ReLU may not have happened yet."""
    quantised = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    return {
        quantised[node.input[0]]: node.output[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantised
    }


def _values_of_modules(model: onnx.ModelProto) -> dict[str, str]:
    """Module path to the value it hands on: what the last node inside it makes."""
    made_by: dict[str, str] = {}
    for node in model.graph.node:
        scopes: list[str] = next(
            (ast.literal_eval(prop.value) for prop in node.metadata_props if prop.key == SCOPES), []
        )
        for path in scopes[:-1]:
            if path:
                made_by[path] = node.output[0]
    return made_by


def _fetch(model: onnx.ModelProto, values: Sequence[str], images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Some values of a file for some images, on the CPU, without fusions that would make a value disappear."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=value) for value in values)
    answers = open_session(shown, optimise=False).run(list(values), {model.graph.input[0].name: images})
    return {
        value: answer
        for value, answer in zip(values, answers, strict=True)
        if isinstance(answer, np.ndarray) and answer.dtype.kind == "f"
    }


# ------------------------------------------------------------------------------------------------------------- PyTorch


def _order(model: nn.Module, images: Tensor) -> list[str]:
    """Paths of the modules that hand on a tensor, as they finish: what is inside a module comes before it."""
    return list(_watch(model, [name for name, _ in model.named_modules() if name], images[:1], values=False))


def _before_norms(model: nn.Module) -> set[str]:
    """Convolutions: compile may fold the batch norm behind one into it, so what it hands on changes by right."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)}


def _watch(model: nn.Module, names: Sequence[str], images: Tensor, *, values: bool = True) -> dict[str, NDArray[Any]]:
    """What some modules hand on for some images, in the order in which they finish.

    Only of modules that run once and hand on a tensor: one that runs several times has no one answer.

    Args:
        values: False: empty arrays in place of what is handed on.
    """
    seen: dict[str, NDArray[Any]] = {}
    calls = Counter[str]()

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            calls[name] += 1
            if isinstance(output, Tensor) and output.is_floating_point():
                seen[name] = output.detach().numpy().copy() if values else np.empty(0)

        return hook

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: array for name, array in seen.items() if calls[name] == 1}
