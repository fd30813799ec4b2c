"""The vendor's own clients meet our server over real sockets: every call that they offer, but for shared memory.

Each check runs with all the clients that offer the call: HTTP and gRPC, with and without asyncio.
``oracle clients`` runs the same checks against a real Triton, which shows that they ask for nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import queue
import time

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from oracle import our_server
from tiny_onnx import LABELS, expected_logits, some_images
from tritonclient.utils import InferenceServerException

MODULES = {
    "http": tritonclient.http,
    "http.aio": tritonclient.http.aio,
    "grpc": tritonclient.grpc,
    "grpc.aio": tritonclient.grpc.aio,
}
WAIT_S = 20
TRITON = "TRITON_PORTS" in os.environ  # set by ``oracle clients``
ALL = pytest.mark.parametrize("client", list(MODULES), indirect=True)
HTTP = pytest.mark.parametrize("client", ["http", "http.aio"], indirect=True)
GRPC = pytest.mark.parametrize("client", ["grpc", "grpc.aio"], indirect=True)


class Client:
    """One of the four behind the manners of the synchronous ones: coroutines are waited for, options are as JSON."""

    def __init__(self, kind, ports, control):
        self.kind, self.module, self.control = kind, MODULES[kind], control
        self.over_http = kind.startswith("http")
        self.port = ports[0] if self.over_http else ports[1]
        self.runner = asyncio.Runner() if kind.endswith("aio") else None
        options = {"concurrency": 8} if kind == "http" else {}
        self.raw = self.wait(self._open, **options)

    def _open(self, **options):
        async def opened():
            return self.module.InferenceServerClient(f"127.0.0.1:{self.port}", **options)

        return opened() if self.runner else self.module.InferenceServerClient(f"127.0.0.1:{self.port}", **options)

    def wait(self, method, *args, **options):
        answer = method(*args, **options)
        return self.runner.run(answer) if self.runner else answer

    def __getattr__(self, name):
        return lambda *args, **options: self.wait(getattr(self.raw, name), *args, **options)

    def json(self, name, *args, **options):
        """The answer of a getter as a plain tree, by either protocol."""
        return getattr(self, name)(*args, **options, **({} if self.over_http else {"as_json": True}))

    def input(self, images=None, **options):
        images = some_images(2) if images is None else images
        tensor = self.module.InferInput("image", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images, **(options if self.over_http else {}))
        return [tensor]

    def output(self, **options):
        return [self.module.InferRequestedOutput("logits", **options)]

    def close(self):
        self.wait(self.raw.close)
        if self.runner:
            self.runner.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Ports for HTTP and gRPC, and the headers that allow models to be loaded."""
    if TRITON:
        yield tuple(map(int, os.environ["TRITON_PORTS"].split(","))), {}
        return
    with our_server(tmp_path_factory.mktemp("server")) as (http_port, grpc_port, control):
        yield (http_port, grpc_port), control


@pytest.fixture
def client(request, server):
    one = Client(request.param, *server)
    yield one
    one.close()


def assert_logits(result, images):
    np.testing.assert_allclose(result.as_numpy("logits"), expected_logits(images), rtol=0, atol=1e-6)


def refused(call, *args, **options):
    """The error of a call that is refused: the client's own exception, with a status and one sentence."""
    with pytest.raises(InferenceServerException) as caught:
        call(*args, **options)
    assert caught.value.status() is not None
    for leak in ("Traceback", "mcruntime", "/tmp", "object at 0x"):
        assert leak not in caught.value.message()
    return caught.value


# health and metadata


@ALL
def test_the_server_is_live_and_ready(client):
    assert client.is_server_live() is True
    assert client.is_server_ready() is True


@ALL
def test_the_model_is_ready_and_others_are_not(client):
    assert client.is_model_ready("tiny") is True
    assert client.is_model_ready("tiny", "1") is True
    assert client.is_model_ready("tiny", "7") is False
    assert client.is_model_ready("nope") is False


@ALL
def test_the_server_names_the_extensions_that_clients_look_for(client):
    extensions = client.json("get_server_metadata")["extensions"]
    assert {"binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics"} <= set(
        extensions
    )


@ALL
@pytest.mark.parametrize("version", ["", "1"])
def test_the_model_describes_its_tensors(client, version):
    tree = client.json("get_model_metadata", "tiny", version)
    (image,), (logits,) = tree["inputs"], tree["outputs"]
    assert (tree["name"], tree["versions"]) == ("tiny", ["1"])
    assert (image["name"], image["datatype"], list(map(int, image["shape"]))) == ("image", "FP32", [-1, 3, 8, 8])
    assert (logits["name"], logits["datatype"], list(map(int, logits["shape"]))) == ("logits", "FP32", [-1, 4])


