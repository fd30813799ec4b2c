"""From a trained run to a bundle of every precision: proven after every hop, the same again when it is made again."""

import json
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from mcruntime.bundle import WIRING, load_bundle
from mcruntime.engine import OnnxRunner
from mcruntime.errors import ParityError
from mcruntime.signature import keygen, verify_signature
from mcruntime.tensorrt import EngineFacts
from runs import reuse_compiled, short_recipe

from mcdeploy import forms, package
from mcdeploy.backends.readback import read_facts
from mcdeploy.checkpoint import load_checkpoint
from mcdeploy.errors import AccuracyError, InputError
from mcdeploy.runs import licence_of, loaders_of, open_run, ship_run, train_run
from mcdeploy.targets import evaluate_target, open_file

EVERYTHING: dict = {"precision": ("fp32", "fp16", "int8"), "batch": (1, 4, 11), "calibration_images": 64}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("package") / "run"
    train_run(short_recipe(export={"min_agreement": 0.9, "max_accuracy_drop": 0.1}), run, resume=False)
    return run


@pytest.fixture(scope="module")
def shipped(run):
    return ship_run(run, run / "bundle", changes=EVERYTHING)


@pytest.fixture
def quick(shipped, monkeypatch):
    """What comes before the step under test is not made again: the compiled net, its file, its program, the timing."""
    reuse_compiled(monkeypatch, shipped)
    monkeypatch.setattr(package, "_measure", lambda *given: [])


def test_every_precision_is_in_the_bundle_and_is_what_it_says(shipped):
    bundle = shipped.bundle
    assert set(bundle.manifest.models) == {"fp32", "fp16", "int8"}
    assert bundle.manifest.serve == "fp32"
    for precision, model in bundle.manifest.models.items():
        facts = read_facts(bundle.folder / model.file)
        assert (model.opset, model.ir_version, model.nodes) == (facts.opset, facts.ir_version, facts.nodes)
        assert model.nodes["Conv"].get(precision, 0) > 0


def test_the_bundle_says_what_each_block_could_have_read_and_which_gates_were_learned(run, shipped):
    told = json.loads((shipped.bundle.folder / WIRING).read_text())
    assert told["candidates"] == load_checkpoint(run).header["candidates"]
    assert told["topology"] == json.loads(json.dumps(shipped.certificate.topology))
    assert [len(row) for row in told["gates"]["layer1"]] == [
        len(row) for row in next(stage for stage in told["candidates"]["stages"] if stage["name"] == "layer1")["reads"]
    ]
    assert WIRING in shipped.bundle.manifest.files


def test_every_hop_was_compared_at_batches_1_2_3_7_and_the_largest(shipped):
    seen = {(row.hop, row.images): set() for row in shipped.parity}
    for row in shipped.parity:
        seen[row.hop, row.images].add(row.batch)
    hops = {"compile", "onnx", "program", "fp16", "int8"}
    assert {hop for hop, _ in seen} == hops
    assert {hop for hop, images in seen if images == "noise"} == hops - {"int8"}
    assert all(batches == {1, 2, 3, 7, 11} for batches in seen.values())
    assert all(row.p99 <= row.max_abs for row in shipped.parity)


def test_each_model_says_its_accuracy_and_it_is_the_one_that_eval_finds(shipped, run):
    recipe, _, _ = open_run(run)
    loaders = loaders_of(recipe.data)
    for precision, model in shipped.bundle.manifest.models.items():
        target = open_file(f"{shipped.bundle.folder}@{precision}")
        assert evaluate_target(target, loaders, image_size=8).top1 == pytest.approx(model.accuracy)


def test_each_model_passes_its_own_selftest_and_the_coarse_ones_not_the_fine_ones(shipped):
    for precision in ("fp32", "fp16", "int8"):
        bundle = load_bundle(f"{shipped.bundle.folder}@{precision}")
        with OnnxRunner(bundle.model_path) as runner:
            bundle.selftest(runner)
    fine = load_bundle(shipped.bundle.folder)
    with OnnxRunner(shipped.bundle.folder / "model.int8.onnx") as runner, pytest.raises(ParityError):
        fine.selftest(runner)


