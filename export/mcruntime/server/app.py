"""The HTTP application: routes, limits and error answers. Reading and writing tensors is ``protocol``'s.

Every error is ``{"error": "<sentence>"}`` and holds no path, process id or internal name. Models are found in a dict
that is filled at start; nothing from a request is joined into a path, fetched or unpickled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mcruntime.cgroup import available_threads
from mcruntime.errors import DataError, McdeployError
from mcruntime.preprocess import Preprocessing, open_image, prepare
from mcruntime.server import MAX_BODY_BYTES
from mcruntime.server.executor import Executor, Overloaded
from mcruntime.server.protocol import VERSION, ModelSpec, RequestError, dump, format_infer, format_metadata, parse_infer

BODY_TIMEOUT_S = 30.0  # for a body to arrive
RETRY_AFTER_S = "1"
TOP = 5

logger = logging.getLogger("mcruntime")


@dataclass(frozen=True)
class ServedModel:
    """A model that is loaded and has passed its self-test."""

    spec: ModelSpec
    labels: Sequence[str]
    preprocessing: Preprocessing
    executor: Executor


class App:
    """The ASGI application.

    Attributes:
        draining: set it to answer 503 to readiness probes and new work, while what is in flight is finished.
        in_flight: POST requests that have no answer yet.
    """

    def __init__(self, models: Sequence[ServedModel], max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.draining = False
        self.in_flight = 0
        self._models = {model.spec.name: model for model in models}
        self._max_body_bytes = max_body_bytes
        self._decoders = ThreadPoolExecutor(available_threads(), thread_name_prefix="decode")
        self._starlette = Starlette(routes=self._routes(), exception_handlers=_HANDLERS)
        self._starlette.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._starlette(scope, receive, send)
            return
        if self.draining:
            response = _error(503, "the server is shutting down", {"Retry-After": RETRY_AFTER_S, "Connection": "close"})
            await response(scope, receive, send)
            return
        self.in_flight += 1
        try:
            await self._starlette(scope, receive, send)
        finally:
            self.in_flight -= 1

    def close(self) -> None:
        """Let the worker threads go."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        for model in self._models.values():
            model.executor.close()

    def _routes(self) -> list[Route]:
        routes = [
            Route("/v2", self._server),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/predict", self._predict, methods=["POST"]),
        ]
        for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                Route(path, self._metadata),
                Route(f"{path}/ready", self._model_ready),
                Route(f"{path}/infer", self._infer, methods=["POST"]),
                Route(f"{path}/predict", self._predict, methods=["POST"]),
            ]
        return routes

    async def _server(self, request: Request) -> Response:
        return _json({"name": "mcdeploy", "version": _VERSION, "extensions": []})

    async def _live(self, request: Request) -> Response:
        return _json({"live": True})

    async def _ready(self, request: Request) -> Response:
        return _json({"ready": not self.draining}, 503 if self.draining else 200)

    async def _metadata(self, request: Request) -> Response:
        return Response(format_metadata(self._find(request).spec), media_type="application/json")

    async def _model_ready(self, request: Request) -> Response:
        self._find(request)
        return await self._ready(request)

    async def _infer(self, request: Request) -> Response:
        model = self._find(request)
        if "inference-header-content-length" in request.headers:
            raise RequestError(
                "binary tensors (Inference-Header-Content-Length) are not supported yet; send JSON tensors"
            )
        parsed = parse_infer(await _read_body(request, self._max_body_bytes), model.spec)
        with model.executor.place():
            logits = await model.executor.infer(parsed.images)
        return Response(format_infer(parsed, model.spec, logits), media_type="application/json")

    async def _predict(self, request: Request) -> Response:
        model = self._find(request)
        image = await _read_image(request, self._max_body_bytes)
        with model.executor.place():
            loop = asyncio.get_running_loop()
            images = await loop.run_in_executor(self._decoders, _decode, image, model.preprocessing)
            logits = await model.executor.infer(images)
        top = _top_classes(logits[0], model.labels)
        return _json({**top[0], "top": top})

    def _find(self, request: Request) -> ServedModel:
        name, wanted = request.path_params.get("model"), request.path_params.get("version", VERSION)
        if name is None:
            if len(self._models) != 1:
                raise RequestError("several models are served here; POST to /v2/models/{name}/predict", 404)
            return next(iter(self._models.values()))
        model = self._models.get(name)
        if model is None:
            raise RequestError(f"Request for unknown model: '{name[:100]}' is not found", 404)
        if wanted != VERSION:
            raise RequestError(f"Request for unknown model: '{name}' version {wanted[:20]} is not found", 404)
        return model


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body; of one that is too large, some more is read and dropped, so that the client sees the answer."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise RequestError(f"Content-Encoding '{encoding[:20]}' is not supported; send the body uncompressed", 415)
    chunks, num_bytes = [], 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes <= max_bytes:
                    chunks.append(chunk)
                elif num_bytes > 4 * max_bytes:
                    break
    except TimeoutError:
        raise RequestError(f"the request body did not arrive within {BODY_TIMEOUT_S:.0f} s", 408) from None
    if num_bytes > max_bytes:
        raise RequestError(f"the request body is larger than {max_bytes} bytes; send a smaller batch", 413)
    return b"".join(chunks)


