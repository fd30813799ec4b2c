"""Reading a request's body within limits: bytes of one, bytes of all together, time, and what it unpacks to."""

from __future__ import annotations

import asyncio
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from mcruntime.server.errors import OverloadedError, RequestError, TooLargeError

Receive = Any
UNPACKED_AT_ONCE = 1 << 18  # bytes on the event loop; more goes to a thread: a kilobyte may unpack to a megabyte
UNPACKER = ThreadPoolExecutor(1, thread_name_prefix="unpack")  # one: every thread keeps a heap as large as its peak
ENCODINGS = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}  # to zlib's window bits


class Budget:
    """Bytes of request bodies that may be held at the same time; of HTTP on the event loop, and of gRPC in threads."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used = 0
        self.lock = threading.Lock()


class Lease:
    """What one request holds of a budget, given back at the end: ``with Lease(budget) as lease``."""

    __slots__ = ("_budget", "_is_over", "held")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._is_over = False
        self.held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give everything back."""
        with self._budget.lock:
            self._budget.used -= self.held
            self._is_over = True

    def take(self, num_bytes: int) -> None:
        """Hold more.

        Raises:
            OverloadedError: the budget is used up.
        """
        with self._budget.lock:
            # Over: its client hung up, while a thread was unpacking for it.
            if self._is_over or self._budget.used + num_bytes > self._budget.max_bytes:
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
    encoding = b"identity"
    if b"content-encoding" in headers:
        encoding = headers[b"content-encoding"].strip().lower()
        if encoding not in (b"identity", b"", *ENCODINGS):
            name = encoding[:20].decode("latin-1")
            raise RequestError(f"Content-Encoding '{name}' is not supported; send gzip, deflate or none", 415)
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read_all(receive, lease, max_bytes)
    except TimeoutError:
        raise RequestError(f"the request body did not arrive within {timeout_s:.0f} s", 408) from None
    return body if encoding in (b"identity", b"") else await _unpack(body, encoding, lease, max_bytes)


async def _read_all(receive: Receive, lease: Lease, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError("the request body did not arrive")
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes <= max_bytes:
            lease.take(len(chunk))
            chunks.append(chunk)
        if not message.get("more_body") or num_bytes > 4 * max_bytes:
            break
    if num_bytes > max_bytes:
        raise TooLargeError(f"the request body is larger than {max_bytes} bytes; send a smaller batch")
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _unpack(body: bytes, encoding: bytes, lease: Lease, max_bytes: int) -> bytes:
    unpacker = zlib.decompressobj(ENCODINGS[encoding])
    try:
        whole = unpacker.decompress(body, min(UNPACKED_AT_ONCE, max_bytes + 1))
        if UNPACKED_AT_ONCE <= len(whole) <= max_bytes and not unpacker.eof:
            loop = asyncio.get_running_loop()
            whole = await loop.run_in_executor(UNPACKER, _unpack_rest, unpacker, whole, lease, max_bytes)
        else:
            lease.take(len(whole))
    except zlib.error:
        raise RequestError(f"the request body is not {encoding.decode()}") from None
    if len(whole) > max_bytes:
        raise TooLargeError(f"the request body unpacks to more than {max_bytes} bytes; send a smaller batch")
    if not unpacker.eof or unpacker.unused_data:
        raise RequestError(f"the request body is not one whole {encoding.decode()} stream")
    return whole


def _unpack_rest(unpacker: Any, first: bytes, lease: Lease, max_bytes: int) -> bytes:
    """The whole, or one piece more than is allowed. Leased piece by piece: a small body need not become large."""
    pieces, num_bytes = [first], len(first)
    lease.take(len(first))
    while not unpacker.eof and num_bytes <= max_bytes:
        piece = unpacker.decompress(unpacker.unconsumed_tail, UNPACKED_AT_ONCE)
        if not piece:
            break
        lease.take(len(piece))
        pieces.append(piece)
        num_bytes += len(piece)
    return b"".join(pieces)
