"""Which blocks can go? Greedily drop the block whose absence raises the loss on training images least.

python examples/rank_blocks.py BACKBONE WEIGHTS.safetensors DATA COUNT      prints a list for connectivity.blocks

COUNT blocks are dropped one after the other, each choice measured with the earlier ones gone. BN statistics stay
as they are. The list goes into a recipe with ``rule: drop``, which fine-tunes what is left.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from mcdeploy.connectivity.stages import find_stages
from mcdeploy.data import build_loaders
from mcdeploy.model import build_backbone, wire_model
from mcdeploy.recipe import DataConfig, ModelConfig, parse_connectivity

IMAGES = 1000


def without(blocks: list[str], weights: dict[str, torch.Tensor], backbone: str, num_classes: int, size: int):
    """The backbone with its weights, wired as a chain without ``blocks``."""
    model = build_backbone(ModelConfig(backbone=backbone), num_classes, size)
    model.load_state_dict(weights)
    rule = parse_connectivity("drop", blocks=blocks) if blocks else parse_connectivity("chain")
    wire_model(model, rule, size)
    return model.eval()


def main(backbone: str, weights: Path, data: str, count: int) -> list[str]:
    config = DataConfig(source="folder", root=data, image_size=32, images_per_epoch=IMAGES, in_memory=False)
    loaders = build_loaders(config, IMAGES, IMAGES, seed=0)
    images, labels = next(iter(loaders.train))
    images = images.to(memory_format=torch.channels_last)
    num_classes = len(loaders.classes)
    full = build_backbone(ModelConfig(backbone=backbone, weights=str(weights)), num_classes, 32)
    state = full.state_dict()
    stages = find_stages(full, images[:2])
    choices = [
        f"{stage.name}.{name}"
        for stage in stages
        for i, name in enumerate(stage.blocks[:-1], start=1)
        if stage.shapes[i] == stage.shapes[i - 1]
    ]
    dropped: list[str] = []
    while len(dropped) < count:
        losses = {}
        for block in choices:
            model = without([*dropped, block], state, backbone, num_classes, 32).to(memory_format=torch.channels_last)
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                losses[block] = float(F.cross_entropy(model(images).float(), labels))
        best = min(losses, key=losses.__getitem__)
        dropped.append(best)
        choices.remove(best)
        print(f"{len(dropped):3}: {best:12} loss {losses[best]:.4f}", flush=True)
    print("blocks: [" + ", ".join(sorted(dropped)) + "]")
    return dropped


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
