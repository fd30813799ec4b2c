"""The server answers what the model says, refuses what is wrong in one sentence, and loses no request it took."""

from __future__ import annotations

import asyncio
import base64
import gc
import gzip
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import httpx
import mcruntime
import numpy as np
import pytest
import uvicorn
from mcruntime.errors import BundleError, InputError, McdeployError, MissingExtraError, ParityError
from mcruntime.preprocess import Preprocessing, prepare
from mcruntime.server import serve
from mcruntime.server.__main__ import main, make_parser
from mcruntime.server.app import EXTENSIONS, App
from mcruntime.server.models import Model, Models
from mcruntime.server.options import ServerOptions, from_flags
from mcruntime.server.run import DrainingServer
from mcruntime.server.tensors import ModelSpec
from PIL import Image
from tiny_onnx import LABELS, expected_logits, some_images, write_bundle, write_model
from tiny_server import call, client_of

EXPORT = Path(mcruntime.__file__).parents[1]
HOW = Preprocessing(image_size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", crop_pct=1.0)


@pytest.fixture(autouse=True)
def _nothing_listens_in_this_process(monkeypatch):
    """A check of ``serve`` that fails to stop it would wait for ever."""
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: pytest.fail("the server listens"))


class Fake:
    """A runner of five lines; with a gate, it answers when the gate opens."""

    def __init__(self, answer=expected_logits, gate=None):
        self.answer, self.gate, self.num_started = answer, gate, 0

    def infer(self, images):
        self.num_started += 1
        if self.gate is not None:
            assert self.gate.wait(10)
        return self.answer(images)


def served(runner=None, name="tiny", max_queue=64, max_batch_size=4, max_batch=4, labels=LABELS):
    spec = ModelSpec(name, "image", (3, 8, 8), "logits", len(labels), max_batch_size, labels=tuple(labels))
    return Model(spec, (runner or Fake()).infer, HOW, max_batch=max_batch, max_queue=max_queue)


def app_of(*models, **options):
    collection = Models()
    for model in models:
        collection.add(model)
    return App(collection, ServerOptions(**options))


@pytest.fixture
def app():
    app = app_of(served(), max_body_bytes=200_000)
    yield app
    app.close()
    app.models.close()


