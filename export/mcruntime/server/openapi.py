"""The interface as an OpenAPI 3.1 document, made from what is served: the models, their shapes, the limits, the keys.

It is exact enough to test the server with: a body that its schemas allow is taken, one that they do not is refused.
"""

# B = batch, C = channels, H/W = height/width.
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mcruntime.server.protocol import MAX_ID
from mcruntime.server.tensors import DATATYPE, ModelSpec

if TYPE_CHECKING:
    from mcruntime.server.app import App

Tree = dict[str, Any]
LARGEST = 3.4028234e38  # of FP32
MOST_BATCHES = 8  # sizes of a request whose JSON is spelt out; the schema of a larger one says no more than its shape
TAGS = {
    "Images": "An image in, classes out.",
    "Inference": "The Open Inference Protocol, version 2: tensors in, tensors out, as JSON or binary.",
    "Models": "What is served, how it is configured, and what it has done so far.",
    "Repository": "Loading and unloading models, which is off unless the server was started with control keys.",
    "Server": "The server itself.",
}
DESCRIPTION = (
    "Image classifiers over the Open Inference Protocol, version 2, with its extensions for binary tensors, "
    "classification, model configuration, model repository and statistics. Every error is an object with the one "
    "member 'error', a sentence. Every answer carries X-Request-ID: the one that was sent, if it is short and plain."
)
METRICS = (
    "text/plain; version=0.0.4; charset=utf-8",
    "text/plain; version=1.0.0; charset=utf-8; escaping=underscores",
    "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores",
)
REASONS = {
    400: "What was sent is wrong; the sentence says how.",
    401: "An API key is needed.",
    403: "Loading and unloading is off, or needs a control key.",
    404: "No such model, version or path.",
    408: "The body did not arrive in time.",
    413: "More bytes, pixels or images than the server takes.",
    415: "A Content-Encoding that the server does not know.",
    500: "The model could not answer; the server's log says why.",
    503: "No room at the moment, or the server is shutting down.",
    504: "Not done in time.",
}


def openapi(app: App, page_files: Sequence[str] = ()) -> Tree:
    """The document for what the server serves at this moment.

    Args:
        page_files: the names below /page/.
    """
    specs = sorted((model.spec for model in app.models), key=lambda spec: (spec.name, int(spec.version)))
    paths = {**_server(app, page_files), **_model_paths(specs), **_repository()}
    if app.is_locked:
        for item in paths.values():
            for operation in item.values():
                if operation.get("security") != []:
                    operation["responses"] = {**operation["responses"], "401": _ref("responses", "401")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mcdeploy", "version": "2", "description": DESCRIPTION},
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": _schemas(),
            "responses": {str(status): _failure(status) for status in REASONS},
            "headers": {"X-Request-ID": {"description": "Names the request in the server's log.", "schema": _TEXT}},
            "parameters": _parameters(specs),
            **({"securitySchemes": _SECURITY} if app.is_locked else {}),
        },
        **({"security": [{name: []} for name in _SECURITY]} if app.is_locked else {}),
    }


_TEXT: Tree = {"type": "string"}
_COUNT: Tree = {"type": "integer", "minimum": 0}
_NUMBER: Tree = {"type": "number"}
_SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def _ref(kind: str, name: str) -> Tree:
    return {"$ref": f"#/components/{kind}/{name}"}


def _object(properties: Mapping[str, Any], required: tuple[str, ...] | None = None, **more: Any) -> Tree:
    """An object; all of its properties are required unless told otherwise."""
    names = list(properties) if required is None else list(required)
    return {"type": "object", "properties": dict(properties), **({"required": names} if names else {}), **more}


def _list(items: Tree, **more: Any) -> Tree:
    return {"type": "array", "items": items, **more}


def _answer(description: str, schema: Tree | None = None, *, kind: str = "application/json", **more: Any) -> Tree:
    content = {} if schema is None else {"content": {kind: {"schema": schema}}}
    return {"description": description, "headers": {"X-Request-ID": _ref("headers", "X-Request-ID")}, **content, **more}


