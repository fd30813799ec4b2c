"""The logs say what happened, one line each, and nothing that a client sends can make a line of its own."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import re
import threading
import warnings
import weakref

import pytest
from live_server import until
from mcruntime.server import logs
from mcruntime.server.logs import JsonLines, Rate, Refusals, TextLines, describe, log_request, to_stderr
from mcruntime.server.options import ServerOptions
from mcruntime.server.seen import Seen
from mcruntime.server.web import Timing
from tiny_onnx import some_images
from tiny_server import Gate, app_of, call, client_of, infer_request, model_of

INFER = "/v2/models/tiny/infer"
# Line ends of every kind, terminal sequences, also of one byte, backspace, DEL, text direction, a lone surrogate.
EVIL = 'a\nb\r\nc\x0bd\x0ce\x85f\u2028g\u2029h\x1b[2Ji\x9b1mj\x08k\x00l\x7fm\u202en\ud800o"} p=q level=info'
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture(autouse=True)
def _no_report_of_what_is_logged():
    """pytest keeps it for its report, and under xdist cannot send half a character."""
    handlers = [one for one in logging.getLogger().handlers if type(one).__name__ == "LogCaptureHandler"]
    for handler in handlers:
        handler.addFilter(_nothing)
    yield
    for handler in handlers:
        handler.removeFilter(_nothing)


def _nothing(record):
    return False


def seen_of(**changes):
    fields = {
        "protocol": "http", "method": "POST", "path": INFER, "status": 200, "request_id": "abc", "client": "127.0.0.1",
        "started": 1_700_000_000_000_000_000, "seconds": 0.25,
    }  # fmt: skip
    return Seen(**(fields | changes))


def written(act, **options):
    """What a block writes to stderr."""
    stream = io.StringIO()
    with to_stderr(ServerOptions(**options), stream):
        act()
    return stream.getvalue()


def serve_some(*requests, models=None, **options):
    """What the server logs about some requests."""
    options = ServerOptions(**options)
    observers, refusals = logs.observers(options)
    stream = io.StringIO()
    with to_stderr(options, stream), app_of(models or model_of(), observers=observers, refusals=refusals) as app:
        for request in requests:
            call(app, *request[:2], **(request[2] if len(request) > 2 else {}))
    return stream.getvalue()


def test_an_access_log_line_is_json_with_everything_that_is_known():
    text = serve_some(
        ("POST", INFER, {"json": infer_request(some_images(2)), "headers": {"x-request-id": "my-id_1"}}),
        access_log=True,
        log_json=True,
    )
    (line,) = text.splitlines()
    tree = json.loads(line)
    assert re.fullmatch(TIME, tree.pop("time"))
    for key in ("seconds", "queue_s", "compute_s"):
        assert 0 < tree.pop(key) < 60, key
    assert tree == {
        "level": "info", "message": "request", "request_id": "my-id_1", "protocol": "http", "method": "POST",
        "path": INFER, "status": 200, "model": "tiny", "version": "1", "images": 2, "batch": 2, "client": "127.0.0.1",
    }  # fmt: skip


def test_an_access_log_line_for_people_has_the_same_fields():
    (line,) = serve_some(("POST", INFER, {"json": infer_request()}), access_log=True).splitlines()
    assert re.fullmatch(
        rf"{TIME} INFO    request request_id=\w+ protocol=http method=POST path={INFER} status=200 .*", line
    )
    for part in ("model=tiny", "version=1", "images=1", "queue_s=", "compute_s=", "client=127.0.0.1"):
        assert f" {part}" in line


def test_without_the_option_only_refused_requests_are_logged():
    text = serve_some(
        ("POST", INFER, {"json": infer_request()}),
        ("GET", "/v2"),
        ("POST", INFER, {"json": infer_request(datatype="INT8")}),
        ("GET", "/nowhere"),
        log_json=True,
    )
    assert [(tree["status"], tree["path"]) for tree in map(json.loads, text.splitlines())] == [
        (400, INFER),
        (404, "/nowhere"),
    ]
    assert "data-type" in text


def test_nobody_is_told_of_good_requests_unless_somebody_wants_to_know():
    observers, refusals = logs.observers(ServerOptions())
    with app_of(model_of(), observers=observers, refusals=refusals) as app:
        assert not app.is_observed(200)
        assert app.is_observed(400)
    with app_of(model_of()) as app:
        assert not app.is_observed(500)


def test_refusals_are_logged_at_a_bounded_rate_and_what_is_left_out_is_counted():
    now = [0.0]
    refusals = Refusals(clock=lambda: now[0])

    def flood():
        for _ in range(1000):
            refusals(seen_of(status=404))
        now[0] += 10
        refusals(seen_of(status=503))

    trees = [json.loads(line) for line in written(flood, log_json=True).splitlines()]
    assert len(trees) == logs.REFUSALS_BURST + 1
    assert trees[-1]["not_logged"] == 1000 - logs.REFUSALS_BURST
    assert [tree["level"] for tree in trees] == ["info"] * logs.REFUSALS_BURST + ["warning"]
    assert not any("not_logged" in tree for tree in trees[:-1])


def test_a_rate_allows_its_share_in_the_long_run():
    now = [0.0]
    rate = Rate(5, 10, clock=lambda: now[0])
    allowed = 0
    for _ in range(10_000):
        now[0] += 0.01
        allowed += rate.allow()
    assert 500 <= allowed <= 511


@pytest.mark.parametrize("log_json", [False, True])
def test_no_text_of_a_client_makes_a_line_of_its_own(log_json):
    evil = seen_of(
        path=EVIL, request_id=EVIL, client=EVIL, error=EVIL, method=EVIL, model=EVIL, version=EVIL, protocol=EVIL
    )
    text = written(lambda: log_request(evil), log_json=log_json)
    assert text.endswith("\n")
    body = text[:-1]
    assert body.isascii()
    assert body.isprintable(), "a control character got out"
    if log_json:
        tree = json.loads(body)
        assert tree["path"] == EVIL
        assert tree["level"] == "info"
    else:
        unquoted = re.sub(r'"(?:[^"\\]|\\.)*"', "", body)
        assert "p=q" not in unquoted, "a client wrote a field"


@pytest.mark.parametrize("log_json", [False, True])
def test_neither_a_message_nor_a_traceback_can_be_forged(log_json):
    def act():
        try:
            raise ValueError(EVIL)
        except ValueError:
            logging.getLogger("mcruntime.server").exception("request %s", EVIL)
        logging.getLogger("uvicorn.error").warning(EVIL)

    lines = written(act, log_json=log_json).removesuffix("\n").split("\n")
    assert all(line.isascii() and line.isprintable() for line in lines)
    if log_json:
        first, second = map(json.loads, lines)
        assert EVIL in first["traceback"]
        assert second["message"] == EVIL
    else:
        starts = [line for line in lines if re.match(TIME, line)]
        assert len(starts) == 2
        assert all(line.startswith("  | ") for line in lines if line not in starts)


def test_a_path_with_line_breaks_is_escaped_on_its_whole_way_through_the_server():
    async def main(app):
        async with client_of(app) as client:
            await client.get("/x%0a2026-01-01T00:00:00.000Z INFO forged%1b[2J")

    stream = io.StringIO()
    observers, refusals = logs.observers(ServerOptions())
    with to_stderr(ServerOptions(), stream), app_of(model_of(), observers=observers, refusals=refusals) as app:
        asyncio.run(main(app))
    (line,) = stream.getvalue().splitlines()
    assert "\\n2026" in line
    assert "\x1b" not in line


def test_an_id_that_could_not_stand_in_a_log_is_replaced():
    text = serve_some(("GET", "/v2", {"headers": {"x-request-id": "a b;c"}}), access_log=True, log_json=True)
    assert re.fullmatch(r"[0-9a-f]{20}", json.loads(text)["request_id"])


def test_a_client_that_hangs_up_is_logged_and_counted():
    gate = Gate()

    async def main(app):
        async with client_of(app) as client:
            task = asyncio.create_task(client.post(INFER, json=infer_request()))
            await asyncio.to_thread(gate.entered.acquire, timeout=20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        gate.open()

    stream = io.StringIO()
    observers, refusals = logs.observers(ServerOptions())
    options = ServerOptions(log_json=True)
    with to_stderr(options, stream), app_of(model_of(gate), observers=observers, refusals=refusals) as app:
        asyncio.run(main(app))
        assert app.answered == {499: 1}
    tree = json.loads(stream.getvalue())
    assert (tree["status"], tree["model"], tree["error"]) == (499, "tiny", "the client hung up")


def test_long_paths_are_cut():
    fields = describe(seen_of(path="/" + "x" * 5000, error="y" * 5000))
    assert len(fields["path"]) == 256
    assert len(fields["error"]) == 512


def test_the_clients_trace_is_named_if_it_is_one():
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert describe(seen_of(parent=parent))["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert "trace_id" not in describe(seen_of(parent="00-xyz"))


def test_times_that_were_not_spent_are_left_out():
    fields = describe(seen_of(timing=Timing(decode_s=0.1, queue_s=0.0, compute_s=0.2)))
    assert (fields["decode_s"], fields["compute_s"]) == (0.1, 0.2)
    assert not {"queue_s", "batch", "model", "error"} & set(fields)
    assert describe(seen_of(seconds=0.0))["seconds"] == 0.0


def test_pythons_warnings_and_other_loggers_come_out_in_the_same_form():
    def act():
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("something is old", stacklevel=1)
        logging.getLogger("asyncio").error("lost")
        logging.getLogger("mcruntime.server").info("loaded")
        logging.getLogger("some.library").info("chatter")

    trees = [json.loads(line) for line in written(act, log_json=True).splitlines()]
    assert "something is old" in trees[0]["message"]
    assert [tree["message"] for tree in trees[1:]] == ["lost", "loaded"]


def test_a_collector_that_is_away_does_not_fill_the_log():
    def act():
        for _ in range(500):
            logging.getLogger("opentelemetry.sdk._shared_internal").warning("Queue full, dropping Span.")
        logging.getLogger("mcruntime.server").error("this is not the collector's")

    lines = written(act).splitlines()
    assert len(lines) <= 7
    assert "not the collector" in lines[-1]


def test_logging_is_as_it_was_afterwards():
    ours, root = logging.getLogger("mcruntime"), logging.getLogger()
    before = ours.level, list(root.handlers)
    written(lambda: None)
    assert (ours.level, list(root.handlers)) == before


def test_both_forms_carry_an_unserializable_field_as_text():
    record = logging.makeLogRecord({"msg": "m", "fields": {"what": object}, "levelname": "INFO"})
    assert json.loads(JsonLines().format(record))["what"] == "<class 'object'>"
    assert TextLines().format(record).endswith("m what=\"<class 'object'>\"")


class Stuck(io.StringIO):
    """A pipe that nobody reads, until somebody does."""

    def __init__(self):
        super().__init__()
        self.reader = threading.Event()

    def write(self, text):
        assert self.reader.wait(10)
        return super().write(text)


def test_a_log_that_nobody_reads_holds_nobody_up_and_says_what_it_lost(monkeypatch):
    monkeypatch.setattr("mcruntime.server.logs.MAX_WAITING", 5)
    stream, log = Stuck(), logging.getLogger("mcruntime.server")
    with to_stderr(ServerOptions(), stream):
        for number in range(50):
            log.info("line %d", number)  # would wait for ever
        stream.reader.set()
        (mailbox,) = [one for one in logging.getLogger().handlers if isinstance(one, logs.Mailbox)]
        until(mailbox.queue.empty)
        log.info("the next one")
    lines = stream.getvalue().splitlines()
    lost = sum(map(int, re.findall(r" lines_lost=(\d+)", stream.getvalue())))
    assert lost > 30
    assert lost + len(lines) == 51
    assert "the next one" in lines[-1]


def test_what_is_lost_is_told_once_and_by_the_first_line_that_fits(monkeypatch):
    monkeypatch.setattr("mcruntime.server.logs.MAX_WAITING", 2)
    box = logs.Mailbox()
    record = lambda number: logging.makeLogRecord({"msg": f"line {number}", "fields": {"n": number}})  # noqa: E731
    for number in range(7):
        box.emit(record(number))
    assert box.lost == 5
    taken = [box.queue.get_nowait(), box.queue.get_nowait()]
    box.emit(record(7))
    box.emit(record(8))
    taken += [box.queue.get_nowait(), box.queue.get_nowait()]
    assert [one.fields for one in taken] == [{"n": 0}, {"n": 1}, {"n": 7, "lines_lost": 5}, {"n": 8}]
    assert box.lost == 0


def test_a_line_that_waits_holds_neither_the_error_nor_what_its_frames_held():
    class Body(bytearray):
        """Stands for a request's, of which a weak reference can be kept."""

    stream, seen = Stuck(), []
    with to_stderr(ServerOptions(), stream):
        logging.getLogger("mcruntime.server").info("keeps the log's thread busy")

        def fail():
            held = Body(b"x" * 1000)
            seen.append(weakref.ref(held))
            raise RuntimeError(f"with {len(held)} bytes")

        try:
            fail()
        except RuntimeError:
            logging.getLogger("mcruntime.server").exception("request abc")
        gc.collect()
        assert seen[0]() is None, "a line that nobody has read keeps a request in memory"
        stream.reader.set()
    assert "RuntimeError: with 1000 bytes" in stream.getvalue()


def test_a_log_that_is_stuck_for_good_does_not_keep_the_server_from_ending(monkeypatch):
    monkeypatch.setattr("mcruntime.server.logs.LAST_LINES_S", 0.05)
    stream = Stuck()
    with to_stderr(ServerOptions(), stream):
        logging.getLogger("mcruntime.server").info("never read")
    assert stream.getvalue() == "", "the block ended while the line was still stuck"
    stream.reader.set()
