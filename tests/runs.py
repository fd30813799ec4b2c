"""Short training runs for tests: a small ResNet on digits, a few steps an epoch."""

from pathlib import Path
from typing import Any

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