@ALL
@pytest.mark.parametrize("version", ["", "1"])
def test_the_model_tells_its_config(client, version):
    tree = client.json("get_model_config", "tiny", version)
    config = tree if client.over_http else tree["config"]
    (image,), (logits,) = config["input"], config["output"]
    assert (config["name"], config["max_batch_size"]) == ("tiny", 4)
    assert (image["name"], image["data_type"], list(map(int, image["dims"]))) == ("image", "TYPE_FP32", [3, 8, 8])
    assert (logits["name"], logits["data_type"], list(map(int, logits["dims"]))) == ("logits", "TYPE_FP32", [4])


@ALL
def test_the_repository_lists_the_model(client):
    tree = client.json("get_model_repository_index")
    (entry,) = tree if client.over_http else tree["models"]
    assert (entry["name"], entry["version"], entry["state"]) == ("tiny", "1", "READY")


@ALL
@pytest.mark.parametrize("name", ["tiny", ""])
def test_statistics_count_images_and_requests(client, name):
    def counts():
        (one,) = client.json("get_inference_statistics", name)["model_stats"]
        stats = one["inference_stats"]
        assert set(stats) >= {"success", "fail", "queue", "compute_input", "compute_infer", "compute_output"}
        assert all(batch["batch_size"] for batch in one.get("batch_stats", []))
        return int(one.get("inference_count", 0)), int(stats["success"].get("count", 0))

    images, requests = counts()
    client.infer("tiny", client.input(some_images(3)))
    if TRITON:
        time.sleep(0.5)  # it counts after it has answered
    assert counts() == (images + 3, requests + 1)


# inference


@ALL
@pytest.mark.parametrize("count", [1, 4])
def test_infer_answers_the_logits(client, count):
    images = some_images(count)
    assert_logits(client.infer("tiny", client.input(images)), images)


@HTTP
@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_binary_and_json_may_be_mixed(client, sent, asked):
    images = some_images(2)
    result = client.infer("tiny", client.input(images, binary_data=sent), outputs=client.output(binary_data=asked))
    assert ("parameters" in result.get_output("logits")) is asked  # it holds binary_data_size
    assert_logits(result, images)


@ALL
def test_an_answer_names_model_version_and_request(client):
    result = client.infer("tiny", client.input(), model_version="1", request_id="r-1", outputs=client.output())
    tree = result.get_response() if client.over_http else result.get_response(as_json=True)
    assert (tree["id"], tree["model_name"], tree["model_version"]) == ("r-1", "tiny", "1")
    assert result.as_numpy("nope") is None


@ALL
@pytest.mark.parametrize("batch", [1, 3])
def test_classification_answers_the_best_labels(client, batch):
    images = some_images(batch)
    found = client.infer("tiny", client.input(images), outputs=client.output(class_count=2)).as_numpy("logits")
    assert found.shape == (batch, 2)
    for row, logits in zip(found, expected_logits(images), strict=True):
        for text, index in zip(row, np.argsort(-logits), strict=False):
            value, place, label = text.decode().split(":")
            assert (int(place), label) == (index, LABELS[index])
            assert float(value) == pytest.approx(logits[index], abs=1e-5)


@ALL
def test_an_infinite_answer_to_numbers_far_too_large_is_the_answer(client):
    images = np.zeros((1, 3, 8, 8), dtype=np.float32)
    images[0, 0] = 3e38  # finite, but not its sum: perf_analyzer's own data are like this
    found = client.infer("tiny", client.input(images)).as_numpy("logits")
    assert not np.isfinite(found).all()
    normal = some_images(1)
    assert_logits(client.infer("tiny", client.input(normal)), normal)


@HTTP
def test_classification_may_be_asked_for_in_json(client):
    outputs = client.output(class_count=1, binary_data=False)
    found = client.infer("tiny", client.input(some_images(1)), outputs=outputs).as_numpy("logits")
    assert found.shape == (1, 1)
    best = int(expected_logits(some_images(1)).argmax())
    assert str(found[0, 0]).split(":")[1:] == [str(best), LABELS[best]]


@ALL
def test_priority_timeout_and_own_parameters_are_taken(client):
    images = some_images(1)
    options = {"priority": 0, "timeout": 10_000_000, "parameters": {"text": "x", "count": 3, "yes": True}}
    assert_logits(client.infer("tiny", client.input(images), **options), images)


