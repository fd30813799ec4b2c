"""BentoML: base64 in JSON in, lists of logits out, its own batching."""

from __future__ import annotations

import base64

import bentoml
import numpy as np
from shared_session import MAX_BATCH, Session, as_image


@bentoml.service(workers=1, traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Classifier:
    def __init__(self) -> None:
        self.session = Session()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH)
    def predict(self, images: list[str]) -> list[list[float]]:
        return self.session.run(np.stack([as_image(base64.b64decode(image)) for image in images])).tolist()
