"""The command line: parse, call one function, print. Heavy imports happen inside the commands, so that --help is quick.

Exit codes: 0 done; 1 a promise failed; 2 the user's input is wrong. Expected errors are one sentence without traceback.
"""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from mcruntime.server.options import from_flags

from mcdeploy.errors import InputError, McdeployError, MissingExtraError, ParityError
from mcdeploy.serve_options import signature_of_serve

if TYPE_CHECKING:
    from mcruntime.preprocess import Preprocessing
    from rich.table import Table

    from mcdeploy.bench_images import ImagesReport
    from mcdeploy.bench_report import BenchReport
    from mcdeploy.data import Loaders
    from mcdeploy.package import Shipped
    from mcdeploy.profile import Profile
    from mcdeploy.recipe import DataConfig, ExportConfig, ModelConfig, Recipe
    from mcdeploy.targets import Inspection, Target
    from mcdeploy.train import TrainResult

app = typer.Typer(
    help="Learn which connections of a vision backbone matter, remove the rest, prove it, ship it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
BUNDLE, PROGRAM, REPORT, STATIC = "bundle", "compiled.pt2", "report.html", "static"

RunArgument = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the recipe; may be repeated.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON to this file.")]
DataOption = Annotated[
    str | None, typer.Option("--data", help="A folder with train/ and val/, or 'digits'; default: the run's own.")
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("demo"),
) -> None:
    """All of it on data that ships with a package: train, prune-export, bench, one served prediction, a report."""
    with _extra("mcdeploy demo", "train"):
        from mcdeploy import demo as showing
    with _extra("mcdeploy demo", "serve"):
        import uvicorn  # noqa: F401
    with _extra("mcdeploy demo", "train"):
        from mcdeploy.recipe import load_recipe

    if (out / "checkpoint.safetensors").exists() and out != Path("demo"):
        raise InputError(f"{out}: holds a run already; give another --out")
    recipe = load_recipe(_recipe_folder() / "digits.yaml")
    print(f"1/5 train: {recipe.model.backbone} on digits, MaskConnect, {recipe.train.epochs} epochs")
    result, loaders = _train(recipe, out, resume=False)
    print("2/5 prune-export")
    shipped = _prune_export(out, out / BUNDLE)
    print("3/5 bench: the dense backbone against the pruned net, ONNX Runtime, interleaved")
    bench = _bench([recipe.model.backbone, str(out / BUNDLE)], ["onnx"], [1, 32], seconds=8.0, threads=None)
    print("4/5 serve: one prediction over HTTP")
    answer = showing.ask_server(
        shipped.bundle.folder, loaders.val, loaders.preprocessing, shipped.bundle.manifest.labels
    )
    print(f"    a held-out {answer.true_label}: the server says {answer.label} ({answer.probability:.1%})")
    print("5/5 report")
    _report(out, shipped, bench, "mcdeploy demo")
    showing.print_summary(result.accuracy.top1, shipped, bench, out / REPORT)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, or the name of one that ships.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The run folder; default: runs/<name of the recipe>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in the run folder.")] = False,
    overrides: SetOption = [],  # noqa: B006  typer copies it
    json_file: JsonOption = None,
) -> None:
    """Train a recipe; leaves a checkpoint, metrics.jsonl and TensorBoard files in the run folder."""
    with _extra("mcdeploy train", "train"):
        from mcdeploy.recipe import load_recipe

    loaded = load_recipe(_find_recipe(recipe), tuple(overrides))
    run = out or Path("runs") / loaded.name
    if not resume and (run / "checkpoint.safetensors").exists():
        raise InputError(f"{run}: holds a run already; add --resume to continue it, or give another --out")
    _check_folder(json_file)
    result, _ = _train(loaded, run, resume)
    if not result.is_main:
        return
    _write_json(
        json_file, {"top1": result.accuracy.top1, "loss": result.accuracy.loss, "images": result.accuracy.images}
    )
    print(f"top-1 {result.accuracy.top1:.2%} on {result.accuracy.images} validation images; the run is in {run}")
    print(f"next: mcdeploy prune-export {run}")


