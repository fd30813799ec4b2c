"""A bench as a page for people: Markdown for an issue or a README, or one self-contained HTML file with its plots."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from mcdeploy.bench_report import BenchReport
from mcdeploy.draw import paint
from mcdeploy.intervals import digits, with_interval
from mcdeploy.profile import Profile, ordered_blocks, profile_rows
from mcdeploy.report import ReportData, html_table, write_report

BAR, GAP, NAMES, SPAN, NUMBERS = 11, 9, 170, 520, 120  # pixels


def bench_markdown(report: BenchReport, profiles: Sequence[Profile] = (), command: str = "") -> str:
    """Tables of the numbers, the machine, what ran, where the time goes, and what the numbers mean."""
    first = report.runners[0].name
    parts = [
        f"# Latency against {first}",
        f"Milliseconds of one inference, 95 % intervals in brackets; ratios below 1 are faster. {report.created}.",
        *([f"    {command}"] if command else []),
        *(f"**Warning:** {warning}." for warning in report.warnings),
        _markdown_table(
            ("batch", "runner", "p50", "p90", "p99", "img/s", f"x {first}", "n", "loads"),
            [
                (
                    str(row.batch),
                    row.runner,
                    with_interval(row.p50_ms),
                    with_interval(row.p90_ms),
                    ("~" if row.p99_is_rough else "") + with_interval(row.p99_ms),
                    digits(row.images_per_second),
                    "1" if row.runner == first else with_interval(row.ratio),
                    str(row.num_samples),
                    str(row.num_loads),
                )
                for row in report.latencies
            ],
        ),
    ]
    if any(row.p99_is_rough for row in report.latencies):
        parts.append("~ rough: p99 from fewer than 1000 samples.")
    facts = [(runner.name, "; ".join(f"{k} {v}" for k, v in runner.facts.items())) for runner in report.runners]
    parts += ["## What ran", _markdown_table(("runner", "facts"), facts)]
    if profiles:
        parts += ["## Where the time goes", _markdown_table(*profile_rows(profiles))]
    parts += ["## Machine", _markdown_table(("", ""), list((report.machine | _gpu(report)).items()))]
    parts += ["## What these numbers mean", _markdown_table(("", ""), list(report.method.items()))]
    return "\n\n".join(parts) + "\n"


def write_bench_page(path: Path, report: BenchReport, profiles: Sequence[Profile] = (), command: str = "") -> None:
    """One HTML file; nothing is fetched and nothing runs in it."""
    sections = {}
    if report.warnings:
        items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
        sections["Warnings"] = f'<ul class="plain">{items}</ul>'
    if profiles:
        heads, rows = profile_rows(profiles)
        note = "Measured under a profiler, which costs time: read the shares, and take latencies from the table above."
        sections["Where the time goes"] = (
            f"<p>{note}</p>{draw_profiles(profiles)}{html_table(heads, rows)}{_layers(profiles)}"
        )
    if report.gpu:
        sections["GPU"] = html_table((), report.gpu.items())
    title = f"Latency against {report.runners[0].name}"
    provenance = {"command": command} if command else {}
    write_report(path, ReportData(title, bench=report, provenance=provenance, more=sections))


def draw_profiles(profiles: Sequence[Profile]) -> str:
    """Bars by block as SVG, one colour a model; the blocks of all models on one scale."""
    blocks, found = ordered_blocks(profiles), [profile.by_block() for profile in profiles]
    longest = max((us for times in found for us in times.values()), default=1.0) or 1.0
    step = BAR * len(profiles) + GAP
    parts = []
    for i, block in enumerate(blocks):
        y = i * step + GAP
        middle = y + BAR * len(profiles) / 2 + 4
        parts.append(f'<text x="{NAMES - 8}" y="{middle:.0f}" text-anchor="end">{escape(block)}</text>')
        for k, (times, profile) in enumerate(zip(found, profiles, strict=True)):
            if (us := times.get(block)) is None:
                continue
            width, top = max(1.0, SPAN * us / longest), y + k * BAR
            words = f"{us:,.0f} us, {us / profile.total_us:.1%}"
            parts.append(
                f'<g class="{paint(k)}"><rect x="{NAMES}" y="{top}" width="{width:.1f}" height="{BAR - 2}" '
                f'fill="currentColor"><title>{escape(f"{profile.name}, {block}: {words}")}</title></rect></g>'
                f'<text class="cl" x="{NAMES + width + 5:.0f}" y="{top + BAR - 3}">{words}</text>'
            )
    keys = "".join(
        f'<span class="key {paint(k)}"><span></span>{escape(profile.name)}</span> '
        for k, profile in enumerate(profiles)
    )
    width, height = NAMES + SPAN + NUMBERS, len(blocks) * step + GAP
    svg = f'<svg class="chart" width="{width}" viewBox="0 0 {width} {height}">{"".join(parts)}</svg>'
    return f'<p>{keys}</p><div class="wide">{svg}</div>'


def _layers(profiles: Sequence[Profile]) -> str:
    """Every node, folded away."""
    parts = []
    for profile in profiles:
        rows = [
            (layer.name, layer.kind, f"{layer.microseconds:,.0f}", f"{layer.microseconds / profile.total_us:.1%}")
            for layer in profile.layers
        ]
        head = f"{escape(profile.name)}: all {len(rows)} nodes"
        parts.append(f"<details><summary>{head}</summary>{html_table(('node', 'kind', 'us', 'share'), rows)}</details>")
    return "".join(parts)


def _gpu(report: BenchReport) -> dict[str, str]:
    return {f"gpu {key}": text for key, text in report.gpu.items()}


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
