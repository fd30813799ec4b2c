"""The gRPC side: the Open Inference Protocol's service, health (grpc.health.v1) and reflection.

On grpc.aio and the HTTP server's own event loop, so that both share models, queues, limits and the order to stop
without a lock. A server with a pool of threads was measured, too (one request in flight, 8 and 32): the differences
were smaller than the noise, and it needs a thread for every waiting request. Messages are parsed here and not by grpc,
whose errors about them would name its own internals.

One door for all methods (``_Door``): keys, draining, calls at the same time. One way out for all errors (``as_told``):
the texts are REST's, the codes follow from its statuses. Methods with one request are offered as if they took a stream
of them, which is the same on the wire, so that a message that does not arrive can be given up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc
import grpc.aio
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from mcruntime.errors import InputError
from mcruntime.server import oip
from mcruntime.server.app import EXTENSIONS, VERSION, App, refuse_control, refuse_load_parameters
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
from mcruntime.server.models import Model
from mcruntime.server.options import ServerOptions
from mcruntime.server.protocol import format_metadata
from mcruntime.server.seen import Seen
from mcruntime.server.tls import tls_context
from mcruntime.server.tracing import GRPC_CODES
from mcruntime.server.web import Request

GRACE_S = 1.0  # for answers on their way, and streams that only wait, once nothing is in flight
IDLE_S = 600.0  # after which a connection without calls is closed; clients open another by themselves
MAX_AHEAD = 32  # requests of one stream that may be in flight
MAX_WATCHERS = 64  # of health, which needs no key
WATCH_S = 0.25  # how often a watcher looks
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
CHECK, WATCH = f"/{HEALTH}/Check", f"/{HEALTH}/Watch"
INFER, STREAM = f"/{oip.SERVICE}/ModelInfer", f"/{oip.SERVICE}/ModelStreamInfer"
OPEN_TO_ALL = frozenset({CHECK, WATCH, f"/{oip.SERVICE}/ServerLive", f"/{oip.SERVICE}/ServerReady"})
REPOSITORY = ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload")
WORK = frozenset({INFER, STREAM, *(f"/{oip.SERVICE}/{name}" for name in REPOSITORY)})

Handle = Callable[[Any, Request], Awaitable[Any]]  # a message and its call -> the answer's message


class GrpcServer:
    """A gRPC server that listens.

    Attributes:
        port: that it listens on.
    """

    def __init__(self, server: Any, health: _Health, port: int) -> None:
        self.port = port
        self._server = server
        self._health = health

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Take no more calls, and cut off those that are not done after ``grace_s`` seconds."""
        self._health.stopping = True
        await self._server.stop(grace_s)


async def start(app: App, options: ServerOptions) -> GrpcServer:
    """Listen on ``options.grpc_port``, on the running event loop.

    Raises:
        InputError: the address cannot be listened on, or a TLS file is not what it should be.
    """
    arrivals = _Arrivals(options.body_timeout_s)
    health = _Health(app, arrivals)
    handlers = {**_Service(app, arrivals).handlers(), **health.handlers(), **_reflection_handlers()}
    server = grpc.aio.server(options=_channel_options(options))
    server.add_generic_rpc_handlers((_Door(app, handlers),))
    address = f"[{options.host}]" if ":" in options.host else options.host
    try:
        port = _open_port(server, f"{address}:{options.grpc_port}", options)
    except RuntimeError:  # grpc tells the reason to nobody
        raise InputError(
            f"{address}:{options.grpc_port}: cannot serve gRPC there; is it in use? choose another --grpc-port, or 0"
        ) from None
    await server.start()
    return GrpcServer(server, health, port)


def _channel_options(options: ServerOptions) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", options.max_body_bytes),  # also once unpacked
        ("grpc.max_send_message_length", options.max_body_bytes),
        ("grpc.max_allowed_incoming_connections", options.max_connections),
        ("grpc.max_concurrent_streams", options.max_connections),
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


