import pytest
import torch
from hypothesis import given, settings
from strategies import topologies
from tiny_models import images, small_resnet, timm_model, wired_resnet
from torch import nn

import mcdeploy
from mcdeploy.backbones.cifar_resnet import BasicBlock
from mcdeploy.connectivity.topology import Node, StageWiring, Topology, chain_reads
from mcdeploy.connectivity.wiring import fix, topology_of, wired_stages
from mcdeploy.errors import RecipeError, WiringError
from mcdeploy.model import wire_model
from mcdeploy.recipe import parse_connectivity

# Small variants where timm has them; acceptance point 3 of the spine.
BACKBONES = {
    "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64, "mobilenetv2_100": 64, "efficientnet_b0": 64,
    "regnety_002": 64, "test_convnext": 64, "convnext_tiny": 64, "test_vit": 160, "vit_tiny_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224, "darknet53": 64, "mixer_s16_224": 224,
}  # fmt: skip


@pytest.mark.parametrize(("name", "size"), BACKBONES.items())
def test_wired_as_a_chain_a_model_is_bit_identical_with_the_same_keys(name, size):
    model = timm_model(name)
    keys, batch = list(model.state_dict()), images(2, size)
    with torch.no_grad():
        expected = model(batch)
        wired = mcdeploy.wire(model, "chain", image_size=size)
        assert torch.equal(wired(batch), expected)
    assert list(wired.state_dict()) == keys
    assert len(wired_stages(wired)) >= 1


@pytest.mark.parametrize("rule", ["all", "random"])
def test_a_wired_stage_joins_what_its_topology_says(rule):
    options = {"fan_in": 2, "wiring_seed": 3} if rule == "random" else {}
    model = wired_resnet(rule, aggregate="sum", **options)
    stage, wiring = wired_stages(model)["layer1"], topology_of(model).stages[0]
    x = images(2, 16).repeat(1, 3, 1, 1)[:, :8]
    outputs = [x]
    for block, reads in zip(stage, wiring.reads, strict=True):
        outputs.append(block(sum(outputs[node.index] for node in reads)))
    assert torch.allclose(stage(x), outputs[-1], rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(topologies((4, 4, 4), across=False))
def test_a_block_turned_to_nan_shows_in_the_output_exactly_when_it_is_live(topology):
    model = wired_resnet("all")
    fix(model, topology)
    live = topology.live()
    for node in topology.edges():
        block = wired_stages(model)[topology.stages[node.stage].name][node.index - 1]
        weight = block.bn2.bias.data.clone()
        block.bn2.bias.data.fill_(float("nan"))
        with torch.no_grad():
            assert bool(torch.isnan(model(images(1, 16))).any()) == (node in live)
        block.bn2.bias.data.copy_(weight)


def test_network_scope_reads_across_stages_and_keeps_nothing_after_the_forward():
    model = wired_resnet("all", scope="network")
    stage = wired_stages(model)["layer3"]
    assert any(source.node.stage == 0 for source in stage.sources[1])
    with torch.no_grad():
        first, second = model(images(2, 16)), model(images(2, 16))
    assert torch.equal(first, second)
    assert stage.tape is not None
    assert not stage.tape.features


def test_random_wiring_depends_on_its_seed_alone():
    one, same, other = (topology_of(wired_resnet("random", fan_in=2, wiring_seed=s)) for s in (1, 1, 2))
    assert one == same
    assert one != other
    assert all(len(reads) <= 2 for reads in one.edges().values())


def test_a_topology_can_be_put_back_on_a_fresh_backbone():
    wired = wired_resnet("random", fan_in=2, scope="network")
    fresh = small_resnet()
    wire_model(fresh, parse_connectivity("random", fan_in=2, scope="network"), 16, topology_of(wired))
    fresh.load_state_dict(wired.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(images(2, 16)), wired(images(2, 16)))


def test_a_wired_stage_can_still_be_walked_like_a_sequential():
    stage = wired_stages(wired_resnet("all"))["layer2"]
    assert len(stage) == 4
    assert list(stage) == [stage[i] for i in range(4)]


def topology(name="layer1", blocks=4, reads=None):
    return Topology((StageWiring(name, tuple(map(str, range(blocks))), reads or chain_reads(0, blocks)),))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (topology("nowhere"), "the topology wires"),
        (topology("layer1", 3), "the topology wires"),
    ],
)
def test_a_topology_of_another_model_is_refused(wrong, message):
    with pytest.raises(WiringError, match=message):
        fix(wired_resnet("all"), wrong)


def test_a_source_whose_shape_does_not_fit_is_refused():
    model = wired_resnet("all")
    current = topology_of(model)
    reads = (*current.stages[2].reads[:1], (Node(2, 0),), *current.stages[2].reads[2:])
    wrong = Topology((*current.stages[:2], StageWiring("layer3", current.stages[2].blocks, reads)))
    with pytest.raises(WiringError, match="does not fit"):
        fix(model, wrong)


def test_unknown_rules_and_models_with_nothing_to_choose_are_refused():
    with pytest.raises(RecipeError, match="unknown rule 'dense'"):
        mcdeploy.wire(small_resnet(), "dense")
    with pytest.raises(WiringError, match="no wirable stage"):
        mcdeploy.wire(timm_model("densenet121"), "all", image_size=64)
    blocks = nn.Sequential(BasicBlock(3, 8, 2), BasicBlock(8, 8, 1))  # the second has only the first to read
    with pytest.raises(WiringError, match="nothing to wire"):
        mcdeploy.wire(nn.Sequential(nn.Conv2d(3, 3, 1), blocks), "all", image_size=16)
    plain = mcdeploy.wire(timm_model("densenet121"), "chain", image_size=64)  # "as it is" needs nothing to wire
    assert topology_of(plain) == Topology(())


def test_dropped_blocks_are_stepped_over_and_die():
    model = wired_resnet("drop", blocks=["layer1.1", "layer1.2", "layer3.2"])
    topology = topology_of(model)
    assert [topology.describe(node) for node in topology.dead_blocks()] == ["layer1.1", "layer1.2", "layer3.2"]
    plain = small_resnet()
    for stage, blocks in (("layer1", (0, 3)), ("layer3", (0, 1, 3))):
        plain.set_submodule(stage, nn.Sequential(*(plain.get_submodule(f"{stage}.{i}") for i in blocks)))
    with torch.no_grad():
        assert torch.equal(model(images(2, 16)), plain(images(2, 16)))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("layer1.3", "keep it"),
        ("layer3.0", "of another shape"),
        ("layer9.1", "no wirable stage has a block 'layer9.1'"),
    ],
)
def test_blocks_that_cannot_be_dropped_are_refused(block, message):
    with pytest.raises(WiringError, match=message):
        wired_resnet("drop", blocks=[block])
