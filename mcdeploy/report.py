"""One HTML file that tells what was done to a network: what it gained, how it learned, what was cut, what proves it.

Self-contained: no script, no link, nothing fetched; pictures are SVG inside the page. It takes plain data and imports
no torch, so ``mcdeploy inspect`` draws with it too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mcdeploy.bench import COLOURS, BenchReport, distribution, with_interval
from mcdeploy.connectivity.topology import Node, Topology, count_edges

DARK_COLOURS = ("#5AA9E6", "#F28E4B", "#35C99D", "#E19AC4", "#E6B84A", "#A8DBF7")  # COLOURS, lighter


class HeadlineRow(NamedTuple):
    """One line of the first table; texts as they are to be read."""

    what: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class ReportData:
    """What a report can tell. What is left out leaves no gap in the page."""

    title: str
    headline: Sequence[HeadlineRow] = ()  # ``headline_rows`` makes them
    metrics_rows: Sequence[Mapping[str, Any]] = ()  # the lines of metrics.jsonl
    candidates: Topology | None = None  # what each block could have read: names the gates of metrics_rows
    before: Topology | None = None  # frozen wiring, dead blocks still in it
    after: Topology | None = None  # as compiled
    certificate: Mapping[str, Any] | None = None  # certificate.json
    parity: Sequence[Mapping[str, Any]] = ()  # one row a comparison, any columns
    bench: BenchReport | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)  # commands, versions, hashes


def write_report(path: Path | str, data: ReportData) -> None:
    """Write the page; the folder is made when it is not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_report(data), encoding="utf-8")


def write_run_report(
    path: Path,
    title: str,
    *,
    metrics: Path,
    candidates: Mapping[str, Any],
    certificate: Mapping[str, Any],
    accuracy: tuple[float, float],
    parity: Sequence[Mapping[str, Any]],
    bench: BenchReport | None,
    provenance: Mapping[str, str],
) -> None:
    """The page of one run, from its files: ``metrics.jsonl``, the checkpoint's candidates, the certificate."""
    before = Topology.from_json(certificate["topology"])
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.exists() else []
    write_report(
        path,
        ReportData(
            title=title,
            headline=headline_rows(accuracy=accuracy, certificate=certificate, bench=bench),
            metrics_rows=rows,
            candidates=Topology.from_json(candidates),
            before=before,
            after=before.without_dead_blocks()[0],
            certificate=certificate,
            parity=parity,
            bench=bench,
            provenance=provenance,
        ),
    )


def render_report(data: ReportData) -> str:
    """The page as text."""
    sections = {
        "What changed": _table(("", "before", "after", "change"), data.headline) if data.headline else "",
        "Wiring": _wirings(data.before, data.after),
        "Training": _training(data.metrics_rows),
        "Gates": _gates(data.metrics_rows, data.candidates, data.before),
        "Latency": _latency(data.bench) if data.bench else "",
        "Certificate": _certificate(data.certificate) if data.certificate else "",
        "Parity": _parity(data.parity),
        "Where this comes from": _table((), data.provenance.items()) if data.provenance else "",
    }
    body = "\n".join(f"<section><h2>{escape(head)}</h2>\n{text}</section>" for head, text in sections.items() if text)
    title = escape(data.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head>\n<body><main><h1>{title}</h1>\n{body}\n</main></body></html>\n"
    )


def headline_rows(
    *,
    accuracy: tuple[float, float] | None = None,
    certificate: Mapping[str, Any] | None = None,
    bench: BenchReport | None = None,
) -> tuple[HeadlineRow, ...]:
    """The first table from what is known.

    Args:
        accuracy: top-1 before and after, 0..1.
        bench: every runner but the first becomes a row for each batch size, held against the first.
    """
    rows = []
    if accuracy:
        before, after = accuracy
        rows.append(HeadlineRow("top-1", f"{before:.2%}", f"{after:.2%}", f"{(after - before) * 100:+.2f} points"))
    for what in ("parameters", "macs") if certificate else ():
        assert certificate is not None
        before, after = certificate[what]
        name = {"macs": "multiply-accumulates, one image"}.get(what, what)
        rows.append(HeadlineRow(name, _number(before), _number(after), f"{after / before - 1:+.1%}" if before else ""))
    for row in bench.latencies if bench else ():
        assert bench is not None
        first = bench.at(bench.runners[0].name, row.batch)
        if first and first is not row:
            what = f"latency of {row.runner} against {first.runner}, batch {row.batch}, p50 ms"
            change = f"{with_interval(row.ratio)} times (95 %)"
            rows.append(HeadlineRow(what, with_interval(first.p50_ms), with_interval(row.p50_ms), change))
    return tuple(rows)


