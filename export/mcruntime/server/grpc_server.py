"""The gRPC side: the Open Inference Protocol's service, health (grpc.health.v1) and reflection.

Here it begins to listen, and stops. A call goes through ``grpc_door`` (keys, draining, how many there may be) to
``grpc_service`` or ``grpc_health`` (what is answered), which get its messages and give their answers by ``grpc_calls``.

On grpc's own threads, which may block: a call to infer goes from there straight to the batcher and back. All other
calls, and streams, go to the HTTP server's event loop. Not on grpc.aio: there, one call whose path is not UTF-8 ends
the whole server (seen with grpcio 1.85).
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

from mcruntime.errors import InputError
from mcruntime.server.app import App
from mcruntime.server.grpc_calls import Bridge
from mcruntime.server.grpc_door import RESERVED, Door
from mcruntime.server.grpc_health import Health, Reflection
from mcruntime.server.grpc_service import Service
from mcruntime.server.grpc_threads import Threads
from mcruntime.server.options import ServerOptions
from mcruntime.server.tls import tls_context

GATHER_S = 0.15  # in which clients that ask without end are gathered, so that all hear of the end before their refusal
QUIET_S = 0.05  # without a call, after which nobody more is expected to ask
GRACE_S = 0.6  # for answers on their way, once nothing is in flight
IDLE_S = 600.0  # after which a connection without calls is closed; clients open another by themselves


class GrpcServer:
    """A gRPC server that listens.

    Attributes:
        port: that it listens on.
    """

    def __init__(
        self, server: Any, door: Door, bridge: Bridge, threads: Threads, port: int, certificate: Certificate | None
    ) -> None:
        self.port = port
        self._certificate = certificate
        self._server = server
        self._door = door
        self._bridge = bridge
        self._threads = threads
        self._sweeper = asyncio.create_task(bridge.give_up_on_the_late())

    def read_certificate(self) -> None:
        """Serve new connections the TLS files as they are now. Blocks.

        Raises:
            InputError: one is not what it should be; those from before are still served.
        """
        if self._certificate is not None:
            self._certificate.read()

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Take no more calls, and cut off those that are not done after ``grace_s`` seconds.

        grpc answers CANCELLED to what its core holds when it stops, and to what comes until the client has heard of it.
        So calls are held until nobody who waits for answers has anything left to ask, and refused behind the word
        (GOAWAY) that their connection ends. Who never waits for answers may still hit that moment.
        """
        self._bridge.stopping.set()
        latest = time.monotonic() + GATHER_S
        while (now := time.monotonic()) < (until := min(latest, self._door.last_call + QUIET_S)):
            await asyncio.sleep(until - now)
        ended = self._server.stop(grace_s)
        self._bridge.part()
        await asyncio.to_thread(ended.wait)
        self._threads.shutdown()
        self._sweeper.cancel()


async def start(app: App, options: ServerOptions) -> GrpcServer:
    """Listen on ``options.grpc_port``; calls are answered on the running event loop.

    Raises:
        InputError: the address cannot be listened on, or a TLS file is not what it should be.
    """
    bridge = Bridge(app, asyncio.get_running_loop())
    services = (Service(app, bridge), Health(app, bridge), Reflection(app, bridge))
    handlers = {path: handler for service in services for path, handler in service.handlers().items()}
    door = Door(app, bridge, handlers)
    most, threads = options.max_connections + RESERVED, Threads("grpc")
    server = grpc.server(
        threads,  # one for every call in flight
        handlers=(door,),
        options=_channel_options(options),
        maximum_concurrent_rpcs=most,
    )
    address = f"[{options.host}]" if ":" in options.host else options.host
    try:
        certificate = None if options.tls_cert is None else Certificate(options)
        port = _open_port(server, f"{address}:{options.grpc_port}", certificate)
    except RuntimeError:  # grpc tells the reason to nobody
        raise InputError(
            f"{address}:{options.grpc_port}: cannot serve gRPC there; is it in use? choose another --grpc-port, or 0"
        ) from None
    server.start()
    return GrpcServer(server, door, bridge, threads, port, certificate)


def _channel_options(options: ServerOptions) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", options.max_body_bytes),  # also once unpacked
        ("grpc.max_send_message_length", options.max_body_bytes),
        ("grpc.max_allowed_incoming_connections", options.max_connections),
        # Far above what the door allows: grpc resets calls of those, too, who keep to a limit that they are near to.
        ("grpc.max_concurrent_streams", 2 * (options.max_connections + RESERVED)),
        ("grpc.max_connection_idle_ms", round(IDLE_S * 1000)),
        ("grpc.server_handshake_timeout_ms", round(options.body_timeout_s * 1000)),
        ("grpc.so_reuseport", 0),  # a port in use is an error, not half of the requests
    ]


class Certificate:
    """The TLS files as grpc takes them, which asks for them at every connection.

    Raises:
        InputError: one is not what it should be.
    """

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self.asks_clients = options.tls_client_ca is not None
        self.read()

    def __call__(self) -> Any:
        return self._now

    def read(self) -> None:
        """Take the files as they are now.

        Raises:
            InputError: one is not what it should be; those from before are kept.
        """
        options = self._options
        tls_context(options)  # with its checks and texts
        paths = (options.tls_key, options.tls_cert, options.tls_client_ca)
        try:
            key, cert, ca = (None if path is None else path.read_bytes() for path in paths)
        except OSError as error:  # since it was checked
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None
        self._now = grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)


def _open_port(server: Any, address: str, certificate: Certificate | None) -> int:
    if certificate is None:
        return int(server.add_insecure_port(address))
    credentials = grpc.dynamic_ssl_server_credentials(certificate(), certificate, certificate.asks_clients)
    return int(server.add_secure_port(address, credentials))
