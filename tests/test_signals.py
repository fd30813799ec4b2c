"""SIGTERM ends a server at any time in good order; SIGHUP reads keys, certificates, bundles and shadows again.

Real processes: what a signal does depends on the thread, the moment and the library that it meets.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import mcruntime
import numpy as np
import psutil
import pytest
from certificates import make_certificate
from live_server import until
from mcruntime.bundle import seal
from mcruntime.server.signals import Signals
from tiny_onnx import BIAS, expected_logits, some_images, tiny_manifest, write_bundle, write_model
from tiny_server import infer_request

EXPORT = Path(mcruntime.__file__).parents[1]
OLD, NEW = "o" * 32, "n" * 32


class Process:
    """A server in a process of its own; ``log`` is its stderr."""

    def __init__(self, folder, *arguments, program=("-m", "mcruntime.server")):
        self.log = folder / "server.log"
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", *program, *map(str, arguments), "--port", "0"],
                env={**os.environ, "PYTHONPATH": str(EXPORT), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=stream, text=True,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.communicate()

    @property
    def port(self):
        """Once it listens."""
        for line in self.process.stdout:
            if line.startswith("listening on "):
                self._port = int(line.rsplit(":", 1)[1])
                break
        return self._port

    def text(self):
        return self.log.read_text()

    def send(self, number):
        self.process.send_signal(number)

    def hang_up(self, *words):
        """SIGHUP, and wait until the log has said all of these once more."""
        before = [self.text().count(word) for word in words]
        self.send(signal.SIGHUP)
        until(lambda: [self.text().count(word) for word in words] == [count + 1 for count in before], 30)


def errors_of(server):
    """The error lines of a log, which must hold no trace of a bug."""
    text = server.text()
    assert not re.search("Traceback|Warning:|never retrieved", text), text
    return [line for line in text.splitlines() if " ERROR " in line]


# ----------------------------------------------------------------------------------------------------------- the end


def test_who_connects_at_the_very_end_is_answered_or_refused_but_never_taken_and_dropped(tmp_path):
    """While the last words are said, nothing may still let clients in: nobody would come to answer them."""
    with Process(tmp_path, write_bundle(tmp_path / "b")) as server:
        address = "127.0.0.1", server.port
        with socket.create_connection(address, 5) as idle:  # for which the server waits a moment
            assert is_ready(idle)
            server.send(signal.SIGTERM)
            with contextlib.suppress(ConnectionRefusedError):
                while True:
                    with socket.create_connection(address, 5) as late:
                        late.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                        assert late.recv(65536).startswith(b"HTTP/1.1 ")
            assert server.process.poll() is None, "it was gone already, so nothing was tested"
        assert server.process.wait(30) == 0


# ----------------------------------------------------------------------------------------------------------------- keys


def test_a_key_is_changed_without_a_restart_and_a_bad_file_changes_nothing(tmp_path):
    keys, control = tmp_path / "keys", tmp_path / "control"
    keys.write_text(OLD)
    control.write_text("c" * 32)
    with Process(tmp_path, write_bundle(tmp_path / "b"), "--api-keys", keys, "--control-keys", control) as server:
        url = f"http://127.0.0.1:{server.port}"
        with httpx.Client(base_url=url) as client:

            def status(key, control_key=""):
                headers = {"X-Api-Key": key, "X-Control-Key": control_key}
                return client.post("/v2/repository/models/tiny/load", headers=headers).status_code

            assert [status(OLD, "c" * 32), status(OLD, "d" * 32), status(NEW, "c" * 32)] == [200, 403, 401]
            keys.write_text(f"# changed\n{NEW}\n")
            control.write_text("d" * 32)
            assert status(NEW) == 401, "nobody has asked to read it yet"
            server.hang_up(f"the keys of {keys}", f"the keys of {control}", "reloaded what has changed")
            assert [status(NEW, "d" * 32), status(NEW, "c" * 32), status(OLD, "d" * 32)] == [200, 403, 401]
            assert errors_of(server) == []
            for bad in ("short\n", "", "\xe4" * 32):
                keys.write_text(bad, encoding="utf-8")
                server.hang_up("what was there before stays", "reloaded what has changed")
            keys.unlink()
            server.hang_up("what was there before stays", "reloaded what has changed")
            assert [status(NEW, "d" * 32), status("short")] == [200, 401]
        assert len(errors_of(server)) == 4, "one sentence each"
        server.send(signal.SIGTERM)
        assert server.process.wait(30) == 0


# ---------------------------------------------------------------------------------------------------------------- TLS


class Secret:
    """A folder as Kubernetes mounts a secret: every name is a link through ``..data``, which one rename changes."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        folder.mkdir()

    def put(self, **files):
        self.count += 1
        fresh = self.folder / f"..{self.count}"
        fresh.mkdir()
        for name, path in files.items():
            (fresh / name).write_bytes(Path(path).read_bytes())
        (self.folder / "..new").symlink_to(fresh.name)
        (self.folder / "..new").rename(self.folder / "..data")
        for name in files:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")


