import copy
import itertools

import numpy as np
import onnx
import pytest
import torch
from branch_routes import branch_net, branch_topology, survivors_topology
from hypothesis import given, settings
from hypothesis import strategies as st
from mcruntime.engine import OnnxRunner
from runs import short_recipe
from timm.models.resnet import Bottleneck, ResNet
from tiny_models import images, small_resnet, train_a_step
from torch import nn

import mcdeploy
from mcdeploy.backbones.multibranch import MultiBranchNet
from mcdeploy.checkpoint import load_checkpoint
from mcdeploy.compile.branches import merge_summed_branches
from mcdeploy.compile.certify import scramble
from mcdeploy.compile.prune import count_parameters, drop_dead_blocks
from mcdeploy.connectivity.gateconnect import GatedRoute, StaticRoute
from mcdeploy.connectivity.gates import GateOptimizer, Gates
from mcdeploy.connectivity.topology import Node, StageWiring, Topology
from mcdeploy.connectivity.wiring import candidates_of, fix, gate_values, topology_of, wired_stages
from mcdeploy.errors import RecipeError, WiringError
from mcdeploy.runs import open_run, train_run

BRANCHES = 4
PLAIN = {"num_modules": (2, 2), "num_branches": BRANCHES, "width": 2, "channels": 8, "stem_channels": 8}


def plain(seed=0, **options):
    """Four modules of four branches, scrambled; built from a seed."""
    torch.manual_seed(seed)
    model = MultiBranchNet(**{**PLAIN, **options})
    scramble(model)
    return model.eval()


def wired(seed=0, *, net=None, **options):
    """``plain`` wired by the rule, with uneven gates if it learns."""
    model = mcdeploy.wire(plain(**(net or {})), "gateconnect", image_size=16, **options)
    for gates in model.modules():
        if isinstance(gates, Gates):
            with torch.no_grad():
                gates.gates_GN.copy_(torch.rand(gates.gates_GN.shape, generator=torch.Generator().manual_seed(seed)))
                seed += 1
    return model.eval()


def by_loop(model, reads, identity, x):
    """The published equations, one branch at a time: x_j = relu(sum_k g_jk y_k), y_k = F_k(x_k) + s P(x_k)."""
    x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    modules = list(plain_modules(model))
    inputs = [x] * BRANCHES
    for module, rows in zip(modules, reads, strict=True):
        fan_in = len(rows[0])
        alone = [module.with_branches([k]) for k in range(BRANCHES)]
        scale = 1 / fan_in if identity == "average" else 1
        outputs = [b.residuals(x_k) + scale * module.downsample(x_k) for b, x_k in zip(alone, inputs, strict=True)]
        inputs = [sum(outputs[k] for k in row) / (fan_in if identity == "mean" else 1) for row in rows]
        inputs = [torch.relu(x_j) for x_j in inputs]
    assert len(inputs) == 1
    return model.forward_head(inputs[0])


def plain_modules(model):
    fresh = plain().double()
    fresh.load_state_dict({key: value for key, value in model.state_dict().items() if "routes" not in key})
    return fresh.trunk


EVERY = tuple(range(BRANCHES))


@pytest.mark.parametrize("identity", ["average", "sum", "mean"])
@pytest.mark.parametrize(
    "options", [{"fan_in": 1}, {"fan_in": 3}, {"connect": "random", "fan_in": 2}, {"connect": "full"}]
)
def test_all_branches_at_once_compute_what_a_loop_over_branches_does(identity, options):
    model = wired(identity=identity, **options).double()
    place = {node: k for row in wired_stages(model)["trunk"]._nodes() for k, node in enumerate(row)}
    rows = [tuple(place[node] for node in row) for row in topology_of(model).stages[0].reads[BRANCHES:]]
    reads = [*(rows[i : i + BRANCHES] for i in range(0, 3 * BRANCHES, BRANCHES)), rows[-1:]]
    x = images(3, 16).double()
    with torch.no_grad():
        expected = by_loop(model, reads, identity, x)
        assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-12)


