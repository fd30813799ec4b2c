"""Load bundles, prove each one, listen, and leave in good order."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import importlib
import logging
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from mcruntime.errors import InputError, McdeployError, MissingExtraError
from mcruntime.server import logs, metrics, pages
from mcruntime.server.app import App
from mcruntime.server.auth import Keys, hosts_of
from mcruntime.server.grpc_core import read_in_place
from mcruntime.server.http import SWEEP_S, TLS_HANDSHAKE_S, http_protocol, sweep
from mcruntime.server.loader import Target, check_unique, describe, find_in, parse_target, source_of
from mcruntime.server.models import Models, Source
from mcruntime.server.options import ServerOptions
from mcruntime.server.shadow import Shadows, open_shadows
from mcruntime.server.signals import Signals
from mcruntime.server.tls import tls_context
from mcruntime.server.tracing import open_tracing

if TYPE_CHECKING:
    from mcruntime.server.grpc_server import GrpcServer

M_ARENA_MAX = -8  # of malloc.h
LATE_BODIES_S = 2.0  # in which requests that are still being sent must be there, once the server stops
MOST_GUESTS = 4096  # taken at the end, though more should come meanwhile
LAST_WORDS_S = 0.5  # for connections that are open when the last request is answered
GRPC_NEEDED = {
    "grpc": "grpcio", "google.protobuf": "protobuf", "grpc_health.v1.health_pb2": "grpcio-health-checking",
    "grpc_reflection.v1alpha.reflection": "grpcio-reflection",
}  # fmt: skip
logger = logging.getLogger("mcruntime.server")


def run(bundles: Sequence[Path | str], options: ServerOptions) -> None:
    """See ``mcruntime.server.serve``."""
    if not bundles and options.repository is None:
        raise InputError("nothing to serve; give at least one bundle folder, or a --repository of them")
    _share_heaps()
    with ExitStack() as stack:
        stack.enter_context(logs.to_stderr(options))
        signals = stack.enter_context(Signals())
        listener = stack.enter_context(_bind(options.host, options.port))  # a port in use is known at once
        if options.grpc_port is not None:
            _require_grpc()
            _bind(options.host, options.grpc_port).close()
        tls = tls_context(options)  # so is a key that does not fit its certificate
        observers, refusals = logs.observers(options)
        if options.otlp is not None:
            tracing = open_tracing(options.otlp)
            stack.callback(tracing.close)
            observers.append(tracing)
        keys = Keys(options.api_keys) if options.api_keys else None
        control = Keys(options.control_keys) if options.control_keys else None
        models = open_models([parse_target(bundle) for bundle in bundles], options)
        stack.callback(models.close)
        shadows = open_shadows(options.shadows, models, options)
        stack.callback(shadows.close)
        app = App(
            models,
            options,
            keys=keys,
            control=control,
            routes=lambda app: [*pages.routes(app), *metrics.routes(app, shadows)],
            observers=observers,
            refusals=refusals,
        )
        app.mirror = shadows.mirror if shadows.all else None
        app.hosts = hosts_of(listener.getsockname()[0], [*options.allowed_hosts], has_keys=keys is not None)
        stack.callback(app.close)
        server = DrainingServer(app, options, tls, shadows)
        server.hangs_up_at_start = lambda: signals.hung_up
        _listen(listener, server, options, signals)


def _share_heaps() -> None:
    """glibc gives every thread a heap of its own, and each stays as large as it ever was; two are enough."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def open_models(targets: Sequence[Target], options: ServerOptions) -> Models:
    """Load all that is asked for, printing a line for each.

    Raises:
        InputError: two of one name and version, or a split that names what is not there.
        BundleError, BackendError, ParityError: a bundle that is damaged, cannot run here, or fails its self-test.
    """
    fixed = [source_of(target, options) for target in targets]

    def sources() -> list[Source]:
        found = find_in(options.repository) if options.repository is not None else []
        given = {(source.name, source.version) for source in fixed}
        more = [source_of(target, options) for target in found]
        return [*fixed, *(source for source in more if (source.name, source.version) not in given)]

    check_unique(fixed)
    models = Models(sources, split=options.split)
    try:
        for source in sources():
            print(describe(models.load_first(source)), flush=True)
        if not models.is_ready():
            print(f"{options.repository}: holds no bundle yet, so nothing is ready", flush=True)
        for name, shares in options.split.items():
            for version in shares:
                if version not in models.versions(name):
                    raise InputError(f"split: there is no version {version} of {name!r} here; serve it, too")
    except BaseException:
        models.close()
        raise
    return models


