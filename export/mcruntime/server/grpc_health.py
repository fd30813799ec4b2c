"""What is asked of a gRPC server whatever it serves: its health (grpc.health.v1), and which services it has."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from mcruntime.server import oip
from mcruntime.server.app import App
from mcruntime.server.errors import NotFoundError, OverloadedError, RequestError
from mcruntime.server.grpc_calls import CHECK, HEALTH, REFLECTION, WATCH, Bridge, Call, fail
from mcruntime.server.grpc_protocol import read_message

MAX_WATCHERS = 64  # of health, which needs no key
WATCH_S = 0.25  # how often a watcher looks


class Health:
    """grpc.health.v1: serving as soon as, and as long as, the HTTP side calls itself ready."""

    def __init__(self, app: App, bridge: Bridge) -> None:
        self._app = app
        self._bridge = bridge
        self._watchers = threading.Semaphore(MAX_WATCHERS)

    def handlers(self) -> dict[str, Any]:
        """Of both methods, by path."""
        return {
            CHECK: grpc.stream_unary_rpc_method_handler(self._check),
            WATCH: grpc.stream_stream_rpc_method_handler(self._watch),
        }

    def _check(self, requests: Iterator[bytes], context: Any) -> bytes:
        """The state now; NOT_FOUND for a service that this server does not have."""
        call = Call(CHECK, context, self._app)
        data = self._bridge.read(requests, context)
        return self._bridge.answer(call, partial(self._state_of, data))

    def _state_of(self, data: bytes | None) -> bytes:
        status = self._status(_service_in(data))
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            raise NotFoundError("there is no such service here")
        return _packed(status)

    def _watch(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """The state now and whenever it changes."""
        call = Call(WATCH, context, self._app)
        data = self._bridge.read(requests, context)
        if not self._watchers.acquire(blocking=False):
            self._bridge.answer(call, partial(fail, OverloadedError("too many watch already; call Check")))
        try:
            service, told = self._bridge.answer(call, partial(_service_in, data)), None
            while context.is_active() and not self._bridge.stopping.is_set():
                status = self._status(service)
                if status != told:
                    yield _packed(status)
                    told = status
                self._bridge.stopping.wait(WATCH_S)
        finally:
            self._watchers.release()

    def _status(self, service: str) -> Any:
        states = health_pb2.HealthCheckResponse
        if service not in ("", oip.SERVICE):
            return states.SERVICE_UNKNOWN
        return states.SERVING if is_ready(self._app) else states.NOT_SERVING


class Reflection:
    """grpc.reflection.v1alpha, which describes all services; its own pool knows those of others, too."""

    def __init__(self, app: App, bridge: Bridge) -> None:
        self._app = app
        self._bridge = bridge
        pool = DescriptorPool()
        for file in (oip.POOL.FindFileContainingSymbol(oip.SERVICE), health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
            pool.AddSerializedFile(file.serialized_pb)
        self._servicer = reflection.ReflectionServicer((oip.SERVICE, HEALTH, reflection.SERVICE_NAME), pool=pool)

    def handlers(self) -> dict[str, Any]:
        """Of its method, by path."""
        return {REFLECTION: grpc.stream_stream_rpc_method_handler(self._info)}

    def _info(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        call = Call(REFLECTION, context, self._app)
        ahead = self._bridge.read_ahead(call, requests, 1, bytes)
        messages = (self._read(call, data) for data in ahead)
        for answer in self._servicer.ServerReflectionInfo(messages, context):
            yield bytes(answer.SerializeToString())

    def _read(self, call: Call, data: bytes) -> Any:
        try:
            return read_message(reflection_pb2.ServerReflectionRequest, data)
        except RequestError as error:
            return self._bridge.answer(call, partial(fail, error))


def _service_in(data: bytes | None) -> str:
    """The name that a client asks for."""
    if data is None:
        raise RequestError("the call has no request")
    return str(read_message(health_pb2.HealthCheckRequest, data).service)


def _packed(status: Any) -> bytes:
    return bytes(health_pb2.HealthCheckResponse(status=status).SerializeToString())


def is_ready(app: App) -> bool:
    return not app.draining and app.models.is_ready()