def error_of(response, status):
    """The sentence of an error answer: JSON, alone, and without anything internal in it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    ((key, message),) = response.json().items()
    assert key == "error"
    for leak in (str(EXPORT), "/tmp", "Traceback", "mcruntime", "object at 0x", str(os.getpid())):
        assert leak not in message
    return message


def infer_request(images=None, **changes):
    images = some_images(1) if images is None else images
    tensor = {"name": "image", "shape": list(images.shape), "datatype": "FP32", "data": images.ravel().tolist()}
    return {"inputs": [tensor | changes]}


def encoded(image, kind="PNG"):
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


RED = Image.new("RGB", (11, 9), (250, 10, 10))
INFER = "/v2/models/tiny/infer"


# health and metadata


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(("path", "tree"), [("live", {"live": True}), ("ready", {"ready": True})])
def test_health_answers_200(app, method, path, tree):
    response = call(app, method, f"/v2/health/{path}")
    assert response.status_code == 200
    assert method == "HEAD" or response.json() == tree


def test_a_draining_server_lives_but_is_not_ready_and_takes_no_work(app):
    app.draining = True
    assert call(app, "GET", "/v2/health/live").status_code == 200
    assert call(app, "GET", "/v2/health/ready").status_code == 503
    assert call(app, "GET", "/v2/models/tiny/ready").status_code == 503
    response = call(app, "POST", INFER, json=infer_request())
    assert "shutting down" in error_of(response, 503)
    assert response.headers["retry-after"] == "1"


def test_server_metadata_lists_only_what_there_is(app):
    tree = call(app, "GET", "/v2").json()
    assert tree["name"] == "mcdeploy"
    assert tree["extensions"] == EXTENSIONS


@pytest.mark.parametrize("path", ["/v2/models/tiny", "/v2/models/tiny/versions/1"])
def test_model_metadata_names_shapes_with_the_batch_as_minus_one(app, path):
    assert call(app, "GET", path).content == (
        b'{"name":"tiny","versions":["1"],"platform":"onnxruntime_onnx",'
        b'"inputs":[{"name":"image","datatype":"FP32","shape":[-1,3,8,8]}],'
        b'"outputs":[{"name":"logits","datatype":"FP32","shape":[-1,4]}]}'
    )
    assert call(app, "GET", f"{path}/ready").status_code == 200


def test_readiness_of_an_unknown_model_is_400_as_in_triton(app):
    assert error_of(call(app, "GET", "/v2/models/nope/ready"), 400) == "Model version not ready"
    assert error_of(call(app, "GET", "/v2/models/tiny/versions/7/ready"), 400) == "Model version not ready"


@pytest.mark.parametrize("path", ["", "/config", "/stats", "/infer", "/predict"])
def test_an_unknown_model_or_version_is_404(app, path):
    method = "POST" if path in ("/infer", "/predict") else "GET"
    message = error_of(call(app, method, f"/v2/models/nope{path}"), 404)
    assert message == "Request for unknown model: 'nope' is not found"
    message = error_of(call(app, method, f"/v2/models/tiny/versions/7{path}"), 404)
    assert message == "Request for unknown model: 'tiny' version 7 is not found"


@pytest.mark.parametrize(
    "path", ["/v2/", "/v3", "/v2/models/tiny/infer/", "/v2/models/tiny/versions/x", "/v2/models/../../etc"]
)
def test_an_unknown_path_is_404(app, path):
    assert "nothing at this path" in error_of(call(app, "GET", path), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", INFER, {"POST"}), ("DELETE", "/v2", {"GET", "HEAD"}), ("GET", "/predict", {"POST"})],
)
def test_a_wrong_method_is_405_and_says_which_are_allowed(app, method, path, allowed):
    response = call(app, method, path)
    assert error_of(response, 405) == "Method Not Allowed"
    assert set(response.headers["allow"].replace(" ", "").split(",")) == allowed


# infer


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("path", [INFER, "/v2/models/tiny/versions/1/infer"])
def test_infer_answers_the_logits(app, batch, nested, path):
    images = some_images(batch)
    changes = {"data": images.tolist()} if nested else {}
    output = call(app, "POST", path, json=infer_request(images, **changes)).json()["outputs"][0]
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [batch, 4])
    assert output["data"] == expected_logits(images).astype(np.float64).ravel().tolist()


def test_the_answer_is_compact_and_in_the_order_clients_know():
    app = app_of(served(Fake(lambda images: np.array([[0.1, -2, 0, 3]], dtype=np.float32))))
    request = {"id": "a1", **infer_request(), "parameters": {"priority": 1}}
    assert call(app, "POST", INFER, json=request).content == (
        b'{"id":"a1","model_name":"tiny","model_version":"1","outputs":[{"name":"logits","datatype":"FP32",'
        b'"shape":[1,4],"data":[0.10000000149011612,-2.0,0.0,3.0]}]}'
    )
    del request["id"]
    assert b'{"model_name":' in call(app, "POST", INFER, json=request).content[:15]


def test_no_content_type_is_needed(app):
    assert call(app, "POST", INFER, content=json.dumps(infer_request())).status_code == 200


@pytest.mark.parametrize(
    "wish",
    [
        {"outputs": [{"name": "logits", "parameters": {"binary_data": True}}]},
        {"parameters": {"binary_data_output": True}},
    ],
)
def test_binary_answers_follow_their_json(app, wish):
    images = some_images(2)
    response = call(app, "POST", INFER, json=infer_request(images) | wish | {"id": "b1"})
    assert response.headers["content-type"] == "application/octet-stream"
    head = int(response.headers["inference-header-content-length"])
    assert response.content[:head] == (
        b'{"id":"b1","model_name":"tiny","model_version":"1","outputs":[{"name":"logits","datatype":"FP32",'
        b'"shape":[2,4],"parameters":{"binary_data_size":32}}]}'
    )
    assert response.content[head:] == expected_logits(images).astype("<f4").tobytes()


def test_an_output_wish_goes_before_the_request_wide_one(app):
    outputs = [{"name": "logits", "parameters": {"binary_data": False}}]
    response = call(
        app, "POST", INFER, json=infer_request() | {"outputs": outputs, "parameters": {"binary_data_output": True}}
    )
    assert response.headers["content-type"] == "application/json"
    assert "inference-header-content-length" not in response.headers


def binary_request(images, head=None, **parameters):
    """Body and headers of a request with binary tensors."""
    data = images.astype("<f4").tobytes()
    tensor = {
        "name": "image",
        "shape": list(images.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(data)} | parameters,
    }
    text = json.dumps({"inputs": [tensor]} if head is None else head).encode()
    return {"content": text + data, "headers": {"Inference-Header-Content-Length": str(len(text))}}


@pytest.mark.parametrize("padding", range(4))
def test_binary_tensors_are_read_wherever_they_lie(app, padding):
    images = some_images(3)
    options = binary_request(images)
    options["content"] = b" " * padding + options["content"]
    options["headers"]["Inference-Header-Content-Length"] = str(
        int(options["headers"]["Inference-Header-Content-Length"]) + padding
    )
    output = call(app, "POST", INFER, **options).json()["outputs"][0]
    assert output["data"] == expected_logits(images).astype(np.float64).ravel().tolist()


def test_a_bare_image_is_a_request_of_its_own(app):
    images = some_images(1)
    headers = {"Inference-Header-Content-Length": "0"}
    response = call(app, "POST", INFER, content=images.tobytes(), headers=headers)
    assert response.content[-16:] == expected_logits(images).tobytes()
    assert "additional bytes" in error_of(call(app, "POST", INFER, content=images.tobytes()[:-4], headers=headers), 400)
    assert "additional input data" in error_of(
        call(app, "POST", INFER, content=images.tobytes() * 2, headers=headers), 400
    )
    assert "in range" in error_of(call(app, "POST", INFER, content=b"", headers=headers), 400)


@pytest.mark.parametrize(
    ("cut", "length", "message"),
    [
        (-4, None, "expecting 4 additional bytes for model 'tiny'"),
        (None, "10", "failed to parse the request JSON buffer"),
        (None, "9999999", "inference header size should be in range (0, "),
        (None, "-1", "must be a whole number of bytes"),
        (None, "1e3", "must be a whole number of bytes"),
        (None, "9" * 40, "must be a whole number of bytes"),
    ],
)
def test_lengths_that_lie_are_400(app, cut, length, message):
    options = binary_request(some_images(1))
    options["content"] = options["content"][:cut]
    if length is not None:
        options["headers"]["Inference-Header-Content-Length"] = length
    assert message in error_of(call(app, "POST", INFER, **options), 400)


@pytest.mark.parametrize("size", [0, 764, 772, -1, 2**63, "768", True, 768.0])
def test_a_binary_data_size_that_is_not_the_tensors_is_400(app, size):
    error_of(call(app, "POST", INFER, **binary_request(some_images(1), binary_data_size=size)), 400)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_binary_tensors_is_400(app, bad):
    images = some_images(1)
    images[0, 1, 2, 3] = bad
    assert "holds NaN or infinite values" in error_of(call(app, "POST", INFER, **binary_request(images)), 400)


@pytest.mark.parametrize(("k", "classes"), [(1, 1), (3, 3), (9, 4)])
def test_classification_names_the_largest_logits(app, k, classes):
    images = some_images(2)
    outputs = [{"name": "logits", "parameters": {"classification": k}}]
    output = call(app, "POST", INFER, json=infer_request(images) | {"outputs": outputs}).json()["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("BYTES", [2, classes])
    rows = expected_logits(images)
    best = [[f"{row[i]:f}:{i}:{LABELS[i]}" for i in np.argsort(-row)[:classes]] for row in rows]
    assert output["data"] == [text for row in best for text in row]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_packed_bodies_are_unpacked_and_answers_packed_when_asked(app, encoding):
    images = some_images(4)
    body = json.dumps(infer_request(images) | {"id": "x" * 600}).encode()
    packed = gzip.compress(body, mtime=0) if encoding == "gzip" else zlib.compress(body)
    headers = {"Content-Encoding": encoding, "Accept-Encoding": encoding}
    response = call(app, "POST", INFER, content=packed, headers=headers)
    assert response.headers["content-encoding"] == encoding
    assert response.json()["outputs"][0]["data"] == expected_logits(images).astype(np.float64).ravel().tolist()


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (gzip.compress(b" " * 200_001, mtime=0), 413, "unpacks to more than 200000 bytes"),
        (gzip.compress(b"{}", mtime=0)[:-3], 400, "not one whole gzip stream"),
        (gzip.compress(b"{}", mtime=0) + b"more", 400, "not one whole gzip stream"),
        (b"{}", 400, "is not gzip"),
    ],
)
def test_a_packed_body_that_is_none_or_a_bomb_is_refused(app, content, status, message):
    response = call(app, "POST", INFER, content=content, headers={"Content-Encoding": "gzip"})
    assert message in error_of(response, status)


TOO_MANY = some_images(5)
BAD_REQUESTS = [
    ({"inputs": []}, "expected 1 inputs but got 0 inputs for model 'tiny'"),
    ({}, "'inputs' must be an array"),
    ({"inputs": {}}, "'inputs' must be an array"),
    ({"inputs": [1]}, "'inputs' must be an array of objects"),
    ({"inputs": infer_request()["inputs"] * 2}, "expected 1 inputs but got 2 inputs"),
    (infer_request(name="wrong"), "unexpected inference input 'wrong' for model 'tiny'"),
    (infer_request(name=None), "unexpected inference input (not a text)"),
    (infer_request(datatype="INT32"), "data-type is 'INT32', but model 'tiny' expects 'FP32'"),
    (infer_request(datatype="FP16"), "receiving FP16 data via JSON is not supported. Please use the binary data"),
    (infer_request(datatype=None), "data-type is (not a text)"),
    (infer_request(shape=[1, 3, 4, 8]), "unexpected shape for input 'image' for model 'tiny'. Expected [-1,3,8,8]"),
    (infer_request(shape=[3, 8, 8]), "Expected [-1,3,8,8], got [3,8,8]"),
    (infer_request(shape=[0, 3, 8, 8], data=[]), "got [0,3,8,8]"),
    (infer_request(shape=[-1, 3, 8, 8]), "got [-1,3,8,8]"),
    (infer_request(shape=[10**9, 3, 8, 8]), "batch-size must be <= 4"),
    (infer_request(shape=[10**18, 3, 8, 8]), "batch-size must be <= 4"),
    (infer_request(shape=[1.0, 3, 8, 8]), "must be an array of integers"),
    (infer_request(shape=[True, 3, 8, 8]), "must be an array of integers"),
    (infer_request(shape="1,3,8,8"), "must be an array of integers"),
    (infer_request(shape=[2**64, 3, 8, 8]), "must be an array of integers"),
    (infer_request(TOO_MANY), "inference request batch-size must be <= 4 for 'tiny'"),
    (infer_request(data=[0.0] * 191), "expected 192 numbers, got 191"),
    (infer_request(data=[]), "expected 192 numbers, got 0"),
    (infer_request(data=None), "needs 'data', an array of numbers"),
    (infer_request(data="AAAA"), "needs 'data', an array of numbers"),
    (infer_request(data=[True] * 192), "must hold numbers only"),
    (infer_request(data=["1.5"] * 192), "must hold numbers only"),
    (infer_request(data=[None] + [0.0] * 191), "must hold numbers only"),
    (infer_request(data=[1e39] + [0.0] * 191), "holds NaN or infinite values"),
    (infer_request(data=[True] + [0.5] * 191), "must hold numbers only"),
    (infer_request(data=some_images(1).transpose(0, 2, 3, 1).tolist()), "nested, but not as its shape"),
    (infer_request(data=[[0.0] * 192]), "nested, but not as its shape"),
    (infer_request(data=[[[[0.0] * 8] * 7 + [0.0] * 8] * 3]), "nested, but not as its shape"),
    (infer_request(parameters={"binary_data_size": 768}), "has both 'data' and 'binary_data_size'"),
    (infer_request(parameters={"shared_memory_region": "x"}), "shared memory is not supported"),
    (infer_request() | {"id": 7}, "'id' must be a string"),
    (infer_request() | {"parameters": []}, "'parameters' must be an object"),
    (infer_request() | {"parameters": {"x": None}}, "parameter 'x' has invalid type"),
    (infer_request() | {"outputs": [{"name": "nope"}]}, "unexpected inference output 'nope' for model 'tiny'"),
    (infer_request() | {"outputs": [{"name": "logits", "parameters": {"classification": 0}}]}, "of at least 1"),
    (infer_request() | {"outputs": [{"name": "logits"}] * 2}, "requested more than once"),
    (infer_request() | {"parameters": {"timeout": -1}}, "whole number of microseconds"),
    (infer_request() | {"parameters": {"binary_data_output": 1}}, "must be true or false"),
]  # fmt: skip


@pytest.mark.parametrize(("request_tree", "message"), BAD_REQUESTS, ids=[message for _, message in BAD_REQUESTS])
def test_a_wrong_infer_request_is_400_and_says_why(app, request_tree, message):
    assert message in error_of(call(app, "POST", INFER, content=json.dumps(request_tree)), 400)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "failed to parse the request JSON buffer"),
        (b"{", "at 1"),
        (b"[1]", "expected an object"),
        (b"\xff\xfe\x00", "failed to parse"),
        (b"[" * 100_000, "failed to parse"),
        (b'{"inputs":[{"data":[' + b"9" * 5000 + b"]}]}", "failed to parse"),
    ],
)
def test_what_is_not_json_is_400(app, body, message):
    assert message in error_of(call(app, "POST", INFER, content=body), 400)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_nan_and_infinity_are_400(app, constant):
    text = json.dumps(infer_request(data=["HERE"] + [0.0] * 191)).replace('"HERE"', constant)
    assert "failed to parse" in error_of(call(app, "POST", INFER, content=text), 400)


def chunks(num_bytes, size=10_000):
    async def stream():
        for _ in range(num_bytes // size):
            yield b" " * size

    return stream()


@pytest.mark.parametrize("path", [INFER, "/predict"])
def test_a_body_that_is_too_large_is_413_however_it_comes(app, path):
    for content in (b" " * 200_001, chunks(210_000), chunks(2_000_000)):
        assert "larger than 200000 bytes" in error_of(call(app, "POST", path, content=content), 413)
    assert call(app, "POST", path, content=b" " * 200_000).status_code == 400, "the limit itself is no overflow"


def test_an_unknown_packing_is_415(app):
    response = call(app, "POST", INFER, content=b"x", headers={"Content-Encoding": "br"})
    assert "send gzip, deflate or none" in error_of(response, 415)


def test_a_body_that_does_not_arrive_is_408():
    app = app_of(served(), body_timeout_s=0.05)

    async def stalled():
        yield b"{"
        await asyncio.sleep(5)

    assert "did not arrive" in error_of(call(app, "POST", INFER, content=stalled()), 408)


def test_bodies_together_are_bounded_too():
    app = app_of(served(), max_inflight_bytes=200_000, max_body_bytes=200_000)
    app.budget.used = 150_000  # others hold them
    response = call(app, "POST", INFER, content=b" " * 60_000)
    assert "too many bytes" in error_of(response, 503)
    assert response.headers["retry-after"] == "1"
    app.budget.used -= 150_000
    assert app.budget.used == 0, "what was held is given back"
    assert call(app, "POST", INFER, json=infer_request()).status_code == 200


@pytest.mark.parametrize("kind", ["a wrong request", "an engine that fails", "a full queue"])
def test_a_refused_request_keeps_nothing_of_itself(kind):
    def fail(images):
        raise ParityError("no")

    app = app_of(served(Fake(fail) if kind == "an engine that fails" else None, max_queue=0), max_queue=0)
    if kind == "a full queue":
        app.budget.used = app.options.max_inflight_bytes
    request = {"inputs": []} if kind == "a wrong request" else infer_request()

    async def several():
        async with client_of(app) as client:
            await client.post(INFER, json=request)
            gc.collect()
            before = {id(one) for one in gc.get_objects()}
            gc.disable()
            logging.disable()  # pytest keeps all records, and they what they say
            try:
                for _ in range(3):
                    assert (await client.post(INFER, json=request)).status_code >= 400
                return [
                    one for one in gc.get_objects() if issubclass(type(one), McdeployError) and id(one) not in before
                ]
            finally:
                logging.disable(logging.NOTSET)
                gc.enable()

    assert len(asyncio.run(several())) <= 1, "the worker may not have let go of the last one yet"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"a":[' + b"[]," * 120_000 + b"1]}", "more than 100000 arrays and objects"),
        (b'{"a":[' + b"{}," * 120_000 + b"1]}", "more than 100000 arrays and objects"),
        (b'{"a":[' + b"1," * 240_000 + b"1]}", "more values than the model takes"),
    ],
)
@pytest.mark.parametrize("path", [INFER, "/predict", "/v2/repository/index"])
def test_json_that_would_grow_in_memory_is_refused_before_it_is_parsed(body, message, path, monkeypatch):
    app = app_of(served())
    monkeypatch.setattr("mcruntime.server.protocol.orjson.loads", lambda data: pytest.fail("it was parsed"))
    headers = {"content-type": "application/json"}
    assert message in error_of(call(app, "POST", path, content=body, headers=headers), 400)


def test_the_time_of_a_failure_is_counted(app):
    call(app, "POST", INFER, json={"inputs": []})
    (statistics,) = call(app, "GET", "/v2/models/tiny/stats").json()["model_stats"]
    assert statistics["inference_stats"]["fail"]["count"] == 1
    assert statistics["inference_stats"]["fail"]["ns"] > 0


@pytest.mark.parametrize(
    ("accepted", "encoding"), [("gzip;q=0", None), ("gzip; q=0.0, deflate", "deflate"), ("gzip;q=0.5", "gzip")]
)
def test_a_packing_that_the_client_rules_out_is_not_used(app, accepted, encoding):
    request = infer_request(some_images(4)) | {"id": "x" * 600}
    response = call(app, "POST", INFER, json=request, headers={"Accept-Encoding": accepted})
    assert response.headers.get("content-encoding") == encoding


# predict


@pytest.mark.parametrize("path", ["/predict", "/v2/models/tiny/predict", "/v2/models/tiny/versions/1/predict"])
@pytest.mark.parametrize("how", ["raw", "multipart", "as curl --data-binary", "base64", "data URL"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_predict_names_the_class(app, path, how, kind):
    data = encoded(RED, kind)
    options = {
        "raw": {"content": data, "headers": {"Content-Type": "image/png"}},
        "multipart": {"files": {"file": ("red.png", data)}},
        "as curl --data-binary": {"content": data, "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        "base64": {"json": {"image": base64.b64encode(data).decode()}},
        "data URL": {"json": {"image": "data:image/png;base64," + base64.b64encode(data).decode()}},
    }[how]
    tree = call(app, "POST", path, **options).json()
    assert (tree["label"], tree["index"]) == ("red", 0)
    assert tree["top"][0] == {key: tree[key] for key in ("label", "index", "probability")}


def test_predict_gives_softmax_probabilities_in_order(app):
    top = call(app, "POST", "/predict", content=encoded(RED)).json()["top"]
    logits = expected_logits(prepare(RED, HOW)[None])[0].astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum()
    assert [entry["index"] for entry in top] == list(np.argsort(-probabilities))
    np.testing.assert_allclose([entry["probability"] for entry in top], np.sort(probabilities)[::-1], rtol=1e-12)
    assert [LABELS[entry["index"]] for entry in top] == [entry["label"] for entry in top]


def test_predict_gives_five_classes_or_as_many_as_asked_for_even_of_huge_logits():
    runner = Fake(lambda images: np.arange(9, dtype=np.float32)[None] * 1e4)
    app = app_of(served(runner, labels=tuple("abcdefghi")))
    tree = call(app, "POST", "/predict", content=encoded(RED)).json()
    assert [entry["label"] for entry in tree["top"]] == list("ihgfe")
    assert tree["probability"] == 1.0
    assert len(call(app, "POST", "/predict?top=99", content=encoded(RED)).json()["top"]) == 9
    body = {"image": base64.b64encode(encoded(RED)).decode(), "top": 2}
    assert len(call(app, "POST", "/predict", json=body).json()["top"]) == 2


def test_predict_says_where_the_time_went(app):
    timing = call(app, "POST", "/predict", content=encoded(RED)).json()["timing"]
    assert timing.keys() == {"decode_ms", "queue_ms", "compute_ms", "batch"}
    assert all(value > 0 for value in timing.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"content": b""}, "the image is empty"),
        ({"content": b"hello"}, "not an image that can be read"),
        ({"content": encoded(RED)[:50]}, "damaged or cut short"),
        ({"files": {"picture": ("x.png", encoded(RED))}}, "no field 'file'"),
        ({"data": {"file": "text"}, "files": {"other": ("x", b"")}}, "has no filename"),
        ({"files": {"file": ("x.png", b"hello")}}, "not an image that can be read"),
        ({"files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}, "Too many files"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, "Missing boundary"),
        ({"json": {"image": 7}}, "no text 'image'"),
        ({"json": {"image": "http://127.0.0.1/cat.jpg"}}, "URLs are not fetched"),
        ({"content": encoded(RED), "params": {"top": "0"}}, "'top' must be a whole number"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, "multipart form"),
    ],
)
def test_a_wrong_image_is_400_and_says_why(app, options, message):
    assert message in error_of(call(app, "POST", "/predict", **options), 400)


def test_with_several_models_each_has_its_own_predict():
    app = app_of(served(), served(Fake(lambda images: -expected_logits(images)), name="inverse"))
    assert "/v2/models/{name}/predict" in error_of(call(app, "POST", "/predict", content=encoded(RED)), 404)
    assert call(app, "POST", "/v2/models/tiny/predict", content=encoded(RED)).json()["label"] == "red"
    assert call(app, "POST", "/v2/models/inverse/predict", content=encoded(RED)).json()["label"] != "red"


# failures inside, overload, draining


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (ParityError("/secret/path: NaN"), "the model could not answer this request"),
        (BundleError("/secret/path"), "the model could not answer this request"),
        (ValueError("/secret/path"), "internal server error"),
    ],
)
def test_a_failure_inside_is_500_and_tells_nothing(problem, message):
    def fail(images):
        raise problem

    app = app_of(served(Fake(fail)))
    assert error_of(call(app, "POST", INFER, json=infer_request()), 500) == message
    assert app.in_flight == 0


@pytest.mark.parametrize(("pixel", "status"), [(1e4, 500), (3e38, 400)])
def test_an_infinite_answer_is_the_models_fault_for_pixels_and_the_clients_for_numbers_far_too_large(pixel, status):
    app = app_of(served(Fake(lambda images: np.full((len(images), len(LABELS)), np.inf, np.float32))))
    images = np.full((1, 3, 8, 8), pixel, np.float32)
    told = error_of(call(app, "POST", INFER, json=infer_request(images)), status)
    assert ("far too large" in told) is (status == 400)
    bare = {"content": images.tobytes(), "headers": {"Inference-Header-Content-Length": "0"}}  # answered in binary
    assert call(app, "POST", INFER, **bare).status_code == (200 if status == 400 else 500)


async def until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited 5 s")


def test_a_full_queue_is_503_at_once_and_every_request_taken_is_answered():
    gate = threading.Event()
    runner = Fake(gate=gate)
    app = app_of(served(runner, max_queue=2, max_batch=1))

    async def scenario():
        async with client_of(app) as client:
            taken = [
                asyncio.create_task(client.post(INFER, json=infer_request(some_images(1, seed=i)))) for i in range(3)
            ]
            await until(lambda: app.in_flight == 3 and runner.num_started == 1)
            await asyncio.sleep(0.05)
            started = time.monotonic()
            refused = await client.post(INFER, json=infer_request())
            no_image = await client.post("/predict", content=encoded(RED))
            took = time.monotonic() - started
            alive = await client.get("/v2/health/live")
            gate.set()
            return (
                await asyncio.gather(*taken),
                refused,
                no_image,
                took,
                alive,
                await client.post(INFER, json=infer_request()),
            )

    taken, refused, no_image, took, alive, afterwards = asyncio.run(scenario())
    for i, response in enumerate(taken):
        expected = expected_logits(some_images(1, seed=i)).astype(np.float64).ravel().tolist()
        assert response.json()["outputs"][0]["data"] == expected
    for response in (refused, no_image):
        assert "Exceeds maximum queue size" in error_of(response, 503)
        assert response.headers["retry-after"] == "1"
    assert took < 1
    assert alive.status_code == afterwards.status_code == 200
    assert runner.num_started == 4


def test_draining_finishes_what_is_in_flight_and_refuses_the_rest():
    gate = threading.Event()
    runner = Fake(gate=gate)
    app = app_of(served(runner, max_batch=1), drain_s=0.2)

    async def scenario():
        async with client_of(app) as client:
            first, second = (asyncio.create_task(client.post(INFER, json=infer_request())) for _ in range(2))
            await until(lambda: app.in_flight == 2 and runner.num_started == 1)
            app.draining = True
            refused = await client.post(INFER, json=infer_request())
            ready = await client.get("/v2/health/ready")
            gate.set()
            return (await first).status_code, (await second).status_code, refused.status_code, ready.status_code

    assert asyncio.run(scenario()) == (200, 200, 503, 503)
    assert app.in_flight == 0


def test_requests_that_outlast_the_drain_are_cut_off_and_counted():
    gate = threading.Event()
    runner = Fake(gate=gate)
    app = app_of(served(runner, max_batch=1), drain_s=0.2)

    async def scenario(listener):
        server = DrainingServer(app, app.options)
        running = asyncio.create_task(server.serve(sockets=[listener]))
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            request = asyncio.create_task(client.post(INFER, json=infer_request()))
            await until(lambda: runner.num_started == 1)
            started = time.monotonic()
            server.should_exit = True
            await running
            took = time.monotonic() - started
            gate.set()
            await asyncio.gather(request, return_exceptions=True)
        return server.num_cut_off, took

    with socket.create_server(("127.0.0.1", 0)) as listener:
        num_cut_off, took = asyncio.run(scenario(listener))
    assert num_cut_off == 1
    assert 0.2 < took < 5


# the whole server


def test_a_port_in_use_is_a_sentence(tmp_path):
    bundle = write_bundle(tmp_path / "b")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(InputError, match=rf"127\.0\.0\.1:{port} is in use already; choose another --port"):
            serve([bundle], ServerOptions(port=port))


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 0), ("192.0.2.1", 0)])
def test_an_address_that_cannot_be_listened_on_is_a_sentence(tmp_path, host, port):
    with pytest.raises(InputError, match=f"{host}:{port}: "):
        serve([write_bundle(tmp_path / "b")], ServerOptions(host=host, port=port))


def test_nothing_to_serve_and_two_of_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one bundle"):
        serve([], ServerOptions(port=0))
    with pytest.raises(InputError, match="both named 'tiny', version 1; serve one of them, or number them"):
        serve([write_bundle(tmp_path / "a"), write_bundle(tmp_path / "b")], ServerOptions(port=0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batch_size": 0}, "--max-batch-size: expected at least 1, got 0"),
        ({"max_queue": -1}, "--max-queue: expected at least 0, got -1"),
        ({"port": 99_999}, "--port: a port is 0 to 65535"),
        ({"timeout_s": 0.0}, "--timeout: expected more than 0 seconds"),
        ({"timeout_s": float("nan")}, "--timeout: expected more than 0 seconds"),
        ({"max_batch": 0}, "--max-batch: expected at least 1"),
        ({"buckets": (0, 4)}, "--buckets: expected sizes of at least 1"),
        ({"shadow_share": 1.5}, "--shadow-share: expected 0 to 1"),
        ({"tls_cert": Path("c.pem")}, "give both, or neither"),
        ({"tls_client_ca": Path("c.pem")}, "needs --tls-cert and --tls-key"),
        ({"provider": "gpu"}, "unknown provider 'gpu'"),
    ],
)
def test_an_option_outside_its_range_is_a_sentence_that_names_the_flag(wrong, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ServerOptions(**wrong)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (["digits=3"], "expected NAME:VERSION=SHARE"),
        (["digits:x=3"], "expected NAME:VERSION=SHARE"),
        (["digits:1=-3"], "expected NAME:VERSION=SHARE"),
        (["digits:1=nan"], "expected NAME:VERSION=SHARE"),
        (["digits:1=0", "digits:2=0"], "all shares of 'digits' are 0"),
    ],
)
def test_a_split_that_cannot_be_read_is_a_sentence(rules, message):
    with pytest.raises(InputError, match=re.escape(message)):
        from_flags({"split": rules})


def test_both_command_lines_have_every_option_and_reach_the_same_one():
    read = vars(
        make_parser().parse_args(
            ["a", "--split", "m:1=3", "--split", "m:2=1", "--buckets", "4,1", "--shadow", "b", "--access-log"]
        )
    )
    assert read.pop("bundles") == ["a"]
    options = from_flags(read)
    assert options == ServerOptions(split={"m": {"1": 3.0, "2": 1.0}}, buckets=(1, 4), shadows=("b",), access_log=True)
    nothing = vars(make_parser().parse_args([]))
    nothing.pop("bundles")
    assert from_flags(nothing) == ServerOptions()


@pytest.mark.parametrize(("module", "package"), [("uvicorn", "uvicorn"), ("python_multipart", "python-multipart")])
def test_without_its_packages_serve_names_the_extra_to_install(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'; install it with: pip install 'mcdeploy\[serve\]'"):
        serve([Path("bundle")])


def test_a_damaged_bundle_is_not_served_and_exits_with_2(tmp_path, capsys):
    bundle = write_bundle(tmp_path / "b")
    (bundle / "certificate.json").write_text("{}")
    assert main([str(bundle), "--port", "0"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert "certificate.json" in printed.err
    assert "listening" not in printed.out


def test_a_model_that_fails_its_selftest_is_not_served_and_exits_with_1(tmp_path, capsys):
    from mcruntime.bundle import seal
    from tiny_onnx import BIAS, tiny_manifest

    bundle = write_bundle(tmp_path / "b")
    write_model(bundle / "model.onnx", bias=BIAS + np.float32(0.1))
    seal(bundle, tiny_manifest())
    assert main([str(bundle), "--port", "0"]) == 1
    assert "self-test" in capsys.readouterr().err


class Process:
    """``python -m mcruntime.server`` on a free port, with what it printed."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "mcruntime.server", *map(str, arguments), "--port", "0"],
            env={**os.environ, "PYTHONPATH": str(EXPORT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines = []
        while not self.lines or not self.lines[-1].startswith("listening"):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.lines.append(line.strip())
        self.url = self.lines[-1].removeprefix("listening on ")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.process.kill()
        self.process.communicate()


def read_answer(connection):
    """Status and body of one answer, after which the server closes the connection."""
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_sigterm_answers_the_request_in_flight_refuses_new_ones_and_exits_with_0(tmp_path):
    """The request in flight is one whose body arrives slowly: its last byte is held back until the signal is seen."""
    bundle = write_bundle(tmp_path / "b")
    with Process(bundle) as server, httpx.Client(base_url=server.url) as client:
        assert len(server.lines) == 2
        assert server.lines[0].startswith("tiny: bundle ")
        images = some_images(2)
        body = json.dumps(infer_request(images)).encode()
        expected = client.post(INFER, content=body).json()
        np.testing.assert_allclose(expected["outputs"][0]["data"], expected_logits(images).ravel(), atol=1e-6)
        assert client.post("/predict", content=encoded(RED)).json()["label"] == "red"
        assert client.post(INFER, content=b" " * (33 << 20)).status_code == 413

        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            start = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\n"
            head = f"{start}Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
            slow.sendall(head.encode() + body[:-1])
            assert slow.recv(65536).startswith(b"HTTP/1.1 100 ")  # the server reads the body: the request is in flight
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 5
            while client.get("/v2/health/ready").status_code != 503:
                assert time.monotonic() < deadline
            time.sleep(0.5)  # longer than the server would need to close, were nothing in flight
            with httpx.Client(base_url=server.url) as another:
                assert another.get("/v2/health/live").status_code == 200
                assert another.post(INFER, content=body).status_code == 503
            slow.sendall(body[-1:])
            status, answer = read_answer(slow)
        assert status == 200
        assert json.loads(answer) == expected
        assert server.process.wait(10) == 0
        logged = server.process.stderr.read()
    assert "stopping in_flight=0 reading=1" in logged
    assert not re.search("Traceback|ERROR|Warning:", logged)


def test_a_client_that_is_still_sending_does_not_hold_up_the_end(tmp_path):
    with Process(write_bundle(tmp_path / "b")) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{{".encode())
            with httpx.Client(base_url=server.url) as client:
                assert client.get("/v2/health/live").status_code == 200
            server.process.send_signal(signal.SIGTERM)
            status, answer = read_answer(slow)
        assert status == 503
        assert json.loads(answer) == {"error": "the server is shutting down"}
        assert server.process.wait(10) == 0
        logged = server.process.stderr.read()
    assert "cut_off=0" in logged
    assert "Traceback" not in logged
