"""Pictures as SVG text: the wiring of a network, and line charts. Plain data in, no torch, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from typing import NamedTuple

from mcdeploy.bench_report import COLOURS
from mcdeploy.connectivity.topology import Node, Topology

# ------------------------------------------------------------------------------------------------------------- wiring

RADIUS = 13.0  # of a node, pixels
MARGIN = 14.0
MANY_EDGES = {"live": 1500, "dead": 300, "cut": 150}  # more: one path a reader, not one an edge, for a small file
THINNEST, THICKEST = 0.7, 5.0  # of an edge whose width means something

Edge = tuple[Node, Node]  # what is read, and who reads it


@dataclass(frozen=True)
class EdgeValues:
    """A number for edges: it becomes the width of the line, against the largest one, and a word when pointed at."""

    measure: str  # what the number is, such as ``gate``
    values: Mapping[Edge, float]  # none below 0; an edge without one is drawn as if none had
    says: Mapping[Edge, str]  # such as ``gate 0.62``
    closed: frozenset[Edge] = frozenset()  # edges that no image uses: they keep nothing alive

    def shares(self) -> dict[Edge, float]:
        """Every number against the largest one, 0..1."""
        largest = max(self.values.values(), default=0.0) or 1.0
        return {edge: value / largest for edge, value in self.values.items()}


def gate_values_of(candidates: Topology, gates: Mapping[str, Sequence[Sequence[float]]]) -> EdgeValues | None:
    """Gates as they are logged, by stage one list a block and one number a candidate, for the edges they belong to.

    Blocks whose gates are all 1 had nothing to learn and are left out. None when nothing is left.
    """
    learned = {name: [row if min(row, default=1.0) < 1 else () for row in rows] for name, rows in gates.items()}
    values = _by_edge(candidates, learned)
    says = {edge: f"gate {value:.2f}" for edge, value in values.items()}
    return EdgeValues("gate", values, says) if values else None


def open_shares_of(
    topology: Topology,
    shares: Mapping[str, Sequence[Sequence[float]]],
    weights: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> EdgeValues:
    """For a dynamic wiring the share of images, 0..1, for which each edge was open; lists as for gates.

    Args:
        weights: mean weight of each edge over the images for which it was open, where that is known.
    """
    values, means = _by_edge(topology, shares), _by_edge(topology, weights or {})
    says = {edge: f"open for {value:.1%} of the images" for edge, value in values.items()}
    says |= {edge: f"{says[edge]}, with a mean weight of {mean:.2f}" for edge, mean in means.items() if values[edge]}
    closed = frozenset(edge for edge, value in values.items() if not value)
    return EdgeValues("share of images it is open for", values, says, closed)


def _by_edge(topology: Topology, rows: Mapping[str, Sequence[Sequence[float]]]) -> dict[Edge, float]:
    """Numbers that are one a source, by edge."""
    return {
        (source, Node(s, i)): value
        for s, stage in enumerate(topology.stages)
        for i, (sources, row) in enumerate(zip(stage.reads, rows.get(stage.name, ()), strict=False), start=1)
        if len(sources) == len(row)
        for source, value in zip(sources, row, strict=True)
    }


def draw_wiring(
    topology: Topology, *, title: str, candidates: Topology | None = None, values: EdgeValues | None = None
) -> str:
    """The wiring as an SVG of its own: stages from left to right, each with its input (square) and blocks (circles).

    What a block reads enters it from the left: straight from the block before, in an arc above from further back in
    the stage, in an arc below from another stage. A stage of parallel branches stands in columns, one a module. Dead
    blocks and what they read are faint and dashed, candidates that were not kept are faint. Every node and edge says
    its name when the pointer rests on it.

    Args:
        candidates: what each block could have read; same stages and blocks as ``topology``.
        values: set the widths of the lines; without it they are all alike.
    """
    edges = {(source, node) for node, sources in topology.edges().items() for source in sources}
    offered = candidates.edges() if candidates else {}
    cut = {(source, node) for node, sources in offered.items() for source in sources} - edges
    layout = _layout(topology, edges | cut)
    y = 56 + max(RADIUS + 8, layout.above)  # title, stage names
    bottom = y + max(RADIUS + 12, layout.below + 8)
    closed = values.closed if values else frozenset()
    live = _live(topology, closed)
    idle = {edge for edge in edges if edge[1] not in live or edge in closed}

    drawn = [f'<text class="mcw-title" x="{MARGIN:g}" y="18">{escape(title)}</text>']
    for (left, right), stage in zip(layout.bands, topology.stages, strict=True):
        box = f'x="{_px(left)}" y="28" width="{_px(right - left)}" height="{_px(bottom - 28)}" rx="6"'
        drawn.append(f'<rect class="mcw-band" {box}/>')
        drawn.append(f'<text class="mcw-stage" x="{_px(left + 8)}" y="44">{escape(stage.name)}</text>')
    drawn += _column_names(topology, layout, y)
    drawn += _hand_overs(topology, layout, y)
    kinds = []
    for picked, state in (
        (cut, "cut"),
        (idle, "dead"),
        (edges - idle, "live"),  # on top
    ):
        for kind, path in _edges(topology, layout, picked, state, values, y):
            kinds.append(kind)
            drawn.append(path)
    joins = joins_of(topology)
    drawn += [_node(topology, layout, node, y, node in live, joins) for node in layout.at]
    width = max(layout.width, MARGIN * 2 + 8.8 * len(title), 480)
    legend, legend_width, legend_y = _legend(topology, kinds, values, bottom + 18, width)
    width, height = max(width, legend_width), legend_y + 12
    dense = " mcw-dense" if len(edges) > 5 * len(topology.edges()) else ""
    shrink = f"max-width:100%;min-width:{0.8 * width:.0f}px;height:auto"  # smaller could not be read; it scrolls then
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mcw{dense}" role="img" aria-label="{escape(title)}" '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" style="{shrink}">'
        f"<style>{WIRING_CSS}</style>{''.join(drawn)}{legend}</svg>"
    )


def _live(topology: Topology, closed: frozenset[Edge]) -> frozenset[Node]:
    """The nodes that an output depends on by edges that are not closed."""
    sources = {node: tuple(s for s in row if (s, node) not in closed) for node, row in topology.edges().items()}
    live, pending = set(), list(topology.outputs())
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending.extend(sources.get(node, ()))
    return frozenset(live)


class Point(NamedTuple):
    x: float
    y: float  # from the middle line of the picture


class Layout(NamedTuple):
    """Where everything stands."""

    at: dict[Node, Point]
    radius: tuple[float, ...]  # of the nodes of each stage
    columns: tuple[tuple[tuple[int, ...], ...] | None, ...]  # of each stage: its nodes by column; None: in a line
    bands: list[tuple[float, float]]  # left and right of each stage
    width: float
    above: float  # how far the picture reaches up and down from its middle line
    below: float


def columns_of(topology: Topology, stage: int, edges: Iterable[Edge] = ()) -> tuple[tuple[int, ...], ...] | None:
    """The nodes of a stage of parallel branches by column, its input first; None when it is not one.

    Blocks named ``<module>.<branch>`` share a column with their module's other branches, any other block has one to
    itself. It is a stage of parallel branches when some column has several blocks and all of its nodes, and the
    given ``edges`` too, read the column right before.
    """
    heads = [name.rpartition(".")[0] for name in topology.stages[stage].blocks]
    columns: list[list[int]] = [[0]]
    for i, head in enumerate(heads, start=1):
        if i > 1 and head and head == heads[i - 2]:
            columns[-1].append(i)
        else:
            columns.append([i])
    number = {i: c for c, column in enumerate(columns) for i in column}
    own = ((source, Node(stage, i)) for i, row in enumerate(topology.stages[stage].reads, start=1) for source in row)
    inside = all(
        source.stage == node.stage and number[source.index] == number[node.index] - 1
        for source, node in chain(own, edges)
        if node.stage == stage
    )
    return tuple(map(tuple, columns)) if inside and max(map(len, columns)) > 1 else None


def _layout(topology: Topology, edges: Iterable[Edge]) -> Layout:
    edges = tuple(edges)
    num_nodes = sum(1 + len(stage.blocks) for stage in topology.stages)
    at: dict[Node, Point] = {}
    columns, radius, bands = [], [], []
    above = below = 0.0
    x = MARGIN
    for s, stage in enumerate(topology.stages):
        columns.append(columns_of(topology, s, edges))
        radius.append(RADIUS)
        step = 46.0 if num_nodes <= 24 else 38.0
        left, num_steps = x, len(stage.blocks)
        if branches := columns[-1]:
            most = max(map(len, branches))
            radius[-1] = RADIUS if most <= 12 else max(3.5, RADIUS * 12 / most)
            gap, step, num_steps = round(2.6 * radius[-1]), min(150.0, 66 + 4.0 * most), len(branches) - 1
            for c, column in enumerate(branches):
                for row, i in enumerate(column):
                    at[Node(s, i)] = Point(left + 28 + c * step, (row - (len(column) - 1) / 2) * gap)
            above = max(above, (most - 1) / 2 * gap + radius[-1] + 20)  # the names of the columns
            below = max(below, (most - 1) / 2 * gap + radius[-1] + 6)
        else:
            at |= {Node(s, i): Point(left + 28 + i * step, 0.0) for i in range(num_steps + 1)}
        right = max(left + 56 + num_steps * step, left + 16 + 7.5 * len(stage.name))
        bands.append((left, right))
        x = right + 20
    layout = Layout(at, tuple(radius), tuple(columns), bands, x - 20 + MARGIN, above, below)
    above = max([above, *(_lift(layout, edge) for edge in edges if edge[0].stage == edge[1].stage)])
    below = max([below, *(_lift(layout, edge) for edge in edges if edge[0].stage != edge[1].stage)])
    return layout._replace(above=above, below=below)


def _lift(layout: Layout, edge: Edge) -> float:
    """How far the arc of an edge rises from the line of nodes; 0 for one without an arc."""
    source, node = edge
    if source.stage == node.stage and (layout.columns[node.stage] or node.index - source.index == 1):
        return 0.0
    return 16 + 0.75 * (layout.at[node].x - layout.at[source].x) ** 0.75


def _edges(
    topology: Topology, layout: Layout, edges: Iterable[Edge], state: str, values: EdgeValues | None, y: float
) -> Iterator[tuple[str, str]]:
    """Kind and SVG of every edge, or of every reader's edges when they are many. ``state``: live, dead or cut."""
    ordered = sorted(edges, key=lambda edge: (edge[1], edge[0]))
    many = len(ordered) > MANY_EDGES[state]
    shares = values.shares() if values else {}
    groups: dict[tuple[object, ...], list[Edge]] = {}
    for edge in ordered:
        groups.setdefault((edge[1], _kind(layout, edge)) if many else edge, []).append(edge)
    for group in groups.values():
        kind = _kind(layout, group[0]) if state == "live" else state
        style = ""
        known = [shares[edge] for edge in group if edge in shares]
        if known and state != "dead":
            share = sum(known) / len(known)
            thick, opacity = THINNEST + share * ((2.5 if many else THICKEST) - THINNEST), 0.25 + 0.75 * share**0.5
            if state == "cut":
                thick, opacity = 0.6 + share, 0.35 + 0.4 * share
            style = f' style="stroke-width:{thick:.2g};stroke-opacity:{opacity:.2g}"'
        d, says = "".join(_path(layout, edge, y) for edge in group), escape(_says(topology, group, state, values))
        yield kind, f'<path class="mcw-edge mcw-{kind}" d="{d}"{style}><title>{says}</title></path>'


