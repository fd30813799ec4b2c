"""The report shows what it was given, all of it as text and nothing as markup, and fetches nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from mcdeploy import connectivity
from mcdeploy.bench import METHOD, BenchReport, Interval, Latency, Measured
from mcdeploy.connectivity.topology import Node, StageWiring, Topology
from mcdeploy.report import HeadlineRow, ReportData, headline_rows, render_report, write_report

NASTY = "<script>alert('1')</script>&\"x\""
VOID = {"meta", "link", "br", "img", "hr", "input"}
SECTIONS = ("What changed", "Wiring", "Training", "Gates", "Latency", "Certificate", "Parity", "Where this comes from")


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text by innermost tag, and whether every tag was closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open, self.heads = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.heads.append(data)

    @property
    def text(self):
        return "\n".join(self.texts)


def stage(s, name, *reads, blocks=None):
    reads = tuple(tuple(sorted(Node(s, r) if isinstance(r, int) else Node(*r) for r in row)) for row in reads)
    return StageWiring(name, blocks or tuple(str(i) for i in range(len(reads))), reads)


# layer1.1 (node 2) is dead: node 3 reads the input and node 1.
WIRING = Topology((stage(0, "layer1", [0], [0, 1], [0, 1]), stage(1, "layer2", [0], [1])))
CANDIDATES = Topology((stage(0, "layer1", [0], [0, 1], [0, 1, 2]), stage(1, "layer2", [0], [0, 1])))


def latency(runner, batch, p50, ratio):
    p = Interval(p50, p50 * 0.9, p50 * 1.1)
    quantiles = tuple(p50 * (0.5 + i / 200) for i in range(201))
    return Latency(
        runner,
        batch,
        500,
        100,
        "host",
        p,
        p,
        p,
        True,
        p50 / 2,
        p50,
        batch / p50 * 1e3,
        ratio,
        p50,
        quantiles,
        10,
        "load",
        "budget",
    )


def a_bench(first="big", second="small"):
    return BenchReport(
        "2026-01-02T03:04:05Z",
        (
            Measured(first, {"provider": "cpu", "threads": "2"}, 2**20, 2**21),
            Measured(second, {"provider": "cpu"}, 2**20, 0),
        ),
        (latency(first, 1, 10.0, Interval(1, 1, 1)), latency(second, 1, 6.0, Interval(0.6, 0.58, 0.61))),
        {"cpu": "Fast CPU"},
        METHOD,
    )


def metrics(gates=((1.0,), (0.5, 0.5), (0.2, 0.3, 0.5))):
    rows = [{"kind": "step", "epoch": s // 5, "step": s, "loss": 3 / (s + 1), "lr": 0.1} for s in range(20)]
    for epoch in range(4):
        learned = {"layer1": [[g + 0.01 * epoch for g in row] for row in gates]} if epoch < 3 else {}
        top1 = 0.3 + 0.2 * epoch
        rows.append({"kind": "epoch", "epoch": epoch, "loss": 1.0, "gates": learned, "top1": top1, "val_loss": 2.0})
    return rows


CERTIFICATE = {
    "removed": {"dead: no stage output depends on it": ["layer1.1"], "folded": [f"bn{i}" for i in range(40)]},
    "parameters": (2000, 1500),
    "macs": (10_000, 8000),
    "topology": {},
    "checks": ({"step": "fold", "bn": "scrambled", "must_be": "within 1e-10 in float64", "max_relative": 3e-15},),
}
PARITY = ({"hop": "onnx", "batch": 7, "max_abs": 1.5e-6, "passed": True}, {"hop": "int8", "batch": 7, "passed": False})
EVERYTHING = ReportData(
    "digits",
    headline_rows(accuracy=(0.95, 0.94), certificate=CERTIFICATE, bench=a_bench()),
    metrics(),
    CANDIDATES,
    WIRING,
    WIRING.without_dead_blocks()[0],
    CERTIFICATE,
    PARITY,
    a_bench(),
    {"torch": "2.14.1", "command": "mcdeploy demo"},
)


def test_a_full_report_is_whole_html_with_every_section_in_order():
    assert tuple(Page(render_report(EVERYTHING)).heads) == SECTIONS


@pytest.mark.parametrize(
    ("field", "empty", "gone"),
    [
        ("headline", (), {"What changed"}),
        ("metrics_rows", (), {"Training", "Gates"}),
        ("certificate", None, {"Certificate"}),
        ("parity", (), {"Parity"}),
        ("bench", None, {"Latency"}),
        ("provenance", {}, {"Where this comes from"}),
        ("candidates", None, set()),
        ("before", None, set()),
        ("after", None, set()),
    ],
)
def test_a_part_that_is_missing_leaves_its_section_out_and_no_other(field, empty, gone):
    parts = {**vars(EVERYTHING), field: empty}
    assert set(SECTIONS) - set(Page(render_report(ReportData(**parts))).heads) == gone


def test_a_report_of_nothing_is_a_page_with_a_title():
    page = Page(render_report(ReportData("empty")))
    assert page.heads == []
    assert "empty" in page.text


def test_a_report_without_learned_gates_has_no_gate_section():
    rows = [{**row, "gates": {}} for row in metrics()]
    heads = Page(render_report(ReportData("x", metrics_rows=rows))).heads
    assert heads == ["Training"]


def test_the_page_fetches_nothing_and_runs_nothing():
    for tag, attributes in Page(render_report(EVERYTHING)).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "form", "img", "a"}
        for name, value in attributes.items():
            assert name not in {"src", "href", "xlink:href", "action", "data", "background"}
            assert not name.startswith("on")
            assert "url(" not in (value or "")
            assert "//" not in (value or "") or (name, value) == ("xmlns", "http://www.w3.org/2000/svg")
    assert "@import" not in render_report(EVERYTHING)
    assert "url(" not in render_report(EVERYTHING)


def nasty_report():
    wiring = Topology((stage(0, NASTY, [0], [0, 1], blocks=("<i>", NASTY)), stage(1, "s", [0], blocks=("<b>",))))
    rows = [
        {"kind": "epoch", "epoch": e, "loss": 1.0, "top1": 0.5, "gates": {NASTY: [[1.0], [0.4, 0.6]]}} for e in (0, 1)
    ]
    return ReportData(
        NASTY,
        [HeadlineRow(NASTY, NASTY, NASTY, NASTY)],
        rows,
        wiring,
        wiring,
        wiring,
        {**CERTIFICATE, "removed": {NASTY: [NASTY]}, "checks": [{NASTY: NASTY}]},
        [{NASTY: NASTY}],
        BenchReport(
            NASTY,
            (Measured(NASTY, {NASTY: NASTY}, 1, 1),),
            (latency(NASTY, 1, 1.0, Interval(1, 1, 1)),),
            {NASTY: NASTY},
            {NASTY: NASTY},
        ),
        {NASTY: NASTY},
    )


def test_every_string_is_shown_as_text_and_never_as_markup():
    text = render_report(nasty_report())
    page = Page(text)
    assert "<script" not in text
    assert not {"script", "b", "i"} & {tag for tag, _ in page.tags}
    assert page.text.count(NASTY) > 20
    known = {tag for tag, _ in Page(render_report(EVERYTHING)).tags}
    assert {tag for tag, _ in page.tags} <= known


def test_strings_without_names_for_the_gates_are_escaped_too():
    data = ReportData(**{**vars(nasty_report()), "candidates": None})
    assert "<script" not in render_report(data)


def test_the_file_is_written_with_its_folder_and_is_utf8(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(path, ReportData("größer"))
    assert path.read_text(encoding="utf-8") == render_report(ReportData("größer"))
    assert "größer" in Page(path.read_text(encoding="utf-8")).text


def test_reports_are_written_without_torch():
    # The package mcdeploy.connectivity imports torch for its rules; topology alone needs none of it.
    code = f"""
