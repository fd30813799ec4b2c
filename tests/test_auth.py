"""A server on this machine only is not reached by a page of a browser that gave its own name to 127.0.0.1."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import mcruntime
import pytest
from live_server import live, rest, statuses
from mcruntime.errors import InputError
from mcruntime.server import pages
from mcruntime.server.auth import MOST_SEEN, Hosts, hosts_of, is_loopback
from mcruntime.server.options import ServerOptions, from_flags
from tiny_onnx import write_bundle
from tiny_server import infer_request

EXPORT = Path(mcruntime.__file__).parents[1]
RIGHT = [
    b"localhost", b"localhost:8000", b"LocalHost:1", b"localhost.", b"127.0.0.1", b"127.0.0.1:8000", b"127.1.2.3:80",
    b"[::1]", b"[::1]:8000", b"10.0.0.7:8000", b"[2001:db8::1]:443", b"models.example", b"Models.Example:8000",
    b"models.example.:8000", b" localhost ", b"localhost:", b"", None,
]  # fmt: skip
WRONG = [
    b"evil.example", b"evil.example:8000", b"localhost.evil.example", b"127.0.0.1.evil.example", b"models.example.org",
    b"notlocalhost", b"localhost:8000.evil.example", b"localhost@evil.example", b"evil.example#localhost", b"x",
    b"[::1].evil.example", b"[::1]evil", b"[evil.example]:80", b"127.0.0.1:80:evil", b"localhost/", b"\xff", b":8000",
    b"localhost evil.example", b"localhost,evil.example", b"0x7f.0.0.1.nip.example", b"[", b"]", b"[]", b".", b"..",
]  # fmt: skip


@pytest.mark.parametrize("host", RIGHT)
def test_this_machine_its_addresses_and_given_names_are_right(host):
    hosts = Hosts(["models.example"])
    assert hosts.allow(host)
    assert hosts.allow(host), "the second time, it is remembered"


@pytest.mark.parametrize("host", WRONG)
def test_every_other_name_is_wrong(host):
    hosts = Hosts(["models.example"])
    for _ in range(2):
        assert not hosts.allow(host)


def test_what_is_remembered_is_bounded_and_holds_nothing_wrong():
    hosts = Hosts()
    for port in range(10 * MOST_SEEN):
        assert hosts.allow(f"127.0.0.1:{port}".encode())
        assert not hosts.allow(f"evil.example:{port}".encode())
    assert len(hosts._seen) == MOST_SEEN
    assert not [host for host in hosts._seen if b"evil" in host]


def test_names_matter_on_this_machine_without_keys_and_wherever_names_are_given():
    assert hosts_of("127.0.0.1", [], has_keys=False) is not None
    assert hosts_of("::1", [], has_keys=False) is not None
    assert hosts_of("127.0.0.1", [], has_keys=True) is None
    assert hosts_of("0.0.0.0", [], has_keys=False) is None
    public = hosts_of("0.0.0.0", ["models.example"], has_keys=True)
    assert public is not None
    assert public.allow(b"models.example")
    assert not public.allow(b"evil.example")


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True), ("0.0.0.0", False),
     ("::", False), ("192.168.1.1", False), ("fe80::1%eth0", False), ("::ffff:10.0.0.1", False)],
)  # fmt: skip
def test_what_only_this_machine_reaches(address, expected):
    assert is_loopback(address) is expected


@pytest.mark.parametrize("name", ["a.example:8000", "http://a.example", "a b", "", "*", "a..b", "[::1]"])
def test_a_name_that_is_none_is_refused_with_the_flag(name):
    with pytest.raises(InputError, match="--allowed-host: expected a name without a port"):
        ServerOptions(allowed_hosts=(name,))
    assert from_flags({"allowed_hosts": ["a.example", "b"]}).allowed_hosts == ("a.example", "b")


def ask(host: bytes, path: bytes = b"/", method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return b"%b %b HTTP/%b\r\n%bConnection: close\r\n\r\n" % (
        method,
        path,
        version,
        host and b"Host: " + host + b"\r\n",
    )


def test_a_page_from_elsewhere_gets_nothing_but_421_at_any_path():
    with live(routes=pages.routes) as server:
        server.app.hosts = Hosts()
        paths = (
            b"/",
            b"/docs",
            b"/openapi.json",
            b"/v2",
            b"/v2/health/live",
            b"/v2/models/tiny/infer",
            b"/predict",
            b"/x",
        )
        for path in paths:
            for method in (b"GET", b"POST", b"OPTIONS"):
                found = server.say(ask(b"evil.example:%d" % server.port, path, method))
                assert statuses(found) == [421], path
                head, _, body = found.partition(b"\r\n\r\n")
                assert "--allowed-host" in json.loads(body)["error"]
                assert b"access-control" not in head.lower()
        for host in (b"localhost:%d" % server.port, b"127.0.0.1:%d" % server.port, b"[::1]", b""):
            assert statuses(server.say(ask(host, b"/v2/health/live"))) == [200]
        assert statuses(server.say(ask(b"", b"/v2/health/live", version=b"1.0"))) == [200]
        # What was right once must not open the door for what comes after, on one connection or to one path.
        with server.connect() as client:
            client.sendall(ask(b"localhost").replace(b"Connection: close\r\n", b"") + ask(b"evil.example"))
            assert statuses(rest(client)) == [200, 421]
        assert [statuses(server.say(infer(host))) for host in (b"localhost", b"localhost", b"evil.example")] == [
            [200], [200], [421]
        ]  # fmt: skip


def infer(host: bytes) -> bytes:
    body = json.dumps(infer_request()).encode()
    head = ask(host, b"/v2/models/tiny/infer", b"POST").removesuffix(b"\r\n")
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


@contextlib.contextmanager
def started(*arguments):
    """The port of a server as a user starts it."""
    command = [sys.executable, "-m", "mcruntime.server", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(EXPORT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield next(int(line.rsplit(":", 1)[1]) for line in process.stdout if line.startswith("listening on "))
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


def test_a_server_that_is_started_as_usual_knows_its_names(tmp_path):
    import httpx

    with started(write_bundle(tmp_path / "b"), "--allowed-host", "models.example") as port:

        def status(host):
            return httpx.get(f"http://127.0.0.1:{port}/v2", headers={"Host": host}).status_code

        hosts = ("localhost", f"127.0.0.1:{port}", "models.example", "evil.example")
        assert [status(host) for host in hosts] == [200, 200, 200, 421]