def _require_grpc() -> None:
    read_in_place()
    for module, package in GRPC_NEEDED.items():
        try:
            importlib.import_module(module)
        except ImportError:
            raise MissingExtraError("mcdeploy serve --grpc-port", package, "grpc") from None


class DrainingServer(uvicorn.Server):
    """uvicorn that, told to stop, first answers 503 to new work until what is in flight is done, then closes."""

    def __init__(
        self,
        app: App,
        options: ServerOptions,
        tls: ssl.SSLContext | None = None,
        shadows: Shadows | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app, lifespan="off", ws="none", log_level="warning", access_log=False, server_header=False,
                timeout_graceful_shutdown=1, loop="uvloop", log_config=None, proxy_headers=False,
                http=http_protocol(options, lambda status: app.answered.update([status]), app.lanes),
                ssl_context_factory=None if tls is None else lambda config, default: tls,
            )
        )  # fmt: skip
        app.connections = lambda: len(self.server_state.connections)
        self._app = app
        self._options = options
        self._shadows = shadows
        self.grpc: GrpcServer | None = None
        self.hangs_up_at_start: Callable[[], bool] = lambda: False  # whether SIGHUP came before it could be heard here
        self._reloads: set[asyncio.Task[None]] = set()
        self._reading = asyncio.Lock()
        self._fresh_tls: ssl.SSLContext | None = None  # read, but not in use yet
        self.num_cut_off = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.draining = True
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
            loop.add_signal_handler(signal.SIGHUP, self._reload)
            if self.hangs_up_at_start():
                self._reload()
        if self._options.grpc_port is not None:
            from mcruntime.server import grpc_server

            self.grpc = await grpc_server.start(self._app, self._options)
        for sock in sockets or []:  # listens already; who reads this line finds both protocols there
            host, port = sock.getsockname()[:2]
            print(f"listening on {'https' if self.config.ssl else 'http'}://{_shown(host)}:{port}", flush=True)
        if self.grpc is not None:
            print(f"grpc on {_shown(self._options.host)}:{self.grpc.port}", flush=True)
        self._sockets = list(sockets or [])
        self.servers = [await self._take_from(sock) for sock in self._sockets]
        self._sweeper = loop.create_task(self._sweep(loop))
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logger.info("stopping", extra={"fields": {"in_flight": self._app.in_flight, "reading": self._app.reading}})
        now = time.monotonic()
        deadline, latest_body = now + self._options.drain_s, now + min(LATE_BODIES_S, self._options.drain_s)
        while not self.force_exit and time.monotonic() < deadline:
            if not self._app.in_flight and (not self._app.reading or time.monotonic() > latest_body):
                break
            await asyncio.sleep(0.02)
        for connection in list(self.server_state.connections):
            connection.give_up_reading()  # type: ignore[union-attr]
        self.num_cut_off = self._app.in_flight
        logger.info("drained", extra={"fields": {"cut_off": self.num_cut_off}})
        try:
            if self.grpc is not None:
                await self.grpc.stop()
            await self._say_last_words(sockets or [])
            await super().shutdown(sockets)
        finally:
            self._sweeper.cancel()

    async def _take_from(self, sock: socket.socket) -> asyncio.Server:
        """Take connections from a socket that listens; the handle that the loop closes is not ours.

        As uvicorn does it, but for that and for the time a TLS handshake may take.
        """
        return await asyncio.get_running_loop().create_server(
            self._make_connection,
            sock=sock.dup(),
            ssl=self.config.ssl,
            backlog=self.config.backlog,
            ssl_handshake_timeout=TLS_HANDSHAKE_S if self.config.ssl else None,
        )

    def _make_connection(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def _say_last_words(self, sockets: list[socket.socket]) -> None:
        """Listen no more; who has just connected, or is just sending, is told 503 instead of being cut off."""
        loop = asyncio.get_running_loop()
        for server in self.servers:
            server.close()
        # Those whom the kernel has let in already would be reset, so they are taken before the last handle is closed.
        guests = [guest for sock in sockets for guest in _guests_of(sock)]
        for guest in guests:
            with suppress(OSError):  # gone already, or no TLS
                await loop.connect_accepted_socket(
                    self._make_connection,
                    guest,
                    ssl=self.config.ssl,
                    ssl_handshake_timeout=LAST_WORDS_S if self.config.ssl else None,
                )
        deadline = time.monotonic() + LAST_WORDS_S
        while self.server_state.connections and time.monotonic() < deadline and not self.force_exit:
            await asyncio.sleep(0.02)

    def _reload(self) -> None:
        task = asyncio.get_running_loop().create_task(self._read_again())
        self._reloads.add(task)  # a task that nobody holds may vanish
        task.add_done_callback(self._reloads.discard)

    async def _read_again(self) -> None:
        """Keys and certificates first, then the models and their shadows, which may take long. What is not as it should
        be is logged, and what was there before stays."""
        async with self._reading:
            for path, keys in (
                (self._options.api_keys, self._app.keys),
                (self._options.control_keys, self._app.control),
            ):
                if keys is not None:
                    await self._attempt(keys.read_again, f"the keys of {path} are those that hold")
            if self.config.ssl is not None:
                await self._attempt(self._read_certificate)
                await self._replace_certificate()
        await self._app.models.reload()
        if self._shadows is not None:
            await self._shadows.reload(self._app.models)

    async def _attempt(self, work: Callable[[], None], words: str = "") -> None:
        """Do what may fail in a thread, and log what came of it; "": that it went well is logged later."""
        try:
            await asyncio.to_thread(work)
        except McdeployError as error:
            logger.error("what was there before stays: %s", error)
        else:
            if words:
                logger.info("read again: %s", words)

    def _read_certificate(self) -> None:
        fresh = tls_context(self._options)
        if self.grpc is not None:
            self.grpc.read_certificate()
        self._fresh_tls = fresh

    async def _replace_certificate(self) -> None:
        """Listen with what was read. Not by changing the context in place: where that fails, half of a pair is left; an
        authority of clients could be added, but not taken away; and old sessions could be resumed."""
        fresh, self._fresh_tls = self._fresh_tls, None
        if fresh is None or self._app.draining:
            return
        old, self.config.ssl = self.config.ssl, fresh
        try:
            before, self.servers = self.servers, [await self._take_from(sock) for sock in self._sockets]
        except OSError as error:  # too many open files, say
            self.config.ssl = old
            logger.error("new connections get the old certificate: %s", error.strerror)
            return
        logger.info("read again: new connections get %s", self._options.tls_cert)
        for server in before:  # closes a handle; who waits in the socket's queue stays there
            server.close()

    async def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            sweep(self.server_state.connections, loop.time())


def _guests_of(listener: socket.socket) -> list[socket.socket]:
    """All that have connected to a socket and were not taken yet; closes it."""
    guests: list[socket.socket] = []
    with listener, suppress(OSError):
        listener.setblocking(False)
        while len(guests) < MOST_GUESTS:
            guests.append(listener.accept()[0])
    return guests


def _listen(listener: socket.socket, server: DrainingServer, options: ServerOptions, signals: Signals) -> None:
    host, port = listener.getsockname()[:2]
    with signals.serving(server.handle_exit):
        try:
            listener.listen(2048)
        except OSError:
            raise _in_use(host, port) from None
        server.run(sockets=[listener])
    if server.num_cut_off:
        raise McdeployError(
            f"{server.num_cut_off} requests were cut off: not done {options.drain_s:.0f} s after the stop signal"
        )


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


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _in_use(host: str, port: int) -> InputError:
    return InputError(f"{host}:{port} is in use already; choose another --port, or 0 for any free one")
