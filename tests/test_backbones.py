"""The CIFAR ResNets: the paper's sizes, the given weights' keys, timm's interface."""

import warnings

import pytest
import timm
import torch
from torch import nn

import mcdeploy.backbones  # noqa: F401 - registers the nets
from mcdeploy.backbones.cifar_resnet import BasicBlock, CifarResNet, SubsampleAndPad

DEPTHS = {"resnet20_cifar": 3, "resnet32_cifar": 5, "resnet44_cifar": 7, "resnet56_cifar": 9, "resnet110_cifar": 18}


def scrambled(name: str, **kwargs):
    return scramble(timm.create_model(name, **kwargs))


def scramble(model):
    """Move every parameter and buffer off its default; evaluation mode."""
    torch.manual_seed(0)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.add_(0.1 * torch.randn_like(value))
                if key.endswith("running_var"):
                    value.abs_()
    return model.eval()


def batch_norm_keys(name: str) -> list[str]:
    return [f"{name}.{key}" for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet20_cifar", 269_722),
        ("resnet32_cifar", 464_154),
        ("resnet44_cifar", 658_586),
        ("resnet56_cifar", 853_018),
        ("resnet110_cifar", 1_727_962),
    ],
)
def test_the_nets_have_the_papers_number_of_parameters(name, count):
    assert sum(p.numel() for p in timm.create_model(name).parameters()) == count


def test_resnet20_has_the_keys_of_the_published_weights():
    keys = ["conv1.weight", *batch_norm_keys("bn1")]
    for stage in (1, 2, 3):
        for block in (0, 1, 2):
            for part in (1, 2):
                at = f"layer{stage}.{block}"
                keys += [f"{at}.conv{part}.weight", *batch_norm_keys(f"{at}.bn{part}")]
    keys += ["linear.weight", "linear.bias"]
    assert list(timm.create_model("resnet20_cifar").state_dict()) == keys


@pytest.mark.parametrize(("name", "num_blocks"), [*DEPTHS.items(), ("resnet_digits", 4)])
def test_a_stage_is_a_sequential_of_blocks(name, num_blocks):
    model = timm.create_model(name)
    for stage in (model.layer1, model.layer2, model.layer3):
        assert type(stage) is nn.Sequential
        assert [type(block) for block in stage] == [BasicBlock] * num_blocks
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == 6 * num_blocks + 2  # the depth counts the head


@pytest.mark.parametrize(("name", "size"), [("resnet20_cifar", 32), ("resnet_digits", 16)])
def test_the_default_size_gives_the_shapes_of_the_paper(name, size):
    model = timm.create_model(name)
    images = torch.randn(2, *model.pretrained_cfg["input_size"])
    assert images.shape[-1] == size
    features = model.forward_features(images)
    assert features.shape == (2, 64, size // 4, size // 4)
    assert model.forward_head(features, pre_logits=True).shape == (2, 64)
    assert model(images).shape == (2, 10)


def test_features_then_head_is_the_whole_net():
    model, images = scrambled("resnet20_cifar"), torch.randn(3, 3, 32, 32)
    assert torch.equal(model.forward_head(model.forward_features(images)), model(images))


def test_option_a_takes_every_second_pixel_between_zero_channels():
    x = torch.randn(1, 4, 6, 6)
    y = SubsampleAndPad(4, 8, stride=2)(x)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2])
    assert y.shape == (1, 8, 3, 3)
    assert y[:, :2].abs().sum() + y[:, 6:].abs().sum() == 0


def test_an_odd_number_of_new_channels_is_padded_to_the_full_width():
    assert SubsampleAndPad(4, 9, stride=1)(torch.randn(1, 4, 2, 2)).shape == (1, 9, 2, 2)


@pytest.mark.parametrize("train", [True, False])
def test_a_block_leaves_its_input_as_it_was(train):
    model = scrambled("resnet20_cifar").train(train)
    for block, channels in ((model.layer1[0], 16), (model.layer2[0], 16), (model.layer2[1], 32)):
        x = torch.randn(2, channels, 8, 8)
        before = x.clone()
        block(x)
        assert torch.equal(x, before)


def test_the_classifier_can_be_replaced_and_left_out():
    model = timm.create_model("resnet20_cifar", num_classes=7, in_chans=1)
    images = torch.randn(2, 1, 32, 32)
    assert model(images).shape == (2, 7)
    assert model.get_classifier() is model.linear
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    assert model.num_classes == 3
    model.reset_classifier(0)
    assert model(images).shape == (2, 64)
    assert timm.create_model("resnet20_cifar", num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, 64)


def test_timm_finds_the_feature_maps():
    model = timm.create_model("resnet20_cifar", features_only=True)
    shapes = [tuple(x.shape[1:]) for x in model(torch.randn(1, 3, 32, 32))]
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert model.feature_info.channels() == [16, 32, 64]
    assert model.feature_info.reduction() == [1, 2, 4]


def test_dropout_before_the_head_works_only_in_training():
    model = scrambled("resnet20_cifar", drop_rate=0.5)
    features = torch.rand(2, 64, 8, 8)
    assert torch.equal(model.forward_head(features), model.linear(features.mean((2, 3))))
    model.train()
    assert not torch.equal(model.forward_head(features), model.forward_head(features))


def test_the_net_starts_as_he_et_al_2015_say():
    torch.manual_seed(0)
    weight = timm.create_model("resnet20_cifar").layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


def test_torch_export_keeps_the_batch_dynamic():
    model = scramble(CifarResNet(num_blocks=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # inside torch.export
        program = torch.export.export(
            model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    for count in (1, 2, 3, 7):
        images = torch.randn(count, 3, 16, 16)
        torch.testing.assert_close(program.module()(images), model(images))
