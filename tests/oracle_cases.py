"""What ``oracle`` asks a real Triton and our server alike, and where ours answers something else on purpose.

Every pixel is a multiple of 1/16, so that the logits are exact: the same on any processor, in any order of summation.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_onnx import some_images

MODEL = "/v2/models/tiny"
INFER = f"{MODEL}/infer"
INDEX = "/v2/repository/index"
LOAD, UNLOAD = (f"/v2/repository/models/tiny/{word}" for word in ("load", "unload"))
LENGTH = "Inference-Header-Content-Length"
STATISTICS_KEYS = ("name", "version", "inference_count", "execution_count")
Answer = dict[str, Any]  # to one step or call, as ``oracle`` stores it
CONFIG_KEYS = ("name", "max_batch_size")  # what a client reads of it; the rest tells of Triton's own backends


@dataclass(frozen=True)
class Step:
    """One HTTP request.

    ``until``: repeat it until the answer's JSON holds this. ``drill``: of a good answer, compare what lies under these
    keys, and ``keep``: of that, these keys.
    """

    path: str = INFER
    method: str = "POST"
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    until: str = ""
    drill: tuple[Any, ...] = ()
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """One gRPC call with the JSON form of its requests (several: a stream).

    ``until``: repeat it until the answer's JSON holds this. ``drill``: compare only what lies under these keys, and
    ``keep``: of that, these keys.
    """

    method: str
    requests: tuple[Mapping[str, Any], ...] = ({},)
    until: str = ""
    drill: tuple[Any, ...] = ()
    keep: tuple[str, ...] = ()


# builders


def images(count: int = 1) -> NDArray[np.float32]:
    """[count, 3, 8, 8] of multiples of 1/16 in -1..1."""
    return (np.round(some_images(count) * 16) / 16).astype(np.float32)


def one_pixel(value: float) -> NDArray[np.float32]:
    """An image [1, 3, 8, 8] that is 0 but for one pixel: its logits need all digits of FP32."""
    image = np.zeros((1, 3, 8, 8), dtype=np.float32)
    image[0, 0, 0, 0] = value
    return image


def far_too_large() -> NDArray[np.float32]:
    """An image whose numbers are finite, and its logits are not: ``perf_analyzer`` sends such."""
    image = np.zeros((1, 3, 8, 8), dtype=np.float32)
    image[0, 0] = 3e38
    return image


def tensor(array: NDArray[Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The input as JSON; ``changes`` replace members, None removes one."""
    array = images() if array is None else array
    tree = {"name": "image", "shape": list(array.shape), "datatype": "FP32", "data": array.ravel().tolist()}
    return {key: value for key, value in (tree | changes).items() if value is not None}


def binary_tensor(array: NDArray[Any] | None = None, size: Any = None, **changes: Any) -> dict[str, Any]:
    """The input as the header of a binary request describes it."""
    array = images() if array is None else array
    size = array.nbytes if size is None else size
    return tensor(array, data=None, parameters={"binary_data_size": size}, **changes)


def as_json(inputs: Any = None, **members: Any) -> Step:
    """An infer request in JSON; an input that is not given is one image."""
    return Step(body=_dump({"inputs": [tensor()] if inputs is None else inputs} | members))


def as_binary(
    array: NDArray[Any] | None = None, header: dict[str, Any] | None = None, length: Any = None, **members: Any
) -> Step:
    """An infer request with the tensor behind the JSON; ``length`` replaces the true length of the JSON."""
    array = images() if array is None else array
    text = _dump({"inputs": [binary_tensor(array) if header is None else header]} | members)
    return Step(body=text + array.tobytes(), headers={LENGTH: str(len(text) if length is None else length)})


def raw(body: bytes, length: str = "0") -> Step:
    """A request that is nothing but the tensor."""
    return Step(body=body, headers={LENGTH: length})


def get(path: str, **members: Any) -> Step:
    return Step(path, "GET", **members)


def output(**parameters: Any) -> list[dict[str, Any]]:
    return [{"name": "logits", "parameters": parameters}]


def compressed(step: Step, how: str) -> Step:
    body = gzip.compress(step.body) if how == "gzip" else zlib.compress(step.body)
    return Step(step.path, step.method, body, {**step.headers, "Content-Encoding": how})


def accepting(step: Step, how: str) -> Step:
    return Step(step.path, step.method, step.body, {**step.headers, "Accept-Encoding": how})


def chunked(step: Step) -> Step:
    half = len(step.body) // 2
    parts = (step.body[:half], step.body[half:], b"")
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return Step(step.path, step.method, body, {**step.headers, "Transfer-Encoding": "chunked"})


def _dump(tree: Any) -> bytes:
    return json.dumps(tree).encode()


IMAGE = images().tobytes()
UNLOADED = (Step(UNLOAD), Step(INDEX, until='"UNAVAILABLE"'))
LOADED = (Step(LOAD), get(f"{MODEL}/ready", until='"status": 200'))

# REST. A case is one request or, where requests only make sense together, several. The first cases count requests.

