import pytest
import timm
import torch
from timm.layers import BlurPool2d
from timm.models.resnet import Bottleneck, ResNet
from tiny_models import images
from torch import nn

import mcdeploy
import mcdeploy.backbones  # registers the nets
from mcdeploy.backbones.multibranch import BranchModule, MultiBranchNet, as_branches
from mcdeploy.compile.certify import scramble
from mcdeploy.connectivity.stages import find_stages

CIFAR = ("multibranch20_8x4d_cifar", "multibranch29_8x8d_cifar", "multibranch29_8x64d_cifar")


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def with_one_norm_a_module(model):
    """What a net has when, as in ResNeXt, one BN stands behind the sum of the branches."""
    return count(model) - sum(2 * (m.num_branches - 1) * m.out_channels for m in model.trunk)


def tiny(**options):
    torch.manual_seed(0)
    return MultiBranchNet(**{"num_modules": (2, 1), "num_branches": 4, "width": 2, "channels": 8, **options})


# papers.md 1e: 0.28 M and 0.86 M with one BN a branch, 0.27 M and 0.84 M with one a module, all for 100 classes; 34.4 M
# is ResNeXt's own count, one BN a module and 10 classes
@pytest.mark.parametrize(
    ("name", "classes", "by_branch", "by_module"),
    [
        ("multibranch20_8x4d_cifar", 100, 285_348, 272_804),
        ("multibranch20_8x4d_cifar", 10, 262_218, 249_674),
        ("multibranch29_8x8d_cifar", 100, 861_604, 842_788),
        ("multibranch29_8x64d_cifar", 10, 34_501_962, 34_426_698),
        ("multibranch29_8x64d_cifar", 100, 34_594_212, 34_518_948),
    ],
)
def test_the_cifar_nets_have_the_papers_number_of_parameters(name, classes, by_branch, by_module):
    model = on_meta(name, num_classes=classes)
    assert count(model) == by_branch
    assert with_one_norm_a_module(model) == by_module


def test_the_count_of_the_smallest_net_by_hand():
    def module(before, after, width):
        inner, outer = 8 * width, 8 * after
        weights = before * inner + 9 * inner * width + width * outer
        shortcut = 0 if before == after else before * after + 2 * after
        return weights + 2 * (inner + inner + outer) + shortcut

    stem, head = 27 * 64 + 2 * 64, 256 * 100 + 100
    pairs = [(64, 64, 4), (64, 64, 4), (64, 128, 8), (128, 128, 8), (128, 256, 16), (256, 256, 16)]
    by_hand = stem + sum(module(*pair) for pair in pairs) + head
    assert count(on_meta("multibranch20_8x4d_cifar", num_classes=100)) == by_hand


@pytest.mark.parametrize(
    ("name", "resnext"),
    [
        ("multibranch50_32x4d", "resnext50_32x4d"),
        ("multibranch101_32x4d", "resnext101_32x4d"),
        ("multibranch101_64x4d", "resnext101_64x4d"),
    ],
)
def test_an_imagenet_net_has_as_many_parameters_as_the_resnext_of_its_name(name, resnext):
    assert with_one_norm_a_module(on_meta(name)) == count(on_meta(resnext))


@pytest.mark.parametrize(("name", "depth"), [(CIFAR[0], 20), (CIFAR[1], 29), (CIFAR[2], 29)])
def test_the_depth_is_two_more_than_three_times_the_modules(name, depth):
    modules = on_meta(name).trunk
    assert depth == 2 + 3 * len(modules)
    assert len(modules) == {20: 6, 29: 9}[depth]


def resnext(**options):
    """timm's own ResNeXt, small, scrambled, float64: 7x7 stem, stages of 2 and 1 blocks, 4 branches, widths 2 and 4."""
    torch.manual_seed(0)
    shape = {"layers": (2, 1), "channels": (2, 4), "cardinality": 4, "base_width": 64, "num_classes": 10}
    model = ResNet(Bottleneck, **{**shape, **options}).double()
    model.layer3 = model.layer4 = nn.Identity()
    scramble(model)
    return model.eval()


def test_the_plain_net_is_timms_resnext_of_the_same_weights():
    theirs = resnext()
    ours = tiny(stem="imagenet").double().eval()
    for name in ("conv1", "bn1", "fc"):
        ours.get_submodule(name).load_state_dict(theirs.get_submodule(name).state_dict())
    blocks = [*theirs.layer1, *theirs.layer2]
    for module, block in zip(ours.trunk, blocks, strict=True):
        module.load_state_dict(as_branches(block).state_dict())
    x = images(3, 32).double()
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), rtol=1e-10, atol=1e-12)
        assert torch.allclose(mcdeploy.compile_model(ours, x)(x), theirs(x), rtol=1e-10, atol=1e-12)