@HTTP
@pytest.mark.parametrize("how", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_http_bodies_may_be_compressed_both_ways(client, how, binary):
    images = some_images(2)
    result = client.infer(
        "tiny",
        client.input(images, binary_data=binary),
        outputs=client.output(binary_data=binary),
        request_compression_algorithm=how,
        response_compression_algorithm=how,
    )
    assert_logits(result, images)


@GRPC
@pytest.mark.parametrize("how", ["gzip", "deflate"])
def test_grpc_messages_may_be_compressed(client, how):
    images = some_images(2)
    assert_logits(client.infer("tiny", client.input(images), compression_algorithm=how), images)


@ALL
def test_headers_of_the_caller_are_taken(client):
    images = some_images(1)
    assert client.is_server_live(headers={"x-trace": "1"}) is True
    assert_logits(client.infer("tiny", client.input(images), headers={"x-trace": "1"}), images)


@HTTP
def test_query_parameters_of_the_caller_are_taken(client):
    images = some_images(1)
    assert client.is_server_live(query_params={"a": "1", "b": ["2", "3"]}) is True
    assert client.json("get_model_metadata", "tiny", query_params={"a": "1"})["name"] == "tiny"
    assert_logits(client.infer("tiny", client.input(images), query_params={"a": "1"}), images)


@ALL
def test_a_plugin_may_add_headers(client):
    from tritonclient.http import InferenceServerClientPlugin

    class Plugin(InferenceServerClientPlugin):
        called = 0

        def __call__(self, request):
            self.called += 1
            request.headers = (request.headers or {}) | {"x-plugin": "1"}

    plugin, images = Plugin(), some_images(1)
    client.raw.register_plugin(plugin)
    assert client.raw.plugin() is plugin
    assert_logits(client.infer("tiny", client.input(images)), images)
    client.raw.unregister_plugin()
    assert client.is_server_live() is True
    assert plugin.called == 1


@HTTP
def test_a_request_body_may_be_made_and_an_answer_read_without_a_connection(client):
    images = some_images(2)
    kind = client.module.InferenceServerClient
    body, header_length = kind.generate_request_body(client.input(images), outputs=client.output(), request_id="r-2")
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=WAIT_S)
    with contextlib.closing(connection):
        connection.request(
            "POST", "/v2/models/tiny/infer", body, {"Inference-Header-Content-Length": str(header_length)}
        )
        response = connection.getresponse()
        answer_length = int(response.headers["Inference-Header-Content-Length"])
        result = kind.parse_response_body(response.read(), header_length=answer_length)
    assert result.get_response()["id"] == "r-2"
    assert_logits(result, images)


# many requests at once


def many_images():
    return [some_images(1 + seed % 3, seed=seed) for seed in range(8)]


def test_http_requests_in_flight_together_get_their_own_answers(server):
    client, batches = Client("http", *server), many_images()
    try:
        pending = [
            client.raw.async_infer("tiny", client.input(images), request_id=str(index))
            for index, images in enumerate(batches)
        ]
        for index, (one, images) in enumerate(zip(pending, batches, strict=True)):
            result = one.get_result(block=True, timeout=WAIT_S)
            assert result.get_response()["id"] == str(index)
            assert_logits(result, images)
    finally:
        client.close()


def test_grpc_requests_in_flight_together_get_their_own_answers(server):
    client, batches, answers = Client("grpc", *server), many_images(), queue.Queue()
    try:
        for index, images in enumerate(batches):
            client.raw.async_infer(
                "tiny",
                client.input(images),
                callback=lambda result, error: answers.put((result, error)),
                request_id=str(index),
            )
        found = [answers.get(timeout=WAIT_S) for _ in batches]
        assert [error for _, error in found] == [None] * 8
        by_id = {result.get_response().id: result for result, _ in found}
        for index, images in enumerate(batches):
            assert_logits(by_id[str(index)], images)
    finally:
        client.close()


@pytest.mark.parametrize("client", ["http.aio", "grpc.aio"], indirect=True)
def test_coroutines_in_flight_together_get_their_own_answers(client):
    batches = many_images()

    async def all_at_once():
        return await asyncio.gather(*(client.raw.infer("tiny", client.input(images)) for images in batches))

    for result, images in zip(client.wait(all_at_once), batches, strict=True):
        assert_logits(result, images)


# the stream of gRPC


def stream_through(client, requests):
    """Every answer of one stream, in order of arrival: (result, error)."""
    if client.kind == "grpc":
        answers = queue.Queue()
        client.raw.start_stream(callback=lambda result, error: answers.put((result, error)))
        for request in requests:
            client.raw.async_stream_infer(**request)
        found = [answers.get(timeout=WAIT_S) for _ in requests]
        client.raw.stop_stream()
        assert answers.empty()
        return found

    async def whole():
        async def send():
            for request in requests:
                yield request

        return [answer async for answer in client.raw.stream_infer(send())]

    return client.wait(whole)


@GRPC
def test_a_stream_answers_every_request_in_order(client):
    batches = many_images()
    requests = [
        {"model_name": "tiny", "inputs": client.input(images), "request_id": str(index)}
        for index, images in enumerate(batches)
    ]
    found = stream_through(client, requests)
    assert [error for _, error in found] == [None] * 8
    assert [result.get_response().id for result, _ in found] == [str(index) for index in range(8)]
    for (result, _), images in zip(found, batches, strict=True):
        assert result.get_response().parameters["triton_final_response"].bool_param is True
        assert_logits(result, images)


