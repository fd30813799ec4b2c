import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from hand_written import HandWritten, hand_topology
from mcruntime.engine import OnnxRunner
from tiny_models import images, small_resnet, timm_model, train_a_step, wired_resnet
from torch import nn

import mcdeploy
from mcdeploy.backends.onnx import _check, _reason, export_onnx, export_program, read_opset
from mcdeploy.connectivity.wiring import fix, topology_of, wired_stages
from mcdeploy.errors import BackendError


def export(model, path, size=16, **options):
    export_onnx(model.eval(), path, images(2, size), **options)
    return onnx.load(path)


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_the_opset_asked_for_is_the_opset_written(tmp_path, opset):
    export(small_resnet(), tmp_path / "m.onnx", opset=opset)
    assert read_opset(tmp_path / "m.onnx") == opset


def test_one_file_runs_at_every_batch_size_and_answers_what_torch_answers(tmp_path):
    model = mcdeploy.compile_model(wired_resnet(fan_in=2), images(7, 16))
    export(model, tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    with OnnxRunner(tmp_path / "m.onnx") as runner, torch.no_grad():
        for batch in (1, 2, 3, 7):
            x = images(batch, 16)
            assert np.allclose(runner.infer(x.numpy()), model(x).numpy(), rtol=1e-4, atol=1e-4)


class Attention(nn.Module):
    """Attention, 2 heads of 4 numbers, a mask broadcast over the batch, on tensors of 3 axes (SAM), 4 or 5 (Twins)."""

    def __init__(self, axes):
        super().__init__()
        torch.manual_seed(0)
        self.axes = axes
        self.leading = (3, 4) if axes == 5 else (12,)
        self.qkv = nn.Linear(6, 24)
        self.mask = nn.Parameter(torch.randn(1, 2, *(1,) * (axes == 5), self.leading[-1], self.leading[-1]))

    def forward(self, x):
        batch = x.shape[0]
        tokens = x.flatten(2).transpose(1, 2).reshape(batch, *self.leading, 6)
        qkv = self.qkv(tokens).unflatten(-1, (3, 2, 4)).movedim(-3, 0).movedim(-2, 2)
        mask = self.mask.expand(batch, *self.mask.shape[1:])
        if self.axes == 3:
            qkv, mask = qkv.flatten(1, 2), mask.flatten(0, 1)
        joined = nn.functional.scaled_dot_product_attention(*qkv, mask)
        if self.axes == 3:
            joined = joined.unflatten(0, (batch, 2))
        return joined.movedim(1, -2).reshape(batch, *self.leading, 8).flatten(1)


@pytest.mark.parametrize("axes", [3, 4, 5])
def test_attention_with_a_mask_is_exported_whatever_its_axes(tmp_path, axes):
    model = Attention(axes).eval()
    images_BCHW = torch.randn(3, 6, 3, 4, generator=torch.Generator().manual_seed(0))
    export_onnx(model, tmp_path / "m.onnx", images_BCHW[:2])
    with OnnxRunner(tmp_path / "m.onnx") as runner, torch.no_grad():
        for batch in (1, 3):
            expected = model(images_BCHW[:batch]).numpy()
            assert np.allclose(runner.infer(images_BCHW[:batch].numpy()), expected, rtol=1e-4, atol=1e-5)


def test_the_reason_of_a_failed_export_is_the_one_it_started_with(tmp_path):
    class Stubborn(nn.Module):
        def forward(self, x):
            return x.unknown

    assert _reason(RuntimeError("input 'a' of node: \nname: b\nmore")) == "input 'a' of node: name: b"
    with pytest.raises(BackendError, match=r"Stubborn failed: '\w*Tensor' object has no attribute 'unknown'$"):
        export_onnx(Stubborn(), tmp_path / "m.onnx", images(2, 4))


def test_another_opset_or_a_fixed_batch_is_refused(tmp_path):
    model = export(small_resnet(), tmp_path / "m.onnx", opset=20)
    with pytest.raises(BackendError, match="asked for opset 18, the exporter wrote 20"):
        _check(tmp_path / "m.onnx", 18)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "fixed.onnx")
    with pytest.raises(BackendError, match="fixed the batch to 2"):
        _check(tmp_path / "fixed.onnx", 20)


