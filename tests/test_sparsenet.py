"""SparseNet by concatenation: the published counts, the authors' fetch, DenseNet as the limit, compile and ONNX."""

import math
from itertools import pairwise

import numpy as np
import onnx
import pytest
import timm
import torch
from mcruntime.engine import OnnxRunner
from test_backbones import scramble
from timm.models.densenet import DenseNet
from tiny_models import images
from torch import nn

import mcdeploy
from mcdeploy.backbones.sparsenet import NETS, SparseNet, SparseStage
from mcdeploy.compile.prune import count_macs, count_parameters

# 100 classes; published in millions, from the authors' slides and poster.
CIFAR = {
    "sparsenet40_24_cifar": (757_252, 0.76),
    "sparsenet100_24_cifar": (2_522_404, 2.52),
    "sparsenet100_36_cifar": (5_645_908, 5.65),
    "sparsenet100_16_32_64_cifar": (7_218_148, 7.22),
    "sparsenetbc100_24_cifar": (1_461_124, 1.46),
    "sparsenetbc100_36_cifar": (3_263_428, 3.26),
    "sparsenetbc400_12_cifar": (1_702_948, 1.70),
    "densenet40_12_cifar": (1_100_428, 1.10),
    "densenet100_24_cifar": (28_283_476, 28.28),
}
# The same, where the count from the authors' code is not the one they published.
MISMATCHES = {
    "sparsenet100_32_64_128_cifar": (28_725_604, 27.72),
    "sparsenetbc100_32_64_128_cifar": (17_339_780, 16.72),  # another reader of the code counts 17.34 too
    "sparsenetbc100_16_32_64_cifar": (4_365_428, 4.38),
    "sparsenetbc100_12_cifar": (373_348, 0.40),
    "sparsenet40_12_cifar": (193_924, 0.8),  # the figure of k = 24, it seems
    "densenet100_12_cifar": (7_189_468, 7.20),
    "densenetbc250_24_cifar": (15_480_556, 15.3),
}
# Parameters, published millions, parameters with global pooling; 2 x MACs at 224 px, published billions.
IMAGENET = {
    "sparsenet121_32": (4_513_576, 4.51, 3_233_576, 3_446_960_640, 3.46),
    "sparsenet169_32": (6_228_616, 6.23, 4_692_616, 3_724_909_568, 3.74),
    "sparsenet201_32": (7_221_896, 7.22, 5_685_896, 4_110_261_248, 4.13),
    "sparsenet201_48": (14_907_736, 14.91, 12_603_736, 9_156_985_344, 9.19),
}


def on_meta(name: str, **options: object) -> nn.Module:
    """Shapes without numbers: enough to count."""
    with torch.device("meta"):
        return timm.create_model(name, **options).eval()


def tiny(**options: object) -> SparseNet:
    """Two stages of five and three bottlenecks, scrambled."""
    settings = {"bottleneck": True, "theta": 0.5, "stem": 6, "small_images": True, "num_classes": 10, **options}
    torch.manual_seed(0)
    return scramble(SparseNet((5, 3), settings.pop("growth", 4), **settings))


@pytest.mark.parametrize(("name", "counts"), CIFAR.items())
def test_the_cifar_nets_have_the_published_number_of_parameters(name, counts):
    exact, millions = counts
    assert count_parameters(on_meta(name, num_classes=100)) == exact
    assert round(exact / 1e6, 2) == millions


@pytest.mark.parametrize(("name", "counts"), MISMATCHES.items())
def test_these_counts_are_not_the_published_ones(name, counts):
    exact, millions = counts
    assert count_parameters(on_meta(name, num_classes=100)) == exact
    assert round(exact / 1e6, 2) != millions


@pytest.mark.parametrize(("name", "counts"), IMAGENET.items())
def test_the_imagenet_nets_have_the_published_parameters_and_flops(name, counts):
    exact, millions, with_global_pool, flops, billions = counts
    model = on_meta(name)
    assert count_parameters(model) == exact
    assert round(exact / 1e6, 2) == millions
    assert count_parameters(on_meta(name, global_pool="avg")) == with_global_pool
    assert 2 * count_macs(model, torch.zeros(1, 3, 224, 224, device="meta")) == flops
    assert flops / 1e9 == pytest.approx(billions, rel=0.006)  # the published counter adds something, always


def test_densenet121_by_the_same_count_meets_its_published_figures():
    model = on_meta("densenet121")
    assert count_parameters(model) == 7_978_856
    assert 2 * count_macs(model, torch.zeros(1, 3, 224, 224, device="meta")) == pytest.approx(5.67e9, rel=0.001)


def test_every_net_of_the_tables_is_registered_and_counted():
    assert set(NETS) <= set(timm.list_models())
    assert set(NETS) - {*CIFAR, *MISMATCHES, *IMAGENET} == {"densenet40_24_cifar", "densenetbc100_12_cifar"}