def _failure(status: int) -> Tree:
    headers = {"X-Request-ID": _ref("headers", "X-Request-ID")}
    if status == 503:
        headers["Retry-After"] = {"description": "Seconds.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}
    if status == 401:
        headers["WWW-Authenticate"] = {"schema": _TEXT}
    return _answer(REASONS[status], _ref("schemas", "Error")) | {"headers": headers}


def _operation(tag: str, summary: str, ok: Tree, *failures: int, parameters: tuple[str, ...] = (), **more: Any) -> Tree:
    """One method of one path; 408, 413, 415 and 503 belong to every one that reads a body."""
    statuses = sorted({*failures, *((400, 408, 413, 415, 500, 503) if "requestBody" in more else ())})
    return {
        "tags": [tag],
        "summary": summary,
        **({"parameters": [_ref("parameters", name) for name in parameters]} if parameters else {}),
        **more,
        "responses": {"200": ok, **{str(status): _ref("responses", str(status)) for status in statuses}},
    }


# ------------------------------------------------------------------------------------------------------------ the paths


def _server(app: App, page_files: Sequence[str]) -> Tree:
    page = _answer("The page.", _TEXT, kind="text/html; charset=utf-8")
    more: Tree = {}
    if app.serves("/metrics"):
        text = _answer("As Accept asks; Prometheus' text format unless told.")
        text["content"] = {kind: {"schema": _TEXT} for kind in METRICS}
        more["/metrics"] = {"get": _operation("Server", "Metrics for Prometheus", text)}
    names = {"type": "string", "enum": list(page_files)}
    return {
        "/predict": {"post": _predict("Classify an image, where one model is served", ())},
        "/": {"get": _operation("Server", "The page for people", page, security=[])},
        "/docs": {"get": _operation("Server", "This document, to be read", page, security=[])},
        "/openapi.json": {"get": _operation("Server", "This document", _answer("OpenAPI 3.1.", {"type": "object"}))},
        "/page/{file}": {
            "get": _operation(
                "Server",
                "What the pages are made of",
                {
                    "description": "The file.",
                    "content": {
                        kind: {"schema": _TEXT}
                        for kind in ("text/css; charset=utf-8", "text/javascript; charset=utf-8", "image/svg+xml")
                    },
                },
                404,
                security=[],
            )
            | {"parameters": [{"name": "file", "in": "path", "required": True, "schema": names}]}
        },
        **more,
        "/v2": {"get": _operation("Server", "What the server is", _answer("Its name.", _ref("schemas", "Server")))},
        "/v2/health/live": {
            "get": _operation(
                "Server",
                "Whether the server lives",
                _answer("It does.", _object({"live": {"const": True}})),
                security=[],
            )
        },
        "/v2/health/ready": {
            "get": _operation(
                "Server",
                "Whether the server takes requests",
                _answer("It does.", _object({"ready": {"const": True}})),
                security=[],
            )
            | {
                "responses": {
                    "200": _answer("It does.", _object({"ready": {"const": True}})),
                    "503": _answer("It does not.", _object({"ready": {"const": False}})),
                }
            }
        },
        "/v2/models": {
            "get": _operation("Models", "Their names", _answer("All of them.", _object({"models": _list(_TEXT)})))
        },
        "/v2/models/stats": {
            "get": _operation("Models", "What all have done so far", _answer("Totals.", _ref("schemas", "Statistics")))
        },
    }


def _model_paths(specs: list[ModelSpec]) -> Tree:
    paths: Tree = {}
    for prefix, names in (
        ("/v2/models/{model}", ("model",)),
        ("/v2/models/{model}/versions/{version}", ("model", "version")),
    ):

        def get(summary: str, ok: Tree, names: tuple[str, ...] = names) -> Tree:
            return {"get": _operation("Models", summary, ok, 404, parameters=names)}

        paths |= {
            f"{prefix}/infer": {"post": _infer(specs, names)},
            f"{prefix}/predict": {"post": _predict("Classify an image", names)},
            prefix: get("Inputs and outputs", _answer("Its tensors.", _ref("schemas", "Metadata"))),
            f"{prefix}/ready": {"get": _ready(names)},
            f"{prefix}/config": get("Configuration", _answer("As Triton words it.", {"type": "object"})),
            f"{prefix}/stats": get("What it has done so far", _answer("Totals.", _ref("schemas", "Statistics"))),
            f"{prefix}/about": get(
                "Certificate, bench and wiring", _answer("What is known.", _ref("schemas", "About"))
            ),
            f"{prefix}/wiring": {"post": _wiring(names)},
        }
    return paths


def _ready(names: tuple[str, ...]) -> Tree:
    ready = _answer("It is.", _object({"name": _TEXT, "ready": {"const": True}}))
    draining = _answer("The server is shutting down.", _object({"name": _TEXT, "ready": {"const": False}}))
    operation = _operation("Models", "Whether it takes requests", ready, 400, 404, parameters=names)
    operation["responses"]["503"] = draining
    return operation


def _repository() -> Tree:
    loading = {
        "requestBody": {"content": {"application/json": {"schema": _object({"parameters": _NO_PARAMETERS}, ())}}}
    }
    unloading = {"requestBody": {"content": {"application/json": {"schema": _with_parameters({})}}}}
    asked = _object({"ready": {"type": "boolean", "description": "Only those that are ready."}}, ())
    row = _object({"name": _TEXT, "version": _TEXT, "state": _TEXT, "reason": _TEXT}, ("name", "version", "state"))
    done = _answer("Done.")
    control = ("model", "X-Control-Key")
    return {
        "/v2/repository/index": {
            "post": _operation(
                "Repository",
                "All models and versions that are known",
                _answer("One row a version.", _list(row)),
                requestBody={"content": {"application/json": {"schema": asked}}},
            )
        },
        "/v2/repository/models/{model}/load": {
            "post": _operation(
                "Repository", "Load a model, or load it again", done, 403, 404, parameters=control, **loading
            )
        },
        "/v2/repository/models/{model}/unload": {
            "post": _operation(
                "Repository", "Take a model out of service", done, 403, 404, parameters=control, **unloading
            )
        },
    }


# ------------------------------------------------------------------------------------------------- images and tensors


def _image_body() -> Tree:
    """The three ways to send an image."""
    image = {"type": "string", "format": "binary"}
    top = {"anyOf": [{"type": "integer", "minimum": 1}, _ref("schemas", "Digits")]}
    encoded = {
        "type": "string",
        "format": "base64-image",
        "contentEncoding": "base64",
        "description": "A JPEG, PNG or WebP file in base64, or a data: URL of one. Other URLs are not fetched.",
    }
    form = _object({"file": image, "top": _ref("schemas", "Digits")}, ("file",))
    return {
        "required": True,
        "description": "The image itself, a form with the image as a file, or JSON with its base64.",
        "content": {
            **{f"image/{kind}": {"schema": image} for kind in ("jpeg", "png", "webp")},
            "application/json": {"schema": _object({"image": encoded, "top": top}, ("image",))},
            "multipart/form-data": {
                "schema": form,
                "encoding": {"file": {"contentType": "image/png, image/jpeg, image/webp"}},
            },
        },
    }


def _predict(summary: str, names: tuple[str, ...]) -> Tree:
    ok = _answer("The most probable classes, the best first.", _ref("schemas", "Prediction"))
    parameters = (*names, "top", "X-Request-ID")
    return _operation("Images", summary, ok, 404, 504, parameters=parameters, requestBody=_image_body())


def _wiring(names: tuple[str, ...]) -> Tree:
    return _operation(
        "Images",
        "The connections that an image opens",
        _answer("Every connection of the stages that depend on the image.", _ref("schemas", "Wiring")),
        404,
        504,
        parameters=(*names, "X-Request-ID"),
        description="For models whose wiring depends on the image; 404 for others.",
        requestBody=_image_body(),
    )


def _infer(specs: list[ModelSpec], names: tuple[str, ...]) -> Tree:
    """JSON, or JSON and binary tensors after it."""
    alternatives = [_request(spec) for spec in specs] or [{"not": {}}]
    binary = {"type": "string", "format": "tensors"}
    ok = _answer("The outputs.", _ref("schemas", "Inference"))
    ok["content"]["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    length = {"description": "Bytes of JSON before the tensors.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}
    ok["headers"] = {**ok["headers"], "Inference-Header-Content-Length": length}
    return _operation(
        "Inference",
        "Run a model",
        ok,
        404,
        504,
        parameters=(*names, "Inference-Header-Content-Length", "X-Request-ID"),
        description=(
            "application/json: the whole body is JSON. application/octet-stream: JSON of "
            "Inference-Header-Content-Length bytes, in which the input has the parameter binary_data_size in the place "
            "of data, then the tensor, little-endian FP32; a length of 0: the body is one image's tensor and nothing "
            "else. The answer is binary where an output asks for binary_data."
        ),
        requestBody={
            "required": True,
            "content": {
                "application/json": {
                    "schema": alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives},
                },
                "application/octet-stream": {"schema": binary},
            },
        },
    )


