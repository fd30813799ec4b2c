"""Tiny ONNX classifiers whose answers are known, and sealed bundles around them. Plain functions for any test."""

# B = batch, C = channels, H/W = height/width.
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from mcruntime.bundle import seal
from mcruntime.manifest import Change, Manifest, ModelFile, ModelInput, ModelOutput, Parity
from mcruntime.preprocess import Preprocessing
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

NUM_CLASSES = 4
LABELS = ("red", "green", "blue", "dark")
# Row k: how much class k likes the mean of each channel. "dark" likes none of them.
WEIGHT = np.array([[2, -1, -1], [-1, 2, -1], [-1, -1, 2], [-1, -1, -1]], dtype=np.float32)
BIAS = np.array([0.0, 0.0, 0.0, 0.5], dtype=np.float32)


def expected_logits(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the tiny model answers: [B, 4] float32 for [B, 3, H, W]."""
    return (images.mean(axis=(2, 3)) @ WEIGHT.T + BIAS).astype(np.float32)


def write_model(
    path: Path, size: int = 8, batch: int | str = "batch", bias: NDArray[np.float32] = BIAS, **names: str
) -> Path:
    """GlobalAveragePool, Flatten, Gemm: the model behind ``expected_logits``. ``names`` may rename input and output."""
    image, logits = names.get("input", "image"), names.get("output", "logits")
    nodes = [
        helper.make_node("GlobalAveragePool", [image], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
        helper.make_node("Gemm", ["features", "weight", "bias"], [logits], transB=1),
    ]
    return write_graph(
        path,
        nodes,
        [helper.make_tensor_value_info(image, TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info(logits, TensorProto.FLOAT, [batch, NUM_CLASSES])],
        {"weight": WEIGHT, "bias": bias},
    )


def write_graph(
    path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, NDArray[Any]]
) -> Path:
    """Any graph as an ONNX file of opset 20 that the checker accepts."""
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def some_images(num_images: int = 3, size: int = 8, seed: int = 0) -> NDArray[np.float32]:
    """Random images [num_images, 3, size, size] in -1..1."""
    return np.random.default_rng(seed).uniform(-1, 1, (num_images, 3, size, size)).astype(np.float32)


def tiny_file(**changes: Any) -> ModelFile:
    """The tiny model's entry in a manifest."""
    fields: dict[str, Any] = {
        "file": "model.onnx", "precision": "fp32", "opset": 20, "ir_version": 10, "selftest_max_abs": 1e-4,
    }  # fmt: skip
    return ModelFile(**(fields | changes))


def tiny_manifest(name: str = "tiny", size: int = 8, **changes: Any) -> Manifest:
    """A manifest that fits the tiny model; ``changes`` replace fields."""
    fields: dict[str, Any] = {
        "name": name,
        "input": ModelInput(name="image", shape=(3, size, size)),
        "output": ModelOutput(name="logits", num_classes=NUM_CLASSES),
        "models": {"fp32": tiny_file()},
        "serve": "fp32",
        "labels": LABELS,
        "preprocessing": Preprocessing(
            image_size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", crop_pct=1.0
        ),
        "parents": {"recipe": "0" * 64},
        "versions": {"onnx": onnx.__version__},
        "params": Change(before=32, after=16),
        "macs": Change(before=24, after=12),
        "parity": (
            Parity(
                hop="onnx", batch=3, images="noise", max_abs=1e-7, p99=1e-8, cosine=1.0, top1_agreement=1.0, passed=True
            ),
        ),
        "seeds": {"train": 0},
    }
    return Manifest(**(fields | changes))


def write_bundle(folder: Path, name: str = "tiny", size: int = 8, **changes: Any) -> Path:
    """A sealed bundle around the tiny model; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model.onnx", size)
    images = some_images(3, size)
    np.savez(folder / "selftest.npz", images=images, logits=expected_logits(images))
    (folder / "certificate.json").write_text('{"removed": []}\n', encoding="utf-8")
    (folder / "reports").mkdir(exist_ok=True)
    (folder / "reports" / "parity.md").write_text("# parity\n", encoding="utf-8")
    seal(folder, tiny_manifest(name, size, **changes))
    return folder
