"""What has broken other servers does not break this one: a negative test for every class of known holes.

Raw bytes go over a real socket, since no HTTP client would send most of them. After each attack the server must still
answer; what it says must be the right refusal and hold nothing of its inside.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import gc
import gzip
import io
import json
import os
import re
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
import zlib
from pathlib import Path

import mcruntime
import numpy as np
import onnx
import psutil
import pytest
from certificates import make_certificate
from live_server import Live, live, read_answer, rest, statuses, tiny_model, until
from mcruntime.bundle import load_bundle
from mcruntime.errors import BundleError, DataError, InputError
from mcruntime.external import external_files
from mcruntime.server import body as body_module
from mcruntime.server import metrics, pages, wiring
from mcruntime.server.auth import Keys
from mcruntime.server.http import Flow
from mcruntime.server.loader import find_in, source_of
from mcruntime.server.options import ServerOptions
from mcruntime.server.shadow import Shadows
from mcruntime.server.tls import tls_context
from onnx import TensorProto
from PIL import Image
from tiny_onnx import WEIGHT, expected_logits, some_images, write_bundle, write_model

EXPORT = Path(mcruntime.__file__).parents[1]
MIB = 1 << 20
HEALTH = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n"
PREDICT = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
INFER = b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\n"
CLOSE = b"Connection: close\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
KEY, CONTROL_KEY = "k" * 32, "c" * 32


@pytest.fixture(scope="module")
def server():
    with live(limits={"linger_s": 0.3}, max_body_bytes=4 * MIB, max_pixels=1_000_000) as running:
        yield running


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def binary(tree: dict, data: bytes, path="/v2/models/tiny/infer") -> bytes:
    head = json.dumps(tree).encode()
    return post(path, head + data, f"Inference-Header-Content-Length: {len(head)}")


def tensor(**changes) -> dict:
    fields = {"name": "image", "shape": [1, 3, 8, 8], "datatype": "FP32", "parameters": {"binary_data_size": 768}}
    return {"inputs": [fields | changes]}


def answer_of(data: bytes) -> tuple[int, dict]:
    """Status and JSON of the only answer in a stream."""
    head, _, body = data.partition(b"\r\n\r\n")
    assert len(statuses(data)) == 1, data[:300]
    return statuses(head)[0], json.loads(body)


def refused(data: bytes, status: int) -> str:
    """The sentence of a refusal, after a look at what it gives away."""
    found, tree = answer_of(data)
    assert found == status, tree
    assert list(tree) == ["error"]
    check_secrets(data.decode("latin-1"))
    return tree["error"]


def check_secrets(text: str) -> None:
    secrets = ["Traceback", 'File "', ".py", "0x7f", "mcruntime", "uvicorn", "numpy", "onnxruntime", "Pillow", "/tmp",
               str(EXPORT), str(Path.home()) + "/", f"pid {os.getpid()}", "llhttp", "errno", "Exception"]  # fmt: skip
    assert [secret for secret in secrets if secret in text] == []


def still_answers(server: Live) -> None:
    images = some_images(1)
    status, tree = answer_of(server.say(binary(tensor(), images.tobytes())))
    assert status == 200
    np.testing.assert_array_equal(np.float32(tree["outputs"][0]["data"]), expected_logits(images)[0])


@contextlib.contextmanager
def no_growth(max_mib=50):
    """Resident memory, looked at all the time while something is done."""
    process, stop = psutil.Process(), threading.Event()
    before, most = process.memory_info().rss, [0]

    def watch():
        while not stop.wait(0.002):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
    assert most[0] - before < max_mib * MIB, f"{(most[0] - before) / MIB:.0f} MiB"


# ----------------------------------------------------------------------------------------- framing (CVE-2025-23310, ..)

MANGLED = {
    "a length and chunks": (PREDICT + b"Content-Length: 3\r\n" + CHUNKED + b"0\r\n\r\n", 400),
    "two lengths": (PREDICT + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
    "a negative length": (PREDICT + b"Content-Length: -3\r\n\r\nabc", 400),
    "a length of 23 digits": (PREDICT + b"Content-Length: 99999999999999999999999\r\n\r\nabc", 400),
    "a length in hex": (PREDICT + b"Content-Length: 0x3\r\n\r\nabc", 400),
    "a list of lengths": (PREDICT + b"Content-Length: 3, 3\r\n\r\nabc", 400),
    "an unknown coding": (PREDICT + b"Transfer-Encoding: gzip\r\n\r\nabc", 400),
    "chunks, then a coding": (PREDICT + b"Transfer-Encoding: chunked, identity\r\n\r\nabc", 400),
    "a chunk size that is no number": (PREDICT + CHUNKED + b"zz\r\nabc", 400),
    "a chunk size of 72 bits": (PREDICT + CHUNKED + b"fffffffffffffffff0\r\nabc", 400),
    "a negative chunk size": (PREDICT + CHUNKED + b"-1\r\nabc", 400),
    "a chunk longer than it says": (PREDICT + CHUNKED + b"1\r\nabcdef\r\n0\r\n\r\n", 400),
    "600 kB of chunk extension": (PREDICT + CHUNKED + b"1;" + b"a" * 600_000 + b"\r\nx\r\n0\r\n\r\n", 400),
    "600 kB of trailers": (PREDICT + CHUNKED + b"1\r\nx\r\n0\r\n" + b"a: b\r\n" * 100_000 + b"\r\n", 400),
    "100,000 chunks of a byte": (PREDICT + CHUNKED + b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n", 400),
    "a header of 100 kB": (HEALTH + b"X: " + b"a" * 100_000 + b"\r\n\r\n", 431),
    "a header of 100 kB that does not end": (HEALTH + b"X: " + b"a" * 100_000, 431),
    "a header name of 100 kB": (HEALTH + b"a" * 100_000, 431),
    "20 kB of headers": (HEALTH + (b"X: " + b"a" * 400 + b"\r\n") * 50 + b"\r\n", 431),
    "200 headers": (HEALTH + b"X: a\r\n" * 200 + b"\r\n", 431),
    "a URL of 9 kB": (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    "a URL that does not end": (b"GET /" + b"a" * 100_000, 414),
    "empty lines without end": (b"\r\n" * 20_000, 431),
    "NUL in a header": (HEALTH + b"X: a\0b\r\n\r\n", 400),
    "bare line feeds": (b"GET /v2/health/live HTTP/1.1\nHost: x\n\n", 400),
    "a folded header": (HEALTH + b"X: a\r\n b\r\n\r\n", 400),
    "a space before the colon": (HEALTH + b"Content-Length : 3\r\n\r\n", 400),
    "CONNECT": (b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a URL without a path": (b"GET http://elsewhere HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "a TLS handshake": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)), 400),
    "an upgrade that hides a request": (
        PREDICT + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 60\r\n\r\n" + HEALTH, 400,
    ),
    "20,000 chunks of 30 bytes": (PREDICT + CHUNKED + b"1e\r\n%b\r\n" % (b"x" * 30) * 20_000 + b"0\r\n\r\n", 400),
}  # fmt: skip


@pytest.mark.parametrize(("data", "status"), MANGLED.values(), ids=MANGLED)
def test_mangled_http_gets_one_refusal_in_json_and_a_closed_connection(server, data, status):
    message = refused(server.say(data), status)
    assert "image" not in message, "the application saw it"
    still_answers(server)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (HEALTH + CLOSE + b"\r\n", [200]),
        (b"GET /v2/health/live HTTP/1.0\r\n\r\n", [200]),
        (b"GET http://elsewhere/v2/health/live HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n", [200]),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n", [404]),
        ((HEALTH + b"\r\n") * 20 + HEALTH + CLOSE + b"\r\n", [200] * 21),
        (PREDICT + CLOSE + CHUNKED + b"3;x=y\r\nabc\r\n0\r\n\r\n", [400]),
        (PREDICT + CLOSE + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc", [100, 400]),
        (HEALTH + b"\r\nNONSENSE\r\n\r\n", [200, 400]),
        ((HEALTH + b"\r\n") * 20 + PREDICT + CHUNKED + b"zz\r\n", [200] * 20 + [400]),
    ],
    ids=[
        "plain",
        "HTTP/1.0",
        "absolute URL",
        "star",
        "pipelined",
        "chunks",
        "100-continue",
        "good, then bad",
        "late bad",
    ],
)
def test_uncommon_http_is_answered_as_it_should(server, data, expected):
    assert statuses(server.say(data)) == expected


def test_answers_to_pipelined_requests_keep_their_order(server):
    bodies = [some_images(1, seed=seed) for seed in range(12)]
    head = json.dumps(tensor() | {"parameters": {"binary_data_output": True}}).encode()
    one = INFER + b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (len(head), len(head) + 768)
    with server.connect() as client:
        client.sendall(b"".join(one + head + images.tobytes() for images in bodies))
        for images in bodies:
            status, headers, body = read_answer(client)
            assert status == 200
            logits = np.frombuffer(body[int(headers[b"inference-header-content-length"]) :], np.float32)
            np.testing.assert_array_equal(logits, expected_logits(images)[0])


def test_too_many_pipelined_requests_are_refused_after_those_before_them_were_answered(server):
    found = statuses(server.say((HEALTH + b"\r\n") * 5000))
    assert set(found[:-1]) == {200}
    assert found[-1] == 503
    assert len(found) < 100


def test_a_request_with_a_body_that_asks_for_an_upgrade_is_not_even_begun(server):
    found = server.say(PREDICT + b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc")
    assert "upgraded" in refused(found, 400)


def test_no_more_is_read_while_requests_of_the_connection_wait():
    """What is read is held in memory, so a client that sends ahead of its answers has to keep it itself."""

    class Transport:
        reads = True

        def pause_reading(self):
            self.reads = False

        def resume_reading(self):
            self.reads = True

    waiting, transport = ["a request"], Transport()
    flow = Flow(transport, waiting)
    flow.pause_reading()
    flow.resume_reading()
    assert not transport.reads
    waiting.clear()
    flow.resume_reading()
    assert transport.reads


def test_a_connection_is_seen_to_be_late_twice_before_it_is_closed():
    """Else a server that was busy for long would close on what came in time."""
    with live(limits={"idle_s": 60}) as server, server.connect() as client:
        until(lambda: server.num_connections() == 1)
        (connection,) = server.server.server_state.connections

        def look():
            connection.loop.call_soon_threadsafe(lambda: connection.look(connection._since + 61))

        look()
        client.sendall(HEALTH + b"\r\n")
        assert read_answer(client)[0] == 200
        look()
        client.sendall(HEALTH + b"\r\n")
        assert read_answer(client)[0] == 200
        look()
        look()
        assert rest(client) == b""


def test_an_upgrade_is_not_made_and_nothing_after_it_is_taken_for_a_request(server):
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    assert statuses(server.say(HEALTH + upgrade + HEALTH + b"\r\n")) == [200]


def test_a_trailer_is_no_header(server):
    with live(keys=keys_of(KEY)) as locked:
        data = PREDICT + CLOSE + CHUNKED + b"1\r\nx\r\n0\r\nX-Api-Key: " + KEY.encode() + b"\r\n\r\n"
        assert statuses(locked.say(data)) == [401]


def test_the_end_of_one_body_is_not_taken_for_the_framing_of_the_next(server):
    """Of large requests, one after the other on a connection, a read holds the end of one and the start of another."""
    size = 120_000
    head = PREDICT + b"Content-Length: %d\r\n\r\n" % size
    with server.connect() as client:
        client.sendall(head + bytes(10))
        until(lambda: server.app.budget.used == 10)
        client.sendall(bytes(size - 10) + head + bytes(10))
        client.sendall(bytes(size - 10))
        for _ in range(2):
            status, _, body = read_answer(client)
            assert (status, b"chunk" in body) == (400, False), body


def test_who_is_refused_before_sending_the_body_cannot_go_on_with_what_may_be_a_body(server):
    with server.connect() as client:
        client.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 500\r\n\r\n")
        assert read_answer(client)[0] == 404
        with contextlib.suppress(ConnectionError):
            client.sendall(HEALTH + b"\r\n")
        assert rest(client) == b""


# --------------------------------------------------------------------------------- time and number (slow-loris and kin)


def test_a_header_that_trickles_is_cut_off_with_408():
    with live(limits={"header_s": 0.1, "linger_s": 0.1}) as server, server.connect() as client:
        with contextlib.suppress(ConnectionError):
            for byte in HEALTH * 100:  # would take for ever
                client.sendall(bytes([byte]))
                if select_ready(client, 0.01):
                    break
        assert "did not arrive" in refused(rest(client), 408)


def test_a_connection_that_sends_nothing_is_closed_and_one_between_two_requests_too():
    with live(limits={"idle_s": 0.1}) as server:
        with server.connect() as client:
            assert rest(client) == b""
        assert statuses(server.say(HEALTH + b"\r\n")) == [200]
        until(lambda: server.num_connections() == 0)


def test_a_body_that_trickles_is_cut_off_with_408():
    with live(body_timeout_s=0.1) as server, server.connect() as client:
        client.sendall(PREDICT + b"Content-Length: 1000\r\n\r\nabc")
        status, _, body = read_answer(client)
        assert status == 408
        assert b"did not arrive" in body
        assert rest(client) == b"", "and the connection is closed, for the body may still come"


def test_a_client_that_does_not_take_its_answer_is_cut_off():
    wide = 200_000
    with live(tiny_model(lambda images: np.zeros((len(images), wide), np.float32)), limits={"write_s": 0.15}) as server:
        with server.connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            request = binary(tensor(), some_images(1).tobytes()).replace(b"Connection: close\r\n", b"")
            client.sendall(request * 20)  # 16 MB of answers, more than any socket's buffers
            until(lambda: server.num_connections() == 1)
            until(lambda: server.num_connections() == 0)
        until(lambda: server.app.budget.used == server.app.in_flight == server.app.reading == 0)


def test_more_connections_than_allowed_get_503_but_the_health_probe_is_answered():
    with live(max_connections=3, limits={"linger_s": 0.1, "idle_s": 60}) as server:
        held = [server.connect() for _ in range(3)]
        until(lambda: server.num_connections() == 3)
        message = refused(server.say(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"), 503)
        assert "too many connections" in message
        assert b"\r\nretry-after: " in server.say(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert statuses(server.say(HEALTH + CLOSE + b"\r\n")) == [200]
        until(lambda: server.num_connections() == 3)
        crowd = [server.connect() for _ in range(40)]
        until(lambda: server.num_connections() <= 3 + 16)
        for client in (*held, *crowd):
            client.close()
        until(lambda: server.num_connections() == 0)
        still_answers(server)


def test_who_hangs_up_is_not_computed_and_leaves_nothing_behind():
    gate, started = threading.Event(), []

    def infer(images):
        started.append(float(images[0, 0, 0, 0]))
        assert gate.wait(10)
        return expected_logits(images)

    with live(tiny_model(infer, max_batch=1)) as server:
        clients = []
        for number in range(4):
            client = server.connect()
            client.sendall(binary(tensor(), np.full((1, 3, 8, 8), number, np.float32).tobytes()))
            clients.append(client)
            until(lambda number=number: server.app.in_flight == number + 1)
        batcher = server.app.models.find("tiny").batcher
        until(lambda: batcher.num_waiting == 3)
        clients[0].close()  # is being computed
        clients[1].close()  # waits
        clients[2].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        clients[2].close()  # waits, and resets
        until(lambda: batcher.num_waiting == 1)
        until(lambda: server.app.in_flight == 1)
        gate.set()
        assert statuses(rest(clients[3])) == [200]
        clients[3].close()
        assert started == [0.0, 3.0]
        assert server.app.budget.used == 0
        still_answers(server)


def test_a_body_that_turns_out_bad_ends_the_request_that_waits_for_it(server):
    with server.connect() as client:
        client.sendall(PREDICT + CHUNKED + b"3\r\nabc\r\n")
        until(lambda: server.app.budget.used == 3)
        client.sendall(b"nonsense\r\n")
        refused(rest(client), 400)
    until(lambda: server.app.budget.used == 0)


def test_what_fails_after_its_client_hung_up_is_not_a_stack_trace_in_the_log(caplog):
    gate = threading.Event()

    def decode(*arguments):
        assert gate.wait(10)
        raise DataError("not an image")

    with live() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("mcruntime.server.app.decode", decode)
        client = server.connect()
        client.sendall(post("/predict", b"abc"))
        until(lambda: server.app._decoding == 1)
        client.close()
        until(lambda: server.num_connections() == 0)
        assert server.app.in_flight == 1, "the image is still held, and counted"
        gate.set()
        until(lambda: server.app.in_flight == 0)
        gc.collect()
        assert statuses(server.say(HEALTH + CLOSE + b"\r\n")) == [200]
    assert "Traceback" not in caplog.text
    assert "never retrieved" not in caplog.text


def test_a_wiring_that_nobody_waits_for_any_more_keeps_its_place_until_it_is_done(monkeypatch):
    """Else clients that ask and hang up would pile up work for the one thread that draws."""
    gate, looked = threading.Event(), []

    class Watcher:
        def __init__(self, model):
            pass

        def edges(self, images):
            looked.append(images.shape)
            assert gate.wait(10)
            return {"edges": [], "idle": []}

    monkeypatch.setattr(wiring, "Watcher", Watcher)
    monkeypatch.setattr(wiring, "read_wiring", lambda model: {"dynamic": [{}]})
    monkeypatch.setattr(wiring, "MOST_WAITING", 2)
    question = post("/v2/models/tiny/wiring", encoded("PNG"))
    with live(routes=lambda app: [wiring.route(app)]) as server:
        for number in range(4):  # the first is looked at; the others wait, and are forgotten when they hang up
            client = server.connect()
            client.sendall(question)
            until(lambda: len(looked) == 1)
            until(lambda: server.app.in_flight == 1)
            client.close()
            until(lambda: server.app.in_flight == 0)
            assert number < 4
        held = server.connect()
        held.sendall(question)
        until(lambda: server.app.in_flight == 1)
        assert "queue" in refused(server.say(question), 503), "the one that nobody waits for holds a place, too"
        gate.set()
        assert statuses(rest(held)) == [200]
        held.close()
        assert [statuses(server.say(question)) for _ in range(3)] == [[200]] * 3, "all places are free again"
        assert len(looked) == 5, "who hung up while waiting was not looked at"


def test_loading_a_model_goes_on_when_the_client_that_asked_hangs_up(tmp_path):
    repository = tmp_path / "models"
    write_bundle(repository / "other")
    options = ServerOptions()
    sources = lambda: [source_of(target, options) for target in find_in(repository)]  # noqa: E731
    with live(control=keys_of(CONTROL_KEY), sources=sources) as server:
        client = server.connect()
        client.sendall(post("/v2/repository/models/other/load", b"", f"X-Control-Key: {CONTROL_KEY}"))
        until(lambda: server.app.in_flight == 1)
        client.close()
        until(lambda: server.app.models.versions("other") == ["1"])
        assert server.app.models.find("other").spec.name == "other"


def select_ready(client: socket.socket, timeout_s: float) -> bool:
    client.settimeout(timeout_s)
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False
    finally:
        client.settimeout(5)


# ---------------------------------------------------------- sizes (CVE-2025-23321, 23323, 23331, CVE-2026-24210, 33201)

SHAPES = [
    [10**9, 3, 8, 8], [1 << 62, 4, 1, 1], [1 << 32, 1 << 32, 1, 1], [1, 3, 1 << 31, 1 << 33], [-1, 3, 8, 8],
    [-1, -3, 8, 8],
    [0, 3, 8, 8], [1, 3, 0, 8], [1, 0, 8, 8], [], [1], [1] * 100_000, [1e9, 3, 8, 8], [1 << 64, 3, 8, 8],
    [10**400, 3, 8, 8],
    [None, 3, 8, 8], [[1], 3, 8, 8], [True, 3, 8, 8],
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape)[:30])
def test_a_shape_that_lies_is_refused_before_anything_of_its_size_is_made(server, shape):
    with no_growth():
        for size in (768, 0, (1 << 63) - 1):
            refused(server.say(binary(tensor(shape=shape, parameters={"binary_data_size": size}), bytes(768))), 400)
        refused(server.say(post("/v2/models/tiny/infer", json.dumps(tensor(shape=shape, data=[0.0])).encode())), 400)
    still_answers(server)


@pytest.mark.parametrize(
    "size", [1 << 63, (1 << 63) - 1, 1 << 64, 10**30, -1, -(1 << 63), 767, 769, 1e3, "768", True, [1]]
)
def test_a_binary_size_that_lies_is_refused(server, size):
    with no_growth():
        refused(server.say(binary(tensor(parameters={"binary_data_size": size}), bytes(768))), 400)


@pytest.mark.parametrize("length", ["9" * 400, "9" * 18, str(1 << 63), "-1", "0x10", "1e3", "", " ", "٣", "1 2", "769"])
def test_a_header_length_that_lies_is_refused(server, length):
    with no_growth():
        body = post("/v2/models/tiny/infer", bytes(768)).replace(
            b"Host: x", f"Host: x\r\nInference-Header-Content-Length: {length}".encode()
        )
        refused(server.say(body), 400)


DEEP = 100_000
DEEP_BODIES = {
    "arrays": b"[" * DEEP,
    "closed arrays": b"[" * DEEP + b"]" * DEEP,
    "objects": b'{"a":' * DEEP,
    "in data": b'{"inputs":[{"name":"image","shape":[1,3,8,8],"datatype":"FP32","data":'
    + b"[" * DEEP
    + b"]" * DEEP
    + b"}]}",
    "names as deep as the parser goes": json.dumps(
        {"inputs": [{"name": json.loads("[" * 900 + "]" * 900)}, {"name": "b"}]}
    ).encode(),
    "data as deep as the parser goes": json.dumps(
        tensor(parameters={}, data=json.loads("[" * 900 + "]" * 900))
    ).encode(),
    "an id as deep as the parser goes": b'{"id":' + b"[" * 900 + b"]" * 900 + b"}",
    "parameters as deep as the parser goes": b'{"parameters":{"a":' + b"[" * 900 + b"]" * 900 + b'},"inputs":[]}',
}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param(path, body, id=f"{path} {what}")
        for path in ("/v2/models/tiny/infer", "/v2/repository/index", "/predict")
        for what, body in DEEP_BODIES.items()
        # The index takes any object that the parser can read.
        if path != "/v2/repository/index" or b"[" * DEEP in body or b'{"a":' * DEEP in body
    ],
)
def test_deep_json_is_refused_without_recursion(server, path, body):
    with no_growth(80):
        refused(server.say(post(path, body, "Content-Type: application/json")), 400)
    still_answers(server)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict?top=0", b""),
        ("/predict?top=-1", b""),
        ("/predict?top=" + "9" * 500, b""),
        ("/predict?top=%D9%A3", b""),
        ("/v2/models/tiny/infer", json.dumps(tensor(data=[]) | {"parameters": {"timeout": -1}}).encode()),
        ("/v2/models/tiny/infer", json.dumps(tensor(data=[]) | {"parameters": {"timeout": 1 << 70}}).encode()),
        (
            "/v2/models/tiny/infer",
            json.dumps({"outputs": [{"name": "logits", "parameters": {"classification": 0}}]}).encode(),
        ),
    ],
)
def test_zeros_and_negative_numbers_are_refused(server, path, body):
    refused(server.say(post(path, body)), 400)


def test_a_value_that_overflows_on_its_way_through_the_model_is_the_clients_mistake():
    def infer(images):
        with np.errstate(over="ignore"):
            return images.reshape(len(images), -1)[:, :4] * np.float32(10)

    with live(tiny_model(infer)) as server:
        images = np.full((1, 3, 8, 8), 3e38, np.float32)
        assert "too large" in refused(server.say(binary(tensor(), images.tobytes())), 400)


# ------------------------------------------------------- names and paths (CVE-2025-23316, CVE-2023-31036, 24208, 24209)

NAMES = [
    "../outside", "..%2foutside", "%2e%2e%2foutside", "..%252foutside", "....//outside", "/etc", "%2fetc%2fpasswd",
    "%00",
    "inside%00", "inside%0a", "inside%0d%0aX-Evil:%201", "inside%2f..%2f..%2foutside", "~root", "C:%5cWindows",
    "linked",
    "a" * 5000, "inside%2f", "inside;ls", "$(id)", "__class__", "inside.", "INSIDE", "file:%2f%2f%2fetc%2fpasswd",
    "%c0%ae%c0%ae", "*",
]  # fmt: skip


@pytest.fixture(scope="module")
def repository_server(tmp_path_factory):
    """A server with a repository of one bundle, another outside, and a link to that one."""
    home = tmp_path_factory.mktemp("home")
    write_bundle(home / "outside", name="outside")
    write_bundle(home / "models" / "inside", name="inside")
    (home / "models" / "linked").symlink_to(home / "outside")
    (home / "models" / "versions").mkdir()
    (home / "models" / "versions" / "1").symlink_to(home / "outside")
    options = ServerOptions()

    def sources():
        return [source_of(target, options) for target in find_in(home / "models")]

    with live(control=keys_of(CONTROL_KEY), sources=sources) as running:
        yield running


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("action", ["load", "unload"])
def test_the_control_api_takes_names_it_knows_and_no_paths(repository_server, name, action):
    found = repository_server.say(post(f"/v2/repository/models/{name}/{action}", b"", f"X-Control-Key: {CONTROL_KEY}"))
    assert statuses(found)[0] in ((400, 404) if action == "load" else (200, 400, 404))
    assert b"X-Evil" not in found.partition(b"\r\n\r\n")[0]
    check_secrets(found.decode("latin-1"))
    assert {row["name"] for row in repository_server.app.models.index()} <= {"tiny", "inside"}
    assert repository_server.app.models.versions("tiny") == ["1"]


def test_the_control_api_does_load_what_is_in_the_repository(repository_server):
    key = f"X-Control-Key: {CONTROL_KEY}"
    assert statuses(repository_server.say(post("/v2/repository/models/inside/load", b"", key))) == [200]
    assert repository_server.app.models.versions("inside") == ["1"]
    assert statuses(repository_server.say(post("/v2/repository/models/inside/unload", b"", key))) == [200]


@pytest.mark.parametrize(
    "parameters",
    [
        {"config": "{}"},
        {"file:1/model.onnx": "AAAA"},
        {"file:../../x": "AAAA"},
        {"unload_dependents": False, "config": "{}"},
    ],
)
def test_neither_files_nor_configurations_can_be_sent_with_load(repository_server, parameters):
    body = json.dumps({"parameters": parameters}).encode()
    found = repository_server.say(post("/v2/repository/models/inside/load", body, f"X-Control-Key: {CONTROL_KEY}"))
    assert "neither a configuration nor files" in refused(found, 400)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rest_of_path", ["", "/infer", "/config", "/stats"])
def test_no_path_reaches_beyond_the_models_that_are_served(server, name, rest_of_path):
    method = "POST" if rest_of_path == "/infer" else "GET"
    found = server.say(
        f"{method} /v2/models/{name}{rest_of_path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    )
    assert statuses(found) == [404]
    check_secrets(found.decode("latin-1").replace(name, ""))


@pytest.mark.parametrize(
    "path",
    [
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page/..%2fapp.py",
        "/page//etc/passwd",
        "/../../etc/passwd",
        "/%5c..%5c",
    ],
)
def test_the_pages_files_are_a_fixed_list(path):
    with live(routes=pages.routes) as server:
        assert statuses(server.say(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())) == [404]


# ------------------------------------------------------------------------------- keys (CVE-2026-24207: another path in)


def keys_of(key: str) -> Keys:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys"
        path.write_text(key, encoding="ascii")
        return Keys(path)


OPEN = {"/v2/health/live", "/v2/health/ready", *pages.load_assets()}


def paths_of(pattern: str) -> list[str]:
    """Paths that a route's pattern matches: with and without its optional parts."""
    path = pattern
    for part, filled in (
        (r"(?:/versions/(?P<version>[0-9]+))?", "/versions/1"),
        (r"(?P<model>[^/]+)", "tiny"),
        (r"(?:/[^/]+)?", "/any"),
        (r"\.", "."),
    ):
        path = path.replace(part, filled)
    return list(dict.fromkeys([path, path.replace("/versions/1", ""), path.replace("/any", "")]))


