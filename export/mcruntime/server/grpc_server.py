"""The gRPC side: the Open Inference Protocol's service, health (grpc.health.v1) and reflection.

On grpc's own threads, which may block: a call to infer goes from there straight to the batcher and back. All other
calls, and streams, go to the HTTP server's event loop. Not on grpc.aio: there, one call whose path is not UTF-8 ends
the whole server (seen with grpcio 1.85), which outweighs the tenth at most that it was faster (0.74 against 0.69 of
the raw loop with one client, 1.47 against 1.36 with 32, on a busy machine).

One door for all methods (``_Door``): keys, draining and the number of calls. One way out for all errors (``as_told``):
the texts are REST's, the codes follow from its statuses. Messages are parsed here and not by grpc, whose errors about
them would name its own internals. Methods with one request are offered as if they took a stream of them, which is the
same on the wire, so that a message that does not arrive can be given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from mcruntime.errors import InputError
from mcruntime.server import oip
from mcruntime.server.app import EXTENSIONS, VERSION, App, note_answer, refuse_control, refuse_load_parameters
from mcruntime.server.batcher import Answer, Outcome, Ticket
from mcruntime.server.body import Lease
from mcruntime.server.config import model_config
from mcruntime.server.errors import (
    DeadlineError,
    NotFoundError,
    OverloadedError,
    RequestError,
    UnavailableError,
    as_told,
)
from mcruntime.server.grpc_protocol import format_infer, parse_infer, read_message
from mcruntime.server.models import Closed, Model
from mcruntime.server.options import ServerOptions
from mcruntime.server.protocol import format_metadata
from mcruntime.server.seen import Seen
from mcruntime.server.tensors import Images, InferRequest
from mcruntime.server.tls import tls_context
from mcruntime.server.tracing import GRPC_CODES
from mcruntime.server.web import Request

GRACE_S = 1.0  # for answers on their way, and streams that only wait, once nothing is in flight
IDLE_S = 600.0  # after which a connection without calls is closed; clients open another by themselves
STREAM_IDLE_S = 60.0  # after which a stream without a message, and with all of them answered, is ended
RESERVED = 16  # calls beyond the limit, kept for those who ask whether the server lives
MAX_AHEAD = 32  # requests of one stream that may be in flight
MAX_WATCHERS = 64  # of health, which needs no key
WATCH_S = 0.25  # how often a watcher looks
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
CHECK, WATCH = f"/{HEALTH}/Check", f"/{HEALTH}/Watch"
REFLECTION = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"
INFER, STREAM = f"/{oip.SERVICE}/ModelInfer", f"/{oip.SERVICE}/ModelStreamInfer"
PROBES = frozenset({CHECK, f"/{oip.SERVICE}/ServerLive", f"/{oip.SERVICE}/ServerReady"})  # answered when full, too
OPEN_TO_ALL = PROBES | {WATCH}
REPOSITORY = ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload")
WORK = frozenset({INFER, STREAM, *(f"/{oip.SERVICE}/{name}" for name in REPOSITORY)})

T = TypeVar("T")
Handle = Callable[[Any, Request], Awaitable[Any]]  # a message and its call -> the answer's message


class GrpcServer:
    """A gRPC server that listens.

    Attributes:
        port: that it listens on.
    """

    def __init__(self, server: Any, bridge: _Bridge, port: int) -> None:
        self.port = port
        self._server = server
        self._bridge = bridge
        self._sweeper = asyncio.create_task(bridge.give_up_on_the_late())

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Take no more calls, and cut off those that are not done after ``grace_s`` seconds."""
        self._bridge.stopping.set()
        ended = self._server.stop(grace_s)
        await asyncio.to_thread(ended.wait)
        self._sweeper.cancel()


async def start(app: App, options: ServerOptions) -> GrpcServer:
    """Listen on ``options.grpc_port``; calls are answered on the running event loop.

    Raises:
        InputError: the address cannot be listened on, or a TLS file is not what it should be.
    """
    bridge = _Bridge(app, asyncio.get_running_loop())
    services = (_Service(app, bridge), _Health(app, bridge), _Reflection(app, bridge))
    handlers = {path: handler for service in services for path, handler in service.handlers().items()}
    most = options.max_connections + RESERVED
    server = grpc.server(
        ThreadPoolExecutor(most, thread_name_prefix="grpc"),  # a thread for every call in flight
        handlers=(_Door(app, bridge, handlers),),
        options=_channel_options(options),
        maximum_concurrent_rpcs=most,
    )
    address = f"[{options.host}]" if ":" in options.host else options.host
    try:
        port = _open_port(server, f"{address}:{options.grpc_port}", options)
    except RuntimeError:  # grpc tells the reason to nobody
        raise InputError(
            f"{address}:{options.grpc_port}: cannot serve gRPC there; is it in use? choose another --grpc-port, or 0"
        ) from None
    server.start()
    return GrpcServer(server, bridge, port)


