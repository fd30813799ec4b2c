"""The gRPC side, over real sockets on 127.0.0.1, with a model that needs no engine.

``test_clients`` and ``test_oracle`` hold it against the vendor's clients and answers; here is what they do not show.
"""

# B = batch, C = channels, H/W = height/width.
from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import importlib.metadata
import ipaddress
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc
import mcruntime.server.run
import numpy as np
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf import descriptor_pb2, json_format
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from live_server import live, rest, tiny_model, until
from mcruntime.errors import InputError, McdeployError, MissingExtraError
from mcruntime.server import grpc_calls, grpc_health, oip
from mcruntime.server.app import EXTENSIONS, App
from mcruntime.server.auth import Keys
from mcruntime.server.config import model_config
from mcruntime.server.grpc_calls import host_of
from mcruntime.server.grpc_door import RESERVED
from mcruntime.server.grpc_server import start
from mcruntime.server.grpc_service import Service
from mcruntime.server.grpc_threads import Threads
from mcruntime.server.models import Models, Source
from mcruntime.server.options import ServerOptions
from tiny_onnx import LABELS, expected_logits, some_images
from tritonclient.grpc import model_config_pb2, service_pb2

OIP_FOLDER = Path(oip.__file__).parent
METHODS = oip.methods()
KEY = "a-key-that-nobody-guesses"
CONTROL_KEY = "another-key-nobody-guesses"
HEALTH = "/grpc.health.v1.Health/Check"
SERVING = health_pb2.HealthCheckResponse.SERVING
WAIT_S = 10


class Client:
    """Calls by the names of the methods and their messages' fields."""

    def __init__(self, port, credentials=None, **options):
        address, given = f"127.0.0.1:{port}", [*options.items(), ("grpc.use_local_subchannel_pool", 1)]
        self.channel = (
            grpc.insecure_channel(address, given)
            if credentials is None
            else grpc.secure_channel(address, credentials, given)
        )

    def method(self, name, kind="unary_unary"):
        request, answer = METHODS[name]
        path = f"/{oip.SERVICE}/{name}"
        return getattr(self.channel, kind)(path, request.SerializeToString, answer.FromString)

    def call(self, method, message=None, /, metadata=(), timeout=WAIT_S, **fields):
        request = METHODS[method][0](**fields) if message is None else message
        return self.method(method)(request, timeout=timeout, metadata=metadata)

    def stream(self, *requests, **options):
        return list(self.method("ModelStreamInfer", "stream_stream")(iter(requests), timeout=WAIT_S, **options))


@contextlib.contextmanager
def serving(*models, credentials=None, channel=None, **options):
    """A server with gRPC in a thread, and a client of it."""
    with live(*models, grpc_port=0, **options) as server:
        client = Client(server.server.grpc.port, credentials, **(channel or {}))
        with client.channel:
            yield server, client


@pytest.fixture(scope="module")
def tiny():
    with serving() as (server, client):
        yield server, client


@pytest.fixture
def client(tiny):
    return tiny[1]


def infer_request(images=None, **changes):
    """A request for the tiny model; ``None`` leaves a field away."""
    images = some_images(1) if images is None else images
    tensor = {"name": "image", "datatype": "FP32", "shape": images.shape}
    fields = {"model_name": "tiny", "inputs": [tensor], "raw_input_contents": [images.tobytes()]} | changes
    return METHODS["ModelInfer"][0](**{name: value for name, value in fields.items() if value is not None})


def in_place(images, **contents):
    """A request whose tensor stands in ``contents``."""
    contents = contents or {"fp32_contents": images.ravel()}
    tensor = {"name": "image", "datatype": "FP32", "shape": images.shape, "contents": contents}
    return infer_request(images, inputs=[tensor], raw_input_contents=None)


def logits_of(answer):
    (output,), (raw,) = answer.outputs, answer.raw_output_contents
    assert (output.name, output.datatype) == ("logits", "FP32")
    return np.frombuffer(raw, "<f4").reshape(output.shape)


