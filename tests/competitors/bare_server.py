"""The least a Python server can be: a bare ASGI app that runs the model on its event loop. What it costs, all pay.

No batching, no threads, no limits, no keys, no metrics: a yardstick, nothing to put on a network. Argument: PORT.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from shared_session import Session, as_image

SESSION = Session()


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """The raw bytes of one tensor in, those of its logits out."""
    chunks, is_more = [], True
    while is_more:
        message = await receive()
        chunks.append(message.get("body", b""))
        is_more = message.get("more_body", False)
    answer = SESSION.run(as_image(b"".join(chunks))[None]).tobytes()
    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def main() -> None:
    uvicorn.run(
        app, host="127.0.0.1", port=int(sys.argv[1]), lifespan="off", log_level="warning", access_log=False,
        loop="uvloop", http="httptools",
    )  # fmt: skip


if __name__ == "__main__":
    main()