def disguises(path: str) -> list[str]:
    """The same path, or what some server might take for it."""
    last = path[-1]
    return [
        path, f"/{path}", path.replace("/", "//"), f"{path}/", f"{path}.", f"{path}?x=1", f"{path}%00", f"{path}%20",
        f"{path};x=1", f"{path}%3Fx", path.upper(), f"/.{path}", f"/x/..{path}", f"/v2/health/live/..{path}",
        f"/v2/health/live/../..{path}", f"/v2/health/live?{path}", f"/%2e{path}", path[:-1] + f"%{ord(last):02x}",
        f"http://elsewhere{path}", path.replace("/v2", "/v2/health/live/../../v2"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def locked():
    def routes(app):
        return [*pages.routes(app), *metrics.routes(app, Shadows([]))]

    with live(keys=keys_of(KEY), control=keys_of(CONTROL_KEY), routes=routes) as running:
        yield running


def test_every_route_and_every_disguise_of_it_asks_for_a_key(locked):
    """The router is walked, so that a route that is added is tested as well."""
    found_open, patterns = set(), [route.pattern for _, route in locked.app._router._routes]
    assert len(patterns) > 15
    with Asker(locked) as asker:
        for pattern in patterns:
            for path in paths_of(pattern):
                assert re.fullmatch(pattern, path), f"{pattern} is not tested: paths_of does not fill it in"
                for header in ("", "Authorization: Bearer wrong\r\n", f"X-Control-Key: {CONTROL_KEY}\r\n"):
                    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
                        if asker.status(method, path, header) != 401:
                            found_open.add(path)
                for disguise in disguises(path):
                    for method in ("GET", "POST"):
                        if asker.status(method, disguise) not in (401, 400):  # 400: it is no URL
                            found_open.add(disguise.partition("?")[0].removeprefix("http://elsewhere"))
    really = {re.sub("%([0-9a-f]{2})$", lambda match: chr(int(match[1], 16)), path) for path in found_open}
    assert really == OPEN


def test_a_key_opens_every_route(locked):
    with Asker(locked) as asker:
        for _, route in locked.app._router._routes:
            for header in (f"Authorization: Bearer {KEY}\r\n", f"X-Api-Key: {KEY}\r\n"):
                for method in route.handlers:
                    assert asker.status(method, paths_of(route.pattern)[0], header) != 401


@pytest.mark.parametrize("action", ["load", "unload"])
@pytest.mark.parametrize("header", ["", f"X-Control-Key: {KEY}", f"X-Control-Key: {CONTROL_KEY[:-1]}"])
def test_an_api_key_does_not_open_the_control_api(locked, action, header):
    headers = [f"X-Api-Key: {KEY}", *([header] if header else [])]
    assert "control key" in refused(locked.say(post(f"/v2/repository/models/tiny/{action}", b"", *headers)), 403)
    assert locked.app.models.versions("tiny") == ["1"]


def test_the_control_api_is_off_unless_it_is_asked_for(server):
    found = server.say(post("/v2/repository/models/tiny/unload", b"", f"X-Control-Key: {CONTROL_KEY}"))
    assert "switched off" in refused(found, 403)


def test_no_key_no_body_the_body_of_a_stranger_is_not_read_into_memory(locked):
    with no_growth(), locked.connect() as client:
        client.sendall(PREDICT + b"Content-Length: 100000000\r\n\r\n")
        assert read_answer(client)[0] == 401
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                client.sendall(bytes(MIB))


class Asker:
    """One connection for many requests, opened anew where it was closed."""

    def __init__(self, server: Live) -> None:
        self.server, self.client = server, server.connect()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.client.close()

    def status(self, method: str, path: str, header: str = "") -> int:
        self.client.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{header}Content-Length: 0\r\n\r\n".encode())
        status, headers, _ = read_answer(self.client, has_body=method != "HEAD")
        if headers.get(b"connection") == b"close":
            self.client.close()
            self.client = self.server.connect()
        return status


# -------------------------------------------------------- what is fetched and unpickled: nothing (ShellTorch, ShadowMQ)


URLS = [
    "http://127.0.0.1:{}/x.png", "https://127.0.0.1:{}", "ftp://127.0.0.1:{}/", "data:,http://127.0.0.1:{}/",
    "//127.0.0.1:{}/", "file:///etc/hostname#{}", "/etc/hostname#{}", "gopher://127.0.0.1:{}/_",
]  # fmt: skip


@pytest.mark.parametrize("scheme", URLS)
def test_no_url_from_a_request_is_fetched(server, scheme):
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.setblocking(False)
        url = scheme.format(trap.getsockname()[1])
        as_file = (
            f'--b\r\nContent-Disposition: form-data; name="file"; filename="{url}"\r\n\r\n{url}\r\n--b--\r\n'.encode()
        )
        as_text = f'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n{url}\r\n--b--\r\n'.encode()
        form = "Content-Type: multipart/form-data; boundary=b"
        for request in (
            post("/predict", json.dumps({"image": url}).encode(), "Content-Type: application/json"),
            post(
                "/predict", json.dumps({"image": {"url": url}, "url": url}).encode(), "Content-Type: application/json"
            ),
            post("/predict", url.encode()),
            post("/predict", as_file, form),
            post("/predict", as_text, form),
            post(f"/predict?url={url}&image={url}", b"", f"Referer: {url}", f"Location: {url}"),
        ):
            refused(server.say(request), 400)
        with pytest.raises(BlockingIOError):
            trap.accept()


def test_nothing_in_the_runtime_can_unpickle_or_run_what_it_reads():
    forbidden = {
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "marshal",
        "shelve",
        "multiprocessing",
        "torch",
        "runpy",
    }
    for path in sorted(EXPORT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden, where
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, where
            elif isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"yaml.load", "eval", "exec", "compile", "__import__", "os.system", "os.popen"}, (
                    where
                )
                assert not name.startswith("subprocess") or "shell=True" not in ast.unparse(node), where
                if name in {"np.load", "numpy.load"}:
                    assert "allow_pickle=False" in ast.unparse(node), where


# ------------------------------------------------------------------------- forms (CVE-2024-9056, CVE-2023-30798, 54121)

PART = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\nx\r\n'
PNG_FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\nx\r\n'
END = b"\r\n\r\nx\r\n--b--\r\n"
FORMS = {
    "60,000 fields": (b"b", PART % b"a" * 60_000 + b"--b--\r\n"),
    "100 files": (b"b", PNG_FILE % b"a" * 100 + b"--b--\r\n"),
    "no boundary": (b"", b"--b--\r\n"),
    "a boundary of 8 kB": (b"b" * 8000, b"--" + b"b" * 8000 + b"--\r\n"),
    "a boundary that never comes": (b"never", b"x" * 3_000_000),
    "3 MB of dashes": (b"b", b"-" * 3_000_000),
    "3 MB of line ends": (b"b", b"\r\n" * 1_500_000),
    "3 MB after the end": (b"b", b"--b--\r\n" + b"\r" * 3_000_000),
    "almost boundaries": (b"b" * 60, (b"\r\n--" + b"b" * 59) * 40_000),
    "a part header of 3 MB": (b"b", b"--b\r\nContent-Disposition: form-data; name=" + b"a" * 3_000_000 + END),
    "many part headers": (b"b", b"--b\r\n" + b"X: y\r\n" * 100_000 + b"Content-Disposition: form-data; name=a" + END),
    "a filename of 1 MB": (b"b", PNG_FILE % (b"a" * MIB) + b"--b--\r\n"),
    "a filename that climbs": (b"b", PNG_FILE % b"../../../tmp/x" + b"--b--\r\n"),
    "no name": (b"b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
    "no disposition": (b"b", b"--b\r\n\r\nx\r\n--b--\r\n"),
    "a charset nobody knows": (b"b; charset=nonsense", PART % b"\xff\xfe" + b"--b--\r\n"),
    "cut short": (b"b", b'--b\r\nContent-Disposition: form-data; name="fi'),
    "empty": (b"b", b""),
}  # fmt: skip


@pytest.mark.parametrize(("boundary", "body"), FORMS.values(), ids=FORMS)
def test_a_bad_form_is_refused(server, boundary, body):
    with no_growth():
        head = b"Content-Type: multipart/form-data; boundary=%b\r\nContent-Length: %d\r\n\r\n" % (boundary, len(body))
        refused(server.say(PREDICT + CLOSE + head + body, timeout_s=20), 400)
    still_answers(server)


@pytest.mark.parametrize(("part", "what"), [(PART % b"a", "fields"), (PNG_FILE % b"a", "files")])
def test_parts_of_a_form_are_counted_before_they_are_kept(server, part, what):
    form = "Content-Type: multipart/form-data; boundary=b"
    assert f"Too many {what}" in refused(server.say(post("/predict", part * 200 + b"--b--\r\n", form)), 400)


# ---------------------------------------------------------------------------------------------- bombs and broken images


def png_of(width: int, height: int) -> bytes:
    """A PNG of so many pixels, of which a handful is there: what a decoder believes before it looks."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(100_000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def encoded(kind: str, size: int = 64) -> bytes:
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("width", "height"),
    [(30_000, 30_000), (1_000_000_000, 1_000_000_000), (1, 2_000_000_000), (1, 900_000), (1001, 1000)],
)
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(server, width, height):
    bomb = png_of(width, height)
    with no_growth():
        assert "pixels" in refused(server.say(post("/predict", bomb)), 413)
        as_text = json.dumps({"image": base64.b64encode(bomb).decode()}).encode()
        refused(server.say(post("/predict", as_text, "Content-Type: application/json")), 413)
    still_answers(server)


IMAGES = {
    "no pixels": png_of(0, 0),
    "a PNG of which most is missing": png_of(900, 900),
    **{f"a {kind} cut at {share:.0%}": encoded(kind)[: int(len(encoded(kind)) * share)]
       for kind in ("JPEG", "PNG", "WEBP") for share in (0.01, 0.3, 0.9)},
    "a GIF": encoded("GIF"), "a TIFF": encoded("TIFF"), "a BMP": encoded("BMP"),
    "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "zeros": bytes(1000), "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("data", IMAGES.values(), ids=IMAGES)
def test_what_is_no_whole_image_is_refused(server, data):
    with no_growth():
        refused(server.say(post("/predict", data)), 400)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_body_that_unpacks_to_too_much_is_refused_without_unpacking_it_all(server, encoding):
    packer = zlib.compressobj(9, wbits=31 if encoding == "gzip" else 15)
    bomb = b"".join(packer.compress(bytes(MIB)) for _ in range(100)) + packer.flush()
    assert len(bomb) < MIB
    with no_growth():
        refused(server.say(post("/predict", bomb, f"Content-Encoding: {encoding}")), 413)
    still_answers(server)


@pytest.mark.parametrize("size", [10, 200_000, 262_143, 262_144, 262_145, 3_000_000, 4 * MIB])
def test_a_packed_body_of_any_allowed_size_is_unpacked_whole(server, size):
    data = encoded("PNG") + bytes(max(0, size - len(encoded("PNG")))) if size > 100_000 else encoded("PNG")
    found = server.say(post("/predict", gzip.compress(data, mtime=0), "Content-Encoding: gzip"))
    assert answer_of(found)[0] == 200


@pytest.mark.parametrize(
    "data", [b"", b"x", gzip.compress(bytes(1000), mtime=0)[:-9], gzip.compress(b"a", mtime=0) * 2, zlib.compress(b"a")]
)
def test_what_is_no_whole_packed_stream_is_refused(server, data):
    assert "gzip" in refused(server.say(post("/predict", data, "Content-Encoding: gzip")), 400)


def test_what_a_body_unpacks_to_is_counted_and_given_back_whatever_comes_of_it():
    packed = gzip.compress(bytes(3_000_000), mtime=0)
    kinds = {
        400: packed,  # no image
        413: gzip.compress(bytes(5 * MIB), mtime=0),
        415: packed,
    }
    with live(max_body_bytes=4 * MIB, max_inflight_bytes=16 * MIB) as server:
        for status, body in kinds.items():
            encoding = "br" if status == 415 else "gzip"
            refused(server.say(post("/predict", body, f"Content-Encoding: {encoding}")), status)
            until(lambda: server.app.budget.used == 0)
        good = gzip.compress(encoded("PNG"), mtime=0)
        assert answer_of(server.say(post("/predict", good, "Content-Encoding: gzip")))[0] == 200
        until(lambda: server.app.budget.used == 0)
        server.app.budget.used = 14 * MIB  # others hold them; packed it would fit, and unpacked it does not
        found = server.say(post("/predict", packed, "Content-Encoding: gzip"))
        assert "too many bytes" in refused(found, 503)
        until(lambda: server.app.budget.used == 14 * MIB)


def test_what_is_unpacked_for_a_client_that_hung_up_is_not_counted_for_ever(monkeypatch):
    begun, gate, unpack = threading.Event(), threading.Event(), body_module._unpack_rest

    def slow(*arguments):
        begun.set()
        assert gate.wait(10)
        return unpack(*arguments)

    monkeypatch.setattr(body_module, "_unpack_rest", slow)
    with live(max_body_bytes=4 * MIB) as server:
        client = server.connect()
        client.sendall(post("/predict", gzip.compress(bytes(3_000_000), mtime=0), "Content-Encoding: gzip"))
        assert begun.wait(5)
        client.close()
        until(lambda: server.app.budget.used == 0 and server.num_connections() == 0)
        gate.set()
        body_module.UNPACKER.submit(int).result(10)  # after the one for the client
        assert server.app.budget.used == 0
        assert server.app.reading == server.app.in_flight == 0
        still_answers(server)


def test_codings_are_not_nested(server):
    refused(
        server.say(post("/predict", gzip.compress(gzip.compress(b"a"), mtime=0), "Content-Encoding: gzip, gzip")), 415
    )


def test_a_file_that_the_browser_has_is_answered_without_a_body_or_a_length_of_its_own():
    """A length in a 304 is that of the file, or a lie; some clients then wait for so many bytes."""
    with live(routes=pages.routes) as server, server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        status, headers, whole = read_answer(client)
        assert (status, int(headers[b"content-length"])) == (200, len(whole))
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nIf-None-Match: %b\r\n\r\n" % headers[b"etag"])
        client.sendall(HEALTH + CLOSE + b"\r\n")
        found = rest(client)
        assert statuses(found) == [304, 200]
        head, _, after = found.partition(b"\r\n\r\n")
        assert b"content-length" not in head.lower()
        assert b"transfer-encoding" not in head.lower()
        assert after.startswith(b"HTTP/1.1 200 "), "nothing is between the two answers"


def test_ranges_are_not_computed(server):
    ranges = ",".join(f"{place}-" for place in range(2000))
    with live(routes=pages.routes) as running:
        found = running.say(
            HEALTH.replace(b"/v2/health/live", b"/") + CLOSE + f"Range: bytes={ranges}\r\n\r\n".encode()
        )
        assert statuses(found) == [200]


# ----------------------------------------------------------- weights from elsewhere (onnx CVE-2024-27318, 51480, 34447)


def bundle_with_weights_at(folder: Path, location: str, offset: int = 0) -> Path:
    """A bundle, sealed, whose model says that its weights are in some file."""
    bundle = write_bundle(folder / "bundle")
    model = onnx.load(str(bundle / "model.onnx"))
    tensor_ = next(item for item in model.graph.initializer if item.name == "weight")
    tensor_.ClearField("raw_data")
    tensor_.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": str(offset), "length": str(WEIGHT.nbytes)}.items():
        entry = tensor_.external_data.add()
        entry.key, entry.value = key, value
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    return bundle


def seal_again(bundle: Path) -> None:
    """As somebody would who wants the bundle to pass: all hashes are right."""
    from mcruntime.bundle import _sha256
    from mcruntime.manifest import FileFact, Manifest

    tree = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    tree.pop("id")
    names = [
        str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file() and path.name != "manifest.json"
    ]
    files = {name: FileFact(sha256=_sha256(bundle / name), bytes=(bundle / name).stat().st_size) for name in names}
    manifest = Manifest.model_validate_json(json.dumps(tree)).model_copy(update={"files": files})
    text = json.dumps({"id": manifest.id, **manifest.model_dump(mode="json")})
    (bundle / "manifest.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "location",
    [
        "../secret.data",
        "{home}/secret.data",
        "reports/../../secret.data",
        "nowhere.data",
        "",
        "*/_ORT_MEM_ADDR_/*",
        "/etc/passwd",
    ],
)
def test_a_model_that_takes_weights_from_outside_its_bundle_is_refused(tmp_path, location):
    (tmp_path / "secret.data").write_bytes(WEIGHT.tobytes())
    bundle = bundle_with_weights_at(tmp_path, location.format(home=tmp_path))
    seal_again(bundle)
    with pytest.raises(BundleError, match="for its weights, which is no file of this bundle"):
        load_bundle(bundle)


def test_a_model_may_take_weights_from_a_file_of_its_bundle(tmp_path):
    bundle = bundle_with_weights_at(tmp_path, "weights.data")
    (bundle / "weights.data").write_bytes(WEIGHT.tobytes())
    seal_again(bundle)
    assert load_bundle(bundle).manifest.files["weights.data"].bytes == WEIGHT.nbytes


@pytest.mark.parametrize("place", ["a subgraph", "an attribute", "a function", "a sparse tensor"])
def test_weights_are_found_wherever_a_model_can_hold_them(tmp_path, place):
    outside = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    entry = outside.external_data.add()
    entry.value, entry.key = "../secret.data", "location"
    model = onnx.load(str(write_model(tmp_path / "model.onnx")))
    if place == "a subgraph":
        node = model.graph.node.add(op_type="If")
        node.attribute.append(
            onnx.helper.make_attribute("then_branch", onnx.helper.make_graph([], "g", [], [], [outside]))
        )
    elif place == "an attribute":
        model.graph.node.add(op_type="Constant").attribute.append(onnx.helper.make_attribute("value", outside))
    elif place == "a function":
        node = model.functions.add(name="f", domain="d").node.add(op_type="Constant")
        node.attribute.append(onnx.helper.make_attribute("value", outside))
    else:
        model.graph.sparse_initializer.add().values.CopyFrom(outside)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert external_files(tmp_path / "model.onnx") == {"../secret.data"}


@pytest.mark.parametrize(
    "data",
    [
        b"\x3a\x7f",
        b"\xff" * 20,
        b"\x0b",
        b"\x3d\x00",
        b"PK\x03\x04" + bytes(50),
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    ],
)
def test_what_is_no_protobuf_is_no_model(tmp_path, data):
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(ValueError, match=r"a field|a number|an unknown kind"):
        external_files(tmp_path / "model.onnx")


# ------------------------------------------------------------------------------------------------------------------ TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    for name, issuer in (("server", ""), ("authority", ""), ("client", "authority"), ("stranger", "")):
        make_certificate(folder, name, issuer)
    return folder


def ask_over_tls(server: Live, context: ssl.SSLContext) -> list[int]:
    with server.connect() as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as client:
        client.sendall(HEALTH + CLOSE + b"\r\n")
        return statuses(rest(client))


def client_context(certificates: Path, name: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(certificates / "server.pem"))
    if name:
        context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    return context


def test_tls_answers_and_only_from_1_2_on(certificates):
    cert, key = certificates / "server.pem", certificates / "server.key"
    with live(tls_cert=cert, tls_key=key, limits={"idle_s": 0.5}) as server:
        assert ask_over_tls(server, client_context(certificates)) == [200]
        assert server.say(HEALTH + b"\r\n") == b"", "plain HTTP gets no answer, but no harm is done"
        old = client_context(certificates)
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        old.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises(ssl.SSLError):
            ask_over_tls(server, old)
        assert ask_over_tls(server, client_context(certificates)) == [200]
    assert tls_context(ServerOptions(tls_cert=cert, tls_key=key)).minimum_version is ssl.TLSVersion.TLSv1_2


def test_with_a_client_authority_only_its_clients_are_answered(certificates):
    cert, key, authority = (certificates / name for name in ("server.pem", "server.key", "authority.pem"))
    with live(tls_cert=cert, tls_key=key, tls_client_ca=authority) as server:
        assert ask_over_tls(server, client_context(certificates, "client")) == [200]
        for name in ("", "stranger"):
            try:
                found = ask_over_tls(server, client_context(certificates, name))
            except (ssl.SSLError, ConnectionError):
                found = []
            assert found == []
        assert server.app.answered == {200: 1}


@pytest.mark.parametrize(
    ("cert", "key", "client_ca", "message"),
    [
        ("server.pem", "stranger.key", None, "is not the key of"),
        ("server.key", "server.key", None, "cannot be read as a certificate"),
        ("server.pem", "locked.key", None, "without a passphrase"),
        ("server.pem", "nowhere.key", None, "no such file"),
        ("server.pem", "server.key", "server.key", "cannot be read as a certificate"),
    ],
)
def test_a_certificate_that_cannot_work_is_an_error_before_anything_listens(
    certificates, cert, key, client_ca, message
):
    if key == "locked.key":
        arguments = ["ec", "-in", str(certificates / "server.key"), "-aes128", "-passout", "pass:secret", "-out"]
        subprocess.run(["openssl", *arguments, str(certificates / key)], check=True, capture_output=True)
    options = ServerOptions(
        tls_cert=certificates / cert,
        tls_key=certificates / key,
        tls_client_ca=certificates / client_ca if client_ca else None,
    )
    with pytest.raises(InputError, match=message):
        tls_context(options)
