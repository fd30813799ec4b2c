"""The Open Inference Protocol (v2) over REST: pure functions between bytes and arrays, no I/O.

A body is JSON, or JSON of ``Inference-Header-Content-Length`` bytes followed by the tensors (binary tensor extension).
Only that header tells: real clients send no Content-Type. Member order and texts follow a real Triton 2.51. Different
on purpose: what the client got wrong is always 400 (Triton answers 500 to malformed JSON), and NaN or infinite values
are refused.
"""

# B = batch, C = channels, H/W = height/width.
from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from mcruntime.server.errors import RequestError
from mcruntime.server.flat_json import read_flat
from mcruntime.server.tensors import (
    DATATYPE,
    Images,
    InferRequest,
    Logits,
    ModelSpec,
    Wish,
    check_answer,
    check_finite,
    check_input,
    check_input_count,
    check_output,
    check_priority,
    classify,
    images_from_bytes,
    pack_strings,
    quote,
    refuse_shared_memory,
    timeout_of,
    top_k_of,
)

BINARY_ONLY = ("FP16", "BF16")  # the protocol has no JSON form for these
MAX_HEADER_JSON = 1 << 20  # of the JSON before binary tensors
MAX_KEPT_HEAD = 4096  # bytes of such a JSON that is remembered
KEPT_HEADS = 256
SMALL_JSON = 1 << 18  # bytes that are parsed without counting
MOST_BRACKETS = 100_000  # 64 images of 3 x 500 rows have fewer
MAX_ID = 1024  # characters


def read_infer(headers: Mapping[bytes, bytes], body: bytes | memoryview, spec: ModelSpec) -> InferRequest:
    """``parse_infer`` of an HTTP request.

    Args:
        headers: names in lower case.
    """
    length = headers.get(b"inference-header-content-length")
    if length is None:
        return parse_infer(bytes(body), None, spec)
    return parse_infer(body, read_header_length(length), spec)


def parse_infer(body: bytes | memoryview, header_length: int | None, spec: ModelSpec) -> InferRequest:
    """Read an infer request.

    Args:
        body: all of it; bytes, if the whole is JSON.
        header_length: ``Inference-Header-Content-Length``: None, the whole body is JSON; 0, it is one bare image.

    Raises:
        RequestError: 400 and what is wrong.
    """
    if header_length is None:
        most_values = spec.max_batch_size * math.prod(spec.shape)
        whole = bytes(body)
        return _parse_tree(_parse_tensor_json(whole, most_values), memoryview(b""), spec, whole)
    if header_length == 0 and body:
        return InferRequest("", images_from_bytes(body, 1, spec), Wish(binary=True))
    if not 0 < header_length <= len(body):
        raise RequestError(f"inference header size should be in range (0, {len(body)}), got: {str(header_length)[:20]}")
    if header_length > MAX_HEADER_JSON and header_length < len(body):
        raise RequestError(f"the JSON before binary tensors is larger than {MAX_HEADER_JSON} bytes")
    view = memoryview(body)
    text, binary = bytes(view[:header_length]), view[header_length:]
    if header_length <= MAX_KEPT_HEAD and len(binary):
        head = _read_head(text, len(binary), spec)
        if head is not None:
            return InferRequest(head.id, images_from_bytes(binary, head.batch, spec), head.wish, head.timeout_s)
    return _parse_tree(_parse_json(text), binary, spec, text)


def read_header_length(value: bytes) -> int:
    """``Inference-Header-Content-Length`` as a number.

    Raises:
        RequestError: 400; not digits, or too many.
    """
    if not value.isdigit() or len(value) > 18:
        raise RequestError("Inference-Header-Content-Length must be a whole number of bytes")
    return int(value)


def format_infer(request: InferRequest, spec: ModelSpec, logits: Logits) -> tuple[bytes, int | None]:
    """The answer's body, and the length of its JSON if binary tensors follow.

    Args:
        logits: [B, num_classes]; as JSON they are widened to double, flat, row-major.

    Raises:
        RequestError: 400; logits that are not finite have no form in JSON, nor as classes.
    """
    if request.wish.top_k or not request.wish.binary:
        check_answer(logits, spec)
    wish = request.wish
    if wish.binary and not wish.top_k:
        data = np.ascontiguousarray(logits, "<f4").tobytes()
        head = _binary_head(request.id, spec, len(logits))
        return head + data, len(head)
    answer: dict[str, Any] = {"id": request.id} if request.id else {}
    answer |= {"model_name": spec.name, "model_version": spec.version}
    rows = classify(logits, wish.top_k, spec.labels) if wish.top_k else None
    output: dict[str, Any] = {"name": spec.output_name}
    if rows is not None:
        output |= {"datatype": "BYTES", "shape": [len(rows), len(rows[0])]}
    else:
        output |= {"datatype": DATATYPE, "shape": list(logits.shape)}
    answer["outputs"] = [output]
    if rows is not None and wish.binary:
        data = pack_strings(rows)
        output["parameters"] = {"binary_data_size": len(data)}
        head = dump(answer)
        return head + data, len(head)
    output["data"] = (
        [text for row in rows for text in row] if rows is not None else logits.astype(np.float64).ravel().tolist()
    )
    return dump(answer), None


