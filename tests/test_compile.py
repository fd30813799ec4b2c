import copy

import pytest
import torch
from hypothesis import given, settings
from strategies import topologies
from tiny_models import images, small_resnet, timm_model, train_a_step, wired_resnet
from torch import nn

import mcdeploy
from mcdeploy.compile import compile_with_certificate
from mcdeploy.compile.certify import check_close, check_equal, scramble
from mcdeploy.compile.fold import find_foldable, fold_batch_norms
from mcdeploy.compile.prune import count_macs, count_parameters, drop_dead_blocks, freeze, unwrap_chains
from mcdeploy.connectivity.maskconnect import MaskEdges
from mcdeploy.connectivity.topology import StageWiring, Topology, chain_reads
from mcdeploy.connectivity.wiring import FixedEdges, WiredStage, fix, topology_of, wired_stages
from mcdeploy.errors import ParityError


@settings(max_examples=15, deadline=None)
@given(topologies((4, 4, 4)))
def test_pruning_any_wiring_is_bit_identical_and_leaves_only_live_blocks(topology):
    model = wired_resnet("all")
    fix(model, topology)
    small = copy.deepcopy(model)
    removed = drop_dead_blocks(small)
    unwrap_chains(small)
    with torch.no_grad():
        assert torch.equal(small(images(3, 16)), model(images(3, 16)))
    assert removed == [topology.describe(node) for node in topology.dead_blocks()]
    kept = {name for name in small.state_dict() if name.startswith("layer")}
    live = {topology.describe(node) for node in topology.live() if node.index}
    assert {".".join(name.split(".")[:2]) for name in kept} == live


def test_every_parameter_that_is_left_changes_the_output():
    model = wired_resnet(fan_in=1)
    small = mcdeploy.compile_model(model, images(7, 16)).requires_grad_(True)
    small(images(7, 16)).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in small.parameters())


def test_a_chain_becomes_a_plain_sequential_and_its_keys_stay():
    model = wired_resnet("chain")
    keys = list(model.state_dict())
    assert unwrap_chains(model) == ["layer1", "layer2", "layer3"]
    assert type(model.layer1) is nn.Sequential
    assert list(model.state_dict()) == keys
    assert unwrap_chains(model) == []


def test_a_stage_that_another_stage_reads_stays_wired():
    model = wired_resnet("all", scope="network")
    assert unwrap_chains(model) == []


def test_single_inputs_pass_through_without_an_operation():
    x = images(1, 4)
    assert FixedEdges([1], "mean")(0, [x]) is x


def test_folding_is_algebra_within_1e_10_in_float64():
    model = small_resnet().double()
    small = copy.deepcopy(model)
    folded = fold_batch_norms(small, find_foldable(small, images(2, 16).double()))
    assert len(folded) == 1 + 2 * 12
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    assert 0 < check_close(model, small, images(3, 16).double(), "fold", "scrambled").max_relative < 1e-10


def test_folding_keeps_the_activation_of_timms_norm():
    model = timm_model("mobilenetv2_050").double()
    small = copy.deepcopy(model)
    assert fold_batch_norms(small, find_foldable(small, images(2, 64).double()))
    assert check_close(model, small, images(2, 64).double(), "fold", "scrambled").max_relative < 1e-10


class TwoReaders(nn.Module):
    """The convolution is read by its BN and by the sum, so it must not be folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return (y + self.bn(y)).mean((2, 3))


class UsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(self.bn(self.conv(x)))).mean((2, 3))


class TwoNames(nn.Module):
    """One convolution under two names; the second is not used."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.again = self.conv

    def forward(self, x):
        return self.bn(self.conv(x)).mean((2, 3))


WEIGHT_NORM = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
NO_STATISTICS = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
STAYS = [TwoReaders(), UsedTwice(), TwoNames(), WEIGHT_NORM, NO_STATISTICS, nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))]


@pytest.mark.parametrize("model", STAYS, ids=range(len(STAYS)))
def test_a_norm_that_is_not_alone_behind_one_convolution_stays(model):
    assert find_foldable(model.eval(), images(2, 8)) == ()


@settings(max_examples=8, deadline=None)
@given(topologies((4, 4, 4)))
def test_compiling_twice_changes_nothing_whatever_the_wiring(topology):
    model = wired_resnet("all")
    fix(model, topology)
    chains = copy.deepcopy(model)
    drop_dead_blocks(chains)
    unwrap_chains(chains)
    if wired_stages(chains):
        left = topology_of(chains)
        assert [stage.name for stage in left.stages] == list(wired_stages(chains))
        assert drop_dead_blocks(chains) == unwrap_chains(chains) == []
    with torch.no_grad():
        assert torch.equal(chains(images(2, 16)), model(images(2, 16)))


def test_the_first_stage_a_chain_and_the_later_ones_not_can_be_compiled_twice():
    model = wired_resnet("all")
    current = topology_of(model)
    first = StageWiring("layer1", current.stages[0].blocks, chain_reads(0, 4))
    fix(model, Topology((first, *current.stages[1:])))
    once = mcdeploy.compile_model(model, images(7, 16))
    twice = mcdeploy.compile_model(once, images(7, 16))
    assert list(wired_stages(once)) == list(wired_stages(twice)) == ["layer2", "layer3"]
    with torch.no_grad():
        assert torch.equal(once(images(2, 16)), twice(images(2, 16)))