REST_CASES: dict[str, tuple[Step, ...]] = {
    "statistics": (
        get(f"{MODEL}/stats"),
        as_json(),
        as_json([tensor(images(2))]),
        get(f"{MODEL}/stats", until='"inference_count": 3'),  # Triton counts after it has answered
        get(f"{MODEL}/versions/1/stats"),
        get("/v2/models/stats"),
    ),
    "statistics after a request that was refused": (
        as_json([tensor(name="wrong")]),
        get(f"{MODEL}/stats", drill=("model_stats", 0, "inference_stats"), keep=("success", "fail", "queue")),
    ),
    "statistics after another load": (
        *UNLOADED,
        *LOADED,
        get(f"{MODEL}/stats", drill=("model_stats", 0), keep=STATISTICS_KEYS),
    ),
    # health and metadata
    "live": (get("/v2/health/live"),),
    "ready": (get("/v2/health/ready"),),
    "live by HEAD": (Step("/v2/health/live", "HEAD"),),
    "live by POST": (Step("/v2/health/live"),),
    "model ready": (get(f"{MODEL}/ready"),),
    "model ready, version": (get(f"{MODEL}/versions/1/ready"),),
    "model ready, unknown model": (get("/v2/models/nope/ready"),),
    "model ready, unknown version": (get(f"{MODEL}/versions/7/ready"),),
    "server metadata": (get("/v2", keep=("name", "extensions")),),
    "model metadata": (get(MODEL),),
    "model metadata, version": (get(f"{MODEL}/versions/1"),),
    "model metadata, unknown model": (get("/v2/models/nope"),),
    "model metadata, unknown version": (get(f"{MODEL}/versions/7"),),
    "model metadata, version that is no number": (get(f"{MODEL}/versions/one"),),
    "config": (get(f"{MODEL}/config", keep=CONFIG_KEYS),),
    "config, inputs and outputs": (get(f"{MODEL}/config", keep=("input", "output")),),
    "config, version": (get(f"{MODEL}/versions/1/config", keep=CONFIG_KEYS),),
    "config, unknown model": (get("/v2/models/nope/config"),),
    "statistics, unknown model": (get("/v2/models/nope/stats"),),
    "statistics, unknown version": (get(f"{MODEL}/versions/7/stats"),),
    # paths and methods
    "unknown path": (get("/v2/nothing"),),
    "root": (get("/"),),
    "trailing slash": (get("/v2/"),),
    "list of models": (get("/v2/models"),),
    "infer by GET": (get(INFER),),
    "infer by PUT": (Step(INFER, "PUT"),),
    "metadata by POST": (Step(MODEL),),
    "index by GET": (get(INDEX),),
    "infer by OPTIONS": (Step(INFER, "OPTIONS"),),
    "path in capitals": (get("/V2/health/live"),),
    "path with two slashes": (get("/v2//models/tiny"),),
    "path with an encoded letter": (get("/v2/models/tin%79/ready"),),
    "path with an encoded slash": (get("/v2/models%2Ftiny/ready"),),
    "path with dots": (get("/v2/models/nope/../tiny"),),
    "path with a query": (get("/v2/health/live?a=1"), Step(f"{INFER}?a=1", body=as_json().body)),
    "trace settings": (get("/v2/trace/setting"),),
    "log settings": (get("/v2/logging"),),
    "system shared memory": (get("/v2/systemsharedmemory/status"),),
    "CUDA shared memory": (get("/v2/cudasharedmemory/status"),),
    # the repository
    "index": (Step(INDEX),),
    "index, ready only": (Step(INDEX, body=_dump({"ready": True})),),
    "index, malformed": (Step(INDEX, body=b"{"),),
    "unload and load": (
        *UNLOADED,
        get(f"{MODEL}/ready"),
        Step(INDEX, body=_dump({"ready": True})),
        get(MODEL),
        get(f"{MODEL}/config"),
        get(f"{MODEL}/stats"),
        as_json(),
        *LOADED,
        as_json(),
    ),
    "load what is loaded": (Step(LOAD), as_json()),
    "load, empty parameters": (Step(LOAD, body=_dump({"parameters": {}})),),
    "load, unknown model": (Step("/v2/repository/models/nope/load"),),
    "unload, unknown model": (Step("/v2/repository/models/nope/unload"),),
    "unload, dependents": (
        Step(UNLOAD, body=_dump({"parameters": {"unload_dependents": False}})),
        Step(INDEX, until='"UNAVAILABLE"'),
        *LOADED,
    ),
    "load, a file": (Step(LOAD, body=_dump({"parameters": {"file:1/model.onnx": "AAAA"}})), as_json()),
    "load, a config that is no JSON": (Step(LOAD, body=_dump({"parameters": {"config": "{"}})), as_json()),
    "load, unknown parameter": (Step(LOAD, body=_dump({"parameters": {"unheard": 1}})), as_json()),
    "load, malformed": (Step(LOAD, body=b"{"), as_json()),
    "load, a name that is a path": (Step("/v2/repository/models/..%2Ftiny/load"), as_json()),
    # infer in JSON
    "infer": (as_json(),),
    "infer, version": (Step(f"{MODEL}/versions/1/infer", body=as_json().body),),
    "infer, nested data": (as_json([tensor(data=images().tolist())]),),
    "infer, batch of 2": (as_json([tensor(images(2))]),),
    "infer, largest batch": (as_json([tensor(images(4))]),),
    "infer, all digits of a number": (as_json([tensor(one_pixel(0.1))]),),
    "infer, integers as data": (as_json([tensor(np.ones((1, 3, 8, 8), dtype=np.int64))]),),
    "infer, id": (as_json(id="abc-1"),),
    "infer, empty id": (as_json(id=""),),
    "infer, unicode id": (as_json(id="füñf"),),
    "infer, parameters": (as_json(parameters={"text": "x", "count": 3, "yes": True}),),
    "infer, priority and timeout": (as_json(parameters={"priority": 0, "timeout": 10_000_000}),),
    "infer, output asked for": (as_json(outputs=[{"name": "logits"}]),),
    "infer, no outputs asked for": (as_json(outputs=[]),),
    "infer, output asked for twice": (as_json(outputs=[{"name": "logits"}] * 2),),
    "infer, chunked": (chunked(as_json()),),
    "infer, Expect: 100-continue": (Step(body=as_json().body, headers={"Expect": "100-continue"}),),
    "infer, content type of a form": (
        Step(body=as_json().body, headers={"Content-Type": "application/x-www-form-urlencoded"}),
    ),
    "infer, unknown member": (as_json(unheard=[1, 2]),),
    # classification
    "classification": (as_json(outputs=output(classification=2)),),
    "classification, batch": (as_json([tensor(images(3))], outputs=output(classification=1)),),
    "classification, more than there are classes": (as_json(outputs=output(classification=9)),),
    "classification, none": (as_json(outputs=output(classification=0)),),
    "classification, negative": (as_json(outputs=output(classification=-1)),),
    "classification, text": (as_json(outputs=output(classification="2")),),
    "classification, ties": (as_json([tensor(np.zeros((1, 3, 8, 8), np.float32))], outputs=output(classification=4)),),
    "classification, binary": (as_json(outputs=output(classification=2, binary_data=True)),),
    "classification, binary batch": (as_binary(images(2), outputs=output(classification=3, binary_data=True)),),
    # the binary tensor extension
    "binary in": (as_binary(),),
    "binary in, batch of 3": (as_binary(images(3)),),
    "binary out by the request's parameter": (as_json(parameters={"binary_data_output": True}),),
    "binary out by the output's parameter": (as_json(outputs=output(binary_data=True)),),
    "binary in and out": (as_binary(images(2), id="b1", parameters={"binary_data_output": True}),),
    "binary out, the output's parameter wins": (
        as_json(outputs=output(binary_data=False), parameters={"binary_data_output": True}),
    ),
    "binary header name in small letters": (
        Step(body=as_binary().body, headers={LENGTH.lower(): as_binary().headers[LENGTH]}),
    ),
    "binary with a content type": (
        Step(body=as_binary().body, headers={**as_binary().headers, "Content-Type": "application/octet-stream"}),
    ),
    "raw": (raw(IMAGE),),
    "raw, batch of 2": (raw(images(2).tobytes()),),
    "raw, too short": (raw(IMAGE[:-4]),),
    "raw, too long": (raw(IMAGE + b"\0\0\0\0"),),
    "raw, empty": (raw(b""),),
    "binary, 4 bytes missing": (Step(body=as_binary().body[:-4], headers=as_binary().headers),),
    "binary, 4 bytes left over": (Step(body=as_binary().body + b"\0\0\0\0", headers=as_binary().headers),),
    "binary, size less than the shape": (as_binary(header=binary_tensor(size=len(IMAGE) - 4)),),
    "binary, size more than the shape": (as_binary(header=binary_tensor(size=len(IMAGE) + 4)),),
    "binary, negative size": (as_binary(header=binary_tensor(size=-1)),),
    "binary, size is text": (as_binary(header=binary_tensor(size=str(len(IMAGE)))),),
    "binary, data beside the size": (as_binary(header=binary_tensor() | {"data": images().ravel().tolist()}),),
    "binary, no size": (as_binary(header=tensor(data=None)),),
    "header length beyond the body": (as_binary(length=10**6),),
    "header length negative": (as_binary(length=-1),),
    "header length short": (as_binary(length=20),),
    "header length is no number": (as_binary(length="many"),),
    "header length with a plain JSON body": (Step(body=as_json().body, headers={LENGTH: str(len(as_json().body))}),),
    # compression
    "gzip in": (compressed(as_json(), "gzip"),),
    "deflate in": (compressed(as_json(), "deflate"),),
    "gzip in, binary": (compressed(as_binary(), "gzip"),),
    "gzip in, damaged": (Step(body=b"not gzip at all", headers={"Content-Encoding": "gzip"}),),
    "unknown compression in": (Step(body=as_json().body, headers={"Content-Encoding": "br"}),),
    "identity in": (Step(body=as_json().body, headers={"Content-Encoding": "identity"}),),
    "gzip out": (accepting(as_json(), "gzip"),),
    "deflate out": (accepting(as_json(), "deflate"),),
    "gzip out, a longer answer": (accepting(as_json([tensor(images(4))], id="x" * 600), "gzip"),),
    "deflate out, a longer answer": (accepting(as_json([tensor(images(4))], id="x" * 600), "deflate"),),
    "several compressions out, a longer answer": (
        accepting(as_binary(images(4), id="x" * 600, parameters={"binary_data_output": True}), "br;q=1, gzip, deflate"),
    ),
    "gzip out, binary": (accepting(as_binary(parameters={"binary_data_output": True}), "gzip"),),
    "unknown compression out": (accepting(as_json(), "br"),),
    "several compressions out": (accepting(as_json(), "gzip, deflate, br"),),
    # refused
    "infer, unknown model": (Step("/v2/models/nope/infer", body=as_json().body),),
    "infer, unknown version": (Step(f"{MODEL}/versions/7/infer", body=as_json().body),),
    "infer, empty body": (Step(),),
    "infer, malformed JSON": (Step(body=b"{nope"),),
    "infer, JSON 2000 deep": (Step(body=b'{"inputs": ' + b"[" * 2000 + b"]" * 2000 + b"}"),),
    "infer, JSON that is no object": (Step(body=b"[1, 2]"),),
    "infer, no inputs": (Step(body=b"{}"),),
    "infer, inputs are no array": (as_json({"name": "image"}),),
    "infer, an input that is no object": (as_json([5]),),
    "infer, zero inputs": (as_json([]),),
    "infer, the input twice": (as_json([tensor(), tensor()]),),
    "infer, an input too many": (as_json([tensor(), tensor(name="other")]),),
    "infer, unknown input": (as_json([tensor(name="wrong")]),),
    "infer, input without a name": (as_json([tensor(name=None)]),),
    "infer, input without a shape": (as_json([tensor(shape=None)]),),
    "infer, input without a type": (as_json([tensor(datatype=None)]),),
    "infer, input without data": (as_json([tensor(data=None)]),),
    "infer, unknown output": (as_json(outputs=[{"name": "nope"}]),),
    "infer, outputs are no array": (as_json(outputs="logits"),),
    "infer, wrong type": (as_json([tensor(datatype="INT32", data=[0] * 192)]),),
    "infer, no such type": (as_json([tensor(datatype="FLOAT")]),),
    "infer, FP16 in JSON": (as_json([tensor(datatype="FP16")]),),
    "infer, wrong shape": (as_json([tensor(np.zeros((1, 3, 4, 8), dtype=np.float32))]),),
    "infer, wrong shape with an id": (as_json([tensor(np.zeros((1, 3, 4, 8), dtype=np.float32))], id="abc-1"),),
    "infer, more elements than memory": (as_binary(header=binary_tensor(size=768, shape=[1, 3, 2**31, 2**31])),),
    "infer, too few dimensions": (as_json([tensor(images()[0])]),),
    "infer, no dimensions": (as_json([tensor(shape=[], data=[1.0])]),),
    "infer, batch of 0": (as_json([tensor(shape=[0, 3, 8, 8], data=[])]),),
    "infer, negative dimension": (as_json([tensor(shape=[-1, 3, 8, 8])]),),
    "infer, dimension that is a fraction": (as_json([tensor(shape=[1.5, 3, 8, 8])]),),
    "infer, dimension that is text": (as_json([tensor(shape=["1", 3, 8, 8])]),),
    "infer, batch too large": (as_json([tensor(np.zeros((5, 3, 8, 8), dtype=np.float32))]),),
    "infer, a number too few": (as_json([tensor(data=[0.0] * 191)]),),
    "infer, a number too many": (as_json([tensor(data=[0.0] * 193)]),),
    "infer, text among the numbers": (as_json([tensor(data=["x"] + [0.0] * 191)]),),
    "infer, true among the numbers": (as_json([tensor(data=[True] + [0.0] * 191)]),),
    "infer, null among the numbers": (as_json([tensor(data=[None] + [0.0] * 191)]),),
    "infer, NaN": (Step(body=_dump({"inputs": [tensor(data=[float("nan")] + [0.0] * 191)]})),),
    "infer, number beyond FP32": (as_json([tensor(data=[1e300] + [0.0] * 191)]),),
    "infer, binary NaN": (as_binary(one_pixel(np.nan)),),
    "infer, numbers far too large": (as_json([tensor(far_too_large())]),),
    "infer, numbers far too large, binary": (as_binary(far_too_large(), parameters={"binary_data_output": True}),),
    "infer, numbers far too large, classification": (as_binary(far_too_large(), outputs=output(classification=1)),),
    "infer, id is a number": (as_json(id=5),),
    "infer, parameter is a list": (as_json(parameters={"x": [1]}),),
    "infer, parameters are no object": (as_json(parameters=[1]),),
    "infer, priority is text": (as_json(parameters={"priority": "high"}),),
    "infer, timeout is negative": (as_json(parameters={"timeout": -5}),),
    "infer, binary_data_output is text": (as_json(parameters={"binary_data_output": "yes"}),),
    "infer, binary_data is text": (as_json(outputs=output(binary_data="yes")),),
    "infer, classification beside unknown output": (
        as_json(outputs=[{"name": "nope", "parameters": {"classification": 1}}]),
    ),
}

