"""The forms of one compiled model: fp32, fp16 and int8 files and TensorRT engines, each verified as it is made.

A hop leads from one form to the next. After every hop the trained model and what came out answer the same images; a hop
that is too far off ends the export with the first tensor that departs, by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from mcruntime.batches import AnyBatch
from mcruntime.engine import OnnxRunner, Runner
from mcruntime.manifest import Engine, ModelFile
from mcruntime.tensorrt import TensorRTRunner, facts_path
from torch import nn
from torch.utils.data import DataLoader

from mcdeploy.backends.fp16 import Fp16Report, to_fp16
from mcdeploy.backends.int8 import Int8Report, to_int8
from mcdeploy.backends.onnx import data_file
from mcdeploy.backends.pytorch import TorchRunner
from mcdeploy.backends.readback import FileFacts, check_written
from mcdeploy.backends.tensorrt import EngineOptions, cached_engine
from mcdeploy.bench import compare_latency
from mcdeploy.departure import Departure, between_files, between_module_and_file, between_modules
from mcdeploy.errors import ParityError
from mcdeploy.recipe import ExportConfig
from mcdeploy.verify import BATCHES, Images, Parity, accuracy, verify_on

CHOICE_SECONDS = 0.4  # of each distinct convolution in groups, to see if int8 makes it slower
Precision = Literal["fp32", "fp16", "int8"]
Backend = Literal["onnx", "tensorrt"]
Loader = DataLoader[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Form:
    """One file that ships."""

    path: Path
    precision: Precision
    backend: Backend
    facts: FileFacts  # of the ONNX file that it is, or was built from
    engine: Engine | None = None
    layers: Mapping[str, int] = field(default_factory=dict)  # of an engine: how many compute in which type

    def runner(self, name: str) -> Runner:
        """For any batch; an engine splits and fills up what does not fit its profile."""
        runner = self.bare_runner(name)
        return runner if self.engine is None else AnyBatch(runner, self.engine.batch)

    def bare_runner(self, name: str) -> Runner:
        """For timing: nothing lies between the caller and the model."""
        return OnnxRunner(self.path, name=name) if self.engine is None else TensorRTRunner(self.path, name=name)

    def in_manifest(self, accuracy: float, tolerance: float) -> ModelFile:
        return ModelFile(
            file=self.path.name,
            backend=self.backend,
            precision=self.precision,
            opset=self.facts.opset,
            ir_version=self.facts.ir_version,
            nodes={"layers": dict(self.layers)} if self.engine else self.facts.nodes,
            accuracy=accuracy,
            selftest_max_abs=tolerance,
            engine=self.engine,
        )


class Hops:
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
        self._departure, self.say = departure, say
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

    def check_form(self, hop: str, form: Form, source: Path) -> None:
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
                # nobody can look inside an engine, but its ONNX file was compared already
                advice="; the ONNX file that it was built from was not too far off" if form.engine else "",
            )

    def _check(
        self,
        hop: str,
        runner: Runner,
        allowed: float | None = None,
        *,
        with_noise: bool = True,
        where: Callable[[float], Departure] | None = None,
        advice: str = "",
    ) -> None:
        allowed = allowed or self.config.max_abs
        self.say(f"verify: {hop}, batches {', '.join(map(str, self._batches))}")
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
                raise ParityError(f"{error}{advice}") from None
            found = where(allowed)
            self._departure.write_text(json.dumps({"hop": hop, **found.to_json()}, indent=2))
            raise ParityError(f"{error}; {found} (all of them in {self._departure})") from None

    def _compare(
        self, hop: str, expected: Runner, actual: Runner, sources: Mapping[str, Images], allowed: float
    ) -> None:
        self.rows += verify_on(expected, actual, sources, hop=hop, max_abs=allowed, batches=self._batches)


def make_forms(
    part: Path,
    hops: Hops,
    calibration: Images,
    val: Loader,
    progress: Callable[[str, float], None] | None,
) -> dict[str, Form]:
    """Every precision and backend that was asked for, verified, by its key; model.onnx itself only if asked for.

    Raises:
        ParityError, AccuracyError, BackendError: as ``prune_export``.
    """
    config = hops.config
    written: dict[Path, Form] = {}
    forms: dict[str, Form] = {}
    (part / "reports").mkdir()
    for backend in dict.fromkeys(config.backend):
        for precision in dict.fromkeys(config.precision):
            path = part / _file_name(precision, backend)
            if path not in written:
                written[path] = _write(path, precision, backend, hops, calibration, val, progress)
            if backend == "onnx":
                forms[precision] = written[path]
            else:
                forms[f"tensorrt-{precision}"] = _build(written[path], part / f"model.{precision}.plan", hops, progress)
    for path in {part / "model.onnx", *written} - {form.path for form in forms.values()}:
        path.unlink()
        data_file(path).unlink(missing_ok=True)
    if not any((part / "reports").iterdir()):
        (part / "reports").rmdir()
    return forms


def _file_name(precision: Precision, backend: Backend) -> str:
    if precision == "int8" and backend == "tensorrt":  # it wants other zero points than ONNX Runtime's CPU kernels
        return "model.int8.tensorrt.onnx"
    return "model.onnx" if precision == "fp32" else f"model.{precision}.onnx"


def _write(
    path: Path,
    precision: Precision,
    backend: Backend,
    hops: Hops,
    calibration: Images,
    val: Loader,
    progress: Callable[[str, float], None] | None,
) -> Form:
    """One ONNX file in one precision, read back and verified, with a report of how it was made; fp32 is there."""
    config, whole = hops.config, path.with_name("model.onnx")
    report: Fp16Report | Int8Report | None = None
    if precision == "fp16":
        hops.say("export: fp16")
        report = to_fp16(whole, path, calibration, max_abs=config.fp16_max_abs, progress=progress)
    elif precision == "int8":
        hops.say(f"export: int8 for {'TensorRT' if backend == 'tensorrt' else 'ONNX Runtime'}")
        report = to_int8(
            whole,
            path,
            calibration,
            top1_of=lambda file: _top1_of(OnnxRunner(file), val),
            baseline_top1=_top1_of(hops.trained_runner, val),
            max_top1_drop=config.max_accuracy_drop,
            # timed here, so for here: an engine keeps convolutions in groups in float
            measure=_time_against if backend == "onnx" else None,
            form="cpu" if backend == "onnx" else "tensorrt",
            sensitivity=config.sensitivity,
            progress=progress,
        )
    allowed = report.float_nodes if report is not None else frozenset[str]()
    form = Form(path, precision, "onnx", check_written(path, opset=config.opset, precision=precision, allowed=allowed))
    if report is not None:
        name = path.name.removeprefix("model.").replace(".onnx", ".json")
        (path.parent / "reports" / name).write_text(json.dumps(report.to_json(), indent=2))
        hops.check_form(path.name.removeprefix("model.").removesuffix(".onnx").replace(".", " for "), form, whole)
    return form


def _options(config: ExportConfig) -> EngineOptions:
    return EngineOptions(
        batches=config.batch,
        workspace_bytes=None if config.engine_workspace_mib is None else config.engine_workspace_mib << 20,
        optimization_level=config.engine_optimization,
        tf32=config.engine_tf32,
        version_compatible=config.engine_version_compatible,
        hardware_compatible=config.engine_hardware_compatible,
    )


def _build(source: Form, plan: Path, hops: Hops, progress: Callable[[str, float], None] | None) -> Form:
    """An engine of an ONNX file, for the GPU of this machine, verified."""
    batches, precision = hops.config.batch, source.precision
    hops.say(f"export: TensorRT engine, {precision}, batch {' to '.join(map(str, batches))}")
    found, built = cached_engine(source.path, _options(hops.config), precision=precision, progress=progress)
    shutil.copyfile(found, plan)
    shutil.copyfile(facts_path(found), facts_path(plan))
    place = Engine(
        tensorrt=built.tensorrt,
        gpu=built.gpu,
        compute_capability=built.compute_capability,
        driver=built.driver,
        batch=built.batches,
    )
    form = replace(source, path=plan, backend="tensorrt", engine=place, layers=built.layers)
    hops.check_form(f"tensorrt-{precision}", form, source.path)
    return form


def _top1_of(runner: Runner, val: Loader) -> float:
    with runner:
        return accuracy(runner, as_arrays(val))


def _time_against(first: Path, second: Path, images: Images) -> tuple[float, float, float]:
    """Latency of the second file over the first's in ONNX Runtime, with the ends of its interval."""
    runners = OnnxRunner(first, name="first"), OnnxRunner(second, name="second")
    report = compare_latency(runners, {len(images): images}, seconds=CHOICE_SECONDS, warmup_seconds=0.05, reload=False)
    ratio = report.latencies[1].ratio
    return ratio.value, ratio.low, ratio.high


def as_arrays(val: Loader) -> Iterator[tuple[Images, np.ndarray]]:
    for images, labels in val:
        yield images.numpy(), labels.numpy()
