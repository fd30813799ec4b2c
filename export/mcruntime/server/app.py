"""The HTTP application: one door for authentication and limits, a table of routes behind it, one form for errors.

Bare ASGI, since a framework on the hot path costs more than a small model takes. Every error is ``{"error":
"<sentence>"}`` and holds no path, process id or internal name.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

from mcruntime.cgroup import available_threads
from mcruntime.server.auth import WRONG_HOST, Hosts, Keys
from mcruntime.server.batcher import Answer
from mcruntime.server.body import Budget, Lease, read_body
from mcruntime.server.config import model_config
from mcruntime.server.errors import NotFoundError, OverloadedError, RequestError, as_told
from mcruntime.server.images import decode, name_classes, read_image
from mcruntime.server.lane import Client, Lane
from mcruntime.server.models import Model, Models
from mcruntime.server.options import ServerOptions
from mcruntime.server.protocol import (
    check_parameters,
    format_infer,
    format_metadata,
    load_json,
    read_infer,
)
from mcruntime.server.seen import Observer, Seen
from mcruntime.server.tensors import Images, InferRequest
from mcruntime.server.web import (
    HUNG_UP,
    JSON,
    MODEL,
    Handler,
    Request,
    Response,
    Route,
    Router,
    as_error,
    as_json,
    note_answer,
)

EXTENSIONS = [
    "binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters", "schedule_policy",
    "statistics",
]  # fmt: skip
REPOSITORY = r"/v2/repository(?:/[^/]+)?"
COMPRESS_FROM = 512  # bytes of an answer
COMPRESSORS = {"gzip": 31, "deflate": 15}
MOST_LANES = 1000
logger = logging.getLogger("mcruntime.server")
T = TypeVar("T")


class App:
    """The ASGI application.

    Args:
        keys: None: no key is asked for.
        control: keys for loading and unloading; None: both are off.
        routes: more of them, such as the page's and the metrics'.
        observers: told of every request when it is over.
        refusals: told of every request that was answered 400 or more.

    Attributes:
        draining: set it to answer 503 to readiness probes and new work, while what is in flight is finished.
        grpc_in_flight: gRPC calls to infer or load that have no answer yet; counted by grpc's threads under their lock.
        answered: HTTP answers by status; ``HUNG_UP``: the client was gone before its answer.
        grpc_answered: the same of gRPC, in HTTP's statuses.
        hosts: the names that the server may be asked by; None: any.
        is_locked: whether an API key is asked for.
        lanes: by path, of models that answered: no pattern is tried for them again, and their requests may be taken
            before they reach this application. Bounded.
        budget: of the bytes of all request bodies, also gRPC's.
    """

    def __init__(
        self,
        models: Models,
        options: ServerOptions,
        *,
        keys: Keys | None = None,
        control: Keys | None = None,
        routes: Callable[[App], Sequence[Route]] = lambda app: (),
        observers: Sequence[Observer] = (),
        refusals: Sequence[Observer] = (),
    ) -> None:
        self.models = models
        self.options = options
        self.draining = False
        self._in_flight = 0
        self.reading = 0  # POST requests whose body is not all there
        self.grpc_in_flight = 0
        self.answered: Counter[int] = Counter()
        self.grpc_answered: Counter[int] = Counter()
        self.started = time.time()
        self.mirror: Callable[[Model, Images, Answer], None] | None = None
        self.is_locked = keys is not None
        self.keys, self.control = keys, control
        self.hosts: Hosts | None = None
        self.connections: Callable[[], int] | None = None  # open ones, if the server can tell
        self._observers, self._refusals = list(observers), list(refusals)
        self.budget = Budget(options.max_inflight_bytes)
        self._decoders = ThreadPoolExecutor(available_threads(), thread_name_prefix="decode")
        self._decoding = 0
        self._router = Router([*self._routes(), *routes(self)])
        self.lanes: dict[str, Lane] = {}
        self._infer_route = Route("", {"POST": self._infer})
        self._numbers = itertools.count(1)
        self._prefix = os.urandom(6).hex()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        began = time.perf_counter()
        headers = dict(scope["headers"])
        is_work = scope["method"] == "POST"
        request = Request(scope["method"], scope["path"], scope["query_string"], headers, began=began)
        request.id = self.id_of(headers)
        accepted = 0
        self.reading += is_work
        try:
            with Lease(self.budget) as lease:

                async def read() -> bytes:
                    nonlocal accepted
                    body = await read_body(
                        receive,
                        headers,
                        lease,
                        max_bytes=self.options.max_body_bytes,
                        timeout_s=self.options.body_timeout_s,
                    )
                    if is_work and not accepted:
                        accepted = 1
                        self.reading -= 1
                        self._in_flight += 1
                    return body

                request.read = read
                response = await self._answer(request)
            if self.draining:
                response.headers = (*response.headers, ("connection", "close"))
            await _send(response, request, send)
        except asyncio.CancelledError:
            self.finished(scope.get("client"), request, Response(status=HUNG_UP, error="the client hung up"))
            raise
        finally:
            self._in_flight -= accepted
            self.reading -= is_work - accepted
        self.finished(scope.get("client"), request, response)

    def count_in_flight(self, change: int) -> None:
        """A request on the short way begins (1) or is answered (-1)."""
        self._in_flight += change

    @property
    def in_flight(self) -> int:
        """POST requests that were read, and gRPC calls to infer or load, that have no answer yet."""
        return self._in_flight + self.grpc_in_flight

    def serves(self, path: str) -> bool:
        """Whether there is anything at a path."""
        return self._router.find(path) is not None

    def close(self) -> None:
        """Let the decoders go."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    # -------------------------------------------------------------------------------------------------------- errors

    async def _answer(self, request: Request) -> Response:
        """What the handler says, or the error that it raised, as an answer."""
        try:
            return await self._handle(request)
        except Exception as error:
            return self.refusal(error, request)

    def refusal(self, error: Exception, request: Request) -> Response:
        """An error as an answer."""
        told = as_told(error, request.id)
        error.__traceback__ = None  # it holds frames that hold the error: a circle, and the request's body in it
        self.count_failure(request.model, request.version, told.status, time.perf_counter() - request.began)
        headers = (("retry-after", str(told.retry_after_s)),) if told.retry_after_s is not None else ()
        return as_error(str(told), told.status, headers)

    async def _handle(self, request: Request) -> Response:
        if self.hosts is not None and not self.hosts.allow(request.headers.get(b"host")):
            return as_error(WRONG_HOST, 421)
        lane = self.lanes.get(request.path)
        if lane is not None:
            route, args = self._infer_route, lane.args
        else:
            found = self._router.find(request.path)
            route, args = found if found else (_NOTHING, {})
        if self.keys is not None and not route.open_to_all and not self.keys.allow(request.headers):
            return as_error("an API key is needed: Authorization: Bearer KEY", 401, (("www-authenticate", "Bearer"),))
        if route is _NOTHING:
            raise NotFoundError("there is nothing at this path; see /v2 and /docs")
        request.args = args
        handler = route.handlers.get("GET" if request.method == "HEAD" else request.method)
        if handler is None:
            allowed = sorted({*route.handlers, *(["HEAD"] if "GET" in route.handlers else [])})
            return as_error("Method Not Allowed", 405, (("allow", ", ".join(allowed)),))
        if self.draining and request.method == "POST":
            return as_error("the server is shutting down", 503, (("retry-after", "1"),))
        return await handler(request)

    def count_failure(self, model: str, version: str, status: int, seconds: float) -> None:
        """A request was answered with an error, in the statistics of the model that it was for; "": of none."""
        reason = {503: "rejected", 504: "timeout", 500: "internal"}.get(status, "input")
        statistics = self.models.statistics.get((model, version))
        if statistics is not None:
            statistics.failed(reason, seconds)

    # ----------------------------------------------------------------------------------------------------- the routes

    def _routes(self) -> list[Route]:
        def get(pattern: str, handler: Handler, *, open_to_all: bool = False) -> Route:
            return Route(pattern, {"GET": handler}, open_to_all)

        def post(pattern: str, handler: Handler) -> Route:
            return Route(pattern, {"POST": handler})

        return [
            post(f"{MODEL}/infer", self._infer),
            post(f"{MODEL}/predict", self._predict),
            post("/predict", self._predict),
            get("/v2", self._server),
            get("/v2/health/live", self._live, open_to_all=True),
            get("/v2/health/ready", self._ready, open_to_all=True),
            get("/v2/models/stats", self._all_statistics),
            get("/v2/models", self._names),
            get(MODEL, self._metadata),
            get(f"{MODEL}/ready", self._model_ready),
            get(f"{MODEL}/config", self._config),
            get(f"{MODEL}/stats", self._statistics),
            post(f"{REPOSITORY}/index", self._index),
            post(rf"{REPOSITORY}/models/(?P<model>[^/]+)/load", self._load),
            post(rf"{REPOSITORY}/models/(?P<model>[^/]+)/unload", self._unload),
        ]

    async def _server(self, request: Request) -> Response:
        return as_json({"name": "mcdeploy", "version": VERSION, "extensions": EXTENSIONS})

    async def _live(self, request: Request) -> Response:
        return as_json({"live": True})

    async def _ready(self, request: Request) -> Response:
        ready = not self.draining and self.models.is_ready()
        return as_json({"ready": ready}, 200 if ready else 503)

    async def _names(self, request: Request) -> Response:
        return as_json({"models": sorted({model.spec.name for model in self.models})})

    async def _metadata(self, request: Request) -> Response:
        spec = self._find(request).spec
        return as_json(format_metadata(spec, self.models.versions(spec.name)))

    async def _model_ready(self, request: Request) -> Response:
        try:
            self._find(request)
        except NotFoundError:
            return as_error("Model version not ready", 400)
        ready = not self.draining
        return as_json({"name": request.args["model"], "ready": ready}, 200 if ready else 503)

    async def _config(self, request: Request) -> Response:
        return as_json(model_config(self._find(request)))

    async def _statistics(self, request: Request) -> Response:
        found = self.models.chosen(request.args["model"], request.args["version"])
        return as_json({"model_stats": [self._stats_of(model) for model in found]})

    async def _all_statistics(self, request: Request) -> Response:
        return as_json({"model_stats": [self._stats_of(model) for model in self.models.chosen()]})

    def _stats_of(self, model: Model) -> dict[str, Any]:
        return model.statistics.as_dict(model.spec.name, model.spec.version)

    async def _index(self, request: Request) -> Response:
        body = await request.read()
        only_ready = load_json(body).get("ready", False) if body else False
        if not isinstance(only_ready, bool):
            raise RequestError("'ready' must be true or false")
        loop = asyncio.get_running_loop()
        return as_json(await loop.run_in_executor(self._decoders, self.models.index, only_ready))

    async def _load(self, request: Request) -> Response:
        self._check_control(request)
        body = await request.read()
        parameters = check_parameters(load_json(body)) if body else {}
        refuse_load_parameters(parameters)
        await _to_the_end(self.models.load(request.args["model"]))  # goes on when the client hangs up
        return Response()

    async def _unload(self, request: Request) -> Response:
        self._check_control(request)
        body = await request.read()
        check_parameters(load_json(body)) if body else {}
        await _to_the_end(self.models.unload(request.args["model"]))
        return Response()

    def _check_control(self, request: Request) -> None:
        refuse_control(self.control, request.headers)

    # ------------------------------------------------------------------------------------------------------ the work

    async def _infer(self, request: Request) -> Response:
        chosen = self._find(request)
        request.model, request.version = request.args["model"], chosen.spec.version
        asked = read_infer(request.headers, await request.read(), chosen.spec)
        request.images = len(asked.images)
        model, answer = await self.infer(request, chosen, asked.images, asked.timeout_s)
        if request.path not in self.lanes and len(self.lanes) < MOST_LANES:
            self.lanes[request.path] = Lane(self, request.path, request.args)
        return self.infer_response(request.headers, asked, model, answer)

    def infer_response(
        self, headers: dict[bytes, bytes], asked: InferRequest, model: Model, answer: Answer
    ) -> Response:
        """The answer in the form that was asked for.

        Args:
            headers: of the request.

        Raises:
            RequestError: 400; it has no such form.
        """
        content, head = format_infer(asked, model.spec, answer.logits)
        if head is None:
            return _compressed(Response(content, 200, JSON), headers)
        own = (("inference-header-content-length", str(head)),)
        return _compressed(Response(content, 200, "application/octet-stream", own), headers)

    async def _predict(self, request: Request) -> Response:
        name, number = request.args.get("model", ""), request.args.get("version", "")
        model = self.models.find(name, number) if name else self.models.only()
        request.model, request.version = model.spec.name, model.spec.version
        data, top = await read_image(request)
        began = time.perf_counter()
        images = await self.decode_image(data, model)
        request.timing.decode_s = time.perf_counter() - began
        model.statistics.decoded(request.timing.decode_s)
        request.images = 1
        model, answer = await self.infer(request, model, images, None)
        best = name_classes(answer.logits[0], model.spec.labels, top)
        timing = {
            "decode_ms": request.timing.decode_s * 1e3,
            "queue_ms": answer.queue_s * 1e3,
            "compute_ms": answer.compute_s * 1e3,
            "batch": answer.batch,
        }
        tree = {**best[0], "top": best, "model": model.spec.name, "version": model.spec.version, "timing": timing}
        return as_json(tree)

    async def decode_image(self, data: bytes, model: Model) -> Images:
        """An image file as a model reads it, [1, C, H, W]; decoded in a thread.

        Raises:
            DataError, TooLargeError: not an image, damaged, or too large.
            OverloadedError: too many are waiting to be decoded.
        """
        if self._decoding >= self.options.max_queue + 1:
            raise OverloadedError
        self._decoding += 1
        try:
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self._decoders, decode, data, model.preprocessing, self.options.max_pixels)
            try:
                return await _to_the_end(work)
            except asyncio.CancelledError:  # the client hung up; the thread still holds the image, so it still counts
                await asyncio.wait([work])
                raise
        finally:
            self._decoding -= 1

    async def infer(
        self, request: Request, chosen: Model, images: Images, timeout_s: float | None
    ) -> tuple[Model, Answer]:
        """Run images on the model they were checked for, note where the time went, and mirror them to a shadow."""
        number = request.args.get("version", "")
        limit_s = self.limit_of(timeout_s)
        model, answer = await self.models.infer(request.model, number, images, limit_s, first=chosen)
        self.note_answer(request, model, images, answer)
        return model, answer

    def limit_of(self, timeout_s: float | None) -> float:
        """The deadline of a request that asks for one, or for none; seconds from now."""
        return self.options.timeout_s if timeout_s is None else min(timeout_s, self.options.timeout_s)

    def note_answer(self, request: Request, model: Model, images: Images, answer: Answer) -> None:
        """Write down which version answered a request and where the time went, and mirror it to a shadow."""
        note_answer(request, model, answer)
        if self.mirror is not None:
            self.mirror(model, images, answer)

    def _find(self, request: Request) -> Model:
        return self.models.find(request.args["model"], request.args["version"])

    # ------------------------------------------------------------------------------------------------------ observing

    def id_of(self, headers: dict[bytes, bytes]) -> str:
        """The client's request id, if it is one that can stand in a log; else one of ours."""
        given = headers.get(b"x-request-id")
        if given and len(given) <= 64 and given.replace(b"-", b"").replace(b"_", b"").isalnum():
            return given.decode("ascii")
        return f"{self._prefix}{next(self._numbers):08x}"

    def is_observed(self, status: int) -> bool:
        """Whether anyone wants to be told of a request with this outcome."""
        return bool(self._observers or (status >= 400 and self._refusals))

    def observe(self, seen: Seen) -> None:
        """Tell those who want to know of a request that is over; also for gRPC's."""
        for observer in [*self._observers, *self._refusals] if seen.status >= 400 else self._observers:
            try:
                observer(seen)
            except Exception:  # must not cost anyone an answer
                logger.exception("a request was not observed")

    def finished(self, client: Client, request: Request, response: Response) -> None:
        """Count an answer, and tell those who want to know of it."""
        self.answered[response.status] += 1
        if not self.is_observed(response.status):
            return
        seconds = time.perf_counter() - request.began
        seen = Seen(
            protocol="http",
            method=request.method,
            path=request.path,
            status=response.status,
            request_id=request.id,
            client=client[0] if client else "",
            started=time.time_ns() - int(seconds * 1e9),
            seconds=seconds,
            model=request.model,
            version=request.version,
            images=request.images,
            timing=request.timing,
            parent=request.header("traceparent"),
            error=response.error,
        )
        self.observe(seen)


