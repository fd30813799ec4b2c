"""A server of this process on a real socket, and raw bytes to it: for tests of what no HTTP client would send."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import uvloop
from mcruntime.preprocess import Preprocessing
from mcruntime.server import run
from mcruntime.server.app import App
from mcruntime.server.auth import Keys
from mcruntime.server.models import Model, Models
from mcruntime.server.options import ServerOptions
from mcruntime.server.run import DrainingServer
from mcruntime.server.tensors import ModelSpec
from mcruntime.server.tls import tls_context
from numpy.typing import NDArray
from tiny_onnx import LABELS, expected_logits

HOW = Preprocessing(image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", crop_pct=1.0)
SPEC = ModelSpec("tiny", "image", (3, 8, 8), "logits", len(LABELS), 4, labels=LABELS)


def tiny_model(infer: Callable[[NDArray[np.float32]], NDArray[np.float32]] = expected_logits, **batching: Any) -> Model:
    """The tiny model without an engine."""
    return Model(SPEC, infer, HOW, **batching)


@dataclass
class Live:
    """A server that runs."""

    app: App
    server: DrainingServer
    port: int

    def connect(self, timeout_s: float = 5.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout_s)

    def say(self, data: bytes, *, timeout_s: float = 5.0) -> bytes:
        """Send bytes on a new connection; all that comes back until the server hangs up."""
        with self.connect(timeout_s) as client:
            with contextlib.suppress(ConnectionError):
                client.sendall(data)
            return rest(client)

    def num_connections(self) -> int:
        return len(self.server.server_state.connections)


@contextlib.contextmanager
def live(
    *models: Model,
    keys: Keys | None = None,
    control: Keys | None = None,
    limits: dict[str, Any] | None = None,
    routes: Callable[[App], Any] = lambda app: (),
    sources: Callable[[], Any] = lambda: (),
    **options: Any,
) -> Iterator[Live]:
    """Serve models in a thread; ``limits`` are those of one connection, ``options`` the server's."""
    settings = ServerOptions(port=0, **options)
    served = Models(sources)
    for model in models or (tiny_model(),):
        served.add(model)
    app = App(served, settings, keys=keys, control=control, routes=routes)
    server = DrainingServer(app, settings, tls_context(settings))
    before, run.SWEEP_S = run.SWEEP_S, 0.02
    protocol: Any = server.config.http
    protocol.limits = replace(protocol.limits, **(limits or {}))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        port = listener.getsockname()[1]
        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        thread = threading.Thread(target=lambda: runner.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield Live(app, server, port)
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive(), "the server did not stop"
            run.SWEEP_S = before
            runner.close()
            served.close()
            app.close()


def until(condition: Callable[[], Any], timeout_s: float = 5.0) -> None:
    """Wait for something that must come true."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.002)


def rest(client: socket.socket) -> bytes:
    """What comes until the other side hangs up."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while chunk := client.recv(1 << 16):
            found += chunk
    return found


def read_answer(client: socket.socket, *, has_body: bool = True) -> tuple[int, dict[bytes, bytes], bytes]:
    """One answer with a Content-Length, from a connection that may stay open."""
    found = b""
    while b"\r\n\r\n" not in found:
        chunk = client.recv(1)
        assert chunk, f"hung up after {found!r}"
        found += chunk
    lines = found[:-4].split(b"\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
    size, body = int(headers.get(b"content-length", b"0")) if has_body else 0, b""
    while len(body) < size:
        chunk = client.recv(size - len(body))
        assert chunk, "hung up in the middle of a body"
        body += chunk
    return int(lines[0].split()[1]), headers, body


def statuses(data: bytes) -> list[int]:
    """The statuses of all answers in a stream."""
    return [int(part.split()[0]) for part in data.split(b"HTTP/1.1 ")[1:]]
