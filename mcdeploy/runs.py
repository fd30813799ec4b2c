"""From a recipe to a run, and from a run to a bundle and its report: what the commands call.

Beside the commands and the recipe itself, only this module knows a whole recipe: it hands every other module its part.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcdeploy.console import progress_bar
from mcdeploy.errors import InputError
from mcdeploy.flags import needs_extra

if TYPE_CHECKING:
    import torch
    from mcruntime.preprocess import Preprocessing

    from mcdeploy.bench_report import BenchReport
    from mcdeploy.data import Loaders
    from mcdeploy.package import Origin, Shipped
    from mcdeploy.recipe import DataConfig, ExportConfig, ModelConfig, Recipe
    from mcdeploy.train import TrainResult

PROGRAM, REPORT, STATIC = "compiled.pt2", "report.html", "static"


def train_run(recipe: Recipe, run: Path, resume: bool) -> tuple[TrainResult, Loaders]:
    """Data, model and loop of one recipe.

    Args:
        run: the folder for checkpoint, metrics and TensorBoard's files.
        resume: go on from the checkpoint in it.

    Raises:
        McdeployError: what the recipe's parts raise, each naming its place.
    """
    with needs_extra("mcdeploy train", "train"):
        import torch

        from mcdeploy.checkpoint import sha256_of
        from mcdeploy.data import build_loaders
        from mcdeploy.model import build_backbone, build_model
        from mcdeploy.train import train as run_training

    from mcdeploy.section import GatedConfig

    torch.manual_seed(recipe.seed)
    rule = recipe.connectivity
    loaders = build_loaders(recipe.data, recipe.train.batch_size, recipe.train.eval_batch_size, recipe.seed)
    size, num_classes = recipe.data.image_size, len(loaders.classes)
    model = build_model(recipe.model, recipe.connectivity, num_classes, size)
    teacher = build_backbone(recipe.model, num_classes, size) if recipe.train.distill else None
    result = run_training(
        model,
        loaders,
        recipe.train,
        recipe.data,
        seed=recipe.seed,
        out=run,
        gate_config=rule if isinstance(rule, GatedConfig) and rule.has_joint_phase() else None,
        teacher=teacher,
        header={
            "recipe": recipe.model_dump(mode="json"),
            "parents": {"weights": sha256_of(Path(recipe.model.weights))} if recipe.model.weights else {},
        },
        resume=resume,
    )
    return result, loaders


def open_run(run: Path) -> tuple[Recipe, Any, dict[str, Any]]:
    """A finished run: its recipe, its trained and frozen model, and its checkpoint's header.

    Raises:
        InputError: no run, or one that stopped early.
    """
    with needs_extra("mcdeploy", "train"):
        from mcdeploy.checkpoint import load_checkpoint
        from mcdeploy.model import restore_trained
        from mcdeploy.recipe import parse_recipe

    checkpoint = load_checkpoint(run)
    recipe = parse_recipe(checkpoint.header["recipe"], f"{run}: recipe")
    done, epochs = checkpoint.header["epochs_done"], recipe.train.epochs
    if done < epochs:
        raise InputError(f"{run}: stopped after epoch {done} of {epochs}; finish it with 'mcdeploy train ... --resume'")
    model = restore_trained(checkpoint, recipe.model, recipe.connectivity, recipe.data.image_size)
    return recipe, model, checkpoint.header


def ship_run(
    run: Path,
    out: Path,
    data: str | None = None,
    changes: dict[str, Any] | None = None,
    sign: Path | None = None,
) -> Shipped:
    """Compile a finished run, export it, prove it, and seal it as a bundle; prints what it does.

    Args:
        out: the bundle's folder.
        data: where the images of calibration and proof come from; None: the run's own.
        changes: what to put in place of the recipe's export section; None as a value keeps the recipe's.
        sign: a private key.

    Raises:
        InputError: options that do not go together or with this run; found before the work.
        ParityError: a hop does not keep the function.
    """
    changes = {key: value for key, value in (changes or {}).items() if value is not None}
    recipe, model, header = open_run(run)
    with needs_extra("mcdeploy prune-export", "train"):
        from mcdeploy.connectivity.ddw import dynamic_stages
        from mcdeploy.data import plain_training_images
        from mcdeploy.package import prune_export as make_bundle
    config = _export_config(recipe.export, changes)
    if config.licence_weights is None:
        config = config.model_copy(update={"licence_weights": licence_of(recipe.model)})
    _check_means(config, sign)
    loaders = loaders_of(data_config(recipe.data, data))
    _same_classes(header["classes"], loaders.classes)
    dynamic = bool(dynamic_stages(model))
    if "dynamic" in changes and not dynamic:
        raise InputError(f"--dynamic {config.dynamic}: the wiring of {run} does not depend on the image; leave it away")
    calibration = None
    if dynamic or set(config.precision) != {"fp32"}:
        calibration = plain_training_images(loaders, config.calibration_images, 0)
    with progress_bar("export") as progress:
        shipped = make_bundle(
            model,
            loaders.val,
            config,
            name=recipe.name,
            out=out,
            labels=header["classes"],
            preprocessing=preprocessing_of(header),
            origin=_origin(run, recipe, header, dynamic),
            calibration=calibration,
            program=run / PROGRAM,
            sign=sign,
            say=_say,
            progress=progress,
        )
    if dynamic and calibration is not None and config.dynamic.startswith("static:"):
        _cut_static(run, shipped, calibration, loaders, config, header)
    return shipped


def _say(line: str) -> None:
    print(f"    {line}")


def _check_means(config: ExportConfig, sign: Path | None) -> None:
    """Is there what the export will need: TensorRT and a GPU, a key? Before the work rather than after it."""
    if "tensorrt" in config.backend:
        from mcruntime.gpu import describe_device, load_tensorrt

        load_tensorrt()
        describe_device()
    if sign is not None and not sign.is_file():
        raise InputError(f"--sign {sign}: no such key file; 'mcdeploy keygen' makes one")
    if sign is not None:
        with needs_extra("--sign", "sign"):
            from mcruntime.signature import check_private_key
        check_private_key(sign)
    if config.sensitivity and "int8" not in config.precision:
        raise InputError("--sensitivity, export.sensitivity: is about int8; add --precision int8, or leave it away")


def _origin(run: Path, recipe: Recipe, header: dict[str, Any], dynamic: bool) -> Origin:
    """What a bundle says of where it comes from. Gates that depend on the image are no data of the run."""
    from mcdeploy.checkpoint import FILE_NAME, sha256_of, sha256_of_json
    from mcdeploy.package import Origin
    from mcdeploy.wiring_file import last_gates

    return Origin(
        parents={
            "checkpoint": sha256_of(run / FILE_NAME),
            "recipe": sha256_of_json(header["recipe"]),
            **header.get("parents", {}),
        },
        seeds={"train": recipe.seed},
        recipe=header["recipe"],
        candidates=header["candidates"],
        gates={} if dynamic else last_gates(run / "metrics.jsonl"),
    )


def _cut_static(
    run: Path,
    shipped: Shipped,
    calibration: torch.Tensor,
    loaders: Loaders,
    config: ExportConfig,
    header: dict[str, Any],
) -> None:
    """RUN/static: as many static models as the export section asks for, and what they cost."""
    from mcdeploy.static import cut_static

    cut = cut_static(
        shipped.compiled,
        calibration,
        loaders.val,
        config,
        count=int(config.dynamic.removeprefix("static:")),
        out=run / STATIC,
        labels=header["classes"],
        preprocessing=preprocessing_of(header),
        say=_say,
    )
    print(
        f"static models in {run / STATIC}: top-1 {cut.accuracy_dynamic:.2%} -> {cut.accuracy_static:.2%}, the same "
        f"class for {cut.top1_agreement:.2%} of {cut.images} images"
    )


def _export_config(own: ExportConfig, changes: dict[str, Any]) -> ExportConfig:
    """The recipe's, with what the command line says."""
    from pydantic import ValidationError

    try:
        return type(own).model_validate({**own.model_dump(), **changes})
    except ValidationError as error:
        problem = error.errors()[0]
        key = str(problem["loc"][0]) if problem["loc"] else "batch"
        if key == "dynamic":
            raise InputError(f"--dynamic {changes[key]}: expected if, masked or static:N, such as static:4") from None
        raise InputError(f"--{key.replace('_', '-')}: {problem['msg'].removeprefix('Value error, ')}") from None


