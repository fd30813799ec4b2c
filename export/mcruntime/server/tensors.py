"""What REST and gRPC share: the description of a model's tensors, the checks of a request, and the answer's forms.

Texts follow a real Triton 2.51, since clients are written against it. Sizes are compared as Python integers before
anything of that size is allocated.
"""

# B = batch, C = channels, H/W = height/width, N = classes.
from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mcruntime.server.errors import RequestError

Images = NDArray[np.float32]
Logits = NDArray[np.float32]
DATATYPE = "FP32"  # of every bundle's input and output
# What the protocol knows, with bytes an element; BYTES have a length of their own.
DATATYPES = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8, "BYTES": 0,
}  # fmt: skip
ALIGNMENT = 4


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """What the protocol needs to know of one version of a model; one object for each, by which things are remembered.

    Attributes:
        shape: C, H, W.
        image_bytes: of one image as it is sent.
        max_batch_size: images in one request.
    """

    name: str
    input_name: str
    shape: tuple[int, int, int]
    output_name: str
    num_classes: int
    max_batch_size: int
    version: str = "1"
    labels: tuple[str, ...] = ()
    platform: str = "onnxruntime_onnx"
    backend: str = "onnxruntime"

    @cached_property
    def image_bytes(self) -> int:
        return 4 * math.prod(self.shape)


@dataclass(frozen=True)
class Wish:
    """One requested output."""

    binary: bool = False
    top_k: int = 0  # of the classification extension; 0: the logits themselves


class InferRequest(NamedTuple):
    """A checked request."""

    id: str
    images: Images  # [B, C, H, W], finite, 1 <= B <= max_batch_size
    wish: Wish
    timeout_s: float | None = None


def check_input(name: Any, datatype: Any, shape: Sequence[Any], spec: ModelSpec) -> None:
    """Refuse a tensor that is not the model's input.

    Raises:
        RequestError: 400; another name, datatype, number of axes or size, no image or more than ``max_batch_size``.
    """
    if name != spec.input_name:
        raise RequestError(f"unexpected inference input {quote(name)} for model '{spec.name}'")
    if datatype != DATATYPE:
        raise RequestError(
            f"inference input '{name}' data-type is {quote(datatype)}, but model '{spec.name}' expects '{DATATYPE}'"
        )
    if not all(type(size) is int for size in shape):
        raise RequestError(f"failed to parse the request: 'shape' of input '{name}' must be an array of integers")
    if len(shape) != 4 or tuple(shape[1:]) != spec.shape or shape[0] < 1:
        expected = ",".join(map(str, (-1, *spec.shape)))
        got = ",".join(str(size)[:20] for size in shape[:8])
        raise RequestError(
            f"unexpected shape for input '{name}' for model '{spec.name}'. Expected [{expected}], got [{got}]"
        )
    if shape[0] > spec.max_batch_size:
        raise RequestError(f"inference request batch-size must be <= {spec.max_batch_size} for '{spec.name}'")


def images_from_bytes(data: bytes | memoryview, batch: int, spec: ModelSpec) -> Images:
    """Images [batch, C, H, W] over little-endian bytes: a view where they lie aligned, else one copy.

    Raises:
        RequestError: 400; too few or too many bytes, NaN or infinity.
    """
    missing = batch * spec.image_bytes - len(data)
    if missing > 0:
        raise RequestError(
            f"unexpected size for input '{spec.input_name}', expecting {missing} additional bytes "
            f"for model '{spec.name}'"
        )
    if missing < 0:
        raise RequestError(f"unexpected additional input data for model '{spec.name}'")
    flat = np.frombuffer(data, dtype="<f4")
    if not flat.flags.aligned:
        flat = flat.copy()
    return check_finite(flat, spec).reshape(batch, *spec.shape)


def all_finite(numbers: NDArray[np.float32]) -> bool:
    """Whether there is no NaN and no infinity."""
    return bool(np.logical_and.reduce(np.isfinite(numbers), axis=None))  # all() takes a way through Python