@given(st.integers(0, 1000), st.sampled_from(["average", "sum", "mean"]), st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_freezing_leaves_the_output_bit_identical(seed, identity, fan_in):
    model = wired(seed, identity=identity, fan_in=fan_in)
    with torch.no_grad():
        expected = model(images(2, 16))
        topology = topology_of(model)
        fix(model, topology)
        assert torch.equal(model(images(2, 16)), expected)
    assert topology_of(model) == topology
    assert not [module for module in model.modules() if isinstance(module, Gates)]


def test_with_all_gates_open_and_averaged_shortcuts_it_is_the_plain_resnext_of_the_same_weights():
    x = images(3, 16).double()
    expected = plain().double()(x)
    full = wired(connect="full").double()
    assert torch.allclose(full(x), expected, rtol=1e-10, atol=1e-12)
    gated = wired(fan_in=3).double()
    for route in gated.modules():
        if isinstance(route, GatedRoute):
            route.fan_in = BRANCHES
    wired_stages(gated)["trunk"].fan_in = BRANCHES
    assert torch.allclose(gated(x), expected, rtol=1e-10, atol=1e-12)
    for identity in ("sum", "mean"):  # C x + sum F, and its C-th part
        assert not torch.allclose(wired(connect="full", identity=identity).double()(x), expected, rtol=1e-2)


def test_a_gate_gradient_is_the_inner_product_with_what_the_branch_hands_on_also_for_closed_gates():
    model = wired(fan_in=2).double().train()
    gates = mcdeploy.gate_optimizer(model, lr=0.1)
    seen = {}
    routes = [route for route in model.modules() if isinstance(route, GatedRoute)]
    for route in routes:
        route.register_forward_hook(lambda r, args, out: (out.retain_grad(), seen.update({r: (args[0], out)}))[1])
    model(images(4, 16).double()).logsumexp(1).sum().backward()
    assert len(routes) == 3
    for route in routes:
        y, x = seen[route]
        y_BKM, grad_BJM = (
            y.detach().unflatten(1, (BRANCHES, -1)).flatten(2),
            x.grad.unflatten(1, (BRANCHES, -1)).flatten(2),
        )
        for j, k in itertools.product(EVERY, EVERY):
            expected = float((grad_BJM[:, j] * y_BKM[:, k]).sum())
            assert float(route.gates_GN.grad[j, k]) == pytest.approx(expected, rel=1e-9)
        assert (route.mask_GN == 0).any()
        assert (route.gates_GN.grad[route.mask_GN == 0] != 0).all()
    gates.step()


def test_gates_stay_between_0_and_1_and_a_draw_keeps_k_distinct_branches():
    model = wired(fan_in=3)
    gates = mcdeploy.gate_optimizer(model, lr=0.5)
    model.train()
    for _ in range(4):
        model(images(4, 16)).square().mean().backward()
        gates.step()
        for route in gates.gates.values():
            assert route.gates_GN.shape == (BRANCHES, BRANCHES)
            assert bool(((route.gates_GN >= 0) & (route.gates_GN <= 1)).all())
            assert torch.allclose(route.gates_GN.sum(1), torch.ones(BRANCHES))
            assert route.mask_GN.sum(1).tolist() == [3] * BRANCHES


def test_there_is_one_small_matrix_of_gates_between_adjacent_modules_and_none_elsewhere():
    model = wired(fan_in=1)
    gates = {name: module for name, module in model.named_modules() if isinstance(module, Gates)}
    assert list(gates) == ["trunk.routes.0", "trunk.routes.1", "trunk.routes.2"]
    (values,) = gate_values(model).values()
    assert [len(row) for row in values] == [1] * BRANCHES + [BRANCHES] * (3 * BRANCHES + 1)
    offered = candidates_of(model).stages[0].reads
    assert offered[:BRANCHES] == ((Node(0, 0),),) * BRANCHES
    assert offered[BRANCHES] == tuple(Node(0, k) for k in range(1, BRANCHES + 1))
    assert offered[-1] == tuple(Node(0, k) for k in range(3 * BRANCHES + 1, 4 * BRANCHES + 1))


def test_random_wirings_come_from_their_seed_and_learn_nothing():
    one, same, other = (topology_of(wired(connect="random", fan_in=2, wiring_seed=seed)) for seed in (0, 0, 1))
    assert one == same != other
    assert all(len(set(row)) == 2 for row in one.stages[0].reads[BRANCHES:-1])
    with pytest.raises(WiringError, match="no gates"):
        mcdeploy.gate_optimizer(wired(connect="random", fan_in=2), lr=0.1)


@st.composite
def branch_topologies(draw, sizes=(BRANCHES,) * 4):
    """Any wiring of adjacent modules with one fan-in a module; the sum may leave branches out."""
    reads = []
    for before, after in itertools.pairwise((*sizes, 1)):
        fan_in = draw(st.integers(1, before))
        row = st.lists(st.sampled_from(range(before)), min_size=fan_in, max_size=fan_in, unique=True)
        reads.append([tuple(sorted(draw(row))) for _ in range(after)])
    return branch_topology(reads, sizes)


@given(branch_topologies(), st.sampled_from(["average", "sum"]))
@settings(max_examples=15, deadline=None)
def test_removing_dead_branches_leaves_the_output_bit_identical_and_doing_it_again_changes_nothing(wiring, identity):
    model = wired(connect="full", identity=identity)
    fix(model, wiring)
    x = images(2, 16)
    with torch.no_grad():
        expected = model(x)
        everything = copy.deepcopy(model)
        wired_stages(everything)["trunk"].skip = frozenset()
        assert torch.allclose(everything(x), expected, rtol=1e-4, atol=1e-5)
        dead = [wiring.describe(node) for node in wiring.dead_blocks()]
        assert drop_dead_blocks(model) == dead
        assert torch.equal(model(x), expected)
        keys = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        assert drop_dead_blocks(model) == []
        assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == keys
        assert torch.equal(model(x), expected)
    assert topology_of(model) == wiring.without_dead_blocks()[0]
    survivors = [module.num_branches for module in model.trunk.children() if hasattr(module, "num_branches")]
    assert sum(survivors) == 4 * BRANCHES - len(dead)


def test_a_dead_branch_is_not_run_and_a_live_one_is():
    reads = [[(0,), (1,), (1,), (3,)], [(1,), (1,), (2,), (2,)], [(0,), (0,), (1,), (3,)], [(0, 1, 2)]]
    for module, branch, live in (
        (0, 0, False),
        (0, 1, True),
        (0, 3, False),
        (2, 2, False),
        (2, 0, True),
        (3, 3, False),
    ):
        model = wired(connect="full")
        fix(model, branch_topology(reads, (BRANCHES,) * 4))
        child = model.get_submodule(f"trunk.{module}")
        child.conv2.weight.data[branch * child.width : (branch + 1) * child.width] = torch.nan
        assert bool(model(images(2, 16)).isnan().any()) == live, (module, branch)


def test_fig_2_of_the_paper_leaves_a_net_that_is_really_smaller():
    """Survivors 1, 3, 3, 3, 3, 4, 4, 6, 7 from top to bottom with K = 1, on {29,8,8}; parameters counted by hand."""
    survivors = (1, 3, 3, 3, 3, 4, 4, 6, 7)
    model = mcdeploy.wire(branch_net(), "gateconnect", connect="full", image_size=32)
    fix(model, survivors_topology())
    dead = topology_of(model).dead_blocks()
    assert len(dead) == 9 * 8 - sum(survivors)
    before = count_parameters(model)
    masked = copy.deepcopy(model).double().eval()
    drop_dead_blocks(model)

    def branch(read, returned, width):
        return read * width + 9 * width * width + width * returned + 2 * (2 * width + returned)

    shapes = [(64, 64, 8)] * 3 + [(64, 128, 16)] + [(128, 128, 16)] * 2 + [(128, 256, 32)] + [(256, 256, 32)] * 2
    shortcuts = (64 * 128 + 2 * 128) + (128 * 256 + 2 * 256)
    rest = 27 * 64 + 2 * 64 + 256 * 10 + 10 + shortcuts
    assert before == rest + 8 * sum(branch(*shape) for shape in shapes) == 838_474
    by_hand = rest + sum(n * branch(*shape) for n, shape in zip(survivors, shapes, strict=True))
    assert count_parameters(model) == by_hand
    assert by_hand < 0.7 * before
    x = images(2, 16).double()
    with torch.no_grad():
        pruned = model.double().eval()
        wired_stages(masked)["trunk"].skip = frozenset()  # all branches run, as with masks
        assert torch.allclose(pruned(x), masked(x), rtol=1e-10, atol=1e-12)


class HandWritten(nn.Module):
    """``plain`` under ``HAND_READS``, as a person would write it: K = 2 and then K = 1, averaged shortcuts."""

    def __init__(self, source):
        super().__init__()
        self.stem = nn.Sequential(source.conv1, source.bn1, nn.ReLU())
        self.first = source.trunk[0].with_branches([0, 1, 3])
        self.second = source.trunk[1].with_branches([1, 3])
        self.third = source.trunk[2].with_branches([0, 2])
        self.fourth = source.trunk[3]
        self.second.set_inputs(shared=False)
        self.third.set_inputs(shared=False)
        self.fourth.set_inputs(shared=False)
        self.head = nn.Sequential(source.global_pool, source.fc)
        # branches 1 and 3 of the second module read (0, 3) and (0, 1) of the first
        self.register_buffer("pairs", torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]), persistent=False)
        # branches 0, 2 of the third read 3, 1 of the second; branches 0..3 of the fourth read 2, 0, 0, 2 of the third
        self.register_buffer("to_third", channels(8, 1, 0), persistent=False)
        self.register_buffer("to_fourth", channels(16, 1, 0, 0, 1), persistent=False)

    def forward(self, x):
        x = self.stem(x)
        y = self.first.residuals(x).reshape(-1, 3, 8, *x.shape[2:]) + (x * 0.5).unsqueeze(1)
        pairs = torch.bmm(
            self.pairs.expand(x.shape[0], -1, -1), y.reshape(-1, 24, *x.shape[2:]).reshape(x.shape[0], 3, -1)
        )
        x = torch.relu(pairs.reshape(-1, 16, *x.shape[2:]))
        y = self.second.residuals(x) + x
        x = torch.relu(y.index_select(1, self.to_third))
        shortcut = self.third.downsample(x.reshape(-1, 8, *x.shape[2:]))
        y = self.third.residuals(x)
        y = y + shortcut.reshape(-1, 32, *y.shape[2:])
        x = torch.relu(y.index_select(1, self.to_fourth))
        shortcut = (x * 0.25).reshape(-1, 4, 16, *x.shape[2:]).sum(1)
        residuals = self.fourth.residuals(x)
        if residuals.shape[1] != 16:  # before ``sum_in_one_convolution``
            residuals = residuals.reshape(-1, 4, 16, *x.shape[2:]).sum(1)
        return self.head(torch.relu(residuals + shortcut))

    def sum_in_one_convolution(self):
        """The last convolution of four branches and their sum, with the BN folded by hand."""
        conv, bn = self.fourth.conv3, self.fourth.bn3
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        dense = nn.Conv2d(conv.in_channels, 16, 1)
        dense.weight.data = (
            (conv.weight * scale[:, None, None, None]).reshape(4, 16, -1, 1, 1).transpose(0, 1).reshape(16, -1, 1, 1)
        )
        dense.bias.data = (bn.bias - bn.running_mean * scale).reshape(4, 16).sum(0)
        self.fourth.conv3, self.fourth.bn3 = dense, nn.Identity()
        return self


