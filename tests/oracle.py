"""Ask a real Triton what it answers to every case of ``oracle_cases``, and store that as the golden answers.

Triton runs on the CPU from the wheel ``nvidia-pytriton``; it is an oracle, never a dependency, and listens on 127.0.0.1
only. It has no ONNX Runtime backend, so its Python backend runs ``onnxruntime`` on the very model of our bundle:

    python3.11 -m venv TRITON && TRITON/bin/pip install nvidia-pytriton==0.7.0 onnxruntime
    PYTHONPATH=tests python -m oracle record TRITON      writes tests/golden/triton_rest.json and triton_grpc.json
    PYTHONPATH=tests python -m oracle check TRITON       the same, but compares with what is stored
    PYTHONPATH=tests python -m oracle clients TRITON     runs the checks of test_clients.py against it
    PYTHONPATH=tests python -m oracle compare            replays against our own server and prints what no rule covers

``perf_analyzer`` 2.47 came inside an old wheel of tritonclient; later ones need a newer glibc, and it needs CUDA's
runtime library even without a GPU:

    apt-get install libb64-0d
    pip download --no-deps tritonclient==2.47.0 nvidia-cuda-runtime-cu12
    unzip both, chmod +x tritonclient-2.47.0.data/data/bin/perf_analyzer
    LD_LIBRARY_PATH=nvidia/cuda_runtime/lib PYTHONPATH=tests python -m oracle perf PERF_ANALYZER
                                                         runs it against our server, over HTTP and gRPC, and writes
                                                         recipes/results/serving_perf_analyzer.json

``test_oracle.py`` replays the cases against our server and needs no Triton.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import gzip
import http.client
import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import mcruntime
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from oracle_cases import GRPC_CASES, REST_CASES, Call, Step, expected
from tiny_onnx import LABELS, write_bundle, write_model
from tritonclient.grpc import service_pb2, service_pb2_grpc

GOLDEN = Path(__file__).parent / "golden"
RESULT = Path(__file__).parents[1] / "recipes" / "results" / "serving_perf_analyzer.json"
HEADERS = ("Content-Type", "Content-Encoding", "Inference-Header-Content-Length", "Allow", "Accept-Encoding")
VOLATILE = ("ns", "last_inference")  # numbers of the clock: only their type is compared
NOTHING: Mapping[str, str] = MappingProxyType({})
PARSER_WORDS = re.compile(r"(failed to parse the request JSON buffer: ).* at \d+$")
CONTROL_KEY = "control-key-of-a-test"
WAIT_S = 5.0  # for a state that a request asked for, such as "unloaded"

MODEL_PY = '''\
"""The ONNX model beside this file, through onnxruntime."""

import json
import math
import os
import re

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        folder = os.path.join(args["model_repository"], args["model_version"])
        self.session = onnxruntime.InferenceSession(os.path.join(folder, "model.onnx"))

    def execute(self, requests):
        images = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        (logits,) = self.session.run(None, {"image": np.concatenate(images)})
        parts = np.split(logits, np.cumsum([len(part) for part in images])[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("logits", part)]) for part in parts]
'''
CONFIG = """\
name: "tiny"
backend: "python"
max_batch_size: 4
input [ { name: "image" data_type: TYPE_FP32 dims: [3, 8, 8] } ]
output [ { name: "logits" data_type: TYPE_FP32 dims: [4] label_filename: "labels.txt" } ]
dynamic_batching { }
instance_group [ { kind: KIND_CPU count: 1 } ]
"""


# REST


def replay_rest(ports: Sequence[int], headers: Mapping[str, str] = NOTHING) -> dict[str, list[Any]]:
    """The answers of the server that listens there (HTTP, gRPC) to every REST case, by name: one for each step."""
    return {name: [send(ports[0], step, headers) for step in steps] for name, steps in REST_CASES.items()}


def send(port: int, step: Step, headers: Mapping[str, str] = NOTHING) -> dict[str, Any]:
    """One request over a connection of its own, and its answer in a form that can be stored and compared."""
    deadline = time.monotonic() + WAIT_S
    while True:
        answer = _send_once(port, step, headers)
        if step.until in json.dumps(answer) or time.monotonic() > deadline:
            return answer
        time.sleep(0.05)


def _send_once(port: int, step: Step, headers: Mapping[str, str]) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.putrequest(step.method, step.path, skip_accept_encoding=True)
        for key, value in {**headers, **step.headers}.items():
            connection.putheader(key, value)
        if step.method == "POST" and "Transfer-Encoding" not in step.headers:
            connection.putheader("Content-Length", str(len(step.body)))
        connection.endheaders(step.body or None)
        response = connection.getresponse()
        return _readable(response.status, response.headers, response.read(), step)
    finally:
        connection.close()


def _readable(status: int, headers: Any, body: bytes, step: Step) -> dict[str, Any]:
    kept = {key: headers[key] for key in HEADERS if key in headers}
    answer: dict[str, Any] = {"status": status, "headers": kept}
    if encoding := kept.get("Content-Encoding"):
        body = gzip.decompress(body) if encoding == "gzip" else zlib.decompress(body)
    if "Inference-Header-Content-Length" in kept:
        length = int(kept["Inference-Header-Content-Length"])
        body, answer["binary"] = body[:length], base64.b64encode(body[length:]).decode()
    try:
        tree = json.loads(body)
    except ValueError:
        answer["text"] = "HTML" if kept.get("Content-Type", "").startswith("text/html") else body.decode("latin-1")
    else:
        answer["json"] = _masked(_picked(tree, step) if status == 200 else tree)
    return answer


def _picked(tree: Any, step: Step | Call) -> Any:
    for key in step.drill:
        tree = tree[key]
    return {key: tree.get(key) for key in step.keep} if step.keep else tree


def _masked(tree: Any) -> Any:
    """Numbers that depend on the clock as the word "number", and without the words of the JSON parser."""
    if isinstance(tree, str):
        return PARSER_WORDS.sub(r"\1...", tree)
    if isinstance(tree, dict):
        return {
            key: "number" if key in VOLATILE and str(value).isdigit() else _masked(value) for key, value in tree.items()
        }
    if isinstance(tree, float) and not math.isfinite(tree):
        return str(tree)  # JSON has no word for it
    return [_masked(item) for item in tree] if isinstance(tree, list) else tree


# gRPC


def replay_grpc(ports: Sequence[int], headers: Mapping[str, str] = NOTHING) -> dict[str, list[Any]]:
    """The answers of the server that listens there (HTTP, gRPC) to every gRPC case, by name: one for each call."""
    with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        return {name: [call(channel, one, headers) for one in calls] for name, calls in GRPC_CASES.items()}


def call(channel: grpc.Channel, one: Call, headers: Mapping[str, str] = NOTHING) -> dict[str, Any]:
    """One call (a stream: all its requests at once), and its answer in a form that can be stored and compared."""
    deadline = time.monotonic() + WAIT_S
    while True:
        answer = _call_once(channel, one, headers)
        if one.until in json.dumps(answer) or time.monotonic() > deadline:
            return answer
        time.sleep(0.05)


def _call_once(channel: grpc.Channel, one: Call, headers: Mapping[str, str]) -> dict[str, Any]:
    method, request_class = _method(channel, one.method)
    requests = [json_format.ParseDict(tree, request_class()) for tree in one.requests]
    options: dict[str, Any] = {"timeout": 20, "metadata": tuple(headers.items())}
    try:
        if one.method == "ModelStreamInfer":
            return {"code": "OK", "stream": [_tree(answer, one) for answer in method(iter(requests), **options)]}
        return {"code": "OK", "json": _tree(method(requests[0], **options), one)}
    except grpc.RpcError as error:
        missing = error.code() is grpc.StatusCode.UNIMPLEMENTED  # told by the library, in its own words
        return {"code": error.code().name, "details": "" if missing else _masked(error.details())}


def _method(channel: grpc.Channel, name: str) -> tuple[Callable[..., Any], type[Any]]:
    if name == "Check":
        return health_pb2_grpc.HealthStub(channel).Check, health_pb2.HealthCheckRequest
    if name == "Unheard":  # a method that no version of the protocol has
        path = "/inference.GRPCInferenceService/Unheard"
        serialize = service_pb2.ServerLiveRequest.SerializeToString
        return channel.unary_unary(path, serialize), service_pb2.ServerLiveRequest
    request = "ModelInferRequest" if name == "ModelStreamInfer" else f"{name}Request"
    return getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), name), getattr(service_pb2, request)


def _tree(message: Any, one: Call) -> Any:
    tree = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return _masked(json.loads(json.dumps(_picked(tree, one), sort_keys=True)))  # maps have no order


# Triton


@contextlib.contextmanager
def triton(venv: Path, repository: Path | None = None) -> Iterator[tuple[int, int]]:
    """A real Triton until the block ends; yields its HTTP and its gRPC port.

    It serves the tiny model; or, from another ``repository``, nothing before it is asked to load it.
    """
    (packages,) = venv.glob("lib/python3.11/site-packages")
    bundled = packages / "pytriton" / "tritonserver"
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        backend = shutil.copytree(bundled / "backends" / "python", work / "backends" / "python")
        shutil.copy2(bundled / "python_backend_stubs" / "3.11" / "triton_python_backend_stub", backend)
        _write_repository(work / "models" / "tiny")
        load = ["--load-model", "*"] if repository is None else []
        http_port, grpc_port = free_ports(2)
        environment = os.environ | {
            "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
            "PYTHONPATH": str(packages),
            "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        command = [
            bundled / "bin" / "tritonserver", "--model-repository", repository or work / "models",
            "--backend-directory", work / "backends", "--cache-directory", bundled / "caches",
            "--http-address", "127.0.0.1", "--http-port", http_port, "--grpc-address", "127.0.0.1", "--grpc-port",
            grpc_port, "--allow-metrics", "false", "--model-control-mode", "explicit", *load,
        ]  # fmt: skip
        with (work / "log").open("w") as log:
            process = subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log)
        try:
            _wait_until_ready(process, http_port, work / "log")
            yield http_port, grpc_port
        finally:
            process.kill()  # there is nothing to save, and it may take minutes to leave by itself
            process.wait()


def _write_repository(folder: Path) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(CONFIG)
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    (folder / "1" / "model.py").write_text(MODEL_PY)
    write_model(folder / "1" / "model.onnx")


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            if send(port, Step("/v2/health/ready", "GET"))["status"] == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"Triton did not start:\n{log.read_text()[-3000:]}")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on right now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


# ours


@contextlib.contextmanager
def our_server(folder: Path, *options: str) -> Iterator[tuple[int, int, dict[str, str]]]:
    """Our server with the tiny model until the block ends; yields its two ports and the headers that allow control.

    Args:
        options: more of the command line.
    """
    keys = folder / "control.keys"
    keys.write_text(f"{CONTROL_KEY}\n")
    keys.chmod(0o600)
    (grpc_port,) = free_ports(1)
    command = [
        sys.executable, "-m", "mcruntime.server", write_bundle(folder / "tiny"), "--port", 0, "--grpc-port", grpc_port,
        "--max-batch-size", 4, "--control-keys", keys, *options,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(mcruntime.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)
    try:
        http_port = _port_in(folder / "log", process)
        yield http_port, grpc_port, {"authorization": f"Bearer {CONTROL_KEY}"}
    finally:
        process.terminate()
        process.wait(30)


def _port_in(log: Path, process: subprocess.Popen[bytes]) -> int:
    """Wait until the server has said where it listens."""
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", log.read_text()):
            return int(found[1])
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{log.read_text()}")


# by hand

REPLAYS = {"rest": replay_rest, "grpc": replay_grpc}  # each on a fresh server, since some cases count requests


def write_golden(path: Path, answers: dict[str, list[Any]], version: str) -> None:
    """One answer a line."""
    cases = [
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"   {json.dumps(answer)}" for answer in steps) + "\n  ]"
        for name, steps in answers.items()
    ]
    head = f'{{\n "server": "Triton {version}",\n "answers": {{\n'
    path.write_text(head + ",\n".join(cases) + "\n }\n}\n", encoding="utf-8")


def read_golden(kind: str) -> dict[str, list[Any]]:
    """What Triton answered to the cases of a kind, "rest" or "grpc"."""
    answers: dict[str, list[Any]] = json.loads((GOLDEN / f"triton_{kind}.json").read_text(encoding="utf-8"))["answers"]
    return answers


def main(arguments: list[str]) -> int:
    """See the docstring of the module."""
    match arguments:
        case ["record", venv]:
            for kind, replay in REPLAYS.items():
                with triton(Path(venv).resolve()) as ports:
                    version = send(ports[0], Step("/v2", "GET"))["json"]["version"]
                    write_golden(GOLDEN / f"triton_{kind}.json", replay(ports), version)
            return 0
        case ["check", venv]:
            count = 0
            for kind, replay in REPLAYS.items():
                with triton(Path(venv).resolve()) as ports:
                    count += _show(kind, replay(ports), read_golden(kind))
            return 1 if count else 0
        case ["compare"]:
            for kind, replay in REPLAYS.items():
                with tempfile.TemporaryDirectory() as scratch, our_server(Path(scratch)) as (*ports, control):
                    _show(kind, replay(ports, control), _after_rules(kind))
            return 0
        case ["perf", program]:
            return 0 if run_perf_analyzer(program) else 1
        case ["clients", venv]:
            with triton(Path(venv).resolve()) as (http_port, grpc_port):
                environment = os.environ | {"TRITON_PORTS": f"{http_port},{grpc_port}"}
                checks = str(Path(__file__).with_name("test_clients.py"))
                return subprocess.run([sys.executable, "-m", "pytest", checks], env=environment, check=False).returncode
    print(__doc__)
    return 2


PERF_RUNS: dict[str, list[str]] = {
    "HTTP, binary tensors": ["-i", "http"],
    # Its own data are FP32 of any size, and what models answer to these is infinite, which JSON cannot say.
    "HTTP, JSON tensors": [
        "-i", "http", "--input-tensor-format", "json", "--output-tensor-format", "json", "--input-data", "zero",
    ],
    "HTTP, batches of 4": ["-i", "http", "-b", "4"],
    "HTTP, asynchronous": ["-i", "http", "--async"],
    "gRPC": ["-i", "grpc"],
    "gRPC, asynchronous": ["-i", "grpc", "--async"],
    "gRPC, stream": ["-i", "grpc", "--async", "--streaming"],
}  # fmt: skip


def run_perf_analyzer(program: str) -> bool:
    """Run it in every mode against our server; returns whether all of them completed.

    The model takes microseconds, and the load shares its cores: the figures say that it works, not how fast.
    """
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    runs = {}
    with tempfile.TemporaryDirectory() as scratch, our_server(Path(scratch)) as (http_port, grpc_port, _):
        for name, mode in PERF_RUNS.items():
            port = grpc_port if "grpc" in mode else http_port
            runs[name] = _perf_run(program, mode, port, Path(scratch) / "table.csv")
            print(f"{name}: {'completed' if runs[name]['completed'] else runs[name]['said']}")
    RESULT.write_text(
        json.dumps({"perf_analyzer": said.stdout.strip() or said.stderr.strip(), "runs": runs}, indent=1) + "\n"
    )
    return all(run["completed"] for run in runs.values())


def _perf_run(program: str, mode: list[str], port: int, table: Path) -> dict[str, Any]:
    table.unlink(missing_ok=True)
    options = [
        "-m",
        "tiny",
        *mode,
        "--concurrency-range",
        "1:8:7",
        "-p",
        "1000",
        "-r",
        "10",
        "-s",
        "50",
        "--percentile",
        "50",
    ]
    done = subprocess.run(
        [program, *options, "-u", f"127.0.0.1:{port}", "-f", str(table)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    rows = list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []
    completed = done.returncode == 0 and [row["Concurrency"] for row in rows] == ["1", "8"]
    run = {"command": " ".join(["perf_analyzer", *options]), "completed": completed, "rows": rows}
    return run if completed else run | {"said": (done.stdout + done.stderr)[-1000:]}


def _after_rules(kind: str) -> dict[str, list[Any]]:
    cases: dict[str, tuple[Any, ...]] = {"rest": REST_CASES, "grpc": GRPC_CASES}[kind]
    return {
        name: [expected(kind, step, answer) for step, answer in zip(cases[name], answers, strict=True)]
        for name, answers in read_golden(kind).items()
    }


def _show(kind: str, found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> int:
    """Print every answer that is not as expected; returns how many."""
    count = 0
    for name in expected.keys() | found.keys():
        for answer, golden in itertools.zip_longest(found.get(name, []), expected.get(name, [])):
            if answer != golden:
                count += 1
                print(f"{kind}, {name}:\n   expected {golden}\n   found    {answer}")
    print(f"{kind}: {len(expected)} cases, {count} answers differ")
    return count


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
