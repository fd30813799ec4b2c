"""Reading a request's body within limits: bytes of one, bytes of all together, time, and what it unpacks to."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mcruntime.server.errors import OverloadedError, RequestError, TooLargeError

Receive = Any
ENCODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # to zlib's window bits


class Budget:
    """Bytes of request bodies that may be held at the same time."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used = 0

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """Bytes that are given back at the end."""
        lease = Lease(self)
        try:
            yield lease
        finally:
            self.used -= lease.held


class Lease:
    """What one request holds of a budget."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.held = 0

    def take(self, num_bytes: int) -> None:
        """Hold more.

        Raises:
            OverloadedError: the budget is used up.
        """
        if self._budget.used + num_bytes > self._budget.max_bytes:
            raise OverloadedError("too many bytes of requests are being read; try again")
        self._budget.used += num_bytes
        self.held += num_bytes


async def read_body(
    receive: Receive, headers: dict[bytes, bytes], lease: Lease, *, max_bytes: int, timeout_s: float
) -> bytes:
    """The whole body, unpacked.

    Of a body that is too large some more is read and dropped, so that the client sees the answer.

    Raises:
        RequestError: 400, 408, 413, 415 or 503, and what is wrong.
    """
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
    if encoding not in ("identity", "", *ENCODINGS):
        raise RequestError(f"Content-Encoding '{encoding[:20]}' is not supported; send gzip, deflate or none", 415)
    message = await receive()  # mostly all of it
    body: bytes = message.get("body", b"")
    if message["type"] == "http.disconnect":
        raise RequestError("the request body did not arrive")
    if message.get("more_body"):
        body = await _read_rest(receive, body, lease, max_bytes, timeout_s)
    else:
        lease.take(len(body))
    if len(body) > max_bytes:
        raise _too_large(max_bytes)
    return body if encoding in ("identity", "") else _unpack(body, encoding, lease, max_bytes)


async def _read_rest(receive: Receive, first: bytes, lease: Lease, max_bytes: int, timeout_s: float) -> bytes:
    chunks, num_bytes = [first], len(first)
    lease.take(len(first))
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise RequestError("the request body did not arrive")
                chunk = message.get("body", b"")
                num_bytes += len(chunk)
                if num_bytes <= max_bytes:
                    lease.take(len(chunk))
                    chunks.append(chunk)
                elif num_bytes > 4 * max_bytes:
                    break
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise RequestError(f"the request body did not arrive within {timeout_s:.0f} s", 408) from None
    if num_bytes > max_bytes:
        raise _too_large(max_bytes)
    return b"".join(chunks)


def _unpack(body: bytes, encoding: str, lease: Lease, max_bytes: int) -> bytes:
    unpacker = zlib.decompressobj(ENCODINGS[encoding])
    try:
        whole = unpacker.decompress(body, max_bytes + 1)
    except zlib.error:
        raise RequestError(f"the request body is not {encoding}") from None
    if len(whole) > max_bytes:
        raise TooLargeError(f"the request body unpacks to more than {max_bytes} bytes; send a smaller batch")
    if not unpacker.eof or unpacker.unused_data:
        raise RequestError(f"the request body is not one whole {encoding} stream")
    lease.take(len(whole))
    return whole


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"the request body is larger than {max_bytes} bytes; send a smaller batch")