def channels(size, *branches):
    return torch.cat([torch.arange(k * size, (k + 1) * size) for k in branches])


HAND_READS = [
    [(0, 2), (0, 3), (1, 3), (0, 1)],  # of the first module branch 2 is only read by a dead branch
    [(3,), (0,), (1,), (2,)],
    [(2,), (0,), (0,), (2,)],
    [EVERY],
]


def of_floats(path):
    model = onnx.load(path)
    operators = sorted(node.op_type for node in model.graph.node)
    sizes = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    return operators, sum(int(np.prod(tensor.dims)) for tensor in sizes)


def test_the_pruned_net_is_the_same_net_written_by_hand(tmp_path):
    model = wired(connect="full")
    fix(model, branch_topology(HAND_READS, (BRANCHES,) * 4))
    hand = HandWritten(plain()).eval()
    x = images(3, 16)
    with torch.no_grad():
        assert torch.allclose(model(x), hand(x), rtol=1e-4, atol=1e-5)
        drop_dead_blocks(model)
        assert count_parameters(model) == count_parameters(hand)
        small = mcdeploy.compile_model(model, x)
        by_hand = mcdeploy.compile_model(hand.sum_in_one_convolution(), x)
        assert count_parameters(small) == count_parameters(by_hand)
        assert torch.allclose(small(x), by_hand(x), rtol=1e-4, atol=1e-5)
    mcdeploy.export_onnx(small, tmp_path / "ours.onnx", x)
    mcdeploy.export_onnx(by_hand, tmp_path / "hand.onnx", x)
    ours, theirs = of_floats(tmp_path / "ours.onnx"), of_floats(tmp_path / "hand.onnx")
    assert len(ours[0]) == len(theirs[0])
    assert ours == theirs
    assert ours[0].count("Conv") == 1 + 4 * 3 + 1