def _reflection_handlers() -> dict[str, Any]:
    """Reflection, which describes all services; its own pool knows those of others, too."""
    pool = DescriptorPool()
    for file in (oip.POOL.FindFileContainingSymbol(oip.SERVICE), health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        pool.AddSerializedFile(file.serialized_pb)
    names = (oip.SERVICE, HEALTH, reflection.SERVICE_NAME)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names, pool=pool).ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return {f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": handler}


# ------------------------------------------------------------------------------------------------------------- the door


class _Door(grpc.GenericRpcHandler):  # type: ignore[misc]
    """What holds for every call, before its message is read.

    Not an interceptor, which would cost every call three coroutines more.

    Args:
        handlers: of all methods of all services, by path.
    """

    def __init__(self, app: App, handlers: Mapping[str, Any]) -> None:
        self._app = app
        self._handlers = handlers
        self._max_calls = app.options.max_connections
        self._calls = 0

    def service(self, details: Any) -> Any:
        """What answers a call; None: there is no such method."""
        task = asyncio.current_task()  # grpc's own, of this one call
        assert task is not None
        self._calls += 1
        task.add_done_callback(self._left)
        path, keys = details.method, self._app.keys
        if keys is not None and path not in OPEN_TO_ALL and not keys.allow(_headers(details.invocation_metadata)):
            return self._refuse(path, RequestError("an API key is needed: authorization: Bearer KEY", 401))
        if self._app.draining and path in WORK:
            return self._refuse(path, UnavailableError("the server is shutting down"))
        if self._calls > self._max_calls:
            return self._refuse(path, OverloadedError("too many calls at the same time; try again"))
        return self._handlers.get(path)

    def _left(self, task: Any) -> None:
        self._calls -= 1

    def _refuse(self, path: str, error: RequestError) -> Any:
        """A handler that reads nothing; on the wire it fits every kind of method."""

        async def refuse(requests: Any, context: Any) -> None:
            await _abort(self._app, _call_to(path), context, error, time.perf_counter())

        return grpc.stream_stream_rpc_method_handler(refuse)


class _Arrivals:
    """Reads the messages of calls that have one, and gives up on those that do not arrive in time.

    With one timer for all: one for each call would cost more than its parsing.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._since: dict[asyncio.Task[Any], float] = {}  # who waits, the oldest first, on the loop's clock
        self._late: set[asyncio.Task[Any]] = set()
        self._is_watched = False

    async def read(self, context: Any) -> bytes:
        """The message of a call.

        Raises:
            RequestError: 400, there is none; 504, it did not arrive in time.
        """
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        self._since[task] = loop.time()
        if not self._is_watched:
            self._is_watched = True
            loop.call_later(self._timeout_s, self._sweep, loop)
        try:
            data = await context.read()
        except asyncio.CancelledError:
            if task not in self._late:
                raise
            self._late.discard(task)
            task.uncancel()
            raise DeadlineError(f"the request did not arrive within {self._timeout_s:g} s") from None
        finally:
            del self._since[task]
        if data is grpc.aio.EOF:
            raise RequestError("the call has no request")
        return bytes(data)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        for task, since in self._since.items():
            if since + self._timeout_s > loop.time():
                loop.call_at(since + self._timeout_s, self._sweep, loop)
                return
            if task not in self._late:
                self._late.add(task)
                task.cancel()
        self._is_watched = False


# ---------------------------------------------------------------------------------------------------------- the service


class _Service:
    """The methods of the protocol: each one gets a parsed message and answers one."""

    def __init__(self, app: App, arrivals: _Arrivals) -> None:
        self._app = app
        self._arrivals = arrivals
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
            "ModelInfer": self._infer,
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
        handlers[STREAM] = grpc.stream_stream_rpc_method_handler(self._stream)
        return handlers

    async def _serve(self, path: str, request_class: Any, handle: Handle, requests: Any, context: Any) -> bytes:
        """One call with one message each way."""
        began = time.perf_counter()
        call = _call_to(path)
        is_work = path in WORK
        self._app.in_flight += is_work
        try:
            data = await self._arrivals.read(context)
            if path != INFER:  # where nobody looks at them
                _introduce(call, context, self._app)
            with Lease(self._app.budget) as lease:
                lease.take(len(data))
                answer = await handle(read_message(request_class, data), call)
            packed: bytes = answer.SerializeToString()
        except asyncio.CancelledError:
            _observe(self._app, call, context, 499, "the call was cancelled", began)
            raise
        except Exception as error:
            await _abort(self._app, call, context, error, began)
        finally:
            self._app.in_flight -= is_work
        _observe(self._app, call, context, 200, "", began)
        return packed

    async def _stream(self, requests: Any, context: Any) -> None:
        """A stream of requests, each answered once, in order; up to ``MAX_AHEAD`` of them are in flight together."""
        waiting: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(MAX_AHEAD)
        tasks: set[asyncio.Task[Any]] = set()

        async def read() -> None:
            try:
                async for data in requests:
                    task = asyncio.create_task(self._stream_answer(data, context))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    await waiting.put(task)
            except grpc.aio.BaseError:  # the call is over
                pass
            await waiting.put(None)

        reader = asyncio.create_task(read())
        try:
            while (task := await waiting.get()) is not None:
                await context.write((await task).SerializeToString())
        finally:
            for one in (reader, *tasks):
                one.cancel()

    async def _stream_answer(self, data: bytes, context: Any) -> Any:
        """The answer to one request of a stream; an error is an answer, too, and the stream goes on."""
        request_class, answer_class = self._messages["ModelStreamInfer"]
        began = time.perf_counter()
        call = _call_to(STREAM)
        message, status, text = request_class(), 200, ""
        self._app.in_flight += 1
        try:
            with Lease(self._app.budget) as lease:
                lease.take(len(data))
                message = read_message(request_class, data)
                if self._app.draining:
                    raise UnavailableError("the server is shutting down")
                answer = answer_class(infer_response=await self._infer(message, call))
            answer.infer_response.parameters["triton_final_response"].bool_param = True
        except asyncio.CancelledError:
            status, text = 499, "the call was cancelled"
            raise
        except Exception as error:
            _introduce(call, context, self._app)
            told = as_told(error, call.id)
            self._app.count_failure(call.model, call.version, told.status)
            status, text = told.status, str(told)
            answer = answer_class(error_message=text)
            answer.infer_response.id = message.id
        finally:
            self._app.in_flight -= 1
            _observe(self._app, call, context, status, text, began)
        return answer

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

    async def _infer(self, message: Any, call: Request) -> Any:
        chosen = self._find(message, "model_name", "model_version")
        call.model, call.version = message.model_name, chosen.spec.version
        call.args = {"version": message.model_version}
        asked = parse_infer(message, chosen.spec)
        call.images = len(asked.images)
        model, answer = await self._app.infer(call, chosen, asked.images, asked.timeout_s)
        return format_infer(asked, model.spec, answer.logits)

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

    def __init__(self, app: App, arrivals: _Arrivals) -> None:
        self._app = app
        self._arrivals = arrivals
        self._watchers = 0
        self.stopping = False

    def handlers(self) -> dict[str, Any]:
        """Of both methods, by path."""
        return {
            CHECK: grpc.stream_unary_rpc_method_handler(self._check),
            WATCH: grpc.stream_stream_rpc_method_handler(self._watch),
        }

    async def _check(self, requests: Any, context: Any) -> bytes:
        """The state now; NOT_FOUND for a service that this server does not have."""
        began, call = time.perf_counter(), _call_to(CHECK)
        try:
            status = self._status(await self._service(context))
            if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
                raise NotFoundError("there is no such service here")
        except RequestError as error:
            await _abort(self._app, call, context, error, began)
        _observe(self._app, call, context, 200, "", began)
        return _packed(status)

    async def _watch(self, requests: Any, context: Any) -> None:
        """The state now and whenever it changes."""
        began, call = time.perf_counter(), _call_to(WATCH)
        self._watchers += 1
        try:
            if self._watchers > MAX_WATCHERS:
                raise OverloadedError("too many watch already; call Check")
            service, told = await self._service(context), None
            while not self.stopping:
                status = self._status(service)
                if status != told:
                    await context.write(_packed(status))
                    told = status
                await asyncio.sleep(WATCH_S)
        except RequestError as error:
            await _abort(self._app, call, context, error, began)
        finally:
            self._watchers -= 1

    async def _service(self, context: Any) -> str:
        """The name that a client asks for."""
        data = await self._arrivals.read(context)
        return str(read_message(health_pb2.HealthCheckRequest, data).service)

    def _status(self, service: str) -> Any:
        states = health_pb2.HealthCheckResponse
        if service not in ("", oip.SERVICE):
            return states.SERVICE_UNKNOWN
        return states.SERVING if _is_ready(self._app) else states.NOT_SERVING


def _packed(status: Any) -> bytes:
    return bytes(health_pb2.HealthCheckResponse(status=status).SerializeToString())


def _is_ready(app: App) -> bool:
    return not app.draining and app.models.is_ready()


# ------------------------------------------------------------------------------------------------------ ends of a call


def _headers(metadata: Iterable[tuple[str, str | bytes]]) -> dict[bytes, bytes]:
    """A call's metadata in the form of HTTP's headers, which it is."""
    return {key.encode(): value if isinstance(value, bytes) else value.encode() for key, value in metadata or ()}


def _call_to(path: str) -> Request:
    """A call that has just come."""
    return Request("POST", path, b"", {}, _no_body)


def _introduce(call: Request, context: Any, app: App) -> None:
    """Read what stands in a call's metadata, which most calls are answered without."""
    if not call.id:
        call.headers = _headers(context.invocation_metadata())
        call.id = app.id_of(call.headers)


async def _no_body() -> bytes:
    return b""


async def _abort(app: App, call: Request, context: Any, error: Exception, began: float) -> NoReturn:
    """Answer an error; raises, as grpc wants it.

    Raises:
        grpc.aio.AbortError: always.
    """
    _introduce(call, context, app)
    told = as_told(error, call.id)
    app.count_failure(call.model, call.version, told.status)
    _observe(app, call, context, told.status, str(told), began)
    trailers: tuple[tuple[str, str], ...] = (("x-request-id", call.id),)
    if told.retry_after_s is not None:
        trailers = (*trailers, ("grpc-retry-pushback-ms", str(told.retry_after_s * 1000)))
    await context.abort(grpc.StatusCode[GRPC_CODES.get(told.status, "INTERNAL")], str(told), trailers)
    raise AssertionError("abort raises")


def _host_of(peer: str) -> str:
    """The address in "ipv4:127.0.0.1:5000" or "ipv6:%5B::1%5D:5000"."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


def _observe(app: App, call: Request, context: Any, status: int, error: str, began: float) -> None:
    app.grpc_answered[status] += 1
    if not app.is_observed(status):
        return
    _introduce(call, context, app)
    seconds = time.perf_counter() - began
    seen = Seen(
        protocol="grpc",
        method=call.path.rpartition("/")[2],
        path=call.path,
        status=status,
        request_id=call.id,
        client=_host_of(context.peer()),
        started=time.time_ns() - int(seconds * 1e9),
        seconds=seconds,
        model=call.model,
        version=call.version,
        images=call.images,
        timing=call.timing,
        parent=call.header("traceparent"),
        error=error,
    )
    app.observe(seen)