# ------------------------------------------------------------------------------------------------------------- wiring

RADIUS = 13  # of a node, pixels
MARGIN = 14


def draw_wiring(topology: Topology, *, title: str) -> str:
    """The wiring as an SVG of its own: stages from left to right, each with its input (square) and blocks (circles).

    What a block reads enters it from the left: straight from the block before, in an arc above from further back in
    the stage, in an arc below from another stage. Dead blocks and what they read are faint and dashed. Every node and
    edge says its name when the pointer rests on it.
    """
    place, bands, width = _layout(topology)
    live = topology.live()
    edges = [(source, node) for node, sources in topology.edges().items() for source in sources]
    above = max((_lift(place, a, b) for a, b in edges if a.stage == b.stage), default=0.0)
    below = max((_lift(place, a, b) for a, b in edges if a.stage != b.stage), default=0.0)
    top = 56 + max(8.0, above - RADIUS)  # title, stage names, arcs
    y = top + RADIUS
    bottom = y + RADIUS + max(12.0, below - RADIUS + 8)
    height = bottom + 30

    drawn = [f'<text class="mcw-title" x="{MARGIN}" y="18">{escape(title)}</text>']
    for (left, right), stage in zip(bands, topology.stages, strict=True):
        drawn.append(
            f'<rect class="mcw-band" x="{left}" y="28" width="{right - left}" height="{bottom - 28:.1f}" rx="6"/>'
        )
        drawn.append(f'<text class="mcw-stage" x="{left + 8}" y="44">{escape(stage.name)}</text>')
    drawn += _hand_overs(topology, place, y)
    kinds = []
    for dead_turn in (True, False):  # live edges lie on top
        for source, node in edges:
            if (node not in live) == dead_turn:
                kind, path = _edge_path(place, source, node, y)
                kinds.append("dead" if dead_turn else kind)
                says = f"{topology.describe(node)} reads {topology.describe(source)}" + (" (dead)" if dead_turn else "")
                drawn.append(f'<path class="mcw-edge mcw-{kinds[-1]}" d="{path}"><title>{escape(says)}</title></path>')
    drawn += [_node(topology, node, x, y, node in live) for node, x in place.items()]
    legend, legend_width = _legend(topology, kinds, height - 12)
    width = max(width, legend_width, MARGIN * 2 + 8 * len(title))
    dense = " mcw-dense" if len(edges) > 5 * len(topology.edges()) else ""
    shrink = f"max-width:100%;min-width:{0.68 * width:.0f}px;height:auto"  # smaller could not be read; it scrolls then
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mcw{dense}" role="img" aria-label="{escape(title)}" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" style="{shrink}">'
        f"<style>{WIRING_CSS}</style>{''.join(drawn)}{legend}</svg>"
    )


def _layout(topology: Topology) -> tuple[dict[Node, float], list[tuple[float, float]], float]:
    """The x of every node, left and right of every stage's band, and the width of it all."""
    num_nodes = sum(1 + len(stage.blocks) for stage in topology.stages)
    step = 46 if num_nodes <= 24 else 38
    place: dict[Node, float] = {}
    bands = []
    x = float(MARGIN)
    for s, stage in enumerate(topology.stages):
        left = x
        for i in range(len(stage.blocks) + 1):
            place[Node(s, i)] = left + 24 + i * step
        right = max(left + 48 + len(stage.blocks) * step, left + 16 + 7.5 * len(stage.name))
        bands.append((left, right))
        x = right + 20
    return place, bands, x - 20 + MARGIN


