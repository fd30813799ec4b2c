"""The Open Inference Protocol (v2) in JSON: pure functions between bytes and arrays, no I/O.

Texts and member order follow a real Triton 2.51, since clients are written against it. Different on purpose: what the
client got wrong is always 400 (Triton answers 500 to malformed JSON), and NaN or infinite values are refused.
"""

# B = batch, C = channels, H/W = height/width.
from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import Any, Never

import numpy as np
from numpy.typing import NDArray

from mcruntime.errors import InputError

VERSION = "1"  # a bundle has one; another version is another bundle
BINARY_ONLY = ("FP16", "BF16")  # the protocol has no JSON form for these


class RequestError(InputError):
    """What the client sent cannot be answered; ``status`` is the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ModelSpec:
    """What the protocol needs to know of a model."""

    name: str
    input_name: str
    shape: tuple[int, int, int]  # C, H, W
    output_name: str
    num_classes: int
    max_batch_size: int


@dataclass(frozen=True)
class InferRequest:
    """A checked request."""

    id: str | None
    images: NDArray[np.float32]  # [B, C, H, W], finite, 1 <= B <= max_batch_size


def parse_infer(body: bytes, spec: ModelSpec) -> InferRequest:
    """Read an infer request whose tensors are JSON.

    ``binary_data_output`` and ``binary_data``, which clients set without being asked, are wishes that this server does
    not fulfil yet: its answer says that it is JSON, and clients read it as such.

    Raises:
        RequestError: 400 and what is wrong.
    """
    tree = _parse_json(body)
    request_id = tree.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise RequestError("failed to parse the request JSON buffer: 'id' must be a string")
    _check_parameters(tree)
    inputs = _objects(tree, "inputs")
    if len(inputs) != 1:
        raise RequestError(f"expected 1 inputs but got {len(inputs)} inputs for model '{spec.name}'")
    for output in _objects(tree, "outputs") if tree.get("outputs") is not None else []:
        if output.get("name") != spec.output_name:
            raise RequestError(f"unexpected inference output {_quote(output.get('name'))} for model '{spec.name}'")
        if "classification" in _check_parameters(output):
            raise RequestError("the classification extension is not supported yet; POST an image to .../predict")
    return InferRequest(request_id, _parse_images(inputs[0], spec))


def format_infer(request: InferRequest, spec: ModelSpec, logits: NDArray[np.float32]) -> bytes:
    """The answer to a request: float32 logits [B, num_classes] widened to double, flat, row-major."""
    answer: dict[str, Any] = {} if request.id is None else {"id": request.id}
    answer |= {"model_name": spec.name, "model_version": VERSION}
    data = logits.astype(np.float64).ravel().tolist()
    answer["outputs"] = [
        {"name": spec.output_name, "datatype": "FP32", "shape": list(logits.shape), "data": data}
    ]  # fmt: skip
    return dump(answer)


def format_metadata(spec: ModelSpec) -> bytes:
    """The model's inputs and outputs; -1 is the batch."""
    return dump(
        {
            "name": spec.name,
            "versions": [VERSION],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": spec.input_name, "datatype": "FP32", "shape": [-1, *spec.shape]}],
            "outputs": [{"name": spec.output_name, "datatype": "FP32", "shape": [-1, spec.num_classes]}],
        }
    )


def dump(tree: Any) -> bytes:
    """JSON without white space and without NaN."""
    return json.dumps(tree, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode(errors="replace")


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise RequestError("failed to parse the request JSON buffer: nested too deep") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"failed to parse the request JSON buffer: {error.msg} at {error.pos}") from None
    except ValueError:  # not UTF-8, or a number of more digits than Python reads
        raise RequestError("failed to parse the request JSON buffer: not UTF-8 text or not a number") from None
    if not isinstance(tree, dict):
        raise RequestError("failed to parse the request JSON buffer: expected an object")
    return tree