_VALUE: Tree = {"type": ["string", "number", "boolean"]}
_NO_PARAMETERS: Tree = {"type": ["object", "null"], "maxProperties": 0}


def _with_parameters(known: Mapping[str, Any], *, shared_memory: bool = True) -> Tree:
    """A member ``parameters``, as every object of the protocol may have it."""
    extra = {} if shared_memory else {"patternProperties": {"^shared_memory": False}}
    parameters = {"type": ["object", "null"], "properties": dict(known), "additionalProperties": _VALUE, **extra}
    return _object({"parameters": parameters}, ())


def _request(spec: ModelSpec) -> Tree:
    """What one model takes, with the numbers of all batches up to ``MOST_BATCHES`` spelt out."""
    output = _with_parameters(
        {
            "classification": {"type": "integer", "minimum": 1, "maximum": (1 << 31) - 1},
            "binary_data": {"type": "boolean"},
        },
        shared_memory=False,
    )
    output["properties"]["name"] = {"const": spec.output_name}
    output["required"] = ["name"]
    timeout = [
        {"type": "integer", "minimum": 0, "maximum": (1 << 64) - 1},
        {"type": "string", "pattern": "^[0-9]{1,19}$"},
    ]
    tree = _with_parameters(
        {
            "timeout": {"anyOf": timeout, "description": "Microseconds; 0: the server's own limit."},
            "binary_data_output": {"type": "boolean"},
        }
    )
    batches = range(1, min(spec.max_batch_size, MOST_BATCHES) + 1)
    tensors = [_tensor(spec, batch) for batch in batches]
    if spec.max_batch_size > MOST_BATCHES:
        tensors.append(_tensor(spec, None))
    tree["properties"] |= {
        "id": {"type": "string", "maxLength": MAX_ID},
        "inputs": _list(tensors[0] if len(tensors) == 1 else {"anyOf": tensors}, minItems=1, maxItems=1),
        "outputs": {"type": ["array", "null"], "items": output, "maxItems": 1},
    }
    tree["required"] = ["inputs"]
    return tree