def test_a_model_that_cannot_be_exported_leaves_the_old_file_and_no_rest(tmp_path):
    class Stubborn(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(BackendError, match="ONNX export of Stubborn failed"):
        export_onnx(Stubborn(), tmp_path / "m.onnx", images(2, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


def nodes(model):
    return sorted(node.op_type for node in model.graph.node)


def test_the_pruned_onnx_is_that_of_the_same_net_written_by_hand(tmp_path):
    model = wired_resnet("all")
    fix(model, hand_topology(model))
    hand = HandWritten(small_resnet()).eval()
    by_hand = export(hand, tmp_path / "hand.onnx")
    small = mcdeploy.compile_model(model, images(7, 16))
    ours = export(small, tmp_path / "ours.onnx")
    assert nodes(ours).count("Conv") == nodes(by_hand).count("Conv") == 1 + 2 * (3 + 2 + 4)
    assert nodes(ours).count("Add") == nodes(by_hand).count("Add")
    assert nodes(ours) == nodes(by_hand)
    size = [sum(np.prod(t.dims, dtype=int) for t in m.graph.initializer if t.data_type == 1) for m in (ours, by_hand)]
    assert size[0] == size[1]
    with torch.no_grad():
        assert torch.allclose(small(images(3, 16)), hand(images(3, 16)), rtol=1e-4, atol=1e-4)


def test_nothing_in_the_file_belongs_to_a_dead_block_or_a_gate(tmp_path):
    model = wired_resnet(fan_in=1)
    dead = topology_of(model).dead_blocks()
    stages = wired_stages(model)
    for node in dead:
        name = topology_of(model).stages[node.stage].name
        stages[name][node.index - 1].conv1.weight.data.fill_(12345.0)
    graph = export(mcdeploy.compile_model(model, images(7, 16)), tmp_path / "m.onnx").graph
    names = [t.name for t in graph.initializer] + [node.name for node in graph.node]
    gone = [topology_of(model).describe(node) for node in dead]
    assert gone
    assert not [
        name for name in names if any(f"{block}." in name for block in gone) or "gate" in name or "mask" in name
    ]
    assert not any((onnx.numpy_helper.to_array(t) == 12345.0).any() for t in graph.initializer)
    assert sum(node.op_type == "Conv" for node in graph.node) == 1 + 2 * (12 - len(dead))


def test_the_exported_program_loads_with_torch_alone(tmp_path):
    small = mcdeploy.compile_model(wired_resnet(fan_in=2), images(7, 16))
    export_program(small, tmp_path / "m.pt2", images(2, 16))
    torch.save(small(images(3, 16)).detach(), tmp_path / "expected.pt")
    code = f"""
import sys
for name in ("mcdeploy", "mcruntime", "timm", "accelerate"):
    sys.modules[name] = None
import torch
model = torch.export.load({str(tmp_path / "m.pt2")!r}).module()
x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
assert torch.allclose(model(x), torch.load({str(tmp_path / "expected.pt")!r}), rtol=1e-5, atol=1e-5)
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr


# Acceptance point 3 of the spine: MaskConnect trains a step, compiles and exports on each family.
FAMILIES = {
    "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64, "mobilenetv2_050": 64, "efficientnet_b0": 64,
    "regnety_002": 64, "test_convnext": 64, "test_vit": 160, "swin_tiny_patch4_window7_224": 224, "darknet53": 64,
    "mixer_s32_224": 224,
}  # fmt: skip


@pytest.mark.parametrize(("name", "size"), FAMILIES.items())
def test_every_family_trains_a_step_compiles_and_exports(tmp_path, name, size):
    model = mcdeploy.wire(timm_model(name), "maskconnect", fan_in=1, image_size=size)
    train_a_step(model, images(2, size))
    small = mcdeploy.compile_model(model, images(2, size))
    export(small, tmp_path / "m.onnx", size)
    with OnnxRunner(tmp_path / "m.onnx") as runner, torch.no_grad():
        for batch in (1, 3):
            expected = model(images(batch, size)).numpy()
            actual = runner.infer(images(batch, size).numpy())
            assert np.abs(expected - actual).max() <= 1e-3 * np.abs(expected).max()
