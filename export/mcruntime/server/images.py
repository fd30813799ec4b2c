"""An image in, labels out: finding the image in a request, decoding it off the event loop, naming the classes."""

# B = batch, C = channels, H/W = height/width, N = classes.
from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import numpy as np
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from mcruntime.preprocess import Preprocessing, open_image, prepare
from mcruntime.server.errors import RequestError
from mcruntime.server.protocol import load_json
from mcruntime.server.tensors import Images, Logits, as_whole
from mcruntime.server.web import Request

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # else every bad form is a line in the log
TOP = 5
FIELDS = ("file", "image")  # of a form
MOST_FIELDS = 100  # of a form; those that mean nothing here are passed over


async def read_image(request: Request) -> tuple[bytes, int]:
    """The bytes of the image, and how many classes are wanted.

    The body is the image itself, a form with the image as a file, or JSON: ``{"image": "<base64>", "top": 3}``. A
    ``data:`` URL is taken for its base64; no other URL is looked at, let alone fetched.

    Raises:
        RequestError: 400 and what is wrong.
    """
    body = await request.read()
    kind = request.header("content-type").partition(";")[0].strip().lower()
    asked = request.query("top")
    top: Any = TOP if asked is None else _read_top(asked)  # checked even where the body says another number
    if kind == "multipart/form-data":
        image, top = await _from_form(request, body, top)
    elif kind == "application/json":
        image, top = _from_json(body, top)
    else:
        image = body
    return image, _read_top(top)


def decode(data: bytes, how: Preprocessing, max_pixels: int) -> Images:
    """One image as the model reads it, [1, C, H, W]. Blocks; not for the event loop.

    Raises:
        DataError: not an image, damaged, or too large.
    """
    return prepare(open_image(data, max_pixels), how, max_pixels)[np.newaxis]


def name_classes(logits_N: Logits, labels: Sequence[str], top: int) -> list[dict[str, Any]]:
    """The most probable classes, best first; of equal ones the lower index."""
    exponents = np.exp(logits_N.astype(np.float64) - logits_N.max())
    probabilities = exponents / exponents.sum()
    order = np.argsort(-logits_N, kind="stable")[:top]  # probabilities may underflow to ties
    return [{"label": labels[i], "index": int(i), "probability": float(probabilities[i])} for i in order]


async def _from_form(request: Request, body: bytes, top: Any) -> tuple[bytes, Any]:
    async def chunks() -> AsyncGenerator[bytes, None]:
        yield body

    headers = Headers(raw=list(request.headers.items()))
    parser = MultiPartParser(headers, chunks(), max_files=1, max_fields=MOST_FIELDS, max_part_size=len(body) + 1)
    parser.spool_max_size = len(body) + 1  # nothing is written to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(f"the multipart form cannot be read: {error.message}") from None
    except (ValueError, KeyError, LookupError):  # an unknown charset, a boundary that is not ASCII
        raise RequestError("the multipart form cannot be read") from None
    try:
        part = next((form[name] for name in FIELDS if name in form), None)
        if part is None:
            raise RequestError("the multipart form has no field 'file'; send one with the image in it")
        if isinstance(part, str):
            raise RequestError("the multipart field 'file' has no filename, so it is text; send the image as a file")
        return await part.read(), form.get("top", top)
    finally:
        await form.close()


def _from_json(body: bytes, top: Any) -> tuple[bytes, Any]:
    tree = load_json(body)
    text = tree.get("image")
    if not isinstance(text, str):
        raise RequestError('the JSON has no text \'image\'; send {"image": "<base64 of a JPEG, PNG or WebP file>"}')
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True), tree.get("top", top)
    except (binascii.Error, ValueError):
        raise RequestError("'image' is not base64; URLs are not fetched, send the file itself") from None


def _read_top(top: Any) -> int:
    if isinstance(top, str) and top.isascii() and top.isdecimal() and len(top) < 10:
        top = int(top)
    top = as_whole(top)
    if type(top) is not int or top < 1:
        raise RequestError("'top' must be a whole number of at least 1")
    return top
