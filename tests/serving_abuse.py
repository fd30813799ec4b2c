"""What a hostile hour does to the server, by hand: it ends by itself and writes JSON.

    PYTHONPATH=export:tests:. python -m serving_abuse WHAT BUNDLE [--out FOLDER] [--seconds N] [--inputs N]

    answers   a mixed load; every answer is compared with the unbatched one
    overload  offers twice the capacity for 10 minutes, some of it slow, rude or wrong, then looks for the capacity
    stop      SIGTERM under load, with clients that send and read slowly: every accepted request is answered
    reload    versions replaced through the control API under load, damaged ones among them
    fuzz      inputs that lie (default: 100,000): only 4xx, no 500, no growth
    shadow    what copying every request to a shadow costs, in requests a second

A part of every load is gRPC, compared as REST's answers are. What is refused there must be RESOURCE_EXHAUSTED,
UNAVAILABLE or DEADLINE_EXCEEDED, in the server's own words: a call that its library gave up is one without an answer.

BUNDLE is any bundle; figures in the repository are of ``speed_models``' resnet18, which WORK/resnet18 holds after a run
of ``serving_speed``. Server and client share the machine, and listen on 127.0.0.1 only. The exit code is 0 if the
promise was kept.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import gzip
import io
import json
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import onnxruntime
import psutil
import uvloop
from mcruntime.bundle import MANIFEST, Bundle, load_bundle, seal
from mcruntime.preprocess import open_image, prepare
from mcruntime.server import oip
from onnx import numpy_helper
from PIL import Image

from mcdeploy.surroundings import describe_machine

KEY, CONTROL_KEY = "k" * 32, "c" * 32
TOLERANCE = 1e-6  # of the largest |logit| of an answer
REFUSALS = (429, 503, 504)
GRPC_REFUSALS = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
GRPC_WORDS = ("try again", "shutting down", "timeout expired")  # of the server, and not of grpc's client
GRPC_SHARE = 0.1  # of an open loop's requests
GRPC_EVERY = 4  # of a closed loop's clients, one
MIB = 1 << 20


# -------------------------------------------------------------------------------------------------------------- server


@dataclass
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int
    grpc_port: int
    log: Path

    def rss(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def stop(self) -> tuple[int, float]:
        """Exit code, and seconds from SIGTERM."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        return code, time.monotonic() - began


@contextlib.contextmanager
def serving(work: Path, *arguments: str) -> Iterator[Server]:
    """``python -m mcruntime.server`` with keys, on any free port."""
    for name, key in (("keys", KEY), ("control", CONTROL_KEY)):
        (work / name).write_text(key, encoding="ascii")
    log = work / "server.log"
    command = [sys.executable, "-m", "mcruntime.server", "--port", "0", "--grpc-port", "0", "--api-keys",
               str(work / "keys"), "--control-keys", str(work / "control"), *arguments]  # fmt: skip
    export = Path(__file__).parents[1] / "export"
    environment = {**os.environ, "PYTHONPATH": str(export)}
    environment.pop("OMP_NUM_THREADS", None)
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True, env=environment)
        try:
            assert process.stdout is not None
            ports = []
            for line in process.stdout:
                ports += [int(line.rsplit(":", 1)[1])] if line.startswith(("listening on ", "grpc on ")) else []
                if len(ports) == 2:
                    break
            else:
                raise SystemExit(f"the server did not start:\n{log.read_text()}")
            yield Server(process, *ports, log)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


# -------------------------------------------------------------------------------------------------------------- client


class HungUp(Exception):
    """The connection ended without an answer, or in the middle of one."""


class Connection:
    """HTTP/1.1 with as little work as possible: the client shares the cores."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.used = 0.0

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.reader is None or self.writer is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 22)
        return self.reader, self.writer

    def is_stale(self) -> bool:
        """Closed by the server, or about to be: it does so after 5 s without a request."""
        return self.reader is not None and (self.reader.at_eof() or time.monotonic() - self.used > 4)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None

    def abort(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()
        self.reader = self.writer = None

    async def ask(self, request: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
        """Status, headers and body.

        Raises:
            HungUp: no whole answer came.
        """
        try:
            _, writer = await self.open()
            writer.write(request)
            found = await self.answer()
            self.used = time.monotonic()
            return found
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            self.abort()
            raise HungUp from error

    async def answer(self, *, is_head: bool = False) -> tuple[int, dict[bytes, bytes], bytes]:
        reader, _ = await self.open()
        lines = [b"HTTP/1.1 100"]
        while lines[0].startswith(b"HTTP/1.1 100"):
            lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
        body = await reader.readexactly(0 if is_head else int(headers.get(b"content-length", b"0")))
        if headers.get(b"connection") == b"close":
            self.close()
        return int(lines[0].split()[1]), headers, body


class Calls:
    """gRPC calls over a channel of their own."""

    def __init__(self, port: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options)
        self._infer = self._channel.unary_unary(f"/{oip.SERVICE}/ModelInfer")

    async def ask(self, message: bytes) -> tuple[str, str, bytes]:
        """The code's name, what was said with it, and the answer."""
        try:
            return "OK", "", await self._infer(message, metadata=(("x-api-key", KEY),), timeout=60)
        except grpc.aio.AioRpcError as error:
            return error.code().name, error.details() or "", b""

    async def close(self) -> None:
        await self._channel.close()


