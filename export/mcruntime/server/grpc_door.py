"""What holds for every gRPC call before its message is read: keys, draining, and how many calls there may be."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import grpc

from mcruntime.server.app import App
from mcruntime.server.errors import OverloadedError, RequestError, UnavailableError
from mcruntime.server.grpc_calls import GOODBYE, NO_KEY, OPEN_TO_ALL, PROBES, WORK, Bridge, Call, fail, headers_of

RESERVED = 16  # calls beyond the limit, kept for those who ask whether the server lives


class Places:
    """How many calls there may be at the same time, of which one connection may have three quarters."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()  # by connection
        self._num_calls = 0

    def take(self, peer: str) -> str:
        """Count a call of a connection; else, why it was not counted."""
        with self._lock:
            if self._num_calls >= self._most:
                return "the server has as many calls as it takes; try again"
            if self._calls[peer] >= self._most - self._most // 4:
                return "this connection has as many calls as one may have; try again"
            self._calls[peer] += 1
            self._num_calls += 1
            return ""

    def leave(self, peer: str) -> None:
        """A call that was counted is over."""
        with self._lock:
            self._num_calls -= 1
            self._calls[peer] -= 1
            if not self._calls[peer]:
                del self._calls[peer]


class Door(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The one door of all methods of all services.

    Args:
        handlers: by path.
    """

    def __init__(self, app: App, bridge: Bridge, handlers: Mapping[str, Any]) -> None:
        self._app = app
        self._bridge = bridge
        calls = Places(app.options.max_connections)
        probes = Places(RESERVED)  # of their own: whoever asks whether the server lives is answered when it is full
        self.last_call = 0.0  # on time.monotonic's clock
        self._handlers = {
            path: self._bounded(path, handler, probes if path in PROBES else calls)
            for path, handler in handlers.items()
        }

    def service(self, details: Any) -> Any:
        """What answers a call; None: there is no such method."""
        path, keys = details.method, self._app.keys
        self.last_call = time.monotonic()
        if self._bridge.stopping.is_set():
            return self._refuse(path, UnavailableError(GOODBYE))
        if keys is not None and path not in OPEN_TO_ALL and not keys.allow(headers_of(details.invocation_metadata)):
            return self._refuse(path, RequestError(NO_KEY, 401))
        if self._app.draining and path in WORK:
            return self._refuse(path, UnavailableError(GOODBYE))
        return self._handlers.get(path)

    def _bounded(self, path: str, handler: Any, places: Places) -> Any:
        """A handler that refuses calls while as many as may be are there."""
        answer_one, answer_many = handler.stream_unary, handler.stream_stream

        def one(requests: Any, context: Any) -> Any:
            peer = self._enter(path, context, places)
            try:
                return answer_one(requests, context)
            finally:
                places.leave(peer)

        def many(requests: Any, context: Any) -> Iterator[Any]:
            peer = self._enter(path, context, places)
            try:
                yield from answer_many(requests, context)
            finally:
                places.leave(peer)

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(many)
        return grpc.stream_unary_rpc_method_handler(one)

    def _enter(self, path: str, context: Any, places: Places) -> str:
        """Count a call; returns its connection.

        Raises:
            Exception: what grpc raises once the client was told that there are too many.
        """
        peer: str = context.peer()
        if full := places.take(peer):
            self._bridge.answer(Call(path, context, self._app), partial(fail, OverloadedError(full)))
        return peer

    def _refuse(self, path: str, error: RequestError) -> Any:
        """A handler that reads nothing; on the wire it fits every kind of method."""

        def refuse(requests: Any, context: Any) -> Iterator[bytes]:
            self._bridge.hold()
            self._bridge.answer(Call(path, context, self._app), partial(fail, error))
            yield b""  # never reached: an error was answered

        return grpc.stream_stream_rpc_method_handler(refuse)