def licence_of(config: ModelConfig) -> str | None:
    """What timm says of its own weights, where the training started from them."""
    import timm

    return timm.get_pretrained_cfg(config.backbone).license if config.pretrained else None


def _same_classes(trained: list[str], found: list[str]) -> None:
    if trained != found:
        odd = sorted(set(trained) ^ set(found))
        raise InputError(f"--data: its classes are not the run's; first difference: {odd[0] if odd else 'their order'}")


def data_config(own: DataConfig, given: str | None) -> DataConfig:
    """A data section with the source replaced by what --data says."""
    if given is None:
        return own
    source = {"source": "digits", "root": None} if given == "digits" else {"source": "folder", "root": given}
    return own.model_copy(update={**source, "dataset": None})


def loaders_of(config: DataConfig) -> Loaders:
    """Loaders to evaluate with: nothing is held in memory or augmented."""
    from mcdeploy.data import build_loaders

    return build_loaders(config.model_copy(update={"in_memory": False, "images_per_epoch": None}), 2, 100, 0)


def preprocessing_of(header: dict[str, Any]) -> Preprocessing:
    """How a checkpoint says that its images are prepared."""
    from mcruntime.preprocess import Preprocessing

    return Preprocessing.model_validate_json(json.dumps(header["preprocessing"]))


