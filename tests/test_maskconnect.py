import copy

import pytest
import torch
from tiny_models import images, small_resnet, timm_model, train_a_step, wired_resnet
from torch import nn

import mcdeploy
from mcdeploy.connectivity.gates import GateOptimizer
from mcdeploy.connectivity.maskconnect import MaskEdges
from mcdeploy.connectivity.stages import Source
from mcdeploy.connectivity.topology import Node
from mcdeploy.connectivity.wiring import FixedEdges, topology_of, wired_stages
from mcdeploy.errors import WiringError


def edges_of(counts, fan_in, aggregate="sum", init="uniform"):
    rows = tuple(tuple(Source(Node(0, i)) for i in range(n)) for n in counts)
    return MaskEdges(rows, fan_in, aggregate, init)


def test_a_gate_gradient_is_the_inner_product_with_the_feature_map_also_for_closed_gates():
    edges = edges_of([1, 3], fan_in=1).train()
    edges.mask_GN[1] = torch.tensor([0.0, 1.0, 0.0])
    features = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]), torch.tensor([[0.5, 4.0]])]
    out = edges(1, features)
    assert torch.equal(out, features[1])
    (out * torch.tensor([[10.0, 100.0]])).sum().backward()  # dL/dx = (10, 100)
    assert edges.gates_GN.grad[1].tolist() == [210.0, -70.0, 405.0]
    assert edges.gates_GN.grad[0].tolist() == [0.0, 0.0, 0.0]


def test_the_mean_divides_the_gate_gradient_by_k_as_well():
    edges = edges_of([3], fan_in=2, aggregate="mean").train()
    edges.mask_GN[0] = torch.tensor([1.0, 0.0, 1.0])
    features = [torch.full((1, 2), value) for value in (1.0, 2.0, 4.0)]
    out = edges(0, features)
    assert out.tolist() == [[2.5, 2.5]]
    out.sum().backward()
    assert edges.gates_GN.grad[0].tolist() == [1.0, 2.0, 4.0]


def test_gates_match_a_hand_written_step_on_a_whole_network():
    model = wired_resnet(fan_in=2, aggregate="sum").double().train()
    edges = wired_stages(model)["layer1"].edges
    gates = GateOptimizer(model, lr=0.01, grad="raw", seed=3)
    before, mask = edges.gates_GN.detach().clone(), edges.mask_GN.clone()
    features, received = {}, {}
    for i, block in enumerate(wired_stages(model)["layer1"], start=1):
        block.register_forward_pre_hook(lambda _, args, i=i: (args[0].retain_grad(), received.update({i: args[0]}))[1])
        block.register_forward_hook(lambda _, args, out, i=i: features.update({i: out}))
    model.act1.register_forward_hook(lambda _, args, out: features.update({0: out}))
    model(images(4, 16).double()).logsumexp(1).sum().backward()
    for block, n in ((3, 3), (4, 4)):
        expected = [float((received[block].grad * features[j]).sum().detach()) for j in range(n)]
        assert edges.gates_GN.grad[block - 1, :n].tolist() == pytest.approx(expected, rel=1e-9)
    grad = edges.gates_GN.grad.clone()
    gates.step()
    stepped = (before - 0.01 * grad).clamp(0, 1) * edges.valid_GN
    expected_GN = stepped / stepped.sum(1, keepdim=True)
    assert torch.allclose(edges.gates_GN, expected_GN, rtol=1e-12)
    assert mask.sum(1).tolist() == [1, 2, 2, 2]


def test_gates_stay_normalised_and_in_range_and_masks_keep_k_of_them():
    model = wired_resnet(fan_in=2)
    gates = mcdeploy.gate_optimizer(model, lr=0.5)
    model.train()
    for _ in range(5):
        model(images(4, 16)).square().mean().backward()
        gates.step()
        for stage in wired_stages(model).values():
            edges = stage.edges
            assert torch.allclose(edges.gates_GN.sum(1), torch.ones(4))
            assert bool(((edges.gates_GN >= 0) & (edges.gates_GN <= 1)).all())
            assert edges.mask_GN.sum(1).tolist() == [min(2, n) for n in edges.counts]
            assert not bool((edges.mask_GN.bool() & ~edges.valid_GN).any())