# gRPC


def grpc_input(array: NDArray[Any] | None = None, in_place: bool = False, **changes: Any) -> dict[str, Any]:
    """The input as protobuf's JSON, without or with its numbers in ``contents``."""
    array = images() if array is None else array
    tree: dict[str, Any] = {"name": "image", "datatype": "FP32", "shape": list(array.shape)}
    if in_place:
        tree["contents"] = {"fp32_contents": array.ravel().tolist()}
    return tree | changes


def grpc_infer(array: NDArray[Any] | None = None, **members: Any) -> dict[str, Any]:
    """A ModelInferRequest with raw contents; ``members`` replace some of its members, None removes one."""
    array = images() if array is None else array
    tree = {"model_name": "tiny", "inputs": [grpc_input(array)], "raw_input_contents": [_base64(array.tobytes())]}
    return {key: value for key, value in (tree | members).items() if value is not None}


def by_contents(**changes: Any) -> dict[str, Any]:
    """A ModelInferRequest whose numbers stand in ``contents``."""
    return grpc_infer(inputs=[grpc_input(in_place=True, **changes)], raw_input_contents=None)


def grpc_output(count: int) -> list[dict[str, Any]]:
    return [{"name": "logits", "parameters": {"classification": {"int64_param": count}}}]


def ask(method: str, *requests: Mapping[str, Any], **members: Any) -> tuple[Call, ...]:
    return (Call(method, requests or ({},), **members),)


