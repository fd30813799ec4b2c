"""Pictures of wirings: each node and edge once, with its name and its number, nothing on top of something else."""

from __future__ import annotations

import json
import random
import re
import sys
from html.parser import HTMLParser
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest
import torch
from tiny_models import images, small_resnet, timm_model, wired_resnet

import mcdeploy
from mcdeploy import cli
from mcdeploy.connectivity.topology import Node, StageWiring, Topology, chain_reads
from mcdeploy.connectivity.wiring import candidates_of, gate_values
from mcdeploy.draw import (
    MANY_EDGES,
    EdgeValues,
    columns_of,
    draw_wiring,
    gate_values_of,
    joins_of,
    open_shares_of,
    wiring_page,
)
from mcdeploy.errors import InputError
from mcdeploy.targets import Target, compare_costs, draw_inspections, inspect_target

NASTY = "<script>alert('1')</script>&\"x\""
SVG = "{http://www.w3.org/2000/svg}"


def stage(s, name, *reads, blocks=None):
    reads = tuple(tuple(sorted(Node(s, r) if isinstance(r, int) else Node(*r) for r in row)) for row in reads)
    return StageWiring(name, blocks or tuple(str(i) for i in range(len(reads))), reads)


def branches(*modules, name="trunk", blocks=None):
    """A stage of parallel branches: by module and branch, which branches of the module before it reads."""
    names, reads, before = [], [], [0]
    for m, module in enumerate(modules):
        reads += [[before[k] for k in row] for row in module]
        before = [len(names) + 1 + b for b in range(len(module))]
        names += [f"{m}.b{b}" for b in range(len(module))]
    return stage(0, name, *reads, before, blocks=blocks or (*names, "sum"))


# layer1.1 (node 2) is dead: node 3 reads the input and node 1.
WIRING = Topology((stage(0, "layer1", [0], [0, 1], [0, 1]), stage(1, "layer2", [0], [1])))
CANDIDATES = Topology((stage(0, "layer1", [0], [0, 1], [0, 1, 2]), stage(1, "layer2", [0], [0, 1])))
GATES = {"layer1": [[1.0], [0.5, 0.5], [0.3, 0.62, 0.08]], "layer2": [[1.0], [0.25, 0.75]]}
ACROSS = Topology((stage(0, "a", [0], [1]), stage(1, "b", [0], [(0, 1), 1])))
# two modules of three branches; branch 1 of the first is read by nobody
BRANCHES = Topology((branches([[0], [0], [0]], [[0], [2], [0, 2]]),))
DAG = Topology((stage(0, "layer1", [0], [0, 1], [0, 1, 2], blocks=("0", "1", "output")),))
DENSE = Topology((stage(0, "s", *(list(range(i)) for i in range(1, 61))),))


def drawn(topology, **options):
    return ElementTree.fromstring(draw_wiring(topology, title="t", **options))


def shapes(topology, **options):
    """Class to the titles of the shapes that carry it."""
    found = {}
    for element in drawn(topology, **options).iter():
        title = element.find(f"{SVG}title")
        for name in element.get("class", "").split() if title is not None else ():
            found.setdefault(name, []).append(title.text)
    return found


def edges(topology, **options):
    """What an edge says to its class and its style."""
    found = {}
    for path in drawn(topology, **options).iter(f"{SVG}path"):
        if path.find(f"{SVG}title") is not None:
            style = dict(part.split(":") for part in path.get("style", "").split(";") if part)
            found[path.find(f"{SVG}title").text] = (path.get("class").split()[-1].removeprefix("mcw-"), style)
    return found


def boxes(topology, **options):
    """Left, top, right and bottom of every node."""
    found = []
    for group in drawn(topology, **options).iter(f"{SVG}g"):
        circle, rect = group.find(f"{SVG}circle"), group.find(f"{SVG}rect")
        if circle is not None:
            x, y, r = (float(circle.get(key)) for key in ("cx", "cy", "r"))
            found.append((x - r, y - r, x + r, y + r))
        else:
            x, y, w, h = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
            found.append((x, y, x + w, y + h))
    return found


# -------------------------------------------------------------------------------------------------- nodes and edges


def test_a_title_cannot_leave_its_attribute():
    svg = ElementTree.fromstring(draw_wiring(WIRING, title=NASTY))
    assert svg.get("aria-label") == NASTY