def refuse_load_parameters(parameters: dict[str, Any]) -> None:
    """A client may name a model to load, and nothing else: uploaded files and configurations are a way to run code.

    Raises:
        RequestError: 400.
    """
    if parameters:
        raise RequestError(
            "load takes no parameters here: neither a configuration nor files can be sent to this server"
        )


def refuse_control(control: Keys | None, headers: dict[bytes, bytes]) -> None:
    """Refuse who may not load and unload models. The control keys are keys of their own, in their own header or, where
    no API key is asked for, in ``Authorization``.

    Raises:
        RequestError: 403.
    """
    if control is None:
        raise RequestError("loading and unloading models is switched off on this server", 403)
    own = {b"x-api-key": headers[b"x-control-key"]} if b"x-control-key" in headers else headers
    if not control.allow(own):
        raise RequestError("loading and unloading models needs a control key: X-Control-Key: KEY", 403)


def _compressed(response: Response, headers: dict[bytes, bytes]) -> Response:
    """The answer packed as the request's headers ask, if that is worth it."""
    wanted = headers.get(b"accept-encoding")
    if not wanted or len(response.body) < COMPRESS_FROM:
        return response
    parts = [part.replace(b" ", b"").lower().decode("latin-1") for part in wanted.split(b",")]
    names = {part.partition(";")[0] for part in parts if not re.search(r";q=0(\.0*)?$", part)}
    encoding = next((name for name in COMPRESSORS if name in names), None)
    if encoding is None:
        return response
    packer = zlib.compressobj(1, wbits=COMPRESSORS[encoding])
    response.body = packer.compress(response.body) + packer.flush()
    response.headers = (*response.headers, ("content-encoding", encoding))
    return response


async def _send(response: Response, request: Request, send: Any) -> None:
    headers = [
        (b"content-type", response.content_type.encode()),
        (b"x-request-id", request.id.encode()),
    ]
    if response.status != 304:  # which has no length of its own
        headers.append((b"content-length", str(len(response.body)).encode()))
    headers += [(name.encode(), value.encode("latin-1")) for name, value in response.headers]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


async def _to_the_end(work: Awaitable[T]) -> T:
    """The outcome of work that goes on when the client hangs up; an error that then nobody hears is no news."""
    future = asyncio.ensure_future(work)
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(future)


_NOTHING = Route("", {})
try:
    VERSION = version("mcdeploy")
except PackageNotFoundError:  # run from a source tree
    VERSION = "unknown"
