"""The short way of an infer request: from its last byte to the batcher and back, without a task of its own.

A model small enough to be worth serving from Python takes no longer than an ASGI cycle, a task and three turns of the
event loop do beside it. So a request that is whole when its header is read, and that asks a model that has answered
before, is taken here; every other goes the long way through ``App.__call__``, which says the same in more steps. What
is refused is refused with the same words, since both ways use the same parts of ``App``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from mcruntime.server.batcher import Answer, Closed, Outcome, Ticket
from mcruntime.server.body import Lease
from mcruntime.server.models import Model
from mcruntime.server.tensors import InferRequest
from mcruntime.server.web import HUNG_UP, Request, Response

if TYPE_CHECKING:
    from mcruntime.server.app import App

Client = tuple[str, int] | None


class Visit(NamedTuple):
    """Who sent a request.

    Attributes:
        reply: called with the answer, on the event loop, unless the call is cancelled; maybe before ``take`` returns.
        is_alone: no other connection has sent anything lately, so there is nothing to be batched with.
    """

    client: Client
    loop: asyncio.AbstractEventLoop
    reply: Callable[[Response, Request], None]
    is_alone: bool


class Lane:
    """The URL of a model's infer.

    Args:
        args: what the URL names: ``model``, ``version``.
    """

    def __init__(self, app: App, path: str, args: dict[str, str]) -> None:
        self.app = app
        self.path = path
        self.args = args

    def take(self, headers: dict[bytes, bytes], body: bytes, visit: Visit) -> Call | None:
        """Begin to answer a request; None: it must go the long way.

        Args:
            headers: names in lower case.
        """
        app = self.app
        if app.draining or b"content-encoding" in headers or len(body) > app.options.max_body_bytes:
            return None
        if app.hosts is not None and not app.hosts.allow(headers.get(b"host")):
            return None
        if app.keys is not None and not app.keys.allow(headers):
            return None
        call = Call(self, headers, visit)
        call.start(body)
        return call


class Call:
    """One request on the short way."""

    __slots__ = ("_app", "_asked", "_is_over", "_lease", "_model", "_request", "_ticket", "_visit")

    def __init__(self, lane: Lane, headers: dict[bytes, bytes], visit: Visit) -> None:
        app = self._app = lane.app
        self._request = Request("POST", lane.path, b"", headers, began=time.perf_counter(), args=lane.args)
        self._request.id = app.id_of(headers)
        self._lease = Lease(app.budget)
        self._visit = visit
        self._is_over = False
        self._model: Model
        self._asked: InferRequest
        self._ticket: Ticket | None = None

    def start(self, body: bytes) -> None:
        """Check the request and hand its images to the model, or refuse it."""
        app, request = self._app, self._request
        app.count_in_flight(1)
        try:
            self._lease.take(len(body))
            chosen = app.choose(request)
            self._asked = asked = app.read_infer(request, body, chosen)
            if self._visit.is_alone and asked.timeout_s is None:
                answer = chosen.now(asked.images)
                if answer is not None:
                    self._model = chosen
                    self._end(self._answered(answer))
                    return
            self._submit(chosen, asked)
        except Exception as error:
            self._end(app.refusal(error, request))

    def cancel(self) -> None:
        """The client hung up; what still waits is not run."""
        if self._is_over:
            return
        if self._ticket is not None:
            self._model.cancel(self._ticket)
        self._close(Response(status=HUNG_UP, error="the client hung up"))

    def _submit(self, model: Model, asked: InferRequest) -> None:
        app, loop = self._app, self._visit.loop
        limit_s = app.limit_of(asked.timeout_s)
        while True:
            self._model = model
            try:
                self._ticket = model.start(asked.images, limit_s, self._told, loop)
            except Closed:
                model = app.models.successor(model, self._request.args["version"])
            else:
                return

    def _told(self, outcome: Outcome) -> None:
        """The engine's answer, or why there is none."""
        if self._is_over:
            return
        try:
            if isinstance(outcome, Exception):
                raise outcome
            self._model.check(self._asked.images, outcome)
            response = self._answered(outcome)
        except Exception as error:
            response = self._app.refusal(error, self._request)
        self._end(response)

    def _answered(self, answer: Answer) -> Response:
        app, request = self._app, self._request
        app.note_answer(request, self._model, self._asked.images, answer)
        return app.infer_response(request, self._asked, self._model, answer)

    def _end(self, response: Response) -> None:
        if self._app.draining:
            response.headers = (*response.headers, ("connection", "close"))
        self._close(response)
        self._visit.reply(response, self._request)

    def _close(self, response: Response) -> None:
        self._is_over = True
        self._lease.close()
        self._app.count_in_flight(-1)
        self._app.finished(self._visit.client, self._request, response)
