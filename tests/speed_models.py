"""The nets that the server is timed with, as sealed bundles; random weights, made once, kept in a folder.

    resnet18         timm's resnet18, 3x64x64, 10 classes: about 1 ms an image on two cores
    resnet34         the dense half of a pair
    resnet34_pruned  the other half: without the blocks between the first and the last of every stage
    tiny             one small convolution, pooling, one linear layer: about 40 us, so that the server is what is timed

All of them go the way of every model: compile, export, verify, seal.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import timm
import torch
from mcruntime.bundle import load_bundle
from mcruntime.preprocess import Preprocessing
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mcdeploy
from mcdeploy.compile.certify import scramble
from mcdeploy.connectivity.stages import find_stages
from mcdeploy.package import Origin, prune_export
from mcdeploy.recipe import ExportConfig

NAMES = ("resnet18", "resnet34", "resnet34_pruned", "tiny")
SIZE = 64  # pixels
NUM_CLASSES = 10
SHAPE = (3, SIZE, SIZE)
PREPROCESSING = Preprocessing(
    image_size=SIZE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation="bilinear", crop_pct=0.875
)


def make_bundle(name: str, work: Path) -> Path:
    """The sealed bundle ``work/name``, made by this call or by an earlier one."""
    folder = work / name
    if not (folder / "manifest.json").exists():
        torch.manual_seed(0)
        val = DataLoader(TensorDataset(torch.randn(64, *SHAPE), torch.zeros(64, dtype=torch.long)), batch_size=32)
        prune_export(
            _model(name),
            val,
            ExportConfig(),
            name=name,
            out=folder,
            labels=[f"class_{index}" for index in range(NUM_CLASSES)],
            preprocessing=PREPROCESSING,
            origin=Origin(parents={"weights": hashlib.sha256(b"seed 0").hexdigest()}, seeds={"weights": 0}),
            say=lambda line: print(f"  {name}: {line}", flush=True),
        )
    return folder


def model_file(bundle: Path) -> Path:
    """The ONNX file that this bundle is served from."""
    return bundle / load_bundle(bundle).model.file


def _model(name: str) -> nn.Module:
    torch.manual_seed(1)
    if name == "tiny":
        model: nn.Module = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, NUM_CLASSES)
        )
        return model.eval()
    backbone, _, is_pruned = name.partition("_")
    model = timm.create_model(backbone, num_classes=NUM_CLASSES).eval()
    scramble(model)  # batch norms that a fresh net does not have, so that no block is an identity
    if not is_pruned:
        return model
    stages = find_stages(model, torch.zeros(2, *SHAPE))
    inner = tuple(f"{stage.name}.{block}" for stage in stages for block in stage.blocks[1:-1])
    return mcdeploy.wire(model, "drop", image_size=SIZE, blocks=inner)