def _lift(place: Mapping[Node, float], source: Node, node: Node) -> float:
    """How far the arc of an edge rises from the line of nodes; 0 for a straight one."""
    if source.stage == node.stage and node.index - source.index == 1:
        return 0.0
    return 16 + 0.75 * (place[node] - place[source]) ** 0.75


def _edge_path(place: Mapping[Node, float], source: Node, node: Node, y: float) -> tuple[str, str]:
    """What kind of edge it is, and the path that draws it."""
    lift = _lift(place, source, node)
    if not lift:
        return "near", f"M{place[source] + RADIUS:.1f} {y:.1f}H{place[node] - RADIUS:.1f}"
    side = -1 if source.stage == node.stage else 1
    start, end = place[source] + 4, place[node] - 4
    edge_y, control_y = y + side * (RADIUS - 1), y + side * (RADIUS + (lift - RADIUS) / 0.75)
    path = f"M{start:.1f} {edge_y:.1f}C{start:.1f} {control_y:.1f} {end:.1f} {control_y:.1f} {end:.1f} {edge_y:.1f}"
    return ("skip" if side < 0 else "across"), path


def _hand_overs(topology: Topology, place: Mapping[Node, float], y: float) -> Iterator[str]:
    for output in topology.outputs()[:-1]:
        after = Node(output.stage + 1, 0)
        says = f"the backbone hands the output of {topology.stages[output.stage].name} on"
        x, end = place[output] + RADIUS, place[after] - RADIUS
        yield f'<path class="mcw-edge mcw-host" d="M{x:.1f} {y:.1f}H{end:.1f}"><title>{escape(says)}</title></path>'


def _node(topology: Topology, node: Node, x: float, y: float, live: bool) -> str:
    name = topology.describe(node)
    says = name if live else f"{name}: dead, no output depends on it"
    state = "" if live else " mcw-dead"
    if node.index == 0:
        label, kind = "in", "mcw-input"
        shape = f'<rect x="{x - 11}" y="{y - 11}" width="22" height="22" rx="3"/>'
    else:
        blocks = topology.stages[node.stage].blocks
        named = all(len(block) <= 3 for block in blocks)
        label, kind = (blocks[node.index - 1] if named else str(node.index)), "mcw-block"
        shape = f'<circle cx="{x}" cy="{y}" r="{RADIUS}"/>'
    text = f'<text x="{x}" y="{y + 4:.1f}">{escape(label)}</text>'
    return f'<g class="mcw-node {kind}{state}"><title>{escape(says)}</title>{shape}{text}</g>'


def _legend(topology: Topology, kinds: Iterable[str], y: float) -> tuple[str, float]:
    """One swatch for each kind of edge that is there, and where the row ends."""
    words = {
        "near": "reads the node before",
        "skip": "reads further back",
        "across": "reads another stage",
        "dead": "dead: no output depends on it",
        "host": "handed on by the backbone",
    }
    present = {*kinds, *(["host"] if len(topology.stages) > 1 else [])}
    x, parts = float(MARGIN), []
    for kind, word in words.items():
        if kind in present:
            parts.append(f'<path class="mcw-edge mcw-{kind}" d="M{x:.0f} {y - 4:.0f}h26"/>')
            parts.append(f'<text class="mcw-legend" x="{x + 32:.0f}" y="{y:.0f}">{word}</text>')
            x += 32 + 6.4 * len(word) + 20
    return "".join(parts), x


def _wirings(before: Topology | None, after: Topology | None) -> str:
    parts = []
    for topology, when in ((before, "before"), (after, "after")):
        if topology and topology.stages:
            num_blocks, num_dead = len(topology.edges()), len(topology.dead_blocks())
            dead = f", {num_dead} of them dead" if num_dead else ""
            joins = f"; several inputs are joined by {topology.aggregate}" if topology != after or not before else ""
            title = f"{when.capitalize()}: {num_blocks} blocks{dead}, {count_edges(topology)} edges{joins}"
            parts.append(f'<div class="wide">{draw_wiring(topology, title=title)}</div>')
    if not parts:
        return ""
    return "<p>Signals run from left to right. Rest the pointer on a node or an edge for its name.</p>" + "".join(parts)