def infer(*requests: Mapping[str, Any]) -> tuple[Call, ...]:
    return ask("ModelInfer", *(requests or (grpc_infer(),)))


def stream(*requests: Mapping[str, Any]) -> tuple[Call, ...]:
    return ask("ModelStreamInfer", *requests)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


TINY: dict[str, str] = {"name": "tiny"}
NOPE: dict[str, str] = {"name": "nope"}
GRPC_UNLOADED = (
    Call("RepositoryModelUnload", ({"model_name": "tiny"},)),
    Call("RepositoryIndex", until='"UNAVAILABLE"'),
)
GRPC_LOADED = (
    Call("RepositoryModelLoad", ({"model_name": "tiny"},)),
    Call("ModelReady", (TINY,), until='"ready": true'),
)

GRPC_CASES: dict[str, tuple[Call, ...]] = {
    "statistics": (
        *infer(),
        *infer(grpc_infer(images(2))),
        *ask("ModelStatistics", TINY, until='"inference_count": "3"', drill=("model_stats", 0), keep=STATISTICS_KEYS),
        *ask("ModelStatistics", drill=("model_stats", 0), keep=STATISTICS_KEYS),
    ),
    "live": ask("ServerLive"),
    "ready": ask("ServerReady"),
    "model ready": ask("ModelReady", TINY),
    "model ready, version": ask("ModelReady", TINY | {"version": "1"}),
    "model ready, unknown model": ask("ModelReady", NOPE),
    "model ready, unknown version": ask("ModelReady", TINY | {"version": "7"}),
    "server metadata": ask("ServerMetadata", keep=("name", "extensions")),
    "model metadata": ask("ModelMetadata", TINY),
    "model metadata, unknown model": ask("ModelMetadata", NOPE),
    "model metadata, unknown version": ask("ModelMetadata", TINY | {"version": "7"}),
    "config": ask("ModelConfig", TINY, drill=("config",), keep=(*CONFIG_KEYS, "input", "output")),
    "config, unknown model": ask("ModelConfig", NOPE),
    "statistics, unknown model": ask("ModelStatistics", NOPE),
    "index": ask("RepositoryIndex"),
    "index, ready only": ask("RepositoryIndex", {"ready": True}),
    "load, unknown model": ask("RepositoryModelLoad", {"model_name": "nope"}),
    "unload, unknown model": ask("RepositoryModelUnload", {"model_name": "nope"}),
    "unload and load": (*GRPC_UNLOADED, *ask("ModelReady", TINY), *infer(), *GRPC_LOADED, *infer()),
    "infer, raw": infer(),
    "infer, contents": infer(by_contents()),
    "infer, batch of 4": infer(grpc_infer(images(4))),
    "infer, id and version": infer(grpc_infer(id="g1", model_version="1")),
    "infer, output asked for": infer(grpc_infer(outputs=[{"name": "logits"}])),
    "infer, parameters": infer(
        grpc_infer(parameters={"priority": {"int64_param": 0}, "timeout": {"int64_param": 10_000_000}})
    ),
    "infer, numbers far too large": infer(grpc_infer(far_too_large())),
    "infer, numbers far too large, classification": infer(grpc_infer(far_too_large(), outputs=grpc_output(1))),
    "infer, priority that is no number": infer(grpc_infer(parameters={"priority": {"string_param": "high"}})),
    "classification": infer(grpc_infer(images(2), outputs=grpc_output(2))),
    "classification, more than there are classes": infer(grpc_infer(outputs=grpc_output(9))),
    "infer, raw beside contents": infer(grpc_infer(inputs=[grpc_input(in_place=True)])),
    "infer, neither": infer(grpc_infer(raw_input_contents=None)),
    "infer, two raw tensors for one input": infer(grpc_infer(raw_input_contents=[_base64(IMAGE)] * 2)),
    "infer, raw too short": infer(grpc_infer(raw_input_contents=[_base64(IMAGE[:-4])])),
    "infer, raw too long": infer(grpc_infer(raw_input_contents=[_base64(IMAGE + b"\0" * 4)])),
    "infer, contents of another type": infer(by_contents(contents={"int_contents": [0] * 192})),
    "infer, contents too short": infer(by_contents(contents={"fp32_contents": [0.0] * 191})),
    "infer, unknown model": infer(grpc_infer(model_name="nope")),
    "infer, unknown version": infer(grpc_infer(model_version="7")),
    "infer, version that is no number": infer(grpc_infer(model_version="one")),
    "infer, unknown input": infer(grpc_infer(inputs=[grpc_input(name="wrong")])),
    "infer, unknown output": infer(grpc_infer(outputs=[{"name": "nope"}])),
    "infer, no inputs": infer(grpc_infer(inputs=[], raw_input_contents=None)),
    "infer, wrong type": infer(grpc_infer(inputs=[grpc_input(datatype="INT32")])),
    "infer, no such type": infer(grpc_infer(inputs=[grpc_input(datatype="FLOAT")])),
    "infer, wrong shape": infer(grpc_infer(inputs=[grpc_input(shape=[1, 3, 4, 16])])),
    "infer, batch too large": infer(grpc_infer(np.zeros((5, 3, 8, 8), dtype=np.float32))),
    "infer, negative dimension": infer(grpc_infer(inputs=[grpc_input(shape=[-1, 3, 8, 8])])),
    "stream": stream(grpc_infer(id="s1"), grpc_infer(images(2), id="s2"), grpc_infer(images(3), id="s3")),
    "stream, an error in the middle": stream(
        grpc_infer(id="s1"), grpc_infer(id="s2", model_name="nope"), grpc_infer(id="s3")
    ),
    "stream, wrong shape": stream(grpc_infer(id="s1", inputs=[grpc_input(shape=[1, 3, 4, 8])])),
    "health of the server": ask("Check"),
    "health of the service": ask("Check", {"service": "inference.GRPCInferenceService"}),
    "health of something unknown": ask("Check", {"service": "nope"}),
    "load, a file": (
        *ask(
            "RepositoryModelLoad", {"model_name": "tiny", "parameters": {"file:1/model.onnx": {"bytes_param": "AAAA"}}}
        ),
        *infer(),
    ),
    "trace settings": ask("TraceSetting"),
    "log settings": ask("LogSettings"),
    "system shared memory": ask("SystemSharedMemoryStatus"),
    "CUDA shared memory": ask("CudaSharedMemoryStatus"),
    "a method that nobody has": ask("Unheard"),
}

