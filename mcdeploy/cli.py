"""The command line: parse, call one function, print. Heavy imports happen inside the commands, so that --help is quick.

Exit codes: 0 done; 1 a promise failed; 2 the user's input is wrong. Expected errors are one sentence without traceback.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from mcruntime.server.options import from_flags

from mcdeploy.console import print_models, print_side_by_side, print_table
from mcdeploy.errors import InputError, McdeployError, ParityError
from mcdeploy.flags import (
    check_folder,
    check_known,
    find_recipe,
    needs_extra,
    percentage,
    recipe_folder,
    whole_range,
    write_json,
)
from mcdeploy.opening import bench_named, bench_over_images, open_target, profile_named
from mcdeploy.runs import REPORT, loaders_of, report_departure, report_run, ship_run, train_run
from mcdeploy.serve_options import signature_of_serve

if TYPE_CHECKING:
    from mcdeploy.bench_report import BenchReport
    from mcdeploy.profile import Profile

app = typer.Typer(
    help="Learn which connections of a vision backbone matter, remove the rest, prove it, ship it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
BUNDLE = "bundle"

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
    with needs_extra("mcdeploy demo", "train"):
        from mcdeploy import demo as showing
    with needs_extra("mcdeploy demo", "serve"):
        import uvicorn  # noqa: F401
    with needs_extra("mcdeploy demo", "train"):
        from mcdeploy.recipe import load_recipe

    if (out / "checkpoint.safetensors").exists() and out != Path("demo"):
        raise InputError(f"{out}: holds a run already; give another --out")
    recipe = load_recipe(recipe_folder() / "digits.yaml")
    print(f"1/5 train: {recipe.model.backbone} on digits, MaskConnect, {recipe.train.epochs} epochs")
    result, loaders = train_run(recipe, out, resume=False)
    print("2/5 prune-export")
    shipped = ship_run(out, out / BUNDLE)
    print("3/5 bench: the dense backbone against the pruned net, ONNX Runtime, interleaved")
    bench = bench_named([recipe.model.backbone, str(out / BUNDLE)], ["onnx"], [1, 32], seconds=8.0, threads=None)
    print("4/5 serve: one prediction over HTTP")
    answer = showing.ask_server(
        shipped.bundle.folder, loaders.val, loaders.preprocessing, shipped.bundle.manifest.labels
    )
    print(f"    a held-out {answer.true_label}: the server says {answer.label} ({answer.probability:.1%})")
    print("5/5 report")
    report_run(out, shipped, bench, "mcdeploy demo")
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
    with needs_extra("mcdeploy train", "train"):
        from mcdeploy.recipe import load_recipe

    loaded = load_recipe(find_recipe(recipe), tuple(overrides))
    run = out or Path("runs") / loaded.name
    if not resume and (run / "checkpoint.safetensors").exists():
        raise InputError(f"{run}: holds a run already; add --resume to continue it, or give another --out")
    check_folder(json_file)
    result, _ = train_run(loaded, run, resume)
    if not result.is_main:
        return
    write_json(
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
    check_known("--backend", backend, ["onnx", "tensorrt"])
    check_known("--precision", precision, ["fp32", "fp16", "int8"])
    check_folder(json_file)
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
        shipped = ship_run(run, bundle, data, changes, sign)
    except ParityError:
        report_departure(bundle)
        raise
    report_run(run, shipped, None, f"mcdeploy prune-export {run}")
    certificate, manifest = shipped.certificate, shipped.bundle.manifest
    write_json(json_file, manifest.model_dump(mode="json"))
    print(f"parameters {certificate.parameters[0]:,} -> {certificate.parameters[1]:,}")
    print(f"MACs {certificate.macs[0]:,} -> {certificate.macs[1]:,}")
    print_models(shipped)
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
    with needs_extra("mcdeploy eval", "train"):
        from mcdeploy.targets import evaluate_target
    check_folder(json_file)
    opened, config = open_target(target, data, weights, pretrained=pretrained)
    if opened.preprocessing is None:
        raise InputError(
            f"{target}: nothing says how its images are prepared; evaluate the bundle or the run it is from"
        )
    if not opened.has_weights:
        raise InputError(f"{target}: has random weights; give --weights FILE or --pretrained")
    if data is None and not opened.has_data:
        raise InputError(f"{target}: does not know its images; give --data, a folder with train/ and val/")
    loaders = loaders_of(config)
    accuracy = evaluate_target(opened, loaders, image_size=config.image_size)
    write_json(json_file, {"top1": accuracy.top1, "loss": accuracy.loss, "images": accuracy.images})
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
    with needs_extra("mcdeploy bench", "train"):
        from mcdeploy.bench_report import check_baseline, read_report
        from mcdeploy.profile import check_profiled, profile_table
    if baseline and json_file and baseline.resolve() == json_file.resolve():
        raise InputError(f"--json {json_file}: is the baseline; give another file, or a slower run would replace it")
    if fail_if_slower and not baseline:
        raise InputError("--fail-if-slower: needs --baseline, the earlier bench to compare with")
    if plot and plot.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {plot}: a plot is a .png, .svg or .pdf")
    check_folder(json_file)
    for file in (plot, markdown, html):
        check_folder(file)
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
        spread = bench_over_images(targets, backend, over_images, data, threads)
        print_table(spread.table())
        if plot:
            spread.plot(plot)
        write_json(json_file, spread.to_json())
        return
    allowed = percentage(fail_if_slower or "5%")
    earlier = read_report(baseline) if baseline else None
    share = percentage(until, "--until")
    report = bench_named(
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
    write_json(json_file, report.to_json() | {"profiles": []})  # what took long is safe, whatever fails from here on
    print_table(report.table())
    profiles = profile_named(targets, backend, batch[0], threads, image_size) if profile else []
    if profiles:
        print_table(profile_table(profiles))
    if plot:
        report.plot(plot)
    _write_pages(report, profiles, markdown, html)
    write_json(json_file, report.to_json() | {"profiles": [one.to_json() for one in profiles]})
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
    with needs_extra("mcdeploy inspect", "train"):
        from mcdeploy.targets import describe_model, draw_inspections, inspect_target
    check_folder(json_file)
    check_folder(out)
    if out and out.suffix not in (".svg", ".html"):
        raise InputError(f"--out {out}: a wiring is drawn into an .svg or an .html")
    if out and out.suffix == ".svg" and len(targets) > 1:
        raise InputError(f"--out {out}: an .svg holds one wiring; give an .html for {len(targets)} targets")
    found = []
    for target in targets:
        opened, config = open_target(target, data, None, image_size)
        loaders = loaders_of(config) if data else None
        found.append(inspect_target(opened, image_size or config.image_size, loaders))
    if len(found) == 1:
        describe_model(found[0])
    else:
        print_side_by_side(found)
    drawn = draw_inspections(found, as_page=out.suffix == ".html") if out else ""
    write_json(json_file, {"targets": [one.to_json() for one in found]})
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

    check_known("--to", [to], ["triton", "docker", "kserve"])
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

    check_folder(json_file)
    diagnosis = examine()
    print_diagnosis(diagnosis)
    write_json(json_file, diagnosis.to_json())
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
    with needs_extra("mcdeploy nnmass search", "train"):
        from mcdeploy.search import search, table_of, write_recipe
    if max_params is None and max_macs is None:
        raise InputError("nnmass search: needs a budget; give --max-params, --max-macs or both")
    check_folder(json_file)
    check_folder(out)
    found = search(
        family,
        width=width,
        depths=None if depths is None else whole_range("--depths", depths),
        max_parameters=max_params or float("inf"),
        max_macs=max_macs or float("inf"),
    )
    if out:
        write_recipe(found, out)
    write_json(json_file, found.to_json())
    print_table(table_of(found))
    pick = found.pick
    print(f"pick: {pick.label}: NN-Mass {pick.nn_mass:,.1f}, {pick.parameters:,} parameters, {pick.macs:,} MACs")
    print(f"next: mcdeploy train {out}" if out else "add --out FILE.yaml to write the recipe that trains it")


@app.command()
def recipes() -> None:
    """The recipes that ship, one line each."""
    for path in sorted(recipe_folder().glob("*.yaml")):
        print(f"{path.stem:32} {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


def _write_pages(report: BenchReport, profiles: list[Profile], markdown: Path | None, html: Path | None) -> None:
    from mcdeploy.bench_page import bench_markdown, write_bench_page

    command = shlex.join(["mcdeploy", *sys.argv[1:]])
    if markdown:
        markdown.write_text(bench_markdown(report, profiles, command), encoding="utf-8")
    if html:
        write_bench_page(html, report, profiles, command)


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
