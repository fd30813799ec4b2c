"""What schemathesis cannot know from an OpenAPI document: real images, and a header that counts the body's bytes.

Loaded into schemathesis by ``serving_schemathesis.py``. It adds no excuse: no failure is filtered.
"""

import base64
import io
import json
import struct

import schemathesis
from hypothesis import strategies as st
from PIL import Image

LENGTH = "Inference-Header-Content-Length"
SHAPE = [3, 8, 8]  # of the tiny bundle
SIZES = st.integers(1, 40)


def _image(kind, width, height, colour):
    stream = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(stream, format=kind)
    return stream.getvalue()


def _images(kind):
    return st.builds(_image, st.just(kind), SIZES, SIZES, st.tuples(*[st.integers(0, 255)] * 3))


def _tensor(batch, seed):
    numbers = [((seed + 31 * i) % 400 - 200) / 100 for i in range(batch * 192)]
    return struct.pack(f"<{len(numbers)}f", *numbers)


def _binary(batch, seed, is_bare, is_binary_out):
    if is_bare:
        return _tensor(1, seed)
    data = _tensor(batch, seed)
    size = {"binary_data_size": len(data)}
    tensor = {"name": "image", "datatype": "FP32", "shape": [batch, *SHAPE], "parameters": size}
    head = {"inputs": [tensor], "parameters": {"binary_data_output": is_binary_out}}
    return json.dumps(head).encode() + data


def _like_an_image(data):
    """Numbers of up to 10,000: FP32 holds larger ones, but a net may answer NaN to them, which the server refuses."""
    if isinstance(data, list):
        return [_like_an_image(item) for item in data]
    return max(-1e4, min(1e4, data))


def _is_bare(body):
    return len(body) == 768 and not body.startswith(b'{"inputs"')


schemathesis.openapi.media_type("image/png", _images("PNG"))
schemathesis.openapi.media_type("image/jpeg", _images("JPEG"))
schemathesis.openapi.media_type("image/webp", _images("WEBP"))
schemathesis.openapi.media_type(
    "application/octet-stream",
    st.builds(_binary, st.integers(1, 2), st.integers(0, 400), st.booleans(), st.booleans()),
)
schemathesis.openapi.format("base64-image", _images("PNG").map(lambda data: base64.b64encode(data).decode()))


@schemathesis.hook
def before_call(context, case, kwargs):
    """The header belongs to binary bodies, with the length of their JSON; a wrong one on purpose is left alone."""
    if not case.operation.path.endswith("/infer"):
        return
    negated = case.meta is not None and any(
        str(info.mode.value) == "negative" for info in case.meta.components.values()
    )
    if negated:
        return
    case.headers.pop(LENGTH, None)
    if case.media_type == "application/json":
        for tensor in case.body["inputs"]:
            tensor["data"] = _like_an_image(tensor["data"])
    if case.media_type == "application/octet-stream" and isinstance(case.body, bytes):
        length = 0
        if not _is_bare(case.body):
            _, length = json.JSONDecoder().raw_decode(case.body.decode("latin-1"))
        case.headers[LENGTH] = str(length)
