"""MaskConnect in a training loop of your own: wire, two optimizers, compile, export.

python examples/own_loop.py [OUT.onnx]      a minute on a CPU, on scikit-learn's digits
"""

import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import mcdeploy


def main(out: Path, steps: int = 60) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, scale_factor=4)
    images, labels = images.expand(-1, 3, -1, -1), torch.tensor(digits.target)

    model = mcdeploy.wire(timm.create_model("test_convnext", num_classes=10), "maskconnect", fan_in=2, image_size=32)
    optimizer = torch.optim.AdamW(mcdeploy.weights(model), lr=2e-3)  # every parameter that is not a gate
    gates = mcdeploy.gate_optimizer(model, lr=0.02)

    model.train()
    for _ in range(steps):
        batch = torch.randint(0, 1500, (64,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        gates.step()
        optimizer.zero_grad()

    small = mcdeploy.compile_model(model, images[:7])  # proves that it computes the same function
    mcdeploy.export_onnx(small, out, images[:2])
    accuracy = float((small(images[1500:]).argmax(1) == labels[1500:]).float().mean())
    print(f"{sum(p.numel() for p in small.parameters())} parameters, top-1 {accuracy:.1%}, wrote {out}")
    return accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "digits.onnx"))
