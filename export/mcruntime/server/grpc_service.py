"""The methods of the Open Inference Protocol over gRPC."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

import grpc
from google.protobuf import json_format

from mcruntime.server import oip
from mcruntime.server.app import EXTENSIONS, VERSION, App, refuse_control, refuse_load_parameters
from mcruntime.server.body import Lease
from mcruntime.server.config import model_config
from mcruntime.server.errors import NotFoundError, RequestError, UnavailableError
from mcruntime.server.grpc_calls import GOODBYE, INFER, NO_KEY, STREAM, WORK, Bridge, Call, fail, headers_of
from mcruntime.server.grpc_health import is_ready
from mcruntime.server.grpc_protocol import format_infer, parse_infer, read_message
from mcruntime.server.models import Model
from mcruntime.server.protocol import format_metadata
from mcruntime.server.tensors import InferRequest
from mcruntime.server.web import HUNG_UP, Request

MAX_AHEAD = 32  # requests of one stream that may be in flight

Handle = Callable[[Any, Request], Awaitable[Any]]  # a message and its call -> the answer's message


class Service:
    """The methods of the protocol: each one gets a parsed message and answers one."""

    def __init__(self, app: App, bridge: Bridge) -> None:
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
        call = Call(path, context, self._app)
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
        call = Call(INFER, context, self._app)
        data = self._bridge.read(requests, context)
        return self._bridge.answer(call, partial(self._infer_answer, call, data))

    def _infer_answer(self, call: Call, data: bytes | None) -> bytes:
        with self._accepted(call, data) as whole:
            chosen, asked = self._asked(read_message(self._messages["ModelInfer"][0], whole), call)
            model, found = self._bridge.infer(call, chosen, asked)
            return bytes(format_infer(asked, model.spec, found.logits).SerializeToString())

    @contextlib.contextmanager
    def _accepted(self, call: Call, data: bytes | None) -> Iterator[bytes]:
        """Within the limits, the message of a call that is answered now."""
        if data is None:
            raise RequestError("the call has no request")
        is_work = call.path in WORK
        with self._bridge.in_flight(is_work), Lease(self._app.budget) as lease:
            if is_work and self._app.draining:
                raise UnavailableError(GOODBYE)
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
        call = Call(STREAM, context, self._app)
        try:
            with self._bridge.ended_by(end):
                for future in self._bridge.read_ahead(call, requests, MAX_AHEAD, begin):
                    yield future.result()
                    pending.discard(future)
        except CancelledError:  # the call is over, or the server
            if self._bridge.parted.is_set():
                self._bridge.answer(call, partial(fail, UnavailableError(GOODBYE)))

    async def _stream_answer(self, data: bytes, context: Any) -> bytes:
        """The answer to one request of a stream; an error is an answer, too, and the stream goes on."""
        request_class, answer_class = self._messages["ModelStreamInfer"]
        call = Call(STREAM, context, self._app)
        message = request_class()
        try:
            keys = self._app.keys
            if keys is not None and not keys.allow(headers_of(context.invocation_metadata())):  # read again meanwhile
                raise RequestError(NO_KEY, 401)
            message = read_message(request_class, data)
            with self._accepted(call, data):
                chosen, asked = self._asked(message, call)
                model, found = await self._app.infer(call, chosen, asked.images, asked.timeout_s)
                answer = answer_class(infer_response=format_infer(asked, model.spec, found.logits))
            answer.infer_response.parameters["triton_final_response"].bool_param = True
            self._bridge.observe(call, 200, "")
        except asyncio.CancelledError:
            self._bridge.observe(call, HUNG_UP, "the call was cancelled")
            raise
        except Exception as error:
            answer = answer_class(error_message=str(self._bridge.told(call, error)))
            answer.infer_response.id = message.id
        return bytes(answer.SerializeToString())

    # ------------------------------------------------------------------------------------------- health and metadata

    async def _live(self, message: Any, call: Request) -> Any:
        return self._answer("ServerLive", live=True)

    async def _ready(self, message: Any, call: Request) -> Any:
        return self._answer("ServerReady", ready=is_ready(self._app))

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
        found = self._models.chosen(message.name, _checked(message.version))
        trees = [model.statistics.as_dict(model.spec.name, model.spec.version) for model in found]
        return json_format.ParseDict({"model_stats": trees}, self._answer("ModelStatistics"))

    # --------------------------------------------------------------------------------------------------- the repository

    async def _index(self, message: Any, call: Request) -> Any:
        rows = await asyncio.to_thread(self._models.index, message.ready)
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
        return self._models.find(getattr(message, name), _checked(getattr(message, version)))

    def _answer(self, method: str, /, **fields: Any) -> Any:
        return self._messages[method][1](**fields)


def _checked(version: str) -> str:
    """A version that a client names; "": none.

    Raises:
        RequestError: it is no number.
    """
    if version and not (version.isascii() and version.isdecimal()):
        raise RequestError(
            f"failed to get model version from specified version string '{version[:20]}', version should be an "
            "integral value > 0"
        )
    return version
