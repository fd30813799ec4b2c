"""Nets with per-image wirings are frozen on calibration images, pruned, and exported with a real skip."""

import copy

import numpy as np
import onnx
import pytest
import torch
from mcruntime.engine import OnnxRunner
from tiny_dynamic import X, dynamic_resnet, scattered_resnet, two_ways
from tiny_models import images, small_resnet
from torch import nn

import mcdeploy
from mcdeploy.compile import compile_with_certificate
from mcdeploy.compile.certify import check_close
from mcdeploy.compile.conditional import export_form
from mcdeploy.compile.dynamic import (
    NEAR_THRESHOLD,
    WeightedStage,
    count_wirings,
    narrow,
    open_everything,
    record,
    settled,
)
from mcdeploy.compile.prune import count_macs, count_parameters
from mcdeploy.connectivity.ddw import dynamic_stages
from mcdeploy.connectivity.wiring import topology_of, wired_stages
from mcdeploy.errors import ParityError

KINDS = [{}, {"router": "node"}, {"aggregate": "sum"}]


def names_of(model):
    return {".".join(key.split(".")[:2]) for key in model.state_dict() if key.startswith("layer")}


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_compiled_is_smaller_answers_calibration_images_alike_and_compiles_to_itself(options):
    model = scattered_resnet(num_blocks=3, **options)
    small, certificate = compile_with_certificate(model, X[:7], X)
    assert count_parameters(small) < count_parameters(model)
    assert certificate.parameters == (count_parameters(model), count_parameters(small))
    assert certificate.calibration["wiring_unchanged"] == 1
    assert certificate.calibration["decisions"][1] < certificate.calibration["decisions"][0]
    check_close(model.double(), copy.deepcopy(small).double(), X.double(), "compile", "scrambled", 1e-5)
    again, certificate = compile_with_certificate(small, X[:7], X)
    assert certificate.removed == {}
    assert list(again.state_dict()) == list(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again(X), small(X))


