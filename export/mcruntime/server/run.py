"""Load bundles, prove each one, listen, and leave in good order."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import uvicorn

from mcruntime.batches import AnyBatch
from mcruntime.bundle import Bundle, load_bundle
from mcruntime.engine import DEFAULT_BATCHES, OnnxRunner, Provider, Runner
from mcruntime.errors import InputError, McdeployError
from mcruntime.server.app import App, ServedModel
from mcruntime.server.executor import Executor
from mcruntime.server.protocol import ModelSpec
from mcruntime.signature import verify_signature
from mcruntime.tensorrt import TensorRTRunner

WARM_UP_RUNS = 3  # after the self-test, of one image
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run(
    bundles: Sequence[Path],
    host: str,
    port: int,
    *,
    threads: int | None,
    provider: Provider,
    max_batch_size: int,
    max_queue: int,
    max_body_bytes: int,
    drain_s: float,
    require_signature: Path | None,
) -> None:
    """See ``mcruntime.server.serve``."""
    if not bundles:
        raise InputError("nothing to serve; give at least one bundle folder")
    for key, value, least in (("max_batch_size", max_batch_size, 1), ("max_queue", max_queue, 0)):
        if value < least:
            raise InputError(f"{key}: expected at least {least}, got {value}")
    with ExitStack() as stack:
        listener = stack.enter_context(_bind(host, port))  # before the models: a port in use is known at once
        models = []
        for bundle in _load_all(bundles, require_signature):
            runner = stack.enter_context(_runner_of(bundle, provider, threads))
            print(_prove(bundle, runner), flush=True)
            models.append(_served(bundle, runner, max_batch_size, max_queue))
        app = App(models, max_body_bytes)
        stack.callback(app.close)
        _listen(listener, app, drain_s)


class _DrainingServer(uvicorn.Server):
    """uvicorn that, told to stop, first answers 503 to new work until what is in flight is done, then closes."""

    def __init__(self, app: App, drain_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app, lifespan="off", ws="none", log_level="warning", access_log=False, server_header=False,
                timeout_graceful_shutdown=1,
            )
        )  # fmt: skip
        self._app = app
        self._drain_s = drain_s
        self.num_cut_off = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        deadline = time.monotonic() + self._drain_s
        while self._app.in_flight and time.monotonic() < deadline and not self.force_exit:
            await asyncio.sleep(0.02)
        self.num_cut_off = self._app.in_flight
        await super().shutdown(sockets)


def _listen(listener: socket.socket, app: App, drain_s: float) -> None:
    server = _DrainingServer(app, drain_s)
    host, port = listener.getsockname()[:2]
    with _signals_stop(server):
        try:
            listener.listen(2048)
        except OSError:
            raise _in_use(host, port) from None
        print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server.run(sockets=[listener])
    if server.num_cut_off:
        raise McdeployError(
            f"{server.num_cut_off} requests were cut off: not done {drain_s:.0f} s after the stop signal"
        )


@contextmanager
def _signals_stop(server: _DrainingServer) -> Iterator[None]:
    """uvicorn raises the signal that stopped it again afterwards; let it meet a handler, so that we exit with 0."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {sig: signal.signal(sig, server.handle_exit) for sig in SIGNALS}
    try:
        yield
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:  # getaddrinfo would take the remainder
        raise InputError(f"{host}:{port}: a port is 0 to 65535; choose another --port, or 0 for any free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise InputError(f"{host}:{port}: no such address; give --host an address of this machine") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise _in_use(host, port) from None
        raise InputError(
            f"{host}:{port}: cannot listen there ({error.strerror}); choose another --host or --port"
        ) from None
    return listener


def _in_use(host: str, port: int) -> InputError:
    return InputError(f"{host}:{port} is in use already; choose another --port, or 0 for any free one")


def _load_all(paths: Sequence[Path], require_signature: Path | None) -> list[Bundle]:
    bundles: dict[str, Bundle] = {}
    for path in paths:
        if require_signature is not None:
            verify_signature(path, require_signature)
        bundle = load_bundle(path)
        name = bundle.manifest.name
        if name in bundles:
            raise InputError(f"{path} and {bundles[name].folder} are both named {name!r}; serve one of them")
        bundles[name] = bundle
    return list(bundles.values())


def _runner_of(bundle: Bundle, provider: Provider, threads: int | None) -> Runner:
    name = bundle.manifest.name
    if bundle.model.backend == "tensorrt":
        if provider != "cpu":
            raise InputError(
                f"{bundle.folder}: is a TensorRT engine, which runs without ONNX Runtime; leave --provider {provider} "
                "away, or name another model of the bundle"
            )
        assert bundle.model.engine is not None  # the manifest holds no other
        return AnyBatch(TensorRTRunner(bundle.model_path, name=name), bundle.model.engine.batch)
    runner = OnnxRunner(
        bundle.model_path,
        provider=provider,
        threads=threads,
        name=name,
        spinning=False,
        types=bundle.model.precision,
    )
    return AnyBatch(runner, DEFAULT_BATCHES) if provider == "tensorrt" else runner


def _prove(bundle: Bundle, runner: Runner) -> str:
    """Self-test and warm-up; returns one line for the user."""
    worst = bundle.selftest(runner)
    manifest, facts = bundle.manifest, runner.facts()
    _, height, width = manifest.input.shape
    threads = f" with {facts['threads']} threads" if "threads" in facts else ""
    for _ in range(WARM_UP_RUNS):
        runner.infer(np.zeros((1, *manifest.input.shape), dtype=np.float32))
    return (
        f"{manifest.name}: bundle {manifest.id[:12]}, model {bundle.key}, {height} x {width} pixels, "
        f"{manifest.output.num_classes} classes, "
        f"{facts['provider']}{threads}, self-test off by {worst:.1e} "
        f"(at most {bundle.model.selftest_max_abs:.1e})"
    )


def _served(bundle: Bundle, runner: Runner, max_batch_size: int, max_queue: int) -> ServedModel:
    manifest = bundle.manifest
    spec = ModelSpec(
        name=manifest.name,
        input_name=manifest.input.name,
        shape=manifest.input.shape,
        output_name=manifest.output.name,
        num_classes=manifest.output.num_classes,
        max_batch_size=max_batch_size,
    )
    return ServedModel(spec, manifest.labels, manifest.preprocessing, Executor(runner, max_queue))