import sys, types
package = types.ModuleType("mcdeploy.connectivity")
package.__path__ = {list(connectivity.__path__)!r}
sys.modules["mcdeploy.connectivity"] = package
import mcdeploy.report
print("torch" in sys.modules, "matplotlib" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# ---------------------------------------------------------------------------------------------------------- headline


def test_the_headline_says_before_after_and_change():
    rows = [tuple(row) for row in headline_rows(accuracy=(0.95, 0.94), certificate=CERTIFICATE, bench=a_bench())]
    assert rows == [
        ("top-1", "95.00%", "94.00%", "-1.00 points"),
        ("parameters", "2,000", "1,500", "-25.0%"),
        ("multiply-accumulates, one image", "10,000", "8,000", "-20.0%"),
        (
            "latency of small against big, batch 1, p50 ms",
            "10.0 [9.00, 11.0]",
            "6.00 [5.40, 6.60]",
            "0.600 [0.580, 0.610] times (95 %)",
        ),
    ]


def test_a_headline_of_nothing_is_empty():
    assert headline_rows() == ()


# ------------------------------------------------------------------------------------------------------------ charts


def charts(data):
    """Title of every chart to its root element."""
    page = render_report(data)
    found = {}
    for part in page.split('<svg class="chart"')[1:]:
        root = ElementTree.fromstring('<svg class="chart"' + part.split("</svg>")[0] + "</svg>")
        found[root.get("aria-label")] = root
    return found


def test_gates_are_named_and_the_kept_ones_are_coloured():
    drawn = charts(EVERYTHING)
    lines = {line.find("title").text: line.get("class") for line in drawn["layer1.2 reads"].iter("polyline")}
    assert lines == {
        "input: 0.220 in the end, kept": "k0",
        "layer1.0: 0.320 in the end, kept": "k1",
        "layer1.1: 0.520 in the end, cut": "kf",
    }
    assert "layer1.0 reads" not in drawn  # a single source
    assert "Not shown: 1 block(s) with a single source" in Page(render_report(EVERYTHING)).text


def test_without_names_gates_are_numbered_and_none_is_called_cut():
    drawn = charts(ReportData(**{**vars(EVERYTHING), "candidates": None}))
    titles = [line.find("title").text for line in drawn["layer1, block 3 reads"].iter("polyline")]
    assert titles == ["source 1: 0.220 in the end", "source 2: 0.320 in the end", "source 3: 0.520 in the end"]


def test_training_shows_loss_top1_and_when_the_gates_were_frozen():
    drawn = charts(EVERYTHING)
    says = [line.find("title").text for line in drawn["Loss (nats, log scale)"].iter("polyline")]
    assert says == ["training loss of single updates", "training loss, mean of the epoch", "validation loss"]
    assert "90.00%" in [text.text for text in drawn["Top-1 on the validation images"].iter("text")]
    assert "after 3 epochs the gates were frozen" in Page(render_report(EVERYTHING)).text


def test_a_higher_value_stands_higher_and_a_later_one_further_right():
    line = next(charts(EVERYTHING)["Top-1 on the validation images"].iter("polyline"))
    points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
    assert points == sorted(points)
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=True)
    assert len(points) == 4