@pytest.mark.parametrize("base", [2, 3])
def test_a_node_reads_what_the_authors_fetch_takes_newest_first(base):
    stage = SparseStage(2, 20, 1, bottleneck=False, base=base)
    for index in range(1, 22):
        nodes, fetched, offset = list(range(index)), [], 1  # expFetch of denselink.py, on node numbers
        while offset <= len(nodes):
            fetched.append(nodes[len(nodes) - offset])
            offset *= base
        assert list(stage.reads(index)) == fetched
    assert len(stage.reads(16)) == {2: 5, 3: 3}[base]


def test_the_forward_is_that_of_the_equation_written_out():
    model = tiny(bottleneck=False)
    stage, x = model.stage1, torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        y1 = stage.unit1(x)
        y2 = stage.unit2(torch.cat([y1, x], 1))
        y3 = stage.unit3(torch.cat([y2, y1], 1))
        y4 = stage.unit4(torch.cat([y3, y2, x], 1))
        y5 = stage.unit5(torch.cat([y4, y3, y1], 1))
        assert torch.equal(stage(x), torch.cat([y5, y4, y2], 1))  # not y3, y1 and x


def test_reading_every_offset_is_timms_densenet():
    torch.manual_seed(0)
    theirs = scramble(DenseNet(growth_rate=4, block_config=(3, 2), bn_size=4, num_classes=10))
    ours = SparseNet((3, 2), 4, bottleneck=True, theta=0.5, stem=8, small_images=False, base=None, num_classes=10)
    names = {}
    for part in ("conv", "norm"):
        names[f"stem.{part}"] = f"features.{part}0"
        names[f"transition1.{part}1"] = f"features.transition1.{part}"
        names |= {
            f"stage{s}.unit{u}.{part}{n}": f"features.denseblock{s}.denselayer{u}.{part}{n}"
            for s, units in ((1, 3), (2, 2))
            for u in range(1, units + 1)
            for n in (1, 2)
        }
    names |= {"norm": "features.norm5", "classifier": "classifier"}
    given, taken = theirs.state_dict(), {}
    widths = {name: stage.widths for name, stage in ours.named_children() if isinstance(stage, SparseStage)}
    readers = {f"stage{s}.unit{u}": (f"stage{s}", u) for s, units in ((1, 3), (2, 2)) for u in range(1, units + 1)}
    readers |= {"transition1": ("stage1", 4), "norm": ("stage2", 3)}
    for key in ours.state_dict():
        module, _, what = key.rpartition(".")
        value = given[f"{names[module]}.{what}"]
        reader = module.removesuffix(".norm1").removesuffix(".conv1")
        reader = "norm" if module == "classifier" else reader
        if reader in readers and value.ndim:  # theirs concatenates oldest first
            stage, node = readers[reader]
            blocks = list(torch.arange(sum(widths[stage][:node])).split(list(widths[stage][:node])))
            newest_first = torch.cat(blocks[::-1])
            axis = 1 if value.ndim > 1 else 0
            if not (module == "classifier" and what == "bias"):
                value = value.index_select(axis, newest_first)
        taken[key] = value
    ours.load_state_dict(taken)
    x = images(2, 64).double()
    with torch.no_grad():
        assert torch.allclose(ours.eval().double()(x), theirs.double()(x), rtol=1e-10)