def report_run(run: Path, shipped: Shipped, bench: BenchReport | None, command: str) -> None:
    """Write RUN/report.html: training, wiring, certificate, parity, what was shipped. ``command`` is how to redo it."""
    from mcdeploy.checkpoint import load_checkpoint
    from mcdeploy.report import models_section, write_run_report

    manifest, folder = shipped.bundle.manifest, shipped.bundle.folder
    made = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "reports").glob("*.json"))}
    models = {
        key: {
            **model.model_dump(mode="json"),
            "agreement": shipped.agreements[key].top1_agreement,
            "latency": [
                f"batch {row.batch}: {row.p50_ms:.3g} [{row.low_ms:.3g}, {row.high_ms:.3g}]"
                for row in manifest.latency
                if row.model == key
            ],
        }
        for key, model in manifest.models.items()
    }
    write_run_report(
        run / REPORT,
        f"{manifest.name}: what mcdeploy did",
        metrics=run / "metrics.jsonl",
        candidates=load_checkpoint(run).header["candidates"],
        certificate=shipped.certificate.to_json(),
        accuracy=(shipped.agreement.accuracy_before, shipped.agreement.accuracy_after),
        parity=[row.to_json() for row in shipped.parity],
        bench=bench,
        models=models_section(models, made),
        provenance={"command": command, "bundle": manifest.id, **manifest.parents, **manifest.versions},
    )


def report_departure(bundle: Path) -> None:
    """A page beside what prune-export left of a hop that failed, where it could look inside."""
    from mcdeploy.package import DEPARTURE
    from mcdeploy.report import ReportData, departure_section, write_report

    left = bundle.resolve().with_name(bundle.resolve().name + DEPARTURE)
    if left.exists():
        page = left.with_suffix(".html")
        more = {"First departure": departure_section(json.loads(left.read_text(encoding="utf-8")))}
        write_report(page, ReportData(f"{bundle.name}: a hop that failed", more=more))
        print(f"every tensor that was compared: {page}", file=sys.stderr)
