import copy

import pytest
import torch
from tiny_models import images, train_a_step
from torch import nn

import mcdeploy
from mcdeploy.connectivity.gates import Gates
from mcdeploy.connectivity.loops import Passed
from mcdeploy.connectivity.stages import find_stages
from mcdeploy.connectivity.topology import Node, StageWiring, Topology
from mcdeploy.connectivity.wiring import fix, topology_of, wired_stages
from mcdeploy.errors import WiringError

# B = images, N = tokens, C = channels


class Block(nn.Module):
    def __init__(self, width=8, out=None):
        super().__init__()
        self.a, self.b = nn.Linear(width, 16), nn.Linear(16, out or width)

    def forward(self, x_BNC, shift_C=0.0, *, scale=1.0):
        return self.b(torch.relu(self.a(x_BNC + shift_C))) * scale


class Host(nn.Module):
    """Walks its blocks and gives each a shift and a scale of its own; ``between`` is what it does after a block."""

    def __init__(self, blocks=4, between=None, container=nn.ModuleList):
        super().__init__()
        torch.manual_seed(0)
        blocks = [Block() for _ in range(blocks)] if isinstance(blocks, int) else blocks
        self.stem = nn.Linear(3, blocks[0].a.in_features)
        self.blocks = container(blocks) if container is nn.ModuleList else container(*blocks)
        self.shifts_GC = nn.Parameter(torch.randn(len(blocks), 8))
        self.head = nn.Linear(blocks[-1].b.out_features, 10)
        self.between = between
        self.widths = [block.a.in_features for block in blocks]

    def forward(self, x_BCHW):
        x = self.stem(x_BCHW.flatten(2).transpose(1, 2))
        for i, block in enumerate(self.blocks):
            x = block(x, self.shifts_GC[i, : self.widths[i]], scale=1 + 0.1 * i)
            if self.between is not None:
                x = self.between(i, x)
        return self.head(x.mean(1))


def stage_of(model, size=4):
    (stage,) = find_stages(model, images(2, size))
    return stage


def wired(rule="all", model=None, **options):
    return mcdeploy.wire(model or Host(), rule, image_size=4, **options).eval()


@pytest.mark.parametrize("container", [nn.ModuleList, nn.Sequential])
def test_blocks_that_the_host_walks_are_a_stage(container):
    stage = stage_of(Host(container=container))
    assert (stage.blocks, stage.loop, stage.num_choices()) == (("0", "1", "2", "3"), ("0", "1", "2", "3"), 3)