def test_units_transitions_and_stem_are_the_published_ones():
    model = on_meta("sparsenetbc100_16_32_64_cifar")
    kinds = [nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert [type(part) for part in model.stage2.unit1] == kinds * 2
    assert model.stage2.unit1.conv1.weight.shape[0] == 4 * 32
    assert [type(part) for part in model.transition1] == [*kinds, nn.AvgPool2d]
    assert model.transition1.conv1.weight.shape[0] * 2 == model.transition1.conv1.weight.shape[1]
    assert model.stem.conv.weight.shape == (32, 3, 3, 3)
    assert [len(list(stage.children())) for stage in (model.stage1, model.stage2, model.stage3)] == [16, 16, 16]
    assert on_meta("sparsenet40_24_cifar").transition1.conv1.weight.shape[:2] == (96, 96)  # theta is 1: 4 x 24


def test_the_net_starts_as_in_the_authors_code():
    torch.manual_seed(0)
    model = timm.create_model("sparsenet40_24_cifar")
    assert model.stage3.unit9.conv1.weight.std().item() == pytest.approx((2 / (24 * 9)) ** 0.5, rel=0.03)
    assert not model.classifier.bias.any()


def test_parameters_grow_as_n_log_n_where_densenets_grow_as_n_squared():
    def grown(num_units: int, base: int | None) -> int:
        with torch.device("meta"):
            return count_parameters(SparseStage(16, num_units, 16, bottleneck=False, base=base))

    for base, law in ((2, lambda n: n * math.log2(n)), (None, lambda n: n * n)):
        ratios = [grown(n, base) / law(n) for n in (128, 256, 512, 1024)]
        assert max(ratios) / min(ratios) < 1.1, base
        assert all(abs(b / a - 1) < 0.05 for a, b in pairwise(ratios))


def test_the_grid_is_the_published_pooling_at_224_pixels_and_runs_from_64():
    model = timm.create_model("sparsenet121_32", num_classes=10).eval()
    x = torch.randn(2, 5, 7, 7)
    assert torch.equal(model.global_pool(x), nn.AvgPool2d(2)(x).flatten(1))
    assert model.head_hidden_size == 9 * model.num_features
    for size in (64, 96):
        assert model(images(1, size)).shape == (1, 10)
    model.reset_classifier(4, "avg")
    assert model.head_hidden_size == model.num_features
    assert model(images(1, 64)).shape == (1, 4)
    model.reset_classifier(0)
    assert model(images(1, 64)).shape == (1, model.num_features)


def test_features_then_head_is_the_whole_net_and_timm_finds_the_feature_maps():
    model = tiny()
    x = images(2, 16)
    with torch.no_grad():
        assert torch.equal(model.forward_head(model.forward_features(x)), model(x))
        assert torch.equal(model.classifier(model.forward_head(model.forward_features(x), pre_logits=True)), model(x))
    features = timm.create_model("sparsenet40_12_cifar", features_only=True)
    shapes = [tuple(y.shape[1:]) for y in features(images(1, 32))]
    assert shapes == [(48, 32, 32), (48, 16, 16), (48, 8, 8)]
    assert features.feature_info.channels() == [48, 48, 48]
    assert features.feature_info.reduction() == [1, 2, 4]


def test_the_wiring_names_every_edge_and_who_reads_the_stage():
    first, second = tiny().wiring()
    assert first.name == "stage1"
    assert first.blocks == ("unit1", "unit2", "unit3", "unit4", "unit5", "transition1")
    assert [[node.index for node in row] for row in first.reads] == [
        [0],
        [0, 1],
        [1, 2],
        [0, 2, 3],
        [1, 3, 4],
        [2, 4, 5],
    ]
    assert (second.blocks[-1], {node.stage for row in second.reads for node in row}) == ("norm", {1})


class ByHand(nn.Module):
    """``tiny()`` as a person would write it, batch norms folded: what remains is before its convolution."""

    def __init__(self, source: SparseNet) -> None:
        super().__init__()
        self.stem, self.third = source.stem.conv, source.transition1
        self.first = nn.ModuleList(self.unit(module) for module in source.stage1.children())
        self.second = nn.ModuleList(self.unit(module) for module in source.stage2.children())
        self.head = nn.Sequential(source.norm, nn.ReLU(), source.global_pool, source.classifier)

    @staticmethod
    def unit(unit: nn.Module) -> nn.Sequential:
        folded = nn.utils.fusion.fuse_conv_bn_eval(unit.conv1, unit.norm2)
        return nn.Sequential(unit.norm1, nn.ReLU(), folded, nn.ReLU(), unit.conv2)

    def forward(self, images_BCHW):
        x = self.stem(images_BCHW)
        a = self.first[0](x)
        b = self.first[1](torch.cat([a, x], 1))
        c = self.first[2](torch.cat([b, a], 1))
        d = self.first[3](torch.cat([c, b, x], 1))
        e = self.first[4](torch.cat([d, c, a], 1))
        x = self.third(torch.cat([e, d, b], 1))
        a = self.second[0](x)
        b = self.second[1](torch.cat([a, x], 1))
        c = self.second[2](torch.cat([b, a], 1))
        return self.head(torch.cat([c, b, x], 1))


def test_compiled_and_exported_it_is_the_net_written_by_hand(tmp_path):
    model = tiny()
    hand = ByHand(model).eval()
    small = mcdeploy.compile_model(model, images(7, 16))
    mcdeploy.export_onnx(small, tmp_path / "ours.onnx", images(2, 16))
    mcdeploy.export_onnx(hand, tmp_path / "hand.onnx", images(2, 16))
    ours, by_hand = (onnx.load(tmp_path / f"{name}.onnx") for name in ("ours", "hand"))
    kinds = [sorted(node.op_type for node in net.graph.node) for net in (ours, by_hand)]
    assert kinds[0] == kinds[1]
    assert kinds[0].count("Conv") == 1 + 2 * 8 + 1
    assert kinds[0].count("Concat") == 4 + 1 + 2 + 1
    assert count_parameters(small) == count_parameters(hand) < count_parameters(model)
    with OnnxRunner(tmp_path / "ours.onnx") as runner, torch.no_grad():
        for batch in (1, 2, 3, 7):
            x = images(batch, 16)
            assert torch.allclose(small(x), hand(x), rtol=1e-5, atol=1e-6)
            assert np.allclose(runner.infer(x.numpy()), model(x).numpy(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        x = images(3, 16).double()
        assert torch.allclose(mcdeploy.compile_model(model.double(), x)(x), model(x), rtol=1e-10)


def test_it_trains_under_bf16_with_channels_last():
    model = tiny().train().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(4, 16).contiguous(memory_format=torch.channels_last)).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