def refused(code, call, *args, **options):
    """The error of a call, which holds nothing that is nobody's business."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, **options)
    text = caught.value.details()
    assert caught.value.code() is code, text
    for leak in ("Traceback", "/home", "/work", "mcruntime", "Error(", "0x", ".py"):
        assert leak not in text
    return caught.value


class Gate:
    """An engine that waits until it is let through."""

    def __init__(self):
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batches = []

    def __call__(self, images):
        self.batches.append(len(images))
        self.entered.release()
        assert self.open.wait(WAIT_S)
        return expected_logits(images)


@pytest.fixture
def gate():
    one = Gate()
    yield one
    one.open.set()


# ---------------------------------------------------------------------------------------------------- the messages


def described(descriptor):
    """Everything about a message that is seen on the wire, with what it is made of."""
    fields = {}
    for field in descriptor.fields:
        kind = field.message_type or field.enum_type
        oneof = field.containing_oneof
        fields[field.name] = (
            field.number, field.type, field.is_repeated, kind and kind.full_name, oneof and oneof.name,
            field.has_presence,
        )  # fmt: skip
    return fields


def all_messages(descriptors):
    for descriptor in descriptors:
        yield descriptor
        yield from all_messages(descriptor.nested_types)


OUR_FILE = oip.POOL.FindFileContainingSymbol(oip.SERVICE)
OURS = {one.full_name: one for one in all_messages(OUR_FILE.message_types_by_name.values())}
THEIRS = {
    one.full_name: one
    for module in (service_pb2, model_config_pb2)
    for one in all_messages(module.DESCRIPTOR.message_types_by_name.values())
}
IN_PART = {one.full_name for one in all_messages(model_config_pb2.DESCRIPTOR.message_types_by_name.values())}


@pytest.mark.parametrize("name", OURS)
def test_a_message_has_the_names_and_numbers_of_the_vendors_client(name):
    ours, theirs = described(OURS[name]), described(THEIRS[name])
    assert OURS[name].GetOptions().map_entry == THEIRS[name].GetOptions().map_entry
    assert ours == {field: theirs.get(field) for field in ours}
    if name not in IN_PART:  # of a model's configuration we have the part that we fill
        assert ours == theirs


def test_enumerations_have_the_names_and_numbers_of_the_vendors_client():
    def enums(file, messages):
        all_of = [*file.enum_types_by_name.values(), *(kind for one in messages for kind in one.enum_types)]
        return {kind.full_name: {value.name: value.number for value in kind.values} for kind in all_of}

    ours = enums(OUR_FILE, OURS.values())
    theirs = enums(model_config_pb2.DESCRIPTOR, THEIRS.values())
    assert len(ours) == 3
    assert ours == {name: theirs[name] for name in ours}


def test_methods_have_the_names_and_messages_of_the_vendors_client():
    def signatures(service):
        return {
            one.name: (
                one.input_type.full_name, one.output_type.full_name, one.client_streaming, one.server_streaming
            )
            for one in service.methods
        }  # fmt: skip

    ours = signatures(OUR_FILE.services_by_name["GRPCInferenceService"])
    theirs = signatures(service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"])
    assert ours == {name: theirs[name] for name in ours}
    left_out = ("SharedMemory", "TraceSetting", "LogSettings")
    assert all(any(word in name for word in left_out) for name in theirs.keys() - ours.keys())


def test_the_compiled_description_is_that_of_the_proto_file(tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc")
    out = tmp_path / oip.COMPILED
    proto = OIP_FOLDER / "open_inference.proto"
    assert protoc.main(["", f"-I{OIP_FOLDER}", f"--descriptor_set_out={out}", str(proto)]) == 0
    compiled, committed = (
        descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()) for path in (out, OIP_FOLDER / oip.COMPILED)
    )
    assert compiled == committed, "open_inference.proto was changed: run make stubs"


@pytest.mark.parametrize(
    "order", [("mcruntime.server.oip", "tritonclient.grpc"), ("tritonclient.grpc", "mcruntime.server.oip")]
)
def test_our_messages_and_the_vendors_client_live_in_one_process(order):
    program = "; ".join(f"import {name}" for name in order) + (
        "; from tritonclient.grpc import service_pb2"
        "; ours = mcruntime.server.oip.message('ModelReadyRequest')(name='a', version='2')"
        "; assert service_pb2.ModelReadyRequest.FromString(ours.SerializeToString()).version == '2'"
    )
    environment = {"PYTHONPATH": str(Path(mcruntime.server.run.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------- health and metadata


def test_live_ready_and_metadata_are_answered(client):
    assert client.call("ServerLive").live
    assert client.call("ServerReady").ready
    server = client.call("ServerMetadata")
    assert (server.name, list(server.extensions)) == ("mcdeploy", EXTENSIONS)
    assert server.version == importlib.metadata.version("mcdeploy")
    model = client.call("ModelMetadata", name="tiny", version="1")
    (image,), (logits,) = model.inputs, model.outputs
    assert (model.name, model.versions[:], model.platform) == ("tiny", ["1"], "onnxruntime_onnx")
    assert (image.name, image.datatype, image.shape[:]) == ("image", "FP32", [-1, 3, 8, 8])
    assert (logits.name, logits.datatype, logits.shape[:]) == ("logits", "FP32", [-1, 4])


@pytest.mark.parametrize(
    ("name", "version", "ready"), [("tiny", "", True), ("tiny", "1", True), ("tiny", "7", False), ("nope", "", False)]
)
def test_a_model_is_ready_or_not_but_never_an_error(client, name, version, ready):
    assert client.call("ModelReady", name=name, version=version).ready is ready


def test_the_configuration_is_the_one_of_rest(tiny):
    server, client = tiny
    config = client.call("ModelConfig", name="tiny").config
    tree = json_format.MessageToDict(config, preserving_proto_field_name=True)
    rest = model_config(server.app.models.find("tiny"))
    assert (tree["name"], tree["backend"], tree["max_batch_size"]) == ("tiny", "onnxruntime", 4)
    assert tree["version_policy"] == rest["version_policy"]
    assert tree["output"][0]["label_filename"] == "labels.txt"
    assert [int(size) for size in tree["input"][0]["dims"]] == rest["input"][0]["dims"]
    assert tree["dynamic_batching"]["preferred_batch_size"] == rest["dynamic_batching"]["preferred_batch_size"]
    theirs = model_config_pb2.ModelConfig.FromString(config.SerializeToString())
    assert theirs.WhichOneof("scheduling_choice") == "dynamic_batching"


def test_statistics_count_what_was_answered_and_what_failed():
    with serving() as (_, client):
        client.call("ModelInfer", infer_request(some_images(3)))
        refused(
            grpc.StatusCode.INVALID_ARGUMENT, client.call, "ModelInfer", infer_request(raw_input_contents=[b"1234"])
        )
        for fields in ({}, {"name": "tiny"}, {"name": "tiny", "version": "1"}):
            (stats,) = client.call("ModelStatistics", **fields).model_stats
            assert (stats.name, stats.version, stats.inference_count, stats.execution_count) == ("tiny", "1", 3, 1)
            assert stats.inference_stats.success.count == 1
            assert stats.inference_stats.fail.count == 1
            assert stats.inference_stats.success.ns > 0
            assert [batch.batch_size for batch in stats.batch_stats] == [3]
        refused(grpc.StatusCode.NOT_FOUND, client.call, "ModelStatistics", name="nope")


# -------------------------------------------------------------------------------------------------------- inference


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("make", [infer_request, in_place])
def test_logits_are_answered_for_both_forms_of_a_tensor(client, make, count):
    images = some_images(count, seed=count)
    answer = client.call("ModelInfer", make(images))
    assert (answer.model_name, answer.model_version, answer.id) == ("tiny", "1", "")
    np.testing.assert_allclose(logits_of(answer), expected_logits(images), rtol=0, atol=1e-6)


def test_the_id_and_a_version_come_back(client):
    answer = client.call("ModelInfer", infer_request(id="r-1", model_version="1"))
    assert (answer.id, answer.model_version) == ("r-1", "1")


def test_fields_that_this_server_does_not_know_are_ignored_and_do_not_shift_the_numbers(client):
    images = some_images(2)
    request = in_place(images)
    contents = request.inputs[0].contents
    contents.MergeFromString(b"\xf8\x01\x07")  # field 31
    answer = client.call("ModelInfer", request)
    np.testing.assert_allclose(logits_of(answer), expected_logits(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("choice", ["int64_param", "uint64_param"])
def test_classification_answers_strings_of_value_index_and_label(client, choice):
    images = some_images(2)
    output = {"name": "logits", "parameters": {"classification": {choice: 2}}}
    answer = client.call("ModelInfer", infer_request(images, outputs=[output]))
    assert (answer.outputs[0].datatype, answer.outputs[0].shape[:]) == ("BYTES", [2, 2])
    raw, found = answer.raw_output_contents[0], []
    while raw:
        size = int.from_bytes(raw[:4], "little")
        found.append(raw[4 : 4 + size].decode())
        raw = raw[4 + size :]
    for text, (row, place) in zip(found, [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        logits = expected_logits(images)[row]
        best = int(np.argsort(-logits)[place])
        assert text.split(":")[1:] == [str(best), LABELS[best]]
        assert float(text.split(":")[0]) == pytest.approx(logits[best], abs=1e-5)


def test_parameters_of_other_servers_are_tolerated(client):
    parameters = {
        "priority": {"uint64_param": 3}, "timeout": {"int64_param": 5_000_000}, "text": {"string_param": "x"},
        "yes": {"bool_param": True}, "half": {"double_param": 0.5},
    }  # fmt: skip
    assert logits_of(client.call("ModelInfer", infer_request(parameters=parameters))).shape == (1, 4)


IMAGE = some_images(1)
NAN = IMAGE.copy()
NAN[0, 1, 2, 3] = np.nan
NO_CLASSES = {"name": "logits", "parameters": {"classification": {"int64_param": 0}}}
WRONG = {
    "name": {"name": "wrong", "datatype": "FP32", "shape": [1, 3, 8, 8]},
    "datatype": {"name": "image", "datatype": "FP16", "shape": [1, 3, 8, 8]},
    "shape": {"name": "image", "datatype": "FP32", "shape": [1, 3, 4, 16]},
    "batch": {"name": "image", "datatype": "FP32", "shape": [5, 3, 8, 8]},
    "negative": {"name": "image", "datatype": "FP32", "shape": [-1, 3, 8, 8]},
    "huge": {"name": "image", "datatype": "FP32", "shape": [1 << 62, 3, 8, 8]},
    "shared": {
        "name": "image", "datatype": "FP32", "shape": [1, 3, 8, 8],
        "parameters": {"shared_memory_region": {"string_param": "region"}},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (infer_request(inputs=[]), "expected 1 inputs but got 0 inputs for model 'tiny'"),
        (infer_request(inputs=[WRONG["name"]]), "unexpected inference input 'wrong' for model 'tiny'"),
        (infer_request(inputs=[WRONG["datatype"]]), "data-type is 'FP16', but model 'tiny' expects 'FP32'"),
        (infer_request(inputs=[WRONG["shape"]]), "Expected [-1,3,8,8], got [1,3,4,16]"),
        (infer_request(inputs=[WRONG["batch"]]), "batch-size must be <= 4 for 'tiny'"),
        (infer_request(inputs=[WRONG["negative"]]), "Expected [-1,3,8,8], got [-1,3,8,8]"),
        (infer_request(inputs=[WRONG["huge"]]), "batch-size must be <= 4 for 'tiny'"),
        (infer_request(inputs=[WRONG["shared"]]), "shared memory is not supported"),
        (infer_request(raw_input_contents=None), "unable to find data for input tensor 'image' for model 'tiny'"),
        (infer_request(raw_input_contents=[IMAGE.tobytes()] * 2), "expected 1 raw_input_contents"),
        (infer_request(raw_input_contents=[IMAGE.tobytes()[:-4]]), "Expected 768, got 764"),
        (infer_request(raw_input_contents=[IMAGE.tobytes() + b"1234"]), "Expected 768, got 772"),
        (infer_request(NAN), "holds NaN or infinite values"),
        (in_place(IMAGE, fp32_contents=IMAGE.ravel()[:-1]), "Expected 768, got 764"),
        (in_place(IMAGE, int_contents=[1] * 192), "of type 'INT32', expected datatype 'FP32'"),
        (in_place(IMAGE, fp32_contents=IMAGE.ravel(), bool_contents=[True]), "of type 'BOOL'"),
        (infer_request(inputs=in_place(IMAGE).inputs), "contents field must not be specified when using raw"),
        (infer_request(outputs=[{"name": "nope"}]), "unexpected inference output 'nope' for model 'tiny'"),
        (infer_request(outputs=[{"name": "logits"}] * 2), "requested more than once"),
        (infer_request(outputs=[NO_CLASSES]), "parameter 'classification' must be a whole number of at least 1"),
        (infer_request(parameters={"timeout": {"string_param": "soon"}}), "'timeout' must be a whole number"),
        (infer_request(parameters={"timeout": {}}), "parameter 'timeout' has no value"),
        (infer_request(id="x" * 1025), "'id' is longer than 1024 characters"),
        (infer_request(model_version="one"), "version should be an integral value"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_an_invalid_argument_that_says_what_is_wrong(client, request_, text):
    assert text in refused(grpc.StatusCode.INVALID_ARGUMENT, client.call, "ModelInfer", request_).details()


def test_bytes_that_are_no_message_are_an_invalid_argument(client):
    method = client.channel.unary_unary(f"/{oip.SERVICE}/ModelInfer")
    error = refused(grpc.StatusCode.INVALID_ARGUMENT, method, b"\xff\xff\xff", timeout=WAIT_S)
    assert error.details() == "the request is not a ModelInferRequest"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ModelMetadata", {"name": "nope"}),
        ("ModelConfig", {"name": "nope"}),
        ("ModelMetadata", {"name": "tiny", "version": "7"}),
        ("ModelInfer", {"model_name": "nope"}),
        ("ModelInfer", {"model_name": "../tiny"}),
    ],
)
def test_what_is_not_there_is_not_found(client, name, fields):
    text = refused(grpc.StatusCode.NOT_FOUND, client.call, name, **fields).details()
    assert text.startswith("Request for unknown model: ")


@pytest.mark.parametrize(
    "name", ["TraceSetting", "LogSettings", "SystemSharedMemoryStatus", "CudaSharedMemoryRegister", "Unheard"]
)
def test_methods_that_this_server_does_not_offer_are_unimplemented(client, name):
    method = client.channel.unary_unary(f"/{oip.SERVICE}/{name}")
    refused(grpc.StatusCode.UNIMPLEMENTED, method, b"", timeout=WAIT_S)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (McdeployError("/srv/secret/model.onnx: broken"), "the model could not answer this request"),
        (ZeroDivisionError("/srv/secret"), "internal server error"),
    ],
)
def test_an_error_of_the_engine_tells_a_client_nothing_of_the_inside(error, text):
    def fail(images):
        raise error

    with serving(tiny_model(fail)) as (_, client):
        assert refused(grpc.StatusCode.INTERNAL, client.call, "ModelInfer", infer_request()).details() == text
        (answer,) = client.stream(infer_request(id="s"))
        assert (answer.error_message, answer.infer_response.id) == (text, "s")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error_and_to_wild_pixels_the_answer(value):
    text = "the model could not answer this request"
    with serving(tiny_model(lambda images: np.full((len(images), len(LABELS)), value, np.float32))) as (_, client):
        assert refused(grpc.StatusCode.INTERNAL, client.call, "ModelInfer", infer_request()).details() == text
        (answer,) = client.stream(infer_request())
        assert answer.error_message == text
        wild = np.full((1, 3, 8, 8), 1e30, np.float32)
        assert not np.isfinite(logits_of(client.call("ModelInfer", infer_request(wild)))).any()
        (stats,) = client.call("ModelStatistics", name="tiny").model_stats
        assert stats.inference_stats.fail.count == 2


def test_requests_that_failed_keep_nothing_until_a_garbage_collection():
    def fail(images):
        raise McdeployError("no")

    def calls_left():
        return [one for one in gc.get_objects() if type(one) is grpc_calls.Call]

    with serving(tiny_model(fail)) as (_, client):
        gc.collect()
        gc.disable()
        try:
            for wrong in (infer_request(), infer_request(model_name="nope"), infer_request(raw_input_contents=[b"1"])):
                with pytest.raises(grpc.RpcError):
                    client.call("ModelInfer", wrong)
                assert client.stream(wrong)[0].error_message
            with pytest.raises(grpc.RpcError):
                client.call("ModelConfig", name="nope")
            until(lambda: not calls_left())
        finally:
            gc.enable()


# -------------------------------------------------------------------------------------------- time, order and limits


def test_requests_of_many_calls_are_put_together_and_each_gets_its_own_answer(gate):
    with serving(tiny_model(gate)) as (server, client):
        batches = [some_images(1 + seed % 3, seed=seed) for seed in range(9)]
        calls = [client.method("ModelInfer").future(infer_request(batches[0], id="0"))]
        assert gate.entered.acquire(timeout=WAIT_S)
        calls += [
            client.method("ModelInfer").future(infer_request(images, id=str(number)))
            for number, images in enumerate(batches[1:], 1)
        ]
        batcher = server.app.models.find("tiny").batcher
        until(lambda: batcher.num_waiting == 8)
        gate.open.set()
        for number, (call, images) in enumerate(zip(calls, batches, strict=True)):
            answer = call.result(timeout=WAIT_S)
            assert answer.id == str(number)
            np.testing.assert_allclose(logits_of(answer), expected_logits(images), rtol=0, atol=1e-6)
        assert gate.batches == [1, sum(map(len, batches[1:]))]


def test_a_request_that_is_alone_is_run_in_its_own_thread_and_one_of_several_is_not():
    names, room = [], threading.Semaphore(1)

    def infer(images):
        names.append(threading.current_thread().name)
        with room:
            return expected_logits(images)

    with serving(tiny_model(infer)) as (server, client):
        until(lambda: client.call("ModelInfer", infer_request()) and names[-1].startswith("grpc"))
        slow = {"timeout": {"int64_param": 10_000_000}}
        client.call("ModelInfer", infer_request(parameters=slow))
        assert names[-1].startswith("infer")  # its deadline must be kept while it runs
        with room:
            calls = [client.method("ModelInfer").future(infer_request()) for _ in range(3)]
            until(lambda: server.app.in_flight == 3)
        assert all(call.result(timeout=WAIT_S) for call in calls)
        assert names[-1].startswith("infer")


def test_the_clients_own_deadline_takes_its_request_out_of_the_queue(gate):
    with serving(tiny_model(gate)) as (server, client):
        first = client.method("ModelInfer").future(infer_request())
        assert gate.entered.acquire(timeout=WAIT_S)
        refused(
            grpc.StatusCode.DEADLINE_EXCEEDED, client.call, "ModelInfer", infer_request(some_images(2)), timeout=0.2
        )
        batcher = server.app.models.find("tiny").batcher
        until(lambda: batcher.num_waiting == 0)
        gate.open.set()
        assert first.result(timeout=WAIT_S)
        client.call("ModelInfer", infer_request(some_images(3)))
        assert gate.batches == [1, 3]  # never run


def test_the_timeout_of_a_request_and_of_the_server_are_deadlines(gate):
    slow = {"timeout": {"int64_param": 100_000}}
    with serving(tiny_model(gate), timeout_s=20) as (_, client):
        error = refused(grpc.StatusCode.DEADLINE_EXCEEDED, client.call, "ModelInfer", infer_request(parameters=slow))
        assert error.details() == "Request timeout expired"
        gate.open.set()
    shut = Gate()
    with serving(tiny_model(shut), timeout_s=0.1) as (_, client):
        error = refused(grpc.StatusCode.DEADLINE_EXCEEDED, client.call, "ModelInfer", infer_request())
        assert error.details() == "Request timeout expired"
        shut.open.set()


def test_a_cancelled_call_is_taken_out_of_the_queue(gate):
    with serving(tiny_model(gate)) as (server, client):
        first = client.method("ModelInfer").future(infer_request())
        assert gate.entered.acquire(timeout=WAIT_S)
        second = client.method("ModelInfer").future(infer_request())
        batcher = server.app.models.find("tiny").batcher
        until(lambda: batcher.num_waiting == 1)
        second.cancel()
        until(lambda: batcher.num_waiting == 0)
        until(lambda: server.app.in_flight == 1)
        gate.open.set()
        assert first.result(timeout=WAIT_S)
        assert gate.batches == [1]


def test_a_full_queue_is_unavailable_and_says_when_to_come_back(gate):
    with serving(tiny_model(gate, max_queue=1)) as (server, client):
        calls = [client.method("ModelInfer").future(infer_request())]
        assert gate.entered.acquire(timeout=WAIT_S)
        calls.append(client.method("ModelInfer").future(infer_request()))
        until(lambda: server.app.models.find("tiny").batcher.num_waiting == 1)
        error = refused(grpc.StatusCode.UNAVAILABLE, client.call, "ModelInfer", infer_request())
        assert error.details() == "Exceeds maximum queue size; try again"
        assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        gate.open.set()
        assert all(call.result(timeout=WAIT_S) for call in calls)


def test_calls_beyond_the_limit_are_refused_and_those_before_it_are_not_hurt(gate):
    with serving(tiny_model(gate), max_connections=2) as (server, client):
        calls = [client.method("ModelInfer").future(infer_request()) for _ in range(2)]
        until(lambda: server.app.in_flight == 2)
        other = Client(server.server.grpc.port)
        with other.channel:
            error = refused(grpc.StatusCode.UNAVAILABLE, other.call, "ModelInfer", infer_request())
            assert error.details() == "the server has as many calls as it takes; try again"
            refused(grpc.StatusCode.UNAVAILABLE, other.stream, infer_request())
            assert other.call("ServerLive").live
            assert other.call("ServerReady").ready
            check = health_pb2_grpc.HealthStub(other.channel).Check
            assert check(health_pb2.HealthCheckRequest(), timeout=WAIT_S).status == SERVING
            gate.open.set()
            assert all(call.result(timeout=WAIT_S) for call in calls)

            def answered():
                with contextlib.suppress(grpc.RpcError):
                    return other.call("ModelInfer", infer_request())

            until(answered)
            assert other.stream(infer_request())


def test_one_connection_cannot_take_the_calls_of_all(gate):
    with serving(tiny_model(gate), max_connections=4) as (server, client):
        calls = [client.method("ModelInfer").future(infer_request(), timeout=WAIT_S) for _ in range(3)]
        until(lambda: server.app.in_flight == 3)
        error = refused(grpc.StatusCode.UNAVAILABLE, client.call, "ModelInfer", infer_request())
        assert error.details() == "this connection has as many calls as one may have; try again"
        other = Client(server.server.grpc.port)
        with other.channel:
            assert other.call("ServerMetadata").name == "mcdeploy"
        gate.open.set()
        assert all(call.result(timeout=WAIT_S) for call in calls)
        assert client.call("ModelInfer", infer_request())


def test_calls_near_the_limit_are_all_answered():
    with serving(max_connections=128) as (_, client):
        infer, room, codes = client.method("ModelInfer"), threading.Semaphore(94), queue.SimpleQueue()

        def done(call):
            codes.put(call.code())
            room.release()

        for _ in range(600):
            assert room.acquire(timeout=WAIT_S)
            infer.future(infer_request(), timeout=WAIT_S).add_done_callback(done)
        assert {codes.get(timeout=WAIT_S) for _ in range(600)} == {grpc.StatusCode.OK}


def test_connections_beyond_the_limit_are_not_answered_until_another_is_closed():
    with serving(max_connections=1) as (server, client):
        assert client.call("ServerLive").live
        other = Client(server.server.grpc.port)
        with other.channel:
            with pytest.raises(grpc.RpcError) as caught:
                other.call("ServerLive", timeout=0.5)
            assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            client.channel.close()

            def answered():
                with contextlib.suppress(grpc.RpcError):
                    return other.call("ServerLive").live

            until(answered)


def test_a_model_that_is_loaded_again_and_again_answers_every_call(tmp_path):
    control = keys_in(tmp_path, CONTROL_KEY, "control")
    images, over = some_images(2), threading.Event()
    with serving(control=control, sources=lambda: [source()]) as (server, client):
        first = server.app.models.find("tiny")

        def ask():
            answers = 0
            while not over.is_set():
                answer = client.call("ModelInfer", infer_request(images))
                np.testing.assert_allclose(logits_of(answer), expected_logits(images), rtol=0, atol=1e-6)
                answers += 1
            return answers

        with ThreadPoolExecutor(4) as pool:
            askers = [pool.submit(ask) for _ in range(4)]
            try:
                for _ in range(20):
                    client.call("RepositoryModelLoad", model_name="tiny", metadata=(("x-control-key", CONTROL_KEY),))
            finally:
                over.set()
            assert sum(asker.result() for asker in askers) > 20
        assert server.app.models.find("tiny") is not first


def test_a_request_for_a_model_that_closes_is_unavailable_or_goes_to_the_next():
    with serving() as (server, client):
        models, images = server.app.models, some_images(1)
        before = models.find("tiny")
        before.batcher.close()
        text = refused(grpc.StatusCode.UNAVAILABLE, client.call, "ModelInfer", infer_request(images)).details()
        assert text == "the model is being unloaded; try again"
        found = iter([before, tiny_model()])
        models.find = lambda name, version="": next(found)
        answer = client.call("ModelInfer", infer_request(images))
        np.testing.assert_allclose(logits_of(answer), expected_logits(images), rtol=0, atol=1e-6)
        del models.find


def test_what_is_not_done_when_the_time_to_stop_is_over_is_cut_off_and_counted(gate):
    with serving(tiny_model(gate), drain_s=0.2) as (server, client):
        calls = [client.method("ModelInfer").future(infer_request()) for _ in range(2)]
        until(lambda: server.app.in_flight == 2)
        server.app.draining = True
        server.server.should_exit = True
        for call in calls:
            refused(grpc.StatusCode.UNAVAILABLE, call.result, timeout=WAIT_S)
        gate.open.set()
    assert server.server.num_cut_off == 2


def test_messages_over_the_limit_are_refused_whole_or_packed():
    options = {"grpc.max_send_message_length": -1}
    with serving(max_body_bytes=100_000, channel=options) as (_, client):
        big = infer_request(raw_input_contents=[bytes(100_001)])
        for how in (None, grpc.Compression.Gzip, grpc.Compression.Deflate):
            call = client.method("ModelInfer")
            refused(grpc.StatusCode.RESOURCE_EXHAUSTED, call, big, timeout=WAIT_S, compression=how)
        images = some_images(4)
        answer = client.method("ModelInfer")(infer_request(images), compression=grpc.Compression.Gzip)
        np.testing.assert_allclose(logits_of(answer), expected_logits(images), rtol=0, atol=1e-6)


def test_a_message_that_unpacks_to_far_more_than_allowed_takes_no_memory():
    size = 256 << 20
    with serving(max_body_bytes=1 << 20) as (server, client):
        client.call("ServerLive")
        program = (
            "import grpc\n"
            f"channel = grpc.insecure_channel('127.0.0.1:{server.server.grpc.port}',"
            " [('grpc.max_send_message_length', -1)])\n"
            "try:\n"
            f"    channel.unary_unary('/{oip.SERVICE}/ModelInfer')(bytes({size}), compression=grpc.Compression.Gzip)\n"
            "except grpc.RpcError as error:\n"
            "    print(error.code().name, error.details())"
        )
        before = psutil.Process().memory_info().rss
        peak = [before]
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as attacker:
            while attacker.poll() is None:
                peak.append(psutil.Process().memory_info().rss)
                time.sleep(0.002)
            assert attacker.stdout.read() == "RESOURCE_EXHAUSTED Decompressed message larger than max\n"
        assert max(peak) - before < size // 8
        assert client.call("ServerLive").live


def test_bytes_of_all_messages_together_are_bounded(gate):
    images = some_images(4)
    with serving(tiny_model(gate), max_body_bytes=8000, max_inflight_bytes=8000) as (server, client):
        calls = [client.method("ModelInfer").future(infer_request(images)) for _ in range(2)]
        until(lambda: server.app.budget.used > 6000)
        text = refused(grpc.StatusCode.UNAVAILABLE, client.call, "ModelInfer", infer_request(images)).details()
        assert text == "too many bytes of requests are being read; try again"
        gate.open.set()
        assert all(call.result(timeout=WAIT_S) for call in calls)
        until(lambda: server.app.budget.used == 0)


@pytest.mark.parametrize("path", [f"/{oip.SERVICE}/ModelInfer", HEALTH])
def test_a_message_that_does_not_arrive_in_time_ends_its_call(path):
    with serving(body_timeout_s=0.2) as (server, client):
        stop = threading.Event()

        def never():
            stop.wait(WAIT_S)
            yield b""

        call = client.channel.stream_unary(path).future(never())  # headers, and no message
        try:
            with pytest.raises(grpc.RpcError) as caught:
                call.result(timeout=WAIT_S)
            assert caught.value.code() is grpc.StatusCode.CANCELLED
        finally:
            stop.set()
        assert client.call("ModelInfer", infer_request(), timeout=WAIT_S)
        assert server.app.in_flight == 0


def test_probes_of_one_connection_that_say_nothing_leave_room_for_everybody_else():
    with serving(max_connections=4) as (server, client):
        stop = threading.Event()

        def never():
            stop.wait(WAIT_S)
            yield b""

        calls = [client.channel.stream_unary(HEALTH).future(never()) for _ in range(4 + RESERVED + 8)]
        try:
            until(lambda: sum(call.done() for call in calls) >= len(calls) - RESERVED * 3 // 4)
            codes = {call.code() for call in calls if call.done()}
            assert codes <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
            other = Client(server.server.grpc.port)
            with other.channel:
                assert other.call("ServerLive").live
                assert other.call("ModelInfer", infer_request())
        finally:
            stop.set()
            for call in calls:
                call.cancel()


def test_a_key_that_is_taken_away_ends_its_streams_too(tmp_path):
    path = tmp_path / "keys"
    path.write_text("a" * 32)
    keys = Keys(path)
    with serving(keys=keys) as (_, client):
        requests: queue.SimpleQueue = queue.SimpleQueue()
        metadata = (("authorization", "Bearer " + "a" * 32),)
        answers = client.method("ModelStreamInfer", "stream_stream")(
            iter(requests.get, None), metadata=metadata, timeout=WAIT_S
        )
        requests.put(infer_request())
        assert not next(answers).error_message
        path.write_text("b" * 32)
        keys.read_again()
        requests.put(infer_request())
        assert "an API key is needed" in next(answers).error_message
        requests.put(None)


def test_a_connection_that_says_nothing_is_closed():
    with serving(body_timeout_s=0.3) as (server, client):
        with socket.create_connection(("127.0.0.1", server.server.grpc.port), WAIT_S) as silent:
            assert rest(silent).startswith(b"\x00\x00")  # what the server says first, and then the end
        assert client.call("ServerLive").live


def test_a_slow_engine_is_no_slow_message(gate):
    with serving(tiny_model(gate), body_timeout_s=0.1) as (_, client):
        call = client.method("ModelInfer").future(infer_request())
        assert gate.entered.acquire(timeout=WAIT_S)
        time.sleep(0.3)
        gate.open.set()
        assert call.result(timeout=WAIT_S)


def frame(kind, flags, payload):
    """Of HTTP/2, on its first stream; settings are of none."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + (kind != 4).to_bytes(4, "big") + payload


