"""Reads the JSON of an infer request whose tensor is one flat list, so that its numbers never become Python's.

Tens of thousands of float objects take longer than a small model. simdjson leads straight from the text to an array,
but differs from other parsers in a few things: nested lists, keys that are there twice, a byte order mark, integers of
more than 64 bits. So only the plainest requests are read here; of all others it is said so, and they are read, or
refused, by the parser that reads everything else.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    import simdjson
except ImportError:  # there is no wheel for this Python: the other parser gets the same numbers, in more time
    PARSER: Any = None
else:
    PARSER = simdjson.Parser()  # used on the event loop's thread only

LARGEST = 4 << 20  # bytes; the parser keeps buffers of several times that


def read_flat(text: bytes) -> dict[str, Any] | None:
    """A request's tree with ``data`` of its one input as float64 [n]; None: use another parser.

    Args:
        text: all of it; may be anything.
    """
    if PARSER is None or len(text) > LARGEST or text[:1] != b"{":
        return None
    try:
        document = PARSER.parse(text)
        tree, inputs = _without(document, "inputs"), document["inputs"]
        if tree is None or len(inputs) != 1:
            return None
        tensor = _without(inputs[0], "data")
        # Nested lists would come out flat, so there must be none: inputs, shape, data and perhaps outputs open a list.
        if tensor is None or text.count(b"[") != 3 + isinstance(tree.get("outputs"), list):
            return None
        numbers = np.frombuffer(inputs[0]["data"].as_buffer(of_type="d"), np.float64)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError):  # simdjson's, or not the shape of a request
        return None
    return tree | {"inputs": [tensor | {"data": numbers}]}


def _without(members: Any, left_out: str) -> dict[str, Any] | None:
    """An object of simdjson's as Python's, without one member; None: it is no object, or a key is there twice, of which
    simdjson takes the first and others the last."""
    keys = list(members.keys())
    if len(set(keys)) != len(keys):
        return None
    return {key: _plain(members[key]) for key in keys if key != left_out}


def _plain(value: Any) -> Any:
    if hasattr(value, "as_dict"):
        return value.as_dict()
    return value.as_list() if hasattr(value, "as_list") else value
