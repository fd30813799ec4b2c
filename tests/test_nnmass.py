import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch
from tiny_models import images, small_resnet, wired_resnet

import mcdeploy
from mcdeploy.connectivity.nnmass import (
    Cell,
    average_degree,
    describe_mass,
    ldi_bounds,
    nn_mass,
    nn_mass_of_model,
    nn_mass_of_topology,
    nn_mass_of_wiring,
)
from mcdeploy.connectivity.topology import Node, StageWiring, Topology, chain_reads
from mcdeploy.connectivity.wiring import fix, topology_of
from mcdeploy.errors import WiringError

PUBLISHED = [Cell(32, 13, 40), Cell(64, 13, 80), Cell(128, 13, 125)]


def bare(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options)


def test_density_and_mass_are_those_of_the_published_log():
    assert [cell.density() for cell in PUBLISHED] == pytest.approx([0.20454545, 0.20454545, 0.16276042], abs=5e-9)
    assert nn_mass(PUBLISHED) == pytest.approx(526.1060606, abs=5e-8)


def test_total_layers_of_the_published_tables_are_three_cells_and_the_classifier():
    assert [3 * depth + 1 for depth in (10, 12, 13, 16, 21)] == [31, 37, 40, 49, 64]


@pytest.mark.parametrize(
    ("name", "mass"),
    {
        "mobilenetv2_140": 1807, "mobilenetv2_100": 1287, "mobilenetv2_075": 975, "mobilenetv2_050": 650,
        "mobilenetv2_035": 468, "nnmass_mobilenet_a": 1654, "nnmass_mobilenet_b": 1030, "resnet18": 3392,
        "resnet34": 7104,
    }.items(),
)  # fmt: skip
def test_mass_of_built_nets_is_the_published_one(name, mass):
    assert nn_mass_of_model(bare(name)).total() == pytest.approx(mass, abs=1e-9)


@pytest.mark.parametrize(("name", "mass"), {"resnet50": 9006.9, "resnet101": 20612.3, "resnet152": 30852.3}.items())
def test_mass_of_bottleneck_nets_is_the_published_one(name, mass):
    assert nn_mass_of_model(bare(name)).total() == pytest.approx(mass, abs=0.05)


def test_the_22_cell_setting_at_width_1_1_has_mass_1797():
    model = bare("nnmass_mobilenet", depths=(2, 3, 4, 5, 4, 3, 1), width=1.1)
    assert nn_mass_of_model(model).total() == pytest.approx(1797, abs=1e-9)


def test_a_densenet_has_density_1_and_a_mass_of_channels_times_layers():
    mass = nn_mass_of_model(bare("densenet121"))
    assert [cell.density for cell in mass.cells] == [1.0] * 4
    assert mass.total() == 32 * (6 + 12 + 24 + 16)


def test_our_own_nets_are_recognised():
    assert nn_mass_of_model(bare("nnmass_cells")).total() == pytest.approx(526.1060606, abs=5e-8)
    assert nn_mass_of_model(bare("resnet20_cifar")).total() == 5 * 32 + 48 + 5 * 64 + 96
    dense = nn_mass_of_model(bare("densenet40_12_cifar"))
    sparse = nn_mass_of_model(bare("sparsenet40_12_cifar"))
    assert dense.total() == 3 * 12 * 12
    assert 0 < sparse.total() < dense.total() / 2
    outer, inner = (
        (64, 64, 64, 128, 128, 256),
        (32, 32, 64, 64, 128, 128),
    )  # what a module reads; 8 branches of 4, 8, 16
    expected = sum((a + 2 * b) * a / (2 * a + b) for a, b in zip(outer, inner, strict=True))
    assert nn_mass_of_model(bare("multibranch20_8x4d_cifar")).total() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "where"),
    {
        "test_vit": "the cells of VisionTransformer", "efficientnet_b0": "blocks.0.0.conv_dw of EfficientNet",
        "seresnet18": "layer1.0.conv1 of ResNet", "efficientnet_es": "blocks.0.0.conv_exp of EfficientNet",
    }.items(),
)  # fmt: skip
def test_other_blocks_are_refused_by_name_and_nothing_is_guessed(name, where):
    with pytest.raises(WiringError, match=where):
        nn_mass_of_model(bare(name) if name != "seresnet18" else bare("resnet18", block_args={"attn_layer": "se"}))