def test_dead_blocks_and_what_they_read_are_dashed_and_nothing_else_is():
    drawn = shapes(WIRING)
    assert drawn["mcw-dead"] == [
        "layer1.1 reads input of layer1 (dead)",
        "layer1.1 reads layer1.0 (dead)",
        "layer1.1: dead, no output depends on it",
    ]
    style = ElementTree.fromstring(draw_wiring(WIRING, title="t")).find(f"{SVG}style").text
    for rule in (".mcw-edge.mcw-dead{", ".mcw-node.mcw-dead circle,.mcw-node.mcw-dead rect{"):
        assert "stroke-dasharray" in style.split(rule)[1].split("}")[0]


def test_every_block_and_every_edge_is_drawn_once_with_its_name():
    drawn = shapes(WIRING)
    assert drawn["mcw-block"] == [
        "layer1.0", "layer1.1: dead, no output depends on it", "layer1.2", "layer2.0", "layer2.1",
    ]  # fmt: skip
    assert drawn["mcw-input"] == ["input of layer1", "input of layer2"]
    edges = [f"{WIRING.describe(n)} reads {WIRING.describe(s)}" for n, row in WIRING.edges().items() for s in row]
    assert sorted(title.removesuffix(" (dead)") for title in drawn["mcw-edge"] if " reads " in title) == sorted(edges)


def test_straight_arcs_and_arcs_across_stages_are_told_apart():
    drawn = shapes(ACROSS)
    assert drawn["mcw-near"] == ["a.0 reads input of a", "a.1 reads a.0", "b.0 reads input of b", "b.1 reads b.0"]
    assert drawn["mcw-across"] == ["b.1 reads a.0"]
    assert shapes(WIRING)["mcw-skip"] == ["layer1.2 reads input of layer1", "layer1.2 reads layer1.0"]
    assert drawn["mcw-host"] == ["the backbone hands the output of a on"]


def test_stages_stand_from_left_to_right_without_touching():
    many = Topology(tuple(stage(s, f"stages.{s}.a.long.name", [0], [1]) for s in range(4)))
    svg = ElementTree.fromstring(draw_wiring(many, title="t"))
    bands = [(float(r.get("x")), float(r.get("width"))) for r in svg.iter(f"{SVG}rect") if r.get("class") == "mcw-band"]
    assert len(bands) == 4
    for (left, width), (next_left, _) in pairwise(bands):
        assert left + width < next_left
    assert bands[-1][0] + bands[-1][1] < float(svg.get("width"))


def test_nothing_is_drawn_outside_the_picture():
    dense = tuple(StageWiring(f"s{s}", tuple(map(str, range(9))), chain_reads(s, 9)) for s in range(3))
    far = Topology((*dense[:2], stage(2, "s2", [0], [(0, 1), (1, 1), 1], [(0, 0), 0])))
    svg = ElementTree.fromstring(draw_wiring(far, title="t"))
    height = float(svg.get("height"))
    for path in svg.iter(f"{SVG}path"):
        if "C" in path.get("d"):
            y0, control_y = map(float, re.findall(r"[\d.]+", path.get("d"))[1:4:2])
            reach = y0 + 0.75 * (control_y - y0)  # the furthest point of such a curve
            assert 44 < reach < height - 26, path.get("d")


def test_long_block_names_become_numbers_in_the_whole_stage():
    odd = Topology((stage(0, "s", [0], [1], blocks=("conv_long", "1")),))
    svg = ElementTree.fromstring(draw_wiring(odd, title="t"))
    labels = [g.find(f"{SVG}text").text for g in svg.iter(f"{SVG}g")]
    assert labels == ["in", "1", "2"]


def test_a_last_block_that_is_not_numbered_like_the_others_is_a_join_and_no_block():
    assert joins_of(DAG) == {Node(0, 3)}
    assert joins_of(BRANCHES) == {Node(0, 7)}
    assert joins_of(Topology((stage(0, "s", [0], [1], blocks=("unit1", "transition1")),))) == {Node(0, 2)}
    assert joins_of(WIRING) == joins_of(Topology((stage(0, "s", [0], [1], blocks=("conv", "norm")),))) == set()
    labels = [g.find(f"{SVG}text").text for g in drawn(DAG).iter(f"{SVG}g")]
    assert labels == ["in", "0", "1", "out"]


# ---------------------------------------------------------------------------------------- values, candidates, columns


