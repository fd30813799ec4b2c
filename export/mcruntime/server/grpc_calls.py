"""What every gRPC call needs on its way: its message in time, an answer or an error, and those who are told of it.

One way out for all errors (``as_told``): the texts are REST's, the codes follow from its statuses. Messages are parsed
here and not by grpc, whose errors about them would name its own internals. Methods with one request are offered as if
they took a stream of them, which is the same on the wire, so that a message that does not arrive can be given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection

from mcruntime.server import oip
from mcruntime.server.app import App
from mcruntime.server.batcher import Answer, Closed, Outcome, Ticket
from mcruntime.server.errors import DeadlineError, RequestError, UnavailableError, as_told
from mcruntime.server.models import Model
from mcruntime.server.seen import Seen
from mcruntime.server.tensors import InferRequest
from mcruntime.server.tracing import GRPC_CODES
from mcruntime.server.web import HUNG_UP, Request, note_answer

STREAM_IDLE_S = 60.0  # after which a stream without a message, and with all of them answered, is ended
GOODBYE = "the server is shutting down"
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
CHECK, WATCH = f"/{HEALTH}/Check", f"/{HEALTH}/Watch"
REFLECTION = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"
INFER, STREAM = f"/{oip.SERVICE}/ModelInfer", f"/{oip.SERVICE}/ModelStreamInfer"
PROBES = frozenset({CHECK, f"/{oip.SERVICE}/ServerLive", f"/{oip.SERVICE}/ServerReady"})  # answered when full, too
OPEN_TO_ALL = PROBES | {WATCH}
REPOSITORY = ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload")
WORK = frozenset({INFER, STREAM, *(f"/{oip.SERVICE}/{name}" for name in REPOSITORY)})

T = TypeVar("T")


class Call(Request):
    """A call. Its metadata is read only where somebody asks."""

    __slots__ = ("_app", "context")

    def __init__(self, path: str, context: Any, app: App) -> None:
        super().__init__("POST", path, b"", {}, began=time.perf_counter())
        self.context = context
        self._app = app

    def introduce(self) -> None:
        """Fill in headers and id."""
        if not self.id:
            self.headers = headers_of(self.context.invocation_metadata())
            self.id = self._app.id_of(self.headers)


class Bridge:
    """Between grpc's threads, which may block, and the event loop, which may not.

    Attributes:
        stopping: set when the server takes no more calls.
        parted: set once clients were told to open no more calls on their connections; held ones may be answered.
    """

    def __init__(self, app: App, loop: asyncio.AbstractEventLoop) -> None:
        self.stopping = threading.Event()
        self.parted = threading.Event()
        self._enders: set[Callable[[], object]] = set()  # each ends a call that waits for something
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

    def read_ahead(self, call: Call, requests: Iterator[bytes], count: int, begin: Callable[[bytes], T]) -> Iterator[T]:
        """What is begun with each message of a stream, up to ``count`` of them before the first is done with. Blocks.

        Raises:
            Exception: what grpc raises once the client was told that its stream was idle for too long.
        """
        room = threading.Semaphore(count)
        found: queue.SimpleQueue[T | RequestError | None] = queue.SimpleQueue()
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
        with self.ended_by(partial(found.put, UnavailableError(GOODBYE))):
            while True:
                try:
                    item = found.get(timeout=idle_s)
                except queue.Empty:
                    item = DeadlineError(f"the stream had no message for {idle_s:g} s; open another")
                if isinstance(item, RequestError):
                    self.answer(call, partial(fail, item))
                if item is None or isinstance(item, RequestError):
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

    def answer(self, call: Call, work: Callable[[], T]) -> T:
        """What ``work`` answers to a call; those who want to know of the call are told. Blocks.

        Raises:
            grpc.RpcError: the call is over.
            Exception: what grpc raises once the client was told of an error.
        """
        try:
            answer = work()
        except CancelledError:
            if self.parted.is_set():
                never: T = self.answer(call, partial(fail, UnavailableError(GOODBYE)))
                return never
            self.observe(call, HUNG_UP, "the call was cancelled")
            call.context.abort(grpc.StatusCode.UNAVAILABLE, GOODBYE)  # mostly nobody hears this: the call is over
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

    def on_loop(self, call: Call, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """What a coroutine on the event loop returns; cancelled with the call. Blocks.

        Raises:
            CancelledError: the call or the loop is over.
        """
        future = self.submit(work)
        if not call.context.add_callback(future.cancel):
            future.cancel()
        with self.ended_by(future.cancel):
            return future.result()

    def submit(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Start a coroutine on the event loop."""
        return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def infer(self, call: Call, model: Model, asked: InferRequest) -> tuple[Model, Answer]:
        """As ``App.infer``, without the event loop. Blocks.

        Raises:
            CancelledError: the call is over.
            as ``Models.infer``.
        """
        answer = None
        if asked.timeout_s is None and self._app.in_flight == 1:  # nothing comes that it could be batched with
            answer = model.now(asked.images)
        if answer is None:
            model, answer = self._infer_in_turn(call, model, asked)
        note_answer(call, model, answer)
        if self._app.mirror is not None:
            self._loop.call_soon_threadsafe(self._app.mirror, model, asked.images, answer)
        return model, answer

    def _infer_in_turn(self, call: Call, model: Model, asked: InferRequest) -> tuple[Model, Answer]:
        deadline = time.monotonic() + self._app.limit_of(asked.timeout_s)
        while True:
            outcomes: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
            try:
                ticket = model.batcher.submit(asked.images, outcomes.put, deadline)
            except Closed:
                model = self._app.models.successor(model, call.args["version"])
                continue
            gone = partial(self._cancel, model, ticket, outcomes)
            if not call.context.add_callback(gone):
                gone()
            with self.ended_by(gone):
                answer = self._await(model, ticket, outcomes, deadline)
            model.check(asked.images, answer)
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
            model.statistics.failed("canceled", time.monotonic() - ticket.arrived)
            outcomes.put(None)

    def hold(self) -> None:
        """Wait until a refusal may go out: who asks again as soon as refused must have been told not to do it here.
        Blocks."""
        if self.stopping.is_set():
            self.parted.wait()

    def part(self) -> None:
        """Clients were told that their connections end: let all calls that wait be answered now."""
        self.parted.set()
        for end in self._enders.copy():
            end()

    @contextlib.contextmanager
    def ended_by(self, end: Callable[[], object]) -> Iterator[None]:
        """``end`` is called if the server stops meanwhile."""
        self._enders.add(end)
        try:
            yield
        finally:
            self._enders.discard(end)

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

    def told(self, call: Call, error: Exception) -> RequestError:
        """What a client is told of an error, counted and noted."""
        call.introduce()
        told = as_told(error, call.id)
        error.__traceback__ = None  # it holds frames that hold the error: a circle, and the call's message in it
        self._app.count_failure(call.model, call.version, told.status, time.perf_counter() - call.began)
        self.observe(call, told.status, str(told))
        return told

    def observe(self, call: Call, status: int, error: str) -> None:
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
                    client=host_of(call.context.peer()),
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


def fail(error: RequestError) -> Any:
    """``work`` for ``Bridge.answer`` that is refused."""
    raise error


NO_KEY = "an API key is needed: authorization: Bearer KEY"


def headers_of(metadata: Iterable[tuple[str, str | bytes]]) -> dict[bytes, bytes]:
    """A call's metadata in the form of HTTP's headers, which it is."""
    return {key.encode(): value if isinstance(value, bytes) else value.encode() for key, value in metadata or ()}


def host_of(peer: str) -> str:
    """The address in "ipv4:127.0.0.1:5000" or "ipv6:%5B::1%5D:5000"."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
