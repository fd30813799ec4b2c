"""The servers that are timed: how each is started, what it is asked, and how its answer is read.

Each competitor lives in a virtual environment of its own, made by ``python3.11 -m venv VENVS/NAME`` and never
mcdeploy's; then, with its pip:

    litserve   pip install litserve==0.2.19 onnxruntime==1.31.1
    triton     pip install nvidia-pytriton==0.7.0 onnxruntime==1.31.1      (Triton 2.51.0, Python backend, on the CPU)
    mlserver   pip install mlserver==1.7.1 onnxruntime==1.31.1
    kserve     pip install kserve==0.21.0 onnxruntime==1.31.1
    bentoml    pip install bentoml==1.4.39 onnxruntime==1.31.1
    ray        pip install 'ray[serve]==2.60.0' onnxruntime==1.31.1

``bare`` is no competitor but the floor: a bare ASGI app that runs the model on its event loop, and nothing else.

All serve the same ONNX file with the same ONNX Runtime and settings (``competitors/shared_session.py``): one copy of
it, batches of 32 at most, no line in a log for each request. Those that must be told how long to wait for a batch wait
0.5 ms.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import psutil
from numpy.typing import NDArray
from speed_load import MARK, Images, marked
from tritonclient.grpc import service_pb2

HANDLERS = Path(__file__).parent / "competitors"
START_S = 120.0
STOP_S = 20.0
INFER_METHOD = "/inference.GRPCInferenceService/ModelInfer"
API_KEY = "a-key-for-the-speed-run-0123456789"

Logits = NDArray[np.float32]


class ServerFailed(RuntimeError):
    """A server that did not start, or answered wrongly."""


@dataclass(frozen=True)
class Model:
    """What is to be served."""

    name: str
    bundle: Path
    file: Path  # the ONNX file in it
    input: str
    output: str
    num_classes: int


@dataclass(frozen=True)
class Place:
    """Where a server runs."""

    model: Model
    threads: int
    folder: Path  # its own, empty
    venv: Path
    http: int  # ports
    grpc: int
    metrics: int


@dataclass(frozen=True)
class Way:
    """One request, and how its answer is read."""

    name: str
    path: str
    body: bytes
    read: Callable[[bytes, Mapping[str, str]], Logits]
    headers: Mapping[str, str] = field(default_factory=dict)
    is_grpc: bool = False


@dataclass(frozen=True)
class Server:
    """A line of the table below."""

    name: str
    command: Callable[[Place], list[str]]
    ways: tuple[str, ...]
    venv: str = ""  # empty: mcdeploy's own
    environment: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


def _ours(place: Place) -> list[str]:
    keys = place.folder / "keys"
    keys.write_text(f"{API_KEY}\n")
    return [
        sys.executable, "-m", "mcruntime.server", str(place.model.bundle), "--port", str(place.http),
        "--grpc-port", str(place.grpc), "--api-keys", str(keys), "--threads", str(place.threads), "--max-batch", "32",
    ]  # fmt: skip


def _script(name: str, *words: str, is_competitor: bool = True) -> Callable[[Place], list[str]]:
    """A handler that is started as a script; "HTTP" and "GRPC" stand for the ports."""

    def command(place: Place) -> list[str]:
        ports = {"HTTP": str(place.http), "GRPC": str(place.grpc)}
        python = str(place.venv / "bin/python") if is_competitor else sys.executable
        return [python, str(HANDLERS / name), *(ports.get(word, word) for word in words)]

    return command


def _mlserver(place: Place) -> list[str]:
    settings = {
        "host": "127.0.0.1", "http_port": place.http, "grpc_port": place.grpc, "metrics_port": place.metrics,
        "parallel_workers": 0, "debug": False,
    }  # fmt: skip
    (place.folder / "settings.json").write_text(json.dumps(settings))
    model = {"name": place.model.name, "implementation": "mlserver_model.OnnxModel"}
    (place.folder / "model-settings.json").write_text(json.dumps(model))
    return [str(place.venv / "bin/mlserver"), "start", str(place.folder)]


def _bentoml(place: Place) -> list[str]:
    words = ["serve", "bentoml_service:Classifier", "--working-dir", str(HANDLERS)]
    return [str(place.venv / "bin/bentoml"), *words, "--host", "127.0.0.1", "--port", str(place.http)]


def _triton(place: Place) -> list[str]:
    site = next(place.venv.glob("lib/python3.*/site-packages"))
    home = site / "pytriton/tritonserver"
    backends, repository = place.folder / "backends", place.folder / "repository"
    shutil.copytree(home / "backends/python", backends / "python")
    stub = home / f"python_backend_stubs/{site.parent.name.removeprefix('python')}/triton_python_backend_stub"
    shutil.copy(stub, backends / "python")
    model = repository / place.model.name
    (model / "1").mkdir(parents=True)
    shutil.copy(HANDLERS / "triton_model.py", model / "1/model.py")
    shutil.copy(HANDLERS / "shared_session.py", model / "1")  # its Python looks nowhere else
    (model / "config.pbtxt").write_text(
        f'name: "{place.model.name}"\nbackend: "python"\nmax_batch_size: 32\n'
        f'input [{{name: "{place.model.input}" data_type: TYPE_FP32 dims: [3, 64, 64]}}]\n'
        f'output [{{name: "{place.model.output}" data_type: TYPE_FP32 dims: [{place.model.num_classes}]}}]\n'
        "dynamic_batching {}\ninstance_group [{kind: KIND_CPU count: 1}]\n"
    )
    return [
        "env", f"LD_LIBRARY_PATH={site / 'nvidia_pytriton.libs'}",
        str(home / "bin/tritonserver"), f"--model-repository={repository}", f"--backend-directory={backends}",
        f"--cache-directory={home / 'caches'}", "--http-address=127.0.0.1", f"--http-port={place.http}",
        "--grpc-address=127.0.0.1", f"--grpc-port={place.grpc}", "--metrics-address=127.0.0.1",
        f"--metrics-port={place.metrics}",
    ]  # fmt: skip


OURS = "ours"
BARE = "bare"
_TABLE = (
    Server(OURS, _ours, ("binary", "json", "grpc"), headers={"x-api-key": API_KEY}),
    Server(BARE, _script("bare_server.py", "HTTP", is_competitor=False), ("raw",)),
    Server("triton", _triton, ("binary", "json", "grpc"), "triton"),
    Server("litserve", _script("litserve_server.py", "HTTP", "batch"), ("image-base64",), "litserve"),
    Server("litserve-single", _script("litserve_server.py", "HTTP", "single"), ("image-base64",), "litserve"),
    Server("mlserver", _mlserver, ("json", "grpc"), "mlserver"),
    Server("kserve", _script("kserve_server.py", "HTTP", "GRPC"), ("json", "binary", "grpc"), "kserve"),
    Server("bentoml", _bentoml, ("images-base64",), "bentoml", {"BENTOML_DO_NOT_TRACK": "True"}),
    Server("ray", _script("ray_server.py", "HTTP"), ("raw",), "ray", {"RAY_USAGE_STATS_ENABLED": "0"}),
)
SERVERS = {server.name: server for server in _TABLE}


def make_ways(model: Model, image: Images, jpeg: bytes) -> dict[str, Way]:
    """Every way to ask, by name: for the logits of one tensor [1, 3, 64, 64], or the log of the classes' shares."""
    infer = f"/v2/models/{model.name}/infer"
    tensor = {"name": model.input, "shape": list(image.shape), "datatype": "FP32"}
    text = {"inputs": [{**tensor, "data": [float(str(value)) for value in image.ravel()]}]}
    size = {"parameters": {"binary_data_size": image.nbytes}}
    head = json.dumps({"inputs": [{**tensor, **size}], "parameters": {"binary_data_output": True}}).encode()
    message = service_pb2.ModelInferRequest(model_name=model.name, raw_input_contents=[image.tobytes()])
    message.inputs.add(name=model.input, datatype="FP32", shape=image.shape)
    coded = base64.b64encode(image.tobytes()).decode()
    is_json = {"Content-Type": "application/json"}
    is_binary = {"Content-Type": "application/octet-stream"}
    ways = (
        Way("json", infer, json.dumps(text, separators=(",", ":")).encode(), _read_v2, is_json),
        Way(
            "binary", infer, head + image.tobytes(), _read_v2,
            is_binary | {"Inference-Header-Content-Length": str(len(head))},
        ),
        Way("grpc", INFER_METHOD, message.SerializeToString(), _read_grpc, is_grpc=True),
        Way("image-base64", "/predict", json.dumps({"image": coded}).encode(), _read_plain, is_json),
        Way("images-base64", "/predict", json.dumps({"images": [coded]}).encode(), _read_plain, is_json),
        Way("raw", "/predict", image.tobytes(), lambda body, _: np.frombuffer(body, np.float32), is_binary),
        Way("jpeg", f"/predict?top={model.num_classes}", jpeg, _read_shares, {"Content-Type": "image/jpeg"}),
    )  # fmt: skip
    return {way.name: way for way in ways}