async def _read_image(request: Request, max_bytes: int) -> bytes:
    """The bytes of the image: the form field ``file`` of a multipart body, else the body itself."""
    body = await _read_body(request, max_bytes)
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return body

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(request.headers, chunks(), max_files=1, max_fields=8, max_part_size=max_bytes)
    parser.spool_max_size = max_bytes + 1  # nothing is written to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(f"the multipart form cannot be read: {error.message}") from None
    try:
        part = form.get("file")
        if part is None:
            raise RequestError("the multipart form has no field 'file'; send one with the image in it")
        if isinstance(part, str):
            raise RequestError("the multipart field 'file' has no filename, so it is text; send the image as a file")
        return await part.read()
    finally:
        await form.close()


def _decode(data: bytes, how: Preprocessing) -> NDArray[np.float32]:
    return prepare(open_image(data), how)[np.newaxis]


def _top_classes(logits: NDArray[np.float32], labels: Sequence[str]) -> list[dict[str, str | int | float]]:
    """The most probable classes, best first; of equal ones the lower index."""
    exponents = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = exponents / exponents.sum()
    order = np.argsort(-logits, kind="stable")[:TOP]  # probabilities may underflow to ties
    return [{"label": labels[i], "index": int(i), "probability": float(probabilities[i])} for i in order]


def _json(tree: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(tree), status, headers, media_type="application/json")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return _json({"error": message}, status, headers)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return _error(404, "there is nothing at this path; see /v2 and /v2/models/{name}", headers)
    return _error(error.status_code, error.detail, headers)


async def _answer_request(request: Request, error: Exception) -> Response:
    return _error(error.status if isinstance(error, RequestError) else 400, str(error))


async def _answer_overload(request: Request, error: Exception) -> Response:
    return _error(503, "Exceeds maximum queue size; try again", {"Retry-After": RETRY_AFTER_S})


async def _answer_broken(request: Request, error: Exception) -> Response:
    logger.error("%s", error)
    return _error(500, "the model could not answer this request")


async def _answer_gone(request: Request, error: Exception) -> Response:
    return _error(400, "the request body did not arrive")  # nobody reads it: the client hung up


async def _answer_bug(request: Request, error: Exception) -> Response:
    return _error(500, "internal server error")  # Starlette raises the error again, and uvicorn logs it


_HANDLERS: dict[int | type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    HTTPException: _answer_http,
    RequestError: _answer_request,
    DataError: _answer_request,
    Overloaded: _answer_overload,
    McdeployError: _answer_broken,
    ClientDisconnect: _answer_gone,
    Exception: _answer_bug,
}

try:
    _VERSION = version("mcdeploy")
except PackageNotFoundError:  # run from a source tree
    _VERSION = "unknown"