def _says(topology: Topology, group: Sequence[Edge], state: str, values: EdgeValues | None) -> str:
    reader = topology.describe(group[0][1])
    verb = "could have read" if state == "cut" else "reads"
    told = []
    for edge in group:
        extra = [values.says[edge]] if values and edge in values.says else []
        if state == "dead" and len(group) == 1:
            extra.append("dead")
        told.append(topology.describe(edge[0]) + (f" ({', '.join(extra)})" if extra else ""))
    if len(told) == 1:
        return f"{reader} {verb} {told[0]}"
    more = f" and {len(told) - 12} more" if len(told) > 12 else ""
    return f"{reader}{' (dead)' if state == 'dead' else ''} {verb} {', '.join(told[:12])}{more}"


def _kind(layout: Layout, edge: Edge) -> str:
    if edge[0].stage != edge[1].stage:
        return "across"
    if layout.columns[edge[1].stage]:
        return "module"
    return "skip" if _lift(layout, edge) else "near"


def _path(layout: Layout, edge: Edge, y: float) -> str:
    """The path that draws an edge: a line, a double bend between columns, or an arc."""
    (x0, y0), (x1, y1) = layout.at[edge[0]], layout.at[edge[1]]
    y0, y1 = y + y0, y + y1
    before, after = layout.radius[edge[0].stage], layout.radius[edge[1].stage]
    if lift := _lift(layout, edge):
        side = -1 if edge[0].stage == edge[1].stage else 1
        start, end, control = _px(x0 + 4), _px(x1 - 4), _px(y + side * (RADIUS + (lift - RADIUS) / 0.75))
        from_y, to_y = _px(y0 + side * (before - 1)), _px(y1 + side * (after - 1))
        return f"M{start} {from_y}C{start} {control} {end} {control} {end} {to_y}"
    start, end, middle = _px(x0 + before), _px(x1 - after), _px((x0 + x1) / 2)
    if y0 == y1:
        return f"M{start} {_px(y0)}H{end}"
    return f"M{start} {_px(y0)}C{middle} {_px(y0)} {middle} {_px(y1)} {end} {_px(y1)}"


