"""One HTML file that tells what was done to a network: what it gained, how it learned, what was cut, what proves it.

Self-contained: no script, no link, nothing fetched; pictures are SVG inside the page. It takes plain data and imports
no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mcdeploy.bench_report import COLOURS, BenchReport, distribution
from mcdeploy.connectivity.topology import Node, Topology, count_edges
from mcdeploy.draw import Chart, Line, draw_chart, draw_wiring, paint, shortened
from mcdeploy.intervals import with_interval

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
    more: Mapping[str, str] = field(default_factory=dict)  # further sections, HTML by heading, after the latency


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
    models: str = "",
) -> None:
    """The page of one run, from its files: ``metrics.jsonl``, the checkpoint's candidates, the certificate.

    Args:
        models: HTML of ``models_section``.
    """
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
            more={"Models": models} if models else {},
        ),
    )


def render_report(data: ReportData) -> str:
    """The page as text."""
    sections = {
        "What changed": html_table(("", "before", "after", "change"), data.headline) if data.headline else "",
        "Wiring": _wirings(data.before, data.after),
        "Training": _training(data.metrics_rows),
        "Gates": _gates(data.metrics_rows, data.candidates, data.before),
        "Latency": _latency(data.bench) if data.bench else "",
        **data.more,
        "Certificate": _certificate(data.certificate) if data.certificate else "",
        "Parity": _hops(data.parity) + _parity(data.parity) if data.parity else "",
        "Where this comes from": html_table((), data.provenance.items()) if data.provenance else "",
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
    return f"<div>{''.join(map(draw_chart, charts))}</div>{note}"


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
            stages.append(f"<h3>{escape(name)}</h3><div>{''.join(map(draw_chart, charts))}</div>")
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
    return Line(xs, ys, rank, says, shortened(sources[c], 10))


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
    keys = "".join(f'<span class="key {paint(i)}"><span></span>{escape(name)}</span> ' for i, name in enumerate(names))
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
        f"<p>{keys}</p><div>{''.join(map(draw_chart, charts))}</div>"
        f"<p>In brackets: 95 % intervals. Ratios below 1 are faster. "
        f"Measured {escape(bench.created)} on {escape(machine)}.</p>"
        f"{html_table(heads, rows)}{html_table(('runner', 'what ran', 'process memory'), facts)}"
        f"<details><summary>What these numbers mean</summary>{html_table((), bench.method.items())}</details>"
    )


def _certificate(certificate: Mapping[str, Any]) -> str:
    parts = []
    costs = [
        HeadlineRow(name, _number(pair[0]), _number(pair[1]), f"{pair[1] / pair[0] - 1:+.1%}" if pair[0] else "")
        for key, name in (("parameters", "parameters"), ("macs", "multiply-accumulates"))
        if (pair := certificate.get(key))
    ]
    if costs:
        parts.append(html_table(("", "before", "after", "change"), costs))
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


def departure_section(found: Mapping[str, Any]) -> str:
    """Where a hop departed from the trained model: every tensor that was compared, in order of computation; HTML.

    Args:
        found: what ``Departure.to_json`` gave, with "hop".
    """
    first, limit = found["first"], found["limit"]
    said = (
        f"The first tensor that departs is that of {first['name']}."
        if first
        else "No tensor in between departs: it happens between the last one and the logits."
    )
    rows = [
        (row["name"], f"{row['max_abs']:.1e}", "beyond" if not row["max_abs"] <= limit else "")
        for row in found["distances"]
    ]
    heads = ("made by", "distance, relative to its largest value", f"limit {limit:.1e}")
    return f"<p>Hop: {escape(found['hop'])}. {escape(said)}</p>{html_table(heads, rows)}"


def models_section(models: Mapping[str, Mapping[str, Any]], made: Mapping[str, Mapping[str, Any]]) -> str:
    """What was written, as read back from the files, and how int8 and fp16 came about; HTML.

    Args:
        models: by key, what ``manifest.json`` says of a model, with "agreement" (0..1) and "latency" beside it.
        made: by precision, the report of a conversion (``Fp16Report.to_json``, ``Int8Report.to_json``).
    """
    heads = ("model", "file", "types of its nodes", "top-1", "agrees with the trained", "measured here, p50 ms")
    rows = [
        (
            key,
            model["file"],
            "; ".join(
                f"{op} {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"
                for op, kinds in sorted(model["nodes"].items())
            ),
            "-" if model["accuracy"] is None else f"{model['accuracy']:.2%}",
            f"{model['agreement']:.2%}",
            "; ".join(model["latency"]),
        )
        for key, model in models.items()
    ]
    parts = [html_table(heads, rows)]
    if fp16 := made.get("fp16"):
        kept = [(row["node"], row["operator"], row["why"], _number(row["peak"])) for row in fp16["kept"]]
        said = (
            f"fp16: nodes above {fp16['limit']:,.0f} on {fp16['num_images']} calibration images stay fp32: {len(kept)}."
        )
        parts.append(
            f"<p>{escape(said)}</p>" + (html_table(("node", "operator", "what", "peak"), kept) if kept else "")
        )
    for name, int8 in made.items():
        if name.startswith("int8"):
            parts.append(_int8(name, int8))
    return "".join(parts)


def _int8(name: str, report: Mapping[str, Any]) -> str:
    adds, all_adds = report["residual_adds"]
    floats = [row for row in report["layers"] if row["runs_in"] != "int8"]
    said = (
        f"{name}: {len(report['layers']) - len(floats)} of {len(report['layers'])} layers in 8 bits, {adds} of "
        f"{all_adds} additions among them; {len(report['excluded'])} left out for accuracy; top-1 "
        f"{report['top1']:.2%} against {report['baseline_top1']:.2%}, allowed drop {report['max_top1_drop']:.2%}."
    )
    parts = [f"<p>{escape(said)}</p>"]
    if floats:
        parts.append(html_table(("stays fp32", "why"), [(row["node"], row["why"]) for row in floats]))
    if report["groups"]:
        rows = [(row["shape"], "int8" if row["quantised"] else "fp32") for row in report["groups"]]
        parts.append(html_table(("convolution in groups", "chosen"), rows))
    if report["sensitivity"]:
        alone = [(row["node"], f"{row['snr_db']:.1f}", f"{row['top1_agreement']:.2%}") for row in report["sensitivity"]]
        table = html_table(("this layer alone in 8 bits", "signal to noise of the logits, dB", "same class"), alone)
        parts.append(f"<details><summary>Sensitivity, worst first ({len(alone)})</summary>{table}</details>")
    return "".join(parts)


def _hops(rows: Sequence[Mapping[str, Any]]) -> str:
    """The worst of every hop, where rows say which hop they are of."""
    hops = list(dict.fromkeys(row["hop"] for row in rows if "p99" in row and "hop" in row))
    worst = []
    for hop in hops:
        own = [row for row in rows if row.get("hop") == hop]
        worst.append(
            (
                hop,
                ", ".join(map(str, sorted({row["batch"] for row in own}))),
                f"{max(row['max_abs'] for row in own):.1e}",
                f"{max(row['p99'] for row in own):.1e}",
                f"{min(row['cosine'] for row in own):.6f}",
                f"{min(row['top1_agreement'] for row in own):.2%}",
            )
        )
    heads = ("hop", "batches", "worst difference of a logit", "worst p99", "smallest cosine", "least agreement")
    note = "<p>Differences are relative to the largest logit.</p>"
    return html_table(heads, worst) + note if worst else ""


def _parity(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    if len(rows) > 12:
        return f"<details><summary>All {len(rows)} comparisons</summary>{_rows_of(rows)}</details>"
    return _rows_of(rows)


def _rows_of(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = list(dict.fromkeys(key for row in rows for key in row))
    return html_table(
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


def html_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
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
ul{columns:3 200px;margin:4px 0;font-family:ui-monospace,monospace;font-size:13px}
ul.plain{columns:1;font:inherit;max-width:80ch}summary{cursor:pointer}
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