@lru_cache(KEPT_HEADS)
def _binary_head(request_id: str, spec: ModelSpec, batch: int) -> bytes:
    output = {
        "name": spec.output_name,
        "datatype": DATATYPE,
        "shape": [batch, spec.num_classes],
        "parameters": {"binary_data_size": 4 * batch * spec.num_classes},
    }
    answer = {"id": request_id} if request_id else {}
    return dump({**answer, "model_name": spec.name, "model_version": spec.version, "outputs": [output]})


def format_metadata(spec: ModelSpec, versions: list[str]) -> dict[str, Any]:
    """The model's inputs and outputs; -1 is the batch."""
    return {
        "name": spec.name,
        "versions": versions,
        "platform": spec.platform,
        "inputs": [{"name": spec.input_name, "datatype": DATATYPE, "shape": [-1, *spec.shape]}],
        "outputs": [{"name": spec.output_name, "datatype": DATATYPE, "shape": [-1, spec.num_classes]}],
    }


def dump(tree: Any) -> bytes:
    """JSON without white space and without NaN."""
    return orjson.dumps(tree)


def load_json(data: bytes | memoryview) -> dict[str, Any]:
    """A JSON object from a client.

    Raises:
        RequestError: 400.
    """
    return _parse_json(data)


def _parse_json(data: bytes | memoryview, most_values: int = 1000) -> dict[str, Any]:
    if len(data) > SMALL_JSON:
        _refuse_bomb(data, most_values)
    try:
        tree = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"failed to parse the request JSON buffer: {error.msg} at {error.pos}") from None
    if not isinstance(tree, dict):
        raise RequestError("failed to parse the request JSON buffer: expected an object")
    return tree


def _parse_tensor_json(data: bytes, most_values: int) -> dict[str, Any]:
    """As ``_parse_json``, but a flat ``data`` of the one input is float64 [n] where ``read_flat`` takes it."""
    if len(data) > SMALL_JSON:
        _refuse_bomb(data, most_values)
    tree = read_flat(data)
    return _parse_json(data, most_values) if tree is None else tree


def _refuse_bomb(data: bytes | memoryview, most_values: int) -> None:
    """Two bytes of JSON can become 60 of Python, and a second of everybody's time; so count before parsing."""
    text = np.frombuffer(data, np.uint8)
    if np.count_nonzero(text == ord("[")) + np.count_nonzero(text == ord("{")) > MOST_BRACKETS:
        raise RequestError(f"failed to parse the request JSON buffer: more than {MOST_BRACKETS} arrays and objects")
    if np.count_nonzero(text == ord(",")) > most_values + MOST_BRACKETS:
        raise RequestError("failed to parse the request JSON buffer: more values than the model takes")


@dataclass(frozen=True, slots=True)
class _Head:
    """All that a request says beside its one binary tensor."""

    id: str
    wish: Wish
    timeout_s: float | None
    batch: int


@lru_cache(KEPT_HEADS)
def _read_head(text: bytes, num_binary: int, spec: ModelSpec) -> _Head | None:
    """The checked JSON before a binary tensor; None: what follows is not that tensor. A client sends the same text
    again and again, so it is read once."""
    whole, tensor = _read_tree(_parse_json(text), spec)
    batch, is_binary = _read_tensor(tensor, num_binary, spec)
    return _Head(whole.id, whole.wish, whole.timeout_s, batch) if is_binary else None


def _parse_tree(tree: dict[str, Any], binary: memoryview, spec: ModelSpec, text: bytes) -> InferRequest:
    head, tensor = _read_tree(tree, spec)
    batch, is_binary = _read_tensor(tensor, len(binary), spec)
    if is_binary:
        images = images_from_bytes(binary, batch, spec)
    else:
        images = _from_json(tensor.get("data"), [batch, *spec.shape], spec, text)
    return InferRequest(head.id, images, head.wish, head.timeout_s)


def _read_tree(tree: dict[str, Any], spec: ModelSpec) -> tuple[_Head, dict[str, Any]]:
    """What a request says, and its one input as it is written; the batch is still to be read."""
    request_id = tree.get("id")
    if "id" in tree and not isinstance(request_id, str):
        raise RequestError("failed to parse the request JSON buffer: 'id' must be a string")
    if len(request_id or "") > MAX_ID:
        raise RequestError(f"'id' is longer than {MAX_ID} characters")
    parameters = check_parameters(tree)
    inputs = _objects(tree, "inputs")
    check_input_count(inputs, spec)
    check_priority(parameters)
    wish = _wish(tree, parameters, spec)
    return _Head(request_id or "", wish, timeout_of(parameters), 0), inputs[0]


