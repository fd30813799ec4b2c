"""Package: from a trained, frozen model to a bundle that proves itself. The last thing that needs torch.

trained, frozen --compile--> small module --export--> model.onnx --verify--> bundle, sealed
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from mcruntime.bundle import CERTIFICATE, Bundle, load_bundle, seal
from mcruntime.engine import OnnxRunner, Runner
from mcruntime.manifest import Accuracy, Change, Manifest, ModelInput, ModelOutput, SelfTest
from mcruntime.manifest import Parity as ManifestParity
from mcruntime.preprocess import Preprocessing
from torch import nn
from torch.utils.data import DataLoader

from mcdeploy.backends.onnx import INPUT, OUTPUT, export_onnx, export_program
from mcdeploy.backends.pytorch import TorchRunner
from mcdeploy.bench import compare_latency
from mcdeploy.compile import Certificate, compile_with_certificate
from mcdeploy.compile.dynamic import NEAR_THRESHOLD, record, settled
from mcdeploy.connectivity.ddw import dynamic_stages
from mcdeploy.errors import AccuracyError, BundleError, DataError, ParityError
from mcdeploy.recipe import ExportConfig
from mcdeploy.verify import Agreement, Images, Parity, agree, verify, verify_on

SELFTEST_IMAGES = 7


@dataclass(frozen=True)
class Shipped:
    """What prune-export made."""

    bundle: Bundle
    certificate: Certificate
    parity: tuple[Parity, ...]
    agreement: Agreement
    compiled: nn.Module


def prune_export(
    trained: nn.Module,
    val: DataLoader[tuple[torch.Tensor, torch.Tensor]],
    config: ExportConfig,
    *,
    name: str,
    out: Path,
    labels: list[str],
    preprocessing: Preprocessing,
    parents: Mapping[str, str],
    seeds: Mapping[str, int],
    calibration: torch.Tensor | None = None,
    program: Path | None = None,
    say: Callable[[str], None] = print,
) -> Shipped:
    """Compile, export, verify and seal. The bundle appears at ``out`` only when every promise was kept.

    Args:
        trained: the trained, frozen model; stays as it is.
        val: validation images, at least 7.
        parents: name to sha256 of what this was made from.
        calibration: for per-image wirings, images [B, C, H, W] that show what varies; default: the first 7 of val.
        program: where to leave the compiled model as an ExportedProgram, if anywhere; verified like the ONNX file.

    Raises:
        ParityError, AccuracyError: a step changed the function more than ``config`` allows.
        BackendError: the export failed.
        BundleError: ``out`` exists and is no bundle.
        DataError: fewer than 7 validation images.
    """
    trained = trained.cpu().eval()
    images = _first_images(val, SELFTEST_IMAGES)
    example = torch.from_numpy(images[:2])
    out = out.resolve()
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    draft = None if program is None else program.with_name(f".{program.stem}.part.pt2")
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
        say(f"export: ONNX, opset {config.opset}")
        model_path = part / "model.onnx"
        export_onnx(small, model_path, example, opset=config.opset, dynamic=_form(config))
        programs = []
        if draft is not None:
            export_program(small, draft, example)
            programs = [TorchRunner(torch.export.load(draft).module(), name="the exported program")]
        say("verify: batches 1, 2, 3, 7 and the whole validation set")
        frozen_runner = TorchRunner(trained, name="the trained model")
        small_runner = TorchRunner(small, name="the compiled model")
        with frozen_runner, small_runner, OnnxRunner(model_path, name="the ONNX model") as onnx_runner:

            def verify_hop(hop: str, actual: Runner) -> list[Parity]:
                if noise is None:
                    return verify(frozen_runner, actual, images, hop=hop, max_abs=config.max_abs)
                rows = verify_on(frozen_runner, actual, {"validation": images}, hop=hop, max_abs=config.max_abs)
                if actual is small_runner:  # noise opens edges that no image does: what is left of them must agree
                    return rows
                return rows + verify_on(small_runner, actual, {"noise": noise}, hop=hop, max_abs=config.max_abs)

            parity = verify_hop("compile", small_runner) + verify_hop("onnx", onnx_runner)
            for runner in programs:
                with runner:
                    parity += verify_hop("program", runner)
            agreement = agree(frozen_runner, onnx_runner, _as_arrays(val))
            _check_floor(agreement, config, is_calibrated=certificate.calibration is not None)
            logits = frozen_runner.infer(images)
        certificate = replace(certificate, milliseconds=_milliseconds(frozen_runner, small_runner, images))
        (part / CERTIFICATE).write_text(json.dumps(certificate.to_json(), indent=2))
        np.savez(part / "selftest.npz", images=images, logits=logits)
        seal(
            part,
            Manifest(
                name=name,
                input=ModelInput(name=INPUT, shape=images.shape[1:]),
                output=ModelOutput(name=OUTPUT, num_classes=logits.shape[1]),
                opset=config.opset,
                labels=tuple(labels),
                preprocessing=preprocessing,
                parents=dict(parents),
                versions={
                    p: importlib.metadata.version(p) for p in ("mcdeploy", "torch", "timm", "onnx", "onnxruntime")
                },
                accuracy=Accuracy(
                    before=agreement.accuracy_before, after=agreement.accuracy_after, images=agreement.images
                ),
                params=Change(before=certificate.parameters[0], after=certificate.parameters[1]),
                macs=Change(before=certificate.macs[0], after=certificate.macs[1]),
                parity=tuple(ManifestParity(**row.to_json()) for row in parity),
                selftest=SelfTest(max_abs=config.max_abs),
                seeds=dict(seeds),
            ),
        )
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
    return Shipped(load_bundle(out), certificate, tuple(parity), agreement, small)


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


def _check_floor(agreement: Agreement, config: ExportConfig, *, is_calibrated: bool) -> None:
    if agreement.top1_agreement < config.min_agreement:
        advice = "; raise export.calibration_images, or lower it knowing so" if is_calibrated else ""
        raise ParityError(
            f"the exported model agrees with the trained one on {agreement.top1_agreement:.3%} of {agreement.images} "
            f"validation images, export.min_agreement asks for {config.min_agreement:.3%}{advice}"
        )
    drop = agreement.accuracy_before - agreement.accuracy_after
    if drop > config.max_accuracy_drop:
        raise AccuracyError(
            f"top-1 fell from {agreement.accuracy_before:.2%} to {agreement.accuracy_after:.2%}, "
            f"export.max_accuracy_drop allows {config.max_accuracy_drop:.2%}"
        )


def _milliseconds(before: Runner, after: Runner, images: Images) -> tuple[float, float]:
    """Median milliseconds of one image in PyTorch eager, interleaved; ``bench`` is the place for figures to quote."""
    report = compare_latency([before, after], {1: images[:1]}, seconds=1.0)
    first, second = report.latencies
    return first.p50_ms.value, second.p50_ms.value


def _first_images(val: DataLoader[tuple[torch.Tensor, torch.Tensor]], count: int) -> Images:
    found: list[torch.Tensor] = []
    for images, _ in val:
        found.append(images)
        if sum(len(batch) for batch in found) >= count:
            return torch.cat(found)[:count].numpy().astype(np.float32)
    raise DataError(f"prune-export needs at least {count} validation images, there are {sum(map(len, found))}")


def _as_arrays(val: DataLoader[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[tuple[Images, np.ndarray]]:
    for images, labels in val:
        yield images.numpy(), labels.numpy()
