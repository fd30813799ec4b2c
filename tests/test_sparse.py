"""The rule ``sparse``: SparseNet's offsets on any timm backbone, against the equation written out."""

import math

import numpy as np
import onnx
import pytest
import torch
from mcruntime.engine import OnnxRunner
from tiny_models import images, small_resnet, timm_model, wired_resnet
from torch import nn

import mcdeploy
from mcdeploy.compile.prune import count_parameters
from mcdeploy.connectivity.fixed import AllConfig, all_sources
from mcdeploy.connectivity.sparse import SparseConfig, offsets, sparse
from mcdeploy.connectivity.stages import Stage, candidate_sources
from mcdeploy.connectivity.topology import Node
from mcdeploy.connectivity.wiring import topology_of
from mcdeploy.errors import RecipeError


def exp_fetch(nodes: list[int], base: int) -> list[int]:
    """``expFetch`` of the authors' denselink.py on node numbers: lst[n - 1], lst[n - 2], lst[n - 4], ..."""
    fetched, offset = [], 1
    while offset <= len(nodes):
        fetched.append(nodes[len(nodes) - offset])
        offset *= base
    return fetched


def plain_stage(num_blocks: int, shapes: tuple[tuple[int, ...], ...] | None = None) -> Stage:
    names = tuple(str(i) for i in range(num_blocks))
    return Stage("layer1", names, shapes or ((8, 4, 4),) * (num_blocks + 1), (True,) * num_blocks)


def reads(stage: Stage, **options) -> list[list[int]]:
    """What every block reads, node numbers in ascending order."""
    sources, _ = sparse((stage,), candidate_sources((stage,), "stage"), SparseConfig(rule="sparse", **options))
    return [[source.node.index for source in row] for row in sources[0]]


@pytest.mark.parametrize("base", [2, 3, 5, 10])
def test_blocks_read_exactly_what_the_authors_fetch_takes(base):
    rows = reads(plain_stage(130), base=base)
    assert rows == [sorted(exp_fetch(list(range(index)), base)) for index in range(1, 131)]


def test_the_first_rows_by_hand():
    assert offsets(0) == ()
    assert offsets(16) == (1, 2, 4, 8, 16)
    assert offsets(9, 3) == (1, 3, 9)
    assert reads(plain_stage(8)) == [[0], [0, 1], [1, 2], [0, 2, 3], [1, 3, 4], [2, 4, 5], [3, 5, 6], [0, 4, 6, 7]]


def test_features_aggregated_at_depth_l_are_floor_log2_of_l_plus_one():
    rows = reads(plain_stage(300))
    assert [len(row) for row in rows] == [math.floor(math.log2(index)) + 1 for index in range(1, 301)]


def test_any_two_nodes_are_at_most_base_minus_one_times_log_hops_apart():
    for base in (2, 3, 4):
        rows = reads(plain_stage(256), base=base)
        hops = [0]
        for row in rows:
            hops.append(1 + min(hops[node] for node in row))  # from node 0
        for distance in range(2, 257):
            digits = math.floor(math.log(distance, base) + 1e-9) + 1
            assert hops[distance] <= (base - 1) * digits
    assert hops[256] == 1  # 4^4


def test_a_node_of_another_shape_is_left_out_and_the_block_before_never_is():
    wide, narrow = (16, 4, 4), (8, 8, 8)
    rows = reads(plain_stage(6, (narrow, wide, wide, wide, wide, wide, wide)))
    assert rows == [[0], [1], [1, 2], [2, 3], [1, 3, 4], [2, 4, 5]]  # blocks 2 and 4 do not read node 0
    model = wired_resnet("sparse", num_blocks=5)
    for stage in topology_of(model).stages:
        assert all(row[-1].index == index for index, row in enumerate(stage.reads))
    assert topology_of(model).stages[2].reads[3] == (Node(2, 2), Node(2, 3))
    assert topology_of(model).stages[0].reads[3] == (Node(0, 0), Node(0, 2), Node(0, 3))