# Where ours answers something else. First rules, which change what Triton answered into what ours must answer...


@dataclass(frozen=True)
class Rule:
    """A difference that goes through many cases: (path or method, Triton's answer) -> what ours answers."""

    why: str
    apply: Callable[[str, Answer], Answer]


def _error_text(change: Callable[[str], str]) -> Callable[[str, Answer], Answer]:
    """The same answer with its error's text changed, wherever the protocol puts that."""

    def apply(path: str, answer: Answer) -> Answer:
        tree = answer.get("json")
        if isinstance(tree, dict) and "error" in tree:
            return {**answer, "json": {"error": change(tree["error"])}}
        if "details" in answer:
            return {**answer, "details": change(answer["details"])}
        if "stream" in answer:
            return {
                **answer,
                "stream": [
                    {**part, "error_message": change(part["error_message"])} if "error_message" in part else part
                    for part in answer["stream"]
                ],
            }
        return answer

    return apply


def _json_type(path: str, answer: Answer) -> Answer:
    if answer["headers"]["Content-Type"] != "text/plain":
        return answer
    return {**answer, "headers": {**answer["headers"], "Content-Type": "application/json"}}


def _allow(path: str, answer: Answer) -> Answer:
    methods = "POST" if path.endswith(("infer", "index")) else "GET, HEAD"
    return {**answer, "headers": {**answer["headers"], "Allow": methods}} if answer["status"] == 405 else answer