@pytest.mark.parametrize("options", [{"fan_in": 1}, {"fan_in": 3, "identity": "mean"}])
def test_a_trained_net_compiles_and_exports_and_answers_the_same_at_every_batch(tmp_path, options):
    model = wired(**options)
    train_a_step(model, images(4, 16))
    small, certificate = mcdeploy.compile_with_certificate(model, images(3, 16))
    assert not [module for module in small.modules() if isinstance(module, (Gates, nn.BatchNorm2d))]
    assert certificate.macs[1] <= certificate.macs[0]
    mcdeploy.export_onnx(small, tmp_path / "m.onnx", images(2, 16))
    with OnnxRunner(tmp_path / "m.onnx") as runner, torch.no_grad():
        for batch in (1, 2, 3, 7):
            expected = model(images(batch, 16)).numpy()
            actual = runner.infer(images(batch, 16).numpy())
            assert np.abs(expected - actual).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("connect", "identity"),
    [("chain", "average"), ("full", "average"), ("full", "mean"), ("random", "sum"), ("random", "mean")],
)
def test_summed_branches_become_one_convolution_with_the_same_sum(connect, identity):
    if connect == "chain":
        model = plain().double()
    else:
        options = {} if connect == "full" else {"fan_in": 2}
        model = wired(connect=connect, identity=identity, **options).double()
    x = images(3, 16).double()
    with torch.no_grad():
        expected = model(x)
        assert merge_summed_branches(model) == []  # the BN stands between
        small = mcdeploy.compile_model(model, x)
        assert merge_summed_branches(small) == []
        assert torch.allclose(small(x), expected, rtol=1e-10, atol=1e-12)
    groups = [small.get_submodule(f"trunk.{i}").conv3.groups for i in range(4)]
    assert groups[-1] == 1
    assert (set(groups) == {1}) == (connect != "random")


