"""KServe's Python SDK: Open Inference v2 over REST and gRPC. Arguments: PORT GRPC_PORT."""

from __future__ import annotations

import sys
from typing import Any

import kserve.logging
from kserve import InferRequest, InferResponse, Model, ModelServer
from kserve.protocol.infer_type import InferOutput
from kserve.utils.utils import generate_uuid
from shared_session import MODEL_NAME, Session


class OnnxModel(Model):
    def load(self) -> bool:
        self._session = Session()
        self.ready = True
        return self.ready

    async def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        logits = self._session.run(payload.inputs[0].as_numpy())
        output = InferOutput(self._session.output_name, list(logits.shape), "FP32")
        output.set_data_from_numpy(logits, binary_data=payload.from_grpc)
        return InferResponse(payload.id or generate_uuid(), self.name, [output], from_grpc=payload.from_grpc)


def main() -> None:
    for name in ("kserve", "kserve.trace", "uvicorn.access"):  # else up to three lines a request
        kserve.logging.KSERVE_LOG_CONFIG["loggers"][name]["level"] = "WARNING"
    kserve.logging.configure_logging(kserve.logging.KSERVE_LOG_CONFIG)
    model = OnnxModel(MODEL_NAME)
    model.load()
    server = ModelServer(http_port=int(sys.argv[1]), grpc_port=int(sys.argv[2]), enable_latency_logging=False)
    server.start([model])


if __name__ == "__main__":
    main()