# ------------------------------------------------------------------------------------------------------------- charts


class Line(NamedTuple):
    """One line of a chart; ``label`` is written at its end."""

    xs: Sequence[float]
    ys: Sequence[float]
    colour: int | None  # into COLOURS, over and over; None: faint
    says: str  # shown when the pointer rests on it
    label: str = ""
    width: float = 2.0


@dataclass(frozen=True)
class Chart:
    """Lines over common axes, drawn by ``_draw_chart``."""

    title: str
    lines: Sequence[Line]
    x_label: str = ""
    y_range: tuple[float, float] | None = None
    percent: bool = False  # y is a fraction, shown in per cent
    x_from_zero: bool = False
    whole_x: bool = True  # ticks at whole numbers only
    mark: tuple[float, str] | None = None  # a vertical line and what it says
    log_y: bool = False
    dots: Sequence[tuple[float, float, int]] = ()  # x, y, colour
    width: int = 420
    height: int = 250
    label_width: int = 70  # right of the lines


def _draw_chart(chart: Chart) -> str:
    lines = [line for line in (_only_drawable(line, chart.log_y) for line in chart.lines) if line.xs]
    xs = [x for line in lines for x in line.xs]
    ys = [y for line in lines for y in line.ys]
    x_low, x_high = (0.0 if chart.x_from_zero else min(xs, default=0.0)), max(xs, default=1.0)
    y_low, y_high = chart.y_range or (min(ys, default=0.0), max(ys, default=1.0))
    x_low, x_high = _widened(x_low, x_high)
    y_low, y_high = _widened(y_low, y_high)
    left, right, top = (50.0 if chart.width > 300 else 32.0), chart.width - chart.label_width, 26.0
    bottom = chart.height - (36 if chart.x_label else 20)

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def py(y: float) -> float:
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    parts = [f'<text class="ct" x="{left:.0f}" y="14">{escape(chart.title)}</text>']
    ticks = _log_ticks(y_low, y_high) if chart.log_y else _ticks(y_low, y_high, 4 if chart.height > 180 else 2)
    for tick in ticks:
        text = f"{tick * 100:g} %" if chart.percent else f"{10**tick:.3g}" if chart.log_y else f"{tick:g}"
        parts.append(f'<path class="cg" d="M{left:.1f} {py(tick):.1f}H{right:.1f}"/>')
        parts.append(f'<text class="cl" text-anchor="end" x="{left - 5:.1f}" y="{py(tick) + 4:.1f}">{text}</text>')
    for tick in _ticks(x_low, x_high, int(right - left) // 45, chart.whole_x):
        parts.append(f'<path class="cg" d="M{px(tick):.1f} {bottom:.1f}v4"/>')
        parts.append(f'<text class="cl" text-anchor="middle" x="{px(tick):.1f}" y="{bottom + 16:.1f}">{tick:g}</text>')
    if chart.mark:
        x, says = chart.mark
        parts.append(f'<path class="cm" d="M{px(x):.1f} {top:.1f}V{bottom:.1f}"><title>{escape(says)}</title></path>')
    parts += [_polyline(line, [(px(x), py(y)) for x, y in zip(line.xs, line.ys, strict=True)]) for line in lines]
    parts += [
        f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="4" class="{_paint(colour)}"/>' for x, y, colour in chart.dots
    ]
    parts += _end_labels([(py(line.ys[-1]), line) for line in lines if line.label], right + 5, top, bottom)
    parts.append(f'<path class="ca" d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}"/>')
    if chart.x_label:
        where = f'x="{(left + right) / 2:.1f}" y="{chart.height - 5}"'
        parts.append(f'<text class="cl" text-anchor="middle" {where}>{escape(chart.x_label)}</text>')
    size = f'width="{chart.width}" height="{chart.height}" viewBox="0 0 {chart.width} {chart.height}"'
    return f'<svg class="chart" role="img" aria-label="{escape(chart.title)}" {size}>{"".join(parts)}</svg>'


def _only_drawable(line: Line, log_y: bool) -> Line:
    """A line without points that have no place, and with logarithms of y when asked."""
    points = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if log_y:
        points = [(x, math.log10(y)) for x, y in points if y > 0]
    return line._replace(xs=[x for x, _ in points], ys=[y for _, y in points])


def _paint(colour: int | None) -> str:
    """The class that gives a line, dot or text its colour."""
    return "kf" if colour is None else f"k{colour % len(COLOURS)}"


def _polyline(line: Line, points: Sequence[tuple[float, float]]) -> str:
    title = f"<title>{escape(line.says)}</title>"
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="{_paint(line.colour)}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>'
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{_paint(line.colour)}" points="{text}" stroke-width="{line.width}">{title}</polyline>'


def _end_labels(wanted: list[tuple[float, Line]], x: float, top: float, bottom: float) -> Iterator[str]:
    """Labels at the height of their lines' ends, pushed apart until none covers another."""
    gap = 12.0
    heights = [height for height, _ in sorted(wanted, key=lambda item: item[0])]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    overrun = max(0.0, heights[-1] - bottom) if heights else 0.0
    for i in reversed(range(len(heights))):
        ceiling = bottom if i == len(heights) - 1 else heights[i + 1] - gap
        heights[i] = min(heights[i], ceiling) if overrun else heights[i]
    for height, (_, line) in zip(heights, sorted(wanted, key=lambda item: item[0]), strict=True):
        yield f'<text class="{_paint(line.colour)}" x="{x:.1f}" y="{height + 4:.1f}">{escape(line.label)}</text>'


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers inside a range: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor, limit in ((1, 1.5), (2, 3.5), (5, 7.5), (10, 11)) if rough / power < limit)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2 and 5 times powers of ten inside a range of logarithms; of any round ones in a short one."""
    factors = (1, 2, 5) if high - low < 2 else (1,)
    logs = [power + math.log10(factor) for power in range(math.floor(low), math.ceil(high) + 1) for factor in factors]
    inside = [log for log in logs if low <= log <= high]
    return inside if len(inside) > 1 else [math.log10(tick) for tick in _ticks(10**low, 10**high, 3) if tick > 0]


# ----------------------------------------------------------------------------------------------------------- sections


def _training(rows: Sequence[Mapping[str, Any]]) -> str:
    epochs = [row for row in rows if row.get("kind") == "epoch"]
    steps = [row for row in rows if row.get("kind") == "step" and "step" in row]
    if not epochs:
        return ""
    frozen = _frozen_epoch(epochs)
    mark = (float(frozen), "gates frozen") if frozen else None
    lines = []
    if steps:  # epoch e covers e .. e + 1
        per_epoch = (steps[-1]["step"] + 1) / (steps[-1]["epoch"] + 1)
        thin = steps[:: max(1, len(steps) // 1500)]
        xs, ys = [row["step"] / per_epoch for row in thin], [row["loss"] for row in thin]
        lines.append(Line(xs, ys, None, "training loss of single updates", width=1))
    done = [row["epoch"] + 1 for row in epochs]
    lines.append(Line(done, [row["loss"] for row in epochs], 0, "training loss, mean of the epoch", "train"))
    tested = [row for row in epochs if "val_loss" in row]
    if tested:
        xs, ys = [row["epoch"] + 1 for row in tested], [row["val_loss"] for row in tested]
        lines.append(Line(xs, ys, 1, "validation loss", "validation"))
    charts = [Chart("Loss (nats, log scale)", lines, "epochs done", log_y=True, x_from_zero=True, mark=mark)]
    scored = [row for row in epochs if "top1" in row]
    if scored:
        xs, ys = [row["epoch"] + 1 for row in scored], [row["top1"] for row in scored]
        line = Line(xs, ys, 0, "top-1 on the validation images", f"{ys[-1]:.2%}")
        charts.append(
            Chart("Top-1 on the validation images", [line], "epochs done", percent=True, x_from_zero=True, mark=mark)
        )
    note = (
        f"<p>Dashed: after {frozen} epochs the gates were frozen, and the wiring stayed as it was.</p>"
        if frozen
        else ""
    )
    return f"<div>{''.join(map(_draw_chart, charts))}</div>{note}"


def _frozen_epoch(epochs: Sequence[Mapping[str, Any]]) -> int | None:
    """How many epochs had gates, when some had and some did not."""
    learned = [row["epoch"] for row in epochs if row.get("gates")]
    return max(learned) + 1 if learned and len(learned) < len(epochs) else None


def _gates(rows: Sequence[Mapping[str, Any]], candidates: Topology | None, before: Topology | None) -> str:
    epochs = [row for row in rows if row.get("kind") == "epoch" and row.get("gates")]
    if not epochs:
        return ""
    stages = []
    alone = 0
    for name, blocks in epochs[-1]["gates"].items():
        same = [row for row in epochs if list(map(len, row["gates"].get(name, ()))) == list(map(len, blocks))]
        highest = max((gate for row in same for gates in row["gates"][name] for gate in gates), default=1.0)
        charts = []
        for b, final in enumerate(blocks):
            if len(final) < 2:
                alone += 1
                continue
            reader, sources, kept = _names_of_gates(name, b, len(final), candidates, before)
            lines = [
                _gate_line(
                    [row["epoch"] + 1 for row in same], [row["gates"][name][b][c] for row in same], c, sources, kept
                )
                for c in range(len(final))
            ]
            lines.sort(key=lambda line: line.colour is not None)  # coloured ones on top
            charts.append(Chart(f"{reader} reads", lines, y_range=(0.0, highest or 1.0), width=252, height=150))
        if charts:
            stages.append(f"<h3>{escape(name)}</h3><div>{''.join(map(_draw_chart, charts))}</div>")
    if not stages:
        return ""
    known = "Coloured lines were kept when the gates were frozen, grey ones were cut." if candidates and before else ""
    single = f" Not shown: {alone} block(s) with a single source, which have nothing to learn." if alone else ""
    return (
        "<p>One panel for each block, one line for each source that it may read. The height is the source's gate: its "
        "share, after normalising, of the chance to be drawn as an input; in the end the largest ones stay. From left "
        f"to right: epochs done. All panels of a stage share one scale. {known}{single}</p>{''.join(stages)}"
    )


def _names_of_gates(
    stage: str, block: int, count: int, candidates: Topology | None, before: Topology | None
) -> tuple[str, list[str], set[int] | None]:
    """The reader's name, the names of its sources, and which of them were kept; None: not known."""
    s = next((i for i, wiring in enumerate(candidates.stages) if wiring.name == stage), None) if candidates else None
    nodes = candidates.stages[s].reads[block] if candidates and s is not None else ()
    if candidates is None or s is None or len(nodes) != count:
        return f"{stage}, block {block + 1}", [f"source {c + 1}" for c in range(count)], None
    names = ["input" if node == Node(s, 0) else candidates.describe(node) for node in nodes]
    kept = None
    if before and s < len(before.stages) and block < len(before.stages[s].reads):
        kept = {c for c, node in enumerate(nodes) if node in before.stages[s].reads[block]}
    return candidates.describe(Node(s, block + 1)), names, kept


