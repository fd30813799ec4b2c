"""MLServer: its own runtime class, Open Inference v2 with JSON tensors (it takes no binary ones over REST)."""

from __future__ import annotations

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from shared_session import Session


class OnnxModel(MLModel):
    async def load(self) -> bool:
        self._session = Session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = NumpyCodec.decode_input(payload.inputs[0])
        logits = NumpyCodec.encode_output(self._session.output_name, self._session.run(images))
        return InferenceResponse(model_name=self.name, outputs=[logits])
