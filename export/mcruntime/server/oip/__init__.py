"""The messages of gRPC, from ``open_inference.binpb``: what grpcio-tools' ``protoc`` makes of ``open_inference.proto``.

Compiled and committed, never edited; ``make stubs`` makes it anew. It is the compiled description itself and not the
usual ``_pb2.py``, since that one registers its names for the whole process, where a second file with the protocol's
public names is refused: a program that also imports the vendor's client could not import this. Here the names live in
a pool of their own, and any protobuf runtime can read them.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

SERVICE = "inference.GRPCInferenceService"
COMPILED = "open_inference.binpb"


def _read() -> Any:
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(files(__name__).joinpath(COMPILED).read_bytes()).file:
        pool.Add(file)
    return pool


POOL = _read()


def message(name: str) -> Any:
    """The class of a message, such as "ModelInferRequest"."""
    return GetMessageClass(POOL.FindMessageTypeByName(f"inference.{name}"))


def methods() -> dict[str, tuple[Any, Any]]:
    """The service's methods: the classes of each one's request and answer."""
    service = POOL.FindServiceByName(SERVICE)
    return {one.name: (GetMessageClass(one.input_type), GetMessageClass(one.output_type)) for one in service.methods}