def _px(value: float) -> str:
    """Pixels to a tenth."""
    return f"{value:.1f}".removesuffix(".0")


def _column_names(topology: Topology, layout: Layout, y: float) -> Iterator[str]:
    for s, columns in enumerate(layout.columns):
        for column in columns or ():
            name = topology.stages[s].blocks[column[0] - 1].rpartition(".")[0] if len(column) > 1 else ""
            if name:
                x, top = layout.at[Node(s, column[0])]
                where = f'x="{_px(x)}" y="{_px(y + top - layout.radius[s] - 7)}"'
                yield f'<text class="mcw-column" {where}>{escape(name)}</text>'


def _hand_overs(topology: Topology, layout: Layout, y: float) -> Iterator[str]:
    for output in topology.outputs()[:-1]:
        after = Node(output.stage + 1, 0)
        says = f"the backbone hands the output of {topology.stages[output.stage].name} on"
        x, end = layout.at[output].x + RADIUS, layout.at[after].x - RADIUS
        path = f"M{_px(x)} {_px(y)}H{_px(end)}"
        yield f'<path class="mcw-edge mcw-host" d="{path}"><title>{escape(says)}</title></path>'


def _node(topology: Topology, layout: Layout, node: Node, y: float, live: bool, joins: frozenset[Node]) -> str:
    name = topology.describe(node)
    says = name if live else f"{name}: dead, no output depends on it"
    state = "" if live else " mcw-dead"
    x, y = layout.at[node].x, y + layout.at[node].y
    radius = layout.radius[node.stage]
    label = _label(topology, node, joins)
    is_block = node.index > 0 and node not in joins
    if is_block:
        kind, shape = "mcw-block", f'<circle cx="{_px(x)}" cy="{_px(y)}" r="{_px(radius)}"/>'
    else:
        half = 13 if len(label) < 3 else 16
        box = f'x="{_px(x - half)}" y="{_px(y - 11)}" width="{2 * half}" height="22" rx="3"'
        kind, shape = ("mcw-input" if node.index == 0 else "mcw-block mcw-join"), f"<rect {box}/>"
    text = "" if is_block and radius < 9 else f'<text x="{_px(x)}" y="{_px(y + 4)}">{escape(label)}</text>'
    return f'<g class="mcw-node {kind}{state}"><title>{escape(says)}</title>{shape}{text}</g>'