def by_hand(model: nn.Module, x: torch.Tensor, base: int, divide: bool) -> torch.Tensor:
    """The equation on an unwired ResNet: a list of nodes a stage, and a loop."""
    x = model.act1(model.bn1(model.conv1(x)))
    for stage in (model.layer1, model.layer2, model.layer3):
        nodes = [x]
        for index, block in enumerate(stage, start=1):
            found = [nodes[i] for i in exp_fetch(list(range(index)), base)]
            fetched = [y for y in found if y.shape == nodes[-1].shape]
            total = sum(fetched[1:], fetched[0])
            nodes.append(block(total / len(fetched) if divide else total))
        x = nodes[-1]
    return model.linear(model.global_pool(x))


@pytest.mark.parametrize("base", [2, 3])
@pytest.mark.parametrize("aggregate", ["mean", "sum"])
def test_the_wired_net_is_the_loop_written_by_hand(aggregate, base):
    model = wired_resnet("sparse", num_blocks=5, aggregate=aggregate, base=base).double()
    x = images(3, 16).double()
    with torch.no_grad():
        expected = by_hand(small_resnet(5).double(), x, base, aggregate == "mean")
        assert torch.allclose(model(x), expected, rtol=1e-12, atol=0)
        other = by_hand(small_resnet(5).double(), x, base, aggregate != "mean")
        assert not torch.allclose(model(x), other, rtol=1e-3)


def test_a_base_beyond_the_depth_is_the_chain_and_base_two_of_three_blocks_is_nearly_all():
    chain, huge = wired_resnet("chain"), wired_resnet("sparse", base=100)
    with torch.no_grad():
        assert torch.equal(chain(images(2, 16)), huge(images(2, 16)))
    stage = plain_stage(2)
    everything, _ = all_sources((stage,), candidate_sources((stage,), "stage"), AllConfig(rule="all"))
    assert [[source.node.index for source in row] for row in everything[0]] == reads(stage)


class ByHand(nn.Module):
    """``wired_resnet("sparse")`` as a person would write it: nothing but blocks, additions and divisions."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(source.conv1, source.bn1, source.act1)
        self.first, self.second = nn.ModuleList(source.layer1), nn.ModuleList(source.layer2)
        self.third = nn.ModuleList(source.layer3)
        self.head = nn.Sequential(source.global_pool, source.linear)

    def forward(self, images_BCHW):
        x = self.stem(images_BCHW)
        a, b, c, d = self.first
        y1 = a(x)
        y2 = b((x + y1) / 2)
        y3 = c((y1 + y2) / 2)
        x = d((x + y2 + y3) / 3)
        for a, b, c, d in (self.second, self.third):  # what they receive has another shape than their blocks
            y1 = a(x)
            y2 = b(y1)
            y3 = c((y1 + y2) / 2)
            x = d((y2 + y3) / 2)
        return self.head(x)


def test_compiled_and_exported_it_is_the_static_net_written_by_hand(tmp_path):
    small = mcdeploy.compile_model(wired_resnet("sparse"), images(7, 16))
    hand = ByHand(small_resnet()).eval()
    mcdeploy.export_onnx(small, tmp_path / "ours.onnx", images(2, 16))
    mcdeploy.export_onnx(hand, tmp_path / "hand.onnx", images(2, 16))
    kinds = [
        sorted(node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node) for name in ("ours", "hand")
    ]
    assert kinds[0] == kinds[1]
    assert kinds[0].count("Div") == 3 + 2 + 2
    folded = sum(module.num_features for module in hand.modules() if isinstance(module, nn.BatchNorm2d))
    assert count_parameters(small) == count_parameters(hand) - folded  # gamma and beta become one bias
    with OnnxRunner(tmp_path / "ours.onnx") as runner, torch.no_grad():
        for batch in (1, 2, 3, 7):
            x = images(batch, 16)
            assert torch.allclose(small(x), hand(x), rtol=1e-4, atol=1e-5)
            assert np.allclose(runner.infer(x.numpy()), hand(x).numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "size"), [("test_convnext", 64), ("regnety_002", 64), ("test_vit", 160)])
def test_other_families_take_the_rule_and_learn(name, size):
    model = mcdeploy.wire(timm_model(name), "sparse", image_size=size).train()
    assert any(len(sources) > 1 for sources in topology_of(model).edges().values())
    model(images(2, size)).square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("wrong", [{"base": 1}, {"base": 2.5}, {"bases": 2}, {"aggregate": "concat"}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(RecipeError, match="connectivity"):
        wired_resnet("sparse", **wrong)