def _gate_line(xs: Sequence[float], ys: Sequence[float], c: int, sources: Sequence[str], kept: set[int] | None) -> Line:
    says = f"{sources[c]}: {ys[-1]:.3f} in the end" + ("" if kept is None else ", kept" if c in kept else ", cut")
    if kept is not None and c not in kept:
        return Line(xs, ys, None, says, width=1.2)
    rank = c if kept is None else sorted(kept).index(c)
    return Line(xs, ys, rank, says, _short(sources[c], 10))


def _latency(bench: BenchReport) -> str:
    names = [runner.name for runner in bench.runners]
    charts = []
    for batch in dict.fromkeys(row.batch for row in bench.latencies):
        lines, dots = [], []
        for row in (row for row in bench.latencies if row.batch == batch):
            shares, times_ms = distribution(row)
            colour = names.index(row.runner)
            lines.append(Line(times_ms, [share / 100 for share in shares], colour, row.runner))
            dots.append((row.p50_ms.value, 0.5, colour))
        charts.append(
            Chart(
                f"Batch {batch}: inferences at most this slow",
                lines,
                "milliseconds, up to p99; the dot is the median",
                y_range=(0.0, 1.0),
                percent=True,
                x_from_zero=True,
                whole_x=False,
                dots=dots,
                label_width=16,
            )
        )
    keys = "".join(f'<span class="key {_paint(i)}"><span></span>{escape(name)}</span> ' for i, name in enumerate(names))
    rows = [
        (
            str(row.batch),
            row.runner,
            *map(with_interval, (row.p50_ms, row.p90_ms, row.p99_ms)),
            f"{row.images_per_second:,.0f}" if row.images_per_second >= 100 else _number(row.images_per_second),
            with_interval(row.ratio) if row.runner != names[0] else "1",
            f"{row.num_samples}" + (" (p99 is rough)" if row.p99_is_rough else ""),
        )
        for row in bench.latencies
    ]
    heads = ("batch", "runner", "p50 ms", "p90 ms", "p99 ms", "images/s", f"ratio to {names[0]}", "samples")
    facts = [
        (
            runner.name,
            ", ".join(f"{key} {value}" for key, value in runner.facts.items()),
            f"+{runner.load_bytes / 2**20:.0f} MiB loaded, +{runner.run_bytes / 2**20:.0f} MiB running",
        )
        for runner in bench.runners
    ]
    machine = "; ".join(f"{key} {value}" for key, value in bench.machine.items())
    return (
        f"<p>{keys}</p><div>{''.join(map(_draw_chart, charts))}</div>"
        f"<p>In brackets: 95 % intervals. Ratios below 1 are faster. "
        f"Measured {escape(bench.created)} on {escape(machine)}.</p>"
        f"{_table(heads, rows)}{_table(('runner', 'what ran', 'process memory'), facts)}"
        f"<details><summary>What these numbers mean</summary>{_table((), bench.method.items())}</details>"
    )