def _told_ready(path: str, answer: Answer) -> Answer:
    if answer.get("text") != "" or answer["status"] != 200 or "/repository/" in path:
        return answer
    word = "live" if "/live" in path else "ready"
    tree = {"name": "tiny", word: True} if "/models/" in path else {word: True}
    return {"status": 200, "headers": answer["headers"], "json": tree}


def _client_error(path: str, answer: Answer) -> Answer:
    if answer.get("code") == "INTERNAL":
        return {**answer, "code": "INVALID_ARGUMENT"}
    return {**answer, "status": 400} if answer.get("status") == 500 else answer


def _platform(path: str, answer: Answer) -> Answer:
    tree = answer.get("json")
    if isinstance(tree, dict) and tree.get("platform") == "python":
        return {**answer, "json": {**tree, "platform": "onnxruntime_onnx"}}
    return answer


_COMMON_RULES = (
    Rule(
        "Triton names the request in some of its errors; whoever gets the answer knows which it was",
        _error_text(lambda text: re.sub(r"^\[request id: [^]]*\] ", "", text)),
    ),
    Rule(
        "Triton explains its configuration file to whoever sends a wrong shape",
        _error_text(lambda text: re.sub(r"\. NOTE: Setting a non-zero max_batch_size.*", "", text)),
    ),
    Rule("what the client got wrong is its error and not the server's", _client_error),
    Rule("Triton runs the model by its Python backend here, ours by ONNX Runtime", _platform),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "rest": (
        Rule("JSON is always called JSON; Triton calls some of it text/plain", _json_type),
        Rule("405 says which methods are allowed", _allow),
        Rule("the specification gives health and readiness a JSON body; Triton leaves it out", _told_ready),
        Rule(
            "a 404 says where to look",
            _error_text(
                lambda text: "there is nothing at this path; see /v2 and /docs" if text == "Not Found" else text
            ),
        ),
        *_COMMON_RULES,
    ),
    "grpc": _COMMON_RULES,
}


def expected(kind: str, step: Step | Call, answer: Answer) -> Answer:
    """What ours must answer to a step of a case that is not in ``DIFFERENCES``."""
    path = step.path if isinstance(step, Step) else step.method
    for rule in RULES[kind]:
        answer = rule.apply(path, answer)
    return answer


# ... and then single cases.


@dataclass(frozen=True)
class Difference:
    """Why ours answers differently, and by number of the step what is different in its answer; None: not there."""

    why: str
    ours: Mapping[int, Answer]


WORDS = "Triton answers in the words of its JSON library; ours says what is expected"
OTHER_CHECK = "the same is refused, but something else about it is noticed first"
RAW = "Triton calls the input of a raw request by an internal name; ours says how many bytes are missing or too many"
FINITE = "NaN and infinite values are refused: no classifier answers anything sensible to them"
INFINITE = "JSON has no word for infinity, and classes no order by it; binary output is as Triton's"
SMALL = "answers of less than 512 bytes are not packed: packing costs more than it saves"
ABSENT = "this server has neither shared memory nor trace or log settings for clients, and does not say that it has"
NOT_FOUND = "a model that is not there is not found, whatever is asked about it"
NAME_ONLY = "a client may name the model to load and nothing else: files and configurations are a way to run code"


def says(text: str, status: int = 400) -> Answer:
    """Another sentence over REST."""
    return {"status": status, "json": {"error": text}}


def refuses(text: str, code: str = "INVALID_ARGUMENT") -> Answer:
    """Another sentence, or code, over gRPC."""
    return {"code": code, "details": text, "json": None}


NOTHING_HERE = says("there is nothing at this path; see /v2 and /docs", 404)
NO_PARAMETERS = "load takes no parameters here: neither a configuration nor files can be sent to this server"
FAR_TOO_LARGE = "the answer of 'tiny' is NaN or infinite, since numbers of its input are far too large"
EXTENSIONS = [
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
]


def because(why: str, cases: Mapping[str, Answer], step: int = 0) -> dict[str, Difference]:
    """The same reason for several cases."""
    return {name: Difference(why, {step: change}) for name, change in cases.items()}