def test_the_manifest_says_where_it_comes_from_and_how_fast_it_was(shipped, run):
    manifest = shipped.bundle.manifest
    assert manifest.recipe["train"]["epochs"] == 3
    assert {"checkpoint", "recipe", "calibration images"} <= set(manifest.parents)
    assert {(row.model, row.batch) for row in manifest.latency} == {
        (precision, batch) for precision in ("fp32", "fp16", "int8") for batch in (1, 4, 11)
    }
    assert all(row.p50_ms > 0 and row.machine["cpu"] for row in manifest.latency)
    assert set(json.loads((shipped.bundle.folder / "reports" / "int8.json").read_text()))


def test_the_same_run_gives_the_same_files_and_the_same_id(shipped, run, tmp_path):
    again = ship_run(run, tmp_path / "again", changes=EVERYTHING).bundle.manifest
    assert again.files == shipped.bundle.manifest.files
    assert again.id == shipped.bundle.manifest.id


def test_only_what_was_asked_for_is_in_the_bundle_and_the_first_is_served(run, quick, tmp_path):
    made = ship_run(run, tmp_path / "b", changes={**EVERYTHING, "precision": ("fp16",)}).bundle
    assert [path.name for path in sorted(made.folder.glob("*.onnx"))] == ["model.fp16.onnx"]
    assert (made.manifest.serve, made.model_path.name) == ("fp16", "model.fp16.onnx")


def test_no_file_of_the_bundle_is_a_pickle_and_no_path_of_this_machine_is_in_it(shipped):
    for path in shipped.bundle.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not content.startswith(b"\x80"), f"{path.name} starts like a pickle"
            assert str(shipped.bundle.folder.parent).encode() not in content, path.name
            assert package.__file__.removesuffix("package.py").encode() not in content, path.name


def test_a_signed_bundle_is_signed_by_that_key(run, quick, tmp_path):
    private = tmp_path / "key"
    keygen(private)
    made = ship_run(run, tmp_path / "b", sign=private)
    verify_signature(made.bundle.folder, tmp_path / "key.pub")
    with pytest.raises(InputError, match="no such key file"):
        ship_run(run, tmp_path / "c", sign=tmp_path / "nowhere")


def test_an_accuracy_floor_that_does_not_hold_ships_nothing(run, quick, tmp_path, monkeypatch):
    def half_right(runner, batches):
        return 0.5 if isinstance(runner, OnnxRunner) else 1.0

    monkeypatch.setattr(forms, "accuracy", half_right)
    with pytest.raises(AccuracyError):
        ship_run(run, tmp_path / "b", changes={**EVERYTHING, "max_accuracy_drop": 0.01})
    assert not (tmp_path / "b").exists()
    assert not list(tmp_path.glob(".b*"))


class FakeEngine(OnnxRunner):
    """The builder and the runner have their own tests; here an engine is its ONNX file, strict about its batches."""

    def __init__(self, path, name=None, **options):
        facts = EngineFacts.model_validate_json(path.with_name(f"{path.name}.json").read_bytes())
        self.span = facts.batches[0], facts.batches[2]
        super().__init__(path, name=name)

    def infer(self, images):
        if not self.span[0] <= len(images) <= self.span[1]:
            raise InputError(f"this engine takes batches of {self.span[0]} to {self.span[1]}, got {len(images)}")
        return super().infer(images)


@pytest.fixture
def engines(tmp_path, monkeypatch):
    """Stand-ins for building and running; returns the options that engines were built with."""
    asked = []

    def build(onnx_path, options, *, precision, progress=None):
        asked.append(options)
        plan = tmp_path / "cache" / f"{len(asked)}.plan"
        plan.parent.mkdir(exist_ok=True)
        shutil.copy(onnx_path, plan)
        facts = EngineFacts(
            tensorrt="10.12.0", gpu="Some GPU", compute_capability="9.0", driver="1", onnx_sha256="0" * 64,
            plan_sha256="1" * 64, precision=precision, layers={precision: 7}, **options.of_the_engine(),
        )  # fmt: skip
        plan.with_name(f"{plan.name}.json").write_text(facts.model_dump_json())
        return plan, facts

    monkeypatch.setattr(forms, "cached_engine", build)
    monkeypatch.setattr(forms, "TensorRTRunner", FakeEngine)
    monkeypatch.setattr("mcruntime.tensorrt.TensorRTRunner", FakeEngine)
    monkeypatch.setattr("mcruntime.gpu.load_tensorrt", lambda: None)
    monkeypatch.setattr("mcruntime.gpu.describe_device", lambda: None)
    return asked