def _certificate(certificate: Mapping[str, Any]) -> str:
    parts = []
    costs = [
        HeadlineRow(name, _number(pair[0]), _number(pair[1]), f"{pair[1] / pair[0] - 1:+.1%}" if pair[0] else "")
        for key, name in (
            ("parameters", "parameters"),
            ("macs", "multiply-accumulates"),
            ("milliseconds", "milliseconds"),
        )
        if (pair := certificate.get(key))
    ]
    if costs:
        parts.append(_table(("", "before", "after", "change"), costs))
    if certificate.get("checks"):
        parts.append("<h3>Checks that passed</h3>" + _parity(certificate["checks"]))
    removed = certificate.get("removed") or {}
    if removed:
        parts.append("<h3>What was removed, and why</h3>")
    for reason, names in removed.items():
        items = "".join(f"<li>{escape(str(name))}</li>" for name in names)
        opened = " open" if len(names) <= 12 else ""
        parts.append(f"<details{opened}><summary>{escape(reason)} ({len(names)})</summary><ul>{items}</ul></details>")
    return "".join(parts)


def _parity(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    return _table(
        [head.replace("_", " ") for head in heads], [[_cell(row.get(head, "")) for head in heads] for row in rows]
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "passed" if value else "FAILED"
    return _number(value) if isinstance(value, int | float) else str(value)


def _number(value: float) -> str:
    """Counts with separators, fractions to four digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return "0" if value == 0 else f"{value:.4g}"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is a heading, and a cell that starts with a digit or sign stands to the right."""

    def cell(text: str) -> str:
        kind = ' class="n"' if text[:1].isdigit() or text[:1] in "+-~" else ""
        return f"<td{kind}>{escape(text)}</td>"

    head = f"<thead><tr>{''.join(f'<th>{escape(text)}</th>' for text in heads)}</tr></thead>" if heads else ""
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(cell(text) for text in row[1:])}</tr>'
        for row in map(tuple, rows)
    )
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