def _wish(tree: dict[str, Any], parameters: dict[str, Any], spec: ModelSpec) -> Wish:
    binary = _flag(parameters, "binary_data_output", False)
    outputs = _objects(tree, "outputs") if tree.get("outputs") is not None else []
    if len(outputs) > 1:
        for output in outputs:
            check_output(output.get("name"), spec)
        raise RequestError(f"output '{spec.output_name}' is requested more than once for model '{spec.name}'")
    if not outputs:
        return Wish(binary)
    check_output(outputs[0].get("name"), spec)
    own = check_parameters(outputs[0])
    refuse_shared_memory(own)
    top_k = top_k_of(own["classification"]) if "classification" in own else 0
    return Wish(_flag(own, "binary_data", binary), top_k)


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(f"parameter '{name}' must be true or false")
    return value


def _objects(tree: dict[str, Any], key: str) -> list[dict[str, Any]]:
    items = tree.get(key)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RequestError(f"failed to parse the request JSON buffer: '{key}' must be an array of objects")
    return items


def check_parameters(tree: dict[str, Any]) -> dict[str, Any]:
    """The member ``parameters`` of an object, whose values may be text, numbers, true and false.

    Raises:
        RequestError: 400.
    """
    parameters = tree.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise RequestError("failed to parse the request JSON buffer: 'parameters' must be an object")
    for name, value in parameters.items():
        if not isinstance(value, str | int | float):  # bool is an int
            raise RequestError(
                f"parameter {quote(name)} has invalid type. It should be either 'int', 'bool', or 'string'."
            )
    return parameters


def _read_tensor(tensor: dict[str, Any], num_binary: int, spec: ModelSpec) -> tuple[int, bool]:
    """The batch of a request's input, and whether its numbers are the binary part, which then has that size."""
    parameters = check_parameters(tensor)
    refuse_shared_memory(parameters)
    shape = tensor.get("shape")
    if not isinstance(shape, list):
        raise RequestError("failed to parse the request JSON buffer: 'shape' must be an array of integers")
    name, size = tensor.get("name"), parameters.get("binary_data_size")
    if size is None and name == spec.input_name and tensor.get("datatype") in BINARY_ONLY:
        raise RequestError(
            f"receiving {tensor['datatype']} data via JSON is not supported. Please use the binary data format for "
            f"input {name}"
        )
    check_input(name, tensor.get("datatype"), shape, spec)
    if size is None:
        if num_binary:
            raise RequestError(f"unexpected additional input data for model '{spec.name}'")
        return shape[0], False
    if "data" in tensor:
        raise RequestError(f"input '{name}' has both 'data' and 'binary_data_size'; send one of them")
    if type(size) is not int or size < 0:
        raise RequestError(f"'binary_data_size' of input '{name}' must be a whole number of bytes")
    if size > num_binary:
        raise RequestError(
            f"unexpected size for input '{name}', expecting {size - num_binary} additional bytes "
            f"for model '{spec.name}'"
        )
    if size < num_binary:
        raise RequestError(f"unexpected additional input data for model '{spec.name}'")
    return shape[0], True


def _from_json(data: Any, shape: list[int], spec: ModelSpec, text: bytes) -> Images:
    what = f"input '{spec.input_name}' for model '{spec.name}'"
    if isinstance(data, np.ndarray):
        _check_amount(len(data), shape, what)
        with np.errstate(over="ignore"):
            flat = data.astype(np.float32)
        return check_finite(flat, spec).reshape(shape)
    numbers = _flatten(data, shape, what)
    # array() refuses text and null, but takes true for 1. A search for their letters is far cheaper than 10,000 types.
    if _may_hold_words(text) and not set(map(type, numbers)) <= {int, float}:
        raise RequestError(f"'data' of {what} must hold numbers only")
    try:
        flat = np.frombuffer(array("f", numbers), np.float32)
    except TypeError:
        raise RequestError(f"'data' of {what} must hold numbers only") from None
    except OverflowError:
        raise RequestError(f"'data' of {what} holds a number too large for FP32") from None
    return check_finite(flat, spec).reshape(shape)


def _may_hold_words(text: bytes) -> bool:
    """Whether "true" or "false" may stand after the key "data"; may err towards yes."""
    place = text.find(b'"data"')
    return place < 0 or text.find(b"r", place) >= 0 or text.find(b"l", place) >= 0


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
    _check_amount(len(numbers), shape, what)
    return numbers


def _check_amount(got: int, shape: list[int], what: str) -> None:
    if got != math.prod(shape):
        raise RequestError(f"unexpected size of {what}: expected {math.prod(shape)} numbers, got {got}")