def _read_v2(body: bytes, headers: Mapping[str, str]) -> Logits:
    length = headers.get("inference-header-content-length")
    if length is None:
        return np.array(json.loads(body)["outputs"][0]["data"], np.float32).ravel()
    return np.frombuffer(body[int(length) :], np.float32)


def _read_plain(body: bytes, headers: Mapping[str, str]) -> Logits:
    answer = json.loads(body)
    return np.array(answer["logits"] if isinstance(answer, dict) else answer, np.float32).ravel()


def _read_shares(body: bytes, headers: Mapping[str, str]) -> Logits:
    rows = sorted(json.loads(body)["top"], key=lambda row: row["index"])
    return np.log([row["probability"] for row in rows]).astype(np.float32)


def _read_grpc(body: bytes, headers: Mapping[str, str]) -> Logits:
    answer = service_pb2.ModelInferResponse.FromString(body)
    if answer.raw_output_contents:
        return np.frombuffer(answer.raw_output_contents[0], np.float32)
    return np.array(answer.outputs[0].contents.fp32_contents, np.float32)


class Running:
    """A server that has answered.

    Attributes:
        cold_start_s: from the start of its process to its first right answer.
    """

    def __init__(self, server: Server, place: Place, mark: str, log: Path) -> None:
        self.server = server
        self.cold_start_s = 0.0
        self._place = place
        self._mark = mark
        environment = os.environ | {
            MARK: mark, "SPEED_MODEL_FILE": str(place.model.file), "SPEED_MODEL_NAME": place.model.name,
            "SPEED_THREADS": str(place.threads), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(place.folder),
        }  # fmt: skip
        if server.venv:  # a script's own folder is on its path anyway
            environment |= {"PYTHONPATH": str(HANDLERS), "PATH": f"{place.venv}/bin:{environment['PATH']}"}
        command = server.command(place)
        self._began = time.perf_counter()
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                command, env=environment | dict(server.environment), cwd=place.folder, stdout=stream, stderr=stream,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def url(self, way: Way) -> str:
        return f"http://127.0.0.1:{self._place.grpc if way.is_grpc else self._place.http}{way.path}"

    def headers(self, way: Way) -> dict[str, str]:
        return {**way.headers, **self.server.headers}

    def ask(self, way: Way) -> tuple[Logits, int]:
        """One answer, and how many bytes it has.

        Raises:
            OSError, grpc.RpcError, ServerFailed: there is none.
        """
        if way.is_grpc:
            with grpc.insecure_channel(f"127.0.0.1:{self._place.grpc}") as channel:
                call = channel.unary_unary(way.path)
                body = call(way.body, timeout=10, metadata=[(k.lower(), v) for k, v in self.server.headers.items()])
            return way.read(body, {}), len(body)
        connection = http.client.HTTPConnection("127.0.0.1", self._place.http, timeout=10)
        try:
            connection.request("POST", way.path, way.body, self.headers(way))
            answer = connection.getresponse()
            body = answer.read()
        finally:
            connection.close()
        if answer.status != 200:
            raise ServerFailed(f"{self.server.name} answers {answer.status}: {body[:200]!r}")
        return way.read(body, {name.lower(): value for name, value in answer.getheaders()}), len(body)

    def wait(self, way: Way) -> None:
        """Until the first answer.

        Raises:
            ServerFailed: the process ended, or the time is up.
        """
        said: Exception | None = None
        while time.perf_counter() - self._began < START_S:
            try:
                self.ask(way)
            except (OSError, http.client.HTTPException, grpc.RpcError, ServerFailed) as error:
                said = error
            else:
                self.cold_start_s = time.perf_counter() - self._began
                return
            if self._process.poll() is not None:
                raise ServerFailed(f"{self.server.name} ended with {self._process.returncode}; see its log")
            time.sleep(0.01)
        raise ServerFailed(f"{self.server.name} did not answer within {START_S:.0f} s: {said}")

    def check(self, way: Way, expected: Logits) -> int:
        """That it answers what ONNX Runtime answers; how many bytes its answer has.

        Raises:
            ServerFailed: it does not.
        """
        logits, size = self.ask(way)
        worst = float(np.abs(logits - expected).max() / np.abs(expected).max()) if logits.size == expected.size else 1
        if worst > 1e-4:
            raise ServerFailed(f"{self.server.name}, {way.name}: the logits are off by {worst:.1e} of the largest")
        return size

    def memory_mb(self) -> float:
        """Resident, of all its processes, in 10^6 bytes; what they share is counted once for each."""
        total = 0
        for process in marked(self._mark):
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 1e6

    def stop(self) -> None:
        """Politely first; then whatever is left of it."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        left = marked(self._mark)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, STOP_S)
        self._process.wait(STOP_S)


@contextmanager
def running(server: Server, model: Model, threads: int, work: Path, venvs: Path, mark: str) -> Iterator[Running]:
    """Start a server in a folder of its own; stop it in any case."""
    folder = work / "running" / server.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    http_port, grpc_port, metrics_port = _free_ports(3)
    place = Place(model, threads, folder, (venvs / server.venv).absolute(), http_port, grpc_port, metrics_port)
    logs = work / "logs"
    logs.mkdir(exist_ok=True)
    started = Running(server, place, mark, logs / f"{server.name}.log")
    try:
        yield started
    finally:
        started.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
