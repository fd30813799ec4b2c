"""Batches of images that are wired differently: the masked form, an If where any image runs it, or groups by wiring.

PYTHONPATH=tests python -m dynamic_batches OUT [RUN]      writes OUT/dynamic_batches.json and prints the table

Masked computes every node for every image and multiplies by 0. "if" is what prune-export writes: the masked form with
every node inside an If that no image of the batch runs. Grouping runs the images of one wiring at a time, so that each
group skips exactly; the time to find out who belongs together (the router of the first stage does not say it all, so
the groups are given for free here) is not counted, which favours it. RUN is a trained run of a recipe with rule: ddw;
without one, a ResNet-32 with random routers stands in.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from mcruntime.engine import OnnxRunner
from tiny_models import timm_model

import mcdeploy
from mcdeploy.backends.onnx import export_onnx
from mcdeploy.backends.pytorch import TorchRunner
from mcdeploy.bench import compare_latency
from mcdeploy.compile.conditional import export_form
from mcdeploy.compile.dynamic import open_everything, record
from mcdeploy.connectivity.ddw import dynamic_stages


class Grouped:
    """A runner that answers each wiring's images together; groups: positions in the batch, found before."""

    def __init__(self, inner, groups, name):
        self.inner, self.groups, self.name = inner, groups, name

    def __enter__(self):
        self.inner.__enter__()
        return self

    def __exit__(self, *exc):
        self.inner.__exit__(*exc)

    def facts(self):
        return self.inner.facts()

    def infer(self, images):
        parts = [self.inner.infer(images[group]) for group in self.groups]
        logits = np.empty((len(images), parts[0].shape[1]), np.float32)
        for group, part in zip(self.groups, parts, strict=True):
            logits[group] = part
        return logits


def groups_of(model, images):
    """Positions of the images of each wiring."""
    open_BE = torch.cat(list(record(model, images).open_BE.values()), 1)
    _, which_B = open_BE.unique(dim=0, return_inverse=True)
    return [np.flatnonzero(which_B.numpy() == wiring) for wiring in which_B.unique()]


def stand_in(count=128):
    """ResNet-32 with random routers, and noise."""
    model = mcdeploy.wire(timm_model("resnet32_cifar"), "ddw", image_size=32).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    for stage in dynamic_stages(model).values():
        seen = []
        handle = stage.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].mean((2, 3))))
        with torch.no_grad():
            model(images)
            handle.remove()
            router = stage.router["0"]
            router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
            z_BR = seen[0] @ router.weight.T
            scale_R = 2 / z_BR.std(0)
            router.weight.mul_(scale_R[:, None])
            router.bias.copy_(4 * torch.randn(len(scale_R), generator=generator) - scale_R * z_BR.mean(0))
    return model, images


def trained(run, count=128):
    """A run's compiled model, and validation images."""
    from mcdeploy.data import plain_training_images
    from mcdeploy.runs import loaders_of, open_run

    recipe, model, _ = open_run(run)
    loaders = loaders_of(recipe.data)
    calibration = plain_training_images(loaders, recipe.export.calibration_images, 0)
    images = loaders.val.dataset.__getitems__(list(range(count)))[0].float()
    return mcdeploy.compile_model(model, images[:7], calibration), images


def main(out: Path, run: Path | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model, images = trained(run) if run else stand_in()
    masked = export_form(model, skip=False)
    export_onnx(model, out / "if.onnx", images[:2])
    export_onnx(model, out / "masked.onnx", images[:2], dynamic="masked")
    export_onnx(open_everything(model), out / "open.onnx", images[:2], dynamic="masked")
    rows = []
    for batch in (1, 2, 8, 32):
        groups = groups_of(model, images[:batch])
        runners = [
            OnnxRunner(out / "masked.onnx", name="onnx masked", threads=1),
            OnnxRunner(out / "if.onnx", name="onnx if", threads=1),
            Grouped(OnnxRunner(out / "if.onnx", name="onnx", threads=1), groups, "onnx grouped"),
            OnnxRunner(out / "open.onnx", name="onnx all open", threads=1),
            TorchRunner(masked, name="pytorch masked", threads=1),
            TorchRunner(model, name="pytorch if", threads=1),
            Grouped(TorchRunner(model, name="pytorch", threads=1), groups, "pytorch grouped"),
        ]
        report = compare_latency(runners, {batch: images[:batch].numpy()}, seconds=20.0)
        for row in report.latencies:
            rows.append({
                "batch": batch, "wirings": len(groups), "runner": row.runner, "p50_ms": row.p50_ms.value,
                "ratio": [row.ratio.value, row.ratio.low, row.ratio.high],
            })  # fmt: skip
            low, high = row.ratio.low, row.ratio.high
            print(
                f"batch {batch}, {len(groups)} wirings: {row.runner:16} {row.p50_ms.value:8.2f} ms, "
                f"x {row.ratio.value:.2f} [{low:.2f}, {high:.2f}]",
                flush=True,
            )
    (out / "dynamic_batches.json").write_text(json.dumps({"run": run and run.name, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
