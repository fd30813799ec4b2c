"""Ray Serve: the raw bytes of one tensor in and out, its own batching. Argument: PORT."""

from __future__ import annotations

import signal
import sys

import numpy as np
import ray
from ray import serve
from ray.serve.schema import LoggingConfig
from shared_session import MAX_BATCH, WINDOW_S, Session, as_image
from starlette.requests import Request
from starlette.responses import Response

QUIET = LoggingConfig(enable_access_log=False)


@serve.deployment(logging_config=QUIET, max_ongoing_requests=4 * MAX_BATCH)
class Classifier:
    def __init__(self) -> None:
        self.session = Session()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WINDOW_S)
    async def infer(self, bodies: list[bytes]) -> list[bytes]:
        logits = self.session.run(np.stack([as_image(body) for body in bodies]))
        return [row.tobytes() for row in logits]

    async def __call__(self, request: Request) -> Response:
        return Response(await self.infer(await request.body()), media_type="application/octet-stream")


def main() -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])}, logging_config=QUIET)
    serve.run(Classifier.bind(), route_prefix="/predict")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.pause()


if __name__ == "__main__":
    main()