def test_a_resnext_of_timms_is_wired_with_its_weights():
    torch.manual_seed(0)
    shape = {"layers": (1, 2, 1, 1), "channels": (2, 4, 4, 4), "cardinality": 4, "base_width": 64, "num_classes": 10}
    theirs = ResNet(Bottleneck, **shape).double()
    scramble(theirs)
    x = images(2, 64).double()
    with torch.no_grad():
        expected = theirs.eval()(x)
        model = mcdeploy.wire(copy.deepcopy(theirs), "gateconnect", image_size=64, connect="full").eval()
        assert torch.allclose(model(x), expected, rtol=1e-10, atol=1e-12)
        small = mcdeploy.compile_model(model, x)
        assert torch.allclose(small(x), expected, rtol=1e-10, atol=1e-12)
    learned = mcdeploy.wire(copy.deepcopy(theirs).float(), "gateconnect", image_size=64, fan_in=1)
    train_a_step(learned, images(2, 64))
    assert len(topology_of(learned).stages[0].blocks) == 5 * 4 + 1
    mcdeploy.compile_model(learned, images(2, 64))


def test_a_training_step_runs_in_bfloat16_and_moves_weights_and_gates():
    model = wired(fan_in=2).train()
    gates = GateOptimizer(model, lr=0.1)
    optimizer = torch.optim.SGD(mcdeploy.weights(model), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images(4, 16))
    logits.float().logsumexp(1).mean().backward()
    optimizer.step()
    gates.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in before if "gates" in name} <= moved
    assert {"trunk.0.conv1.weight", "trunk.2.downsample.0.weight", "trunk.3.conv3.weight"} <= moved