def test_a_wired_or_compiled_model_has_the_mass_of_the_blocks_that_are_left():
    model = wired_resnet("chain")
    whole = nn_mass_of_model(small_resnet()).total()
    assert nn_mass_of_model(model).total() == whole == 8 * 16 + 24 + 3 * 32
    small = mcdeploy.compile_model(
        mcdeploy.wire(small_resnet(), "drop", blocks=["layer1.1"], image_size=16), images(2, 16)
    )
    assert nn_mass_of_model(small).total() == whole - 16


def stage(reads):
    return StageWiring("s", tuple(map(str, range(len(reads)))), tuple(tuple(Node(0, i) for i in row) for row in reads))


def complete(num_blocks):
    return [tuple(range(j)) for j in range(1, num_blocks + 1)]


def test_a_chain_has_mass_0_and_a_complete_stage_density_1():
    chain = Topology((StageWiring("s", tuple("abcd"), chain_reads(0, 4)),))
    full = Topology((stage(complete(4)),))
    widths = [[16] * 5]
    for join in ("add", "concat"):
        assert nn_mass_of_topology(chain, widths, join=join).total() == 0
        assert nn_mass_of_topology(full, widths, join=join).cells[0].density == 1
    assert nn_mass_of_topology(full, widths).total() == 4 * 16  # i_c: four blocks receive 16 channels
    assert nn_mass_of_topology(full, widths, join="concat").total() == 5 * 16  # w_c d_c, node 0 being a layer


def test_half_of_the_added_links_is_half_of_the_mass():
    some = Topology((stage([(0,), (1,), (0, 2), (0, 1, 3)]),))  # 3 of the 6 skips
    cell = nn_mass_of_topology(some, [[8, 8, 8, 8, 8]]).cells[0]
    assert cell.density == 0.5
    assert cell.mass() == 0.5 * 32
    assert cell.degree() == 8 + 16 / 2


def test_only_what_was_offered_counts_as_possible_and_other_stages_do_not_count():
    # the first block changes the shape, so that no other block may read node 0
    offered = Topology((stage([(0,), (1,), (1, 2), (1, 2, 3)]),))
    wiring = Topology((stage([(0,), (1,), (1, 2), (3,)]),))
    assert nn_mass_of_topology(wiring, [[8, 16, 16, 16, 16]], offered=offered).cells[0].density == pytest.approx(1 / 3)
    across = Topology((stage([(0,), (1,)]), StageWiring("t", ("0", "1"), ((Node(1, 0),), (Node(0, 1), Node(1, 1))))))
    assert nn_mass_of_topology(across, [[8] * 3, [8] * 3]).total() == 0


