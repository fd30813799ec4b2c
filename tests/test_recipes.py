"""Every recipe that ships builds its own net and takes one training step, on generated images and without data."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from imagenet_samples import Steps, main
from PIL import Image
from tiny_models import images

from mcdeploy.connectivity.gates import Gates, weights
from mcdeploy.errors import WiringError
from mcdeploy.recipe import load_recipe, parse_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
# The smallest images first; a net whose head is made for one size gets that one.
SIZES = {"small": (16, 32), "large": (64, 128, 224)}


def num_classes(name: str) -> int:
    return {"imagenet": 1000, "cifar100": 100}.get(name.split("_")[0], 10)


@cache
def take_a_step(model: str, connectivity: str, train: str, classes: int, image_size: int) -> dict[str, object]:
    """Build, step once, and tell what happened. Recipes that differ in nothing of this share the answer."""
    tree = {
        "name": "x",
        "model": json.loads(model),
        "connectivity": json.loads(connectivity),
        "train": json.loads(train),
    }
    for size in SIZES["small" if image_size <= 32 else "large"]:
        try:
            training = Steps(parse_recipe(tree, "test"), classes, size)
            before = [weight.detach().clone() for weight in weights(training.model)]
            gates = [module for module in training.model.modules() if isinstance(module, Gates)]
            masks = [module.mask_GN.clone() for module in gates]
            loss = training.step(images(2, size), torch.arange(2))
            break
        except (WiringError, RuntimeError):
            if size >= image_size:
                raise
    return {
        "loss": loss,
        "share_moved": sum(not torch.equal(a, b) for a, b in zip(before, weights(training.model), strict=True))
        / len(before),
        "has_joint_phase": training.gates is not None,
        "drawn": [mask.sum(1).tolist() for mask in masks],
        "wanted": [[float(min(module.fan_in, n)) for n in module.counts] for module in gates],
        "drew_anew": any(not torch.equal(a, b.mask_GN) for a, b in zip(masks, gates, strict=True)),
        "has_choices": any(n > module.fan_in for module in gates for n in module.counts),
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_builds_its_net_and_takes_a_step(path):
    recipe = load_recipe(path)
    outcome = take_a_step(
        recipe.model.model_copy(update={"weights": None, "pretrained": False}).model_dump_json(),
        recipe.connectivity.model_dump_json(),
        recipe.train.model_copy(update={"distill": 0.0}).model_dump_json(),
        num_classes(path.stem),
        recipe.data.image_size,
    )
    assert math.isfinite(outcome["loss"])
    assert outcome["loss"] > 0
    assert outcome["share_moved"] > 0.2  # dead blocks and closed branches stay where they are
    assert outcome["drawn"] == outcome["wanted"]
    assert outcome["drew_anew"] == (outcome["has_joint_phase"] and outcome["has_choices"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_what_it_is_its_command_its_hardware_and_its_result(path):
    head = path.read_text().split("\nname:")[0].splitlines()
    assert all(line.startswith("# ") for line in head)
    text = "\n".join(head)
    assert f"mcdeploy train recipes/{path.name}" in text
    assert "Hardware:" in text
    assert "Result:" in text


def test_the_sample_command_trains_on_a_folder_and_says_so(tmp_path, capsys):
    for label in range(4):
        Image.new("RGB", (80, 70), (60 * label, 90, 30)).save(tmp_path / f"{label:04d}_n{label:08d}.jpg")
    name = "imagenet_sparsenet121_32"
    assert main([str(tmp_path), "--steps", "2", "--batch", "2", "--only", name]) == 0
    assert capsys.readouterr().out.startswith(f"{name}: 4.51 M parameters, 64 px, loss ")
    with pytest.raises(FileNotFoundError, match="4 images"):
        main([str(tmp_path), "--steps", "3", "--batch", "2", "--only", name])