def joins_of(topology: Topology) -> frozenset[Node]:
    """The last entries of stages that are no blocks but join what they read, such as ``output`` after 0, 1, 2.

    They are told by their names, which are not numbered as all the others of their stage are.
    """
    found = set()
    for s, stage in enumerate(topology.stages):
        *others, last = (name.rpartition(".")[2] for name in stage.blocks)
        stems = {name.rstrip("0123456789") for name in others}
        numbered = len(stems) == 1 and all(name[-1:].isdigit() for name in others)
        if numbered and last.rstrip("0123456789") not in stems:
            found.add(Node(s, len(stage.blocks)))
    return frozenset(found)


def _label(topology: Topology, node: Node, joins: frozenset[Node]) -> str:
    """What stands in a node: the end of its name where that is short, else its number."""
    if node.index == 0:
        return "in"
    tails = [name.rpartition(".")[2] for name in topology.stages[node.stage].blocks]
    tail = tails[node.index - 1]
    if node in joins:
        return tail if len(tail) <= 3 else "out"
    if Node(node.stage, len(tails)) in joins:
        return tail[len(tail.rstrip("0123456789")) :]
    return tail if all(len(other) <= 3 for other in tails) else str(node.index)


def _legend(
    topology: Topology, kinds: Iterable[str], values: EdgeValues | None, y: float, width: float
) -> tuple[str, float, float]:
    """One swatch for each kind of edge that is there, in rows; how wide the widest is, and the height of the last."""
    words = {
        "near": "reads the node before",
        "module": "reads the module before",
        "skip": "reads further back",
        "across": "reads another stage",
        "dead": "dead: no output depends on it",
        "cut": "could have been read, not kept",
        "host": "handed on by the backbone",
    }
    present = {*kinds, *(["host"] if len(topology.stages) > 1 else [])}
    entries = [([(f"mcw-edge mcw-swatch mcw-{kind}", "", 26)], word) for kind, word in words.items() if kind in present]
    if values and values.values:
        steps = [("mcw-edge", f' style="stroke-width:{thick:g}"', 9) for thick in (THINNEST, 2.5, THICKEST)]
        entries.append((steps, f"the thicker, the larger the {values.measure}"))
    x, widest, parts = MARGIN, 0.0, []
    for swatches, word in entries:
        space = 32 + 6.4 * len(word)
        if x > MARGIN and x + space > width:
            x, y = MARGIN, y + 18
        for i, (kind, style, length) in enumerate(swatches):
            parts.append(f'<path class="{kind}" d="M{x + 9 * i:.0f} {y - 4:.0f}h{length}"{style}/>')
        parts.append(f'<text class="mcw-legend" x="{x + 32:.0f}" y="{y:.0f}">{escape(word)}</text>')
        x += space + 20
        widest = max(widest, x)
    return "".join(parts), widest, y


