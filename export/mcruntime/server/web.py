"""Requests and answers of the HTTP side as plain data, and the table that leads from one to the other."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from mcruntime.server.errors import RequestError
from mcruntime.server.protocol import dump

if TYPE_CHECKING:
    from mcruntime.server.batcher import Answer
    from mcruntime.server.models import Model

JSON = "application/json"
MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[0-9]+))?"  # where everything about one model is
MOST_PARAMETERS = 32  # of a query
HUNG_UP = 499  # no status of HTTP's, but what logs and dashboards call it


async def no_body() -> bytes:
    """Of a request that has none."""
    return b""


@dataclass(slots=True)
class Timing:
    """Where a request's time went, in seconds; filled in on the way."""

    decode_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    batch: int = 0  # images in the batch it was run in
    ended: float = 0.0  # the inference, on time.monotonic's clock; 0: there was none


@dataclass(slots=True)
class Request:
    """One HTTP request.

    Attributes:
        headers: names in lower case; of a repeated one, the last.
        args: what the path's pattern names.
        read: the whole body, within the server's limits.
        model, version: of the model that answered, set on the way.
        began: when its header was there, on ``time.perf_counter``'s clock.
    """

    method: str
    path: str
    query_string: bytes
    headers: dict[bytes, bytes]
    read: Callable[[], Awaitable[bytes]] = no_body
    id: str = ""
    args: dict[str, str] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)
    model: str = ""
    version: str = ""
    images: int = 0
    began: float = 0.0

    def header(self, name: str) -> str:
        """A header's value; "" if there is none."""
        return self.headers.get(name.encode(), b"").decode("latin-1")

    def query(self, name: str) -> str | None:
        """A parameter of the query; None if it is not there.

        Raises:
            RequestError: 400; it is there more than once, or there are too many of all.
        """
        try:
            pairs = parse_qsl(
                self.query_string.decode("latin-1"), keep_blank_values=True, max_num_fields=MOST_PARAMETERS
            )
        except ValueError:
            raise RequestError(f"the query has more than {MOST_PARAMETERS} parameters") from None
        values = [value for key, value in pairs if key == name]
        if len(values) > 1:
            raise RequestError(f"'{name}' is given more than once")
        return values[0] if values else None


@dataclass(slots=True)
class Response:
    """One HTTP answer."""

    body: bytes = b""
    status: int = 200
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()
    error: str = ""  # what the client is told, for the logs


def note_answer(request: Request, model: Model, answer: Answer) -> None:
    """Write down which version answered a request, and where the time went."""
    request.version = model.spec.version
    timing = request.timing
    timing.queue_s, timing.compute_s, timing.batch = answer.queue_s, answer.compute_s, answer.batch
    timing.ended = answer.ended


Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Route:
    """A path, as a regular expression that must match all of it, and what answers each method there."""

    pattern: str
    handlers: dict[str, Handler]
    open_to_all: bool = False  # no API key is asked for


def as_json(tree: Any, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """A tree as a JSON answer."""
    return Response(dump(tree), status, JSON, headers)


def as_error(message: str, status: int, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """Every error looks like this."""
    return Response(dump({"error": message}), status, JSON, headers, message)


class Router:
    """Finds the route of a path."""

    def __init__(self, routes: list[Route]) -> None:
        self._routes = [(re.compile(route.pattern), route) for route in routes]

    def find(self, path: str) -> tuple[Route, dict[str, str]] | None:
        """The first route whose pattern matches, and what the pattern names."""
        for pattern, route in self._routes:
            match = pattern.fullmatch(path)
            if match:
                return route, {name: value or "" for name, value in match.groupdict().items()}
        return None