@app.command("prune-export")
def prune_export(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option(help="The bundle folder; default: RUN/bundle.")] = None,
    backend: Annotated[
        list[str], typer.Option(help="onnx, tensorrt; may be repeated. The first of all is served by default.")
    ] = [],  # noqa: B006
    precision: Annotated[list[str], typer.Option(help="fp32, fp16, int8; may be repeated.")] = [],  # noqa: B006
    batch: Annotated[
        tuple[int, int, int] | None,
        typer.Option(
            metavar="MIN OPT MAX",
            help="Batch sizes of an engine; of any model all are timed, and MAX is verified.",
            min=1,
        ),
    ] = None,
    max_top1_drop: Annotated[
        float | None, typer.Option(min=0, max=100, help="Percentage points of top-1 that a precision may cost.")
    ] = None,
    sensitivity: Annotated[bool, typer.Option("--sensitivity", help="int8: measure every layer's share.")] = False,
    sign: Annotated[Path | None, typer.Option(help="Sign with this private key; 'mcdeploy keygen' makes one.")] = None,
    dynamic: Annotated[
        str | None, typer.Option(help="Per-image wirings: if, masked, or static:N (N static models in RUN/static).")
    ] = None,
    data: DataOption = None,
    json_file: JsonOption = None,
) -> None:
    """Compile a trained run, export it, prove it, and seal it as a bundle. Also leaves compiled.pt2 in the run.

    Options left away are those of the recipe's export section.
    """
    _only("--backend", backend, ["onnx", "tensorrt"])
    _only("--precision", precision, ["fp32", "fp16", "int8"])
    _check_folder(json_file)
    changes = {
        "backend": tuple(backend) or None,
        "precision": tuple(precision) or None,
        "batch": batch,
        "max_accuracy_drop": None if max_top1_drop is None else max_top1_drop / 100,
        "sensitivity": sensitivity or None,
        "dynamic": dynamic,
    }
    bundle = out or run / BUNDLE
    try:
        shipped = _prune_export(run, bundle, data, changes, sign)
    except ParityError:
        _report_departure(bundle)
        raise
    _report(run, shipped, None, f"mcdeploy prune-export {run}")
    certificate, manifest = shipped.certificate, shipped.bundle.manifest
    _write_json(json_file, manifest.model_dump(mode="json"))
    print(f"parameters {certificate.parameters[0]:,} -> {certificate.parameters[1]:,}")
    print(f"MACs {certificate.macs[0]:,} -> {certificate.macs[1]:,}")
    _print_models(shipped)
    print(f"bundle {shipped.bundle.folder} ({manifest.id[:12]}), report {run / REPORT}")