def test_a_wired_net_loads_its_own_state_and_that_of_the_plain_net():
    model, other = wired(fan_in=2), wired(1, fan_in=2, net={"seed": 1})
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(images(2, 16)), model(images(2, 16)))
    keys = [key for key in model.state_dict() if "routes" not in key]
    assert keys == list(plain().state_dict())
    model.load_state_dict(plain(2).state_dict(), strict=False)


def test_a_run_trains_jointly_freezes_and_is_restored_from_its_checkpoint(tmp_path):
    recipe = short_recipe(
        data={"image_size": 16},
        model={
            "backbone": "multibranch20_8x4d_cifar",
            "options": {"num_modules": (1, 1, 1), "num_branches": 4, "width": 2, "channels": 8, "stem_channels": 8},
        },
        connectivity={"rule": "gateconnect", "fan_in": 1},
        train={"epochs": 2, "joint_epochs": 1},
    )
    result, _ = train_run(recipe, tmp_path, resume=False)
    header = load_checkpoint(tmp_path).header
    assert header["frozen"]
    assert Topology.from_json(header["topology"]) == result.topology
    _, restored, _ = open_run(tmp_path)
    with torch.no_grad():
        assert torch.equal(restored(images(2, 16)), result.model(images(2, 16)))


def test_what_cannot_be_wired_is_refused_in_one_sentence():
    with pytest.raises(WiringError, match=r"CifarResNet is not; take .* multibranch20_8x4d_cifar"):
        mcdeploy.wire(small_resnet(), "gateconnect", fan_in=1, image_size=16)
    for options in ({"fan_in": 4}, {"fan_in": 5}, {"fan_in": 4, "connect": "random"}):
        with pytest.raises(WiringError, match=r"fan_in: \d leaves nothing to choose among 4 branches"):
            wired(**options)
    with pytest.raises(RecipeError, match="connect: full reads all branches; leave fan_in out"):
        wired(connect="full", fan_in=2)
    with pytest.raises(RecipeError, match="connect: random needs fan_in"):
        wired(connect="random")


def test_a_wiring_of_another_kind_is_refused():
    model = wired(connect="full")
    sizes = (BRANCHES,) * 4
    rows = [[EVERY] * BRANCHES] * 3
    with pytest.raises(WiringError, match="module 1 read different numbers"):
        fix(model, branch_topology([[(0,), (1,), (2,), (0, 1)], *rows[1:], [EVERY]], sizes))
    with pytest.raises(WiringError, match="joins by mean"):
        fix(model, branch_topology([*rows, [EVERY]], sizes, "mean"))
    good = branch_topology([*rows, [EVERY]], sizes).stages[0]
    far = (*good.reads[:-1], (Node(0, 1), Node(0, 2), Node(0, 3), Node(0, 4)))
    with pytest.raises(WiringError, match="module 4 reads something else than module 3"):
        fix(model, Topology((StageWiring("trunk", good.blocks, far),), "sum"))
    stem = ((Node(0, 0),), (Node(0, 1),), *good.reads[2:])
    with pytest.raises(WiringError, match="read the stem and nothing else"):
        fix(model, Topology((StageWiring("trunk", good.blocks, stem),), "sum"))


@pytest.mark.parametrize("reads", [((0, 1), (2, 3)), ((1, 3), (1, 3)), ((2,), (0,)), ((1,), (1,)), ((0, 2), (0, 1))])
def test_both_forms_of_a_route_hand_on_the_same(reads):
    y = images(2, 8).double().repeat(1, 4, 1, 1)
    y = y + torch.arange(12)[:, None, None]
    device = torch.device("cpu")
    gather, matmul = (StaticRoute(reads, 4, 3, 0.5, device, form).double() for form in ("gather", "matmul"))
    by_hand = torch.cat([sum(y[:, 3 * k : 3 * k + 3] for k in row) / 2 for row in dict.fromkeys(reads)], 1)
    assert torch.allclose(gather(y), by_hand, rtol=1e-12)
    assert torch.allclose(matmul(y), by_hand, rtol=1e-12)