def check_finite(images: Images, spec: ModelSpec) -> Images:
    """Refuse NaN and infinity.

    Raises:
        RequestError: 400.
    """
    if not all_finite(images):
        raise RequestError(f"input '{spec.input_name}' for model '{spec.name}' holds NaN or infinite values")
    return images


def check_answer(logits: Logits, spec: ModelSpec) -> None:
    """Refuse to write NaN and infinity where there is no form for them: in JSON, and as classes.

    Raises:
        RequestError: 400.
    """
    if not all_finite(logits):
        raise RequestError(
            f"the answer of '{spec.name}' is NaN or infinite, since numbers of its input are far too large"
        )


def check_input_count(names: Sequence[Any], spec: ModelSpec) -> None:
    """Refuse a request that has not exactly one input.

    Raises:
        RequestError: 400.
    """
    if not names:
        raise RequestError(
            f"expected 1 inputs but got 0 inputs for model '{spec.name}'. Got input(s) [], but missing required "
            f"input(s) ['{spec.input_name}']. Please provide all required input(s)."
        )
    if len(names) > 1:
        raise RequestError(
            f"expected 1 inputs but got {len(names)} inputs for model '{spec.name}'. Send '{spec.input_name}' alone."
        )


def check_output(name: Any, spec: ModelSpec) -> None:
    """Refuse an output that the model does not have.

    Raises:
        RequestError: 400.
    """
    if name != spec.output_name:
        raise RequestError(f"unexpected inference output {quote(name)} for model '{spec.name}'")


def refuse_shared_memory(parameters: Mapping[str, Any]) -> None:
    """Refuse a tensor that is said to lie elsewhere.

    Args:
        parameters: of an input or a requested output.

    Raises:
        RequestError: 400.
    """
    if any(name.startswith("shared_memory") for name in parameters):
        raise RequestError("shared memory is not supported; send the tensor with the request")


def timeout_of(parameters: dict[str, Any]) -> float | None:
    """The request's own deadline in seconds, from ``timeout`` in microseconds; 0 and none mean the server's.

    Raises:
        RequestError: 400; not a whole number of at least 0.
    """
    return _whole(parameters, "timeout", "a whole number of microseconds") / 1e6 or None


def check_priority(parameters: dict[str, Any]) -> None:
    """Refuse a ``priority`` that is none. There is one level here, as in a Triton that is not told of more.

    Raises:
        RequestError: 400; not a whole number of at least 0.
    """
    _whole(parameters, "priority", "a whole number of at least 0")


def _whole(parameters: dict[str, Any], name: str, expected: str) -> int:
    value: Any = parameters.get(name, 0)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
        value = int(value)
    value = as_whole(value)
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise RequestError(f"parameter '{name}' must be {expected}")
    return int(value)


def top_k_of(value: Any) -> int:
    """How many classes a client wants.

    Raises:
        RequestError: 400; not a whole number of at least 1.
    """
    value = as_whole(value)
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise RequestError("parameter 'classification' must be a whole number of at least 1")
    return value


def as_whole(value: Any) -> Any:
    """A whole number as an int, however it was written: to JSON 2.0 and 2 are the same. Anything else as it is."""
    return int(value) if type(value) is float and value.is_integer() else value


def classify(logits: Logits, k: int, labels: Sequence[str]) -> list[list[str]]:
    """The ``k`` largest of every row, as ``"<value>:<index>:<label>"``; of equal ones the lower index first.

    Args:
        logits: [B, N].
    """
    k = min(k, logits.shape[1])
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return [
        [f"{row[i]:f}:{i}" + (f":{labels[i]}" if labels and labels[i] else "") for i in best]
        for row, best in zip(logits.tolist(), order.tolist(), strict=True)
    ]


def pack_strings(rows: Sequence[Sequence[str]]) -> bytes:
    """Strings as the protocol's BYTES: each its length in 4 little-endian bytes, then itself."""
    encoded = [text.encode() for row in rows for text in row]
    return b"".join(struct.pack("<I", len(text)) + text for text in encoded)


def quote(value: Any) -> str:
    """A client's value inside a message: short, and only if it is text."""
    return f"'{value[:100]}'" if isinstance(value, str) else "(not a text)"