def test_an_edge_says_its_gate_and_is_the_thicker_the_larger_it_is():
    found = edges(WIRING, candidates=CANDIDATES, values=gate_values_of(CANDIDATES, GATES))
    kind, thick = found["layer1.2 reads layer1.0 (gate 0.62)"]
    assert kind == "skip"
    widths = [
        float(found[f"{text})"][1]["stroke-width"])
        for text in (
            "layer1.2 reads input of layer1 (gate 0.30",
            "layer1.2 reads layer1.0 (gate 0.62",
            "layer2.1 reads layer2.0 (gate 0.75",
        )
    ]
    assert widths == sorted(widths)
    assert len(set(widths)) == 3
    assert widths[-1] == 5.0  # the largest of all
    assert 0 < float(thick["stroke-opacity"]) <= 1


def test_what_was_not_kept_is_faint_and_what_is_dead_stays_dashed():
    found = edges(WIRING, candidates=CANDIDATES, values=gate_values_of(CANDIDATES, GATES))
    kind, style = found["layer1.2 could have read layer1.1 (gate 0.08)"]
    assert kind == "cut"
    assert float(style["stroke-width"]) < 1.7
    assert float(style["stroke-opacity"]) < 0.8
    assert found["layer1.1 reads layer1.0 (gate 0.50, dead)"] == ("dead", {})
    assert "layer1.2 could have read layer1.1" in edges(WIRING, candidates=CANDIDATES)
    assert not [says for says in edges(WIRING) if "could have" in says]


def test_blocks_with_nothing_to_learn_have_no_gate_and_do_not_set_the_scale():
    values = gate_values_of(CANDIDATES, GATES)
    assert (Node(0, 0), Node(0, 1)) not in values.values
    assert max(values.values.values()) == 0.75
    assert gate_values_of(CANDIDATES, {}) is None
    assert gate_values_of(CANDIDATES, {"layer1": [[1.0], [1.0, 1.0]]}) is None


def test_an_edge_of_a_dynamic_wiring_says_how_often_it_is_open_and_how_it_weighs():
    shares, weights = [[1.0], [0.5, 0.25], [0.125, 1.0, 0.75]], [[1.0], [0.75, 0.3], [0.6, 0.5, 0.9]]
    found = edges(DAG, values=open_shares_of(DAG, {"layer1": shares}, {"layer1": weights}))
    often = found["layer1.0 reads input of layer1 (open for 100.0% of the images, with a mean weight of 1.00)"]
    seldom = found["layer1.output reads input of layer1 (open for 12.5% of the images, with a mean weight of 0.60)"]
    assert float(often[1]["stroke-width"]) == 5.0
    assert float(seldom[1]["stroke-width"]) < 1.3
    without = edges(DAG, values=open_shares_of(DAG, {"layer1": shares}))
    assert "layer1.output reads input of layer1 (open for 12.5% of the images)" in without


def test_edges_that_no_image_opens_are_drawn_dead_and_so_is_what_only_they_lead_to():
    values = open_shares_of(DAG, {"layer1": [[1.0], [0.5, 0.5], [0.5, 1.0, 0.0]]})
    found = shapes(DAG, values=values)
    assert found["mcw-dead"] == [
        "layer1.1 reads input of layer1 (open for 50.0% of the images, dead)",
        "layer1.1 reads layer1.0 (open for 50.0% of the images, dead)",
        "layer1.output reads layer1.1 (open for 0.0% of the images, dead)",
        "layer1.1: dead, no output depends on it",
    ]
    gates = gate_values_of(DAG, {"layer1": [[1.0], [0.5, 0.5], [0.5, 0.5, 0.0]]})
    assert "mcw-dead" not in shapes(DAG, values=gates)  # kept, if only by its rank


def test_parallel_branches_stand_in_columns_one_a_module():
    assert columns_of(BRANCHES, 0) == ((0,), (1, 2, 3), (4, 5, 6), (7,))
    found = boxes(BRANCHES)
    centres = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in found]
    columns = [centres[0:1], centres[1:4], centres[4:7], centres[7:8]]
    assert all(len({x for x, _ in column}) == 1 for column in columns)
    assert [column[0][0] for column in columns] == sorted(column[0][0] for column in columns)
    for column in columns:  # from top to bottom, around one middle line
        heights = [y for _, y in column]
        assert heights == sorted(set(heights))
        assert sum(heights) / len(heights) == pytest.approx(centres[0][1])
    drawn_edges = edges(BRANCHES)
    assert drawn_edges["trunk.0.b1 reads input of trunk (dead)"][0] == "dead"
    assert drawn_edges["trunk.1.b2 reads trunk.0.b2"][0] == "module"
    names = [text.text for text in drawn(BRANCHES).iter(f"{SVG}text") if text.get("class") == "mcw-column"]
    assert names == ["0", "1"]


