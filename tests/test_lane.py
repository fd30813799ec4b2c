"""The short way of an infer request is not to be told from the long one, but by its speed.

Every request here goes over a real socket to a live server. ``ways`` counts which of them reached the application, so
that each test knows which way its requests went.
"""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import threading
import time
import weakref
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from live_server import HOW, SPEC, Live, live, read_answer, rest, statuses, tiny_model, until
from mcruntime.server.app import App
from mcruntime.server.auth import Keys
from mcruntime.server.http import Crowd
from mcruntime.server.models import Model
from tiny_onnx import LABELS, expected_logits, some_images
from tiny_server import Gate

PATH = "/v2/models/tiny/infer"
KEY, OTHER_KEY = "k" * 32, "o" * 32
NAN = np.full((1, len(LABELS)), np.nan, np.float32)


@dataclass
class Ways:
    """The POST requests that went the long way."""

    long: list[str] = field(default_factory=list)


@pytest.fixture
def ways(monkeypatch):
    seen, before = Ways(), App.__call__

    async def counted(self, scope, receive, send):
        if scope["method"] == "POST":
            seen.long.append(scope["path"])
        await before(self, scope, receive, send)

    monkeypatch.setattr(App, "__call__", counted)
    return seen


def request(body: bytes, *headers: str, path=PATH, method="POST", version="1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def tensor(shape=(1, 3, 8, 8), **changes) -> dict:
    return {"name": "image", "shape": list(shape), "datatype": "FP32"} | changes


def in_json(images=None, /, *, more=None, **changes) -> bytes:
    images = some_images(1) if images is None else images
    tree = {"inputs": [tensor(images.shape, data=images.ravel().tolist()) | changes]} | (more or {})
    return json.dumps(tree).encode()


def in_binary(images=None, *headers: str, path=PATH, more=None, **changes) -> bytes:
    images = some_images(1) if images is None else images
    size = {"binary_data_size": images.nbytes}
    head = json.dumps({"inputs": [tensor(images.shape, parameters=size) | changes]} | (more or {})).encode()
    length = f"Inference-Header-Content-Length: {len(head)}"
    return request(head + images.tobytes(), length, *headers, path=path)


BINARY_ANSWER = {"parameters": {"binary_data_output": True}}


def classes(k=2, **more) -> dict:
    return {"outputs": [{"name": "logits", "parameters": {"classification": k, **more}}]}


def open_lane(server: Live, path=PATH, *headers: str) -> None:
    """After this the path has a lane."""
    with server.connect() as client:
        client.sendall(in_binary(None, *headers, path=path))
        assert read_answer(client)[0] == 200
    until(lambda: path in server.app.lanes)


def behind_a_gate(server: Live, gate: Gate, path=PATH) -> None:
    """Opens the lane, then closes the gate. The model must not pass for a quick one: those run on the event loop."""
    gate.open()
    open_lane(server, path)
    gate._open.clear()
    while gate.entered.acquire(blocking=False):
        pass
    batcher = server.app.models.find("tiny").batcher
    batcher._expect = lambda images, seconds: None
    batcher._expected_s.clear()


def whole_answer(client) -> tuple[bytes, bytes]:
    """Head and body as they came, without what is new in every answer: its date, and an id that is ours."""
    found = b""
    while b"\r\n\r\n" not in found:
        chunk = client.recv(1)
        assert chunk, f"hung up after {found!r}"
        found += chunk
    lines = found[:-4].split(b"\r\n")
    (size,) = (int(line[16:]) for line in lines if line.startswith(b"content-length: "))
    body = b""
    while len(body) < size:
        chunk = client.recv(size - len(body))
        assert chunk, "hung up in the middle of a body"
        body += chunk
    kept = [line for line in lines if not line.startswith((b"date: ", b"x-request-id: "))]
    is_parsers = b"connection: close" in lines and lines[0].endswith(b"400 Bad Request")  # which knows of no id
    assert len(lines) - len(kept) == 2 - is_parsers, lines
    return b"\r\n".join(kept), body


def ask(server: Live, message: bytes, pieces=1) -> tuple[bytes, bytes]:
    """The answer to a message that is sent in pieces."""
    with server.connect() as client:
        step = -(-len(message) // pieces)
        for first in range(0, len(message), step):
            if first:
                time.sleep(0.02)  # else the kernel would put the pieces together
            client.sendall(message[first : first + step])
        return whole_answer(client)


def wait_until_all_is_given_back(server: Live) -> None:
    until(lambda: server.app.in_flight == 0 and server.app.budget.used == 0 and server.app.reading == 0)


def stats(model: Model) -> dict:
    return model.statistics.as_dict("tiny", "1")["inference_stats"]


def counts(model: Model) -> tuple[int, int]:
    found = stats(model)
    return found["success"]["count"], found["fail"]["count"]


# ------------------------------------------------------------------------------------------------------- which way


def test_the_first_request_goes_the_long_way_and_the_next_ones_the_short_way(ways):
    with live() as server, server.connect() as client:
        for _ in range(4):
            client.sendall(in_binary())
            status, _, body = read_answer(client)
            assert status == 200
            np.testing.assert_array_equal(json.loads(body)["outputs"][0]["data"], expected_logits(some_images(1))[0])
        assert ways.long == [PATH]
        assert server.app.answered == {200: 4}


LONG = {
    "a body in two pieces": (in_binary(), 2),
    "a body that is packed": (request(gzip.compress(in_json()), "Content-Encoding: gzip"), 1),
    "a body that is said not to be packed": (request(in_json(), "Content-Encoding: identity"), 1),
    "a query": (request(in_json(), path=PATH + "?x=1"), 1),
    "an encoded path": (request(in_json(), path="/v2/models/%74iny/infer"), 1),
    "a path with a host": (request(in_json(), path="http://x" + PATH), 1),
    "a promise to wait": (request(in_json(), "Expect: 100-continue"), 1),
    "another version of the path": (in_binary(path="/v2/models/tiny/versions/1/infer"), 1),
}


@pytest.mark.parametrize("case", LONG)
def test_what_is_not_as_plain_as_can_be_goes_the_long_way(ways, case):
    message, pieces = LONG[case]
    with live() as server:
        open_lane(server)
        with server.connect() as client:
            step = -(-len(message) // pieces)
            client.sendall(message[:step])
            if pieces > 1:
                time.sleep(0.05)
                client.sendall(message[step:])
            status = read_answer(client, has_body=False)[0]
            if status == 100:
                status = read_answer(client)[0]
            assert status == 200
        assert len(ways.long) == 2


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
def test_another_method_is_refused_on_the_lane_as_it_was_before_there_was_one(method):
    with live() as server:
        message = request(b"", "Connection: close", method=method)
        before = server.say(message)
        open_lane(server)
        after = server.say(message)
        assert statuses(before) == statuses(after) == [405]
        assert b"allow: POST" in after


# ---------------------------------------------------------------------------------------------------- the same answer

SAME = {
    "JSON": request(in_json()),
    "JSON, nested": request(json.dumps({"inputs": [tensor(data=some_images(1).tolist())]}).encode()),
    "JSON with an id": request(in_json(more={"id": "an id"})),
    "JSON for binary": request(in_json(more=BINARY_ANSWER)),
    "binary for JSON": in_binary(),
    "binary": in_binary(more=BINARY_ANSWER | {"id": "42"}),
    "binary, four images": in_binary(some_images(4), more=BINARY_ANSWER),
    "a bare image": request(some_images(1).tobytes(), "Inference-Header-Content-Length: 0"),
    "classes": in_binary(more=classes()),
    "classes in binary": in_binary(more=classes(3, binary_data=True)),
    "chunks": b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%x;a=b\r\n%b\r\n" % (len(part), part) for part in (in_json()[:100], in_json()[100:]))
    + b"0\r\nX-API-Key: trailer\r\n\r\n",
    "chunks that end too early": b"POST " + PATH.encode() + b" HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"5\r\nabcdefgh\r\n0\r\n\r\n",
    "HTTP/1.0": request(in_json(), version="1.0"),
    "the last of its connection": request(in_json(), "Connection: close"),
    "a wish for gzip": in_binary(some_images(4), "Accept-Encoding: gzip", more=classes(3)),
    "a deadline": in_binary(more={"parameters": {"timeout": 9_000_000}}),
    "bad JSON": request(b"{"),
    "no body": request(b""),
    "JSON that is no object": request(b"[1]"),
    "a wrong name": in_binary(name="x"),
    "a wrong shape": request(in_json(shape=[1, 3, 9, 8])),
    "a wrong type": in_binary(datatype="FP16"),
    "too many images": in_binary(some_images(5)),
    "too few bytes": request(some_images(1).tobytes()[:-4], "Inference-Header-Content-Length: 0"),
    "a length that is no number": request(in_json(), "Inference-Header-Content-Length: x"),
    "a length beyond the body": request(in_json(), "Inference-Header-Content-Length: 1000000"),
    "NaN": request(np.full((1, 3, 8, 8), np.nan, np.float32).tobytes(), "Inference-Header-Content-Length: 0"),
    "a wrong output": in_binary(more={"outputs": [{"name": "x"}]}),
    "a wrong parameter": in_binary(more={"parameters": {"priority": "x"}}),
    "shared memory": request(in_json(parameters={"shared_memory_region": "x"})),
    "an answer that is infinite": request(np.full((1, 3, 8, 8), 3e38, np.float32).tobytes(),
                                          "Inference-Header-Content-Length: 0"),
    "an infinite answer in JSON": in_binary(np.full((1, 3, 8, 8), 3e38, np.float32)),
    "an unknown version": in_binary(path="/v2/models/tiny/versions/7/infer"),
    "too large a body": request(b"x" * 20_000),
    "more bytes than all may be": request(b" " * 8_000 + in_json()),
}  # fmt: skip


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside another connection"])
def test_both_ways_answer_the_same_to_the_byte(ways, alone, monkeypatch):
    """Answers, errors, and all headers but the date and our id; also that each is counted once, on both ways."""

    def infer(images):
        return np.full((1, len(LABELS)), np.inf, np.float32) if images.max() > 1e30 else expected_logits(images)

    monkeypatch.setattr(Crowd, "enter", lambda crowd, connection, now: alone)
    model = tiny_model(infer)
    with live(model, max_body_bytes=16_000, max_inflight_bytes=16_000) as server:
        server.app.budget.max_bytes = 10_000
        known = "/v2/models/tiny/versions/7/infer"
        answers = {}
        for name, message in SAME.items():
            before = counts(model)
            server.app.lanes.clear()
            answers[name] = ask(server, message)
            wait_until_all_is_given_back(server)
            done = counts(model)
            answers[name, "counts"] = done[0] - before[0], done[1] - before[1]
        assert len(ways.long) >= len(SAME) - 2  # one is refused by the parser
        open_lane(server)
        lane = server.app.lanes[PATH]
        server.app.lanes[known] = type(lane)(server.app, known, {"model": "tiny", "version": "7"})
        for name, message in SAME.items():
            before = counts(model)
            assert ask(server, message) == answers[name], name
            wait_until_all_is_given_back(server)
            done = counts(model)
            assert (done[0] - before[0], done[1] - before[1]) == answers[name, "counts"], name


def test_what_of_these_is_right_went_the_short_way(ways):
    """Or the test above would compare the long way with itself."""
    with live() as server:
        open_lane(server)
        ways.long.clear()
        right = [name for name, message in SAME.items() if ask(server, message)[0].startswith(b"HTTP/1.1 200")]
        assert len(right) >= 15
        assert ways.long.count(PATH) <= len(SAME) - len(right)


def test_a_request_id_of_the_client_comes_back_and_every_other_request_gets_one_of_its_own():
    with live() as server, server.connect() as client:
        ids = []
        for _ in range(4):
            client.sendall(in_binary(None, "X-Request-Id: mine-1"))
            assert read_answer(client)[1][b"x-request-id"] == b"mine-1"
            client.sendall(in_binary(None, "X-Request-Id: not mine"))
            ids.append(read_answer(client)[1][b"x-request-id"])
        assert len(set(ids)) == 4
        assert b"not mine" not in ids


def test_a_connection_that_changes_what_it_asks_gets_what_it_asked(ways):
    """Nothing of one request, its size, key, id or form, is carried over to the next of the same connection."""
    images = [some_images(1), some_images(1, seed=1), some_images(2)]
    with live() as server, server.connect() as client:
        open_lane(server)
        for turn in range(12):
            sent = images[turn % 3]
            more = {"id": f"{turn % 2}"} | (BINARY_ANSWER if turn % 4 < 2 else {})
            client.sendall(in_binary(sent, f"X-Request-Id: r{turn % 5}", more=more))
            status, headers, body = read_answer(client)
            assert (status, headers[b"x-request-id"]) == (200, f"r{turn % 5}".encode())
            if turn % 4 < 2:
                length = int(headers[b"inference-header-content-length"])
                found = np.frombuffer(body[length:], np.float32).reshape(len(sent), -1)
                body = body[:length]
            else:
                found = np.float32(json.loads(body)["outputs"][0]["data"]).reshape(len(sent), -1)
            assert json.loads(body)["id"] == more["id"]
            np.testing.assert_array_equal(found, expected_logits(sent))
        assert ways.long == [PATH]


# ----------------------------------------------------------------------------------------------------------- framing


def test_a_header_that_is_cut_in_the_middle_is_not_taken_for_the_end_of_one(ways):
    """The bytes that follow look like the request before, to the letter; but they belong to a value of a header."""
    known = in_binary()
    with live() as server, server.connect() as client:
        for _ in range(2):
            client.sendall(known)
            assert read_answer(client)[0] == 200
        health = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
        client.sendall(health + b"POST /v2/nothing HTTP/1.1\r\nX: ")
        assert read_answer(client)[0] == 200
        time.sleep(0.05)
        client.sendall(known)
        assert read_answer(client)[0] == 404, "the header's value was taken for a request"
        client.sendall(health)
        assert read_answer(client)[2] == b'{"live":true}'


def test_what_follows_the_rest_of_a_body_is_not_remembered_together_with_it(ways):
    known = in_binary()
    with live() as server, server.connect() as client:
        open_lane(server)
        cut = b"GET /v2/health/live HTTP/1.1\r\nX: "
        client.sendall(request(b"a" * 50 + cut, path="/v2/nothing")[: -len(cut)])
        assert read_answer(client)[0] == 404
        client.sendall(cut + known)
        assert read_answer(client)[0] == 200
        client.sendall(cut + known)  # now it is one request, with a header X
        status, _, body = read_answer(client)
        assert (status, body) == (200, b'{"live":true}')


def test_the_end_of_a_header_is_not_remembered_as_a_whole_one():
    known = in_binary()
    cut = known.index(b"Content-Length")
    with live() as server:
        open_lane(server)
        with server.connect() as client:
            client.sendall(known[:cut])
            time.sleep(0.05)
            client.sendall(known[cut:])
            assert read_answer(client)[0] == 200
            client.sendall(known[cut:])
            assert read_answer(client)[0] == 400
        still = ask(server, known)
        assert still[0].startswith(b"HTTP/1.1 200")


def test_pipelined_requests_are_answered_in_their_order(ways):
    with live() as server, server.connect() as client:
        open_lane(server)
        wanted = [some_images(1, seed=seed) for seed in range(10)]
        health = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
        message = b"".join(in_binary(images) + (health if seed % 3 == 0 else b"") for seed, images in enumerate(wanted))
        client.sendall(message)
        for seed, images in enumerate(wanted):
            status, _, body = read_answer(client)
            assert status == 200
            np.testing.assert_array_equal(json.loads(body)["outputs"][0]["data"], expected_logits(images)[0])
            if seed % 3 == 0:
                assert read_answer(client)[2] == b'{"live":true}'
        wait_until_all_is_given_back(server)


def test_pipelined_requests_keep_their_order_while_the_engine_is_busy(ways):
    gate = Gate()
    with live(tiny_model(lambda images: gate(images)), timeout_s=20) as server, server.connect() as client:
        behind_a_gate(server, gate)
        ways.long.clear()
        wanted = [some_images(1, seed=seed) for seed in range(3)]
        for images in wanted:
            client.sendall(in_binary(images))
            time.sleep(0.02)
        until(lambda: server.app.in_flight)
        gate.open()
        for images in wanted:
            body = read_answer(client)[2]
            np.testing.assert_array_equal(json.loads(body)["outputs"][0]["data"], expected_logits(images)[0])
        assert ways.long, "one that waits for an earlier one"
        wait_until_all_is_given_back(server)


def test_not_more_than_one_request_of_a_chunk_is_run_before_others_get_their_turn():
    """Or one connection could keep the event loop for as long as its bytes last."""
    threads = []

    def infer(images):
        threads.append(threading.get_ident())
        return expected_logits(images)

    with live(tiny_model(infer)) as server, server.connect() as client:
        for _ in range(3):
            client.sendall(in_binary())
            read_answer(client)
        client.sendall(in_binary() * 60)
        found = [read_answer(client)[0]]
        client.settimeout(1)
        with contextlib.suppress(TimeoutError, AssertionError):
            while True:
                found.append(read_answer(client)[0])
        assert found.count(200) < 60, "the limit of pipelined requests was not kept"
        assert 503 in found


@pytest.mark.parametrize("header", ["Connection: close", "Connection: keep-alive, close"])
def test_what_follows_the_last_request_of_a_connection_is_not_run(header, monkeypatch):
    monkeypatch.setattr(Crowd, "enter", lambda crowd, connection, now: True)
    ran = []

    def infer(images):
        ran.append(len(images))
        return expected_logits(images)

    with live(tiny_model(infer)) as server:
        open_lane(server)
        open_lane(server)
        ran.clear()
        found = server.say(in_binary(None, header) + in_binary() * 3)
        assert statuses(found) == [200]
        wait_until_all_is_given_back(server)
        assert ran == [1]
        time.sleep(0.05)
        assert server.app.answered == {200: 3}, "one that nobody can be told of"


def test_an_answer_that_nobody_reads_holds_up_the_requests_behind_it():
    """Back-pressure: a client that sends and does not read is not read from either."""
    labels = tuple(f"{'l' * 200}{number}" for number in range(500))
    spec = replace(SPEC, num_classes=500, labels=labels)
    model = Model(spec, lambda images: np.zeros((len(images), 500), np.float32), HOW)
    with live(model, limits={"write_s": 60.0}) as server, server.connect() as client:
        open_lane(server)
        client.settimeout(0.5)
        message = in_binary(some_images(4), more=classes(500))
        with contextlib.suppress(TimeoutError):
            for _ in range(60):
                client.sendall(message)
                time.sleep(0.015)  # so that most come one by one
        (connection,) = server.server.server_state.connections
        assert connection.transport.get_write_buffer_size() < 4 << 20
        assert server.app.answered[200] < 40


# ------------------------------------------------------------------------------------------------------- who may ask


def write_keys(tmp_path, *keys) -> Keys:
    path = tmp_path / "keys"
    path.write_text("\n".join(keys))
    return Keys(path)


def test_a_key_is_asked_for_on_every_request_and_a_new_file_holds_at_once(tmp_path, ways):
    right, wrong = f"Authorization: Bearer {KEY}", f"Authorization: Bearer {OTHER_KEY}"
    with live(keys=write_keys(tmp_path, KEY)) as server, server.connect() as client:

        def status_of(*headers):
            client.sendall(in_binary(None, *headers))
            return read_answer(client)[0]

        assert [status_of(right) for _ in range(3)] == [200] * 3
        assert ways.long == [PATH]
        assert [status_of(wrong), status_of(), status_of(f"X-API-Key: {OTHER_KEY}")] == [401] * 3
        assert status_of(wrong, f"X-API-Key: {KEY}") == 200
        assert status_of(right) == 200
        write_keys(tmp_path, OTHER_KEY)
        server.app.keys.read_again()
        assert [status_of(right), status_of(wrong), status_of(right)] == [401, 200, 401]
        wait_until_all_is_given_back(server)


def test_a_server_that_stops_answers_503_on_the_lane_and_ends_the_connection(ways):
    with live() as server, server.connect() as client:
        for _ in range(3):
            client.sendall(in_binary())
            assert read_answer(client)[0] == 200
        server.app.draining = True
        client.sendall(in_binary())
        status, headers, _ = read_answer(client)
        assert (status, headers[b"connection"], headers[b"retry-after"]) == (503, b"close", b"1")
        assert rest(client) == b""
        server.app.draining = False


@pytest.mark.parametrize("header", [(), ("Connection: close",)])
def test_what_is_in_flight_when_the_server_stops_is_answered_and_told_once_that_it_is_the_last(header):
    gate = Gate()
    with live(tiny_model(lambda images: gate(images))) as server:
        behind_a_gate(server, gate)
        with server.connect() as client:
            client.sendall(in_binary(None, *header))
            assert gate.entered.acquire(timeout=5)
            server.app.draining = True
            gate.open()
            head, _ = whole_answer(client)
            assert head.startswith(b"HTTP/1.1 200")
            assert head.count(b"connection: close") == 1
            assert rest(client) == b""
        server.app.draining = False


# ------------------------------------------------------------------------------------------------- what goes wrong


def test_who_hangs_up_while_waiting_is_cancelled_and_counted_and_gives_all_back(ways):
    gate = Gate()
    model = tiny_model(lambda images: gate(images))
    with live(model, timeout_s=20) as server:
        behind_a_gate(server, gate)
        with server.connect() as first:
            first.sendall(in_binary())
            assert gate.entered.acquire(timeout=5)
            with server.connect() as second:
                second.sendall(in_binary(some_images(2)))
                until(lambda: model.batcher.num_waiting == 1)
                assert server.app.in_flight == 2
                assert server.app.budget.used > 768 * 3
            until(lambda: model.batcher.num_waiting == 0)
            until(lambda: server.app.in_flight == 1)
            assert model.statistics.failures == {"canceled": 1}
            assert server.app.answered[499] == 1
        until(lambda: model.statistics.failures == {"canceled": 2})
        wait_until_all_is_given_back(server)
        gate.open()
        until(lambda: model.batcher._idle == 1)
        assert counts(model) == (1, 2)
        assert ways.long == [PATH]


def test_a_full_queue_and_a_deadline_are_told_on_the_short_way_as_on_the_long_one(ways):
    gate = Gate()
    model = tiny_model(lambda images: gate(images), max_queue=1)
    with live(model, timeout_s=20) as server, contextlib.ExitStack() as stack:
        behind_a_gate(server, gate)

        def send(message):
            client = stack.enter_context(server.connect())
            client.sendall(message)
            return client

        running = send(in_binary())
        assert gate.entered.acquire(timeout=5)
        late = send(in_binary(more={"parameters": {"timeout": 60_000}}))
        until(lambda: model.batcher.num_waiting == 1)
        head, body = whole_answer(send(in_binary()))
        assert head.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in head
        assert b"queue" in body
        head, body = whole_answer(late)
        assert head.startswith(b"HTTP/1.1 504")
        assert json.loads(body) == {"error": "Request timeout expired"}
        gate.open()
        assert read_answer(running)[0] == 200
        assert model.statistics.failures == {"rejected": 1, "timeout": 1}
        wait_until_all_is_given_back(server)
        assert ways.long == [PATH]


def test_a_rejection_for_want_of_memory_is_counted_for_its_model(ways):
    gate = Gate()
    model = tiny_model(lambda images: gate(images))
    with live(model, max_inflight_bytes=1500, max_body_bytes=1500, timeout_s=20) as server:
        behind_a_gate(server, gate)
        with server.connect() as first, server.connect() as second:
            first.sendall(in_binary())
            assert gate.entered.acquire(timeout=5)
            second.sendall(in_binary())
            assert read_answer(second)[0] == 503
            assert model.statistics.failures == {"rejected": 1}
            gate.open()
            assert read_answer(first)[0] == 200
        wait_until_all_is_given_back(server)


FAILURES = {
    "raises": (lambda images: 1 / 0, "internal server error"),
    "answers too few": (lambda images: expected_logits(images)[1:], "internal server error"),
    "answers nothing": (lambda images: None, "internal server error"),
    "answers NaN": (lambda images: NAN, "the model could not answer this request"),
}


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "not alone"])
@pytest.mark.parametrize("failure", FAILURES)
def test_an_engine_that_fails_is_a_500_and_the_next_request_is_answered(ways, failure, alone):
    infer, words = FAILURES[failure]
    now = [expected_logits]
    model = tiny_model(lambda images: now[0](images))
    with live(model) as server, server.connect() as client, server.connect() as other:
        open_lane(server)
        now[0] = infer
        if not alone:
            other.sendall(in_binary())
            assert read_answer(other)[0] == 500
        client.sendall(in_binary())
        status, _, body = read_answer(client)
        assert (status, json.loads(body)) == (500, {"error": words})
        now[0] = expected_logits
        client.sendall(in_binary())
        assert read_answer(client)[0] == 200
        assert model.statistics.failures == {"internal": 1 if alone else 2}
        assert server.app.answered == {200: 2, 500: 1 if alone else 2}
        wait_until_all_is_given_back(server)
        assert ways.long == [PATH]


def test_a_model_that_was_unloaded_is_not_found_and_one_that_was_replaced_answers_for_itself(ways):
    with live(tiny_model()) as server, server.connect() as client:
        open_lane(server)
        wide = Model(
            replace(SPEC, shape=(3, 4, 4)), lambda images: expected_logits(np.zeros((len(images), 3, 8, 8))), HOW
        )
        before = server.app.models.add(wide)
        client.sendall(in_binary())
        status, _, body = read_answer(client)
        assert status == 400, "the head was remembered for another shape"
        assert "Expected [-1,3,4,4]" in json.loads(body)["error"]
        client.sendall(in_binary(some_images(1)[:, :, :4, :4]))
        assert read_answer(client)[0] == 200
        server.app.models.add(before)
        wide.close()
        client.sendall(in_binary())
        assert read_answer(client)[0] == 200
        entry = server.app.models._entries["tiny"]
        kept, entry.loaded = entry.loaded, {}
        client.sendall(in_binary())
        status, _, body = read_answer(client)
        assert (status, json.loads(body)) == (
            404,
            {"error": "Request for unknown model: 'tiny' has no available versions"},
        )
        entry.loaded = kept


def test_a_request_that_meets_a_model_just_being_replaced_is_answered_by_the_next_one(ways):
    old, new = tiny_model(), tiny_model(lambda images: expected_logits(images) + 1)
    with live(old) as server, server.connect() as client:
        open_lane(server)
        old.batcher.close()
        client.sendall(in_binary())
        status, _, body = read_answer(client)
        assert (status, json.loads(body)["error"]) == (503, "the model is being unloaded; try again")
        models = server.app.models
        find, turns = models.find, []

        def late(name, version=""):  # found before the change, handed on after it
            turns.append(name)
            return old if len(turns) == 1 else find(name, version)

        models.add(new)
        models.find = late
        client.sendall(in_binary())
        status, _, body = read_answer(client)
        models.find = find
        assert status == 200
        np.testing.assert_array_equal(
            np.float32(json.loads(body)["outputs"][0]["data"]), expected_logits(some_images(1))[0] + 1
        )
        assert len(turns) == 2
        assert ways.long == [PATH]
        wait_until_all_is_given_back(server)


def test_a_split_chooses_for_every_request_of_a_lane_anew():
    two = Model(replace(SPEC, version="2"), lambda images: expected_logits(images), HOW)
    with live(tiny_model(), two) as server, server.connect() as client:
        models = server.app.models
        models._entries["tiny"].shares = {"1": 0.5, "2": 0.5}
        picks = iter([0.1, 0.9] * 4)
        models._pick = lambda: next(picks)
        found = []
        for _ in range(8):
            client.sendall(in_binary())
            found.append(json.loads(read_answer(client)[2])["model_version"])
        assert found == ["1", "2"] * 4


# --------------------------------------------------------------------------------------------------- where it is run


class Threads:
    """An engine that notes where it runs, and the sizes of its batches."""

    def __init__(self):
        self.where, self.sizes, self.slow = [], [], threading.Event()

    def __call__(self, images):
        self.where.append(threading.current_thread().name)
        self.sizes.append(len(images))
        if self.slow.is_set():
            time.sleep(0.05)
        return expected_logits(images)

    def is_worker(self, place=-1):
        return self.where[place].startswith("infer-")


def test_a_lone_connections_requests_are_run_without_a_change_of_thread_and_others_are_gathered(ways):
    engine = Threads()
    model = tiny_model(engine)
    with live(model) as server, contextlib.ExitStack() as stack:
        client = stack.enter_context(server.connect())
        for _ in range(5):
            client.sendall(in_binary())
            assert read_answer(client)[0] == 200
        assert engine.is_worker(0), "nobody knew yet how long it takes"
        assert not any(engine.is_worker(place) for place in range(1, 5))
        assert engine.sizes == [1] * 5
        others = [stack.enter_context(server.connect()) for _ in range(4)]
        engine.slow.set()
        model.batcher._expected_s.clear()
        for other in others:
            other.sendall(in_binary())
        for other in others:
            assert read_answer(other)[0] == 200
        assert sum(engine.sizes[5:]) == 4
        assert len(engine.sizes[5:]) < 4, "gathered"
        assert engine.is_worker()
        assert ways.long == [PATH]


def test_a_request_with_a_deadline_of_its_own_is_not_run_where_no_deadline_is_looked_at():
    engine = Threads()
    model = tiny_model(engine)
    asked = []
    with live(model) as server, server.connect() as client:
        now = model.batcher.now
        model.batcher.now = lambda images: (asked.append(1), now(images))[1]
        for _ in range(2):
            client.sendall(in_binary())
            assert read_answer(client)[0] == 200
        assert len(asked) == 1
        client.sendall(in_binary(more={"parameters": {"timeout": 5_000_000}}))
        assert read_answer(client)[0] == 200
        assert len(asked) == 1


# ------------------------------------------------------------------------------------------------------- who is told


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside another connection"])
def test_observers_are_told_the_same_of_both_ways(ways, alone):
    seen = []
    model = tiny_model()
    with live(model) as server, server.connect() as client, server.connect() as other:
        server.app._observers.append(seen.append)
        traced = ("X-Request-Id: r1", "Traceparent: 00-" + "a" * 32 + "-" + "b" * 16 + "-01")
        messages = [in_binary(some_images(2), *traced), in_binary(None, *traced, name="x")]
        for message in (messages[0], messages[1], messages[0], messages[1], messages[0]):
            if not alone:
                other.sendall(in_binary())
                read_answer(other)
            client.sendall(message)
            read_answer(client)
        until(lambda: len(seen) == (5 if alone else 10))
        mine = [one for one in seen if one.request_id == "r1"]
        assert len(ways.long) < len(seen)

        def known(one):
            timing = one.timing
            return (
                one.protocol, one.method, one.path, one.status, one.client, one.model, one.version, one.images,
                one.parent, one.error, timing.batch, timing.ended > 0,
            )  # fmt: skip

        good, bad = mine[::2], mine[1::2]
        assert len({known(one) for one in good}) == len({known(one) for one in bad}) == 1, mine
        assert [one.status for one in mine] == [200, 400, 200, 400, 200]
        assert all(0 < one.timing.compute_s <= one.seconds < 5 for one in good)
        assert (good[0].images, good[0].version, good[0].client) == (2, "1", "127.0.0.1")


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside another connection"])
def test_an_observer_that_fails_takes_nobodys_answer(ways, alone):
    def observer(seen):
        if seen.model:
            raise ValueError("an observer of ours")

    gate = Gate()
    model = tiny_model(lambda images: gate(images))
    with live(model) as server, contextlib.ExitStack() as stack:
        behind_a_gate(server, gate)
        server.app._observers.append(observer)
        clients = [stack.enter_context(server.connect()) for _ in range(1 if alone else 4)]
        gate.open()
        for _ in range(3):
            for client in clients:
                client.sendall(in_binary())
            for client in clients:
                assert read_answer(client)[0] == 200
        wait_until_all_is_given_back(server)
        assert server.app.answered == {200: 1 + 3 * len(clients)}


def test_the_mirror_gets_every_request_of_both_ways_once(ways):
    mirrored = []
    with live(tiny_model()) as server, server.connect() as client:
        server.app.mirror = lambda model, images, answer: mirrored.append((len(images), answer.logits.shape))
        for size in (1, 2, 1, 2):
            client.sendall(in_binary(some_images(size)))
            assert read_answer(client)[0] == 200
        assert mirrored == [(size, (size, len(LABELS))) for size in (1, 2, 1, 2)]


def test_a_mirror_that_fails_leaves_one_answer_to_every_request(ways):
    def fails(model, images, answer):
        raise ValueError("a mirror of ours")

    with live(tiny_model()) as server, server.connect() as client:
        open_lane(server)
        server.app.mirror = fails
        for _ in range(3):
            client.sendall(in_binary())
            assert read_answer(client)[0] == 500
        server.app.mirror = None
        client.sendall(in_binary())
        assert read_answer(client)[0] == 200
        client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_answer(client)[2] == b'{"live":true}', "an answer too many came before"
        wait_until_all_is_given_back(server)


def test_statistics_count_each_request_once_whichever_way_it_went():
    model = tiny_model()
    with live(model) as server, server.connect() as client, server.connect() as other:
        for sender in (client, client, client, other, client, other):
            sender.sendall(in_binary(some_images(2)))
            assert read_answer(sender)[0] == 200
        found = model.statistics.as_dict("tiny", "1")
        assert (found["inference_count"], found["execution_count"]) == (12, 6)
        assert {name: part["count"] for name, part in found["inference_stats"].items()} == {
            "success": 6, "fail": 0, "queue": 6, "compute_input": 6, "compute_infer": 6, "compute_output": 6,
            "cache_hit": 0, "cache_miss": 0,
        }  # fmt: skip
        assert server.app.answered == {200: 6}


# ------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside another connection"])
def test_an_idle_connection_does_not_hold_the_images_of_its_last_request(alone):
    seen = []

    def infer(images):
        seen.append(weakref.ref(images if images.base is None else images.base))
        return expected_logits(images)

    with live(tiny_model(infer)) as server, server.connect() as client, server.connect() as other:
        for _ in range(3):
            if not alone:
                other.sendall(in_binary())
                assert read_answer(other)[0] == 200
            client.sendall(in_binary())
            assert read_answer(client)[0] == 200
        gc.collect()
        gc.disable()  # what only the collector would find is held for too long as well
        try:
            seen.clear()
            for _ in range(3):
                if not alone:
                    other.sendall(in_binary())
                    assert read_answer(other)[0] == 200
                client.sendall(in_binary())
                assert read_answer(client)[0] == 200
            until(lambda: all(one() is None for one in seen), 2)
        finally:
            gc.enable()
