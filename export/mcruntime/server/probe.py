"""``python -m mcruntime.server.probe PORT``: whether the server on this machine is ready; what a HEALTHCHECK runs.

The check cannot know how the server was started, so it asks in plain HTTP and, if no HTTP comes back, over TLS. Health
needs no API key. The certificate is not looked at: it is made for another name, and on 127.0.0.1 nobody is in between.
A server that demands a certificate of its clients is taken for ready when it does so, since nothing listens before all
bundles have proved themselves; that such a server is being stopped is not seen.
"""

from __future__ import annotations

import http.client
import ssl
import sys

PATH = "/v2/health/ready"
TIMEOUT_S = 1.0  # of each of the two questions; together they stay below a HEALTHCHECK's 3 s


def is_ready(port: int) -> bool:
    """Whether the server on a port of 127.0.0.1 takes requests.

    Raises:
        OSError: nothing listens there, or it does not answer in time.
        http.client.HTTPException: it does not speak HTTP.
    """
    try:
        return _status(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)) == 200
    except (http.client.BadStatusLine, ConnectionResetError, BrokenPipeError):  # it hung up: it may want TLS
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    over_tls = http.client.HTTPSConnection("127.0.0.1", port, timeout=TIMEOUT_S, context=context)
    over_tls.connect()
    try:
        return _status(over_tls) == 200
    except (ssl.SSLError, http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
        return True  # the handshake was right, and only then did it hang up: for want of a certificate


def main(arguments: list[str]) -> int:
    """Print what was found; exit code 0: ready, 1: not."""
    if len(arguments) != 1 or not arguments[0].isdecimal():
        print("usage: python -m mcruntime.server.probe PORT", file=sys.stderr)
        return 1
    try:
        ready = is_ready(int(arguments[0]))
    except (OSError, http.client.HTTPException, OverflowError) as error:
        print(f"no answer: {error}")
        return 1
    print("ready" if ready else "not ready")
    return 0 if ready else 1


def _status(connection: http.client.HTTPConnection) -> int:
    try:
        connection.request("GET", PATH)
        return connection.getresponse().status
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