@pytest.mark.parametrize("path", [b"/\xff\xfe/x", "/Ä/Ö".encode(), b"/a\nb", b"", b"/" + b"x" * 90])
@pytest.mark.parametrize(
    "header", [(b"x-request-id", b"\xff\xfe"), (b"x-\xff", b"a"), (b"a-bin", b"!"), (b"b", b"\x00")]
)
def test_paths_and_metadata_that_no_client_sends_do_not_stop_the_server(client, tiny, path, header):
    pairs = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"),
        (b"content-type", b"application/grpc"), (b"te", b"trailers"), header,
    ]  # fmt: skip
    block = b"".join(b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value for name, value in pairs)
    with socket.create_connection(("127.0.0.1", tiny[0].server.grpc.port), WAIT_S) as raw:
        raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, b""))
        raw.sendall(frame(1, 4, block) + frame(0, 1, bytes(5)))
        found = b""
        while b"grpc-status" not in found and (chunk := raw.recv(1 << 16)):
            found += chunk
    assert client.call("ServerLive").live
    assert client.call("ModelInfer", infer_request(), timeout=WAIT_S)


# ------------------------------------------------------------------------------------------------------------ streams


def test_a_stream_is_answered_in_order_and_its_requests_are_put_together(gate):
    with serving(tiny_model(gate)) as (server, client):
        batches = [some_images(1 + seed % 2, seed=seed) for seed in range(6)]
        requests = queue.SimpleQueue()
        answers = client.method("ModelStreamInfer", "stream_stream")(iter(requests.get, None), timeout=WAIT_S)
        requests.put(infer_request(batches[0], id="0"))
        assert gate.entered.acquire(timeout=WAIT_S)
        for number, images in enumerate(batches[1:], 1):
            requests.put(infer_request(images, id=str(number)))
        requests.put(None)
        until(lambda: server.app.models.find("tiny").batcher.num_waiting == 5)
        gate.open.set()
        for number, (answer, images) in enumerate(zip(answers, batches, strict=True)):
            assert (answer.error_message, answer.infer_response.id) == ("", str(number))
            assert answer.infer_response.parameters["triton_final_response"].bool_param
            np.testing.assert_allclose(logits_of(answer.infer_response), expected_logits(images), rtol=0, atol=1e-6)
        assert gate.batches == [1, sum(map(len, batches[1:]))]