def test_draws_follow_the_gates():
    edges = edges_of([4], fan_in=1)
    edges.gates_GN.data[0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        edges.draw(generator)
        counts += edges.mask_GN[0]
    assert torch.allclose(counts / 4000, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.03)


def test_closed_gates_fill_up_when_fewer_than_k_are_open_and_an_all_zero_row_starts_anew():
    edges = edges_of([4, 4], fan_in=3)
    edges.gates_GN.data = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    edges.draw(torch.Generator().manual_seed(0))
    assert edges.mask_GN.sum(1).tolist() == [3, 3]
    assert edges.mask_GN[0, 1] == 1
    assert edges.gates_GN[1].tolist() == [0.25] * 4


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_normalised_gradients_do_not_depend_on_their_scale(scale):
    edges = edges_of([4], fan_in=1)
    edges.gates_GN.grad = torch.tensor([[1.0, -2.0, 0.5, 0.0]]) * scale
    edges.descend(0.01, "normalised")
    rms = (5.25 / 4) ** 0.5
    expected = [0.25 - 0.01 * g / rms for g in (1.0, -2.0, 0.5, 0.0)]
    assert edges.gates_GN[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_gates_start_uniform_or_with_half_of_the_mass_on_the_block_before():
    assert edges_of([1, 4], 1).gates_GN.tolist()[1] == [0.25] * 4
    assert edges_of([1, 4], 1, init="chain").gates_GN.tolist()[1] == pytest.approx([1 / 6, 1 / 6, 1 / 6, 0.5])


def test_outside_training_the_top_k_gates_are_used_and_freezing_keeps_them():
    model = wired_resnet(fan_in=2)
    edges = wired_stages(model)["layer1"].edges
    top = edges.gates_GN[3].topk(2).indices.sort().values.tolist()
    assert [node.index for node in topology_of(model).stages[0].reads[3]] == top
    batch = images(3, 16)
    with torch.no_grad():
        expected = model(batch)
        frozen = copy.deepcopy(model)
        mcdeploy.compile.prune.freeze(frozen)
        assert torch.allclose(frozen(batch), expected, rtol=1e-5, atol=1e-6)
    assert not any(isinstance(module, MaskEdges) for module in frozen.modules())


def test_masks_depend_only_on_seed_and_step():
    def masks(seed, steps):
        model = wired_resnet(fan_in=1)
        gates = GateOptimizer(model, lr=0.1, seed=seed)
        model.train()
        for _ in range(steps):
            model(images(2, 16)).sum().backward()
            gates.step()
        return torch.cat([stage.edges.mask_GN.flatten() for stage in wired_stages(model).values()])

    assert torch.equal(masks(0, 2), masks(0, 2))
    assert not torch.equal(masks(0, 2), masks(1, 2))


def test_a_gate_without_gradient_is_refused():
    model = wired_resnet(fan_in=2)
    gates = mcdeploy.gate_optimizer(model, lr=0.1)
    with pytest.raises(WiringError, match="no gradient reached the gates of layer1"):
        gates.step()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_gates_that_are_also_in_the_weight_optimizer_are_refused(optimizer):
    model = wired_resnet(fan_in=2).train()
    weights = optimizer(model.parameters(), lr=0.1)
    gates = mcdeploy.gate_optimizer(model, lr=0.1)
    model(images(2, 16)).sum().backward()
    weights.step()
    with pytest.raises(WiringError, match=r"mcdeploy\.weights"):
        gates.step()


def test_weights_are_all_parameters_but_the_gates():
    plain = sum(p.numel() for p in small_resnet().parameters())
    assert sum(p.numel() for p in mcdeploy.weights(wired_resnet(fan_in=2))) == plain


def test_a_model_without_gates_has_no_gate_optimizer():
    with pytest.raises(WiringError, match="no gates"):
        mcdeploy.gate_optimizer(nn.Linear(1, 1), lr=0.1)


def test_network_scope_trains_and_freezes():
    model = wired_resnet(fan_in=2, scope="network")
    train_a_step(model, images(4, 16))
    reads = topology_of(model).edges()
    assert all(1 <= len(sources) <= 2 for sources in reads.values())


def test_gradients_of_a_step_that_was_skipped_are_forgotten():
    model = wired_resnet(fan_in=1).train()
    gates = mcdeploy.gate_optimizer(model, lr=0.001)
    edges = wired_stages(model)["layer1"].edges
    before = edges.gates_GN.detach().clone()
    (model(images(2, 16)).sum() * float("inf")).backward()
    gates.zero_grad()
    model(images(2, 16)).square().mean().backward()
    gates.step()
    assert torch.allclose(edges.gates_GN, before, atol=0.01)


def test_more_sources_than_there_are_is_nothing_to_learn():
    with pytest.raises(WiringError, match="leaves nothing to learn, no block has more than 4 candidates"):
        mcdeploy.wire(small_resnet(), "maskconnect", image_size=16, fan_in=4)


def test_a_stage_without_a_choice_has_no_gates_under_network_scope():
    model = mcdeploy.wire(timm_model("mobilenetv2_050"), "maskconnect", image_size=64, fan_in=2, scope="network")
    assert isinstance(wired_stages(model)["blocks.1"].edges, FixedEdges)
    train_a_step(model, images(2, 64))


def test_a_forward_pass_that_was_cut_short_leaves_nothing_behind():
    model = wired_resnet(fan_in=2, scope="network")
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(images(2, 16))
    model.layer1(torch.randn(2, 8, 16, 16))
    assert wired_stages(model)["layer1"].tape.features
    copied = copy.deepcopy(model).eval()
    assert copied.layer1.tape is copied.layer3.tape is not model.layer1.tape
    with torch.no_grad():
        assert torch.equal(copied(images(2, 16)), expected)


def test_wiring_twice_and_checkpointed_models_are_refused():
    with pytest.raises(WiringError, match="wired already"):
        mcdeploy.wire(wired_resnet(fan_in=2), "all", image_size=16)
    vit = timm_model("test_vit")
    vit.set_grad_checkpointing(True)
    with pytest.raises(WiringError, match="gradient checkpointing"):
        mcdeploy.wire(vit, "all")
