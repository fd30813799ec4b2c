"""A profile holds every node once, under the name of the block it came from, and two of them stand side by side."""

from __future__ import annotations

import io

import numpy as np
import pytest
import timm
from onnx import helper
from rich.console import Console
from tiny_models import images
from torch import nn

import mcdeploy
from mcdeploy.compile.certify import scramble
from mcdeploy.errors import BackendError, InputError
from mcdeploy.profile import (
    OWN,
    LayerTime,
    Profile,
    block_of,
    ordered_blocks,
    profile_module,
    profile_onnx,
    profile_openvino,
    profile_rows,
    profile_table,
)


@pytest.fixture(scope="module")
def net():
    model = timm.create_model("resnet18", num_classes=5).eval()
    scramble(model)
    return mcdeploy.compile_model(model, images(2, 32))


@pytest.fixture(scope="module")
def path(net, tmp_path_factory):
    file = tmp_path_factory.mktemp("profile") / "net.onnx"
    mcdeploy.export_onnx(net, file, images(2, 32))
    return file


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("layer1.0.conv1", "layer1.0"),
        ("layer1.0.downsample.0", "layer1.0"),
        ("layer1.0/add", "layer1.0"),
        ("layer4.1", "layer4.1"),
        ("layer1.0#2", "layer1.0"),
        ("blocks.1.0.conv_pw#2", "blocks.1.0"),
        ("stages.0.blocks.12.mlp.fc1", "stages.0.blocks.12"),
        ("conv1", "conv1"),
        ("global_pool.pool/ReduceMean", "global_pool"),
        (OWN, OWN),
    ],
)
def test_a_block_is_what_timm_calls_a_block(name, block):
    assert block_of(name) == block


def test_every_convolution_of_the_file_is_in_the_profile_once_under_its_module(net, path):
    profile = profile_onnx(path, images(1, 32).numpy(), name="net", threads=1, runs=3)
    found = sorted(layer.name.split("/")[0] for layer in profile.layers if layer.kind == "Conv")
    assert found == sorted(name for name, module in net.named_modules() if isinstance(module, nn.Conv2d))
    assert all(layer.microseconds >= 0 for layer in profile.layers)
    blocks = profile.by_block()
    assert [name for name in blocks if name.startswith("layer")] == [
        f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)
    ]
    assert sum(blocks.values()) == pytest.approx(profile.total_us)


