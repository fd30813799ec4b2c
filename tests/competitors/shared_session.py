"""What every competitor's handler runs: the same ONNX file, the same ONNX Runtime settings, told by the environment."""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
from numpy.typing import NDArray

MODEL_FILE = os.environ.get("SPEED_MODEL_FILE", "")
MODEL_NAME = os.environ.get("SPEED_MODEL_NAME", "")
THREADS = int(os.environ.get("SPEED_THREADS", "1"))
SHAPE = (3, 64, 64)
MAX_BATCH = 32
WINDOW_S = 0.0005  # how long those wait for more requests that must be told a time


class Session:
    """One copy of the model; float32 [B, 3, 64, 64] in, logits out."""

    def __init__(self, file: str = MODEL_FILE, threads: int = THREADS) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.input_name = self._session.get_inputs()[0].name
        self.output_name = self._session.get_outputs()[0].name

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._session.run(None, {self.input_name: images})[0]


def as_image(data: bytes) -> NDArray[np.float32]:
    """[3, 64, 64] out of its raw bytes; no copy."""
    return np.frombuffer(data, np.float32).reshape(SHAPE)