def post(path: str, body: bytes, headers: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-Api-Key: {KEY}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode("latin-1") + body


INFER_REQUEST, INFER_ANSWER = oip.message("ModelInferRequest"), oip.message("ModelInferResponse")


@dataclass
class Question:
    """A request whose answer is known."""

    request: bytes
    logits: np.ndarray  # [B, N], unbatched
    kind: str  # "binary", "json", "image"
    message: bytes = b""  # the same for gRPC, unless it is an image
    others: list[np.ndarray] = field(default_factory=list)  # answers of other versions that would be right as well


class Judge:
    """Compares answers with what the model says to the images alone."""

    def __init__(self) -> None:
        self.right = self.bit_equal = 0
        self.wrong: list[str] = []
        self.worst = 0.0

    def look(self, question: Question, headers: dict[bytes, bytes], body: bytes) -> int:
        """Which version answered: 0, or a place in ``others`` from 1 on; -1: none."""
        if question.kind == "image":
            return self._look_at_class(question, json.loads(body))
        if question.kind == "binary":
            head = int(headers[b"inference-header-content-length"])
            found = np.frombuffer(body[head:], "<f4")
        else:
            found = np.float32(json.loads(body)["outputs"][0]["data"])
        return self._look_at_logits(question, found.reshape(question.logits.shape), question.kind)

    def look_at_message(self, question: Question, message: bytes) -> int:
        """The same of a gRPC answer."""
        (raw,) = INFER_ANSWER.FromString(message).raw_output_contents
        return self._look_at_logits(question, np.frombuffer(raw, "<f4").reshape(question.logits.shape), "gRPC")

    def _look_at_logits(self, question: Question, found: np.ndarray, kind: str) -> int:
        for place, logits in enumerate([question.logits, *question.others]):
            off = float(np.abs(found - logits).max() / np.abs(logits).max())
            if off <= TOLERANCE:
                self.right += 1
                self.bit_equal += bool(np.array_equal(found, logits))
                self.worst = max(self.worst, off)
                return place
        self.wrong.append(f"{kind}: {found.ravel()[:4].tolist()} for {question.logits.ravel()[:4].tolist()}")
        return -1

    def _look_at_class(self, question: Question, tree: dict[str, Any]) -> int:
        logits = question.logits[0].astype(np.float64)
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        if abs(tree["probability"] - probabilities[tree["index"]]) < 1e-5 and tree["index"] == int(logits.argmax()):
            self.right += 1
            return 0
        self.wrong.append(f"image: {tree['index']} {tree['probability']}")
        return -1

    def as_dict(self) -> dict[str, Any]:
        return {
            "answers compared": self.right + len(self.wrong),
            "wrong": len(self.wrong),
            "first wrong": self.wrong[:3],
            "bit-equal": self.bit_equal,
            "largest difference, of the largest |logit|": self.worst,
            "allowed": TOLERANCE,
        }


def make_questions(bundle: Bundle, num: int, *, images: int = 8, seed: int = 0) -> list[Question]:
    """Binary and JSON requests of 1 to 4 images, and PNG files."""
    session = onnxruntime.InferenceSession(str(bundle.model_path), providers=["CPUExecutionProvider"])
    manifest, rng = bundle.manifest, np.random.default_rng(seed)
    name = session.get_inputs()[0].name

    def alone(batch: np.ndarray) -> np.ndarray:
        return np.concatenate([session.run(None, {name: image[np.newaxis]})[0] for image in batch])

    found = []
    path = f"/v2/models/{manifest.name}/infer"
    for number in range(num):
        batch = rng.uniform(-1, 1, (1 if number % 2 else int(rng.integers(1, 5)), *manifest.input.shape)).astype("f4")
        tensor = {"name": manifest.input.name, "shape": list(batch.shape), "datatype": "FP32"}
        message = INFER_REQUEST(model_name=manifest.name, inputs=[tensor], raw_input_contents=[batch.tobytes()])
        as_message = message.SerializeToString()
        if number % 8 == 7:
            body = json.dumps({"inputs": [tensor | {"data": batch.ravel().tolist()}]}).encode()
            found.append(Question(post(path, body), alone(batch), "json", as_message))
            continue
        tensor["parameters"] = {"binary_data_size": batch.nbytes}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        length = f"Inference-Header-Content-Length: {len(head)}\r\n"
        found.append(Question(post(path, head + batch.tobytes(), length), alone(batch), "binary", as_message))
    for _ in range(images):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(stream, "PNG")
        batch = prepare(open_image(stream.getvalue()), manifest.preprocessing)[np.newaxis]
        found.append(Question(post(f"/v2/models/{manifest.name}/predict", stream.getvalue()), alone(batch), "image"))
    return found


async def ask_rest(connection: Connection, question: Question, judge: Judge) -> tuple[str, int]:
    """What came of a request, and which version answered it: as ``Judge.look``.

    Raises:
        HungUp: nothing.
    """
    status, headers, body = await connection.ask(question.request)
    if status in REFUSALS and (status != 503 or b"retry-after" in headers):
        return str(status), -1
    return (str(status), judge.look(question, headers, body)) if status == 200 else (f"{status} {body[:60]!r}", -1)


async def ask_grpc(calls: Calls, question: Question, judge: Judge) -> tuple[str, int]:
    """The same of a gRPC call; ``HungUp`` also where the refusal is not the server's."""
    code, words, message = await calls.ask(question.message)
    if code == "OK":
        return "gRPC OK", judge.look_at_message(question, message)
    if code in GRPC_REFUSALS and not any(part in words for part in GRPC_WORDS):
        raise HungUp(f"{code}: {words}")
    return (f"gRPC {code}" if code in GRPC_REFUSALS else f"gRPC {code}: {words[:60]}"), -1


class Client:
    """One of a closed loop's: every ``GRPC_EVERY``th speaks gRPC."""

    def __init__(self, server: Server, questions: list[Question], number: int, *, only: str = "") -> None:
        self._rng, self.is_grpc = random.Random(number), number % GRPC_EVERY == GRPC_EVERY - 1 and not only
        self._mine = [one for one in questions if (one.message if self.is_grpc else not only or one.kind == only)]
        self._calls = Calls(server.grpc_port) if self.is_grpc else None
        self.connection = Connection(server.port)

    async def ask(self, judge: Judge) -> tuple[str, int]:
        """As ``ask_rest``, of any question."""
        question = self._rng.choice(self._mine)
        if self._calls is not None:
            return await ask_grpc(self._calls, question, judge)
        return await ask_rest(self.connection, question, judge)

    async def close(self) -> None:
        self.connection.close()
        if self._calls is not None:
            await self._calls.close()


async def closed_loop(
    server: Server, questions: list[Question], judge: Judge, seconds: float, connections: int, *, only: str = ""
) -> tuple[collections.Counter[str], list[tuple[float, float]]]:
    """Everyone asks again as soon as they are answered; counts by outcome, and (when, how long) of each answer.

    Args:
        only: of this kind, and all of them REST.
    """
    counts: collections.Counter[str] = collections.Counter()
    times: list[tuple[float, float]] = []
    end = time.monotonic() + seconds

    async def one(number: int) -> None:
        client = Client(server, questions, number, only=only)
        while time.monotonic() < end:
            began = time.monotonic()
            try:
                outcome, _ = await client.ask(judge)
            except HungUp as error:
                counts[f"no answer {error}".strip()] += 1
                continue
            times.append((time.monotonic(), time.monotonic() - began))
            counts[outcome] += 1
        await client.close()

    await asyncio.gather(*(one(number) for number in range(connections)))
    return counts, times


# -------------------------------------------------------------------------------------------------------------- answers


async def answers(bundle: Bundle, work: Path, seconds: float) -> dict[str, Any]:
    questions, judge = make_questions(bundle, 96), Judge()
    with serving(work, str(bundle.folder)) as server:
        counts, times = await closed_loop(server, questions, judge, seconds, 32)
        batches = await batches_of(server.port, bundle.manifest.name)
        code, took = server.stop()
    kept = set(counts) == {"200", "gRPC OK"} and not judge.wrong and code == 0
    return {
        "kept": kept, "connections": 32, "of them gRPC": 32 // GRPC_EVERY, "seconds": seconds,
        "by status": dict(counts), **judge.as_dict(),
        "images by batch": batches, "exit code": code, "seconds to stop": round(took, 2),
        "requests a second": round(len(times) / seconds),
    }  # fmt: skip


async def batches_of(port: int, name: str) -> dict[str, int]:
    connection = Connection(port)
    request = f"GET /v2/models/{name}/stats HTTP/1.1\r\nHost: x\r\nX-Api-Key: {KEY}\r\n\r\n".encode()
    _, _, body = await connection.ask(request)
    connection.close()
    rows = json.loads(body)["model_stats"][0]["batch_stats"]
    return {str(row["batch_size"]): row["compute_infer"]["count"] * row["batch_size"] for row in rows}


# ------------------------------------------------------------------------------------------------------------- overload


async def overload(bundle: Bundle, work: Path, seconds: float) -> dict[str, Any]:
    questions, judge = make_questions(bundle, 96), Judge()
    counts: collections.Counter[str] = collections.Counter()
    rss: list[tuple[float, int]] = []
    with serving(work, str(bundle.folder)) as server:
        _, times = await closed_loop(server, questions, Judge(), 5, 32)  # warm
        _, times = await closed_loop(server, questions, Judge(), 10, 32)
        capacity = len(times) / 10
        _, times = await closed_loop(server, questions, Judge(), 5, 8, only="binary")
        before = len(times) / 5
        began = time.monotonic()
        sent, unfinished = await offer(server, questions, judge, counts, rss, 2 * capacity, seconds)
        ended = time.monotonic()
        _, times = await closed_loop(server, questions, judge, 6, 8, only="binary")
        after = [sum(ended + half / 2 <= when < ended + half / 2 + 0.5 for when, _ in times) * 2 for half in range(12)]
        log = server.log.read_text()
        code, took = server.stop()
    steady = [value for when, value in rss if 60 <= when - began <= 120] or [rss[0][1]]
    later = [value for when, value in rss if when - began > 60] or [rss[-1][1]]
    last = [value for when, value in rss if ended - 60 <= when] or [rss[-1][1]]
    growth, peak = (value / statistics.median(steady) - 1 for value in (statistics.median(last), max(later)))
    back = next((half / 2 + 0.5 for half, rate in enumerate(after) if rate >= 0.9 * before), None)
    allowed = {
        "200", *(str(status) for status in REFUSALS), "gRPC OK", *(f"gRPC {code}" for code in GRPC_REFUSALS),
        "hung up ourselves", "rude: 4xx", "slow: 408 or closed",
    }  # fmt: skip
    kept = (
        set(counts) <= allowed and not judge.wrong and growth <= 0.05 and back is not None and back <= 2
        and code == 0 and unfinished == 0 and "Traceback" not in log
    )  # fmt: skip
    return {
        "kept": kept, "seconds": round(ended - began), "capacity, requests a second at 32 connections": round(capacity),
        "offered, requests a second": round(sent / (ended - began)), "by outcome": dict(counts), **judge.as_dict(),
        "without any answer": unfinished,
        "server's memory in MiB after": {
            f"{minute} min": round(min(rss, key=lambda row: abs(row[0] - began - 60 * minute))[1] / MIB)
            for minute in range(int(seconds / 60) + 1)
        },
        "growth from the median of the second minute to the median of the last": round(growth, 4),
        "highest sample after the first minute, over it": round(peak, 4),
        "requests a second before, 8 connections": round(before),
        "requests a second in the half seconds after": after,
        "seconds until 90 % of it is back": back, "exit code": code, "seconds to stop": round(took, 2),
        "lines of the server's log": len(log.splitlines()),
    }  # fmt: skip


async def offer(
    server: Server, questions: list[Question], judge: Judge, counts: collections.Counter[str],
    rss: list[tuple[float, int]], rate: float, seconds: float,
) -> tuple[int, int]:  # fmt: skip
    """An open loop: so many requests a second, whether the ones before were answered or not."""
    sent = unfinished = 0
    free: list[Connection] = []
    tasks: set[asyncio.Task[None]] = set()
    rng = random.Random(1)
    channels = [Calls(server.grpc_port) for _ in range(4)]
    rude = [request for _, request in zip(range(500), inputs(7, "x", "image", (3, 8, 8)), strict=False)]

    async def one(question: Question) -> None:
        nonlocal unfinished
        connection = free.pop() if free else Connection(server.port)
        if connection.is_stale():  # nobody used it, so the server closed it
            connection.close()
        try:
            outcome, place = await ask_rest(connection, question, judge)
        except HungUp:
            if connection.reader is None:
                counts["no answer"] += 1
                unfinished += 1
            return
        counts["wrong" if outcome == "200" and place != 0 else outcome] += 1
        free.append(connection)

    async def call(question: Question) -> None:
        nonlocal unfinished
        try:
            outcome, place = await ask_grpc(rng.choice(channels), question, judge)
        except HungUp as error:
            counts[f"no answer {error}"] += 1
            unfinished += 1
        else:
            counts["wrong" if outcome == "gRPC OK" and place != 0 else outcome] += 1

    async def hang_up(question: Question) -> None:
        connection = Connection(server.port)
        with contextlib.suppress(ConnectionError):
            _, writer = await connection.open()
            writer.write(
                question.request[: rng.randrange(10, len(question.request))] if rng.random() < 0.5 else question.request
            )
            await asyncio.sleep(rng.random() * 0.2)
        connection.abort()
        counts["hung up ourselves"] += 1

    async def be_slow(question: Question) -> None:
        connection = Connection(server.port)
        # uvloop raises RuntimeError when it writes to what the server closed
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, RuntimeError):
            _, writer = await connection.open()
            for place in range(0, 60, 2):
                writer.write(question.request[place : place + 2])
                await asyncio.sleep(0.5)
            await asyncio.wait_for(connection.answer(), 30)
        connection.abort()
        counts["slow: 408 or closed"] += 1

    async def be_rude() -> None:
        connection = Connection(server.port)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            _, writer = await connection.open()
            writer.write(rng.choice(rude).data)
            status, _, body = await asyncio.wait_for(connection.answer(), 15)
            if not 400 <= status < 500 and status not in REFUSALS and status != 200:
                counts[f"rude: {status} {body[:60]!r}"] += 1
        connection.abort()
        counts["rude: 4xx"] += 1

    began, last = time.monotonic(), 0.0
    while (now := time.monotonic() - began) < seconds:
        due = int(now * rate) - sent
        for _ in range(min(due, 200)):
            if len(tasks) > 900:  # the client's own limit: below --max-connections, so that the queue is what fills
                break
            sent += 1
            draw, question = rng.random(), rng.choice(questions)
            if draw < 0.01:
                task = asyncio.create_task(hang_up(question))
            elif draw < 0.02:
                task = asyncio.create_task(be_rude())
            elif draw < 0.0205:
                task = asyncio.create_task(be_slow(question))
            elif draw < 0.0205 + GRPC_SHARE and question.message:
                task = asyncio.create_task(call(question))
            else:
                task = asyncio.create_task(one(question))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        if now - last >= 1:
            last = now
            rss.append((time.monotonic(), server.rss()))
        await asyncio.sleep(0.004)
    for task in list(tasks):
        if task.get_coro().__name__ == "be_slow":  # type: ignore[union-attr]
            task.cancel()
    _, pending = await asyncio.wait(tasks, timeout=35) if tasks else (set(), set())
    for task in pending:
        task.cancel()
    for connection in free:
        connection.close()
    for channel in channels:
        await channel.close()
    return sent, unfinished + len(pending)


