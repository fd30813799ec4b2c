"""Structured logs on stderr: lines for people, or one JSON object a line, with the request's id in both.

What a client sends stands in them only escaped: no line break, control character or terminal sequence of a path, an id
or an error's text gets out, in either form, so that nobody can write lines of his own.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from logging.handlers import QueueHandler
from typing import Any, TextIO

from mcruntime.server.options import ServerOptions
from mcruntime.server.seen import Observer, Seen

REFUSALS_PER_S = 5.0  # logged without --access-log; one client's mistake must not fill the disk
REFUSALS_BURST = 20
OTHERS_PER_S = 1.0  # of the trace exporter's complaints, of which there may be one a request
MAX_WAITING = 10_000  # lines that are not written yet
LAST_LINES_S = 1.0  # in which they must be, at the end
MAX_PATH = 256  # characters of a path
MAX_ERROR = 512
PLAIN = re.compile(r"[A-Za-z0-9_.:/@%+,{}-]+")
TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")
logger = logging.getLogger("mcruntime.server")


@contextmanager
def to_stderr(options: ServerOptions, stream: TextIO | None = None) -> Iterator[None]:
    """Write all logs of this process in one form, for the time of the block; also uvicorn's and Python's warnings.

    A thread of its own writes: stderr may be a pipe that nobody reads, and the event loop must not wait for it.
    """
    writer = logging.StreamHandler(stream or sys.stderr)
    writer.setFormatter(JsonLines() if options.log_json else TextLines())
    handler = Mailbox()
    handler.addFilter(_bound_exporter(Rate(OTHERS_PER_S, 5)))
    thread = threading.Thread(target=handler.deliver, args=(writer,), name="log", daemon=True)
    thread.start()
    root, ours = logging.getLogger(), logging.getLogger("mcruntime")
    before = ours.level
    ours.setLevel(logging.INFO)
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        ours.setLevel(before)
        handler.close_box()
        thread.join(LAST_LINES_S)


class Mailbox(QueueHandler):
    """Takes records without waiting. What does not fit is counted, and the next that does says so.

    Attributes:
        lost: records since the last one that fitted.
    """

    def __init__(self) -> None:
        super().__init__(queue.Queue(MAX_WAITING))
        self.lost = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # Its fields stay whole; a traceback becomes text here, since it holds frames, and with them requests.
        if record.exc_info:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.lost:
            record.fields = {**getattr(record, "fields", {}), "lines_lost": self.lost}
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.lost += 1
        else:
            self.lost = 0

    def deliver(self, writer: logging.Handler) -> None:
        """Hand all records over, until the box is closed."""
        while (record := self.queue.get()) is not None:
            writer.handle(record)

    def close_box(self) -> None:
        """Let ``deliver`` end after what is there; not if it hangs with a full box."""
        with suppress(queue.Full):
            self.queue.put_nowait(None)


def observers(options: ServerOptions) -> tuple[list[Observer], list[Observer]]:
    """Who is told of every request, and who only of those that were refused: ``App``'s two lists."""
    return ([log_request], []) if options.access_log else ([], [Refusals()])


def log_request(seen: Seen, not_logged: int = 0) -> None:
    """One line about a finished request."""
    level = logging.WARNING if seen.status >= 500 else logging.INFO
    logger.log(
        level, "request", extra={"fields": {**describe(seen), **({"not_logged": not_logged} if not_logged else {})}}
    )


class Refusals:
    """Logs requests answered 400 or more, at a bounded rate; how many were left out stands in the next line."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = Rate(REFUSALS_PER_S, REFUSALS_BURST, clock)

    def __call__(self, seen: Seen) -> None:
        left_out = self._rate.left_out
        if self._rate.allow():
            log_request(seen, left_out)


class Rate:
    """At most ``per_s`` a second in the long run, and ``burst`` at once.

    Attributes:
        left_out: how many were not allowed since the last that was.
    """

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s, self._burst, self._clock = per_s, burst, clock
        self._left, self._last = float(burst), clock()
        self.left_out = 0

    def allow(self) -> bool:
        """Whether one more is allowed now."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._last) * self._per_s)
        self._last = now
        if self._left < 1:
            self.left_out += 1
            return False
        self._left -= 1
        self.left_out = 0
        return True


def describe(seen: Seen) -> dict[str, Any]:
    """A finished request as fields, times in seconds; what there was not is left out."""
    timing = seen.timing
    trace = TRACE.fullmatch(seen.parent)
    fields = {
        "request_id": seen.request_id,
        "trace_id": trace[1] if trace else "",
        "protocol": seen.protocol,
        "method": seen.method,
        "path": seen.path[:MAX_PATH],
        "status": seen.status,
        "seconds": round(seen.seconds, 6),
        "model": seen.model,
        "version": seen.version,
        "images": seen.images,
        "batch": timing.batch,
        "decode_s": round(timing.decode_s, 6),
        "queue_s": round(timing.queue_s, 6),
        "compute_s": round(timing.compute_s, 6),
        "client": seen.client,
        "error": seen.error[:MAX_ERROR],
    }
    return {key: value for key, value in fields.items() if value not in ("", 0) or key == "seconds"}


class JsonLines(logging.Formatter):
    """One JSON object a line: ``time``, ``level``, ``message``, then the record's own fields; ASCII only."""

    def format(self, record: logging.LogRecord) -> str:
        tree = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info or record.exc_text:
            tree["traceback"] = _traceback(record)
        return _ascii_json(tree)


class TextLines(logging.Formatter):
    """``time LEVEL message key=value ...``; a traceback follows on lines that start with ``|``."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = [f"{key}={_plain(value)}" for key, value in getattr(record, "fields", {}).items()]
        lines = [" ".join([_time_of(record), f"{record.levelname:<7}", _escaped(record.getMessage()), *pairs])]
        if record.exc_info or record.exc_text:
            lines += [f"  | {_escaped(line)}" for line in _traceback(record).splitlines()]
        return "\n".join(lines)


def _bound_exporter(rate: Rate) -> Callable[[logging.LogRecord], bool]:
    """A filter: a collector that is away is worth a line a second, not one a request."""
    return lambda record: not record.name.startswith(("opentelemetry", "urllib3")) or rate.allow()


def _time_of(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _traceback(record: logging.LogRecord) -> str:
    return record.exc_text or (logging.Formatter().formatException(record.exc_info) if record.exc_info else "")


def _plain(value: Any) -> str:
    text = str(value)
    return text if PLAIN.fullmatch(text) else _ascii_json(text)


def _escaped(text: str) -> str:
    return text if text.isascii() and text.isprintable() else _ascii_json(text)[1:-1]


def _ascii_json(tree: Any) -> str:
    # ASCII, since beyond it are terminal sequences (U+009B) and characters that turn text around.
    return json.dumps(tree, ensure_ascii=True, default=str)