def test_a_single_epoch_and_a_loss_that_is_not_finite_are_drawn_without_it():
    rows = [{"kind": "epoch", "epoch": 0, "loss": float("nan"), "gates": {}, "top1": 0.5}]
    drawn = charts(ReportData("x", metrics_rows=rows))
    assert list(drawn["Loss (nats, log scale)"].iter("polyline")) == []
    assert len(list(drawn["Top-1 on the validation images"].iter("circle"))) == 1
    assert "nan" not in render_report(ReportData("x", metrics_rows=rows)).lower()


def test_labels_at_the_ends_of_lines_do_not_cover_each_other():
    rows = metrics(gates=((1.0,), (0.5, 0.5), (0.3, 0.3, 0.3)))
    root = charts(ReportData("x", metrics_rows=rows))["layer1, block 3 reads"]
    heights = sorted(float(text.get("y")) for text in root.iter("text") if (text.text or "").startswith("source"))
    assert len(heights) == 3
    assert min(b - a for a, b in pairwise(heights)) >= 12


# ---------------------------------------------------------------------------------------------------------- sections


def test_the_certificate_names_every_part_that_was_removed():
    text = Page(render_report(EVERYTHING)).text
    assert "layer1.1" in text
    assert all(f"bn{i}" in text for i in range(40))
    assert "folded (40)" in text
    assert "3e-15" in text