def test_a_net_with_everything_open_at_weights_of_its_own_compiles_to_itself():
    model = dynamic_resnet(2, aggregate="sum")  # with a mean, the weight of a node's only edge does not matter
    for stage in dynamic_stages(model).values():
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            stage.router["0"].weight.copy_(0.01 * torch.randn(stage.router["0"].weight.shape, generator=generator))
            stage.router["0"].bias.fill_(1.0)
    frozen = copy.deepcopy(model)
    removed, calibration, _ = narrow(frozen, X)
    assert removed == {}
    decided = sum(len(stage.routed[0]) for stage in dynamic_stages(model).values())
    assert calibration.decisions == (decided, decided)
    assert list(frozen.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(frozen(X), model(X))


class HandWritten(nn.Module):
    """What is left of layer1: 0, 2 and a mean; layer2: a chain of one; layer3: both blocks and a mean of three."""

    def __init__(self, source):
        super().__init__()
        self.stem = nn.Sequential(source.conv1, source.bn1, source.act1)
        self.layer1, self.layer2, self.layer3 = source.layer1, source.layer2, source.layer3
        del self.layer1[1], self.layer2[1:], self.layer3[2]
        self.pool, self.linear = source.global_pool, source.linear

    def forward(self, x):
        x = self.stem(x)
        first = self.layer1[0](x)
        x = (first + self.layer1[1](first)) / 2
        x = self.layer2[0](x)
        y1 = self.layer3[0](x)
        y2 = self.layer3[1](y1)
        return self.linear(self.pool((y1 + y2) / 2))


SATURATED = {
    "layer1": [(0, 1), (1, 3), (1, 4), (3, 4)],
    "layer2": [(0, 1), (1, 4)],
    "layer3": [(0, 1), (1, 2), (1, 4), (2, 4)],
}


def test_saturated_routers_compile_to_the_static_net_that_a_person_would_write(tmp_path):
    model = dynamic_resnet(3, open_edges=SATURATED)
    small, certificate = compile_with_certificate(model, X[:7], X)
    assert not dynamic_stages(small)
    assert not any("router" in key for key in small.state_dict())
    assert type(small.layer2) is nn.Sequential
    assert certificate.removed["dead: no stage output depends on it"] == [
        "layer1.1",
        "layer2.1",
        "layer2.2",
        "layer3.2",
    ]
    assert "edge never open on 24 calibration images" in certificate.removed
    assert certificate.macs[1] < certificate.macs[0] == count_macs(open_everything(model), X)
    hand = HandWritten(small_resnet(3)).eval()
    check_close(hand, model, X, "by hand", "scrambled", 1e-5)
    folded = mcdeploy.compile_model(hand, X[:7])
    assert count_parameters(folded) == count_parameters(small)
    files = []
    for net, name in ((small, "ours"), (hand, "hand")):
        mcdeploy.export_onnx(net, tmp_path / f"{name}.onnx", X[:2])
        files.append(sorted(node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node))
    assert files[0] == files[1]


def test_constant_weights_that_differ_become_numbers_without_a_router():
    model = dynamic_resnet(2, aggregate="sum")
    for stage in dynamic_stages(model).values():
        with torch.no_grad():
            stage.router["0"].bias.copy_(torch.linspace(0.1, 2.0, len(stage.router["0"].bias)))
    small, certificate = compile_with_certificate(model, X[:7], X)
    assert {type(stage) for stage in wired_stages(small).values()} == {WeightedStage}
    assert certificate.calibration["decisions"] == (sum(len(s.routed[0]) for s in dynamic_stages(model).values()), 0)
    x = images(7, 16, seed=9).double()
    check_close(copy.deepcopy(model).double(), copy.deepcopy(small).double(), x, "compile", "scrambled", 1e-6)
    assert topology_of(small).live() == frozenset(topology_of(small).edges()) | {(s, 0) for s in range(3)}
    assert mcdeploy.compile_model(small, X[:7]).state_dict().keys() == small.state_dict().keys()


def test_a_block_that_no_calibration_image_runs_is_gone_with_its_parameters():
    model = dynamic_resnet(3, open_edges={"layer1": [(0, 1), (1, 2), (1, 4), (2, 4)]})
    model.layer1.get_submodule("2").conv1.weight.data.fill_(float("nan"))
    small = mcdeploy.compile_model(model, X[:7], X)
    assert "layer1.2" in names_of(model) - names_of(small)
    assert not any(tensor.isnan().any() for tensor in small.state_dict().values())


def test_a_router_keeps_only_the_rows_it_still_decides():
    model = two_ways(X)
    small, _ = compile_with_certificate(model, X[:7], X)
    (stage,) = dynamic_stages(small).values()
    assert stage.routed == {0: ((1, 2),)}
    assert stage.router["0"].weight.shape == (1, 8)
    assert 2 not in stage.always
    assert count_wirings(small, X) == 2


def test_an_edge_that_only_other_images_open_is_counted_by_who_looks():
    model = two_ways(X)
    closed = X[~record(model, X).open_BE["layer1"][:, 2]]
    small, certificate = compile_with_certificate(model, closed[:5], closed)
    assert not dynamic_stages(small)
    assert certificate.calibration["wiring_unchanged"] == 1
    with torch.no_grad():
        assert not torch.allclose(small(X), model(X), atol=1e-3)


def test_images_near_the_threshold_are_not_settled_and_a_net_of_them_is_refused():
    model = two_ways(X)
    assert settled(model, X).all()
    with torch.no_grad():
        for router in model.layer1.router.values():
            router.weight.zero_()
            router.bias.fill_(NEAR_THRESHOLD)  # alpha is a fourth of it away from 0.5
    assert not settled(model, X).any()
    router = model.layer1.router["0"]
    with torch.no_grad():
        router.weight.copy_(1e-6 * torch.randn(router.weight.shape))
        router.bias.zero_()
    with pytest.raises(ParityError, match="within 1e-4 of the threshold"):
        compile_with_certificate(model, X[:7], X)


@pytest.mark.parametrize("bias", [0.0, -8.0])  # -8: nearly everything is closed, so the newest running source is used
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_exported_form_is_the_dynamic_stage_in_float64(options, bias):
    for seed in range(3):
        model = scattered_resnet(seed, bias, **options).double()
        form = export_form(model, skip=False)
        with torch.no_grad():
            for batch in (1, 2, 3, 7):
                x = images(batch, 16, seed=seed).double()
                assert torch.allclose(form(x), model(x), rtol=1e-10, atol=1e-10)


def test_dynamic_batch_by_skipping_is_the_masked_sum_in_float64():
    model = scattered_resnet().double()
    x = X[:7].double()
    together = model(x)
    alone = torch.cat([model(image[None]) for image in x])
    assert torch.allclose(together, alone, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------------------- ONNX


class ByHand(nn.Module):
    """``two_ways`` after compile as a person would write it; what the router answers is taken as it is."""

    def __init__(self, source):
        super().__init__()
        self.stem = nn.Sequential(source.conv1, source.bn1, source.act1)
        self.stage = source.layer1
        self.rest = nn.Sequential(source.layer2, source.layer3, source.global_pool, source.linear)

    def forward(self, images_BCHW):
        x = self.stem(images_BCHW)
        weights_BE, needed_N = self.stage.route(x)  # input -> 0, 0 -> 1, 0 -> output, 1 -> output
        _, into_1, into_output = weights_BE.reshape(-1, 4, 1, 1).split([1, 1, 2], 1)
        first, block = self.stage.get_submodule("0")(x), self.stage.get_submodule("1")

        def run(weight, first):
            return (block(first * weight),)

        def skip(weight, first):
            return (torch.zeros_like(first),)

        second = torch.cond(needed_N[2], run, skip, (into_1, first))[0]
        a, b = into_output.split(1, 1)
        return self.rest(first * a + second * b)


def nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes(attribute.g)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamic")
    small, _ = compile_with_certificate(two_ways(X), X[:7], X)
    mcdeploy.export_onnx(small, folder / "m.onnx", X[:2])
    return small, folder / "m.onnx"


def test_one_file_with_an_if_is_right_at_every_batch_size(exported):
    small, path = exported
    with OnnxRunner(path) as runner, torch.no_grad():
        for batch in (1, 2, 3, 7):
            for x in X[:21].split(batch):
                assert np.allclose(runner.infer(x.numpy()), small(x).numpy(), rtol=1e-4, atol=1e-4)


def test_the_block_that_some_images_skip_is_inside_an_if_and_nothing_else_is(exported):
    _, path = exported
    graph = onnx.load(path).graph
    (branch,) = [node for node in graph.node if node.op_type == "If"]
    inside = [node for a in branch.attribute for node in a.g.node]
    assert sum(node.op_type == "Conv" for node in inside) == 2
    assert sum(node.op_type == "Conv" for node in nodes(graph)) == 1 + 2 * 6


def test_the_file_is_that_of_the_conditional_net_that_a_person_would_write(exported, tmp_path):
    small, path = exported
    mcdeploy.export_onnx(ByHand(export_form(small, skip=True)).eval(), tmp_path / "hand.onnx", X[:2])
    ours, hand = onnx.load(path).graph, onnx.load(tmp_path / "hand.onnx").graph
    assert sorted(node.op_type for node in nodes(ours)) == sorted(node.op_type for node in nodes(hand))
    sizes = [sum(np.prod(t.dims, dtype=int) for t in graph.initializer) for graph in (ours, hand)]
    assert sizes[0] == sizes[1]
    with OnnxRunner(path) as runner, OnnxRunner(tmp_path / "hand.onnx") as by_hand:
        for batch in (1, 3):
            assert np.allclose(runner.infer(X[:batch].numpy()), by_hand.infer(X[:batch].numpy()), rtol=1e-5, atol=1e-5)


def test_a_skipped_block_is_not_executed(exported, tmp_path):
    small, path = exported
    broken = onnx.load(path)
    for tensor in broken.graph.initializer:
        if tensor.name == "layer1.1.conv1.weight":
            array = np.full(tensor.dims, np.nan, dtype=np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    assert any(tensor.name == "layer1.1.conv1.weight" for tensor in broken.graph.initializer)
    onnx.save(broken, tmp_path / "nan.onnx")
    runs_B = record(small, X).executed_BN["layer1"][:, 2]
    assert 0 < int(runs_B.sum()) < len(X)
    with OnnxRunner(path) as whole, OnnxRunner(tmp_path / "nan.onnx") as runner:
        for image in X[~runs_B].numpy():
            assert np.array_equal(runner.infer(image[None]), whole.infer(image[None]))
        with pytest.raises(ParityError, match="NaN"):
            runner.infer(X[runs_B][:1].numpy())
        with pytest.raises(ParityError, match="NaN"):  # in a batch one image that needs it is enough
            runner.infer(torch.cat([X[~runs_B][:2], X[runs_B][:1]]).numpy())
