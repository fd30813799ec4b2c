"""Short training runs for tests: a small ResNet on digits, a few steps an epoch."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from mcdeploy import package
from mcdeploy.package import Shipped
from mcdeploy.recipe import Recipe, parse_recipe


def short_recipe(**changes: dict[str, Any]) -> Recipe:
    """digits, 96 images an epoch, MaskConnect K=1; ``changes`` replace keys of sections."""
    tree: dict[str, Any] = {
        "name": "short",
        "data": {"source": "digits", "image_size": 8, "images_per_epoch": 96, "crop": "pad4"},
        "model": {"backbone": "resnet_digits"},
        "connectivity": {"rule": "maskconnect", "fan_in": 1},
        "train": {"epochs": 3, "joint_epochs": 1, "batch_size": 32, "lr": 0.05, "bn_batches": 2, "device": "cpu"},
    }
    for section, keys in changes.items():
        tree[section] = keys if section == "connectivity" else {**tree.get(section, {}), **keys}
    return parse_recipe(tree, "test")


def write_recipe(path: Path, recipe: Recipe) -> Path:
    """The recipe as a YAML file."""
    import yaml

    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return path


def reuse_compiled(monkeypatch: pytest.MonkeyPatch, shipped: Shipped) -> None:
    """From now on a bundle is made from what was compiled and exported for ``shipped``, without doing that again."""
    whole = shipped.bundle.folder / "model.onnx"
    monkeypatch.setattr(package, "compile_with_certificate", lambda *given: (shipped.compiled, shipped.certificate))
    monkeypatch.setattr(package, "export_onnx", lambda model, path, example, **options: shutil.copy(whole, path))
    monkeypatch.setattr(package.Hops, "check_program", lambda hops, program: None)
    monkeypatch.setattr(package, "export_program", lambda model, path, example: path.write_bytes(b""))