WIRING_CSS = (
    ".mcw{background:#fff;font-family:system-ui,sans-serif}.mcw text{fill:#222}"
    ".mcw-title{font-size:14px;font-weight:600}.mcw-stage{font-size:12px}.mcw-legend{font-size:12px}"
    ".mcw-band{fill:#f2f4f7}.mcw-edge{fill:none;stroke-width:2.4;stroke:#333}"
    ".mcw-dense .mcw-skip,.mcw-dense .mcw-across{stroke-width:.9;stroke-opacity:.6}"
    ".mcw-skip{stroke:#d55e00}.mcw-across{stroke:#009e73}.mcw-host{stroke:#888;stroke-width:1.2}"
    ".mcw-edge.mcw-dead{stroke:#999;stroke-width:1;stroke-dasharray:3 3}"
    ".mcw-node text{font-size:11px;text-anchor:middle}.mcw-input rect{fill:#fff;stroke:#555;stroke-width:1.4}"
    ".mcw-block circle{fill:#0072b2;stroke:#0072b2;stroke-width:1.4}.mcw .mcw-block text{fill:#fff}"
    ".mcw-node.mcw-dead circle,.mcw-node.mcw-dead rect{fill:#fff;stroke:#999;stroke-dasharray:3 3}"
    ".mcw .mcw-node.mcw-dead text{fill:#888}"
    "@media(prefers-color-scheme:dark){.mcw{background:#16181d}.mcw text{fill:#ddd}.mcw-band{fill:#22262d}"
    ".mcw-edge{stroke:#ccc}.mcw-skip{stroke:#f28e4b}.mcw-across{stroke:#35c99d}.mcw-host{stroke:#888}"
    ".mcw-edge.mcw-dead{stroke:#777}.mcw-input rect{fill:#16181d;stroke:#aaa}"
    ".mcw-node.mcw-dead circle,.mcw-node.mcw-dead rect{fill:#16181d;stroke:#777}}"
)

