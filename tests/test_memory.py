"""Peak activation memory against sums done by hand: 4 bytes a number, a feature map of 8x8 numbers a channel."""

import pytest
import torch
from tiny_models import images, wired_resnet
from torch import nn

from mcdeploy.backbones.sparsenet import SparseNet
from mcdeploy.connectivity.wiring import fix, topology_of
from mcdeploy.memory import peak_activation_bytes

MAP = 4 * 8 * 8  # bytes of one channel of 8x8 float32


def conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class Of(nn.Module):
    """A forward written as a function of the image and the modules."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.written = forward

    def forward(self, x):
        return self.written(self, x)


def test_a_chain_needs_the_dearest_pair_of_neighbours():
    chain = nn.Sequential(conv(3, 4), conv(4, 10), conv(10, 2))
    assert peak_activation_bytes(chain, images(1, 8)) == (4 + 10) * MAP
    assert peak_activation_bytes(nn.Sequential(conv(3, 4), conv(4, 5), conv(5, 9)), images(1, 8)) == (5 + 9) * MAP


def test_the_image_counts_and_one_image_is_counted_whatever_the_batch():
    assert peak_activation_bytes(conv(3, 1), images(5, 8)) == (3 + 1) * MAP
    assert peak_activation_bytes(conv(3, 1).double(), images(5, 8).double()) == 2 * (3 + 1) * MAP


def test_weights_and_statistics_do_not_count():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 1, 3)).eval()
    assert peak_activation_bytes(model, images(1, 8)) == 4 * 64 * 6 * 6 * 2  # the BN's input and output


def test_a_skip_keeps_its_start_alive_until_it_is_added():
    model = Of(lambda m, x: (s := m.a(x)) + m.c(m.b(s)), a=conv(3, 6), b=conv(6, 5), c=conv(5, 6))
    # a(x), b and c of it: 6 + 5 + 6 while c runs; at the addition 6 + 6 and the 6 that come out
    assert peak_activation_bytes(model, images(1, 8)) == 18 * MAP
    wider = Of(lambda m, x: (s := m.a(x)) + m.c(m.b(s)), a=conv(3, 6), b=conv(6, 7), c=conv(7, 6))
    assert peak_activation_bytes(wider, images(1, 8)) == (6 + 7 + 6) * MAP


@pytest.mark.parametrize(("inplace", "maps"), [(True, 4 + 5), (False, 5 + 5)])
def test_an_operator_in_place_takes_no_new_buffer(inplace, maps):
    model = nn.Sequential(conv(3, 4), conv(4, 5), nn.ReLU(inplace=inplace), conv(5, 1))
    assert peak_activation_bytes(model, images(1, 8)) == maps * MAP


def test_views_share_the_buffer_and_keep_all_of_it_alive():
    flat = Of(lambda m, x: m.b(m.a(x).flatten(2).unflatten(2, (8, 8))), a=conv(3, 4), b=conv(4, 4))
    assert peak_activation_bytes(flat, images(1, 8)) == (4 + 4) * MAP
    half = Of(lambda m, x: m.b(m.a(x)[:, :1]), a=conv(3, 6), b=conv(1, 6))
    assert peak_activation_bytes(half, images(1, 8)) == (6 + 6) * MAP  # not 1 + 6: the slice is no copy
    parts = Of(lambda m, x: m.b(m.a(x).chunk(2, 1)[1]), a=conv(3, 6), b=conv(3, 6))
    assert peak_activation_bytes(parts, images(1, 8)) == (6 + 6) * MAP


def test_a_concatenation_is_a_new_buffer_beside_its_parts():
    model = Of(lambda m, x: torch.cat([y := m.a(x), m.b(y)], 1), a=conv(3, 4), b=conv(4, 5))
    assert peak_activation_bytes(model, images(1, 8)) == (4 + 5 + 9) * MAP


def test_of_two_sides_of_a_condition_the_dearer_counts():
    def written(m, x):
        return torch.cond(x.sum() > 0, lambda x: m.c(m.b(x)), lambda x: m.a(x), (x,))

    model = Of(written, a=conv(3, 4), b=conv(3, 20), c=conv(20, 4))
    assert peak_activation_bytes(model, images(1, 8)) == pytest.approx((3 + 20 + 4) * MAP, abs=8)  # the sum, its sign


def test_sparse_concatenation_needs_less_than_dense_and_both_are_as_counted_by_hand():
    def net(base):
        return SparseNet((4,), 2, False, 1.0, 4, True, base=base, num_classes=0, global_pool="")

    # The dearest moment is the norm of the fourth unit, with its input joined and normed, beside what is read later.
    # Sparse: it reads y3, y2, x (8 channels); y3 and y1 (2 each) are read after it. Dense: it reads x, y1, y2, y3 (10
    # channels), which are all read after it.
    assert peak_activation_bytes(net(2), images(1, 8)) == (8 + 8 + 4) * MAP
    assert peak_activation_bytes(net(None), images(1, 8)) == (10 + 10 + 10) * MAP


def test_dead_blocks_cost_nothing_and_wide_reading_costs_what_it_keeps():
    example = images(2, 16)
    chain, everything = wired_resnet("chain"), wired_resnet("all")
    assert peak_activation_bytes(everything, example) > peak_activation_bytes(chain, example)
    before = peak_activation_bytes(everything, example)
    fix(everything, topology_of(chain))
    assert peak_activation_bytes(everything, example) == peak_activation_bytes(chain, example) < before


def test_the_model_stays_in_its_mode():
    model = wired_resnet("chain").train()
    assert peak_activation_bytes(model, images(2, 16)) == peak_activation_bytes(model, images(1, 16)) > 0
    assert model.training
