import copy
import random

import numpy as np
import onnx
import pytest
import timm
import torch
import torch.nn.functional as F
from mcruntime.engine import OnnxRunner
from tiny_models import images
from torch import nn

import mcdeploy
from mcdeploy.backbones.nnmass_cells import CellNet, Pick, draw_links, num_skips
from mcdeploy.backends.onnx import export_onnx
from mcdeploy.compile.certify import scramble
from mcdeploy.compile.fold import find_foldable, fold_batch_norms
from mcdeploy.compile.prune import count_parameters
from mcdeploy.connectivity.nnmass import nn_mass_of_model

SHAPE = {"widths": (4, 6, 8), "depths": (5, 4, 5), "skips": (6, 7, 10), "img_size": 16}


def tiny(**options):
    torch.manual_seed(0)
    model = timm.create_model("nnmass_cells", **{**SHAPE, **options})
    scramble(model)
    return model.eval()


def bare(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "nnmass_cells_depthwise": 867_656,  # the published log
        "nnmass_cells": 4_653_192,  # the same cells with 3x3 convolutions, by count
        "nnmass_mobilenet_a": 3_701_560, "nnmass_mobilenet_b": 2_295_160, "nnmass_mobilenet": 3_504_872,
    }.items(),
)  # fmt: skip
def test_parameter_counts(name, parameters):
    assert count_parameters(bare(name)) == parameters


def test_parameter_counts_of_the_paper_to_its_two_decimals():
    millions = [round(count_parameters(bare(f"nnmass_mobilenet_{net}")) / 1e6, 2) for net in "ab"]
    assert millions == [3.70, 2.30]
    wide = bare("nnmass_mobilenet", depths=(2, 3, 4, 5, 4, 3, 1), width=1.1)
    assert round(count_parameters(wide) / 1e6, 2) == 4.30


def test_our_mobilenet_is_timms_mobilenet_v2():
    ours, theirs = timm.create_model("nnmass_mobilenet"), timm.create_model("mobilenetv2_100")
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(ours.eval()(images(2, 64)), theirs.eval()(images(2, 64)))


def test_a_layer_reads_as_many_channels_as_the_paper_says_and_only_of_layers_two_before():
    for seed in range(5):
        links = draw_links(8, 12, 20, random.Random(seed))
        for layer, row in enumerate(links):
            assert sum(map(len, row)) == num_skips(8, layer, 20) == (min(8 * (layer - 1), 20) if layer >= 2 else 0)
            assert len(row) == max(layer - 1, 0)  # layers 0 .. i-2: never the direct input, always layer 0
            assert all(0 <= channel < 8 for channels in row for channel in channels)
            assert all(list(channels) == sorted(set(channels)) for channels in row)


def test_every_earlier_channel_is_as_likely_as_every_other():
    counts = np.zeros(3 * 4)
    for seed in range(3000):
        row = draw_links(4, 5, 5, random.Random(seed))[4]
        for source, channels in enumerate(row):
            counts[[4 * source + channel for channel in channels]] += 1
    assert counts.sum() == 3000 * 5
    assert np.abs(counts / 3000 - 5 / 12).max() < 0.04


def test_the_draw_is_the_same_on_every_machine_and_leaves_the_global_generator_alone():
    state = random.getstate()
    links = draw_links(4, 5, 5, random.Random(0))
    assert random.getstate() == state
    assert links == ((), (), ((0, 1, 2, 3),), ((0, 3), (0, 1, 2)), ((0, 1), (1, 3), (2,)))


def test_the_wiring_is_rebuilt_from_the_seed_and_is_no_part_of_the_weights():
    model = tiny(wiring_seed=3)
    again, other = tiny(wiring_seed=3), tiny(wiring_seed=4)
    assert not [key for key in model.state_dict() if "index" in key]
    for net in (again, other):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(0.5)
        net.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(images(3, 16)), again(images(3, 16)))
        assert not torch.allclose(model(images(3, 16)), other(images(3, 16)))
    assert torch.equal(copy.deepcopy(model)(images(3, 16)), model(images(3, 16)))


def test_links_are_whole_maps_slices_or_gathers():
    x = images(2, 4).repeat(1, 2, 1, 1)
    for channels, kind in (((0, 1, 2, 3, 4, 5), "whole"), ((2, 3, 4), "slice"), ((0, 2, 5), "gather")):
        pick = Pick(channels, 6)
        assert torch.equal(pick(x), x[:, list(channels)])
        assert (pick(x) is x) == (kind == "whole")
        assert (pick.index_K is not None) == (kind == "gather")


