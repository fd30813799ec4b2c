"""The Open Inference Protocol (v2) over gRPC: pure functions between messages and arrays, no I/O.

What is checked, and in which words, is shared with REST. Answers hold their tensors in ``raw_output_contents``, also
where the request used ``contents``, as a real Triton 2.51 answers.
"""

# B = batch, C = channels, H/W = height/width.
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from mcruntime.server import oip
from mcruntime.server.errors import RequestError
from mcruntime.server.protocol import MAX_ID
from mcruntime.server.tensors import (
    DATATYPE,
    Images,
    InferRequest,
    Logits,
    ModelSpec,
    Wish,
    check_answer,
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

InferResponse = oip.message("ModelInferResponse")
# The datatypes that the fields of ``InferTensorContents`` are for.
CONTENTS = {
    "bool_contents": "BOOL", "int_contents": "INT32", "int64_contents": "INT64", "uint_contents": "UINT32",
    "uint64_contents": "UINT64", "fp32_contents": "FP32", "fp64_contents": "FP64", "bytes_contents": "BYTES",
}  # fmt: skip


def read_message(message_class: Any, data: bytes) -> Any:
    """A client's message.

    Raises:
        RequestError: 400; not one of that class.
    """
    try:
        return message_class.FromString(data)
    except DecodeError:
        raise RequestError(f"the request is not a {message_class.DESCRIPTOR.name}") from None


def read_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """A map of ``InferParameter`` as plain values.

    Raises:
        RequestError: 400; a parameter without a value.
    """
    values: dict[str, Any] = {}
    for name, parameter in parameters.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is None:
            raise RequestError(f"parameter {quote(name)} has no value; it should be an integer, a boolean or a string")
        values[name] = getattr(parameter, choice)
    return values


def parse_infer(message: Any, spec: ModelSpec) -> InferRequest:
    """Check a ``ModelInferRequest``.

    Raises:
        RequestError: 400 and what is wrong.
    """
    if len(message.id) > MAX_ID:
        raise RequestError(f"'id' is longer than {MAX_ID} characters")
    check_input_count(message.inputs, spec)
    timeout_s = None
    if message.parameters:
        parameters = read_parameters(message.parameters)
        check_priority(parameters)
        timeout_s = timeout_of(parameters)
    wish = _wish(message.outputs, spec)
    images = _images(message.inputs[0], message.raw_input_contents, spec)
    return InferRequest(message.id, images, wish, timeout_s)


def format_infer(request: InferRequest, spec: ModelSpec, logits: Logits) -> Any:
    """The ``ModelInferResponse``.

    Args:
        logits: [B, num_classes].

    Raises:
        RequestError: 400; logits that are not finite are no classes.
    """
    answer = InferResponse(model_name=spec.name, model_version=spec.version, id=request.id)
    if request.wish.top_k:
        check_answer(logits, spec)
        rows = classify(logits, request.wish.top_k, spec.labels)
        answer.outputs.add(name=spec.output_name, datatype="BYTES", shape=(len(rows), len(rows[0])))
        answer.raw_output_contents.append(pack_strings(rows))
    else:
        answer.outputs.add(name=spec.output_name, datatype=DATATYPE, shape=logits.shape)
        answer.raw_output_contents.append(np.ascontiguousarray(logits, "<f4").tobytes())
    return answer


def _wish(outputs: Sequence[Any], spec: ModelSpec) -> Wish:
    for output in outputs:
        check_output(output.name, spec)
    if len(outputs) > 1:
        raise RequestError(f"output '{spec.output_name}' is requested more than once for model '{spec.name}'")
    if not outputs:
        return Wish(binary=True)
    parameters = read_parameters(outputs[0].parameters)
    refuse_shared_memory(parameters)
    return Wish(binary=True, top_k=top_k_of(parameters["classification"]) if "classification" in parameters else 0)


def _images(tensor: Any, raw: Sequence[bytes], spec: ModelSpec) -> Images:
    if tensor.parameters:
        refuse_shared_memory(read_parameters(tensor.parameters))
    check_input(tensor.name, tensor.datatype, list(tensor.shape), spec)
    data = _bytes_of(tensor, raw, spec)
    batch = tensor.shape[0]
    if len(data) != batch * spec.image_bytes:
        raise RequestError(
            f"input byte size mismatch for input '{spec.input_name}' for model '{spec.name}'. "
            f"Expected {batch * spec.image_bytes}, got {len(data)}"
        )
    return images_from_bytes(data, batch, spec)


def _bytes_of(tensor: Any, raw: Sequence[bytes], spec: ModelSpec) -> bytes:
    """The tensor's elements, little-endian, from the one of two places where they are."""
    what = f"'{spec.input_name}' for model '{spec.name}'"
    if raw:
        if tensor.HasField("contents"):
            raise RequestError(f"contents field must not be specified when using raw_input_contents for {what}")
        if len(raw) > 1:
            raise RequestError(f"expected 1 raw_input_contents, for input {what}, but got {len(raw)}")
        return raw[0]
    if not tensor.HasField("contents"):
        raise RequestError(f"unable to find data for input tensor {what} in request.")
    contents = tensor.contents
    for field, _ in contents.ListFields():
        if field.name != "fp32_contents":
            raise RequestError(
                f"unexpected explicit tensor data for input tensor {what} of type '{CONTENTS[field.name]}', "
                f"expected datatype '{DATATYPE}'"
            )
    # Its wire format is the floats one after the other behind a header: no float becomes a Python object.
    contents.DiscardUnknownFields()
    size = 4 * len(contents.fp32_contents)
    packed: bytes = contents.SerializeToString()
    return packed[len(packed) - size :]
