"""Package: from a trained, frozen model to a bundle that proves itself. The last thing that needs torch.

trained, frozen --compile--> small module --onnx--> model.onnx --fp16, int8--> model.int8.onnx --tensorrt--> model.int8.plan

Every arrow is a hop, and after every hop the trained model and what came out answer the same images. A hop that is too
far off ends the export with the first tensor that departs, by name.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from mcruntime.bundle import CERTIFICATE, Bundle, load_bundle, seal
from mcruntime.engine import OnnxRunner, Runner
from mcruntime.manifest import Accuracy, Change, Engine, Latency, Licences, Manifest, ModelFile, ModelInput, ModelOutput
from mcruntime.manifest import Parity as ManifestParity
from mcruntime.preprocess import Preprocessing
from mcruntime.signature import sign_bundle
from mcruntime.tensorrt import TensorRTRunner
from torch import nn
from torch.utils.data import DataLoader

from mcdeploy.backends.fp16 import to_fp16
from mcdeploy.backends.int8 import to_int8
from mcdeploy.backends.onnx import INPUT, OUTPUT, data_file, export_onnx, export_program
from mcdeploy.backends.pytorch import TorchRunner
from mcdeploy.backends.readback import FileFacts, check_written
from mcdeploy.backends.tensorrt import EngineOptions, build_engine
from mcdeploy.bench import compare_latency
from mcdeploy.compile import Certificate, compile_with_certificate
from mcdeploy.compile.dynamic import NEAR_THRESHOLD, record, settled
from mcdeploy.connectivity.ddw import dynamic_stages
from mcdeploy.departure import Departure, between_files, between_module_and_file, between_modules
from mcdeploy.errors import AccuracyError, BundleError, DataError, ParityError
from mcdeploy.recipe import ExportConfig
from mcdeploy.verify import BATCHES, Agreement, Images, Parity, accuracy, agree_all, verify_on

SELFTEST_IMAGES = 7
DEPARTURE = "departure.json"  # left beside the bundle when a hop fails: every tensor that was compared
MEASURE_SECONDS = 1.0  # of every model and batch size; ``bench`` is the place for figures to quote
CHOICE_SECONDS = 0.4  # of each distinct convolution in groups, to see if int8 makes it slower
Precision = Literal["fp32", "fp16", "int8"]


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
    (out.parent / DEPARTURE).unlink(missing_ok=True)
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
        hops = _Hops(trained, small, images, noise, config, out.parent / DEPARTURE, say)
        say(f"export: ONNX, opset {config.opset}")
        export_onnx(small, part / "model.onnx", example, opset=config.opset, dynamic=_form(config))
        hops.check_compiled(part / "model.onnx")
        if draft is not None:
            export_program(small, draft, example)
            hops.check_program(draft)
        ranges = images if calibration is None else calibration.numpy().astype(np.float32)
        forms = _make_forms(part, hops, ranges, val, progress)
        say("verify: the whole validation set")
        with hops.trained_runner as expected:
            with _entered(forms) as runners:
                agreements = agree_all(expected, runners, _as_arrays(val))
                exactness = {key: _distance(expected, runner, images) for key, runner in runners.items()}
            logits = expected.infer(images)
        for key, agreement in agreements.items():
            _check_floor(key, agreement, config, is_calibrated=certificate.calibration is not None)
        latency = _measure({key: form for key, form in forms.items() if form.backend == "onnx"}, images, config.batch[1])
        (part / CERTIFICATE).write_text(json.dumps(certificate.to_json(), indent=2))
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
                parents={**origin.parents, **({} if calibration is None else {"calibration images": _sha256(ranges)})},
                recipe=dict(origin.recipe),
                versions={
                    p: importlib.metadata.version(p) for p in ("mcdeploy", "torch", "timm", "onnx", "onnxruntime")
                },
                git_commit=_git_commit(),
                licences=Licences(
                    model=config.licence, weights=config.licence_weights, data=config.licence_data
                ),
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


# ----------------------------------------------------------------------------------------------------------- the hops


@dataclass(frozen=True)
class _Form:
    """One file that ships."""

    path: Path
    precision: Precision
    backend: Literal["onnx", "tensorrt"]
    facts: FileFacts  # of the ONNX file that it is, or was built from
    engine: Engine | None = None

    def runner(self, name: str) -> Runner:
        return OnnxRunner(self.path, name=name) if self.engine is None else TensorRTRunner(self.path, name=name)

    def in_manifest(self, accuracy: float, tolerance: float) -> ModelFile:
        return ModelFile(
            file=self.path.name,
            backend=self.backend,
            precision=self.precision,
            opset=self.facts.opset,
            ir_version=self.facts.ir_version,
            nodes=self.facts.nodes,
            accuracy=accuracy,
            selftest_max_abs=tolerance,
            engine=self.engine,
        )


class _Hops:
    """The trained model, and what was compared with it so far."""

    def __init__(
        self,
        trained: nn.Module,
        small: nn.Module,
        images: Images,
        noise: Images | None,
        config: ExportConfig,
        departure: Path,
        say: Callable[[str], None],
    ) -> None:
        self.trained, self.small, self.images, self.noise, self.config = trained, small, images, noise, config
        self.trained_runner = TorchRunner(trained, name="the trained model")
        self.rows: list[Parity] = []
        self._departure, self._say = departure, say
        self._batches = sorted({*BATCHES, config.batch[2]})

    def check_compiled(self, model: Path) -> None:
        """The compiled module and its ONNX file."""
        few = torch.from_numpy(self.images[:2])
        with TorchRunner(self.small, name="the compiled model") as runner:
            # noise opens edges of a per-image wiring that no image does: what is left of them is compared below
            self._check(
                "compile",
                runner,
                with_noise=self.noise is None,
                where=lambda limit: between_modules(self.trained, self.small, few, limit),
            )
        with OnnxRunner(model, name="the ONNX model") as runner:
            self._check("onnx", runner, where=lambda limit: between_module_and_file(self.small, model, few, limit))

    def check_program(self, program: Path) -> None:
        """The compiled module as an ExportedProgram."""
        module = torch.export.load(program).module()
        with TorchRunner(module, name="the exported program") as runner:
            self._check("program", runner)

    def check_form(self, hop: str, form: _Form, source: Path) -> None:
        """A file that was made from another one: fp16 or int8 from fp32, an engine from its ONNX file."""
        allowed = {"fp32": self.config.max_abs, "fp16": self.config.fp16_max_abs, "int8": self.config.int8_max_abs}
        few = self.images[:2]
        with form.runner(f"the {hop} model") as runner:
            self._check(
                hop,
                runner,
                allowed[form.precision],
                # int8 knows the range of images; noise lies outside of it by right
                with_noise=form.precision != "int8",
                where=None if form.engine else lambda limit: between_files(source, form.path, few, limit),
            )

    def _check(
        self,
        hop: str,
        runner: Runner,
        allowed: float | None = None,
        *,
        with_noise: bool = True,
        where: Callable[[float], Departure] | None = None,
    ) -> None:
        allowed = allowed or self.config.max_abs
        self._say(f"verify: {hop}, batches {', '.join(map(str, self._batches))}")
        try:
            with self.trained_runner as expected:
                self._compare(hop, expected, runner, {"validation": self.images}, allowed)
            if with_noise and self.noise is None:
                noise = np.random.default_rng(0).standard_normal(self.images.shape).astype(np.float32)
                with self.trained_runner as expected:
                    self._compare(hop, expected, runner, {"noise": noise}, allowed)
            elif with_noise and self.noise is not None:
                with TorchRunner(self.small, name="the compiled model") as expected:
                    self._compare(hop, expected, runner, {"noise": self.noise}, allowed)
        except ParityError as error:
            if where is None:
                raise
            found = where(allowed)
            self._departure.write_text(json.dumps({"hop": hop, **found.to_json()}, indent=2))
            raise ParityError(f"{error}; {found} (all of them in {self._departure})") from None

    def _compare(
        self, hop: str, expected: Runner, actual: Runner, sources: Mapping[str, Images], allowed: float
    ) -> None:
        self.rows += verify_on(expected, actual, sources, hop=hop, max_abs=allowed, batches=self._batches)


def _make_forms(
    part: Path,
    hops: _Hops,
    calibration: Images,
    val: DataLoader[tuple[torch.Tensor, torch.Tensor]],
    progress: Callable[[str, float], None] | None,
) -> dict[str, _Form]:
    """Every precision and backend that was asked for, verified, by its key; model.onnx itself only if asked for.

    Raises:
        ParityError, AccuracyError, BackendError: as ``prune_export``.
    """
    config, whole = hops.config, part / "model.onnx"
    reports = part / "reports"
    reports.mkdir()
    forms: dict[str, _Form] = {}
    sources: dict[Precision, Path] = {}
    for precision in dict.fromkeys(config.precision):
        path = whole if precision == "fp32" else part / f"model.{precision}.onnx"
        if precision == "fp16":
            hops._say("export: fp16")
            made_fp16 = to_fp16(whole, path, calibration, max_abs=config.fp16_max_abs, progress=progress)
            (reports / "fp16.json").write_text(json.dumps(made_fp16.to_json(), indent=2))
        elif precision == "int8":
            hops._say("export: int8")
            made_int8 = to_int8(
                whole,
                path,
                calibration,
                top1_of=lambda file: _top1_of(OnnxRunner(file), val),
                baseline_top1=_top1_of(hops.trained_runner, val),
                max_top1_drop=config.max_accuracy_drop,
                measure=_time_against,
                sensitivity=config.sensitivity,
                progress=progress,
            )
            (reports / "int8.json").write_text(json.dumps(made_int8.to_json(), indent=2))
        facts = check_written(path, opset=config.opset, precision=precision)
        form = _Form(path, precision, "onnx", facts)
        if precision != "fp32":
            hops.check_form(precision, form, whole)
        sources[precision] = path
        if "onnx" in config.backend:
            forms[precision] = form
    if "tensorrt" in config.backend:
        for precision, path in sources.items():
            forms[f"tensorrt-{precision}"] = _build(path, precision, hops, progress)
    for precision, path in {"fp32": whole, **sources}.items():
        if "onnx" not in config.backend or precision not in forms:
            path.unlink(missing_ok=True)
            data_file(path).unlink(missing_ok=True)
    if not any(reports.iterdir()):
        reports.rmdir()
    return forms


def _build(
    onnx: Path, precision: Precision, hops: _Hops, progress: Callable[[str, float], None] | None
) -> _Form:
    """An engine of an ONNX file, for the GPU of this machine, verified."""
    config, plan = hops.config, onnx.with_suffix(".plan")
    hops._say(f"export: TensorRT engine, {precision}, batch {' to '.join(map(str, config.batch))}")
    built = build_engine(onnx, plan, EngineOptions(batches=config.batch), precision=precision, progress=progress)
    place = Engine(
        tensorrt=built.tensorrt,
        gpu=built.gpu,
        compute_capability=built.compute_capability,
        driver=built.driver,
        batch=built.batches,
    )
    form = _Form(plan, precision, "tensorrt", check_written(onnx, opset=config.opset, precision=precision), place)
    hops.check_form(f"tensorrt-{precision}", form, onnx)
    return form


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


def _tolerance(form: _Form, measured: float, config: ExportConfig) -> float:
    """What the self-test allows: an fp32 model must come as close as verify asked for, a coarser one as it did here."""
    return config.max_abs if form.precision == "fp32" else max(config.max_abs, 2 * measured)


def _distance(expected: Runner, actual: Runner, images: Images) -> float:
    before, after = expected.infer(images), actual.infer(images)
    return float(np.abs(before - after).max() / max(np.abs(before).max(), 1e-12))


@contextmanager
def _entered(forms: Mapping[str, _Form]) -> Iterator[dict[str, Runner]]:
    with ExitStack() as stack:
        yield {key: stack.enter_context(form.runner(key)) for key, form in forms.items()}


def _top1_of(runner: Runner, val: DataLoader[tuple[torch.Tensor, torch.Tensor]]) -> float:
    with runner:
        return accuracy(runner, _as_arrays(val))


def _measure(forms: Mapping[str, _Form], images: Images, batch: int) -> list[Latency]:
    """A second of every model at batch 1 and at the optimum, interleaved: what to expect of them on this machine."""
    if not forms:
        return []
    sizes = sorted({1, batch})
    report = compare_latency(
        [form.runner(key) for key, form in forms.items()],
        {size: np.resize(images, (size, *images.shape[1:])) for size in sizes},
        seconds=MEASURE_SECONDS * len(forms),
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


def _time_against(first: Path, second: Path, images: Images) -> tuple[float, float, float]:
    """Latency of the second file over the first's in ONNX Runtime, with the ends of its interval."""
    runners = OnnxRunner(first, name="first"), OnnxRunner(second, name="second")
    report = compare_latency(runners, {len(images): images}, seconds=CHOICE_SECONDS, warmup_seconds=0.05, reload=False)
    ratio = report.latencies[1].ratio
    return ratio.value, ratio.low, ratio.high


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


def _sha256(images: Images) -> str:
    return hashlib.sha256(str(images.shape).encode() + np.ascontiguousarray(images).tobytes()).hexdigest()


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
