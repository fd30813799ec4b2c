"""A fault planted at each hop is caught there and named: not later, not in silence, and nothing is shipped.

Two more are planted elsewhere: a provider that falls back, in
``test_engine.test_a_provider_that_fell_back_to_the_cpu_is_an_error``, and a wrong engine in the cache, in
``test_tensorrt.test_a_cache_entry_that_is_wrong_is_named_and_built_again``.
"""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from runs import reuse_compiled, short_recipe

from mcdeploy import forms, package
from mcdeploy.backends import onnx as exporter
from mcdeploy.errors import BackendError, BundleError, ParityError
from mcdeploy.runs import ship_run, train_run

CHANGES = {"precision": ("fp32", "fp16", "int8"), "batch": (1, 2, 8), "calibration_images": 32}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("faults") / "run"
    train_run(short_recipe(export={"min_agreement": 0.9, "max_accuracy_drop": 0.2}), run, resume=False)
    return run


@pytest.fixture(scope="module")
def sound(run):
    """The export in which nothing is planted."""
    return ship_run(run, run / "bundle", changes=CHANGES)


@pytest.fixture
def later(sound, monkeypatch):
    """For a fault that is planted after compile and export: those two hops are not made again."""
    reuse_compiled(monkeypatch, sound)


def export(run, tmp_path, *precisions):
    """Nothing may be left of a failed export but the table of what was compared."""
    changes = CHANGES if not precisions else {**CHANGES, "precision": precisions}
    try:
        return ship_run(run, tmp_path / "bundle", changes=changes)
    finally:
        assert {path.name for path in tmp_path.iterdir()} <= {f"bundle{package.DEPARTURE}"}


def rewrite(path, change):
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


def spoil_after(monkeypatch, name, spoil):
    """Let ``name(source, target, ...)`` work, then spoil what it wrote."""
    home = package if name == "export_onnx" else forms
    real = getattr(home, name)  # after ``later``, which replaces some

    def spoiled(first, target, *rest, **options):
        made = real(first, target, *rest, **options)
        spoil(target)
        return made

    monkeypatch.setattr(home, name, spoiled)


def double_a_weight(layer):
    def change(model):
        weight = next(one for one in model.graph.initializer if one.name.startswith(layer))
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))

    return change


def first_layer(path):
    return next(node.name for node in onnx.load(path).graph.node if node.op_type == "Conv").removesuffix("/Conv")


def test_nothing_planted_nothing_found(sound):
    assert set(sound.bundle.manifest.models) == {"fp32", "fp16", "int8"}
    assert not (sound.bundle.folder.parent / f"bundle{package.DEPARTURE}").exists()


def test_a_weight_changed_by_the_compiler_is_found_in_compile(run, tmp_path, monkeypatch):
    real = package.compile_with_certificate

    def spoiled(*given):
        small, certificate = real(*given)
        name = next(name for name, _ in small.named_parameters() if name.startswith("layer2"))
        with torch.no_grad():
            small.get_parameter(name).mul_(2)
        return small, certificate

    monkeypatch.setattr(package, "compile_with_certificate", spoiled)
    with pytest.raises(ParityError, match=r"^compile: .*first tensor that departs is that of layer2"):
        export(run, tmp_path, "fp32")


def test_a_weight_changed_by_the_exporter_is_found_in_onnx_by_its_layer(run, later, tmp_path, monkeypatch):
    spoil_after(monkeypatch, "export_onnx", lambda path: rewrite(path, double_a_weight("layer3")))
    with pytest.raises(ParityError, match=r"^onnx: .*the first tensor that departs is that of layer3\S*conv"):
        export(run, tmp_path, "fp32")
    table = json.loads((tmp_path / f"bundle{package.DEPARTURE}").read_text())
    assert table["hop"] == "onnx"
    assert table["first"]["name"].startswith("layer3")
    assert len(table["distances"]) > 5


def test_an_opset_that_was_not_asked_for_is_found_by_number(run, tmp_path, monkeypatch):
    real = torch.onnx.export

    def downgraded(*given, **options):
        return real(*given, **(options | {"opset_version": 18}))

    monkeypatch.setattr(torch.onnx, "export", downgraded)
    with pytest.raises(BackendError, match="asked for opset 20, the exporter wrote 18"):
        export(run, tmp_path, "fp32")