def _refuse_constant(constant: str) -> Never:
    raise RequestError(f"failed to parse the request JSON buffer: {constant} is not a JSON number")


def _objects(tree: dict[str, Any], key: str) -> list[dict[str, Any]]:
    items = tree.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RequestError(f"failed to parse the request JSON buffer: '{key}' must be an array of objects")
    return items


def _check_parameters(tree: dict[str, Any]) -> dict[str, Any]:
    parameters = tree.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise RequestError("failed to parse the request JSON buffer: 'parameters' must be an object")
    for name, value in parameters.items():
        if not isinstance(value, str | int | float):  # bool is an int
            raise RequestError(
                f"parameter {_quote(name)} has invalid type. It should be either 'int', 'bool', or 'string'."
            )
    return parameters


def _parse_images(tensor: dict[str, Any], spec: ModelSpec) -> NDArray[np.float32]:
    name, datatype, shape = tensor.get("name"), tensor.get("datatype"), tensor.get("shape")
    if name != spec.input_name:
        raise RequestError(f"unexpected inference input {_quote(name)} for model '{spec.name}'")
    what = f"input '{name}' for model '{spec.name}'"
    if "binary_data_size" in _check_parameters(tensor):
        raise RequestError(f"{what}: binary tensors are not supported yet; send 'data' as JSON numbers")
    if "shared_memory_region" in _check_parameters(tensor):
        raise RequestError(f"{what}: shared memory is not supported; send 'data' as JSON numbers")
    if datatype in BINARY_ONLY:
        raise RequestError(f"{what}: {datatype} has no JSON form; send FP32")
    if datatype != "FP32":
        raise RequestError(
            f"inference input '{name}' data-type is {_quote(datatype)}, but model '{spec.name}' expects 'FP32'"
        )
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise RequestError(f"failed to parse the request JSON buffer: 'shape' of {what} must be an array of integers")
    if len(shape) != 4 or tuple(shape[1:]) != spec.shape or shape[0] < 1:
        expected = ",".join(map(str, (-1, *spec.shape)))
        got = ",".join(map(str, shape[:8]))
        raise RequestError(f"unexpected shape for {what}. Expected [{expected}], got [{got}]")
    if shape[0] > spec.max_batch_size:
        raise RequestError(f"inference request batch-size must be <= {spec.max_batch_size} for '{spec.name}'")
    return _to_array(_flatten(tensor.get("data"), shape, what), what).reshape(shape)


def _flatten(data: Any, shape: list[int], what: str) -> list[Any]:
    """``data`` as one list in row-major order: flat already, or nested exactly as ``shape``."""
    if not isinstance(data, list):
        raise RequestError(f"{what} needs 'data', an array of numbers")
    numbers: list[Any] = data
    if data and isinstance(data[0], list):
        numbers = [data]
        for size in shape:
            if not all(isinstance(row, list) and len(row) == size for row in numbers):
                raise RequestError(f"'data' of {what} is nested, but not as its shape {shape} says")
            numbers = list(itertools.chain.from_iterable(numbers))
    if len(numbers) != math.prod(shape):
        raise RequestError(f"unexpected size of {what}: expected {math.prod(shape)} numbers, got {len(numbers)}")
    return numbers


def _to_array(numbers: list[Any], what: str) -> NDArray[np.float32]:
    if not set(map(type, numbers)) <= {int, float}:  # NumPy would take True and "1.5" for numbers
        raise RequestError(f"'data' of {what} must hold numbers only")
    try:
        with np.errstate(over="ignore"):
            array = np.array(numbers, dtype=np.float32)
    except OverflowError:
        raise RequestError(f"'data' of {what} holds a number too large for FP32") from None
    if not np.isfinite(array).all():
        raise RequestError(f"'data' of {what} holds a number too large for FP32")
    return array


def _quote(value: Any) -> str:
    """A client's value inside a message: short, and only if it is text."""
    return f"'{value[:100]}'" if isinstance(value, str) else f"({type(value).__name__})"