class HandWritten(nn.Module):
    """``tiny()`` as a person would write it, from the same parts and with the drawn channels as plain numbers."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.rows = [
            [[(source, channels) for source, channels in enumerate(row) if channels] for row in cell.links]
            for cell in net.cells
        ]
        for c, rows in enumerate(self.rows):
            for i, row in enumerate(rows):
                for source, channels in row:
                    self.register_buffer(f"take_{c}_{i}_{source}", torch.tensor(channels), persistent=False)

    def forward(self, x):
        net = self.net
        x = net.stem[1](net.stem[0](x))
        for c, cell in enumerate(net.cells):
            s = [x if c == 0 else cell.first[1](cell.first[0](x))]
            one = cell.layers[0]
            s.append(one.norm(one.conv(F.relu(s[0]))))
            for i, layer in enumerate(cell.layers[1:], start=2):
                parts = [s[i - 1]]
                for source, channels in self.rows[c][i]:
                    width = s[source].shape[1]
                    if len(channels) == width:
                        parts.append(s[source])
                    elif channels[-1] - channels[0] + 1 == len(channels):
                        parts.append(s[source][:, channels[0] : channels[-1] + 1])
                    else:
                        parts.append(torch.index_select(s[source], 1, getattr(self, f"take_{c}_{i}_{source}")))
                s.append(layer.conv(F.relu(layer.norm(torch.cat(parts, 1)))))
            x = s[-1]
        return net.linear(F.avg_pool2d(x, 2).flatten(1))


@pytest.mark.parametrize("conv", ["plain", "depthwise"])
def test_the_compiled_net_is_the_one_written_by_hand(tmp_path, conv):
    shape = {"widths": (6, 4), "depths": (5, 3), "skips": (7, 3), "conv": conv}
    net = tiny(**shape)
    small = mcdeploy.compile_model(mcdeploy.wire(tiny(**shape), "chain", image_size=16), images(7, 16))
    hand = HandWritten(copy.deepcopy(net))
    with torch.no_grad():
        assert torch.equal(hand(images(3, 16)), net(images(3, 16)))
        assert torch.allclose(small(images(3, 16)), net(images(3, 16)), rtol=1e-4, atol=1e-4)
    fold_batch_norms(hand, find_foldable(hand, images(2, 16)))
    assert count_parameters(small) == count_parameters(hand) < count_parameters(net)
    export_onnx(small, tmp_path / "ours.onnx", images(2, 16))
    export_onnx(hand, tmp_path / "hand.onnx", images(2, 16))
    ours, by_hand = (sorted(n.op_type for n in onnx.load(tmp_path / f).graph.node) for f in ("ours.onnx", "hand.onnx"))
    assert ours == by_hand
    assert ours.count("Conv") == 1 + (5 + 3 - 1) * (1 if conv == "plain" else 3)
    assert ours.count("Concat") == (5 - 2) + (3 - 2)
    picks = [module for module in net.modules() if isinstance(module, Pick)]
    assert ours.count("Gather") == sum(pick.index_K is not None for pick in picks) > 0
    with OnnxRunner(tmp_path / "ours.onnx") as runner, torch.no_grad():
        for batch in (1, 2, 3, 7):
            expected = net(images(batch, 16)).numpy()
            assert np.abs(runner.infer(images(batch, 16).numpy()) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_no_skips_is_a_plain_chain_and_all_skips_a_densenet_cell():
    plain = tiny(skips=(0, 0, 0))
    assert not [module for module in plain.modules() if isinstance(module, Pick)]
    assert nn_mass_of_model(plain).total() == 0
    dense = tiny(skips=(999, 999, 999))
    assert nn_mass_of_model(dense).total() == 4 * 5 + 6 * 4 + 8 * 5
    assert all(pick.is_whole for pick in dense.modules() if isinstance(pick, Pick))
    assert [layer.conv.in_channels for layer in dense.cells[0].layers] == [4, 8, 12, 16]


def test_batch_norms_train_and_every_parameter_gets_a_gradient():
    for conv in ("plain", "depthwise"):
        model = tiny(conv=conv).train()
        before = {key: value.clone() for key, value in model.state_dict().items() if "running_mean" in key}
        model(images(4, 16)).square().mean().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
        assert all(not torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_the_published_head_sees_16_numbers_a_channel_and_the_global_one_a_single_one():
    assert bare("nnmass_cells").linear.in_features == 16 * 128
    assert bare("nnmass_cells", head="global").linear.in_features == 128
    model = tiny(head="global")
    with torch.no_grad():
        features = model.forward_features(images(2, 16))
        assert torch.allclose(model(images(2, 16)), model.linear(features.mean((2, 3))), atol=1e-5)


def test_it_behaves_like_a_timm_model():
    model = tiny(num_classes=7)
    assert model(images(2, 16)).shape == (2, 7)
    model.reset_classifier(5)
    assert model(images(2, 16)).shape == (2, 5)
    model.reset_classifier(0)
    assert model(images(2, 16)).shape == (2, 8 * 4) == (2, model.head_hidden_size)
    model.reset_classifier(3, "avg")
    assert model(images(2, 16)).shape == (2, 3)
    maps = timm.create_model("nnmass_cells", features_only=True, **SHAPE)(images(2, 16))
    assert [tuple(x.shape[1:]) for x in maps] == [(4, 16, 16), (6, 8, 8), (8, 4, 4)]
    assert isinstance(model, CellNet)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skips": (1, 2)}, "one number a cell, got 3, 3 and 2"),
        ({"depths": (1, 4, 5)}, "a depth of at least 2"),
        ({"conv": "dense"}, "conv must be 'plain' or 'depthwise', got 'dense'"),
        ({"head": "big"}, "head must be 'flatten' or 'global'"),
        ({"img_size": 12}, "12 pixels cannot be halved 3 times; take a multiple of 8"),
    ],
)
def test_impossible_shapes_are_refused_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("nnmass_cells", **{**SHAPE, **options})


def test_wired_as_a_chain_it_is_bit_identical_and_keeps_its_keys():
    model, wired = tiny(), mcdeploy.wire(tiny(), "chain", image_size=16)
    with torch.no_grad():
        assert torch.equal(wired(images(3, 16)), model(images(3, 16)))
    assert list(wired.state_dict()) == list(model.state_dict())