def test_an_error_in_a_stream_is_an_answer_and_the_stream_goes_on(client):
    first, wrong, last = client.stream(
        infer_request(id="1"), infer_request(id="2", model_name="nope"), infer_request(id="3")
    )
    assert (first.error_message, last.error_message) == ("", "")
    assert wrong.error_message == "Request for unknown model: 'nope' is not found"
    assert [one.infer_response.id for one in (first, wrong, last)] == ["1", "2", "3"]


def test_a_stream_of_more_requests_than_may_be_in_flight_is_answered_whole(client):
    images = some_images(1)
    answers = client.stream(*[infer_request(images, id=str(number)) for number in range(100)])
    assert [one.infer_response.id for one in answers] == [str(number) for number in range(100)]


def test_a_cancelled_stream_leaves_nothing_behind(gate):
    with serving(tiny_model(gate)) as (server, client):
        stop = threading.Event()

        def requests():
            for _ in range(5):
                yield infer_request()
            stop.wait(WAIT_S)

        call = client.method("ModelStreamInfer", "stream_stream")(requests(), timeout=WAIT_S)
        assert gate.entered.acquire(timeout=WAIT_S)
        batcher = server.app.models.find("tiny").batcher
        until(lambda: batcher.num_waiting + sum(gate.batches) == 5)
        call.cancel()
        stop.set()
        until(lambda: batcher.num_waiting == 0 and server.app.in_flight == 0)
        gate.open.set()
        assert client.call("ModelInfer", infer_request(some_images(3)))
        assert len(gate.batches) == 2  # what waited was never run
        assert gate.batches[1] == 3