def test_other_wirings_stand_in_a_line_whatever_their_blocks_are_called():
    assert columns_of(WIRING, 0) is None  # K = 1 looks like layers too
    assert columns_of(Topology((stage(0, "s", [0], [0], [1]),)), 0) is None
    cells = Topology((stage(0, "s", [0], [0, 1], blocks=("layers.0", "layers.1")),))
    assert columns_of(cells, 0) is None
    skips = Topology((branches([[0], [0]], [[0], [1]]), stage(1, "t", [0], [(0, 1), 1])))
    assert columns_of(skips, 0) is not None
    assert columns_of(skips, 0, [(Node(0, 1), Node(0, 5))]) is None  # the first module, read by the sum


def big_branches(modules, width, fan_in):
    generator = random.Random(0)
    rows = [[sorted(generator.sample(range(width), fan_in)) for _ in range(width)] for _ in range(modules - 1)]
    return Topology((branches([[0]] * width, *rows),))


@pytest.mark.parametrize(
    "topology",
    [WIRING, ACROSS, DAG, DENSE, BRANCHES, big_branches(3, 8, 1), big_branches(3, 64, 4)],
    ids=["line", "across", "dag", "dense", "branches", "8", "64"],
)
def test_no_node_covers_another_or_leaves_the_picture(topology):
    svg, found = drawn(topology), boxes(topology)
    assert len(found) == sum(1 + len(stage.blocks) for stage in topology.stages)
    for (left, top, right, bottom), (left2, top2, right2, bottom2) in combinations(found, 2):
        assert right < left2 or right2 < left or bottom < top2 or bottom2 < top
    assert min(left for left, *_ in found) > 0
    assert min(top for _, top, *_ in found) > 48
    assert max(right for _, _, right, _ in found) < float(svg.get("width"))
    assert max(bottom for *_, bottom in found) < float(svg.get("height")) - 24


def test_every_label_of_the_legend_is_inside_the_picture_and_none_covers_another():
    svg = drawn(WIRING, candidates=CANDIDATES, values=gate_values_of(CANDIDATES, GATES))
    texts = [t for t in svg.iter(f"{SVG}text") if t.get("class") == "mcw-legend"]
    assert len(texts) == 6
    spans = [(float(t.get("y")), float(t.get("x")), float(t.get("x")) + 6.4 * len(t.text)) for t in texts]
    assert max(end for *_, end in spans) < float(svg.get("width"))
    assert max(y for y, *_ in spans) < float(svg.get("height"))
    assert len({y for y, *_ in spans}) > 1  # rows, so that a small wiring is not shrunk by its legend
    for (y, _, end), (y2, start2, _) in pairwise(spans):
        assert y2 > y or start2 > end


def test_very_many_edges_share_a_path_a_reader_and_none_is_lost():
    assert len(DENSE.edges()) == 60
    found = edges(DENSE)
    assert sum(len(row) for row in DENSE.edges().values()) > MANY_EDGES["live"]
    assert len(found) < 3 * 60
    starts = sum(
        path.get("d").count("M") for path in drawn(DENSE).iter(f"{SVG}path") if path.find(f"{SVG}title") is not None
    )
    assert starts == sum(len(row) for row in DENSE.edges().values())
    assert "s.3 reads input of s, s.0, s.1" in found  # and s.2 in its own path, being straight
    assert found["s.3 reads s.2"][0] == "near"
    assert any(says.endswith("and 46 more") for says in found)


def test_names_are_text_in_every_kind_of_picture():
    blocks = (*(f"<b>{m}.{NASTY}{b}" for m in range(2) for b in range(3)), NASTY)
    nasty = Topology((branches([[0]] * 3, [[0], [2], [0, 2]], name=NASTY, blocks=blocks),))
    assert columns_of(nasty, 0) is not None
    values = EdgeValues(NASTY, {(Node(0, 0), Node(0, 1)): 1.0}, {(Node(0, 0), Node(0, 1)): NASTY})
    text = draw_wiring(nasty, title=NASTY, values=values)
    assert "<script" not in text
    assert "<b>" not in text
    assert f"({NASTY})" in "".join(t.text for t in ElementTree.fromstring(text).iter(f"{SVG}title"))


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_page_shows_its_numbers_as_text_and_fetches_nothing():
    text = wiring_page(NASTY, [draw_wiring(WIRING, title=NASTY)], ("", NASTY), [(NASTY, NASTY)], notes=[NASTY])
    page = Page(text)
    assert page.text.count(NASTY) >= 6
    assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "a", "object"} == set()
    assert not [name for _, attrs in page.tags for name in attrs if name in {"src", "href"} or name.startswith("on")]
    assert "url(" not in text
    assert "prefers-color-scheme:dark" in text