@pytest.mark.parametrize("batch", [(1, 4, 11), (1, 1, 1), (4, 8, 16)])
def test_an_engine_goes_into_the_bundle_with_the_place_where_it_runs(run, quick, engines, tmp_path, batch):
    changes = {**EVERYTHING, "precision": ("fp32", "fp16"), "backend": ("tensorrt",), "batch": batch}
    made = ship_run(run, tmp_path / "b", changes=changes)
    models = made.bundle.manifest.models
    assert set(models) == {"tensorrt-fp32", "tensorrt-fp16"}
    assert models["tensorrt-fp16"].engine.gpu == "Some GPU"
    assert models["tensorrt-fp16"].engine.batch == batch
    assert models["tensorrt-fp16"].nodes == {"layers": {"fp16": 7}}, "those of the engine, not of the file it is from"
    assert {row.hop for row in made.parity} >= {"fp16", "tensorrt-fp32", "tensorrt-fp16"}
    assert not list(made.bundle.folder.glob("*.onnx"))
    assert (made.bundle.folder / "model.fp16.plan.json").exists()
    target = open_file(str(made.bundle.folder))
    recipe, _, _ = open_run(run)
    top1 = evaluate_target(target, loaders_of(recipe.data), image_size=8).top1
    assert top1 == pytest.approx(models["tensorrt-fp32"].accuracy), "in batches larger than the engine takes"


def test_the_recipes_engine_options_reach_the_builder(run, quick, engines, tmp_path):
    changes = {
        "backend": ("tensorrt",), "engine_workspace_mib": 3, "engine_optimization": 5, "engine_tf32": True,
        "engine_version_compatible": True, "engine_hardware_compatible": "ampere-plus",
    }  # fmt: skip
    ship_run(run, tmp_path / "b", changes=changes)
    (options,) = engines
    assert (options.workspace_bytes, options.optimization_level, options.tf32) == (3 << 20, 5, True)
    assert (options.version_compatible, options.hardware_compatible) == (True, "ampere-plus")
    assert options.batches == (1, 8, 32)
    assert options.timing_cache is None, "so that the cache picks the one of this TensorRT and GPU"


def test_an_engine_that_is_off_says_that_its_file_was_not(run, quick, engines, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeEngine, "infer", lambda self, images: OnnxRunner.infer(self, images) * np.float32(1.5))
    with pytest.raises(
        ParityError, match=r"^tensorrt-fp32: .*; the ONNX file that it was built from was not too far off"
    ):
        ship_run(run, tmp_path / "b", changes={"backend": ("tensorrt",)})


def test_versions_are_of_what_is_installed_under_whatever_name(monkeypatch):
    real = package.importlib.metadata.version

    def version(name):
        if name in ("onnxruntime", "tensorrt"):
            raise package.importlib.metadata.PackageNotFoundError(name)
        return "1.2.3" if name == "onnxruntime-gpu" else real(name)

    monkeypatch.setattr(package.importlib.metadata, "version", version)
    found = package._versions()
    assert found["onnxruntime-gpu"] == "1.2.3"
    assert "onnxruntime" not in found
    assert found["torch"] == real("torch")


def test_weights_too_many_for_one_file_lie_beside_the_model_and_are_hashed(run, tmp_path, monkeypatch):
    from mcdeploy.backends import onnx as exporter

    monkeypatch.setattr(exporter, "MAX_INLINE_BYTES", 1000)
    made = ship_run(run, tmp_path / "b").bundle
    assert made.manifest.files["model.onnx.data"].bytes > 1000
    assert onnx.load(made.model_path, load_external_data=False).graph.initializer[0].external_data
    with OnnxRunner(made.model_path) as runner:
        made.selftest(runner)


def test_a_bundle_is_served_without_torch(shipped):
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['onnx'] = None\n"
        "from mcruntime.bundle import WIRING, load_bundle; from mcruntime.engine import OnnxRunner\n"
        f"b = load_bundle({str(shipped.bundle.folder) + '@int8'!r})\n"
        "with OnnxRunner(b.model_path) as r: print(b.selftest(r) < 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_the_licence_of_timms_weights_goes_into_the_manifest_and_only_theirs():
    from mcdeploy.recipe import ModelConfig

    assert licence_of(ModelConfig(backbone="resnet50", pretrained=True)) == "apache-2.0"
    assert licence_of(ModelConfig(backbone="resnet50")) is None