def test_the_thread_that_was_idle_last_takes_the_next_call_and_all_end_after_the_last():
    threads, both = Threads("test-pool"), threading.Barrier(2)
    for _ in range(2):
        pair = [threads.submit(both.wait, WAIT_S) for _ in range(2)]
        assert sorted(future.result(timeout=WAIT_S) for future in pair) == [0, 1]
    until(lambda: len(threads._idle) == 2)
    found = set()
    for _ in range(20):
        found.add(threads.submit(threading.get_ident).result(timeout=WAIT_S))
        until(lambda: len(threads._idle) == 2)
    assert len(found) == 1
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 1, 0).result(timeout=WAIT_S)
    busy = threading.Event()
    last = threads.submit(busy.wait, WAIT_S)
    threads.shutdown()
    with pytest.raises(RuntimeError):
        threads.submit(print)
    busy.set()
    assert last.result(timeout=WAIT_S)
    until(lambda: not [one for one in threading.enumerate() if one.name.startswith("test-pool")])


class OverContext:
    """A call that ends when it is told to."""

    def __init__(self):
        self.ends = []

    def add_callback(self, end):
        self.ends.append(end)
        return True


def test_a_stream_that_ends_while_a_message_arrives_lets_its_thread_go(tiny):
    server, _ = tiny
    service = Service(server.app, server.server.grpc._bridge)
    context = OverContext()

    def requests():
        for end in context.ends:
            end()
        yield infer_request().SerializeToString()

    answers = queue.SimpleQueue()
    handler = threading.Thread(target=lambda: answers.put(list(service._stream(requests(), context))), daemon=True)
    handler.start()
    handler.join(WAIT_S / 2)
    assert not handler.is_alive()
    assert answers.get() == []