def test_a_concat_topology_agrees_with_the_closed_form_of_equation_2():
    width, depth = 6, 9
    for skips in (0, 6, 12, 24, 100):  # whole feature maps, so that links are edges
        reads = []
        for layer in range(1, depth):
            others = range(min(max(layer - 1, 0), skips // width))
            reads.append((*others, layer - 1))
        topology = Topology((stage(reads),))
        mass = nn_mass_of_topology(topology, [[width] * depth], join="concat")
        assert mass.total() == pytest.approx(Cell(width, depth, skips).mass())
        assert mass.cells[0].density == pytest.approx(Cell(width, depth, skips).density())


def test_widths_that_do_not_fit_the_topology_are_refused():
    with pytest.raises(ValueError, match="widths needs"):
        nn_mass_of_topology(Topology((stage(complete(3)),)), [[8, 8, 8]])


def test_the_wiring_of_a_model_is_measured_on_its_live_blocks_and_possible_links():
    chain, full = wired_resnet("chain"), wired_resnet("all")
    assert nn_mass_of_wiring(chain, images(1, 16)).total() == 0
    mass = nn_mass_of_wiring(full, images(1, 16))
    assert [cell.density for cell in mass.cells] == [1, 1, 1]
    assert mass.total() == 4 * 8 + 4 * 8 + (8 + 3 * 16)
    first = topology_of(full)
    stages = list(first.stages)
    reads = tuple(tuple(Node(0, i) for i in row) for row in ((0,), (0, 1), (1,), (1, 2)))  # block 3 is dead
    stages[0] = StageWiring(stages[0].name, stages[0].blocks, reads)
    fix(full, Topology(tuple(stages), first.aggregate))
    cell = nn_mass_of_wiring(full, images(1, 16)).cells[0]
    assert (cell.channels, cell.density) == (3 * 8, pytest.approx(2 / 3))  # 2 of the 3 skips among three blocks
    with pytest.raises(WiringError, match="not wired"):
        nn_mass_of_wiring(small_resnet(), images(1, 16))


def test_inspect_describes_cells_and_wiring_or_says_why_not():
    lines = describe_mass(bare("resnet50"), images(1, 16))
    assert lines[0] == "NN-Mass of the backbone's own skips, by cell: 9,006.9, density 0.436, average degree 1,022.7"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["layer1", "layer2", "layer3", "layer4"]
    lines = describe_mass(wired_resnet("all"), images(1, 16))
    assert [line for line in lines if line.startswith("NN-Mass of the wiring between blocks: 120.0, density 1.000")]
    (line,) = describe_mass(bare("test_vit"), images(1, 16))
    assert line.startswith("NN-Mass: the cells of VisionTransformer are not recognised")


def test_average_degree_counts_the_channels_that_a_channel_reads():
    """Proposition 1 against a count over a drawn cell; it leaves out terms of order 1/d, so the cell is deep."""
    width, depth, skips = 8, 400, 160
    links = sum(width * (width + min(width * (i - 1), skips)) for i in range(2, depth)) + width**2
    exact = links / (width * depth)
    assert average_degree(width, Cell(width, depth, skips).mass()) == pytest.approx(exact, rel=0.01)


def test_the_mean_singular_value_of_random_layers_lies_within_the_bounds():
    generator = torch.Generator().manual_seed(0)
    for width, mass, variance in ((8, 40, 0.01), (16, 200, 0.3), (32, 0, 1.0), (4, 300, 2.0)):
        shape = (width, round(average_degree(width, mass)))
        weights = torch.randn(64, *shape, generator=generator, dtype=torch.float64) * variance**0.5
        low, high = ldi_bounds(width, mass, variance)
        assert low < torch.linalg.svdvals(weights).mean() < high
        assert high - low == pytest.approx(2 * (variance * width) ** 0.5)


def test_more_mass_lifts_the_bounds_at_one_width():
    lows = [ldi_bounds(8, mass, 0.1)[0] for mass in (0, 50, 100, 200)]
    assert lows == sorted(lows)
    assert lows[0] == 0


def test_the_published_figures_of_the_experiment_follow_from_its_results():
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("nnmass_experiment", root / "examples" / "nnmass_experiment.py")
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    assert experiment.fit([1, 2, 3], [5, 7, 9]) == pytest.approx((2, 3, 1))
    assert experiment.fit([1, 2, 3], [1, 2, 1])[2] == pytest.approx(0)
    written = json.loads((root / "recipes" / "results" / "nnmass_cifar10_2core-x86-cpu_202611.json").read_text())
    assert [(net["depths"][0], net["skips"][0]) for net in written["nets"]] == list(experiment.NETS)
    bare_results = [{k: v for k, v in net.items() if k not in ("nn_mass", "layers")} for net in written["nets"]]
    again = experiment.summarise(bare_results)
    assert again["r2"] == pytest.approx(written["r2"])
    assert [net["nn_mass"] for net in again["nets"]] == pytest.approx([net["nn_mass"] for net in written["nets"]])
    page = (root / "recipes" / "results" / "nnmass_cifar10.md").read_text()
    assert all(f"{100 * net['top1']:.2f}% |" in page for net in written["nets"])
    assert f"**{written['r2']['nn_mass']:.2f}** (rising) | {written['r2']['parameters']:.2f} (falling)" in page