# ------------------------------------------------------------------------------------------------------------ inspect


def test_gates_of_a_model_that_still_learns_are_its_own():
    model = wired_resnet(fan_in=2)
    found = inspect_target(Target("net", module=model), 16)
    assert found.candidates == candidates_of(model)
    stage_name, rows = next(iter(gate_values(model).items()))
    row = next(i for i, values in enumerate(rows) if len(values) > 2)
    s = [wiring.name for wiring in found.topology.stages].index(stage_name)
    for source, gate in zip(found.candidates.stages[s].reads[row], rows[row], strict=True):
        assert found.values.values[source, Node(s, row + 1)] == gate


def test_cells_say_how_many_channels_a_layer_reads():
    from mcdeploy.backbones.nnmass_cells import CellNet

    net = CellNet(widths=(4, 4), depths=(4, 5), skips=(3, 5), img_size=16).eval()
    found = inspect_target(Target("cells", module=net), 16)
    assert [len(wiring.blocks) for wiring in found.topology.stages] == [3, 4]
    for c, cell in enumerate(net.cells):
        for i, layer in enumerate(cell.layers, start=1):
            read = {source: value * 4 for (source, node), value in found.values.values.items() if node == Node(c, i)}
            assert sum(read.values()) == layer.conv.in_channels
            assert read[Node(c, i - 1)] == 4  # the one before whole
            assert set(found.topology.edges()[Node(c, i)]) == set(read)
    assert " of 4 channels" in draw_inspections([found], as_page=False)


def test_sparse_nets_show_what_each_unit_concatenates():
    from mcdeploy.backbones.sparsenet import SparseNet

    net = SparseNet((4, 4), 4, False, 1.0, 8, True, num_classes=10).eval()
    found = inspect_target(Target("sparse", module=net), 16)
    assert found.numbers["blocks"] == 8  # what reads a stage is no block of it
    assert "stage1.unit4 reads input of stage1" in edges(found.topology)
    assert "stage1.unit4 reads stage1.unit1" not in edges(found.topology)


def dynamic_resnet(seed=0):
    """DDW with routers whose decisions depend on the image."""
    model = mcdeploy.wire(small_resnet(3), "ddw", image_size=16)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2)
    return model.eval()


class FourBatches:
    """Images from faint to glaring, so that routers see a difference."""

    def __init__(self):
        brightness = torch.logspace(-1, 1.3, 8).view(8, 1, 1, 1)
        self.val = [(images(8, 16, seed) * brightness, torch.zeros(8)) for seed in range(4)]


def test_a_dynamic_wiring_is_measured_on_images():
    model, loaders = dynamic_resnet(), FourBatches()
    found = inspect_target(Target("net", module=model), 16, loaders)
    assert found.notes == ("the wiring depends on the image; the costs are those with every edge open",)
    opened, weighed, count = 0, 0.0, 0
    edge, share = min(found.values.values.items(), key=lambda item: abs(item[1] - 0.5))
    assert 0 < share < 1
    (s, source), (_, reader) = edge
    dynamic = model.get_submodule(found.topology.stages[s].name)
    with torch.no_grad():
        for batch, _ in loaders.val:
            for image in batch:
                model(image[None])
                seen = dynamic.wirings()
                count += 1
                opened += int(seen.open_BNN[0, source, reader])
                weighed += float(seen.weights_BNN[0, source, reader])
    assert share == pytest.approx(opened / count)
    assert found.values.says[edge].endswith(f"with a mean weight of {weighed / opened:.2f}")
    assert len({round(value, 6) for value in found.values.values.values()}) > 3


