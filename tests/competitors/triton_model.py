"""Triton's Python backend: what the model repository's ``1/model.py`` is. Batches what Triton gathered."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from shared_session import Session


class TritonPythonModel:
    def initialize(self, arguments: dict[str, str]) -> None:
        self._session = Session()

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = [
            pb_utils.get_input_tensor_by_name(request, self._session.input_name).as_numpy() for request in requests
        ]
        logits = self._session.run(inputs[0] if len(inputs) == 1 else np.concatenate(inputs))
        ends = np.cumsum([len(images) for images in inputs])
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(self._session.output_name, part)])
            for part in np.split(logits, ends[:-1])
        ]