def test_a_block_with_a_nearly_constant_channel_is_taken_apart_exactly():
    block = resnext().layer1[1]
    block.bn3.running_var[:3] = 1e-7
    x = images(2, 8).double().repeat(1, 3, 1, 1)[:, :8].relu()
    module = as_branches(block)
    assert bool((module.bn3.running_var > 0).all())
    with torch.no_grad():
        assert torch.allclose(module(x), block(x.clone()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"cardinality": 1},
        {"block_args": {"attn_layer": "se"}},
        {"act_layer": nn.SiLU},
        {"avg_down": True},
        {"aa_layer": BlurPool2d},
        {"drop_path_rate": 0.1},
    ],
)
def test_blocks_with_more_in_them_than_resnext_are_not_taken_apart(options):
    theirs = resnext(**options)
    assert None in [as_branches(block) for block in (*theirs.layer1, *theirs.layer2)]


def test_each_branch_alone_sums_to_the_module():
    """Grouped convolutions against a loop over branches, in float64 and training mode."""
    module = BranchModule(6, 8, 3, num_branches=4, stride=2).double()
    scramble(module)
    x = images(3, 8).double().repeat(1, 2, 1, 1)
    total = module.downsample(x)
    for k in range(4):
        alone = module.with_branches([k]).train()
        assert alone.num_branches == 1
        total = total + alone.residuals(x)
    assert torch.allclose(module.train()(x), total.relu(), rtol=1e-10, atol=1e-12)


def test_private_inputs_go_through_the_same_weights():
    module = BranchModule(6, 8, 3, num_branches=4, stride=2).double().eval()
    scramble(module)
    keys, weight = list(module.state_dict()), module.conv1.weight
    x = images(2, 8).double().repeat(1, 2, 1, 1)
    shared = module.residuals(x), module.identities(x)
    module.set_inputs(shared=False)
    assert list(module.state_dict()) == keys
    assert module.conv1.weight is weight
    assert not module.conv1.training
    each = x.repeat(1, 4, 1, 1)
    assert torch.allclose(module.residuals(each), shared[0], rtol=1e-10, atol=1e-12)
    assert torch.allclose(module.identities(each), shared[1].repeat(1, 4, 1, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_only_some_branches_leaves_the_statistics_of_the_others_alone(momentum):
    module = BranchModule(3, 3, 2, num_branches=4)
    for norm in (module.bn1, module.bn2, module.bn3):
        norm.momentum = momentum
    kept = (1, 3)
    small = module.with_branches(kept).train()
    for norm in (small.bn1, small.bn2, small.bn3):
        norm.momentum = momentum
    before = module.bn3.running_mean.clone()
    for seed in (0, 1):
        x = images(4, 8, seed)
        assert torch.equal(module.train().residuals(x, kept), small.residuals(x))
    for name in ("bn1", "bn2", "bn3"):
        ours, theirs = module.get_submodule(name), small.get_submodule(name)
        for key in ("running_mean", "running_var"):
            assert torch.equal(module._rows(getattr(ours, key), kept), getattr(theirs, key))
    assert torch.equal(module.bn3.running_mean[:3], before[:3])
    assert not torch.equal(module.bn3.running_mean[3:6], before[3:6])


def test_the_trunk_is_one_stage_for_the_rules_that_wire_blocks():
    model = tiny(num_modules=(3, 2)).eval()
    (stage,) = find_stages(model, images(2, 16))
    assert (stage.name, stage.blocks) == ("trunk", ("0", "1", "2", "3", "4"))
    wired = mcdeploy.wire(model, "maskconnect", fan_in=1, image_size=16)
    assert mcdeploy.topology_of(wired).stages[0].blocks == stage.blocks


def test_timm_builds_features_and_other_heads():
    features = timm.create_model("multibranch20_8x4d_cifar", features_only=True, channels=8, num_branches=2)
    assert [tuple(x.shape[1:]) for x in features(images(2, 16))] == [(8, 16, 16), (16, 8, 8), (32, 4, 4)]
    assert features.feature_info.channels() == [8, 16, 32]
    assert features.feature_info.reduction() == [1, 2, 4]
    model = tiny(num_classes=0)
    assert model(images(2, 16)).shape == (2, 16)
    model.reset_classifier(7)
    assert model(images(2, 16)).shape == (2, 7)
    assert isinstance(model.get_classifier(), nn.Linear)
    large = tiny(stem="imagenet", in_chans=1)
    assert large.forward_features(torch.zeros(1, 1, 64, 64)).shape == (1, 16, 8, 8)


def test_dropout_before_the_head_acts_in_training_only():
    model = tiny(drop_rate=0.5)
    features = model.eval().forward_features(images(2, 16))
    assert torch.equal(model.forward_head(features), model.forward_head(features))
    assert not torch.equal(model.train().forward_head(features), model.forward_head(features))
