"""Build a model: a timm backbone, its weights, and its connectivity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

import mcdeploy.backbones  # noqa: F401  registers our nets with timm
from mcdeploy.checkpoint import Checkpoint
from mcdeploy.connectivity.rules import RULES
from mcdeploy.connectivity.topology import Topology
from mcdeploy.connectivity.wiring import fix, wired_stages
from mcdeploy.errors import CheckpointError, RecipeError, WiringError
from mcdeploy.recipe import ConnectivityConfig, ModelConfig, parse_connectivity


def build_backbone(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """A timm model with ``num_classes`` outputs and its starting weights.

    Raises:
        RecipeError: timm does not know the name, or the backbone does not take an option.
        CheckpointError: the weights file cannot be read or does not fit.
    """
    name = config.backbone
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise RecipeError(
            f"model.backbone: timm has no model {name!r}" + (f"; near: {', '.join(near)}" if near else "")
        )
    options: dict[str, Any] = dict(config.options)
    if config.drop_path is not None:
        options["drop_path_rate"] = config.drop_path
    if timm.get_pretrained_cfg_value(name, "fixed_input_size"):
        options["img_size"] = image_size
    try:
        model = timm.create_model(name, pretrained=config.pretrained, num_classes=num_classes, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model.backbone: {name} does not take {options}: {error}") from error
    except (OSError, RuntimeError) as error:
        if not config.pretrained:
            raise
        raise RecipeError(
            f"model.pretrained: timm could not fetch weights for {name} ({type(error).__name__}); "
            "give model.weights a local .safetensors file instead"
        ) from error
    if config.weights is not None:
        load_weights(model, Path(config.weights))
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a backbone from a .safetensors file with the backbone's own keys.

    Raises:
        CheckpointError: no such file, not safetensors, or keys or shapes that do not fit; names the first few.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such weights file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a complete .safetensors file ({error})") from None
    own = model.state_dict()
    wrong = [
        *(f"{key} is missing" for key in own if key not in tensors and not key.endswith("num_batches_tracked")),
        *(f"{key} is unknown to the backbone" for key in tensors if key not in own),
        *(
            f"{key} is {list(tensors[key].shape)}, the backbone wants {list(own[key].shape)}"
            for key in own
            if key in tensors and tensors[key].shape != own[key].shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{path} does not fit {type(model).__name__}: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(tensors, strict=False)


def wire_model(model: nn.Module, config: ConnectivityConfig, image_size: int, topology: Topology | None = None) -> None:
    """Wire a backbone in place by its rule, or by a ``topology`` that is already known.

    Raises:
        WiringError: no stage to wire, nothing to choose in any of them, or wired already.
    """
    if wired_stages(model):
        raise WiringError(f"{type(model).__name__} is wired already; wire a fresh backbone")
    if getattr(model, "grad_checkpointing", False):
        raise WiringError("gradient checkpointing calls the blocks past their wiring; switch it off before wiring")
    RULES[config.rule].install(model, _example(model, image_size), config)
    if topology is not None and not any(stage.is_dynamic for stage in wired_stages(model).values()):
        fix(model, topology)


def build_model(
    config: ModelConfig,
    connectivity: ConnectivityConfig,
    num_classes: int,
    image_size: int,
    topology: Topology | None = None,
) -> nn.Module:
    """Backbone and connectivity in one; see ``build_backbone`` and ``wire_model``."""
    model = build_backbone(config, num_classes, image_size)
    wire_model(model, connectivity, image_size, topology)
    return model


def wire(model: nn.Module, rule: str, *, image_size: int | None = None, **options: Any) -> nn.Module:
    """Wire a timm model you made yourself, in place, and return it.

    Args:
        rule: a name in ``connectivity.rules.RULES``, such as ``maskconnect``.
        image_size: height and width of the images it will see, in pixels; default: the model's own.
        options: the rule's options, named as in a recipe, such as ``fan_in=3``.

    Raises:
        RecipeError: unknown rule or option.
        WiringError: the model has no stage that can be wired.
    """
    config = parse_connectivity(rule, **options)
    size = image_size or getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))[-1]
    wire_model(model, config, size)
    return model


def _example(model: nn.Module, image_size: int) -> torch.Tensor:
    parameter = next(model.parameters())
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = getattr(model, "in_chans", first.in_channels if first is not None else 3)  # timm's own models know
    return torch.zeros(2, channels, image_size, image_size, device=parameter.device, dtype=parameter.dtype)


def restore_trained(
    checkpoint: Checkpoint, config: ModelConfig, connectivity: ConnectivityConfig, image_size: int
) -> nn.Module:
    """The trained, frozen model of a finished run: build, apply the topology, fill. In evaluation mode, on the CPU.

    Raises:
        CheckpointError: the gates are not frozen yet, or the tensors do not fit.
    """
    header = checkpoint.header
    if not header["frozen"]:
        raise CheckpointError("the gates of this run are not frozen yet; finish it with 'mcdeploy train ... --resume'")
    bare = config.model_copy(update={"weights": None, "pretrained": False})
    topology = Topology.from_json(header["topology"])
    model = build_model(bare, connectivity, len(header["classes"]), image_size, topology)
    try:
        model.load_state_dict(checkpoint.part("ema" if header["uses_ema"] else "model"))
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit its own recipe: {str(error).splitlines()[0]}") from None
    return model.eval()