@GRPC
def test_an_error_in_a_stream_is_told_and_the_stream_goes_on(client):
    images = some_images(1)
    names = ("tiny", "nope", "tiny")
    found = stream_through(client, [{"model_name": name, "inputs": client.input(images)} for name in names])
    assert [error is None for _, error in found] == [True, False, True]
    assert found[1][1].message() == "Request for unknown model: 'nope' is not found"
    assert_logits(found[2][0], images)


def test_a_stream_can_be_cancelled_and_another_started(server):
    client, images = Client("grpc", *server), some_images(1)
    try:
        client.raw.start_stream(callback=lambda result, error: None)
        client.raw.async_stream_infer("tiny", client.input(images))
        client.raw.stop_stream(cancel_requests=True)
        ((result, error),) = stream_through(
            client,
            [{"model_name": "tiny", "inputs": client.input(images), "enable_empty_final_response": True}],
        )
        assert error is None
        assert_logits(result, images)
    finally:
        client.close()


# what is refused


@ALL
@pytest.mark.parametrize("version", ["", "1"])
def test_an_unknown_model_is_not_found(client, version):
    error = refused(client.infer, "nope", client.input(), model_version=version)
    assert error.status() in ("404", "StatusCode.NOT_FOUND")
    assert error.message().startswith("Request for unknown model: 'nope'")


@ALL
def test_a_wrong_shape_is_an_invalid_argument(client):
    error = refused(client.infer, "tiny", client.input(some_images(1, size=4)))
    assert error.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert "Expected [-1,3,8,8], got [1,3,4,4]" in error.message()


@ALL
def test_too_large_a_batch_is_an_invalid_argument(client):
    error = refused(client.infer, "tiny", client.input(some_images(5)))
    assert error.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert "batch-size must be <= 4" in error.message()


@ALL
@pytest.mark.parametrize("name", ["get_model_metadata", "get_model_config", "get_inference_statistics"])
def test_questions_about_an_unknown_model_are_refused(client, name):
    assert "nope" in refused(getattr(client, name), "nope").message()


@ALL
@pytest.mark.skipif(TRITON, reason="Triton has these settings")
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("get_trace_settings", ()),
        ("get_trace_settings", ("tiny",)),
        ("update_trace_settings", (None, {"trace_level": "OFF"})),
        ("get_log_settings", ()),
        ("update_log_settings", ({"log_info": False},)),
        ("get_system_shared_memory_status", ()),
        ("register_system_shared_memory", ("region", "/key", 768)),
        ("unregister_system_shared_memory", ()),
        ("get_cuda_shared_memory_status", ()),
        ("register_cuda_shared_memory", ("region", b"aGFuZGxl", 0, 768)),
        ("unregister_cuda_shared_memory", ()),
    ],
)
def test_what_this_server_does_not_have_is_refused_in_the_clients_own_exception(client, name, args):
    assert refused(getattr(client, name), *args).status() in ("404", "StatusCode.UNIMPLEMENTED")


# loading and unloading


@ALL
def test_a_model_is_unloaded_and_loaded_again(client):
    images = some_images(1)
    client.unload_model("tiny", headers=client.control, unload_dependents=False)
    try:
        assert client.is_model_ready("tiny") is False
        assert refused(client.infer, "tiny", client.input(images)).status() in ("404", "StatusCode.NOT_FOUND")
    finally:
        client.load_model("tiny", headers=client.control)
    assert client.is_model_ready("tiny") is True
    assert_logits(client.infer("tiny", client.input(images)), images)


@ALL
def test_a_model_that_is_not_in_the_repository_cannot_be_loaded(client):
    assert "nope" in refused(client.load_model, "nope", headers=client.control).message()


@ALL
@pytest.mark.skipif(TRITON, reason="Triton takes them, and hangs on these")
def test_files_in_a_load_request_are_refused_and_the_model_goes_on(client):
    images = some_images(1)
    config = json.dumps({"name": "tiny", "backend": "python"})
    files = {"file:1/model.onnx": b"not a model"}
    refused(client.load_model, "tiny", headers=client.control, config=config, files=files)
    assert_logits(client.infer("tiny", client.input(images)), images)


@ALL
@pytest.mark.skipif(TRITON, reason="Triton asks for no key")
def test_loading_and_unloading_need_the_control_key(client):
    for call in (client.load_model, client.unload_model):
        assert refused(call, "tiny").status() in (
            "401",
            "403",
            "StatusCode.UNAUTHENTICATED",
            "StatusCode.PERMISSION_DENIED",
        )
    assert client.is_model_ready("tiny") is True