@pytest.fixture
def impatient(monkeypatch, gate):
    monkeypatch.setattr(grpc_calls, "STREAM_IDLE_S", 0.3)
    with serving(tiny_model(gate), body_timeout_s=0.1) as (server, client):
        yield server, client


def test_a_stream_without_messages_is_ended_and_one_that_awaits_answers_is_not(impatient, gate):
    server, client = impatient
    stop = threading.Event()

    def requests():
        yield infer_request()
        stop.wait(WAIT_S)

    answers = client.method("ModelStreamInfer", "stream_stream")(requests(), timeout=WAIT_S)
    try:
        assert gate.entered.acquire(timeout=WAIT_S)
        time.sleep(0.6)  # longer than it may be idle
        gate.open.set()
        assert next(answers).error_message == ""
        error = refused(grpc.StatusCode.DEADLINE_EXCEEDED, next, answers)
        assert error.details() == "the stream had no message for 0.3 s; open another"
    finally:
        stop.set()
    until(lambda: not [one for one in threading.enumerate() if one.name == "grpc-stream"])
    assert client.stream(infer_request())
    assert server.app.in_flight == 0


def test_reflection_without_questions_is_ended(impatient):
    _, client = impatient
    stop = threading.Event()

    def questions():
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        stop.wait(WAIT_S)

    answers = reflection_pb2_grpc.ServerReflectionStub(client.channel).ServerReflectionInfo(questions(), timeout=WAIT_S)
    try:
        assert next(answers).list_services_response.service
        error = refused(grpc.StatusCode.DEADLINE_EXCEEDED, next, answers)
        assert error.details() == "the stream had no message for 0.3 s; open another"
    finally:
        stop.set()


def test_a_question_to_reflection_that_is_no_message_is_an_invalid_argument(client):
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    ask = client.channel.stream_stream(path)
    error = refused(grpc.StatusCode.INVALID_ARGUMENT, list, ask(iter([b"\xff"]), timeout=WAIT_S))
    assert error.details() == "the request is not a ServerReflectionRequest"


# --------------------------------------------------------------------------------------------------------------- keys


def keys_in(folder, key, name="keys"):
    path = folder / name
    path.write_text(f"{key}\n")
    path.chmod(0o600)
    return Keys(path)


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    keys, control = keys_in(folder, KEY), keys_in(folder, CONTROL_KEY, "control")
    with serving(keys=keys, control=control, sources=lambda: [source()]) as (_, client):
        yield client


def source():
    return Source("tiny", "1", tiny_model, lambda: "stamp")


UNLOCKED = ("ServerLive", "ServerReady")
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


@pytest.mark.parametrize(
    "path", [f"/{oip.SERVICE}/{name}" for name in (*METHODS, "Unheard") if name not in UNLOCKED] + [REFLECTION, "/a/b"]
)
@pytest.mark.parametrize("metadata", [(), (("x-api-key", KEY[:-1]),), (("authorization", f"Basic {KEY}"),)])
def test_without_a_key_nothing_is_answered_whatever_the_path(locked, path, metadata):
    text = refused(
        grpc.StatusCode.UNAUTHENTICATED, locked.channel.unary_unary(path), b"", timeout=WAIT_S, metadata=metadata
    ).details()
    assert text == "an API key is needed: authorization: Bearer KEY"