def wiring_page(
    title: str,
    pictures: Sequence[str],
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
) -> str:
    """One HTML page, without script and with nothing fetched: a table of numbers, then the pictures.

    Args:
        pictures: what ``draw_wiring`` made, one a network.
        heads: the first row of the table, one text a column; none leaves it out.
        rows: the others; their first text is what the row is about.
        notes: one paragraph each, below the table.
    """
    head = f"<thead><tr>{''.join(f'<th>{escape(text)}</th>' for text in heads)}</tr></thead>" if heads else ""
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(text)}</td>" for text in row[1:])}</tr>'
        for row in rows
    )
    drawn = "".join(f'<div class="wide">{picture}</div>' for picture in pictures)
    hint = ["Signals run from left to right. Rest the pointer on a node or an edge for its name."] if pictures else []
    said = "".join(f"<p>{escape(text)}</p>" for text in (*notes, *hint))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{PAGE_CSS}</style></head>\n<body><main><h1>{escape(title)}</h1>\n"
        f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>\n'
        f"{said}{drawn}\n</main></body></html>\n"
    )


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
    ".mcw .mcw-column{font-size:10px;text-anchor:middle;fill:#667}"
    ".mcw-band{fill:#f2f4f7}.mcw-edge{fill:none;stroke-width:2.4;stroke:#333}"
    ".mcw-module{stroke-width:1.8}"
    ".mcw-dense .mcw-skip,.mcw-dense .mcw-across,.mcw-dense .mcw-module{stroke-width:.9;stroke-opacity:.6}"
    ".mcw-dense .mcw-module{stroke-opacity:.3}"
    ".mcw .mcw-swatch{stroke-opacity:1}"
    ".mcw-skip{stroke:#d55e00}.mcw-across{stroke:#009e73}.mcw-host{stroke:#888;stroke-width:1.2}"
    ".mcw-edge.mcw-dead{stroke:#999;stroke-width:1;stroke-dasharray:3 3}"
    ".mcw-edge.mcw-cut{stroke:#8a94a6;stroke-width:.8;stroke-opacity:.55}"
    ".mcw-edge:hover{stroke:#0072b2!important;stroke-opacity:1!important;stroke-width:5!important}"
    ".mcw-node text{font-size:11px;text-anchor:middle;pointer-events:none}"
    ".mcw-input rect{fill:#fff;stroke:#555;stroke-width:1.4}"
    ".mcw-block circle,.mcw-block rect{fill:#0072b2;stroke:#0072b2;stroke-width:1.4}.mcw .mcw-block text{fill:#fff}"
    ".mcw-node.mcw-dead circle,.mcw-node.mcw-dead rect{fill:#fff;stroke:#999;stroke-dasharray:3 3}"
    ".mcw .mcw-node.mcw-dead text{fill:#888}"
    "@media(prefers-color-scheme:dark){.mcw{background:#16181d}.mcw text{fill:#ddd}.mcw-band{fill:#22262d}"
    ".mcw .mcw-column{fill:#9aa}"
    ".mcw-edge{stroke:#ccc}.mcw-skip{stroke:#f28e4b}.mcw-across{stroke:#35c99d}.mcw-host{stroke:#888}"
    ".mcw-edge.mcw-dead{stroke:#777}.mcw-edge.mcw-cut{stroke:#7a8494}.mcw-input rect{fill:#16181d;stroke:#aaa}"
    ".mcw-edge:hover{stroke:#5aa9e6!important}"
    ".mcw-node.mcw-dead circle,.mcw-node.mcw-dead rect{fill:#16181d;stroke:#777}}"
)
PAGE_CSS = (
    ":root{color-scheme:light dark;--text:#222;--faint:#667;--line:#d5d9e0;--back:#fff}"
    "@media(prefers-color-scheme:dark){:root{--text:#ddd;--faint:#9aa;--line:#3a3f48;--back:#16181d}}"
    "body{margin:0;background:var(--back);color:var(--text);font:15px/1.5 system-ui,sans-serif}"
    "main{max-width:1600px;margin:0 auto;padding:24px}h1{font-size:24px;margin:0 0 8px;overflow-wrap:anywhere}"
    ".wide{overflow-x:auto;margin:12px 0}table{border-collapse:collapse}p{color:var(--faint)}"
    "th,td{padding:4px 18px 4px 0;text-align:left;border-bottom:1px solid var(--line)}"
    "thead th{font-weight:600;color:var(--faint)}tbody th{font-weight:500}"
    "td{font-variant-numeric:tabular-nums;text-align:right;white-space:nowrap}thead th+th{text-align:right}"
)