@pytest.mark.parametrize("rule", ["chain", "all"])
def test_every_block_gets_its_own_further_arguments(rule):
    plain = Host().eval()
    model = wired(rule)
    x = plain.stem(images(2, 4).flatten(2).transpose(1, 2))
    outputs = [x]
    for i, block in enumerate(plain.blocks):
        joined = outputs[-1] if rule == "chain" else sum(outputs) / len(outputs)
        outputs.append(block(joined, plain.shifts_GC[i], scale=1 + 0.1 * i))
    assert torch.allclose(model(images(2, 4)), plain.head(outputs[-1].mean(1)), rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == list(plain.state_dict())
    if rule == "chain":
        assert torch.equal(model(images(2, 4)), plain(images(2, 4)))


def test_a_walked_stage_looks_like_its_container():
    model, plain = wired(), Host()
    blocks = model.blocks
    assert len(blocks) == 4
    assert torch.equal(blocks[-1].a.weight, plain.blocks[-1].a.weight)
    assert [step.name for step in blocks[1:3]] == ["1", "2"]


def test_dead_blocks_keep_their_place_in_the_loop_and_compile_removes_their_parameters():
    reads = ((Node(0, 0),), (Node(0, 1),), (Node(0, 0),), (Node(0, 3),))  # 1 and 2 are dead; reads like a chain
    topology = Topology((StageWiring("blocks", ("0", "1", "2", "3"), reads),))
    model, plain = wired(), Host()
    fix(model, topology)
    expected = model(images(2, 4))
    small = mcdeploy.compile_model(model, images(2, 4))
    assert torch.equal(small(images(2, 4)), expected)
    assert [type(block) for block in small.blocks] == [Passed, Passed, Block, Block]
    assert list(small.blocks[2].state_dict()) == list(plain.blocks[2].state_dict())


def test_a_walked_stage_that_is_no_chain_is_compiled_without_its_dead_blocks():
    reads = ((Node(0, 0),), (Node(0, 1),), (Node(0, 0),), (Node(0, 0), Node(0, 3)))
    model = wired()
    fix(model, Topology((StageWiring("blocks", ("0", "1", "2", "3"), reads),)))
    expected = model(images(2, 4))
    small = mcdeploy.compile_model(model, images(2, 4))
    assert torch.equal(small(images(2, 4)), expected)
    assert [name for name, _ in small.blocks.named_children()] == ["2", "3", "edges"]
    again = mcdeploy.compile_model(small, images(2, 4))
    assert torch.equal(again(images(2, 4)), expected)


def test_gates_of_a_walked_stage_learn():
    model = wired("maskconnect", fan_in=1)
    (gates,) = [module for module in model.modules() if isinstance(module, Gates)]
    before = gates.gates_GN.clone()
    train_a_step(model, images(4, 4))
    assert not torch.equal(gates.gates_GN, before)
    small = mcdeploy.compile_model(model, images(4, 4))
    assert torch.equal(small(images(3, 4)), model(images(3, 4)))


def test_nothing_is_kept_after_a_forward_pass():
    model = wired()
    model(images(2, 4))
    assert not model.blocks.loop.arguments


def test_a_forward_pass_that_was_cut_short_leaves_nothing_in_a_copy():
    model = wired()
    with pytest.raises(RuntimeError):
        model.blocks[3](torch.zeros(2, 16, 7), torch.zeros(7, requires_grad=True) * 2)
    fresh = copy.deepcopy(model)
    assert not fresh.blocks.loop.arguments
    assert torch.equal(fresh(images(2, 4)), model(images(2, 4)))


def test_what_the_host_computes_between_two_blocks_ends_the_stage():
    stage = stage_of(Host(between=lambda i, x: x + 1 if i == 1 else x))
    assert stage.blocks == ("0", "1")
    kept = []

    def keep(i, x):
        kept.append(x.sum() if i == 0 else 0)  # reads what block 0 returned, and hands on the very same tensor
        return x

    assert stage_of(Host(between=keep)).blocks == ("1", "2", "3")


def test_children_outside_the_stage_are_called_as_before():
    model = Host(between=lambda i, x: x + 1 if i == 0 else x).eval()
    expected = model(images(2, 4))
    assert torch.equal(wired("chain", model)(images(2, 4)), expected)
    assert topology_of(model).stages[0].blocks == ("1", "2", "3")
    assert isinstance(model.blocks[0], Block)
    small = mcdeploy.compile_model(model, images(2, 4))
    assert torch.equal(small(images(2, 4)), expected)


def test_looking_at_a_shape_ends_the_stage_only_where_the_shape_has_changed():
    def look(_, x):
        assert x.shape[1] == 16
        return x

    narrow = [Block(8, 4), *(Block(4) for _ in range(3))]
    assert stage_of(Host(between=look)).blocks == ("0", "1", "2", "3")
    assert stage_of(Host(narrow)).blocks == ("0", "1", "2", "3")
    assert stage_of(Host(narrow, between=look)).blocks == ("1", "2", "3")


def test_a_feature_map_handed_on_as_a_further_argument_is_refused():
    class Crossing(Host):
        def forward(self, x_BCHW):
            x = old = self.stem(x_BCHW.flatten(2).transpose(1, 2))
            for block in self.blocks:
                old, x = x, block(x, old)
            return self.head(x.mean(1))

    with pytest.raises(WiringError, match="no wirable stage"):
        find_stages(Crossing(), images(2, 4))


def test_feature_maps_that_the_host_collects_are_not_wired():
    class Collecting(Host):
        def forward(self, x_BCHW):
            x = self.stem(x_BCHW.flatten(2).transpose(1, 2))
            found = []
            for block in self.blocks:
                x = block(x)
                found.append(x)
            return found

    with pytest.raises(WiringError, match="no wirable stage"):
        find_stages(Collecting(), images(2, 4))


def test_a_container_called_with_further_arguments_is_not_wired():
    class Passing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x_BNC, shift_C):
            return self.second(self.first(x_BNC, shift_C), shift_C)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.pair = nn.Linear(3, 8), Passing()

        def forward(self, x_BCHW):
            return self.pair(self.stem(x_BCHW.flatten(2).transpose(1, 2)), torch.ones(8))

    with pytest.raises(WiringError, match="no wirable stage"):
        find_stages(Outer(), images(2, 4))


def test_a_walked_stage_may_be_read_from_a_later_stage():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            conv = lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))  # noqa: E731
            self.stem = nn.Conv2d(3, 4, 1)
            self.walked = nn.ModuleList([conv() for _ in range(3)])
            self.called = nn.Sequential(*(conv() for _ in range(3)))

        def forward(self, x_BCHW):
            x = self.stem(x_BCHW)
            for block in self.walked:
                x = block(x)
            return self.called(x + 0).mean((2, 3))

    model = wired("all", Two(), scope="network")
    assert any(node.stage == 0 for node in topology_of(model).edges()[Node(1, 2)])
    first = model(images(2, 4))
    assert torch.equal(model(images(2, 4)), first)
    assert not wired_stages(model)["walked"].tape.features


def test_a_walked_stage_is_one_graph_for_torch_compile():
    model = wired()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images(2, 4)), model(images(2, 4)))