def test_the_costs_of_a_dynamic_wiring_are_those_with_every_edge_open():
    from mcdeploy.compile.prune import count_macs

    model = dynamic_resnet()
    for stage_name, _ in list(model.named_modules()):
        if stage_name.endswith("router.0"):
            torch.nn.init.constant_(model.get_submodule(stage_name).bias, -9.0)
    assert count_macs(model, images(1, 16)) < count_macs(small_resnet(3), images(1, 16))
    found = inspect_target(Target("net", module=model), 16)
    assert found.numbers["macs"] >= count_macs(small_resnet(3), images(1, 16))


def test_a_wiring_that_does_not_depend_on_the_image_cannot_be_measured_on_images():
    with pytest.raises(InputError, match="--data: is for wirings that depend on the image"):
        inspect_target(Target("net", module=small_resnet()), 16, FourBatches())


def test_a_model_that_does_not_take_the_size_says_so():
    with pytest.raises(InputError, match="does not run on images of 30 pixels"):
        inspect_target(Target("vit", module=timm_model("test_vit")), 30)


def test_ratios_are_to_the_first_target():
    small, big = (inspect_target(Target(f"net{n}", module=small_resnet(n)), 16) for n in (2, 4))
    heads, rows = compare_costs([big, small])
    assert heads == ["", "net4", "net2"]
    parameters = next(row for row in rows if row[0] == "parameters")
    ratio = small.numbers["parameters"] / big.numbers["parameters"]
    assert parameters[1:] == [f"{big.numbers['parameters']:,}", f"{small.numbers['parameters']:,} ({ratio:.3g} x)"]


def mcdeploy_inspect(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mcdeploy", "inspect", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as left:
        code = left.code or 0
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_net_without_stages_has_costs_and_a_sentence(tmp_path, capsys, monkeypatch):
    page, numbers = tmp_path / "x.html", tmp_path / "x.json"
    arguments = ("sparsenet40_12_cifar", "densenet121", "--image-size", 32, "--out", page, "--json", numbers)
    monkeypatch.setattr("mcdeploy.targets.peak_activation_bytes", lambda *_: 123_456)  # takes seconds on these
    code, out, error = mcdeploy_inspect(capsys, monkeypatch, *arguments)
    assert code == 0, error
    assert "7,978,856" in out
    assert "densenet121: no wiring to draw: " in out
    sparse, dense = json.loads(numbers.read_text())["targets"]
    assert sparse["blocks"] == 36
    assert len(sparse["stages"]) == 3
    assert dense["stages"] is None
    assert dense["parameters"] == 7_978_856
    assert "DenseNet has no wirable stage" in dense["notes"][0]
    assert sparse["notes"] == []
    assert sparse["peak_activation_bytes"] == 123_456
    shown = Page(page.read_text())
    assert sum(tag == "svg" for tag, _ in shown.tags) == 1
    assert "7,978,856" in shown.text


def test_a_picture_of_nothing_is_an_error_and_leaves_no_file(tmp_path, capsys, monkeypatch):
    arguments = ("test_resnet", "--image-size", 32, "--out", tmp_path / "x.svg", "--json", tmp_path / "x.json")
    code, out, error = mcdeploy_inspect(capsys, monkeypatch, *arguments)
    assert code == 2
    assert error == "error: --out: there is no wiring to draw in test_resnet\n"
    assert re.search(r"[1-9][\d,]+ parameters, [1-9][\d,]+ MACs", out)
    assert re.search(r"[1-9][\d,]+ bytes of feature maps", out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["resnet_digits", "--out", "x.png"], "is drawn into an .svg or an .html"),
        (["resnet_digits", "resnet20_cifar", "--out", "x.svg"], "an .svg holds one wiring"),
        (["resnet_digits", "--data", "digits"], "--data: is for wirings that depend on the image"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, error = mcdeploy_inspect(capsys, monkeypatch, *arguments)
    assert code == 2
    assert sentence in error
    assert list(tmp_path.iterdir()) == []


def test_a_plain_backbone_is_drawn_as_chains(tmp_path, capsys, monkeypatch):
    code, out, _ = mcdeploy_inspect(capsys, monkeypatch, "resnet_digits", "--out", tmp_path / "x.svg")
    assert code == 0
    assert "12 blocks, 0 of them dead, 12 live edges" in out
    svg = ElementTree.fromstring((tmp_path / "x.svg").read_text())
    kinds = [path.get("class").split()[-1] for path in svg.iter(f"{SVG}path") if path.find(f"{SVG}title") is not None]
    assert kinds.count("mcw-near") == 12
    assert set(kinds) == {"mcw-near", "mcw-host"}
