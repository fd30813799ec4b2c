"""Pictures as SVG text: the wiring of a network, and line charts. Plain data in, no torch, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from mcdeploy.bench import COLOURS
from mcdeploy.connectivity.topology import Node, Topology

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
    """Lines over common axes, drawn by ``draw_chart``."""

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


def draw_chart(chart: Chart) -> str:
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
        f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="4" class="{paint(colour)}"/>' for x, y, colour in chart.dots
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


def paint(colour: int | None) -> str:
    """The class that gives a line, dot or text its colour."""
    return "kf" if colour is None else f"k{colour % len(COLOURS)}"


def _polyline(line: Line, points: Sequence[tuple[float, float]]) -> str:
    title = f"<title>{escape(line.says)}</title>"
    if len(points) == 1:
        x, y = points[0]
        return f'<circle class="{paint(line.colour)}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>'
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{paint(line.colour)}" points="{text}" stroke-width="{line.width}">{title}</polyline>'


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
        yield f'<text class="{paint(line.colour)}" x="{x:.1f}" y="{height + 4:.1f}">{escape(line.label)}</text>'


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


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


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