PALETTE, DARK_PALETTE = (
    "".join(f".k{i}{{color:{colour}}}" for i, colour in enumerate(colours)) for colours in (COLOURS, DARK_COLOURS)
)
CSS = (
    f"""{PALETTE}@media(prefers-color-scheme:dark){{{DARK_PALETTE}}}"""
    + """
:root{color-scheme:light dark;--text:#222;--faint:#667;--line:#d5d9e0;--back:#fff;--soft:#f2f4f7}
@media(prefers-color-scheme:dark){:root{--text:#ddd;--faint:#9aa;--line:#3a3f48;--back:#16181d;--soft:#22262d}}
body{margin:0;background:var(--back);color:var(--text);font:15px/1.5 system-ui,sans-serif}
main{max-width:1100px;margin:0 auto;padding:24px}
h1{font-size:26px;margin:0 0 8px}h2{font-size:19px;margin:32px 0 10px;border-bottom:1px solid var(--line)}
h3{font-size:15px;margin:18px 0 6px}p{margin:8px 0;max-width:80ch}
.wide{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse}
th,td{padding:4px 14px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{font-weight:600;color:var(--faint)}tbody th{font-weight:500}
td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
ul{columns:3 200px;margin:4px 0;font-family:ui-monospace,monospace;font-size:13px}summary{cursor:pointer}
.key{margin-right:16px;white-space:nowrap}
.key span{display:inline-block;width:22px;height:4px;margin-right:6px;vertical-align:middle;background:currentColor}
.chart{max-width:100%;height:auto;margin:4px 10px 4px 0}.chart text{font-size:11px;fill:currentColor}
.chart .ct{font-size:13px;font-weight:600;fill:var(--text)}.chart .cl{fill:var(--faint)}
.chart .cg{stroke:var(--line);fill:none}.chart .ca{stroke:var(--faint);fill:none}
.chart .cm{stroke:var(--faint);stroke-dasharray:4 3;fill:none}
.chart polyline{fill:none;stroke:currentColor}.chart circle{fill:currentColor}
.chart .kf{color:#8d95a3;stroke-opacity:.6}
"""
)