def _channel_options(options: ServerOptions) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", options.max_body_bytes),  # also once unpacked
        ("grpc.max_send_message_length", options.max_body_bytes),
        ("grpc.max_allowed_incoming_connections", options.max_connections),
        # Far above what _Door allows: grpc resets calls of those, too, who keep to a limit that they are near to.
        ("grpc.max_concurrent_streams", 2 * (options.max_connections + RESERVED)),
        ("grpc.max_connection_idle_ms", round(IDLE_S * 1000)),
        ("grpc.server_handshake_timeout_ms", round(options.body_timeout_s * 1000)),
        ("grpc.so_reuseport", 0),  # a port in use is an error, not half of the requests
    ]


def _open_port(server: Any, address: str, options: ServerOptions) -> int:
    if tls_context(options) is None:  # with its checks and texts
        return int(server.add_insecure_port(address))

    def read(path: Path | None) -> bytes | None:
        return None if path is None else path.read_bytes()

    pair = (read(options.tls_key), read(options.tls_cert))
    ca = read(options.tls_client_ca)
    credentials = grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)
    return int(server.add_secure_port(address, credentials))


# ------------------------------------------------------------------------------------------------------------- the door


class _Door(grpc.GenericRpcHandler):  # type: ignore[misc]
    """What holds for every call, before its message is read.

    Args:
        handlers: of all methods of all services, by path.
    """

    def __init__(self, app: App, bridge: _Bridge, handlers: Mapping[str, Any]) -> None:
        self._app = app
        self._bridge = bridge
        self._most = app.options.max_connections
        self._lock = threading.Lock()
        self._calls: Counter[str] = Counter()  # by connection
        self._num_calls = 0
        self._handlers = {
            path: handler if path in PROBES else self._bounded(path, handler) for path, handler in handlers.items()
        }

    def service(self, details: Any) -> Any:
        """What answers a call; None: there is no such method."""
        path, keys = details.method, self._app.keys
        if keys is not None and path not in OPEN_TO_ALL and not keys.allow(_headers(details.invocation_metadata)):
            return self._refuse(path, RequestError("an API key is needed: authorization: Bearer KEY", 401))
        if self._app.draining and path in WORK:
            return self._refuse(path, UnavailableError("the server is shutting down"))
        return self._handlers.get(path)

    def _bounded(self, path: str, handler: Any) -> Any:
        """A handler that refuses calls while as many as may be are there."""

        @contextlib.contextmanager
        def slot(context: Any) -> Iterator[None]:
            peer = context.peer()
            if full := self._take(peer):
                self._bridge.answer(_Call(path, context, self._app), partial(_fail, OverloadedError(full)))
            try:
                yield
            finally:
                self._give_back(peer)

        def unary(requests: Any, context: Any) -> Any:
            with slot(context):
                return handler.stream_unary(requests, context)

        def stream(requests: Any, context: Any) -> Iterator[Any]:
            with slot(context):
                yield from handler.stream_stream(requests, context)

        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(stream)
        return grpc.stream_unary_rpc_method_handler(unary)

    def _take(self, peer: str) -> str:
        """Count a call of a connection, which may have three quarters of all; else, why it was not counted."""
        with self._lock:
            if self._num_calls >= self._most:
                return "the server has as many calls as it takes; try again"
            if self._calls[peer] >= self._most - self._most // 4:
                return "this connection has as many calls as one may have; try again"
            self._calls[peer] += 1
            self._num_calls += 1
            return ""

    def _give_back(self, peer: str) -> None:
        with self._lock:
            self._num_calls -= 1
            self._calls[peer] -= 1
            if not self._calls[peer]:
                del self._calls[peer]

    def _refuse(self, path: str, error: RequestError) -> Any:
        """A handler that reads nothing; on the wire it fits every kind of method."""

        def refuse(requests: Any, context: Any) -> Iterator[bytes]:
            self._bridge.answer(_Call(path, context, self._app), partial(_fail, error))
            yield b""  # never reached: an error was answered

        return grpc.stream_stream_rpc_method_handler(refuse)