# ----------------------------------------------------------------------------------------------------------------- stop


STOPPED = "refused: no longer listening"
SLOW_PIECES, SLOW_PIECE_S = 40, 0.05  # of a body
SLOW_ANSWERS, SLOW_BYTES, SLOW_READ_S = 8, 2048, 0.01


async def stop(bundle: Bundle, work: Path, seconds: float) -> dict[str, Any]:
    """SIGTERM in the middle of a load, several times over."""
    questions = make_questions(bundle, 48)
    rounds = [await _stop_once(bundle, work, seconds, questions) for _ in range(5)]
    allowed = {"200", "503", "gRPC OK", "gRPC UNAVAILABLE", STOPPED, "slow sender: 200", "slow sender: 503",
               "slow reader: 200", "slow reader: 503", "slow reader: closed before the request was begun"}  # fmt: skip
    kept = all(
        row["exit code"] == 0 and row["seconds to exit"] <= 5 and not row["wrong"]
        and {key.removesuffix(" after the signal") for key in row["by outcome"]} <= allowed
        for row in rounds
    )  # fmt: skip
    return {"kept": kept, "connections": 32, "of them gRPC": 32 // GRPC_EVERY, "slow clients": 2, "rounds": rounds}


async def _stop_once(bundle: Bundle, work: Path, seconds: float, questions: list[Question]) -> dict[str, Any]:
    judge, counts, stopped_at = Judge(), collections.Counter[str](), [float("inf")]

    def count(outcome: str) -> None:
        counts[outcome + ("" if time.monotonic() < stopped_at[0] else " after the signal")] += 1

    async def one(number: int) -> None:
        client = Client(server, questions, number)
        with contextlib.suppress(ConnectionError):  # no longer listening
            while time.monotonic() < stopped_at[0] + 10:
                if not client.is_grpc:
                    await client.connection.open()
                try:
                    outcome, _ = await client.ask(judge)
                except HungUp as error:
                    is_refused = "failed to connect" in str(error) or "Connection refused" in str(error)
                    count(STOPPED if is_refused else f"sent, and not answered {error}".strip())
                    return await client.close()
                count(outcome)
        counts[STOPPED] += 1
        await client.close()

    async def be_slow(act: Callable[[Server, Question, Callable[[str], None]], Awaitable[None]]) -> None:
        question = next(one for one in questions if one.kind == "json")
        with contextlib.suppress(ConnectionRefusedError):
            while time.monotonic() < stopped_at[0]:
                await act(server, question, count)

    with serving(work, str(bundle.folder)) as server:
        clients = [asyncio.create_task(one(number)) for number in range(32)]
        clients += [asyncio.create_task(be_slow(act)) for act in (_send_slowly, _read_slowly)]
        await asyncio.sleep(seconds)
        stopped_at[0] = time.monotonic()
        code, took = await asyncio.to_thread(server.stop)
        _, pending = await asyncio.wait(clients, timeout=15)
        log = server.log.read_text()
    for task in pending:
        task.cancel()
    for task in clients:
        if task not in pending:
            task.result()
    counts["a client still waits"] += len(pending)
    counts["a stack trace in the log"] += log.count("Traceback")
    return {"exit code": code, "seconds to exit": round(took, 2), "by outcome": dict(+counts), **judge.as_dict()}


async def _send_slowly(server: Server, question: Question, count: Callable[[str], None]) -> None:
    """A body that takes two seconds; who is answered before it is all there sends no more."""
    connection = Connection(server.port)
    _, writer = await connection.open()
    answer = asyncio.create_task(connection.answer())
    size = -(-len(question.request) // SLOW_PIECES)
    try:
        for place in range(0, len(question.request), size):
            if answer.done():
                break
            writer.write(question.request[place : place + size])
            await asyncio.sleep(SLOW_PIECE_S)
        count(f"slow sender: {(await answer)[0]}")
    except (ConnectionError, asyncio.IncompleteReadError, RuntimeError):  # the last is uvloop's
        count("slow sender: not answered")
    connection.abort()


async def _read_slowly(server: Server, question: Question, count: Callable[[str], None]) -> None:
    """Answers that are asked for all at once, and taken in small pieces."""
    loop = asyncio.get_running_loop()
    found = b""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", server.port))
        sending = asyncio.create_task(loop.sock_sendall(client, question.request * SLOW_ANSWERS))
        done: list[int] = []
        with contextlib.suppress(ConnectionError):
            while len(done) < SLOW_ANSWERS and (chunk := await loop.sock_recv(client, SLOW_BYTES)):
                found += chunk
                done, found = done + (new := _whole_answers(found))[0], new[1]
                await asyncio.sleep(SLOW_READ_S)
        sending.cancel()
        await asyncio.wait([sending])
    for status in done:
        count(f"slow reader: {status}")
    if found:
        count("slow reader: not the whole answer")
    elif len(done) < SLOW_ANSWERS:
        count("slow reader: closed before the request was begun")


def _whole_answers(data: bytes) -> tuple[list[int], bytes]:
    """The statuses of all whole answers at the start, and what is left."""
    found = []
    while (end := data.find(b"\r\n\r\n")) >= 0:
        head = data[:end].lower()
        place = head.find(b"content-length: ")
        size = end + 4 + int(head[place + 16 :].split(b"\r\n", 1)[0])
        if len(data) < size:
            break
        found.append(int(head.split(b" ", 2)[1]))
        data = data[size:]
    return found, data


# --------------------------------------------------------------------------------------------------------------- reload


def variant(bundle: Bundle, folder: Path, shift: float) -> Path:
    """The same net with another last bias, sealed: another version whose answers are known."""
    shutil.copytree(bundle.folder, folder)
    model = onnx.load(str(bundle.model_path))
    gemm = [node for node in model.graph.node if node.op_type == "Gemm"][-1]
    bias = next(item for item in model.graph.initializer if item.name == gemm.input[2])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(shift), bias.name))
    (folder / bundle.model.file).write_bytes(model.SerializeToString())
    with np.load(folder / bundle.manifest.selftest) as arrays:
        np.savez(
            folder / bundle.manifest.selftest, images=arrays["images"], logits=arrays["logits"] + np.float32(shift)
        )
    seal(folder, bundle.manifest)
    return folder


