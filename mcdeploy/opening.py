"""What the user named, opened: a run, a bundle, a model file or a timm backbone, and what bench does with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mcdeploy.errors import InputError
from mcdeploy.flags import check_known, needs_extra
from mcdeploy.runs import data_config, loaders_of, open_run, preprocessing_of

if TYPE_CHECKING:
    from mcdeploy.bench_images import ImagesReport
    from mcdeploy.bench_report import BenchReport
    from mcdeploy.profile import Profile
    from mcdeploy.recipe import DataConfig
    from mcdeploy.targets import Target


def open_target(
    text: str,
    data: str | None,
    weights: Path | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
) -> tuple[Target, DataConfig]:
    """What the user named, and the data section that goes with it.

    Args:
        text: a run, a bundle (``@int8``: that model of it), a model file, or a timm name.
        data: a folder with train/ and val/, or ``digits``; None: the model's own.
        weights, pretrained: for a timm backbone: a .safetensors file, timm's own weights.
        image_size: pixels, of a timm backbone; None: what timm says.

    Raises:
        InputError: nothing of that name, an unfinished run, or weights for what has its own.
        MissingExtraError: torch or what comes with it is not installed.
    """
    with needs_extra("mcdeploy", "train"):
        from mcdeploy.targets import Target, kind_of, open_file
    from mcdeploy.recipe import DataConfig

    kind = kind_of(text)
    if (weights or pretrained) and kind != "backbone":
        raise InputError(f"--weights and --pretrained are for timm backbones; {text} is a {kind} and has its own")
    if kind == "run":
        recipe, model, header = open_run(Path(text))
        target = Target(
            text,
            module=model,
            image_size=recipe.data.image_size,
            labels=tuple(header["classes"]),
            preprocessing=preprocessing_of(header),
            has_data=True,
        )
        return target, data_config(recipe.data, data)
    if kind == "backbone":
        return _open_backbone(text, data, weights, image_size, pretrained)
    target = open_file(text)
    how = target.preprocessing
    return target, data_config(DataConfig() if how is None else DataConfig(**how.model_dump()), data)


def _open_backbone(
    name: str, data: str | None, weights: Path | None, image_size: int | None, pretrained: bool
) -> tuple[Target, DataConfig]:
    """A timm model as timm describes it. Without weights of its own it cannot be evaluated, only timed and drawn."""
    import timm
    from mcruntime.preprocess import Preprocessing

    from mcdeploy.model import build_backbone
    from mcdeploy.recipe import DataConfig, ModelConfig
    from mcdeploy.targets import Target

    cfg = timm.get_pretrained_cfg(name)
    size = image_size or cfg.input_size[-1]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear" if cfg.interpolation == "bilinear" else "bicubic"
    how = Preprocessing(
        image_size=size, mean=cfg.mean, std=cfg.std, crop_pct=cfg.crop_pct or 1.0, interpolation=interpolation
    )
    config = ModelConfig(backbone=name, weights=str(weights) if weights else None, pretrained=pretrained)
    module = build_backbone(config, cfg.num_classes, size).eval()
    target = Target(name, module=module, image_size=size, preprocessing=how, has_weights=bool(weights or pretrained))
    return target, data_config(DataConfig(**how.model_dump()), data)


def bench_named(
    targets: list[str],
    backends: list[str],
    batches: list[int],
    seconds: float,
    threads: int | None,
    image_size: int | None = None,
    *,
    until: float = 0.02,
    lock_clocks: bool = False,
    cold_l2: bool = False,
    baseline: BenchReport | None = None,
) -> BenchReport:
    """Open what was named and time it; the other arguments are those of ``targets.measure``.

    Raises:
        InputError: an unknown backend, or what ``open_target`` and ``targets.measure`` raise.
    """
    with needs_extra("mcdeploy bench", "train"):
        from mcdeploy.targets import BACKENDS, measure
    check_known("--backend", backends, list(BACKENDS))
    opened = [open_target(text, None, None, image_size)[0] for text in targets]
    return measure(
        opened,
        backends,
        batches,
        seconds=seconds,
        threads=threads,
        image_size=image_size,
        until=until,
        lock_clocks=lock_clocks,
        cold_l2=cold_l2,
        baseline=baseline,
    )


def profile_named(
    targets: list[str], backends: list[str], batch: int, threads: int | None, image_size: int | None
) -> list[Profile]:
    """Open what was named and say where its time goes, for every backend."""
    from mcdeploy.targets import profile_targets

    opened = [open_target(text, None, None, image_size)[0] for text in targets]
    return profile_targets(opened, backends, batch, threads=threads, image_size=image_size)


def bench_over_images(
    targets: list[str], backends: list[str], count: int, data: str | None, threads: int | None
) -> ImagesReport:
    """Open what was named and time it on ``count`` validation images, one at a time.

    Raises:
        InputError: none of them knows its images, they differ in size, or what ``open_target`` raises.
    """
    with needs_extra("mcdeploy bench", "train"):
        from mcdeploy.targets import BACKENDS, measure_over_images
    check_known("--backend", backends, list(BACKENDS))
    opened = [open_target(text, data) for text in targets]
    config = next((config for target, config in opened if target.has_data or (data and target.preprocessing)), None)
    if config is None:
        raise InputError("--over-images: none of the models knows its images; give --data, or name a run folder")
    for target, _ in opened:
        if target.image_size not in (None, config.image_size):
            raise InputError(f"{target.name}: takes images of {target.image_size} pixels, not of {config.image_size}")
    return measure_over_images([target for target, _ in opened], backends, loaders_of(config), count, threads=threads)
