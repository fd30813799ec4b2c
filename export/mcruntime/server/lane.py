"""The short way of an infer request: from its last byte to the batcher and back, without a task of its own.

A model small enough to be worth serving from Python takes no longer than an ASGI cycle, a task and three turns of the
event loop do beside it. So a request that is whole when its header is read, and that asks a model that has answered
before, is taken here; every other goes the long way through ``App.__call__``, which says the same in more steps. So
does one that is wrong: what is refused is refused in one place.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from mcruntime.server.batcher import Answer, Closed, Outcome, Ticket
from mcruntime.server.body import Lease
from mcruntime.server.models import Model
from mcruntime.server.protocol import read_infer
from mcruntime.server.tensors import InferRequest
from mcruntime.server.web import HUNG_UP, Request, Response, note_answer

if TYPE_CHECKING:
    from mcruntime.server.app import App

Client = tuple[str, int] | None


Reply = Callable[[Response, str], None]  # an answer and its request's id


class Visit(NamedTuple):
    """A connection, as a lane knows it.

    Attributes:
        reply_now: called with an answer before ``take`` returns.
        reply: called with a later answer, on the event loop, unless the call is cancelled.
    """

    client: Client
    loop: asyncio.AbstractEventLoop
    reply_now: Reply
    reply: Reply


class Lane:
    """The URL of a model's infer.

    Args:
        args: what the URL names: ``model``, ``version``.
    """

    def __init__(self, app: App, path: str, args: dict[str, str]) -> None:
        self.app = app
        self.path = path
        self.args = args

    def take(
        self, headers: dict[bytes, bytes], body: bytes | memoryview, visit: Visit, *, is_alone: bool
    ) -> Call | bool:
        """Begin to answer a request.

        Args:
            headers: names in lower case.
            body: all of it; not to be changed until the answer is there.
            is_alone: hardly any other connection has sent anything lately, so there is nothing to be batched with.

        Returns:
            True: it is answered. False: it must go the long way, perhaps to be refused there.
        """
        app, args = self.app, self.args
        if app.draining or b"content-encoding" in headers or len(body) > app.options.max_body_bytes:
            return False
        if app.hosts is not None and not app.hosts.allow(headers.get(b"host")):
            return False
        if app.keys is not None and not app.keys.allow(headers):
            return False
        try:
            model = app.models.find(args["model"], args["version"])
            asked = read_infer(headers, body, model.spec)
        except Exception:  # is raised again there, and told
            return False
        is_quick = is_alone and asked.timeout_s is None and app.budget.used + len(body) <= app.budget.max_bytes
        if is_quick and self._answer_now(headers, asked, model, visit):
            return True
        return Call(self, headers, asked, visit).start(model, len(body))

    def _answer_now(self, headers: dict[bytes, bytes], asked: InferRequest, model: Model, visit: Visit) -> bool:
        """Run the model here, if it may be; what need not be done before the answer is sent is done after it."""
        app = self.app
        began = time.perf_counter()
        request: Request | None = None
        request_id = app.id_of(headers)
        answer: Answer | None = None
        try:
            answer = model.now(asked.images)
            if answer is None:
                return False
            if app.mirror is not None:
                app.mirror(model, asked.images, answer)
            response = app.infer_response(headers, asked, model, answer)
        except Exception as error:
            request = self.note(headers, asked, model, request_id, began)
            response = app.refusal(error, request)
        visit.reply_now(response, request_id)
        if request is None and app.is_observed(response.status):
            request = self.note(headers, asked, model, request_id, began)
        if request is None:
            app.answered[response.status] += 1
            return True
        if answer is not None:
            note_answer(request, model, answer)
        app.finished(visit.client, request, response)
        return True

    def note(
        self, headers: dict[bytes, bytes], asked: InferRequest, model: Model, request_id: str, began: float
    ) -> Request:
        """A request as the rest of the server knows one."""
        request = Request("POST", self.path, b"", headers, began=began, args=self.args, id=request_id)
        request.model, request.version = self.args["model"], model.spec.version
        request.images = len(asked.images)
        return request


class Call:
    """A request that waits for its answer."""

    __slots__ = ("_app", "_asked", "_is_over", "_lane", "_lease", "_model", "_request", "_ticket", "_visit")

    def __init__(self, lane: Lane, headers: dict[bytes, bytes], asked: InferRequest, visit: Visit) -> None:
        self._lane, self._app = lane, lane.app
        self._asked, self._visit = asked, visit
        self._request = Request("POST", lane.path, b"", headers, began=time.perf_counter(), args=lane.args)
        self._request.id = lane.app.id_of(headers)
        self._lease = Lease(lane.app.budget)
        self._is_over = False
        self._model: Model
        self._ticket: Ticket | None = None

    def start(self, model: Model, num_bytes: int) -> Call | bool:
        """Hand the images to the model.

        Args:
            num_bytes: of the body.

        Returns:
            True: it was refused.
        """
        app, request = self._app, self._request
        request.model, request.version = self._lane.args["model"], model.spec.version
        request.images = len(self._asked.images)
        app.count_in_flight(1)
        limit_s = app.limit_of(self._asked.timeout_s)
        try:
            self._lease.take(num_bytes)
            while self._ticket is None:
                self._model = model
                try:
                    self._ticket = model.start(self._asked.images, limit_s, self._told, self._visit.loop)
                except Closed:
                    model = app.models.successor(model, self._lane.args["version"])
        except Exception as error:
            response = app.refusal(error, request)
            self._visit.reply_now(response, request.id)
            self._close(response)
            return True
        return self

    def cancel(self) -> None:
        """The client hung up; what still waits is not run."""
        if self._is_over or self._ticket is None:
            return
        self._model.cancel(self._ticket)
        self._close(Response(status=HUNG_UP, error="the client hung up"))

    def _told(self, outcome: Outcome) -> None:
        """The engine's answer, or why there is none."""
        if self._is_over:
            return
        app, request = self._app, self._request
        try:
            if isinstance(outcome, Exception):
                raise outcome
            self._model.check(self._asked.images, outcome)
            app.note_answer(request, self._model, self._asked.images, outcome)
            response = app.infer_response(request.headers, self._asked, self._model, outcome)
        except Exception as error:
            response = app.refusal(error, request)
        self._end(response)

    def _end(self, response: Response) -> None:
        if self._app.draining:
            response.headers = (*response.headers, ("connection", "close"))
        self._close(response)
        self._visit.reply(response, self._request.id)

    def _close(self, response: Response) -> None:
        self._is_over = True
        self._ticket = None  # leads back to this call: a circle, and the images in it
        self._lease.close()
        self._app.count_in_flight(-1)
        self._app.finished(self._visit.client, self._request, response)
