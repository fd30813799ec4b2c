"""Which other files an ONNX model names for its weights, read off its protobuf: onnx is not at hand where models run.

A model file is data, but data that names files: one that names ``../../etc/passwd`` would have whatever opens it read
that. ONNX Runtime has refused such names since some version, TensorRT's parser and others make no such promise; so a
bundle is refused before anything opens the model.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

# Of every message that may hold a tensor, the fields that lead to one, by their numbers in onnx.proto.
FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
KEY, VALUE = 1, 2  # of an entry of a tensor's external_data
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5  # protobuf's wire types
MAX_NAME = 4096  # bytes; longer ones are no file names


def external_files(path: Path) -> set[str]:
    """The names that a model gives for the files of its weights, as they stand in it.

    Raises:
        ValueError: not a protobuf message.
        OSError: the file cannot be read.
    """
    if path.stat().st_size == 0:
        return set()
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _locations(data)


def _locations(data: mmap.mmap | bytes) -> set[str]:
    found: set[str] = set()
    todo = [("model", 0, len(data))]  # no recursion: how deep graphs are nested is up to the file
    while todo:
        kind, start, end = todo.pop()
        if kind == "entry":
            found |= _location(data, start, end)
            continue
        inner = FIELDS[kind]
        todo += [(inner[number], first, last) for number, first, last in _fields(data, start, end) if number in inner]
    return found


def _location(data: mmap.mmap | bytes, start: int, end: int) -> set[str]:
    """The file that an entry of external_data names, if it is the entry for that; of two values the last counts."""
    key = value = b""
    for number, first, last in _fields(data, start, end):
        if number in (KEY, VALUE) and last - first > MAX_NAME:
            raise ValueError("a file name of more bytes than any system has")
        if number == KEY:
            key = data[first:last]
        elif number == VALUE:
            value = data[first:last]
    return {value.decode("utf-8", errors="replace")} if key == b"location" else set()


def _fields(data: mmap.mmap | bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, first and end of the content of every field with a length."""
    place = start
    while place < end:
        tag, place = _varint(data, place, end)
        kind = tag & 7
        if kind == BYTES:
            size, place = _varint(data, place, end)
            if size > end - place:
                raise ValueError("a field longer than its message")
            yield tag >> 3, place, place + size
            place += size
        elif kind == VARINT:
            _, place = _varint(data, place, end)
        elif kind == EIGHT_BYTES:
            place += 8
        elif kind == FOUR_BYTES:
            place += 4
        else:
            raise ValueError("an unknown kind of field")
    if place != end:
        raise ValueError("a field longer than its message")


def _varint(data: mmap.mmap | bytes, place: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        if place >= end or shift > 63:
            raise ValueError("a number that does not end")
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
