"""HTTP/1.1 that holds its limits: uvicorn's httptools protocol, with what it leaves open closed.

The parser (llhttp) refuses what is malformed or ambiguous: two lengths, a length and chunks, bad chunk sizes. Added
here are bounds on what is well-formed but too much - header bytes, headers, tiny chunks, pipelined requests,
connections - and on time: every state that a client can leave a connection in ends. One sweep over all connections
twice a second looks for those that stay too long, so that a request itself starts no timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from itertools import chain
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from mcruntime.server.errors import RETRY_AFTER_S
from mcruntime.server.lane import Call, Lane, Visit
from mcruntime.server.options import ServerOptions
from mcruntime.server.protocol import dump
from mcruntime.server.web import Response

SWEEP_S = 0.5  # how often the connections are looked at
TURN_S = 0.25  # for so long a connection is thought to go on sending
TLS_HANDSHAKE_S = 10.0
MAX_DISCARDED = 4 << 20  # bytes that are read, and dropped, of a connection that was refused
MANY_PIECES = 1024  # pieces of a body from which on their size counts
MIN_PIECE = 64  # bytes a piece, on average; less costs us more than it costs the sender
MAX_SAID = 2048  # bytes of a header that is remembered
MAX_FRAMING = 64 << 10  # bytes of chunk extensions and trailers, beside half of the body's own
HEALTH = b"/v2/health/"
NO_EVENT = asyncio.Event()  # that nobody waits for
IDLE, HEAD, BODY = range(3)  # what is being read: nothing, a header, a body


@dataclass(frozen=True)
class Limits:
    """What one connection may do; times in seconds.

    Attributes:
        connections: that are answered; more get 503.
        header_bytes: of names and values, all together.
        header_s: from a request's first byte to the end of its header.
        body_s: from there to the end of its body.
        idle_s: between two requests, and before the first.
        write_s: in which an answer must be taken.
        linger_s: in which a client that was refused must have read why.
        pipelined: requests that may wait for an earlier one of the same connection.
    """

    connections: int = 1024
    header_bytes: int = 16 << 10
    headers: int = 100
    url_bytes: int = 8 << 10
    header_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 5.0
    write_s: float = 30.0
    linger_s: float = 2.0
    pipelined: int = 32


class Refusal(Exception):
    """Raised inside the parser, which ends there."""


class Cycle(RequestResponseCycle):
    """One request and its answer: uvicorn's, but a body that came in one piece is not copied, and an answer that is
    given as a whole is written at once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pieces: list[bytes] = []
        self.held = 0  # bytes of them
        self._start: Any = None

    async def receive(self) -> Any:
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self.waiting_for_100_continue = False
        if self.more_body and not self.disconnected and not self.response_complete:
            self.flow.resume_reading()
            await self.message_event.wait()
            self.message_event.clear()
        if self.disconnected or self.response_complete:
            return {"type": "http.disconnect"}
        body = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces, self.held = [], 0
        return {"type": "http.request", "body": body, "more_body": self.more_body}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._start is None or message.get("more_body") or self.scope["method"] == "HEAD":
            if self._start is not None:
                await super().send(self._start)
                self._start = None
            await super().send(message)
            return
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if not self.disconnected:
            self._send_whole(self._start, message.get("body", b""))

    def _send_whole(self, start: Any, body: bytes) -> None:
        parts, says_so = [STATUS_LINE[start["status"]]], False
        for name, value in (*self.default_headers, *start["headers"]):
            parts += (name, b": ", value, b"\r\n")
            if name == b"connection":
                self.keep_alive, says_so = False, True
        if not self.keep_alive and not says_so:
            parts.append(b"connection: close\r\n")
        parts += (b"\r\n", body)
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.transport.write(b"".join(parts))
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


class ShortCycle:
    """A request that a ``Lane`` took, where uvicorn and this protocol look for a cycle and its task."""

    __slots__ = (
        "call",
        "disconnected",
        "keep_alive",
        "message_event",
        "more_body",
        "response_complete",
        "response_started",
    )

    def __init__(self, call: Call, keep_alive: bool) -> None:
        self.call: Call | None = call
        self.keep_alive = keep_alive
        self.more_body = self.disconnected = self.response_started = self.response_complete = False
        self.message_event = NO_EVENT

    def cancel(self) -> None:
        """As a task's: the client is gone."""
        call, self.call = self.call, None
        if call is not None:
            call.cancel()


