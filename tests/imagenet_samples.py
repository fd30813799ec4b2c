"""A few training steps of every ImageNet recipe on a folder of sample images named <class index>_<synset>.jpg.

    PYTHONPATH=tests python -m imagenet_samples ROOT [--steps 3] [--batch 8] [--size 64] [--only NAME ...]

Prints a line a recipe: its losses and how long it took. Ends with 1 if a loss is not finite or a recipe breaks. The
images are small and few: this shows that the recipes run on photographs, not how well they learn.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from mcdeploy.connectivity.gates import GateOptimizer, weights
from mcdeploy.connectivity.wiring import wired_stages
from mcdeploy.errors import McdeployError
from mcdeploy.model import build_model
from mcdeploy.recipe import Recipe, load_recipe
from mcdeploy.section import GatedConfig
from mcdeploy.train import _loss, _optimizer

RECIPES = Path(__file__).parents[1] / "recipes"


class Steps:
    """A recipe's model and what one step of its training needs, without loaders and without its starting weights."""

    def __init__(self, recipe: Recipe, num_classes: int, image_size: int) -> None:
        torch.manual_seed(recipe.seed)
        backbone = recipe.model.model_copy(update={"weights": None, "pretrained": False})
        rule = recipe.connectivity
        self.recipe = recipe
        self.model: nn.Module = build_model(backbone, rule, num_classes, image_size).train()
        self.optimizer = _optimizer(self.model, recipe.train)
        learned = isinstance(rule, GatedConfig) and rule.has_joint_phase()
        self.gates = GateOptimizer(self.model, rule.gate_lr, rule.gate_grad, recipe.seed) if learned else None
        self.loss_of = _loss(recipe.train, soft_targets=False)
        self.stages = wired_stages(self.model).values()
        for stage in self.stages:
            stage.start_epoch(0, recipe.train.epochs)

    def step(self, images_BCHW: Tensor, labels_B: Tensor) -> float:
        """One step of weights and gates, in float32; returns the loss."""
        loss = self.loss_of(self.model(images_BCHW), labels_B)
        loss = sum((added for stage in self.stages if (added := stage.penalty()) is not None), start=loss)
        loss.backward()
        if self.recipe.train.clip_grad:
            nn.utils.clip_grad_norm_(weights(self.model), self.recipe.train.clip_grad)
        self.optimizer.step()
        if self.gates:
            self.gates.step()
        self.optimizer.zero_grad()
        for stage in self.stages:
            stage.after_step()
        return loss.item()


def sample_batches(root: Path, recipe: Recipe, size: int, batch: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Random crops of the samples, [batch, 3, size, size], with their labels.

    Raises:
        FileNotFoundError: fewer images in the folder than asked for.
    """
    paths = sorted(root.glob("*_n*.jpg"))
    if len(paths) < batch * steps:
        raise FileNotFoundError(f"{root}: {len(paths)} images named <class index>_<synset>.jpg, need {batch * steps}")
    prepare = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(recipe.data.hflip),
            transforms.ToTensor(),
            transforms.Normalize(recipe.data.mean, recipe.data.std),
        ]
    )
    torch.manual_seed(recipe.seed)
    picked = [paths[i] for i in torch.randperm(len(paths))[: batch * steps]]
    images = torch.stack([prepare(Image.open(path).convert("RGB")) for path in picked])
    labels = torch.tensor([int(path.name.split("_")[0]) for path in picked])
    return list(zip(images.split(batch), labels.split(batch), strict=True))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="imagenet_samples", description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="height and width of the crops, in pixels")
    parser.add_argument("--only", nargs="*", default=[], help="names of recipes")
    options = parser.parse_args(arguments)
    broken = 0
    for path in sorted(RECIPES.glob("imagenet_*.yaml")):
        if options.only and path.stem not in options.only:
            continue
        recipe = load_recipe(path)
        batches = sample_batches(options.root, recipe, options.size, options.batch, options.steps)
        started = time.perf_counter()
        try:
            training = Steps(recipe, 1000, options.size)
            losses = [training.step(images, labels) for images, labels in batches]
        except (McdeployError, RuntimeError) as error:
            print(f"{path.stem}: broken: {error}", flush=True)
            broken += 1
            continue
        parameters = sum(parameter.numel() for parameter in training.model.parameters())
        shown = " ".join(f"{loss:.3f}" for loss in losses)
        print(
            f"{path.stem}: {parameters / 1e6:.2f} M parameters, {options.size} px, loss {shown} "
            f"({time.perf_counter() - started:.0f} s)",
            flush=True,
        )
        broken += not all(map(math.isfinite, losses))
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
