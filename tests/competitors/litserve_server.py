"""LitServe: base64 in JSON in, a list of logits out. Arguments: PORT batch|single."""

from __future__ import annotations

import base64
import sys

import litserve
import numpy as np
from numpy.typing import NDArray
from shared_session import MAX_BATCH, WINDOW_S, Session, as_image


class Classifier(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.session = Session()

    def decode_request(self, request) -> NDArray[np.float32]:  # LitServe reads a type here as FastAPI would
        return as_image(base64.b64decode(request["image"]))

    def batch(self, inputs: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.stack(inputs)

    def predict(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.session.run(images if images.ndim == 4 else images[np.newaxis])

    def unbatch(self, output: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return list(output)

    def encode_response(self, output: NDArray[np.float32]) -> dict[str, list[float]]:
        return {"logits": output.ravel().tolist()}


def main() -> None:
    port, how = int(sys.argv[1]), sys.argv[2]
    batching = {"max_batch_size": MAX_BATCH, "batch_timeout": WINDOW_S} if how == "batch" else {}
    server = litserve.LitServer(Classifier(**batching), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False, access_log=False)


if __name__ == "__main__":
    main()