def _tensor(spec: ModelSpec, batch: int | None) -> Tree:
    """The input of a batch: flat in row-major order, or nested as its shape. None: of more than ``MOST_BATCHES``."""
    number = {"type": "number", "minimum": -LARGEST, "maximum": LARGEST}
    sizes = [_constant(size) for size in spec.shape]
    if batch is None:
        images = {"type": "integer", "minimum": MOST_BATCHES + 1, "maximum": spec.max_batch_size}
        least = (MOST_BATCHES + 1) * math.prod(spec.shape)
        data: Tree = {"anyOf": [_list(number, minItems=least), _list({"type": "array"}, minItems=MOST_BATCHES + 1)]}
    else:
        images, nested = _constant(batch), number
        for size in reversed((batch, *spec.shape)):
            nested = _list(nested, minItems=size, maxItems=size)
        total = batch * math.prod(spec.shape)
        data = {"anyOf": [_list(number, minItems=total, maxItems=total), nested]}
    tensor = _with_parameters({"binary_data_size": False}, shared_memory=False)
    tensor["properties"] |= {
        "name": {"const": spec.input_name},
        "datatype": {"const": DATATYPE},
        "shape": {"type": "array", "prefixItems": [images, *sizes], "items": False, "minItems": 4},
        "data": data,
    }
    tensor["required"] = ["name", "datatype", "shape", "data"]
    return tensor