def test_an_opset_that_changed_on_the_way_to_int8_is_found_by_number(run, later, tmp_path, monkeypatch):
    def downgrade(model):
        model.opset_import[0].version = 19

    spoil_after(monkeypatch, "to_int8", lambda path: rewrite(path, downgrade))
    with pytest.raises(BackendError, match="asked for opset 20, the file has 19"):
        export(run, tmp_path, "int8")


def test_a_batch_that_was_baked_in_is_found(run, tmp_path, monkeypatch):
    real = torch.onnx.export

    def fixed(*given, **options):
        return real(*given, **(options | {"dynamic_shapes": None}))

    monkeypatch.setattr(torch.onnx, "export", fixed)
    with pytest.raises(BackendError, match="fixed the batch to 2"):
        export(run, tmp_path, "fp32")


def test_a_batch_baked_into_the_graph_alone_is_found_at_the_first_other_batch(run, later, tmp_path, monkeypatch):
    def bake(model):
        last = model.graph.node[-1]
        shape = numpy_helper.from_array(np.array([2, -1], np.int64), "baked")
        model.graph.initializer.append(shape)
        features = last.input[0]
        model.graph.node.insert(len(model.graph.node) - 1, helper.make_node("Reshape", [features, "baked"], ["flat"]))
        last.input[0] = "flat"

    spoil_after(monkeypatch, "export_onnx", lambda path: rewrite(path, bake))
    with pytest.raises(BackendError, match=r"the ONNX model: ONNX Runtime stopped at batch 1"):
        export(run, tmp_path, "fp32")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_that_was_ignored_is_found(run, later, tmp_path, monkeypatch, precision):
    spoil_after(monkeypatch, f"to_{precision}", lambda path: shutil.copy(path.with_name("model.onnx"), path))
    with pytest.raises(BackendError, match=f"asked for {precision}, but no convolution .* computes in it"):
        export(run, tmp_path, precision)


def test_a_weight_changed_on_the_way_to_fp16_is_found_there_by_its_node(run, later, tmp_path, monkeypatch):
    spoil_after(monkeypatch, "to_fp16", lambda path: rewrite(path, double_a_weight("layer2")))
    with pytest.raises(ParityError, match=r"^fp16: .*the first tensor that departs is that of layer2\S*/Conv"):
        export(run, tmp_path, "fp16")


def test_wrong_scales_on_the_way_to_int8_are_found_there(run, later, tmp_path, monkeypatch):
    def rescale(model):
        for one in model.graph.initializer:
            if one.name.startswith("layer2") and one.name.endswith("_scale"):
                one.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(one) * np.float32(20), one.name))

    spoil_after(monkeypatch, "to_int8", lambda path: rewrite(path, rescale))
    with pytest.raises(ParityError, match=r"^int8: .*the first tensor that departs is that of layer2"):
        export(run, tmp_path, "int8")


def test_a_nan_is_found_where_it_starts(run, later, tmp_path, monkeypatch):
    def poison(model):
        weight = next(one for one in model.graph.initializer if one.name.startswith("layer2"))
        array = numpy_helper.to_array(weight).copy()
        array.flat[0] = np.nan
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))

    spoil_after(monkeypatch, "export_onnx", lambda path: rewrite(path, poison))
    with pytest.raises(ParityError, match=r"NaN.*first tensor that departs is that of layer2"):
        export(run, tmp_path, "fp32")


def test_an_exported_program_with_a_changed_weight_is_found(run, tmp_path, monkeypatch):
    def spoil(model, path, example):
        with torch.no_grad():
            next(iter(model.parameters())).mul_(2)
        exporter.export_program(model, path, example)

    monkeypatch.setattr(package, "export_program", spoil)
    with pytest.raises(ParityError, match=r"^program: the exported program is"):
        export(run, tmp_path, "fp32")


def test_a_byte_changed_in_the_bundle_is_found_by_the_name_of_its_file(sound, tmp_path):
    folder = shutil.copytree(sound.bundle.folder, tmp_path / "bundle")
    path = folder / "model.int8.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"model\.int8\.onnx was changed after it was sealed"):
        package.load_bundle(folder)