@dataclass(frozen=True, slots=True)
class Said:
    """The header of a request that went the short way, whole and in one piece with its body. Clients repeat it to the
    letter as long as their bodies have one size; the same bytes need not be parsed again.

    Attributes:
        size: of header and body.
        headers: names in lower case.
    """

    head: bytes
    size: int
    lane: Lane
    headers: dict[bytes, bytes]


def _said(chunk: bytes, body_bytes: int, lane: Lane, headers: dict[bytes, bytes]) -> Said | None:
    """What was said, if the chunk holds it and nothing else."""
    head_bytes = chunk.find(b"\r\n\r\n", 0, MAX_SAID) + 4
    if head_bytes + body_bytes != len(chunk) or not body_bytes:
        return None
    return Said(chunk[:head_bytes], len(chunk), lane, headers)


class Crowd:
    """How many connections have sent a request lately: one alone is not kept waiting for others."""

    def __init__(self) -> None:
        self._turn = 0
        self._since = 0.0
        self._here = self._before = 0  # connections seen in this turn, and in the one before

    def enter(self, connection: HttpProtocol, now: float) -> bool:
        """Note a request; whether there is no other connection.

        Args:
            now: seconds, on the loop's clock.
        """
        if now - self._since > TURN_S:
            self._before = self._here if now - self._since < 2 * TURN_S else 0
            self._here, self._since = 0, now
            self._turn += 1
        if connection.turn != self._turn:
            connection.turn = self._turn
            self._here += 1
        return self._here == 1 and self._before <= 1


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    limits = Limits()
    crowd = Crowd()
    turn = -1  # of the crowd, when this connection was last seen
    lanes: Mapping[str, Lane] = {}
    cycle: Cycle | ShortCycle  # type: ignore[assignment]
    on_refused: Callable[[int], None] = staticmethod(lambda status: None)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.url, self.headers = b"", []
        self._phase = IDLE
        self._since = 0.0  # when this phase began; on the loop's clock
        self._late_since = -1.0  # of the phase that was once seen to last too long
        self._head_bytes = 0  # read of an unfinished header
        self._chunk_bytes = 0  # of what is being parsed
        self._framed = self._body_bytes = self._pieces = 0  # of the body that is being read
        self._answers = 0
        self._unsent: tuple[int, float] | None = None  # answers given when unsent bytes were first seen, and when
        self._running: RequestResponseCycle | ShortCycle | None = None
        self._task: asyncio.Task[None] | ShortCycle | None = None
        self._lane: Lane | None = None  # of the request that is being read, if it may go the short way
        self._body: list[bytes] = []  # its body
        self._is_between = True  # two requests: nothing of the next was read
        self._chunk = b""  # what is being parsed, if a request begins with it
        self._said: Said | None = None
        self._keep_alive = True
        self._is_extra = False  # came when there were too many
        self._last_words: bytes | None = None  # to be said after the answers that are still to come
        self._is_deaf = False  # has said them; reads and drops
        self._is_gone = False
        self._verdict = (400, "the request is not valid HTTP/1.1")

    # ------------------------------------------------------------------------------------------------- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport, self.pipeline)
        self._visit = Visit(self.client, self.loop, self._reply_now, self._reply)
        self._since = self.loop.time()
        others = len(self.connections) - self.limits.connections
        self._is_extra = others > 0
        if others > max(16, self.limits.connections // 4):  # not even worth a word
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.pipeline.clear()
        self._drop_running()

    def shutdown(self) -> None:
        if self._is_deaf:
            self.transport.close()
        else:
            super().shutdown()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf or self._last_words is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_DISCARDED:
                self.transport.abort()
            return
        before, size = self._phase, len(data)
        said = self._said
        if said is not None and size == said.size and data.startswith(said.head) and self._took_again(said, data):
            return
        if before == IDLE:
            self._phase, self._since, self._head_bytes = HEAD, self.loop.time(), 0
            self._late_since = -1.0  # of another phase, though the clock may say the same
        self._chunk = data if self._is_between else b""
        self._chunk_bytes = size
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._leave_lane()
            self._refuse(*self._verdict)
            return
        except httptools.HttpParserUpgrade:
            # Refused by not being answered: the request is answered as any other, and is the last.
            self._listen_no_more()
            return
        finally:
            self._chunk = b""
        if self._lane is not None:  # its body is not all there
            self._leave_lane()
        if self._phase == HEAD:
            self._head_bytes += size
            if self._head_bytes > self.limits.header_bytes:
                self._refuse(*self._too_large())
        elif self._phase == BODY:
            self._framed += size
            if before == BODY:
                self._check_pieces()

    # -------------------------------------------------------------------------------------- what the parser calls back
    # On every request's way, so uvicorn's few lines are written out here instead of called.

    def on_message_begin(self) -> None:
        self.url, self.headers, self.expect_100_continue = b"", [], False
        self._is_between = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase == BODY:  # a trailer; it must not pass for a header
            return
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        limits = self.limits
        if len(self.headers) > limits.headers or len(self.url) > limits.url_bytes:
            self._reject(*self._too_large())
        # Counted only if what was read is that much; mostly it is the body that makes it so.
        was_much = self._head_bytes + self._chunk_bytes > limits.header_bytes
        if was_much and sum(map(len, chain.from_iterable(self.headers))) > limits.header_bytes:
            self._reject(*self._too_large())
        if len(self.pipeline) >= limits.pipelined:
            self._reject(503, "too many requests at once on one connection; wait for their answers")
        if self._is_extra:
            self._is_extra = len(self.connections) > limits.connections
            if self._is_extra and not self.url.startswith(HEALTH):
                self._reject(503, "too many connections; try again")
        is_upgrade = self.parser.should_upgrade()
        if is_upgrade and any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers):
            # The parser would take the body for the new protocol, and what follows for a request.
            self._reject(400, "a request with a body cannot be upgraded to another protocol")
        http_version = self.parser.get_http_version()
        self._keep_alive = not is_upgrade and http_version != "1.0" and self.parser.should_keep_alive()
        lane = self.lanes.get(self.url.decode("latin-1"))
        if lane is not None and not is_upgrade and self._may_be_short():
            self._lane = lane
        else:
            self._begin()
        self._phase = BODY
        self._framed = -self._chunk_bytes  # what is in this chunk is none: it may hold the end of another body
        self._body_bytes = self._pieces = 0

    def _may_be_short(self) -> bool:
        is_free = self.cycle is None or self.cycle.response_complete
        return (
            is_free and not self.expect_100_continue and not self.flow.write_paused
            and self.parser.get_method() == b"POST"
        )  # fmt: skip

    def _leave_lane(self) -> None:
        """Let the request that is being read go the long way after all."""
        if self._lane is None:
            return
        self._lane, pieces, self._body = None, self._body, []
        self._begin()
        cycle = self.cycle
        assert isinstance(cycle, Cycle)
        cycle.pieces, cycle.held = pieces, sum(map(len, pieces))

    def _begin(self) -> None:
        """Let the application answer the request whose header is complete, or note it after those before it."""
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        scope: Any = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": self.parser.get_http_version(),
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": "",
            "headers": self.headers,
            "state": {},
            "method": self.parser.get_method().decode("ascii"),
            "path": unquote(path) if "%" in path else path,
            "raw_path": url.path,
            "query_string": url.query or b"",
        }
        before = self.cycle
        self.cycle = Cycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=self._keep_alive,
            on_response=self.on_response_complete,
        )
        if before is None or before.response_complete:
            self._start_asgi_task(self.cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._pieces += 1
        if self._lane is not None:
            self._body.append(body)
            return
        cycle = self.cycle
        if cycle.response_complete:
            return
        assert isinstance(cycle, Cycle)
        cycle.pieces.append(body)
        cycle.held += len(body)
        if cycle.held > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        is_first = self._head_bytes >= 0  # that ends in this chunk
        self._phase = IDLE
        self._is_between = True
        self._head_bytes = -self._chunk_bytes  # what is left of this chunk belongs to the next request
        chunk, self._chunk = self._chunk, b""
        if self._lane is not None and self._took(self._lane, chunk, is_first=is_first):
            return
        cycle = self.cycle
        if cycle.response_complete:
            self._since = self.loop.time()
        else:
            cycle.more_body = False
            cycle.message_event.set()

    def _took(self, lane: Lane, chunk: bytes, *, is_first: bool) -> bool:
        """Try the short way of a request that is whole.

        Args:
            chunk: that it came in, from its first byte on.
            is_first: of its chunk.
        """
        pieces = self._body
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        headers = dict(self.headers)
        if not self._take(lane, headers, body, is_first=is_first):
            self._leave_lane()
            return False
        self._lane, self._body = None, []
        if self._keep_alive and b"transfer-encoding" not in headers:
            self._said = _said(chunk, len(body), lane, headers)
        return True

    def _took_again(self, said: Said, data: bytes) -> bool:
        """Try the short way of a request that begins as the one before did: its header was read and judged then."""
        is_free = (
            self._is_between and self._phase == IDLE and self._running is None and not self._is_extra
            and not self.flow.write_paused
        )  # fmt: skip
        if not is_free:
            return False
        self._keep_alive = True
        return self._take(said.lane, said.headers, memoryview(data)[len(said.head) :])

    def _take(
        self, lane: Lane, headers: dict[bytes, bytes], body: bytes | memoryview, *, is_first: bool = True
    ) -> bool:
        """Let a lane have a request, of which nothing is left to be read. At once only if it is the first of its chunk:
        a chunk full of them would hold up the event loop."""
        is_alone = self.crowd.enter(self, self.loop.time()) and is_first
        taken = lane.take(headers, body, self._visit, is_alone=is_alone)
        if isinstance(taken, Call):
            self.cycle = self._running = self._task = ShortCycle(taken, self._keep_alive)
        elif taken:
            self.on_response_complete()
        return taken is not False

    def _reply(self, response: Response, request_id: str) -> None:
        """Write the answer to a request that went the short way, and waited."""
        cycle = self._running
        assert isinstance(cycle, ShortCycle)
        cycle.call = None  # it holds the body, which this connection outlasts
        cycle.response_started = cycle.response_complete = True
        self._write(response, request_id, cycle.keep_alive)
        self.on_response_complete()

    def _reply_now(self, response: Response, request_id: str) -> None:
        self._write(response, request_id, self._keep_alive)

    def _write(self, response: Response, request_id: str, keep_alive: bool) -> None:
        if ("connection", "close") in response.headers:
            keep_alive = False
        elif not keep_alive:
            response.headers = (*response.headers, ("connection", "close"))
        self.transport.write(_as_bytes(response, request_id, self.server_state.default_headers))
        if not keep_alive:
            self.transport.close()

    # ---------------------------------------------------------------------------------------------- what the app calls

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        self._task = task = self.loop.create_task(cycle.run_asgi(self._call))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    async def _call(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.app(scope, receive, send)
        except asyncio.CancelledError:
            if not self._is_gone:
                raise

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._answers += 1
        self._running = None
        if self.transport.is_closing():
            return
        if self._phase != BODY:
            self._since = self.loop.time()
        elif self.expect_100_continue and not self._body_bytes:
            # Told before its body was asked for, the client may send it or not: what comes next has no certain meaning.
            self._listen_no_more()
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._last_words is not None:
            self._say(self._last_words)
        elif self._is_deaf:
            self._hang_up()

    def give_up_reading(self) -> None:
        """The server stops, and has waited long enough for the body of a request."""
        if self._running is not None and self._phase == BODY and self.cycle is self._running:
            self._refuse(503, "the server is shutting down")

    # ----------------------------------------------------------------------------------------------------- the limits

    def look(self, now: float) -> None:
        """End the connection if it has been in its state for too long; called by ``sweep``."""
        if self.transport.get_write_buffer_size():
            if self._unsent is None or self._unsent[0] != self._answers:
                self._unsent = self._answers, now
            elif now - self._unsent[1] > self.limits.write_s:
                self.transport.abort()
            return
        self._unsent = None
        if self._running is not None:
            return
        limits = self.limits
        if self._is_deaf:
            longest_s = limits.linger_s
        else:
            longest_s = {IDLE: limits.idle_s, HEAD: limits.header_s, BODY: limits.header_s + limits.body_s}[self._phase]
        if now - self._since <= longest_s:
            return
        # Seen twice, so that what was sent in time is read first when it was we who were busy.
        if self._late_since != self._since:
            self._late_since = self._since
        elif self._is_deaf or self._phase == BODY:  # was answered, and still sends
            self.transport.abort()
        elif self._phase == HEAD:
            self._refuse(408, f"the request header did not arrive within {limits.header_s:.0f} s")
        else:
            self.transport.close()

    def _check_pieces(self) -> None:
        if self._pieces > MANY_PIECES and self._body_bytes < MIN_PIECE * self._pieces:
            self._refuse(400, f"the request body comes in pieces of less than {MIN_PIECE} bytes; send larger ones")
        elif self._framed - self._body_bytes > MAX_FRAMING + self._body_bytes // 2:
            self._refuse(400, "the request body has more chunk extensions and trailers than allowed")

    def _too_large(self) -> tuple[int, str]:
        limits = self.limits
        if len(self.url) > limits.url_bytes:
            return 414, f"the URL is longer than {limits.url_bytes} bytes"
        return 431, f"the request header is larger than {limits.header_bytes} bytes or {limits.headers} lines"

    def _reject(self, status: int, message: str) -> None:
        """Refuse from within the parser."""
        self._verdict = status, message
        raise Refusal

    def _refuse(self, status: int, message: str) -> None:
        """Answer what came before, say why this is not answered, and hang up."""
        if self.transport.is_closing():
            return
        words = self._as_error(status, message)
        self.on_refused(status)
        if self._phase == BODY:  # it is the body that is wrong
            if self.cycle is self._running or self.cycle.response_complete:
                has_answer = self.cycle.response_started
                self._drop_running()
                self._say(b"" if has_answer else words)
                return
            self.pipeline.popleft()  # not begun; the last to come stands left
        if self._running is None:
            self._say(words)
        else:
            self._last_words, self._head_bytes = words, 0

    def _drop_running(self) -> None:
        """Stop the application's work for a client that will not get its answer."""
        if self._running is not None and self._task is not None:
            self._running.disconnected = self._is_gone = True
            self._running = None
            self._task.cancel()

    def _say(self, words: bytes) -> None:
        self.transport.write(words)
        self._listen_no_more()
        self._hang_up()

    def _listen_no_more(self) -> None:
        self._is_deaf, self._last_words, self._head_bytes = True, None, 0
        self._since = self.loop.time()

    def _hang_up(self) -> None:
        """End our side and wait a little for the client's: to close on unread bytes would take our words from it."""
        self._since = self.loop.time()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _as_error(self, status: int, message: str) -> bytes:
        body = dump({"error": message})
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
        return b"".join(
            [STATUS_LINE[status], *(b"%b: %b\r\n" % (name, value) for name, value in headers), b"\r\n", body]
        )


def _as_bytes(response: Response, request_id: str, defaults: Iterable[tuple[bytes, bytes]]) -> bytes:
    extra = "".join([f"{name}: {value}\r\n" for name, value in response.headers]) if response.headers else ""
    own = (
        f"content-type: {response.content_type}\r\nx-request-id: {request_id}\r\n"
        f"content-length: {len(response.body)}\r\n{extra}\r\n"
    )
    return b"".join([STATUS_LINE[response.status], _joined(tuple(defaults)), own.encode("latin-1"), response.body])


@lru_cache(2)  # uvicorn writes the date once a second
def _joined(headers: tuple[tuple[bytes, bytes], ...]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])


class Flow(FlowControl):
    """Reads on only when no request of the connection waits: what is read is held in memory."""

    def __init__(self, transport: asyncio.Transport, pipeline: Any) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if self.read_paused and not self._pipeline:
            super().resume_reading()


def http_protocol(
    options: ServerOptions, on_refused: Callable[[int], None], lanes: Mapping[str, Lane]
) -> type[HttpProtocol]:
    """The protocol with a server's limits.

    Args:
        lanes: by URL; may grow.
        on_refused: told the status of every answer that is given here, before a request reaches the application.
    """
    limits = Limits(
        connections=options.max_connections,
        header_s=min(Limits.header_s, options.body_timeout_s),
        body_s=options.body_timeout_s,
        idle_s=options.keep_alive_s,
    )
    members = {"limits": limits, "on_refused": staticmethod(on_refused), "lanes": lanes, "crowd": Crowd()}
    return type("LimitedHttpProtocol", (HttpProtocol,), members)


def sweep(connections: Iterable[Any], now: float) -> None:
    """End the connections that have been in one state for too long."""
    for connection in list(connections):
        connection.look(now)