@contextlib.contextmanager
def over_tls(port, trusted, client=None):
    context = ssl.create_default_context(cafile=str(trusted))
    if client is not None:
        context.load_cert_chain(*client)
    plain = socket.create_connection(("127.0.0.1", port), 5)
    with plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as found:
        yield found


def is_ready(connection):
    connection.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    return connection.recv(65536).startswith(b"HTTP/1.1 200 ")


def is_let_in(*arguments):
    try:
        with over_tls(*arguments) as connection:
            return is_ready(connection)
    except (ssl.SSLError, ConnectionError):
        return False


def test_a_certificate_that_kubernetes_renews_is_served_to_new_connections_and_no_connection_is_lost(tmp_path):
    first, second = make_certificate(tmp_path, "first"), make_certificate(tmp_path, "second")
    secret = Secret(tmp_path / "secret")
    secret.put(cert=first[0], key=first[1])
    arguments = "--tls-cert", secret.folder / "cert", "--tls-key", secret.folder / "key"
    with Process(tmp_path, write_bundle(tmp_path / "b"), *arguments) as server:
        port, words = server.port, f"new connections get {secret.folder / 'cert'}"
        with over_tls(port, first[0]) as before:
            assert is_ready(before)
            secret.put(cert=second[0], key=second[1])
            server.hang_up(words)
            until(lambda: is_let_in(port, second[0]))
            assert not is_let_in(port, first[0]), "the old certificate is still served"
            assert is_ready(before), "a connection from before was lost"
        failed, is_over = [], threading.Event()

        def hammer():
            while not is_over.is_set():
                if not is_let_in(port, second[0]):
                    failed.append(time.monotonic())

        clients = [threading.Thread(target=hammer) for _ in range(2)]
        for client in clients:
            client.start()
        for _ in range(8):
            server.hang_up(words)
        is_over.set()
        for client in clients:
            client.join()
        assert failed == []
        assert errors_of(server) == []

        secret.put(cert=first[0], key=second[1])
        server.hang_up("what was there before stays")
        (secret.folder / "key").unlink()
        server.hang_up("what was there before stays")
        assert is_let_in(port, second[0])
        assert ["is not the key of" in line or "no such file" in line for line in errors_of(server)] == [True, True]
        server.send(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_grpc_serves_a_renewed_certificate_too(tmp_path):
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    first, second = make_certificate(tmp_path, "first"), make_certificate(tmp_path, "second")
    secret = Secret(tmp_path / "secret")
    secret.put(cert=first[0], key=first[1])
    arguments = "--tls-cert", secret.folder / "cert", "--tls-key", secret.folder / "key", "--grpc-port", "0"

    def answers(port, trusted):
        credentials = grpc.ssl_channel_credentials(trusted.read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{port}", credentials, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
            return True

    with Process(tmp_path, write_bundle(tmp_path / "b"), *arguments) as server:
        assert server.port
        port = int(server.process.stdout.readline().rsplit(":", 1)[1])
        assert [answers(port, one) for one in (first[0], second[0])] == [True, False]
        secret.put(cert=second[0], key=second[1])
        server.hang_up("new connections get ")
        assert [answers(port, one) for one in (first[0], second[0])] == [False, True]
        secret.put(cert=first[0], key=second[1])
        server.hang_up("what was there before stays")
        assert [answers(port, one) for one in (first[0], second[0])] == [False, True]
        server.send(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_an_authority_of_clients_that_was_taken_away_opens_no_more(tmp_path):
    server_pair, old, new = (make_certificate(tmp_path, name) for name in ("server", "old", "new"))
    authority = tmp_path / "authority.pem"
    authority.write_bytes(old[0].read_bytes())
    arguments = "--tls-cert", server_pair[0], "--tls-key", server_pair[1], "--tls-client-ca", authority
    with Process(tmp_path, write_bundle(tmp_path / "b"), *arguments) as server:
        port = server.port
        assert [is_let_in(port, server_pair[0], pair) for pair in (old, new, None)] == [True, False, False]
        authority.write_bytes(new[0].read_bytes())
        server.hang_up("new connections get ")
        until(lambda: is_let_in(port, server_pair[0], new))
        assert [is_let_in(port, server_pair[0], pair) for pair in (old, new, None)] == [False, True, False]


# -------------------------------------------------------------------------------------------------------- while loading


@contextlib.contextmanager
def stuck_at_the_start(folder):
    """A server whose start waits for a file, and the end of the pipe that it reads its keys from."""
    pipe = folder / "keys"
    os.mkfifo(pipe)
    opened = []

    def is_read():
        with contextlib.suppress(OSError):  # nobody has the other end yet
            opened.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        return opened

    with Process(folder, write_bundle(folder / "b"), "--api-keys", pipe) as server:
        until(is_read, 30)
        try:
            yield server, opened[0]
        finally:
            os.close(opened[0])


def test_sigterm_while_loading_ends_the_process_with_0(tmp_path):
    with stuck_at_the_start(tmp_path) as (server, _):
        server.send(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert "stopped before anything was served" in server.text()
        assert errors_of(server) == []


def test_sighup_while_loading_kills_nobody_and_is_heard_when_the_server_listens(tmp_path):
    with stuck_at_the_start(tmp_path) as (server, pipe):
        server.send(signal.SIGHUP)
        time.sleep(0.2)
        assert server.process.poll() is None
        (tmp_path / "plain").write_text(NEW)
        (tmp_path / "plain").rename(tmp_path / "keys")  # who reads next finds a file
        os.write(pipe, OLD.encode())
        os.dup2(os.open(os.devnull, os.O_RDONLY), pipe)  # closes it
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}") as client:
            until(lambda: "reloaded what has changed" in server.text(), 30)
            assert [client.get("/v2", headers={"X-Api-Key": key}).status_code for key in (OLD, NEW)] == [401, 200]
        assert errors_of(server) == []
        server.send(signal.SIGTERM)
        assert server.process.wait(30) == 0


STUCK_IN_C = """
import hashlib, sys
from mcruntime.server import __main__, run, signals
signals.PATIENCE_S = 0.1
def open_models(targets, options):
    print("loading", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)  # minutes, in which no handler of Python's is run
run.open_models = open_models
sys.exit(__main__.main())
"""


def test_sigterm_ends_a_process_that_loads_inside_of_a_library_too(tmp_path):
    with Process(tmp_path, tmp_path, program=("-c", STUCK_IN_C)) as server:
        assert server.process.stdout.readline() == "loading\n"
        busy = psutil.Process(server.process.pid)
        before = busy.cpu_times().user
        until(lambda: busy.cpu_times().user > before + 0.1, 30)  # it is in there
        server.send(signal.SIGHUP)
        server.send(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert "stopped while a library was loading" in server.text()


def test_handlers_are_as_they_were_afterwards():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    stopped = []
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        until(lambda: signals.hung_up)
        with signals.serving(lambda number, frame: stopped.append(number)):
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: stopped == [signal.SIGTERM])
        assert [signal.getsignal(number) for number in numbers] == before
    with Signals():
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the block goes on")
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_in_another_thread_signals_are_left_alone():
    before, found = signal.getsignal(signal.SIGTERM), []

    def serve():
        with Signals() as signals, signals.serving(print):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=serve)
    thread.start()
    thread.join(5)
    assert found == [before]


# -------------------------------------------------------------------------------------------------------------- shadows


def write_anew(folder, shift):
    """Another bundle at the same place."""
    write_model(folder / "model.onnx", bias=BIAS + np.float32(shift))
    images = some_images(3)
    np.savez(folder / "selftest.npz", images=images, logits=expected_logits(images) + np.float32(shift))
    (folder / "manifest.json").unlink()
    seal(folder, tiny_manifest(seeds={"train": int(shift * 10)}))


def test_sighup_reads_the_shadow_again_and_a_damaged_one_leaves_the_old_in_place(tmp_path):
    bundle, shadow = write_bundle(tmp_path / "b"), write_bundle(tmp_path / "shadow", seeds={"train": 9})
    with Process(tmp_path, bundle, "--shadow", shadow) as server:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}") as client:

            def worst():
                """The largest difference that the shadow of now has found, of a request from now."""
                assert client.post("/v2/models/tiny/infer", json=infer_request()).status_code == 200
                until(lambda: sum(metric(client, "shadow_compared_images_total")) >= 1)
                return metric(client, "shadow_relative_difference_max")

            def metric(client, name):
                lines = client.get("/metrics").text.splitlines()
                return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"mcdeploy_{name}{{")]

            (same,) = worst()
            assert same < 1e-6
            write_anew(shadow, 2.0)
            server.hang_up("shadow of tiny")
            (other,) = worst()
            assert other > 0.1
            data = bytearray((shadow / "model.onnx").read_bytes())
            data[len(data) // 2] ^= 1
            (shadow / "model.onnx").write_bytes(data)
            manifest = json.loads((shadow / "manifest.json").read_text())
            (shadow / "manifest.json").write_text(json.dumps(manifest, indent=3))  # deployed, but damaged on the way
            assert errors_of(server) == []
            server.hang_up("the shadow stays as it was")
            assert worst() == [other]
        (error,) = errors_of(server)
        assert str(shadow) in error
        server.send(signal.SIGTERM)
        assert server.process.wait(30) == 0
