"""JSON tensors read by simdjson: the same numbers as from the other parser, or left to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcruntime.server import flat_json, protocol
from mcruntime.server.errors import RequestError
from mcruntime.server.flat_json import read_flat
from mcruntime.server.protocol import parse_infer
from mcruntime.server.tensors import ModelSpec

SPEC = ModelSpec("m", "images", (1, 1, 2), "logits", 10, 64)


def request(data: bytes, *, before: bytes = b"", after: bytes = b"", shape: bytes = b"[1,1,1,2]") -> bytes:
    tensor = b'{"name":"images","datatype":"FP32","shape":' + shape + b',"data":' + data + b"}"
    return b"{" + before + b'"inputs":[' + tensor + b"]" + after + b"}"


def outcome(text: bytes) -> Any:
    """What a request comes to: its parts, or the words it is refused with."""
    try:
        asked = parse_infer(text, None, SPEC)
    except RequestError as error:
        return str(error), error.status
    return asked.id, asked.images.tolist(), asked.images.dtype, asked.wish, asked.timeout_s


@pytest.fixture
def slow(monkeypatch):
    """A request's outcome when the other parser reads it."""

    def read(text: bytes) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(protocol, "read_flat", lambda text: None)
            return outcome(text)

    return read


def test_a_flat_tensor_is_read_without_python_numbers_and_is_the_same():
    numbers = [1, -2.5, 3e-3, 18446744073709551615]
    tree = read_flat(request(orjson.dumps(numbers), before=b'"id":"a","parameters":{"timeout":7},'))
    assert tree is not None
    assert isinstance(tree["inputs"][0]["data"], np.ndarray)
    assert tree["inputs"][0]["data"].tolist() == [float(number) for number in numbers]
    tree["inputs"][0]["data"] = None
    expected = {"name": "images", "datatype": "FP32", "shape": [1, 1, 1, 2], "data": None}
    assert tree == {"id": "a", "parameters": {"timeout": 7}, "inputs": [expected]}


def test_requested_outputs_do_not_hide_a_nested_list():
    outputs = b',"outputs":[{"name":"logits"}]'
    assert read_flat(request(b"[1,2]", after=outputs)) is not None
    assert read_flat(request(b"[1,[2]]", after=outputs)) is None
    assert read_flat(request(b"[[1,2]]", after=b',"outputs":null')) is None


@pytest.mark.parametrize(
    "text",
    [
        request(b"[[[[1,2]]]]"),
        request(b"[1,[2]]"),
        request(b"[1,[2]]").replace(b'"shape":[1,1,1,2]', b'"shape":7'),  # as many brackets as a sound one
        request(b"[1,2]", after=b',"inputs":[]'),
        request(b"[1,2]").replace(b'"data"', b'"data":[8,9],"data"'),
        b"\xef\xbb\xbf" + request(b"[1,2]"),
        request(b"[1,true]"),
        request(b"[1,null]"),
        request(b'[1,"2"]'),
        request(b"[1,NaN]"),
        request(b"[1,1e400]"),
        request(b"[1,123456789012345678901234567890]"),
        request(b"[1,2]") + b" ",
        request(b"[1,2]") + b"x",
        request(b"[1,2,3]"),
        request(b"[1]"),
        request(b"[]"),
        request(b"[1,1e39]"),
        request(b"7"),
        request(b"[1,2]", shape=b"[1,2]"),
        request(b"[1,2]", shape=b"[true,1,1,2]"),
        request(b"[1,2]", before=b'"id":3,'),
        request(b"[1,2]", before=b'"id":"\xff",'),
        b'{"inputs":[]}',
        b'{"inputs":{"data":[1]}}',
        b'{"inputs":[1]}',
        b"[1]",
        b"",
        b"{",
    ],
)  # fmt: skip
def test_what_is_unusual_comes_to_the_same_as_with_the_other_parser(slow, text):
    assert outcome(text) == slow(text)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
def test_any_two_numbers_are_read_to_the_last_bit(numbers):
    text = request(orjson.dumps(numbers))
    assert read_flat(text) is not None
    assert parse_infer(text, None, SPEC).images.ravel().tolist() == np.array(numbers, np.float32).tolist()


@given(st.binary(max_size=80))
def test_anything_else_is_left_to_the_other_parser(tail):
    assert read_flat(b'{"inputs":[{"data":' + tail) is None


def test_without_simdjson_the_other_parser_reads_all(monkeypatch):
    monkeypatch.setattr(flat_json, "PARSER", None)
    assert outcome(request(b"[1,2]"))[1] == [[[[1.0, 2.0]]]]