def test_openvinos_layers_are_under_the_modules_whose_nodes_went_into_them(net, path):
    pytest.importorskip("openvino")
    profile = profile_openvino(path, images(4, 32).numpy(), name="net", threads=1, runs=3)
    found = [layer.name.split("/")[0] for layer in profile.layers if layer.kind == "Convolution"]
    assert sorted(found) == sorted(name for name, module in net.named_modules() if isinstance(module, nn.Conv2d))
    assert [layer.name.split("/")[0] for layer in profile.layers if layer.kind == "FullyConnected"] == ["fc"]
    assert {layer.name for layer in profile.layers if layer.kind == "Reorder"} == {OWN}
    blocks = [name for name in profile.by_block() if name.startswith("layer")]
    assert blocks == [f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert (profile.batch, profile.runs) == (4, 3)
    assert 0 < sum(profile.by_block().values()) == pytest.approx(profile.total_us)


@pytest.mark.parametrize(
    ("layer", "origins", "node"),
    [
        ("fc/Gemm", (), "fc/Gemm"),
        ("logits", ("logits",), "fc/Gemm"),
        ("x", ("", "fc/Gemm/WithoutBiases", "act/Relu"), "fc/Gemm"),
        ("fc/Gemm/WithoutBiases/DequantizationMultiply", ("logits_QuantizeLinear",), "fc/Gemm"),
        ("logits_QuantizeLinear", ("logits_QuantizeLinear", "fc/Gemm"), "fc/Gemm"),
        ("logits_QuantizeLinear", (), "logits_QuantizeLinear"),
        ("act/Relu_abcd_acdb_fc/Gemm", ("",), OWN),
    ],
)
def test_a_layer_of_openvino_stands_for_the_node_that_computes(layer, origins, node):
    from mcdeploy.profile import _origin

    def made(name, kind):
        return helper.make_node(kind, ["x"], ["y"], name=name)

    gemm, rounding = made("fc/Gemm", "Gemm"), made("logits_QuantizeLinear", "QuantizeLinear")
    named = {made.name: made for made in (gemm, rounding, made("act/Relu", "Relu"))}
    assert _origin(layer, origins, named, {"logits": gemm}) == node


def test_openvinos_times_are_medians_without_the_warm_up_and_a_layer_listed_twice_is_summed(path, monkeypatch):
    openvino = pytest.importorskip("mcdeploy.backends.openvino")
    run = iter([[900, 900, 0]] * 3 + [[1, 2, 0], [5, 2, 0], [7, 3, 0]])
    conv, fused = "layer1.0.conv1/Conv", "layer1.0.act1/Relu"

    def layer_times(runner):
        first, again, never = next(run)
        return [
            openvino.LayerRun("x", ("", conv, fused), "Convolution", first),
            openvino.LayerRun("x", ("", conv, fused), "Convolution", again),
            openvino.LayerRun(fused, (fused,), "Relu", never),
        ]

    def warm(runner, images):
        if runner.inferences < 3:
            next(run)
        runner.inferences += 1

    monkeypatch.setattr(openvino.OpenVINORunner, "inferences", 0, raising=False)
    monkeypatch.setattr(openvino.OpenVINORunner, "infer", warm)
    monkeypatch.setattr(openvino.OpenVINORunner, "layer_times", layer_times)
    profile = profile_openvino(path, images(1, 32).numpy(), name="net", threads=1, runs=3)
    assert profile.layers == (LayerTime(conv, "layer1.0", "Convolution", 7.0),)


def test_the_warm_up_does_not_count():
    from mcdeploy.profile import _node_times

    events = [
        {"cat": "Node", "name": "a_kernel_time", "dur": took, "args": {"op_name": "Conv"}} for took in (900, 5, 6)
    ]
    assert _node_times([*events, {"cat": "Session", "name": "model_run", "dur": 9}], 1) == (
        {"a": [5, 6]},
        {"a": "Conv"},
    )


def test_a_module_is_profiled_by_its_leaves_and_left_as_it_was(net):
    net.train()
    profile = profile_module(net, images(1, 32).numpy(), name="net", threads=1, runs=2)
    assert net.training
    net.eval()
    assert {"layer1.0.conv1", "fc", "(between modules)"} <= {layer.name for layer in profile.layers}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def made(name, *blocks):
    return Profile(name, 1, 3, tuple(LayerTime(f"{block}.conv", block, "Conv", float(us)) for block, us in blocks))


def test_two_profiles_stand_side_by_side_by_block():
    dense, pruned = (
        made("dense", ("stem", 10), ("l.0", 20), ("l.1", 30), ("fc", 40)),
        made("pruned", ("stem", 10), ("l.1", 25), ("extra", 5), ("fc", 40)),
    )
    assert ordered_blocks([dense, pruned]) == ["stem", "l.0", "l.1", "extra", "fc"]
    heads, rows = profile_rows([dense, pruned])
    assert heads[1:] == ["dense, batch 1, us (share)", "pruned, batch 1, us (share)"]
    assert rows[1] == ["l.0", "20 (20.0%)", "-"]
    assert rows[2] == ["l.1", "30 (30.0%)", "25 (31.2%)"]
    assert rows[-1] == ["all", "100", "80"]
    console = Console(width=120, file=io.StringIO())
    console.print(profile_table([dense, pruned]))
    assert "31.2%" in console.file.getvalue()


def test_what_cannot_be_profiled_is_refused(tmp_path, path):
    (tmp_path / "broken.onnx").write_bytes(b"no")
    with pytest.raises(BackendError, match="cannot profile"):
        profile_onnx(tmp_path / "broken.onnx", np.zeros((1, 3, 8, 8), np.float32), name="x")
    with pytest.raises(InputError, match="1 run or more"):
        profile_onnx(path, images(1, 32).numpy(), name="x", runs=0)
