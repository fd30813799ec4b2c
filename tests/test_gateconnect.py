import copy
import itertools

import numpy as np
import onnx
import pytest
import torch
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
from mcdeploy.cli import _open_run, _train
from mcdeploy.compile.certify import scramble
from mcdeploy.compile.prune import count_parameters, drop_dead_blocks
from mcdeploy.connectivity.gateconnect import BranchStack, GatedRoute, StaticRoute
from mcdeploy.connectivity.gates import GateOptimizer, Gates
from mcdeploy.connectivity.topology import Node, StageWiring, Topology
from mcdeploy.connectivity.wiring import candidates_of, fix, gate_values, topology_of, wired_stages
from mcdeploy.errors import RecipeError, WiringError

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


def topology(reads, sizes, aggregate="sum"):
    """``reads[i][j]``: what branch j of module i + 1 reads; the last entry is the one row of the sum."""
    numbers = itertools.count(1)
    nodes = [[Node(0, next(numbers)) for _ in range(size)] for size in sizes]
    rows = [(Node(0, 0),)] * sizes[0] + [
        tuple(nodes[i][k] for k in row) for i, rows in enumerate(reads) for row in rows
    ]
    names = [f"{i}.b{k}" for i, size in enumerate(sizes) for k in range(size)]
    return Topology((StageWiring("trunk", (*names, "sum"), tuple(rows)),), aggregate)


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
        assert torch.allclose(mcdeploy.compile_model(model, x)(x), expected, rtol=1e-10, atol=1e-12)


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
    return topology(reads, sizes)


@given(branch_topologies(), st.sampled_from(["average", "sum"]))
@settings(max_examples=25)
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
        fix(model, topology(reads, (BRANCHES,) * 4))
        child = model.get_submodule(f"trunk.{module}")
        child.conv2.weight.data[branch * child.width : (branch + 1) * child.width] = torch.nan
        assert bool(model(images(2, 16)).isnan().any()) == live, (module, branch)


def test_fig_2_of_the_paper_leaves_a_net_that_is_really_smaller():
    """Survivors 1, 3, 3, 3, 3, 4, 4, 6, 7 from top to bottom with K = 1, on {29,8,8}; parameters counted by hand."""
    survivors = (1, 3, 3, 3, 3, 4, 4, 6, 7)
    torch.manual_seed(0)
    model = mcdeploy.wire(MultiBranchNet((3, 3, 3), 8, 8, 64), "gateconnect", connect="full", image_size=32)
    scramble(model)
    reads = [tuple((k % before,) for k in range(8)) for before in survivors[:-1]]
    reads = [
        tuple((k % before if k < after else 7,) for k in range(8)) for before, after in itertools.pairwise(survivors)
    ]
    fix(model, topology([*reads, [tuple(range(7))]], (8,) * 9))
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