def _constant(size: int) -> Tree:
    return {"type": "integer", "minimum": size, "maximum": size}


def _parameters(specs: list[ModelSpec]) -> Tree:
    names = sorted({spec.name for spec in specs})
    versions = sorted({spec.version for spec in specs}, key=int)
    return {
        "model": {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": names}},
        "version": {"name": "version", "in": "path", "required": True, "schema": {"type": "string", "enum": versions}},
        "top": {
            "name": "top",
            "in": "query",
            "description": "How many classes; 5 unless told.",
            "schema": {"type": "integer", "minimum": 1, "maximum": 999_999_999},
        },
        "X-Request-ID": {
            "name": "X-Request-ID",
            "in": "header",
            "description": "Up to 64 letters, digits, - and _; another one is replaced.",
            "schema": _TEXT,
        },
        "X-Control-Key": {"name": "X-Control-Key", "in": "header", "schema": _TEXT},
        "Inference-Header-Content-Length": {
            "name": "Inference-Header-Content-Length",
            "in": "header",
            "description": "Only with application/octet-stream.",
            "schema": {"type": "integer", "minimum": 0},
        },
    }


# --------------------------------------------------------------------------------------------------------- the answers


def _schemas() -> Tree:
    duration = _object({"count": _COUNT, "ns": _COUNT})
    durations = {"type": "object", "additionalProperties": duration}
    batch = {"type": "object", "required": ["batch_size"], "properties": {"batch_size": _COUNT}}
    tensor = _object({"name": _TEXT, "datatype": _TEXT, "shape": _list({"type": "integer"})})
    share = {"type": "number", "minimum": 0, "maximum": 1}
    time_ms = {"type": "number", "minimum": 0}
    place = _list(_COUNT, minItems=2, maxItems=2)
    known = {"type": ["object", "null"]}
    best = {"label": _TEXT, "index": _COUNT, "probability": share}
    return {
        "Error": _object({"error": _TEXT}, additionalProperties=False),
        "Digits": {"type": "string", "pattern": "^0{0,4}[1-9][0-9]{0,4}$"},
        "Server": _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
        "Metadata": _object(
            {
                "name": _TEXT,
                "versions": _list(_TEXT),
                "platform": _TEXT,
                "inputs": _list(_ref("schemas", "Tensor")),
                "outputs": _list(_ref("schemas", "Tensor")),
            }
        ),
        "Tensor": tensor,
        "Inference": _object(
            {
                "id": _TEXT,
                "model_name": _TEXT,
                "model_version": _TEXT,
                "outputs": _list(
                    _object(
                        {
                            **tensor["properties"],
                            "data": _list({"type": ["number", "string"]}),
                            "parameters": {"type": "object"},
                        },
                        ("name", "datatype", "shape"),
                    ),
                    minItems=1,
                    maxItems=1,
                ),
            },
            ("model_name", "model_version", "outputs"),
        ),
        "Statistics": _object(
            {
                "model_stats": _list(
                    _object(
                        {
                            "name": _TEXT,
                            "version": _TEXT,
                            "last_inference": _COUNT,
                            "inference_count": _COUNT,
                            "execution_count": _COUNT,
                            "inference_stats": durations,
                            "batch_stats": _list(batch),
                        }
                    )
                )
            }
        ),
        "Prediction": _object(
            {
                **best,
                "top": _list(_object(best)),
                "model": _TEXT,
                "version": _TEXT,
                "timing": _object({"decode_ms": time_ms, "queue_ms": time_ms, "compute_ms": time_ms, "batch": _COUNT}),
            }
        ),
        "Wiring": _object(
            {
                "model": _TEXT,
                "version": _TEXT,
                "edges": _list(_object({"from": place, "to": place, "weight": time_ms})),
                "idle": _list(place),
            }
        ),
        "About": _object(
            {
                "name": _TEXT,
                "version": _TEXT,
                "versions": _list(_TEXT),
                "input": {"type": "object"},
                "output": {"type": "object"},
                "limits": {"type": "object"},
                "served": {"type": "object"},
                "bundle": known,
                "certificate": known,
                "wiring": known,
            }
        ),
    }
