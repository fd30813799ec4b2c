"""A fault that is planted in one place is found in that place."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny_models import images, timm_model, wired_resnet
from torch import nn

from mcdeploy.backends.onnx import export_onnx
from mcdeploy.compile import compile_model
from mcdeploy.departure import between_files, between_module_and_file, between_modules


@pytest.fixture(scope="module")
def compiled():
    return compile_model(wired_resnet(fan_in=2), images(2, 16))


def change_weight(source, target, name, factor=1.5):
    model = onnx.load(source)
    weight = next(one for one in model.graph.initializer if one.name == name)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), name))
    onnx.save(model, target)


def test_two_equal_files_part_nowhere(tmp_path, compiled):
    export_onnx(compiled, tmp_path / "a.onnx", images(2, 16))
    found = between_files(tmp_path / "a.onnx", tmp_path / "a.onnx", images(2, 16).numpy(), 1e-6)
    assert found.first is None
    assert len(found.distances) > 20
    assert all(one.max_abs == 0 for one in found.distances)
    assert "none of" in str(found)


@pytest.mark.parametrize("layer", ["conv1", "layer2.1.conv2", "layer3.3.conv1"])
def test_a_weight_changed_in_a_file_is_found_by_the_name_of_its_layer(tmp_path, compiled, layer):
    export_onnx(compiled, tmp_path / "a.onnx", images(2, 16))
    named = {name for name, _ in compiled.named_parameters()}
    if f"{layer}.weight" not in named:
        layer = next(name.removesuffix(".weight") for name in sorted(named) if name.startswith(layer.split(".")[0]))
    change_weight(tmp_path / "a.onnx", tmp_path / "b.onnx", f"{layer}.weight")
    by_file = between_files(tmp_path / "a.onnx", tmp_path / "b.onnx", images(2, 16).numpy(), 1e-4)
    assert by_file.first.name == f"{layer}/Conv"
    by_module = between_module_and_file(compiled, tmp_path / "b.onnx", images(2, 16), 1e-4)
    assert by_module.first.name == layer
    assert f"the first tensor that departs is that of {layer}" in str(by_module)


def test_a_module_and_its_own_file_part_nowhere(tmp_path):
    model = compile_model(timm_model("test_efficientnet"), images(2, 32))
    export_onnx(model, tmp_path / "a.onnx", images(2, 32))
    found = between_module_and_file(model, tmp_path / "a.onnx", images(2, 32), 1e-3)
    assert found.first is None, found.first
    assert len(found.distances) > 20


def test_a_wrong_module_of_a_compiled_model_is_found_and_folding_alone_is_none():
    model = wired_resnet(fan_in=2)
    small = compile_model(model, images(2, 16))
    assert between_modules(model, small, images(2, 16), 1e-3).first is None
    name = next(
        name for name, module in small.named_modules() if name.startswith("layer2") and isinstance(module, nn.Conv2d)
    )
    with torch.no_grad():
        small.get_submodule(name).weight.mul_(1.5)
    first = between_modules(model, small, images(2, 16), 1e-3).first
    assert first is not None
    assert first.name == name.replace("conv", "bn"), "the first one behind it that compile left in its place"


def test_a_nan_counts_as_a_departure(tmp_path, compiled):
    export_onnx(compiled, tmp_path / "a.onnx", images(2, 16))
    change_weight(tmp_path / "a.onnx", tmp_path / "b.onnx", "conv1.weight", np.nan)
    first = between_files(tmp_path / "a.onnx", tmp_path / "b.onnx", images(2, 16).numpy(), 1e9).first
    assert first.name == "conv1/Conv"
    assert first.max_abs == float("inf")


def test_models_too_large_for_one_message_are_looked_into_as_well(tmp_path, compiled, monkeypatch):
    from mcdeploy.backends import onnx as exporter

    monkeypatch.setattr(exporter, "MAX_INLINE_BYTES", 1000)
    export_onnx(compiled, tmp_path / "a.onnx", images(2, 16))
    assert exporter.data_file(tmp_path / "a.onnx").exists()
    found = between_files(tmp_path / "a.onnx", tmp_path / "a.onnx", images(2, 16).numpy(), 1e-6)
    assert len(found.distances) > 20
    assert found.first is None