def test_compiling_twice_leaves_nothing_to_remove():
    small = mcdeploy.compile_model(wired_resnet(fan_in=1), images(7, 16))
    again, certificate = compile_with_certificate(small, images(7, 16))
    assert certificate.removed == {}
    assert list(again.state_dict()) == list(small.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images(2, 16)), small(images(2, 16)))


def test_the_certificate_says_what_went_and_that_both_checks_passed_on_scrambled_statistics_too():
    model = wired_resnet(fan_in=1)
    dead = [topology_of(model).describe(node) for node in topology_of(model).dead_blocks()]
    small, certificate = compile_with_certificate(model, images(7, 16))
    assert dead
    assert certificate.removed["dead: no stage output depends on it"] == dead
    assert {(check.step, check.bn) for check in certificate.checks} == {
        ("freeze", "as trained"),
        *((step, bn) for step in ("prune", "fold") for bn in ("as trained", "scrambled")),
    }
    assert certificate.parameters == (count_parameters(small_resnet()), count_parameters(small))
    assert certificate.macs[1] == count_macs(small, images(1, 16)) < certificate.macs[0]
    assert certificate.macs[0] == count_macs(small_resnet(), images(1, 16))


def test_a_compiled_model_is_plain_and_leaves_the_given_one_alone():
    model = wired_resnet(fan_in=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = mcdeploy.compile_model(model, images(7, 16))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert any(isinstance(module, MaskEdges) for module in model.modules())
    assert not any(isinstance(module, MaskEdges) for module in small.modules())
    assert not any("gate" in name or "mask" in name for name in small.state_dict())


def test_a_changed_weight_is_caught():
    model, other = small_resnet(), small_resnet()
    other.layer2[1].conv1.weight.data[0, 0, 0, 0] += 1e-3
    with pytest.raises(ParityError, match="must be bit-equal"):
        check_equal(model, other, images(2, 16), "prune", "as trained")
    with pytest.raises(ParityError, match="allowed is 1e-10"):
        check_close(model.double(), other.double(), images(2, 16).double(), "fold", "as trained")


def test_nan_is_an_error_not_a_difference():
    model, other = small_resnet(), small_resnet()
    other.bn1.bias.data.fill_(float("nan"))
    with pytest.raises(ParityError, match="NaN"):
        check_equal(model, other, images(2, 16), "prune", "as trained")


def test_a_fresh_residual_block_hides_mistakes_until_it_is_scrambled():
    import timm

    fresh = timm.create_model("resnet18", num_classes=10).eval()
    broken = copy.deepcopy(fresh)
    broken.layer1[1].conv1.weight.data.zero_()
    with torch.no_grad():
        assert torch.equal(fresh(images(2, 64)), broken(images(2, 64)))  # gamma is 0: nothing shows
        scramble(fresh)
        scramble(broken)
        assert not torch.equal(fresh(images(2, 64)), broken(images(2, 64)))


class HandWritten(nn.Module):
    """The static net of wiring [[0], [1], [0, 2]] with block 3 of 4 gone, written by hand."""

    def __init__(self, source):
        super().__init__()
        self.blocks = nn.ModuleList(source)

    def forward(self, x):
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        return self.blocks[2]((x + second) / 2)


def test_a_compiled_stage_equals_the_same_net_written_by_hand():
    model = wired_resnet("all")
    stages = list(topology_of(model).stages)
    node = type(stages[0].reads[0][0])
    reads = ((node(0, 0),), (node(0, 1),), (node(0, 0),), (node(0, 0), node(0, 2)))
    stages[0] = type(stages[0])("layer1", stages[0].blocks, reads)
    fix(model, type(topology_of(model))(tuple(stages), "mean"))
    drop_dead_blocks(model)
    stage = wired_stages(model)["layer1"]
    hand = HandWritten([stage[0], stage[1], stage[2]])
    assert isinstance(stage, WiredStage)
    assert stage.block_names == ("0", "1", "3")
    x = torch.randn(2, 8, 16, 16)
    with torch.no_grad():
        assert torch.equal(hand(x), stage(x))
    assert count_parameters(hand) == count_parameters(stage)


def test_freezing_names_the_stages_that_had_gates_and_twice_is_once():
    model = wired_resnet(fan_in=1)
    assert freeze(model) == ["layer1", "layer2", "layer3"]
    assert freeze(model) == []


@pytest.mark.parametrize(("name", "size"), [("test_convnext", 64), ("mobilenetv2_050", 64), ("test_vit", 160)])
def test_other_families_train_a_step_and_compile(name, size):
    model = mcdeploy.wire(timm_model(name), "maskconnect", fan_in=1, image_size=size)
    train_a_step(model, images(4, size))
    small, certificate = compile_with_certificate(model, images(4, size))
    assert count_parameters(small) <= certificate.parameters[0]
