"""Small wired models for tests, scrambled so that no parameter or statistic sits at a default that hides a mistake."""

import timm
import torch
from torch import nn

import mcdeploy
import mcdeploy.backbones
from mcdeploy.compile.certify import scramble


def images(batch: int = 7, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Noise [batch, 3, size, size]."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def small_resnet(num_blocks: int = 4) -> nn.Module:
    """A CIFAR ResNet with three stages of ``num_blocks``, widths 8, 8, 16, scrambled; built from a seed."""
    from mcdeploy.backbones.cifar_resnet import CifarResNet

    torch.manual_seed(0)
    model = CifarResNet(num_blocks, widths=(8, 8, 16))
    scramble(model)
    return model.eval()


def wired_resnet(rule: str = "maskconnect", num_blocks: int = 4, **options: object) -> nn.Module:
    """``small_resnet`` wired for 16x16 images; a learned rule gets uneven gates."""
    model = mcdeploy.wire(small_resnet(num_blocks), rule, image_size=16, **options)
    for edges in model.modules():
        if hasattr(edges, "gates_GN"):
            with torch.no_grad():
                edges.gates_GN.copy_(torch.rand(edges.gates_GN.shape, generator=torch.Generator().manual_seed(1)))
                edges.gates_GN.mul_(edges.valid_GN)
    return model.eval()


def train_a_step(model: nn.Module, batch: torch.Tensor, gate_lr: float = 0.1) -> None:
    """One step of the weights and of the gates."""
    model.train()
    optimizer = torch.optim.SGD(mcdeploy.weights(model), lr=0.01)
    gates = mcdeploy.gate_optimizer(model, lr=gate_lr)
    model(batch).square().mean().backward()
    optimizer.step()
    gates.step()
    model.eval()


def timm_model(name: str, **options: object) -> nn.Module:
    """A timm model with 10 classes, every norm scrambled."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options)
    scramble(model)
    return model.eval()
