"""A tiny ONNX classifier with an ``If``, as per-image wirings have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper
from tiny_onnx import write_graph

FLOAT = TensorProto.FLOAT


def write_if(path: Path) -> Path:
    """Images [B, 3, 2, 2] -> one of two Gemms, by the largest pixel -> logits [B, 3]."""
    branches = [
        helper.make_graph(
            [helper.make_node("Gemm", ["x", weight], [f"{weight}_out"], f"{weight}_gemm")],
            weight,
            [],
            [helper.make_tensor_value_info(f"{weight}_out", FLOAT, None)],
        )
        for weight in ("a", "b")
    ]
    nodes = [
        helper.make_node("Flatten", ["images"], ["x"], "flatten"),
        helper.make_node("ReduceMax", ["images"], ["most"], "max", keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["is"], "greater"),
        helper.make_node("If", ["is"], ["logits"], "if", then_branch=branches[0], else_branch=branches[1]),
    ]
    weight = np.ones((12, 3), np.float32)
    return write_graph(
        path,
        nodes,
        [helper.make_tensor_value_info("images", FLOAT, ["batch", 3, 2, 2])],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", 3])],
        {"a": weight, "b": weight, "zero": np.zeros((), np.float32)},
    )
