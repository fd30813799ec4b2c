"""Package: from a trained, frozen model to a bundle that proves itself. The last thing that needs torch.

trained, frozen --compile--> small module --onnx--> model.onnx --fp16, int8--> model.int8.onnx --tensorrt--> .plan

Every arrow is a hop, verified in ``forms``.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from mcruntime.bundle import CERTIFICATE, Bundle, load_bundle, seal
from mcruntime.engine import Runner
from mcruntime.manifest import Accuracy, Change, Latency, Licences, Manifest, ModelInput, ModelOutput
from mcruntime.manifest import Parity as ManifestParity
from mcruntime.preprocess import Preprocessing
from mcruntime.signature import sign_bundle
from torch import nn
from torch.utils.data import DataLoader

from mcdeploy.backends.fp16 import hash_images
from mcdeploy.backends.onnx import INPUT, OUTPUT, export_onnx, export_program
from mcdeploy.bench import compare_latency
from mcdeploy.compile import Certificate, compile_with_certificate
from mcdeploy.compile.dynamic import NEAR_THRESHOLD, record, settled
from mcdeploy.connectivity.ddw import dynamic_stages
from mcdeploy.errors import AccuracyError, BundleError, DataError, ParityError
from mcdeploy.forms import Form, Hops, as_arrays, make_forms
from mcdeploy.recipe import ExportConfig
from mcdeploy.verify import Agreement, Images, Parity, agree_all
from mcdeploy.wiring_file import write_wiring

SELFTEST_IMAGES = 7
DEPARTURE = ".departure.json"  # left beside the bundle, after its name, when a hop fails: all that was compared
PACKAGES = (
    "mcdeploy", "torch", "timm", "numpy", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "tensorrt",
)  # fmt: skip
MEASURE_SECONDS = 1.0  # of every model and batch size; ``bench`` is the place for figures to quote


@dataclass(frozen=True)
class Shipped:
    """What prune-export made."""

    bundle: Bundle
    certificate: Certificate
    parity: tuple[Parity, ...]
    agreements: dict[str, Agreement]  # with the trained model, by key of the manifest's models
    compiled: nn.Module

    @property
    def agreement(self) -> Agreement:
        """That of the model that is served."""
        return self.agreements[self.bundle.manifest.serve]


@dataclass(frozen=True)
class Origin:
    """What a bundle says about where it comes from."""

    parents: Mapping[str, str]  # name to sha256
    seeds: Mapping[str, int]
    recipe: Mapping[str, Any] = field(default_factory=dict)  # whole, as plain data
    candidates: Mapping[str, Any] | None = None  # what each block could have read, as ``Topology.to_json``
    gates: Mapping[str, Any] = field(default_factory=dict)  # learned, by stage one list a block


def prune_export(
    trained: nn.Module,
    val: DataLoader[tuple[torch.Tensor, torch.Tensor]],
    config: ExportConfig,
    *,
    name: str,
    out: Path,
    labels: list[str],
    preprocessing: Preprocessing,
    origin: Origin,
    calibration: torch.Tensor | None = None,
    program: Path | None = None,
    sign: Path | None = None,
    say: Callable[[str], None] = print,
    progress: Callable[[str, float], None] | None = None,
) -> Shipped:
    """Compile, export, verify and seal. The bundle appears at ``out`` only when every promise was kept.

    Args:
        trained: the trained, frozen model; stays as it is.
        val: validation images, at least 7.
        calibration: images [B, C, H, W] that show the ranges of fp16 and int8, and what varies in a per-image wiring;
            default: the first 7 of val.
        program: where to leave the compiled model as an ExportedProgram, if anywhere; verified like the ONNX file.
        sign: a private key file to sign the manifest with.
        progress: is told what long work is going on, and which share of it, 0 to 1, is done.

    Raises:
        ParityError, AccuracyError: a step changed the function more than ``config`` allows.
        BackendError: the export failed, or did not give what was asked for.
        BundleError: ``out`` exists and is no bundle.
        DataError: fewer than 7 validation images.
    """
    trained = trained.cpu().eval()
    images = _first_images(val, SELFTEST_IMAGES)
    example = torch.from_numpy(images[:2])
    out = out.resolve()
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    draft = None if program is None else program.with_name(f".{program.stem}.part.pt2")
    departure = out.with_name(out.name + DEPARTURE)
    for stale in (departure, departure.with_suffix(".html")):
        stale.unlink(missing_ok=True)
    _make_room(out, part)
    try:
        say("compile: freeze, prune, fold, certify")
        small, certificate = compile_with_certificate(trained, torch.from_numpy(images), calibration)
        noise = None
        if certificate.calibration is not None:
            say("compile: how validation images are wired, before and after")
            images, facts = _steady_images(trained, small, val, config.max_abs)
            noise = _settled_noise(small, images.shape)
            certificate = replace(certificate, calibration=certificate.calibration | facts)
            example = torch.from_numpy(images[:2])
        hops = Hops(trained, small, images, noise, config, departure, say)
        say(f"export: ONNX, opset {config.opset}")
        export_onnx(small, part / "model.onnx", example, opset=config.opset, dynamic=_form(config))
        hops.check_compiled(part / "model.onnx")
        if draft is not None:
            export_program(small, draft, example)
            hops.check_program(draft)
        ranges = images if calibration is None else calibration.numpy().astype(np.float32)
        forms = make_forms(part, hops, ranges, val, progress)
        say("verify: the whole validation set")
        with hops.trained_runner as expected:
            with _entered(forms) as runners:
                agreements = agree_all(expected, runners, as_arrays(val))
                exactness = {key: _distance(expected, runner, images) for key, runner in runners.items()}
            logits = expected.infer(images)
        for key, agreement in agreements.items():
            _check_floor(key, agreement, config, is_calibrated=certificate.calibration is not None)
        latency = _measure(forms, images, config.batch)
        (part / CERTIFICATE).write_text(json.dumps(certificate.to_json(), indent=2))
        write_wiring(
            part,
            small,
            certificate.topology,
            val,
            example=example,
            opset=config.opset,
            candidates=origin.candidates,
            gates=origin.gates,
        )
        np.savez(part / "selftest.npz", images=images, logits=logits)
        serve = next(iter(forms))
        models = {
            key: form.in_manifest(agreements[key].accuracy_after, _tolerance(form, exactness[key], config))
            for key, form in forms.items()
        }
        seal(
            part,
            Manifest(
                name=name,
                models=models,
                serve=serve,
                input=ModelInput(name=INPUT, shape=images.shape[1:]),
                output=ModelOutput(name=OUTPUT, num_classes=logits.shape[1]),
                labels=tuple(labels),
                preprocessing=preprocessing,
                parents={
                    **origin.parents,
                    **({} if calibration is None else {"calibration images": hash_images(ranges)}),
                },
                recipe=dict(origin.recipe),
                versions=_versions(),
                git_commit=_git_commit(),
                licences=Licences(model=config.licence, weights=config.licence_weights, data=config.licence_data),
                accuracy=Accuracy(
                    before=agreements[serve].accuracy_before,
                    after=agreements[serve].accuracy_after,
                    images=agreements[serve].images,
                ),
                params=Change(before=certificate.parameters[0], after=certificate.parameters[1]),
                macs=Change(before=certificate.macs[0], after=certificate.macs[1]),
                parity=tuple(ManifestParity(**row.to_json()) for row in hops.rows),
                seeds=dict(origin.seeds),
                latency=tuple(latency),
            ),
        )
        if sign is not None:
            sign_bundle(part, sign)
        if out.exists():  # moved aside, not deleted: at every moment one whole bundle is there
            out.rename(old)
        part.rename(out)
        if draft is not None and program is not None:
            draft.replace(program)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        if draft is not None:
            draft.unlink(missing_ok=True)
    return Shipped(load_bundle(out), certificate, tuple(hops.rows), agreements, small)


def _make_room(out: Path, part: Path) -> None:
    if out.is_file():
        raise BundleError(f"{out}: is a file; a bundle is a folder, give another --out")
    if out.exists() and not (out / "manifest.json").exists() and any(out.iterdir()):
        raise BundleError(f"{out}: exists and is not a bundle, so it is not overwritten; give another --out")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _form(config: ExportConfig) -> Literal["if", "masked"]:
    return "masked" if config.dynamic == "masked" else "if"


def _steady_images(
    trained: nn.Module, small: nn.Module, val: DataLoader[tuple[torch.Tensor, torch.Tensor]], max_abs: float
) -> tuple[Images, dict[str, int]]:
    """The first validation images whose wiring compile kept and that lie away from every threshold; and the counts.

    An image whose logits moved by more than ``max_abs`` opens an edge that no calibration image did.

    Raises:
        ParityError: fewer than 7 of them.
    """
    found: list[torch.Tensor] = []
    total = changed = near = 0
    for images_BCHW, _ in val:
        images_BCHW = images_BCHW.float()
        before = record(trained, images_BCHW)
        logits_BK, is_settled_B = before.logits_BK, before.margin_B >= NEAR_THRESHOLD
        if dynamic_stages(small):
            after = record(small, images_BCHW)
            after_BK, is_settled_B = after.logits_BK, is_settled_B & (after.margin_B >= NEAR_THRESHOLD)
        else:
            with torch.no_grad():
                after_BK = small(images_BCHW)
        moved_B = (logits_BK - after_BK).abs().amax(1) > max_abs * logits_BK.abs().max()
        total, changed, near = total + len(moved_B), changed + int(moved_B.sum()), near + int((~is_settled_B).sum())
        if sum(map(len, found)) < SELFTEST_IMAGES:
            found.append(images_BCHW[is_settled_B & ~moved_B])
    steady = torch.cat(found)[:SELFTEST_IMAGES]
    if len(steady) < SELFTEST_IMAGES:
        raise ParityError(
            f"compile changed the wiring of {changed} of {total} validation images; raise export.calibration_images"
        )
    facts = {"validation_images": total, "validation_changed": changed, "validation_near_threshold": near}
    return steady.numpy().astype(np.float32), facts


def _settled_noise(small: nn.Module, shape: tuple[int, ...]) -> Images:
    """Noise that rounding cannot wire otherwise, of a shape [7, C, H, W].

    Raises:
        ParityError: there is none.
    """
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((256, *shape[1:])).astype(np.float32))
    kept = noise[settled(small, noise)][: shape[0]]
    if len(kept) < shape[0]:
        raise ParityError(
            f"all but {len(kept)} of {len(noise)} noise images have an edge within {NEAR_THRESHOLD:g} of the "
            "threshold, so rounding decides their wiring; train on, or with another connectivity.tau"
        )
    return kept.numpy()


def _check_floor(key: str, agreement: Agreement, config: ExportConfig, *, is_calibrated: bool) -> None:
    if key.endswith("fp32") and agreement.top1_agreement < config.min_agreement:
        advice = "; raise export.calibration_images, or lower it knowing so" if is_calibrated else ""
        raise ParityError(
            f"the exported model agrees with the trained one on {agreement.top1_agreement:.3%} of {agreement.images} "
            f"validation images, export.min_agreement asks for {config.min_agreement:.3%}{advice}"
        )
    drop = agreement.accuracy_before - agreement.accuracy_after
    if drop > config.max_accuracy_drop:
        raise AccuracyError(
            f"{key}: top-1 fell from {agreement.accuracy_before:.2%} to {agreement.accuracy_after:.2%}, "
            f"export.max_accuracy_drop allows {config.max_accuracy_drop:.2%}"
        )


def _tolerance(form: Form, measured: float, config: ExportConfig) -> float:
    """What the self-test allows: an fp32 model must come as close as verify asked for, a coarser one as it did here."""
    return config.max_abs if form.precision == "fp32" else max(config.max_abs, 2 * measured)


def _distance(expected: Runner, actual: Runner, images: Images) -> float:
    before, after = expected.infer(images), actual.infer(images)
    return float(np.abs(before - after).max() / max(np.abs(before).max(), 1e-12))


@contextmanager
def _entered(forms: Mapping[str, Form]) -> Iterator[dict[str, Runner]]:
    with ExitStack() as stack:
        yield {key: stack.enter_context(form.runner(key)) for key, form in forms.items()}


def _measure(forms: Mapping[str, Form], images: Images, batches: tuple[int, int, int]) -> list[Latency]:
    """A second of every model at each batch size, interleaved: what to expect of them on this machine.

    Batch 1 is among them wherever every model takes it, since it tells a server whether batches pay.
    """
    takes_one = all(form.engine is None for form in forms.values())
    sizes = sorted({*batches, 1} if takes_one else {*batches})
    report = compare_latency(
        [form.bare_runner(key) for key, form in forms.items()],
        {size: np.resize(images, (size, *images.shape[1:])) for size in sizes},
        seconds=MEASURE_SECONDS * len(forms),
        min_rounds=4,
        reload=False,
    )
    facts = {runner.name: runner.facts for runner in report.runners}
    return [
        Latency(
            model=row.runner,
            provider=facts[row.runner].get("provider", "unknown"),
            threads=int(facts[row.runner]["threads"]) if "threads" in facts[row.runner] else None,
            batch=row.batch,
            p50_ms=row.p50_ms.value,
            low_ms=row.p50_ms.low,
            high_ms=row.p50_ms.high,
            images_per_second=row.images_per_second,
            machine=report.machine,
        )
        for row in report.latencies
    ]


def _versions() -> dict[str, str]:
    """Of what took part, as far as it is installed under that name: onnxruntime-gpu takes the place of onnxruntime."""
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _git_commit() -> str:
    """The commit of the mcdeploy that runs, "-dirty" where files differ from it; empty when it is not run from git."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # somebody else's repository around an installed package
            return ""
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _first_images(val: DataLoader[tuple[torch.Tensor, torch.Tensor]], count: int) -> Images:
    found: list[torch.Tensor] = []
    for images, _ in val:
        found.append(images)
        if sum(len(batch) for batch in found) >= count:
            return torch.cat(found)[:count].numpy().astype(np.float32)
    raise DataError(f"prune-export needs at least {count} validation images, there are {sum(map(len, found))}")
