"""A profile holds every node once, under the name of the block it came from, and two of them stand side by side."""

from __future__ import annotations

import io

import numpy as np
import pytest
import timm
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