@pytest.mark.parametrize("metadata", [(("x-api-key", KEY),), (("authorization", f"Bearer {KEY}"),)])
def test_with_a_key_calls_and_streams_are_answered(locked, metadata):
    assert locked.call("ModelInfer", infer_request(), metadata=metadata).model_name == "tiny"
    assert len(locked.stream(infer_request(), metadata=metadata)) == 1
    with pytest.raises(grpc.RpcError) as caught:
        locked.channel.unary_unary(f"/{oip.SERVICE}/Unheard")(b"", timeout=WAIT_S, metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_health_needs_no_key(locked):
    assert locked.call("ServerLive").live
    assert locked.call("ServerReady").ready
    stub = health_pb2_grpc.HealthStub(locked.channel)
    assert stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S).status == SERVING


@pytest.mark.parametrize("name", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_loading_and_unloading_need_the_control_key_beside_the_other(locked, name):
    own = (("x-api-key", KEY),)
    for metadata in (own, (*own, ("x-control-key", KEY))):
        refused(grpc.StatusCode.PERMISSION_DENIED, locked.call, name, model_name="tiny", metadata=metadata)
    assert locked.call("ModelReady", name="tiny", metadata=own).ready


def test_with_the_control_key_models_come_and_go_and_the_index_says_so(locked):
    metadata = (("x-api-key", KEY), ("x-control-key", CONTROL_KEY))

    def index(**fields):
        models = locked.call("RepositoryIndex", metadata=metadata, **fields).models
        return [(one.name, one.version, one.state) for one in models]

    assert index() == [("tiny", "1", "READY")]
    locked.call("RepositoryModelUnload", model_name="tiny", metadata=metadata)
    try:
        assert index() == [("tiny", "1", "UNAVAILABLE")]
        assert index(ready=True) == []
        refused(grpc.StatusCode.NOT_FOUND, locked.call, "ModelInfer", infer_request(), metadata=metadata)
        assert not locked.call("ServerReady").ready
    finally:
        locked.call("RepositoryModelLoad", model_name="tiny", metadata=metadata)
    assert index(ready=True) == [("tiny", "1", "READY")]
    assert locked.call("ModelInfer", infer_request(), metadata=metadata)


def test_a_load_takes_a_name_and_nothing_else(locked):
    metadata = (("x-api-key", KEY), ("x-control-key", CONTROL_KEY))
    for parameters in ({"config": {"string_param": "{}"}}, {"file:1/model.onnx": {"bytes_param": b"x"}}):
        error = refused(
            grpc.StatusCode.INVALID_ARGUMENT, locked.call, "RepositoryModelLoad", model_name="tiny", metadata=metadata,
            parameters=parameters,
        )  # fmt: skip
        assert "load takes no parameters here" in error.details()
    error = refused(
        grpc.StatusCode.INVALID_ARGUMENT, locked.call, "RepositoryModelLoad", model_name="../x", metadata=metadata
    )
    assert "failed to poll from model repository" in error.details()


def test_without_control_keys_loading_is_off(client):
    text = refused(grpc.StatusCode.PERMISSION_DENIED, client.call, "RepositoryModelLoad", model_name="tiny").details()
    assert text == "loading and unloading models is switched off on this server"


# ---------------------------------------------------------------------------------------------------------------- TLS


class Authority:
    """A certificate authority for the length of a test."""

    def __init__(self, folder):
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.certificate = self._sign(self.name, self.key.public_key(), x509.BasicConstraints(True, None))
        self.pem = self.certificate.public_bytes(serialization.Encoding.PEM)
        self.path = folder / "ca.pem"
        self.path.write_bytes(self.pem)

    def issue(self, name):
        """Paths of a certificate for 127.0.0.1 and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        certificate = self._sign(subject, key.public_key(), address)
        cert_path, key_path = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return cert_path, key_path

    def _sign(self, subject, public_key, extension):
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(extension, critical=False)
            .sign(self.key, hashes.SHA256())
        )


def test_with_tls_only_those_who_speak_it_are_answered(tmp_path):
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    trusting = grpc.ssl_channel_credentials(authority.pem)
    with serving(credentials=trusting, tls_cert=cert, tls_key=key) as (server, client):
        assert logits_of(client.call("ModelInfer", infer_request())).shape == (1, 4)
        plain = Client(server.server.grpc.port)
        with plain.channel:
            refused(grpc.StatusCode.UNAVAILABLE, plain.call, "ServerLive", timeout=2)


def test_with_mutual_tls_a_client_needs_a_certificate_of_the_authority(tmp_path):
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    (tmp_path / "other").mkdir()
    stranger = Authority(tmp_path / "other")

    def credentials(issuer):
        pair = [path.read_bytes() for path in issuer.issue("client")] if issuer else (None, None)
        return grpc.ssl_channel_credentials(authority.pem, private_key=pair[1], certificate_chain=pair[0])

    options = {"tls_cert": cert, "tls_key": key, "tls_client_ca": authority.path}
    with serving(credentials=credentials(authority), **options) as (server, client):
        assert logits_of(client.call("ModelInfer", infer_request())).shape == (1, 4)
        for issuer in (None, stranger):
            other = Client(server.server.grpc.port, credentials(issuer))
            with other.channel:
                refused(grpc.StatusCode.UNAVAILABLE, other.call, "ServerLive", timeout=2)


# --------------------------------------------------------------------------------------------- reflection and health

NOT_SERVING, UNKNOWN = (
    health_pb2.HealthCheckResponse.NOT_SERVING,
    health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
)


def test_reflection_lists_all_services_and_describes_ours(client):
    ask = reflection_pb2_grpc.ServerReflectionStub(client.channel).ServerReflectionInfo
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=oip.SERVICE),
    ]
    services, file = ask(iter(questions), timeout=WAIT_S)
    assert {one.name for one in services.list_services_response.service} == {
        oip.SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"
    }  # fmt: skip
    pool = DescriptorPool()
    for packed in file.file_descriptor_response.file_descriptor_proto:
        pool.AddSerializedFile(packed)
    assert "ModelInfer" in pool.FindServiceByName(oip.SERVICE).methods_by_name


@pytest.mark.parametrize("service", ["", oip.SERVICE])
def test_health_is_serving_for_the_server_and_the_service(client, service):
    stub = health_pb2_grpc.HealthStub(client.channel)
    assert stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S).status == SERVING


def test_the_health_of_an_unknown_service_is_not_found(client):
    stub = health_pb2_grpc.HealthStub(client.channel)
    request = health_pb2.HealthCheckRequest(service="nope")
    refused(grpc.StatusCode.NOT_FOUND, stub.Check, request, timeout=WAIT_S)
    watch = stub.Watch(request, timeout=WAIT_S)
    assert next(watch).status == UNKNOWN
    watch.cancel()


def test_who_watches_health_is_told_of_the_drain_and_let_go():
    with serving() as (server, client):
        stub = health_pb2_grpc.HealthStub(client.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(watch).status == SERVING
        server.app.draining = True
        assert next(watch).status == NOT_SERVING
        server.server.should_exit = True
        assert list(watch) == []  # ended, and not cut off


def test_watchers_of_health_are_bounded(monkeypatch):
    monkeypatch.setattr(grpc_health, "MAX_WATCHERS", 1)
    with serving() as (_, client):
        stub = health_pb2_grpc.HealthStub(client.channel)
        first = stub.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert next(first).status == SERVING
        second = stub.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert refused(grpc.StatusCode.UNAVAILABLE, next, second).details() == "too many watch already; call Check"
        first.cancel()

        def comes_in():
            try:
                return next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)).status == SERVING
            except grpc.RpcError:
                return False

        until(comes_in)


# ------------------------------------------------------------------------------------------------- start and stop


def test_a_stop_answers_what_is_in_flight_and_refuses_what_is_new(gate):
    with serving(tiny_model(gate)) as (server, client):
        call = client.method("ModelInfer").future(infer_request())
        open_stream = queue.SimpleQueue()
        stream = client.method("ModelStreamInfer", "stream_stream")(iter(open_stream.get, None), timeout=WAIT_S)
        open_stream.put(infer_request(id="before"))
        until(lambda: server.app.in_flight == 2)
        server.app.draining = True
        server.server.should_exit = True
        text = refused(grpc.StatusCode.UNAVAILABLE, client.call, "ModelInfer", infer_request()).details()
        assert text == "the server is shutting down"
        refused(grpc.StatusCode.UNAVAILABLE, client.stream, infer_request())
        assert client.call("ServerLive").live
        assert not client.call("ServerReady").ready
        assert not client.call("ModelReady", name="tiny").ready
        stub = health_pb2_grpc.HealthStub(client.channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S).status == NOT_SERVING
        open_stream.put(infer_request(id="after"))
        gate.open.set()
        assert call.result(timeout=WAIT_S).model_name == "tiny"
        before, after = next(stream), next(stream)
        assert (before.infer_response.id, before.error_message) == ("before", "")
        assert (after.infer_response.id, after.error_message) == ("after", "the server is shutting down")
        open_stream.put(None)
    assert server.server.num_cut_off == 0


def test_clients_that_ask_without_end_get_answers_until_the_stop_and_then_our_refusal():
    outcomes = Counter()

    def ask(method):
        while True:
            try:
                method(infer_request(), timeout=WAIT_S)
                outcomes["OK", ""] += 1
            except grpc.RpcError as error:
                if "failed to connect" in error.details():
                    return
                outcomes[error.code().name, error.details()] += 1

    with serving() as (server, _), contextlib.ExitStack() as stack, ThreadPoolExecutor(16) as pool:
        clients = [Client(server.server.grpc.port) for _ in range(4)]
        for one in clients:
            stack.enter_context(one.channel)
        asking = [pool.submit(ask, one.method("ModelInfer")) for one in clients * 4]
        until(lambda: outcomes["OK", ""] > 50)
        server.app.draining = True
        server.server.should_exit = True
        for one in asking:
            one.result(WAIT_S)
    assert outcomes.keys() == {("OK", ""), ("UNAVAILABLE", "the server is shutting down")}


def test_a_stream_that_waits_is_told_of_the_stop():
    with serving() as (server, client):
        messages = queue.SimpleQueue()
        stream = client.method("ModelStreamInfer", "stream_stream")(iter(messages.get, None), timeout=WAIT_S)
        messages.put(infer_request())
        assert next(stream).error_message == ""
        server.app.draining = True
        server.server.should_exit = True
        assert refused(grpc.StatusCode.UNAVAILABLE, next, stream).details() == "the server is shutting down"
        messages.put(None)


def test_a_call_that_waits_when_the_drain_is_over_is_told_so(gate):
    with serving(tiny_model(gate), drain_s=0.2) as (server, client):
        running = client.method("ModelInfer").future(infer_request())
        until(lambda: gate.batches)
        waiting = client.method("ModelInfer").future(infer_request())
        messages = queue.SimpleQueue()
        stream = client.method("ModelStreamInfer", "stream_stream")(iter(messages.get, None), timeout=WAIT_S)
        messages.put(infer_request())
        until(lambda: server.app.in_flight == 3)
        server.app.draining = True
        server.server.should_exit = True
        for call in (running.result, waiting.result, partial(next, stream)):
            assert refused(grpc.StatusCode.UNAVAILABLE, call).details() == "the server is shutting down"
        messages.put(None)
        gate.open.set()
    assert server.server.num_cut_off == 3


def test_a_port_in_use_is_an_error_before_anything_is_loaded(tiny, tmp_path):
    port = tiny[0].server.grpc.port
    with pytest.raises(InputError, match=rf"127\.0\.0\.1:{port} is in use already"):
        mcruntime.server.run.run([tmp_path / "no-bundle"], ServerOptions(port=0, grpc_port=port))

    async def listen():
        options = ServerOptions(grpc_port=port)
        await start(App(Models(), options), options)

    with pytest.raises(InputError, match="cannot serve gRPC there; is it in use"):
        asyncio.run(listen())


def test_the_thread_that_waits_for_calls_reads_the_sockets_and_grpc_knows_that_setting():
    program = (
        "from mcruntime.server.run import _require_grpc; _require_grpc()\n"
        "import grpc, os; from concurrent.futures import ThreadPoolExecutor\n"
        "grpc.server(ThreadPoolExecutor(1)); print(os.environ['GRPC_EXPERIMENTS'])"
    )
    path = {"PYTHONPATH": str(Path(mcruntime.server.run.__file__).parents[2])}
    for given, expected in (
        ({}, "-event_engine_listener"),
        ({"GRPC_EXPERIMENTS": "-event_engine_fork"}, "-event_engine_fork,-event_engine_listener"),
        ({"GRPC_EXPERIMENTS": "event_engine_listener"}, "event_engine_listener"),
    ):
        done = subprocess.run([sys.executable, "-c", program], env=path | given, capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, expected, "")  # one it does not know is told


@pytest.mark.parametrize(
    ("module", "package"), [("grpc", "grpcio"), ("grpc_health.v1.health_pb2", "grpcio-health-checking")]
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=rf"--grpc-port needs the package '{package}'.*mcdeploy\[grpc\]"):
        mcruntime.server.run.run(["bundle"], ServerOptions(port=0, grpc_port=0))


# ---------------------------------------------------------------------------------------------------- seen from outside


def test_observers_are_told_of_every_call_with_its_model_and_its_times(gate):
    seen = []
    with serving(tiny_model(gate)) as (server, client):
        server.app._observers.append(seen.append)
        gate.open.set()
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        metadata = (("x-request-id", "mine-1"), ("traceparent", trace))
        client.call("ModelInfer", infer_request(some_images(2)), metadata=metadata)
        refused(grpc.StatusCode.NOT_FOUND, client.call, "ModelInfer", model_name="nope")
        client.stream(infer_request(), infer_request(model_name="nope"))
        until(lambda: len(seen) == 4)
    good, bad, *streamed = seen
    assert (good.protocol, good.method, good.path) == ("grpc", "ModelInfer", f"/{oip.SERVICE}/ModelInfer")
    assert (good.status, good.model, good.version, good.images, good.error) == (200, "tiny", "1", 2, "")
    assert (good.request_id, good.parent, good.client) == ("mine-1", trace, "127.0.0.1")
    assert 0 < good.timing.compute_s < good.seconds
    assert (bad.status, bad.error) == (404, "Request for unknown model: 'nope' is not found")
    assert {(one.method, one.status) for one in streamed} == {("ModelStreamInfer", 200), ("ModelStreamInfer", 404)}


def test_a_client_is_named_by_its_address_on_either_kind_of_network():
    assert host_of("ipv4:127.0.0.1:5000") == "127.0.0.1"
    assert host_of("ipv6:%5B::1%5D:5000") == "::1"


def test_answers_are_mirrored_to_the_shadow():
    mirrored = []
    with serving() as (server, client):
        server.app.mirror = lambda model, images, answer: mirrored.append((model.spec.name, len(images)))
        client.call("ModelInfer", infer_request(some_images(2)))
    assert mirrored == [("tiny", 2)]
