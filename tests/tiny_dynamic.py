"""Small nets with per-image wirings whose routers do what a test says: closed, open, or split between the images."""

import torch
from tiny_models import images, small_resnet
from torch import nn

import mcdeploy
from mcdeploy.connectivity.ddw import DynamicStage, dynamic_stages

FAR = 20.0  # sigmoid(-20) is 2e-9


def dynamic_resnet(num_blocks: int = 2, *, size: int = 16, open_edges: dict | None = None, **options) -> nn.Module:
    """``small_resnet`` under rule ddw, routers saturated.

    Args:
        open_edges: stage name to the edges that are open for every image; a stage that is not named has all open.
    """
    model = mcdeploy.wire(small_resnet(num_blocks), "ddw", image_size=size, **options).eval()
    for name, stage in dynamic_stages(model).items():
        for node, edges in stage.routed.items():
            wanted = (open_edges or {}).get(name, edges)
            bias_R = torch.tensor([FAR if edge in wanted else -FAR for edge in edges])
            with torch.no_grad():
                stage.router[str(node)].weight.zero_()
                stage.router[str(node)].bias.copy_(bias_R)
    return model


def split(
    model: nn.Module, name: str, edge: tuple[int, int], x: torch.Tensor, seed: int = 0, share: float = 0.5
) -> None:
    """Make one edge closed for a share of the images, with weights well away from the threshold; in place."""
    stage = model.get_submodule(name)
    assert isinstance(stage, DynamicStage)
    node = next(node for node, edges in stage.routed.items() if edge in edges)
    router, row = stage.router[str(node)], stage.routed[node].index(edge)
    seen: list[torch.Tensor] = []
    handle = router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
        handle.remove()
        weight_C = torch.randn(router.in_features, generator=torch.Generator().manual_seed(seed))
        z_B = (seen[0].float() @ weight_C).sort().values
        middle = int(len(z_B) * share)
        scale = 4.0 / (z_B[middle] - z_B[middle - 1])
        router.weight[row] = weight_C * scale
        router.bias[row] = -scale * (z_B[middle] + z_B[middle - 1]) / 2


def scattered_resnet(seed: int = 0, bias: float = 0.0, num_blocks: int = 4, **options) -> nn.Module:
    """Random routers: edges that are open for all, some and none of the images."""
    model = mcdeploy.wire(small_resnet(num_blocks), "ddw", image_size=16, **options).eval()
    generator = torch.Generator().manual_seed(seed)
    for stage in dynamic_stages(model).values():
        for router in stage.router.values():
            with torch.no_grad():
                router.weight.copy_(3 * torch.randn(router.weight.shape, generator=generator))
                router.bias.copy_(3 * torch.randn(router.bias.shape, generator=generator) + bias)
    return model


def two_ways(x: torch.Tensor) -> nn.Module:
    """layer1 is input -> 0 -> output, half of the images by way of block 1; the other stages are chains."""
    chain = {"layer2": [(0, 1), (1, 2), (2, 3)], "layer3": [(0, 1), (1, 2), (2, 3)]}
    model = dynamic_resnet(2, open_edges={"layer1": [(0, 1), (1, 3), (2, 3)], **chain})
    split(model, "layer1", (1, 2), x)
    return model


X = images(24, 16)