@app.command("eval")
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|BUNDLE[@MODEL]|MODEL",
            help="A run, a bundle (@int8: that model of it), a model file, a timm name.",
            show_default=False,
        ),
    ],
    data: DataOption = None,
    weights: Annotated[Path | None, typer.Option(help="A .safetensors file for a timm backbone.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="timm's own weights for a timm backbone.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Top-1 accuracy on the validation images, in the types of what is named: fp32 unless a bundle's model says less.

    An engine runs on its GPU, everything else on the CPU.
    """
    with _extra("mcdeploy eval", "train"):
        from mcdeploy.targets import evaluate_target
    _check_folder(json_file)
    opened, config = _open_target(target, data, weights, pretrained=pretrained)
    if opened.preprocessing is None:
        raise InputError(
            f"{target}: nothing says how its images are prepared; evaluate the bundle or the run it is from"
        )
    if not opened.has_weights:
        raise InputError(f"{target}: has random weights; give --weights FILE or --pretrained")
    if data is None and not opened.has_data:
        raise InputError(f"{target}: does not know its images; give --data, a folder with train/ and val/")
    loaders = _loaders_of(config)
    accuracy = evaluate_target(opened, loaders, image_size=config.image_size)
    _write_json(json_file, {"top1": accuracy.top1, "loss": accuracy.loss, "images": accuracy.images})
    print(f"{target}: top-1 {accuracy.top1:.2%} on {accuracy.images} images (loss {accuracy.loss:.4f})")


@app.command()
def bench(
    targets: Annotated[list[str], typer.Argument(metavar="A [B ...]", help="Runs, bundles, model files, timm names.")],
    backend: Annotated[
        list[str],
        typer.Option(
            help="onnx, openvino, pytorch, compiled; on a GPU onnx-cuda, onnx-tensorrt, tensorrt, pytorch-cuda, "
            "compiled-cuda."
        ),
    ] = ["onnx"],  # noqa: B006
    batch: Annotated[list[int], typer.Option(min=1, help="Batch sizes.")] = [1],  # noqa: B006
    seconds: Annotated[
        float, typer.Option(min=0.1, help="At most so long for each batch size, all models together, loading aside.")
    ] = 20.0,
    until: Annotated[
        str, typer.Option(help="Stop early once every ratio's 95 % interval is narrower than this; 0%: never.")
    ] = "2%",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: the physical cores.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels; default: what the models say.")] = None,
    over_images: Annotated[
        int | None, typer.Option(min=2, help="Instead: latency of so many validation images, one at a time.")
    ] = None,
    data: DataOption = None,
    lock_clocks: Annotated[
        bool, typer.Option("--lock-clocks", help="Hold the GPU's clock at its maximum meanwhile; needs permission.")
    ] = False,
    cold_l2: Annotated[
        bool,
        typer.Option(
            "--cold-l2",
            help="Overwrite the GPU's L2 cache before each inference (tensorrt, pytorch-cuda, compiled-cuda).",
        ),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also say where the time goes, by block (onnx, openvino, pytorch).")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the distributions into this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write all of it into this Markdown file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write all of it, with plots, as one HTML page.")] = None,
    json_file: JsonOption = None,
    baseline: Annotated[
        Path | None, typer.Option(help="A JSON file of an earlier bench to compare ratios with.")
    ] = None,
    fail_if_slower: Annotated[str | None, typer.Option(help="How much slower is still fine; default: 5%.")] = None,
) -> None:
    """Latency of A against B, interleaved, with intervals; exit code 1 when slower than the baseline allows."""
    with _extra("mcdeploy bench", "train"):
        from mcdeploy.bench_report import check_baseline, read_report
        from mcdeploy.profile import check_profiled
    if baseline and json_file and baseline.resolve() == json_file.resolve():
        raise InputError(f"--json {json_file}: is the baseline; give another file, or a slower run would replace it")
    if fail_if_slower and not baseline:
        raise InputError("--fail-if-slower: needs --baseline, the earlier bench to compare with")
    if plot and plot.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {plot}: a plot is a .png, .svg or .pdf")
    _check_folder(json_file)
    for file in (plot, markdown, html):
        _check_folder(file)
    if profile:
        check_profiled(backend)
    if data and not over_images:
        raise InputError("--data: bench takes noise unless --over-images says how many validation images to take")
    if over_images:
        if baseline or image_size or batch != [1] or profile or markdown or html or lock_clocks or cold_l2:
            raise InputError(
                "--over-images: is for batch 1 and the data's image size, and knows no --baseline, --profile, "
                "--markdown, --html, --lock-clocks or --cold-l2"
            )
        spread = _bench_over_images(targets, backend, over_images, data, threads)
        _print_table(spread.table())
        if plot:
            spread.plot(plot)
        _write_json(json_file, spread.to_json())
        return
    allowed = _percent(fail_if_slower or "5%")
    earlier = read_report(baseline) if baseline else None
    share = _percent(until, "--until")
    report = _bench(
        targets,
        backend,
        batch,
        seconds,
        threads,
        image_size,
        until=share,
        lock_clocks=lock_clocks,
        cold_l2=cold_l2,
        baseline=earlier,
    )
    _write_json(json_file, report.to_json() | {"profiles": []})  # what took long is safe, whatever fails from here on
    _print_bench(report)
    profiles = _profiles(targets, backend, batch[0], threads, image_size) if profile else []
    if plot:
        report.plot(plot)
    _write_pages(report, profiles, markdown, html)
    _write_json(json_file, report.to_json() | {"profiles": [one.to_json() for one in profiles]})
    if earlier:
        for line in check_baseline(report, earlier, allowed):
            print(line)


@app.command()
def inspect(
    targets: Annotated[
        list[str], typer.Argument(metavar="A [B ...]", help="Run folders, timm names.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="Draw the wiring into this .svg file, or wirings and costs into this .html.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Pixels; default: the model's own.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Measure a wiring that depends on the image on these validation images.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Parameters, MACs, peak memory and wiring; several targets side by side. Draws the wiring."""
    with _extra("mcdeploy inspect", "train"):
        from mcdeploy.targets import describe_model, draw_inspections, inspect_target
    _check_folder(json_file)
    _check_folder(out)
    if out and out.suffix not in (".svg", ".html"):
        raise InputError(f"--out {out}: a wiring is drawn into an .svg or an .html")
    if out and out.suffix == ".svg" and len(targets) > 1:
        raise InputError(f"--out {out}: an .svg holds one wiring; give an .html for {len(targets)} targets")
    found = []
    for target in targets:
        opened, config = _open_target(target, data, None, image_size)
        loaders = _loaders_of(config) if data else None
        found.append(inspect_target(opened, image_size or config.image_size, loaders))
    if len(found) == 1:
        describe_model(found[0])
    else:
        _print_side_by_side(found)
    drawn = draw_inspections(found, as_page=out.suffix == ".html") if out else ""
    _write_json(json_file, {"targets": [one.to_json() for one in found]})
    if out:
        out.write_text(drawn, encoding="utf-8")
        print(f"drew {out}")


def serve(**values: Any) -> None:
    """Serve bundles: Open Inference Protocol v2 over HTTP and gRPC, POST /predict, and a page to try them on.

    A changed bundle is refused. Requests are batched while the engine is busy.
    """
    from mcruntime.server import serve as run_server

    bundles = values.pop("bundles")
    run_server(bundles or [], from_flags(values))


serve.__signature__ = signature_of_serve()  # type: ignore[attr-defined]
app.command()(serve)


@app.command()
def package(
    bundle: Annotated[
        str, typer.Argument(metavar="BUNDLE[@MODEL]", help="A bundle; @int8: another model of it.", show_default=False)
    ],
    to: Annotated[str, typer.Option("--to", help="triton, docker or kserve.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    bench_file: Annotated[
        Path | None,
        typer.Option("--bench", help="triton, kserve: take the batch sizes from this JSON of 'mcdeploy bench'."),
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option(help="docker: mcdeploy's wheel; default: built, when this is a checkout.")
    ] = None,
    storage_uri: Annotated[
        str, typer.Option(help="kserve: where you will copy the files to, such as s3://BUCKET/FOLDER.")
    ] = "",
    image: Annotated[
        str, typer.Option(help="kserve: the server's image with its tag; default: only Triton's part is written.")
    ] = "",
) -> None:
    """Make a Triton repository of a bundle, a folder for docker build, or files for KServe; overwrites only its own."""
    from mcruntime.bundle import load_bundle
    from mcruntime.deploy.docker import package_docker
    from mcruntime.deploy.kserve import package_kserve
    from mcruntime.deploy.triton import package_triton

    _only("--to", [to], ["triton", "docker", "kserve"])
    if bench_file and to == "docker":
        raise InputError("--bench: chooses batch sizes for triton and kserve; leave it away for docker")
    if wheel and to != "docker":
        raise InputError(f"--wheel: is what a docker image installs; leave it away for {to}")
    for option, value in (("--storage-uri", storage_uri), ("--image", image)):
        if value and to != "kserve":
            raise InputError(f"{option}: is read by kserve; leave it away for {to}")
    if to == "kserve" and not storage_uri:
        raise InputError("--to kserve: give --storage-uri, a folder that the cluster reads, such as s3://BUCKET/FOLDER")
    loaded = load_bundle(bundle)
    if to == "triton":
        packaged = package_triton(loaded, out, name=bundle, bench=bench_file)
    elif to == "docker":
        packaged = package_docker(loaded, out, wheel=wheel)
    else:
        packaged = package_kserve(loaded, out, storage_uri=storage_uri, image=image, name=bundle, bench=bench_file)
    for note in packaged.notes:
        print(note)
    print(f"wrote {packaged.folder}")


@app.command()
def keygen(
    file: Annotated[Path, typer.Argument(help="Where the private key goes; FILE.pub is the public one.")],
) -> None:
    """Make an ed25519 key pair: FILE signs bundles, FILE.pub checks them. MCDEPLOY_KEY_PASSPHRASE encrypts FILE."""
    from mcruntime.signature import keygen as make_keys

    public, fingerprint = make_keys(file)
    print(f"key {fingerprint[:16]}: keep {file} to yourself, give {public} to whoever checks")


@app.command()
def doctor(json_file: JsonOption = None) -> None:
    """What can run here, and why the rest cannot.

    Exit code 1 when something does not work that an installed package is for, such as onnxruntime-gpu without a GPU.
    What is not installed is told, and is no failure.
    """
    from mcdeploy.doctor import examine, print_diagnosis

    _check_folder(json_file)
    diagnosis = examine()
    print_diagnosis(diagnosis)
    _write_json(json_file, diagnosis.to_json())
    if diagnosis.broken:
        raise McdeployError(diagnosis.summary())
    print(diagnosis.summary())


nnmass_app = typer.Typer(help="NN-Mass: choose a net by its topology, before training any.", no_args_is_help=True)
app.add_typer(nnmass_app, name="nnmass")


@nnmass_app.callback()
def _nnmass() -> None:
    """Keeps ``search`` a command of its own while it is the only one."""


@nnmass_app.command("search")
def nnmass_search(
    max_params: Annotated[float | None, typer.Option(min=1, help="At most so many parameters, such as 1e6.")] = None,
    max_macs: Annotated[float | None, typer.Option(min=1, help="At most so many MACs an image, such as 2e8.")] = None,
    family: Annotated[str, typer.Option(help="cells, cells-depthwise or mobilenet.")] = "cells",
    width: Annotated[
        float | None, typer.Option(help="Channels of the first cell, or the width multiplier of mobilenet.")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(metavar="A:B", help="Layers of a cell, or blocks of a mobilenet stage, from A to B.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a recipe for the pick into this .yaml file.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Of all nets of one width within a budget, the one with the highest NN-Mass; nothing is trained."""
    with _extra("mcdeploy nnmass search", "train"):
        from rich.console import Console

        from mcdeploy.search import search, table_of, write_recipe
    if max_params is None and max_macs is None:
        raise InputError("nnmass search: needs a budget; give --max-params, --max-macs or both")
    _check_folder(json_file)
    _check_folder(out)
    found = search(
        family,
        width=width,
        depths=None if depths is None else _range("--depths", depths),
        max_parameters=max_params or float("inf"),
        max_macs=max_macs or float("inf"),
    )
    if out:
        write_recipe(found, out)
    _write_json(json_file, found.to_json())
    Console(width=None if sys.stdout.isatty() else 140).print(table_of(found))
    pick = found.pick
    print(f"pick: {pick.label}: NN-Mass {pick.nn_mass:,.1f}, {pick.parameters:,} parameters, {pick.macs:,} MACs")
    print(f"next: mcdeploy train {out}" if out else "add --out FILE.yaml to write the recipe that trains it")


@app.command()
def recipes() -> None:
    """The recipes that ship, one line each."""
    for path in sorted(_recipe_folder().glob("*.yaml")):
        print(f"{path.stem:32} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


# --------------------------------------------------------------------------- from a recipe to the functions that work


def _train(recipe: Recipe, run: Path, resume: bool) -> tuple[TrainResult, Loaders]:
    """Data, model and loop of one recipe."""
    with _extra("mcdeploy train", "train"):
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


def _open_run(run: Path) -> tuple[Recipe, Any, dict[str, Any]]:
    """A finished run: its recipe, its trained and frozen model, and its checkpoint's header."""
    with _extra("mcdeploy", "train"):
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


def _prune_export(
    run: Path,
    out: Path,
    data: str | None = None,
    changes: dict[str, Any] | None = None,
    sign: Path | None = None,
) -> Shipped:
    changes = {key: value for key, value in (changes or {}).items() if value is not None}
    recipe, model, header = _open_run(run)
    with _extra("mcdeploy prune-export", "train"):
        from mcdeploy.checkpoint import FILE_NAME, sha256_of, sha256_of_json
        from mcdeploy.connectivity.ddw import dynamic_stages
        from mcdeploy.data import plain_training_images
        from mcdeploy.package import Origin
        from mcdeploy.package import prune_export as make_bundle
        from mcdeploy.wiring_file import last_gates
    config = _export_config(recipe.export, changes)
    if config.licence_weights is None:
        config = config.model_copy(update={"licence_weights": _licence_of(recipe.model)})
    if "tensorrt" in config.backend:  # before the work rather than after it
        from mcruntime.gpu import describe_device, load_tensorrt

        load_tensorrt()
        describe_device()
    if sign is not None and not sign.is_file():
        raise InputError(f"--sign {sign}: no such key file; 'mcdeploy keygen' makes one")
    if sign is not None:
        with _extra("--sign", "sign"):
            from mcruntime.signature import check_private_key
        check_private_key(sign)
    if config.sensitivity and "int8" not in config.precision:
        raise InputError("--sensitivity, export.sensitivity: is about int8; add --precision int8, or leave it away")
    loaders = _loaders_of(_data_config(recipe.data, data))
    _same_classes(header["classes"], loaders.classes)
    dynamic = dynamic_stages(model)
    if "dynamic" in changes and not dynamic:
        raise InputError(f"--dynamic {config.dynamic}: the wiring of {run} does not depend on the image; leave it away")
    calibration = None
    if dynamic or set(config.precision) != {"fp32"}:
        calibration = plain_training_images(loaders, config.calibration_images, 0)
    with _progress("export") as progress:
        shipped = make_bundle(
            model,
            loaders.val,
            config,
            name=recipe.name,
            out=out,
            labels=header["classes"],
            preprocessing=_preprocessing(header),
            origin=Origin(
                parents={
                    "checkpoint": sha256_of(run / FILE_NAME),
                    "recipe": sha256_of_json(header["recipe"]),
                    **header.get("parents", {}),
                },
                seeds={"train": recipe.seed},
                recipe=header["recipe"],
                candidates=header["candidates"],
                gates={} if dynamic else last_gates(run / "metrics.jsonl"),
            ),
            calibration=calibration,
            program=run / PROGRAM,
            sign=sign,
            say=lambda line: print(f"    {line}"),
            progress=progress,
        )
    if dynamic and calibration is not None and config.dynamic.startswith("static:"):
        from mcdeploy.static import cut_static

        cut = cut_static(
            shipped.compiled,
            calibration,
            loaders.val,
            config,
            count=int(config.dynamic.removeprefix("static:")),
            out=run / STATIC,
            labels=header["classes"],
            preprocessing=_preprocessing(header),
            say=lambda line: print(f"    {line}"),
        )
        print(
            f"static models in {run / STATIC}: top-1 {cut.accuracy_dynamic:.2%} -> {cut.accuracy_static:.2%}, the same "
            f"class for {cut.top1_agreement:.2%} of {cut.images} images"
        )
    return shipped


def _report_departure(bundle: Path) -> None:
    """A page beside what prune-export left of a hop that failed, where it could look inside."""
    from mcdeploy.package import DEPARTURE
    from mcdeploy.report import ReportData, departure_section, write_report

    left = bundle.resolve().with_name(bundle.resolve().name + DEPARTURE)
    if left.exists():
        page = left.with_suffix(".html")
        more = {"First departure": departure_section(json.loads(left.read_text(encoding="utf-8")))}
        write_report(page, ReportData(f"{bundle.name}: a hop that failed", more=more))
        print(f"every tensor that was compared: {page}", file=sys.stderr)


def _licence_of(config: ModelConfig) -> str | None:
    """What timm says of its own weights, where the training started from them."""
    import timm

    return timm.get_pretrained_cfg(config.backbone).license if config.pretrained else None


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


def _print_models(shipped: Shipped) -> None:
    """What really came out, as read back from the files, and how exact each is."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What was written, read back from the files", title_style="bold", title_justify="left")
    for head in ("model", "file", "types", "top-1", "agrees", "largest difference"):
        table.add_column(Text(head), overflow="fold")
    for key, model in shipped.bundle.manifest.models.items():
        agreement = shipped.agreements[key]
        worst = [row.max_abs for row in shipped.parity if row.hop == ("onnx" if key == "fp32" else key)]
        table.add_row(
            Text(key),
            Text(model.file),
            Text(_types_in_words(model.nodes)),
            f"{agreement.accuracy_before:.2%} -> {agreement.accuracy_after:.2%}",
            f"{agreement.top1_agreement:.2%}",
            f"{max(worst):.1e}",
        )
    _print_table(table)


def _types_in_words(nodes: dict[str, dict[str, int]]) -> str:
    """The operators that do the work, such as "Conv: 52 int8, 2 fp32"."""
    heavy = [op for op in ("Conv", "Gemm", "MatMul") if op in nodes]
    return "; ".join(f"{op}: {', '.join(f'{n} {kind}' for kind, n in nodes[op].items())}" for op in heavy)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, and nothing elsewhere: for work that reports which share of it is done."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(transient=True, disable=not Console().is_terminal)
    with bar:
        task = bar.add_task(what, total=1.0, visible=False)
        yield lambda words, share: bar.update(task, description=words, completed=share, visible=share < 1)


def _report(run: Path, shipped: Shipped, bench: BenchReport | None, command: str) -> None:
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


def _open_target(
    text: str,
    data: str | None,
    weights: Path | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
) -> tuple[Target, DataConfig]:
    """What the user named, and the data section that goes with it."""
    with _extra("mcdeploy", "train"):
        from mcdeploy.targets import Target, kind_of, open_file
    from mcdeploy.recipe import DataConfig

    kind = kind_of(text)
    if (weights or pretrained) and kind != "backbone":
        raise InputError(f"--weights and --pretrained are for timm backbones; {text} is a {kind} and has its own")
    if kind == "run":
        recipe, model, header = _open_run(Path(text))
        target = Target(
            text,
            module=model,
            image_size=recipe.data.image_size,
            labels=tuple(header["classes"]),
            preprocessing=_preprocessing(header),
            has_data=True,
        )
        return target, _data_config(recipe.data, data)
    if kind == "backbone":
        return _open_backbone(text, data, weights, image_size, pretrained)
    target = open_file(text)
    how = target.preprocessing
    return target, _data_config(DataConfig() if how is None else DataConfig(**how.model_dump()), data)


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
    return target, _data_config(DataConfig(**how.model_dump()), data)


def _preprocessing(header: dict[str, Any]) -> Preprocessing:
    from mcruntime.preprocess import Preprocessing

    return Preprocessing.model_validate_json(json.dumps(header["preprocessing"]))


def _data_config(own: DataConfig, given: str | None) -> DataConfig:
    """A data section with the source replaced by what --data says."""
    if given is None:
        return own
    source = {"source": "digits", "root": None} if given == "digits" else {"source": "folder", "root": given}
    return own.model_copy(update={**source, "dataset": None})


def _loaders_of(config: DataConfig) -> Loaders:
    """Loaders to evaluate with: nothing is held in memory or augmented."""
    from mcdeploy.data import build_loaders

    return build_loaders(config.model_copy(update={"in_memory": False, "images_per_epoch": None}), 2, 100, 0)


def _bench(
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
    with _extra("mcdeploy bench", "train"):
        from mcdeploy.targets import BACKENDS, measure
    _only("--backend", backends, list(BACKENDS))
    opened = [_open_target(text, None, None, image_size)[0] for text in targets]
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


def _profiles(
    targets: list[str], backends: list[str], batch: int, threads: int | None, image_size: int | None
) -> list[Profile]:
    from mcdeploy.profile import profile_table
    from mcdeploy.targets import profile_targets

    opened = [_open_target(text, None, None, image_size)[0] for text in targets]
    profiles = profile_targets(opened, backends, batch, threads=threads, image_size=image_size)
    _print_table(profile_table(profiles))
    return profiles


def _write_pages(report: BenchReport, profiles: list[Profile], markdown: Path | None, html: Path | None) -> None:
    from mcdeploy.bench_page import bench_markdown, write_bench_page

    command = shlex.join(["mcdeploy", *sys.argv[1:]])
    if markdown:
        markdown.write_text(bench_markdown(report, profiles, command), encoding="utf-8")
    if html:
        write_bench_page(html, report, profiles, command)


def _bench_over_images(
    targets: list[str], backends: list[str], count: int, data: str | None, threads: int | None
) -> ImagesReport:
    with _extra("mcdeploy bench", "train"):
        from mcdeploy.targets import BACKENDS, measure_over_images
    _only("--backend", backends, list(BACKENDS))
    opened = [_open_target(text, data) for text in targets]
    config = next((config for target, config in opened if target.has_data or (data and target.preprocessing)), None)
    if config is None:
        raise InputError("--over-images: none of the models knows its images; give --data, or name a run folder")
    for target, _ in opened:
        if target.image_size not in (None, config.image_size):
            raise InputError(f"{target.name}: takes images of {target.image_size} pixels, not of {config.image_size}")
    return measure_over_images([target for target, _ in opened], backends, _loaders_of(config), count, threads=threads)


def _print_bench(report: BenchReport) -> None:
    _print_table(report.table())


def _print_table(table: Table) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _print_side_by_side(found: list[Inspection]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mcdeploy.targets import compare_costs, notes_on

    heads, rows = compare_costs(found)
    table = Table()
    for i, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for note in notes_on(found):
        print(note)


# -------------------------------------------------------------------------------------------------------- small change


def _recipe_folder() -> Path:
    """Beside the package in a checkout, inside it when installed."""
    beside = Path(__file__).parents[1] / "recipes"
    return beside if (beside / "digits.yaml").exists() else Path(__file__).parent / "recipes"


def _find_recipe(given: Path) -> Path:
    """A path as it is, or the shipped recipe of that name."""
    shipped = _recipe_folder() / f"{given}.yaml"
    return shipped if not given.is_file() and shipped.is_file() else given


def _only(option: str, given: list[str], known: list[str]) -> None:
    for value in given:
        if value not in known:
            raise InputError(f"{option} {value}: not available; this version has {', '.join(known)}")


def _same_classes(trained: list[str], found: list[str]) -> None:
    if trained != found:
        odd = sorted(set(trained) ^ set(found))
        raise InputError(f"--data: its classes are not the run's; first difference: {odd[0] if odd else 'their order'}")


def _percent(text: str, option: str = "--fail-if-slower") -> float:
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        raise InputError(f"{option} {text}: expected a percentage such as 5%") from None
    if not 0 <= share < float("inf"):  # NaN fits nowhere
        raise InputError(f"{option} {text}: expected 0% or more")
    return share


def _range(option: str, text: str) -> range:
    """``5:9`` is 5, 6, 7, 8, 9."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise InputError(f"{option} {text}: expected two whole numbers A:B with A <= B, such as 5:9")
    return range(int(first), int(last) + 1)


def _check_folder(path: Path | None) -> None:
    """Before the work rather than after it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent} to write it into")


def _write_json(path: Path | None, data: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _extra(command: str, extra: str) -> Iterator[None]:
    """A missing package becomes the sentence that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).startswith(("mcdeploy", "mcruntime")):
            raise
        raise MissingExtraError(command, str(error.name), extra) from None


def _print_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    """Ours are sentences for the user, such as a cached engine that is not used; where in the code helps nobody."""
    print(f"warning: {message}", file=sys.stderr)


def main() -> None:
    """Run a command; an expected error is printed alone and becomes the exit code."""
    warnings.showwarning = _print_warning
    try:
        app()
    except McdeployError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"error: {error.filename or 'the disk'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