def damaged(good: Path, folder: Path, kind: str) -> Path:
    """A bundle that must not be taken."""
    shutil.copytree(good, folder)
    model = folder / load_bundle(good).model.file
    if kind == "a bit of the model":
        data = bytearray(model.read_bytes())
        data[len(data) // 2] ^= 1
        model.write_bytes(data)
    elif kind == "half a model":
        model.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    elif kind == "no manifest":
        (folder / MANIFEST).unlink()
    elif kind == "half a manifest":
        (folder / MANIFEST).write_bytes((folder / MANIFEST).read_bytes()[:200])
    elif kind == "another net than it says":  # all hashes fit; only the self-test finds it
        manifest = load_bundle(good).manifest
        with np.load(folder / manifest.selftest) as arrays:
            np.savez(folder / manifest.selftest, images=arrays["images"], logits=arrays["logits"] + np.float32(5))
        seal(folder, manifest)
    return folder


DAMAGES = ("a bit of the model", "half a model", "no manifest", "half a manifest", "another net than it says")


async def reload(bundle: Bundle, work: Path, seconds: float) -> dict[str, Any]:
    name, shift = bundle.manifest.name, 1.0
    good = [variant(bundle, work / "a", 0.0), variant(bundle, work / "b", shift)]
    bad = [damaged(good[0], work / f"bad{place}", kind) for place, kind in enumerate(DAMAGES)]
    questions = [question for question in make_questions(bundle, 48, images=0)]
    for question in questions:  # as version b says it
        question.others = [question.logits + np.float32(shift)]
    repository = work / "repository"
    repository.mkdir()
    shutil.copytree(good[0], repository / name)
    judge, counts, swaps, stale = Judge(), collections.Counter[str](), [], 0
    now_serving = [0]
    end = [float("inf")]

    async def one(number: int) -> None:
        nonlocal stale
        client = Client(server, questions, number)
        while time.monotonic() < end[0]:
            must_be = now_serving[0]
            try:
                outcome, found = await client.ask(judge)
            except HungUp as error:
                counts[f"no answer {error}".strip()] += 1
                continue
            counts[outcome] += 1
            if outcome in ("200", "gRPC OK"):
                # While it is being replaced either may answer; a request sent after that must get the new one.
                stale += must_be >= 0 and now_serving[0] == must_be and found != must_be
        await client.close()

    with serving(work, "--repository", str(repository)) as server:
        clients = [asyncio.create_task(one(number)) for number in range(16)]
        control, version, round_ = Connection(server.port), 0, 0
        load = post(f"/v2/repository/models/{name}/load", b"", f"X-Control-Key: {CONTROL_KEY}\r\n")
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            round_ += 1
            is_good = round_ % 3 != 0
            source = good[1 - version] if is_good else bad[round_ // 3 % len(bad)]
            swap(source, repository / name)
            if is_good:
                now_serving[0] = -1
            status, _, body = await control.ask(load)
            if is_good and status == 200:
                version = 1 - version
                now_serving[0] = version
            swaps.append((source.name, status, body[:200].decode()))
            await asyncio.sleep(0.3)
        end[0] = 0.0
        await asyncio.gather(*clients)
        control.close()
        log = server.log.read_text()
        code, _ = server.stop()
    taken = [row for row in swaps if not row[0].startswith("bad")]
    offered = [row for row in swaps if row[0].startswith("bad")]
    kept = (
        set(counts) == {"200", "gRPC OK"} and not judge.wrong and not stale and code == 0 and "Traceback" not in log
        and all(status == 200 for _, status, _ in taken) and all(status == 400 for _, status, _ in offered)
    )  # fmt: skip
    return {
        "kept": kept, "seconds": seconds, "connections": 16, "of them gRPC": 16 // GRPC_EVERY,
        "by status": dict(counts), **judge.as_dict(),
        "reloads": len(taken), "damaged bundles offered": len(offered), "what was damaged": list(DAMAGES),
        "answered to damaged ones": sorted({f"{status} {body}" for _, status, body in offered}),
        "answers of a version that was not the one": stale, "exit code": code,
    }  # fmt: skip


def swap(source: Path, target: Path) -> None:
    """Put a copy in a folder's place; for an instant there is none, as with any deployment by hand."""
    copy = target.parent / f".{target.name}.new"
    shutil.copytree(source, copy)
    old = target.parent / f".{target.name}.old"
    target.rename(old)
    copy.rename(target)
    shutil.rmtree(old)


# ----------------------------------------------------------------------------------------------------------------- fuzz


@dataclass(frozen=True)
class Input:
    """Bytes that lie, and how."""

    kind: str
    data: bytes
    is_http: bool = True  # so that an answer must come


def inputs(seed: int, name: str, tensor: str, shape: tuple[int, int, int]) -> Iterator[Input]:
    """Without end: requests of every kind that this server reads, each with something wrong, some with nothing."""
    rng = random.Random(seed)
    makers: list[Callable[[random.Random, str, str, tuple[int, int, int]], Input]] = [
        _binary, _binary, _binary, _json, _json, _mutated, _form, _image, _packed, _raw, _control, _path,
    ]  # fmt: skip
    while True:
        yield rng.choice(makers)(rng, name, tensor, shape)


SIZES = (
    0,
    1,
    -1,
    2,
    7,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    10**30,
    -(1 << 63),
)
ODD: tuple[Any, ...] = (
    None,
    True,
    "",
    "x",
    "1",
    1.5,
    1e308,
    [],
    {},
    [[]],
    [None],
    {"a": {}},
    "\x00",
    "ä",
    "'" * 50,
    -0.0,
)
TYPES = ("FP32", "FP16", "BF16", "FP64", "INT8", "UINT64", "BOOL", "BYTES", "fp32", "", "STRING", "FP320")


def _number(rng: random.Random, usual: int) -> Any:
    return usual if rng.random() < 0.5 else rng.choice((*SIZES, *ODD, usual - 1, usual + 1, usual * 2))


def _tree(rng: random.Random, tensor: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": tensor if rng.random() < 0.8 else rng.choice(ODD),
        "shape": [_number(rng, size) if rng.random() < 0.3 else size for size in (1, *shape)][
            : rng.choice((4, 4, 4, 3, 0))
        ],
        "datatype": "FP32" if rng.random() < 0.8 else rng.choice((*TYPES, *ODD)),
    }
    tree: dict[str, Any] = {"inputs": [fields] * rng.choice((1, 1, 1, 1, 0, 2, 50))}
    if rng.random() < 0.2:
        tree["id"] = rng.choice((*ODD, "i" * 5000, "ok"))
    if rng.random() < 0.3:
        key = rng.choice(("timeout", "priority", "binary_data_output", "sequence_id", "x", "shared_memory_region"))
        tree["parameters"] = {key: rng.choice((*SIZES, *ODD))} if rng.random() < 0.8 else rng.choice(ODD)
    if rng.random() < 0.3:
        output = {"name": rng.choice(("logits", "output", *ODD)), "parameters": {
            rng.choice(("classification", "binary_data", "shared_memory")): rng.choice((*SIZES, *ODD))}}  # fmt: skip
        tree["outputs"] = rng.choice(([output], [output] * 3, output, [], None, [rng.choice(ODD)]))
    return tree


def _floats(rng: random.Random, num_bytes: int) -> bytes:
    choice = rng.random()
    if choice < 0.2:
        return struct.pack("<f", rng.choice((float("nan"), float("inf"), 3.4e38, -3.4e38, 1e-45))) * (num_bytes // 4)
    return rng.randbytes(num_bytes) if choice < 0.4 else bytes(num_bytes)


def _binary(rng: random.Random, name: str, tensor: str, shape: tuple[int, int, int]) -> Input:
    usual = 4 * shape[0] * shape[1] * shape[2]
    tree = _tree(rng, tensor, shape)
    for fields in tree["inputs"][:1]:
        fields["parameters"] = {"binary_data_size": _number(rng, usual)}
    head = json.dumps(tree).encode()
    data = _floats(
        rng, usual if rng.random() < 0.6 else rng.choice((0, 1, 3, usual - 4, usual + 4, 2 * usual, usual - 1))
    )
    length = (
        len(head)
        if rng.random() < 0.7
        else rng.choice((0, 1, len(head) - 1, len(head) + 1, len(head) + len(data), *SIZES))
    )
    return Input(
        "binary", post(f"/v2/models/{name}/infer", head + data, f"Inference-Header-Content-Length: {length}\r\n")
    )


def _json(rng: random.Random, name: str, tensor: str, shape: tuple[int, int, int]) -> Input:
    usual = shape[0] * shape[1] * shape[2]
    tree = _tree(rng, tensor, shape)
    for fields in tree["inputs"][:1]:
        fields["data"] = rng.choice(
            (
                [0.0] * min(usual, 300),
                [0] * rng.choice((0, 1, 191, 193)),
                [rng.choice(ODD)] * 192,
                rng.choice(ODD),
                [[0.0] * 8] * 24,
            )
        )
    body = json.dumps(tree)
    if rng.random() < 0.2:
        body = body.replace("0.0", rng.choice(("NaN", "1e999", "-Infinity", "1" * 400, "0x1", "1e39", "00")), 3)
    if rng.random() < 0.1:
        body = rng.choice(("[", '{"a":', '{"inputs":[')) * rng.choice((1, 900, 1100, 20_000))
    return Input("json", post(f"/v2/models/{name}/infer", body.encode()))


def _mutated(rng: random.Random, name: str, tensor: str, shape: tuple[int, int, int]) -> Input:
    """A right request with some bytes changed, anywhere behind the request line."""
    usual = 4 * shape[0] * shape[1] * shape[2]
    fields = {"name": tensor, "shape": [1, *shape], "datatype": "FP32", "parameters": {"binary_data_size": usual}}
    head = json.dumps({"inputs": [fields]}).encode()
    good = post(f"/v2/models/{name}/infer", head + bytes(usual), f"Inference-Header-Content-Length: {len(head)}\r\n")
    data = bytearray(good)
    start = good.index(b"\r\n\r\n") + 4
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        data[rng.randrange(start, start + len(head))] = rng.randrange(256)
    return Input("mutated", bytes(data))


def _form(rng: random.Random, name: str, tensor: str, shape: tuple[int, int, int]) -> Input:
    boundary = rng.choice((b"b", b"b" * 70, b"", b'"q"', b"b c", b"\xff"))
    head = b'Content-Disposition: form-data; name="%b"' % rng.choice(
        (b"file", b"image", b"top", b"x", b"", b"\xff", b"a" * 3000)
    )
    if rng.random() < 0.7:
        head += b'; filename="%b"' % rng.choice(
            (b"a.png", b"../../etc/passwd", b"", b"\x00", b"a" * 3000, b'"', b"\r\n")
        )
    content = rng.choice((b"", b"x" * 2000, b"--b", b"\r\n--b--\r\n", rng.randbytes(500), _png(rng)))
    part = b"--" + boundary + b"\r\n" + head + b"\r\n\r\n" + content + b"\r\n"
    body = part * rng.choice((1, 1, 2, 12, 100)) + rng.choice((b"--" + boundary + b"--\r\n", b"", b"--", b"\r\n" * 500))
    if rng.random() < 0.2:
        body = body[: rng.randrange(len(body) + 1)]
    kind = b"Content-Type: multipart/form-data; boundary=" + boundary + b"\r\n"
    return Input("form", post("/predict", body, kind.decode("latin-1")))


def _png(rng: random.Random) -> bytes:
    stream = io.BytesIO()
    Image.new(rng.choice(("RGB", "L", "P", "RGBA", "1")), (rng.randrange(1, 40), rng.randrange(1, 40))).save(
        stream, "PNG"
    )
    return stream.getvalue()


def _image(rng: random.Random, name: str, tensor: str, shape: tuple[int, int, int]) -> Input:
    stream = io.BytesIO()
    Image.new("RGB", (rng.randrange(1, 40), rng.randrange(1, 40))).save(
        stream, rng.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP"))
    )
    data = bytearray(stream.getvalue())
    for _ in range(rng.choice((0, 1, 3, 10))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.3:
        data = data[: rng.randrange(len(data))]
    if rng.random() < 0.2 and data[:4] == b"\x89PNG":  # a bomb: the header claims any size
        data[16:24] = struct.pack(">II", *(rng.choice((0, 1, 30_000, 1 << 16, (1 << 31) - 1)) for _ in range(2)))
    path = "/predict" + rng.choice(
        ("", "?top=1", "?top=0", "?top=-1", "?top=x", "?top=" + "9" * 30, "?" + "a&" * 50, "?top=%00")
    )
    if rng.random() < 0.4:
        text = base64.b64encode(bytes(data)).decode()
        text = rng.choice(
            (text, text[:-3], "data:image/png;base64," + text, "http://127.0.0.1:1/" + text[:50], text + "\n")
        )
        tree = {rng.choice(("image", "x")): text, "top": rng.choice((*SIZES, *ODD))}
        return Input("image", post(path, json.dumps(tree).encode(), "Content-Type: application/json\r\n"))
    return Input("image", post(path, bytes(data)))


def _packed(rng: random.Random, name: str, tensor: str, shape: tuple[int, int, int]) -> Input:
    data = gzip.compress(bytes(rng.choice((0, 100, 100_000, 3_000_000))), 1)
    data = rng.choice((data, data[:-5], data + b"x", gzip.compress(data), b"\x1f\x8b" + rng.randbytes(50)))
    encoding = rng.choice(("gzip", "deflate", "x-gzip", "br", "gzip, gzip", "identity", "GZIP"))
    return Input(
        "packed", post(rng.choice(("/predict", f"/v2/models/{name}/infer")), data, f"Content-Encoding: {encoding}\r\n")
    )


def _raw(rng: random.Random, name: str, tensor: str, shape: tuple[int, int, int]) -> Input:
    good = post("/predict", b"abc")
    choice = rng.random()
    if choice < 0.3:
        return Input("raw", rng.randbytes(rng.choice((1, 10, 300, 5000))), is_http=False)
    if choice < 0.5:
        data = bytearray(good)
        for _ in range(rng.choice((1, 2, 5))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return Input("raw", bytes(data), is_http=False)
    if choice < 0.6:
        return Input("raw", good[: rng.randrange(len(good))], is_http=False)
    extra = rng.choice((
        b"Transfer-Encoding: chunked\r\n", b"Content-Length: 4\r\n", b"X: " + b"a" * 17_000 + b"\r\n",
        b"Expect: 100-continue\r\n", b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b": x\r\n",
        b"X: y\r\n" * 101, b"\x00: x\r\n", b" folded\r\n",
    ))  # fmt: skip
    return Input("raw", good.replace(b"Host: x\r\n", b"Host: x\r\n" + extra), is_http=False)


def _control(rng: random.Random, name: str, tensor: str, shape: tuple[int, int, int]) -> Input:
    model = rng.choice(("../x", "..%2fx", "%00", "a" * 3000, "*", "nope", "%ff", "%0a"))
    body = rng.choice(
        (b"", b"{}", b"[]", b"{", b'{"parameters":{"config":"{}"}}', b'{"parameters":1}', b'{"ready":1}', b"\xff")
    )
    key = rng.choice(("", f"X-Control-Key: {CONTROL_KEY}\r\n", f"X-Control-Key: {KEY}\r\n"))
    path = rng.choice(
        (f"/v2/repository/models/{model}/load", f"/v2/repository/models/{model}/unload", "/v2/repository/index")
    )
    return Input("control", post(path, body, key))


def _path(rng: random.Random, name: str, tensor: str, shape: tuple[int, int, int]) -> Input:
    parts = (
        "v2",
        "models",
        name,
        "versions",
        "1",
        "99999999999999999999",
        "infer",
        "stats",
        "config",
        "..",
        "%2e%2e",
        "",
        "%ff",
        "health",
        "page",
    )
    path = "/" + "/".join(rng.choice(parts) for _ in range(rng.randrange(1, 8)))
    method = rng.choice(("GET", "POST", "HEAD", "DELETE", "OPTIONS", "PUT"))
    data = f"{method} {path} HTTP/1.1\r\nHost: x\r\nX-Api-Key: {KEY}\r\nContent-Length: 0\r\n\r\n".encode()
    return Input("path", data)


async def fuzz(bundle: Bundle, work: Path, num: int, seed: int = 1) -> dict[str, Any]:
    manifest = bundle.manifest
    source = inputs(seed, manifest.name, manifest.input.name, manifest.input.shape)
    counts: collections.Counter[str] = collections.Counter()
    bad: list[str] = []
    done, rss, slowest = 0, [], 0.0

    async def send(connection: Connection, item: Input) -> None:
        try:
            _, writer = await connection.open()
            writer.write(item.data)
            if not item.is_http:
                writer.write_eof()
            status, _, body = await asyncio.wait_for(connection.answer(is_head=item.data.startswith(b"HEAD ")), 20)
        except (ConnectionError, asyncio.IncompleteReadError, TimeoutError) as error:
            connection.abort()
            counts[f"{item.kind}: no answer"] += 1
            if item.is_http:
                bad.append(f"{type(error).__name__} {item.data[:3000]!r}")
            return
        if not item.is_http:
            connection.abort()
        counts[f"{item.kind}: {status}"] += 1
        asked_for_it = status == 504 and b'"timeout"' in item.data  # a microsecond is too short for any answer
        if status != 200 and not 400 <= status < 500 and not asked_for_it:
            bad.append(f"{status} {body[:200]!r} {item.data[:3000]!r}")

    async def one() -> None:
        nonlocal done
        connection = Connection(server.port)
        while done < num:
            done += 1
            await send(connection, next(source))
        connection.close()

    async def watch() -> None:
        nonlocal slowest
        connection = Connection(server.port)
        while done < num:
            began = time.monotonic()
            with contextlib.suppress(HungUp):
                await connection.ask(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                slowest = max(slowest, time.monotonic() - began)
            rss.append((done, server.rss()))
            await asyncio.sleep(0.1)
        connection.close()

    with serving(work, str(bundle.folder), "--body-timeout", "5", "--max-body-bytes", "2000000") as server:
        began = time.monotonic()
        await asyncio.gather(watch(), *(one() for _ in range(12)))
        took = time.monotonic() - began
        questions, judge = make_questions(bundle, 16), Judge()
        after, _ = await closed_loop(server, questions, judge, 2, 8)
        log = server.log.read_text()
        code, _ = server.stop()
    early = max(value for place, value in rss if place <= max(num // 10, rss[0][0]))
    growth = (max(value for _, value in rss) - early) / MIB
    kept = (
        not bad
        and growth < 50
        and code == 0
        and set(after) == {"200", "gRPC OK"}
        and not judge.wrong
        and "Traceback" not in log
    )
    return {
        "kept": kept, "inputs": done, "seed": seed, "seconds": round(took), "outcomes": dict(sorted(counts.items())),
        "neither 200 nor 4xx, nor 504 where a timeout was asked for": len(bad), "first of them": bad[:5],
        "memory after a tenth, MiB": round(early / MIB), "growth after that, MiB": round(growth, 1),
        "slowest health probe meanwhile, seconds": round(slowest, 3), "afterwards by status": dict(after),
        "wrong afterwards": judge.wrong[:3],
        "stack traces in the server's log": log.count("Traceback"),
        "the first": log.partition("Traceback")[2][:1500],
        "exit code": code, "lines of the server's log": len(log.splitlines()),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- shadow


async def shadow(bundle: Bundle, work: Path, seconds: float) -> dict[str, Any]:
    """With and without a shadow that gets every request, in turns: the two share the machine's cores."""
    copy = variant(bundle, work / "shadow", 0.0)
    questions, judge = make_questions(bundle, 48, images=0), Judge()
    pairs, seen, codes = [], [], []

    async def rate(*more: str) -> float:
        with serving(work, str(bundle.folder), *more) as server:
            await closed_loop(server, questions, judge, 2, 8, only="binary")
            _, times = await closed_loop(server, questions, judge, seconds, 8, only="binary")
            if more:
                seen.append(await shadow_counts(server.port))
            codes.append(server.stop()[0])
        return len(times) / seconds

    for _ in range(3):
        without = await rate()
        pairs.append((round(without), round(await rate("--shadow", f"{bundle.manifest.name}={copy}"))))
    ratios = [round(with_it / without, 3) for without, with_it in pairs]
    differing = sum(counts["top1_disagreements"] for counts in seen)
    return {
        "kept": not judge.wrong and set(codes) == {0} and not differing and all(row["mirrored"] for row in seen),
        "connections": 8, "share": 1.0, "seconds of each run": seconds,
        "requests a second without and with a shadow, pair by pair": pairs, "with / without": ratios,
        "median of it": statistics.median(ratios), "what the shadows counted": seen, **judge.as_dict(),
    }  # fmt: skip


async def shadow_counts(port: int) -> dict[str, int]:
    connection = Connection(port)
    _, _, body = await connection.ask(f"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Api-Key: {KEY}\r\n\r\n".encode())
    connection.close()
    lines = [line for line in body.decode().splitlines() if line.startswith("mcdeploy_shadow_")]
    names = ("mirrored", "dropped", "failed", "top1_disagreements")
    return {
        name: sum(
            int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith(f"mcdeploy_shadow_{name}_total")
        )
        for name in names
    }


# ----------------------------------------------------------------------------------------------------------------- main

WHAT: dict[str, tuple[Callable[..., Awaitable[dict[str, Any]]], float]] = {
    "answers": (answers, 20), "overload": (overload, 600), "stop": (stop, 2), "reload": (reload, 30),
    "fuzz": (fuzz, 100_000), "shadow": (shadow, 8),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m serving_abuse")
    parser.add_argument("what", choices=list(WHAT))
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, default=Path("recipes/results"))
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--inputs", type=int)
    arguments = parser.parse_args()
    work_of, usual = WHAT[arguments.what]
    amount = (arguments.inputs if arguments.what == "fuzz" else arguments.seconds) or usual
    bundle = load_bundle(arguments.bundle)
    with tempfile.TemporaryDirectory() as work:
        found = uvloop.run(work_of(bundle, Path(work), int(amount) if arguments.what == "fuzz" else amount))
    option = f"--inputs {int(amount)}" if arguments.what == "fuzz" else f"--seconds {amount:g}"
    program = f"PYTHONPATH=export:tests:. python -m serving_abuse {arguments.what}"
    tree = {
        "command": f"{program} WORK/{arguments.bundle.name} {option}",
        "model": f"{bundle.manifest.name}, {bundle.manifest.input.shape}, {bundle.manifest.output.num_classes} classes",
        "machine": describe_machine(),
        "onnxruntime": onnxruntime.__version__,
        **found,
    }
    target = arguments.out / f"serving_{arguments.what}.json"
    target.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 0 if found["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
