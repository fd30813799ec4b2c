"""The gRPC side: the Open Inference Protocol's service, health (grpc.health.v1) and reflection.

Here it begins to listen, and stops. A call goes through ``grpc_door`` (keys, draining, how many there may be) to
``grpc_service`` or ``grpc_health`` (what is answered), which get its messages and give their answers by ``grpc_calls``.

On grpc's own threads, which may block: a call to infer goes from there straight to the batcher and back. All other
calls, and streams, go to the HTTP server's event loop. Not on grpc.aio: there, one call whose path is not UTF-8 ends
the whole server (seen with grpcio 1.85).
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc

from mcruntime.errors import InputError
from mcruntime.server.app import App
from mcruntime.server.grpc_calls import Bridge
from mcruntime.server.grpc_door import Door
from mcruntime.server.grpc_health import Health, Reflection
from mcruntime.server.grpc_service import Service
from mcruntime.server.grpc_threads import Threads
from mcruntime.server.options import ServerOptions
from mcruntime.server.tls import tls_context

GRACE_S = 1.0  # for answers on their way, and streams that only wait, once nothing is in flight
IDLE_S = 600.0  # after which a connection without calls is closed; clients open another by themselves
RESERVED = 16  # calls beyond the limit, kept for those who ask whether the server lives


class GrpcServer:
    """A gRPC server that listens.

    Attributes:
        port: that it listens on.
    """

    def __init__(self, server: Any, bridge: Bridge, threads: Threads, port: int) -> None:
        self.port = port
        self._server = server
        self._bridge = bridge
        self._threads = threads
        self._sweeper = asyncio.create_task(bridge.give_up_on_the_late())

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """Take no more calls, and cut off those that are not done after ``grace_s`` seconds."""
        self._bridge.stopping.set()
        ended = self._server.stop(grace_s)
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
    most, threads = options.max_connections + RESERVED, Threads("grpc")
    server = grpc.server(
        threads,  # one for every call in flight
        handlers=(Door(app, bridge, handlers),),
        options=_channel_options(options),
        maximum_concurrent_rpcs=most,
    )
    address = f"[{options.host}]" if ":" in options.host else options.host
    try:
        port = _open_port(server, f"{address}:{options.grpc_port}", options)
    except RuntimeError:  # grpc tells the reason to nobody
        raise InputError(
            f"{address}:{options.grpc_port}: cannot serve gRPC there; is it in use? choose another --grpc-port, or 0"
        ) from None
    server.start()
    return GrpcServer(server, bridge, threads, port)


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


def _open_port(server: Any, address: str, options: ServerOptions) -> int:
    if tls_context(options) is None:  # with its checks and texts
        return int(server.add_insecure_port(address))

    def read(path: Path | None) -> bytes | None:
        return None if path is None else path.read_bytes()

    pair = (read(options.tls_key), read(options.tls_cert))
    ca = read(options.tls_client_ca)
    credentials = grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)
    return int(server.add_secure_port(address, credentials))