def test_parity_rows_may_have_different_columns_and_a_failure_is_loud():
    text = render_report(ReportData("x", parity=PARITY))
    assert re.findall(r"<th>(.*?)</th>", text) == ["hop", "batch", "max abs", "passed"]
    assert re.findall(r"<td.*?>(.*?)</td>", text) == ["7", "1.5e-06", "passed", "7", "", "FAILED"]


def test_latency_shows_intervals_memory_machine_and_what_the_numbers_mean():
    text = Page(render_report(EVERYTHING)).text
    for words in ("0.600 [0.580, 0.610]", "+1 MiB loaded, +2 MiB running", "Fast CPU", METHOD["ratio"], "p99 is rough"):
        assert words in text


def test_a_certificate_that_went_through_json_looks_the_same():
    through_json = json.loads(json.dumps(CERTIFICATE))
    assert render_report(ReportData("x", certificate=through_json)) == render_report(
        ReportData("x", certificate=CERTIFICATE)
    )


def test_models_are_shown_with_types_accuracy_and_what_stayed_behind():
    from mcdeploy.report import models_section

    shared = {"accuracy": 0.9, "agreement": 0.985, "latency": ["batch 1: 2 [1, 3]"]}
    models = {
        "int8": {"file": "model.int8.onnx", "nodes": {"Conv": {"int8": 3, "fp32": 1}}, **shared},
        "tensorrt-fp16": {"file": "m.plan", "nodes": {"layers": {"fp16": 7}}, **shared, "accuracy": None},
    }
    kept = {"node": "a/Conv", "operator": "Conv", "why": "sum", "peak": 1e5}
    layers = [
        {"node": "b/Conv", "runs_in": "fp32", "why": "in groups & slow"},
        {"node": "c/Conv", "runs_in": "int8", "why": ""},
    ]
    int8 = {
        "layers": layers, "residual_adds": [1, 2], "excluded": ["b/Conv"], "top1": 0.9, "baseline_top1": 0.91,
        "max_top1_drop": 0.02, "groups": [{"shape": "Conv 8 -> 8, groups 8", "quantised": False}],
        "sensitivity": [{"node": "c/Conv", "snr_db": 12.34, "top1_agreement": 0.5}],
    }  # fmt: skip
    made = {"fp16": {"limit": 32752.0, "num_images": 64, "kept": [kept]}, "int8": int8}
    text = Page(render_report(ReportData("x", more={"Models": models_section(models, made)}))).text
    for words in (
        "Conv 3 int8, 1 fp32", "90.00%", "98.50%", "batch 1: 2 [1, 3]", "layers 7 fp16", "a/Conv",
        "1 of 2 layers in 8 bits, 1 of 2 additions", "1 left out for accuracy", "in groups & slow", "12.3",
        "Conv 8 -> 8, groups 8",
    ):  # fmt: skip
        assert words in text, words


def test_a_departure_names_the_first_tensor_and_marks_what_is_beyond_the_limit():
    from mcdeploy.report import departure_section

    rows = [{"name": "a/Conv", "max_abs": 1e-7}, {"name": "<b>/Conv", "max_abs": float("inf")}]
    found = {"hop": "onnx", "first": rows[1], "distances": rows, "limit": 1e-3}
    text = Page(render_report(ReportData("x", more={"Where": departure_section(found)}))).text
    assert "The first tensor that departs is that of <b>/Conv." in text
    assert text.count("beyond") == 1
    nowhere = departure_section({**found, "first": None, "distances": rows[:1]})
    assert "between the last one and the logits" in nowhere