def _fail(error: RequestError) -> bytes:
    raise error


# ----------------------------------------------------------------------------------------------- threads and the loop


class _Call(Request):
    """A call. Its metadata is read only where somebody asks."""

    __slots__ = ("_app", "context")

    def __init__(self, path: str, context: Any, app: App) -> None:
        super().__init__("POST", path, b"", {}, _no_body, began=time.perf_counter())
        self.context = context
        self._app = app

    def introduce(self) -> None:
        """Fill in headers and id."""
        if not self.id:
            self.headers = _headers(self.context.invocation_metadata())
            self.id = self._app.id_of(self.headers)


class _Bridge:
    """Between grpc's threads, which may block, and the event loop, which may not.

    Attributes:
        stopping: set when the server takes no more calls.
    """

    def __init__(self, app: App, loop: asyncio.AbstractEventLoop) -> None:
        self.stopping = threading.Event()
        self._app = app
        self._loop = loop
        self._timeout_s = app.options.body_timeout_s
        self._lock = threading.Lock()
        self._since: dict[Any, float] = {}  # contexts of calls whose message is awaited, on time.monotonic's clock

    def read(self, requests: Iterator[bytes], context: Any) -> bytes | None:
        """The message of a call that has one; None: it has none. Blocks.

        Raises:
            grpc.RpcError: the call is over, perhaps since its message did not arrive in time.
        """
        with self._lock:
            self._since[context] = time.monotonic()
        try:
            return next(requests, None)
        finally:
            with self._lock:
                del self._since[context]

    def read_ahead(
        self, call: _Call, requests: Iterator[bytes], count: int, begin: Callable[[bytes], T]
    ) -> Iterator[T]:
        """What is begun with each message of a stream, up to ``count`` of them before the first is done with. Blocks.

        Raises:
            Exception: what grpc raises once the client was told that its stream was idle for too long.
        """
        room = threading.Semaphore(count)
        found: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        is_over = threading.Event()
        idle_s = max(STREAM_IDLE_S, self._timeout_s)  # one message may take the latter

        def read() -> None:
            try:
                with contextlib.suppress(grpc.RpcError):  # the call is over
                    for data in requests:
                        room.acquire()
                        if is_over.is_set():
                            return
                        found.put(begin(data))
            finally:
                found.put(None)  # in any case: somebody may wait for it

        def end() -> None:
            is_over.set()
            room.release()

        if not call.context.add_callback(end):
            end()
        threading.Thread(target=read, name="grpc-stream", daemon=True).start()
        while True:
            try:
                item = found.get(timeout=idle_s)
            except queue.Empty:
                late = DeadlineError(f"the stream had no message for {idle_s:g} s; open another")
                self.answer(call, partial(_fail, late))
                return
            if item is None:
                return
            yield item
            room.release()

    async def give_up_on_the_late(self) -> None:
        """Cancel calls whose message does not arrive in time. Runs on the loop until it is cancelled itself."""
        while True:
            await asyncio.sleep(min(1.0, self._timeout_s / 4))
            with self._lock:
                waiting = list(self._since.items())
            for context, since in waiting:
                if since <= time.monotonic() - self._timeout_s:
                    context.cancel()

    def answer(self, call: _Call, work: Callable[[], T]) -> T:
        """What ``work`` answers to a call; those who want to know of the call are told. Blocks.

        Raises:
            grpc.RpcError: the call is over.
            Exception: what grpc raises once the client was told of an error.
        """
        try:
            answer = work()
        except CancelledError:  # mostly since the call is over, and nobody hears this
            self.observe(call, 499, "the call was cancelled")
            call.context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        except grpc.RpcError:
            raise
        except Exception as error:
            told = self.told(call, error)
            trailers: tuple[tuple[str, str], ...] = (("x-request-id", call.id),)
            if told.retry_after_s is not None:
                trailers = (*trailers, ("grpc-retry-pushback-ms", str(told.retry_after_s * 1000)))
            call.context.set_trailing_metadata(trailers)
            call.context.abort(grpc.StatusCode[GRPC_CODES.get(told.status, "INTERNAL")], str(told))
        self.observe(call, 200, "")
        return answer

    def on_loop(self, call: _Call, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What a coroutine on the event loop returns; cancelled with the call. Blocks.

        Raises:
            CancelledError: the call or the loop is over.
        """
        future = self.submit(work)
        if not call.context.add_callback(future.cancel):
            future.cancel()
        return future.result()

    def submit(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Start a coroutine on the event loop."""
        return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def infer(self, call: _Call, model: Model, images: Images, timeout_s: float) -> tuple[Model, Answer]:
        """As ``App.infer``, without the event loop. Blocks.

        Raises:
            CancelledError: the call is over.
            as ``Models.infer``.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            outcomes: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
            try:
                ticket = model.batcher.submit(images, outcomes.put, deadline)
            except Closed:
                model = self._app.models.successor(model, call.args["version"])
                continue
            gone = partial(self._cancel, model, ticket, outcomes)
            if not call.context.add_callback(gone):
                gone()
            answer = self._await(model, ticket, outcomes, deadline)
            model.check(images, answer)
            note_answer(call, model, answer)
            if self._app.mirror is not None:
                self._loop.call_soon_threadsafe(self._app.mirror, model, images, answer)
            return model, answer

    def _await(
        self, model: Model, ticket: Ticket, outcomes: queue.SimpleQueue[Outcome | None], deadline: float
    ) -> Answer:
        try:
            outcome = outcomes.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            if model.batcher.cancel(ticket):
                raise DeadlineError from None
            outcome = outcomes.get()  # it is being delivered
        if outcome is None:
            raise CancelledError
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _cancel(self, model: Model, ticket: Ticket, outcomes: queue.SimpleQueue[Outcome | None]) -> None:
        """The call is over: take it out of the queue if it has no outcome yet."""
        if model.batcher.cancel(ticket):
            model.statistics.failed("canceled")
            outcomes.put(None)

    @contextlib.contextmanager
    def in_flight(self, count: int = 1) -> Iterator[None]:
        """Count work that a stop must wait for."""
        with self._lock:
            self._app.grpc_in_flight += count
        try:
            yield
        finally:
            with self._lock:
                self._app.grpc_in_flight -= count

    def told(self, call: _Call, error: Exception) -> RequestError:
        """What a client is told of an error, counted and noted."""
        call.introduce()
        told = as_told(error, call.id)
        error.__traceback__ = None  # it holds frames that hold the error: a circle, and the call's message in it
        self._app.count_failure(call.model, call.version, told.status, time.perf_counter() - call.began)
        self.observe(call, told.status, str(told))
        return told

    def observe(self, call: _Call, status: int, error: str) -> None:
        """Count a call that is over, and tell those who want to know."""
        with self._lock:
            self._app.grpc_answered[status] += 1
            if not self._app.is_observed(status):
                return
            call.introduce()
            seconds = time.perf_counter() - call.began
            self._app.observe(
                Seen(
                    protocol="grpc",
                    method=call.path.rpartition("/")[2],
                    path=call.path,
                    status=status,
                    request_id=call.id,
                    client=_host_of(call.context.peer()),
                    started=time.time_ns() - int(seconds * 1e9),
                    seconds=seconds,
                    model=call.model,
                    version=call.version,
                    images=call.images,
                    timing=call.timing,
                    parent=call.header("traceparent"),
                    error=error,
                )
            )


# ---------------------------------------------------------------------------------------------------------- the service


class _Service:
    """The methods of the protocol: each one gets a parsed message and answers one."""

    def __init__(self, app: App, bridge: _Bridge) -> None:
        self._app = app
        self._bridge = bridge
        self._models = app.models
        self._messages = oip.methods()

    def handlers(self) -> dict[str, Any]:
        """Of all methods, by path."""
        unary: dict[str, Handle] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server,
            "ModelMetadata": self._metadata,
            "ModelConfig": self._config,
            "ModelStatistics": self._statistics,
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
        }
        handlers = {
            f"/{oip.SERVICE}/{name}": grpc.stream_unary_rpc_method_handler(
                partial(self._serve, f"/{oip.SERVICE}/{name}", self._messages[name][0], handle)
            )
            for name, handle in unary.items()
        }
        handlers[INFER] = grpc.stream_unary_rpc_method_handler(self._infer)
        handlers[STREAM] = grpc.stream_stream_rpc_method_handler(self._stream)
        return handlers

    def _serve(self, path: str, request_class: Any, handle: Handle, requests: Iterator[bytes], context: Any) -> bytes:
        """One call with one message each way, answered on the event loop."""
        call = _Call(path, context, self._app)
        data = self._bridge.read(requests, context)

        async def work(message: Any) -> Any:
            return await handle(message, call)

        def answer() -> bytes:
            call.introduce()
            with self._accepted(call, data) as whole:
                message = read_message(request_class, whole)
                return bytes(self._bridge.on_loop(call, partial(work, message)).SerializeToString())

        return self._bridge.answer(call, answer)

    def _infer(self, requests: Iterator[bytes], context: Any) -> bytes:
        """The same of ModelInfer, without the event loop."""
        call = _Call(INFER, context, self._app)
        data = self._bridge.read(requests, context)

        def answer() -> bytes:
            with self._accepted(call, data) as whole:
                chosen, asked = self._asked(read_message(self._messages["ModelInfer"][0], whole), call)
                limit_s = min(asked.timeout_s or float("inf"), self._app.options.timeout_s)
                model, found = self._bridge.infer(call, chosen, asked.images, limit_s)
                return bytes(format_infer(asked, model.spec, found.logits).SerializeToString())

        return self._bridge.answer(call, answer)

    @contextlib.contextmanager
    def _accepted(self, call: _Call, data: bytes | None) -> Iterator[bytes]:
        """Within the limits, the message of a call that is answered now."""
        if data is None:
            raise RequestError("the call has no request")
        is_work = call.path in WORK
        with self._bridge.in_flight(is_work), Lease(self._app.budget) as lease:
            if is_work and self._app.draining:
                raise UnavailableError("the server is shutting down")
            lease.take(len(data))
            yield data

    def _stream(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """A stream of requests, each answered once, in order; up to ``MAX_AHEAD`` of them are in flight together."""
        pending: set[Future[bytes]] = set()

        def begin(data: bytes) -> Future[bytes]:
            future = self._bridge.submit(partial(self._stream_answer, data, context))
            pending.add(future)
            return future

        def end() -> None:
            for future in list(pending):
                future.cancel()

        context.add_callback(end)
        call = _Call(STREAM, context, self._app)
        with contextlib.suppress(CancelledError):
            for future in self._bridge.read_ahead(call, requests, MAX_AHEAD, begin):
                yield future.result()
                pending.discard(future)

    async def _stream_answer(self, data: bytes, context: Any) -> bytes:
        """The answer to one request of a stream; an error is an answer, too, and the stream goes on."""
        request_class, answer_class = self._messages["ModelStreamInfer"]
        call = _Call(STREAM, context, self._app)
        message = request_class()
        try:
            message = read_message(request_class, data)
            with self._accepted(call, data):
                chosen, asked = self._asked(message, call)
                model, found = await self._app.infer(call, chosen, asked.images, asked.timeout_s)
                answer = answer_class(infer_response=format_infer(asked, model.spec, found.logits))
            answer.infer_response.parameters["triton_final_response"].bool_param = True
            self._bridge.observe(call, 200, "")
        except asyncio.CancelledError:
            self._bridge.observe(call, 499, "the call was cancelled")
            raise
        except Exception as error:
            answer = answer_class(error_message=str(self._bridge.told(call, error)))
            answer.infer_response.id = message.id
        return bytes(answer.SerializeToString())

    # ------------------------------------------------------------------------------------------- health and metadata

    async def _live(self, message: Any, call: Request) -> Any:
        return self._answer("ServerLive", live=True)

    async def _ready(self, message: Any, call: Request) -> Any:
        return self._answer("ServerReady", ready=_is_ready(self._app))

    async def _model_ready(self, message: Any, call: Request) -> Any:
        try:
            self._find(message)
        except NotFoundError:
            return self._answer("ModelReady", ready=False)
        return self._answer("ModelReady", ready=not self._app.draining)

    async def _server(self, message: Any, call: Request) -> Any:
        return self._answer("ServerMetadata", name="mcdeploy", version=VERSION, extensions=EXTENSIONS)

    async def _metadata(self, message: Any, call: Request) -> Any:
        spec = self._find(message).spec
        return self._answer("ModelMetadata", **format_metadata(spec, self._models.versions(spec.name)))

    async def _config(self, message: Any, call: Request) -> Any:
        return json_format.ParseDict({"config": model_config(self._find(message))}, self._answer("ModelConfig"))

    async def _statistics(self, message: Any, call: Request) -> Any:
        if not message.name:
            found = list(self._models)
        elif message.version:
            found = [self._find(message)]
        else:
            self._find(message)
            found = [self._models.find(message.name, number) for number in self._models.versions(message.name)]
        trees = [model.statistics.as_dict(model.spec.name, model.spec.version) for model in found]
        return json_format.ParseDict({"model_stats": trees}, self._answer("ModelStatistics"))

    # --------------------------------------------------------------------------------------------------- the repository

    async def _index(self, message: Any, call: Request) -> Any:
        rows = await asyncio.to_thread(self._models.index)
        rows = [row for row in rows if row["state"] == "READY" or not message.ready]
        return self._answer("RepositoryIndex", models=rows)

    async def _load(self, message: Any, call: Request) -> Any:
        refuse_control(self._app.control, call.headers)
        refuse_load_parameters(dict(message.parameters))
        await asyncio.shield(self._models.load(message.model_name))  # goes on when the client hangs up
        return self._answer("RepositoryModelLoad")

    async def _unload(self, message: Any, call: Request) -> Any:
        refuse_control(self._app.control, call.headers)
        await asyncio.shield(self._models.unload(message.model_name))
        return self._answer("RepositoryModelUnload")

    # ------------------------------------------------------------------------------------------------------- the work

    def _asked(self, message: Any, call: Request) -> tuple[Model, InferRequest]:
        """A checked request, and the model it was checked for."""
        chosen = self._find(message, "model_name", "model_version")
        call.model, call.version = message.model_name, chosen.spec.version
        call.args = {"version": message.model_version}
        asked = parse_infer(message, chosen.spec)
        call.images = len(asked.images)
        return chosen, asked

    def _find(self, message: Any, name: str = "name", version: str = "version") -> Model:
        number = getattr(message, version)
        if number and not (number.isascii() and number.isdecimal()):
            raise RequestError(
                f"failed to get model version from specified version string '{number[:20]}', version should be an "
                "integral value > 0"
            )
        return self._models.find(getattr(message, name), number)

    def _answer(self, method: str, /, **fields: Any) -> Any:
        return self._messages[method][1](**fields)


# --------------------------------------------------------------------------------------------------------------- health


class _Health:
    """grpc.health.v1: serving as soon as, and as long as, the HTTP side calls itself ready."""

    def __init__(self, app: App, bridge: _Bridge) -> None:
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
        call = _Call(CHECK, context, self._app)
        data = self._bridge.read(requests, context)
        return self._bridge.answer(call, partial(self._state_of, data))

    def _state_of(self, data: bytes | None) -> bytes:
        status = self._status(_service_in(data))
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            raise NotFoundError("there is no such service here")
        return _packed(status)

    def _watch(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """The state now and whenever it changes."""
        call = _Call(WATCH, context, self._app)
        data = self._bridge.read(requests, context)
        if not self._watchers.acquire(blocking=False):
            self._bridge.answer(call, partial(_fail, OverloadedError("too many watch already; call Check")))
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
        return states.SERVING if _is_ready(self._app) else states.NOT_SERVING


class _Reflection:
    """grpc.reflection.v1alpha, which describes all services; its own pool knows those of others, too."""

    def __init__(self, app: App, bridge: _Bridge) -> None:
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
        call = _Call(REFLECTION, context, self._app)
        ahead = self._bridge.read_ahead(call, requests, 1, bytes)
        messages = (self._read(call, data) for data in ahead)
        for answer in self._servicer.ServerReflectionInfo(messages, context):
            yield bytes(answer.SerializeToString())

    def _read(self, call: _Call, data: bytes) -> Any:
        try:
            return read_message(reflection_pb2.ServerReflectionRequest, data)
        except RequestError as error:
            return self._bridge.answer(call, partial(_fail, error))


def _service_in(data: bytes | None) -> str:
    """The name that a client asks for."""
    if data is None:
        raise RequestError("the call has no request")
    return str(read_message(health_pb2.HealthCheckRequest, data).service)


def _packed(status: Any) -> bytes:
    return bytes(health_pb2.HealthCheckResponse(status=status).SerializeToString())


def _is_ready(app: App) -> bool:
    return not app.draining and app.models.is_ready()


# ------------------------------------------------------------------------------------------------------ ends of a call


def _headers(metadata: Iterable[tuple[str, str | bytes]]) -> dict[bytes, bytes]:
    """A call's metadata in the form of HTTP's headers, which it is."""
    return {key.encode(): value if isinstance(value, bytes) else value.encode() for key, value in metadata or ()}


async def _no_body() -> bytes:
    return b""


def _host_of(peer: str) -> str:
    """The address in "ipv4:127.0.0.1:5000" or "ipv6:%5B::1%5D:5000"."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