DIFFERENCES: dict[str, dict[str, Difference]] = {
    "rest": {
        **because(
            "a request that was refused has failed, too; Triton counts what reached its queue",
            {
                "statistics after a request that was refused": {
                    "json": {
                        "success": {"count": 2, "ns": "number"},
                        "fail": {"count": 1, "ns": "number"},
                        "queue": {"count": 2, "ns": "number"},
                    }
                }
            },
            step=1,
        ),
        **because(
            "counters never go back, as Prometheus expects of them",
            {
                "statistics after another load": {
                    "json": {"name": "tiny", "version": "1", "inference_count": 3, "execution_count": 2}
                }
            },
            step=4,
        ),
        **because(
            "probes may use HEAD, as HTTP allows wherever GET is",
            {"live by HEAD": {"status": 200, "headers": {"Content-Type": "application/json"}}},
        ),
        **because(
            "name, version and the extensions that this server has",
            {
                "server metadata": {
                    "json": {
                        "name": "mcdeploy",
                        "extensions": EXTENSIONS,
                    }
                }
            },
        ),
        **because(
            "Triton adds the defaults of settings that no classifier needs",
            {
                "config, inputs and outputs": {
                    "json": {
                        "input": [
                            {"name": "image", "data_type": "TYPE_FP32", "format": "FORMAT_NONE", "dims": [3, 8, 8]}
                        ],
                        "output": [
                            {"name": "logits", "data_type": "TYPE_FP32", "dims": [4], "label_filename": "labels.txt"}
                        ],
                    }
                }
            },
        ),
        **because(
            NOT_FOUND,
            {
                "statistics, unknown model": says("Request for unknown model: 'nope' is not found", 404),
                "statistics, unknown version": says("Request for unknown model: 'tiny' version 7 is not found", 404),
            },
        ),
        **because(
            "the page for people is at the root",
            {
                "root": {
                    "status": 200,
                    "headers": {"Content-Type": "text/html; charset=utf-8"},
                    "json": None,
                    "text": "HTML",
                }
            },
        ),
        **because(
            "KServe has a list of models there, and so has ours",
            {"list of models": {"status": 200, "json": {"models": ["tiny"]}}},
        ),
        **because(
            "an encoded letter in a path is that letter (RFC 3986, 2.3)",
            {"path with an encoded letter": {"status": 200, "json": {"name": "tiny", "ready": True}}},
        ),
        **because(
            "paths are decoded once, at the door; keys are asked for after that, so this is no way around them",
            {"path with an encoded slash": {"status": 200, "json": {"name": "tiny", "ready": True}}},
        ),
        **because(
            ABSENT,
            {
                "trace settings": NOTHING_HERE,
                "log settings": NOTHING_HERE,
                "system shared memory": NOTHING_HERE,
                "CUDA shared memory": NOTHING_HERE,
            },
        ),
        **because(
            NOT_FOUND,
            {"unload and load": says("Request for unknown model: 'tiny' has no available versions", 404)},
            step=6,
        ),
        **because(
            NAME_ONLY,
            {
                "load, a file": says(NO_PARAMETERS),
                "load, a config that is no JSON": says(NO_PARAMETERS),
                "load, unknown parameter": says(NO_PARAMETERS),
            },
        ),
        **because(
            "a name with a slash is no name, so there is no such path",
            {"load, a name that is a path": NOTHING_HERE},
        ),
        **because(
            "who asks for one output twice, perhaps in two forms, has made a mistake",
            {"infer, output asked for twice": says("output 'logits' is requested more than once for model 'tiny'")},
        ),
        **because(
            "who asks for no classes does not ask for a classification",
            {"classification, none": says("parameter 'classification' must be a whole number of at least 1")},
        ),
        **because(
            WORDS,
            {
                "classification, negative": says("parameter 'classification' must be a whole number of at least 1"),
                "classification, text": says("parameter 'classification' must be a whole number of at least 1"),
                "binary, negative size": says("'binary_data_size' of input 'image' must be a whole number of bytes"),
                "binary, size is text": says("'binary_data_size' of input 'image' must be a whole number of bytes"),
                "binary, data beside the size": says(
                    "input 'image' has both 'data' and 'binary_data_size'; send one of them"
                ),
                "infer, JSON that is no object": says("failed to parse the request JSON buffer: expected an object"),
                "infer, no inputs": says(
                    "failed to parse the request JSON buffer: 'inputs' must be an array of objects"
                ),
                "infer, inputs are no array": says(
                    "failed to parse the request JSON buffer: 'inputs' must be an array of objects"
                ),
                "infer, an input that is no object": says(
                    "failed to parse the request JSON buffer: 'inputs' must be an array of objects"
                ),
                "infer, input without a name": says("unexpected inference input (not a text) for model 'tiny'"),
                "infer, input without a shape": says(
                    "failed to parse the request JSON buffer: 'shape' must be an array of integers"
                ),
                "infer, input without a type": says(
                    "inference input 'image' data-type is (not a text), but model 'tiny' expects 'FP32'"
                ),
                "infer, input without data": says("input 'image' for model 'tiny' needs 'data', an array of numbers"),
                "infer, outputs are no array": says(
                    "failed to parse the request JSON buffer: 'outputs' must be an array of objects"
                ),
                "infer, dimension that is a fraction": says(
                    "failed to parse the request: 'shape' of input 'image' must be an array of integers"
                ),
                "infer, dimension that is text": says(
                    "failed to parse the request: 'shape' of input 'image' must be an array of integers"
                ),
                "infer, a number too few": says(
                    "unexpected size of input 'image' for model 'tiny': expected 192 numbers, got 191"
                ),
                "infer, a number too many": says(
                    "unexpected size of input 'image' for model 'tiny': expected 192 numbers, got 193"
                ),
                "infer, text among the numbers": says(
                    "'data' of input 'image' for model 'tiny' must hold numbers only"
                ),
                "infer, true among the numbers": says(
                    "'data' of input 'image' for model 'tiny' must hold numbers only"
                ),
                "infer, null among the numbers": says(
                    "'data' of input 'image' for model 'tiny' must hold numbers only"
                ),
                "infer, id is a number": says("failed to parse the request JSON buffer: 'id' must be a string"),
                "infer, parameters are no object": says(
                    "failed to parse the request JSON buffer: 'parameters' must be an object"
                ),
                "infer, priority is text": says("parameter 'priority' must be a whole number of at least 0"),
                "infer, timeout is negative": says("parameter 'timeout' must be a whole number of microseconds"),
                "infer, binary_data_output is text": says("parameter 'binary_data_output' must be true or false"),
                "infer, binary_data is text": says("parameter 'binary_data' must be true or false"),
            },
        ),
        **because(
            RAW,
            {
                "raw, batch of 2": says("unexpected additional input data for model 'tiny'"),
                "raw, too short": says(
                    "unexpected size for input 'image', expecting 4 additional bytes for model 'tiny'"
                ),
                "raw, too long": says("unexpected additional input data for model 'tiny'"),
            },
        ),
        **because(
            "a raw request without a body is an error of its length, not of its tensor",
            {"raw, empty": says("inference header size should be in range (0, 0), got: 0")},
        ),
        **because(
            OTHER_CHECK,
            {
                "binary, no size": says("unexpected additional input data for model 'tiny'"),
                "infer, the input twice": says(
                    "expected 1 inputs but got 2 inputs for model 'tiny'. Send 'image' alone."
                ),
                "infer, no such type": says(
                    "inference input 'image' data-type is 'FLOAT', but model 'tiny' expects 'FP32'"
                ),
                "infer, no dimensions": says(
                    "unexpected shape for input 'image' for model 'tiny'. Expected [-1,3,8,8], got []"
                ),
                "infer, batch of 0": says(
                    "unexpected shape for input 'image' for model 'tiny'. Expected [-1,3,8,8], got [0,3,8,8]"
                ),
                "infer, negative dimension": says(
                    "unexpected shape for input 'image' for model 'tiny'. Expected [-1,3,8,8], got [-1,3,8,8]"
                ),
            },
        ),
        **because(
            "a length is written in digits, so a sign is no part of it",
            {"header length negative": says("Inference-Header-Content-Length must be a whole number of bytes")},
        ),
        **because(
            "Triton takes a length that is no number for 0, a raw request",
            {"header length is no number": says("Inference-Header-Content-Length must be a whole number of bytes")},
        ),
        **because(
            "Triton takes what it cannot unpack for an empty raw request",
            {"gzip in, damaged": says("the request body is not gzip")},
        ),
        **because(
            "415 is HTTP's own answer to an unknown Content-Encoding (RFC 9110, 15.5.16)",
            {
                "unknown compression in": {
                    "status": 415,
                    "headers": {"Content-Type": "application/json"},
                    "json": {"error": "Content-Encoding 'br' is not supported; send gzip, deflate or none"},
                }
            },
        ),
        **because(
            SMALL,
            {
                "gzip out": {"headers": {"Content-Type": "application/json"}},
                "deflate out": {"headers": {"Content-Type": "application/json"}},
                "gzip out, binary": {
                    "headers": {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "140"}
                },
                "several compressions out": {"headers": {"Content-Type": "application/json"}},
            },
        ),
        **because(
            "an empty body is no raw request unless the header says so",
            {"infer, empty body": says("failed to parse the request JSON buffer: ...")},
        ),
        **because(
            "our JSON parser stops at a depth of 1024; Triton's looks at this as an input without data",
            {"infer, JSON 2000 deep": says("failed to parse the request JSON buffer: ...")},
        ),
        **because(
            "Triton says that an input is missing where none is",
            {
                "infer, an input too many": says(
                    "expected 1 inputs but got 2 inputs for model 'tiny'. Send 'image' alone."
                )
            },
        ),
        **because(
            FINITE,
            {
                "infer, NaN": says("failed to parse the request JSON buffer: ..."),
                "infer, number beyond FP32": says("input 'image' for model 'tiny' holds NaN or infinite values"),
                "infer, binary NaN": says("input 'image' for model 'tiny' holds NaN or infinite values"),
            },
        ),
        **because(
            INFINITE,
            {
                "infer, numbers far too large": says(FAR_TOO_LARGE),
                "infer, numbers far too large, classification": says(FAR_TOO_LARGE),
            },
        ),
    },
    "grpc": {
        **because(
            "name, version and the extensions that this server has",
            {
                "server metadata": {
                    "json": {
                        "extensions": EXTENSIONS,
                        "name": "mcdeploy",
                    }
                }
            },
        ),
        **because(
            NOT_FOUND,
            {"statistics, unknown model": refuses("Request for unknown model: 'nope' is not found", "NOT_FOUND")},
        ),
        **because(
            INFINITE,
            {"infer, numbers far too large, classification": refuses(FAR_TOO_LARGE)},
        ),
        **because(
            "ours says it as over REST, and takes the number as a text, too",
            {"infer, priority that is no number": refuses("parameter 'priority' must be a whole number of at least 0")},
        ),
        **because(
            "a tensor that belongs to no input is a mistake",
            {
                "infer, two raw tensors for one input": refuses(
                    "expected 1 raw_input_contents, for input 'image' for model 'tiny', but got 2"
                )
            },
        ),
        **because(
            "the same sentence, without the name of the C++ function that failed",
            {
                "infer, version that is no number": refuses(
                    "failed to get model version from specified version string 'one', "
                    "version should be an integral value > 0"
                )
            },
        ),
        **because(
            "the type is named as the client wrote it",
            {
                "infer, no such type": refuses(
                    "inference input 'image' data-type is 'FLOAT', but model 'tiny' expects 'FP32'"
                )
            },
        ),
        **because(
            OTHER_CHECK,
            {
                "infer, negative dimension": refuses(
                    "unexpected shape for input 'image' for model 'tiny'. Expected [-1,3,8,8], got [-1,3,8,8]"
                )
            },
        ),
        **because(
            "grpc.health.v1 says NOT_FOUND of a service that is not there",
            {"health of something unknown": refuses("there is no such service here", "NOT_FOUND")},
        ),
        **because(
            NAME_ONLY,
            {"load, a file": refuses(NO_PARAMETERS)},
        ),
        **because(
            ABSENT,
            {
                "trace settings": refuses("", "UNIMPLEMENTED"),
                "log settings": refuses("", "UNIMPLEMENTED"),
                "system shared memory": refuses("", "UNIMPLEMENTED"),
                "CUDA shared memory": refuses("", "UNIMPLEMENTED"),
            },
        ),
    },
}
