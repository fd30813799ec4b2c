"""What ``bench`` found: the numbers as plain data, as a table for a terminal, as a plot, and against a baseline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table
from rich.text import Text

from mcdeploy.errors import InputError, MissingExtraError, SlowerError
from mcdeploy.intervals import Interval, digits, with_interval

VERSION = 2  # of the JSON; 1 had intervals by a bootstrap over rounds
ENOUGH_FOR_P99 = 1000  # fewer samples hold fewer than 10 beyond p99
# Okabe and Ito's colours: told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Latency:
    """One runner at one batch size; times in milliseconds."""

    runner: str
    batch: int
    num_samples: int
    num_rounds: int
    timed: Literal["host", "device"]
    p50_ms: Interval
    p90_ms: Interval
    p99_ms: Interval
    p99_is_rough: bool  # fewer than 1000 samples
    min_ms: float
    mean_ms: float
    images_per_second: float
    ratio: Interval  # to the first runner, typical of one round; below 1 is faster
    host_p50_ms: float  # the same calls on the host's clock; equal to p50_ms unless timed on the device
    quantiles_ms: tuple[float, ...]  # at 0, 0.5, 1, ... 100 %: the distribution, for plots
    num_loads: int  # how often the models were loaded anew
    units: Literal["load", "section"]  # what the intervals take as independent
    stopped: Literal["narrow", "budget"]  # all ratios were known well enough, or the time was up
    energy_mj: float | None = None  # of one inference, the whole GPU; None: not measured


@dataclass(frozen=True)
class Measured:
    """What ran: a runner's facts, and how much the process's resident memory grew for it."""

    name: str
    facts: dict[str, str]
    load_bytes: int
    run_bytes: int


@dataclass(frozen=True)
class BenchReport:
    """Everything one comparison found, as plain data."""

    created: str  # UTC
    runners: tuple[Measured, ...]  # the first one is the yardstick
    latencies: tuple[Latency, ...]  # by batch size, then in the order of the runners
    machine: dict[str, str]
    method: dict[str, str]  # what the numbers mean
    warnings: tuple[str, ...] = ()  # what makes the numbers worse than they look
    gpu: dict[str, str] = field(default_factory=dict)  # clocks, heat, throttling; empty without a GPU

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {"kind": "mcdeploy bench", "version": VERSION, **asdict(self)}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> BenchReport:
        """The inverse of ``to_json``.

        Raises:
            ValueError: not a bench report of this version.
        """
        try:
            if (data["kind"], data["version"]) != ("mcdeploy bench", VERSION):
                found = f"{data['kind']!r} {data['version']!r}"
                raise ValueError(f"expected a mcdeploy bench of version {VERSION}, got {found}; measure it again")
            return BenchReport(
                data["created"],
                tuple(Measured(**row) for row in data["runners"]),
                tuple(_latency_from_json(row) for row in data["latencies"]),
                dict(data["machine"]),
                dict(data["method"]),
                tuple(data["warnings"]),
                dict(data["gpu"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a bench report: {error!r}") from None

    def at(self, runner: str, batch: int) -> Latency | None:
        """One runner's numbers at one batch size; None when that was not measured."""
        return next((row for row in self.latencies if (row.runner, row.batch) == (runner, batch)), None)

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title="Latency in milliseconds, with 95 % intervals", title_style="bold", caption_justify="left")
        table.add_column("batch", justify="right")
        table.add_column("runner", overflow="fold")
        for head in ("p50", "p90", "p99", "min", "img/s", f"x {self.runners[0].name}", "n"):
            table.add_column(Text(head), justify="right")
        for row in self.latencies:
            new_batch = row.runner == self.runners[-1].name
            rough = "~" if row.p99_is_rough else ""
            table.add_row(
                str(row.batch),
                Text(row.runner),
                with_interval(row.p50_ms),
                with_interval(row.p90_ms),
                rough + with_interval(row.p99_ms),
                digits(row.min_ms),
                f"{row.images_per_second:,.0f}" if row.images_per_second >= 100 else digits(row.images_per_second),
                with_interval(row.ratio) if row.runner != self.runners[0].name else "1",
                str(row.num_samples),
                end_section=new_batch,
            )
        table.caption = Text("\n".join(self._notes()))
        return table

    def _notes(self) -> list[str]:
        timed = sorted({row.timed for row in self.latencies})
        notes = [f"timed on the {' and '.join(timed)}; a ratio below 1 is faster than {self.runners[0].name}"]
        if any(row.p99_is_rough for row in self.latencies):
            notes.append(f"~ rough: p99 from fewer than {ENOUGH_FOR_P99} samples")
        notes += [self._how_sure(batch) for batch in dict.fromkeys(row.batch for row in self.latencies)]
        for runner in self.runners:
            facts = [runner.facts[key] for key in ("backend", "mode", "provider", "precision") if key in runner.facts]
            threads = f", {runner.facts['threads']} thread(s)" if "threads" in runner.facts else ""
            memory = f"memory +{runner.load_bytes / 2**20:.0f} MiB loaded, +{runner.run_bytes / 2**20:.0f} MiB running"
            notes.append(f"{runner.name}: {' '.join(facts)}{threads}; {memory}")
        notes += [
            f"{row.runner} at batch {row.batch}: {digits(row.energy_mj)} mJ an inference, the whole GPU"
            for row in self.latencies
            if row.energy_mj is not None
        ]
        if self.gpu:
            notes.append("gpu: " + "; ".join(f"{key} {value}" for key, value in self.gpu.items()))
        notes.append("; ".join(f"{key} {value}" for key, value in self.machine.items()))
        return [*notes, *(f"warning: {warning}" for warning in self.warnings)]

    def _how_sure(self, batch: int) -> str:
        rows = [row for row in self.latencies if row.batch == batch]
        widest = max(row.ratio.width for row in rows)
        what = f"batch {batch}: {rows[0].num_rounds} rounds, models loaded {rows[0].num_loads} time(s)"
        if rows[0].units == "section":
            what += ", too few to see what loading anew changes: another run may differ by more than the intervals say"
        if len(rows) == 1:
            return what
        width = f"widest interval of a ratio {widest:.1%}"
        return f"{what}; {width}" + ("" if rows[0].stopped == "narrow" else ", when the time was up")

    def plot(self, path: Path | str) -> None:
        """Draw the distribution of every runner's latency, one panel a batch size, into a .png, .svg or .pdf file.

        Raises:
            MissingExtraError: matplotlib is not installed.
            InputError: another kind of file.
        """
        batches = list(dict.fromkeys(row.batch for row in self.latencies))
        figure = figure_for(path, (7.5, 0.8 + 3.3 * len(batches)))
        for axes, batch in zip(np.atleast_1d(figure.subplots(len(batches), 1)), batches, strict=True):
            rows = [row for row in self.latencies if row.batch == batch]
            for i, row in enumerate(rows):
                style = style_of(i)
                shares, times_ms = distribution(row)
                label = f"{row.runner}: p50 {with_interval(row.p50_ms)} ms, n = {row.num_samples}"
                axes.plot(times_ms, shares, linewidth=2, label=label, **style)
                axes.plot([row.p50_ms.value], [50], marker="o", markersize=6, color=style["color"])
            axes.set_xlim(left=0)
            axes.set_ylim(0, 100)
            axes.set_title(f"batch {batch}", loc="left", fontsize=11)
            axes.set_xlabel(f"latency, ms ({rows[0].timed} clock, up to p99)")
            axes.set_ylabel("inferences at most\nthis slow, %")
            axes.grid(alpha=0.3)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False, fontsize=9)
        figure.suptitle("Latency of one inference; the dot is the median", fontsize=12)
        figure.savefig(path, dpi=150)


def distribution(row: Latency) -> tuple[list[float], list[float]]:
    """Shares, 0 to 99 %, and the latency in ms that this share of inferences does not exceed."""
    shares = [0.5 * i for i in range(len(row.quantiles_ms))]
    keep = [i for i, share in enumerate(shares) if share <= 99]  # the last 1 % would squeeze the rest into a corner
    return [shares[i] for i in keep], [row.quantiles_ms[i] for i in keep]


def read_report(path: Path | str) -> BenchReport:
    """Read what ``to_json`` gave.

    Raises:
        InputError: no such file, or not a bench report.
    """
    try:
        return BenchReport.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(
            f"{path}: cannot read the bench report ({error.strerror}); 'mcdeploy bench --json' makes one"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not a bench report ({error}); 'mcdeploy bench --json' makes one") from None


def check_baseline(report: BenchReport, baseline: BenchReport, fail_if_slower: float) -> list[str]:
    """Hold a report against an earlier one, of the same runners in the same order.

    Ratios are compared, not milliseconds, since the two may come from different machines: each runner's latency over
    the first runner's, now and then. A runner is slower when even the lower end of its ratio's interval lies above the
    baseline's ratio times ``1 + fail_if_slower``. A ratio can differ between processors too, so keep a baseline for
    each kind; and a change that slows all runners alike is not seen.

    Args:
        fail_if_slower: a fraction; 0.05 allows 5 %.

    Returns:
        One line for each runner and batch size that was held against the baseline.

    Raises:
        SlowerError: at least one is slower.
        InputError: a single runner, a yardstick or backend other than the baseline's, or something that the baseline
            does not hold.
    """
    if not fail_if_slower >= 0:
        raise InputError(f"fail-if-slower: expected a fraction of at least 0, got {fail_if_slower}")
    check_comparable(
        [runner.name for runner in report.runners], sorted({row.batch for row in report.latencies}), baseline
    )
    _check_same_kind(report, baseline)
    lines, slower = [], []
    for now in report.latencies:
        if now.runner == report.runners[0].name:
            continue
        then = baseline.at(now.runner, now.batch)
        assert then is not None  # check_comparable
        if then.timed != now.timed:
            raise InputError(
                f"the baseline holds no {now.runner} at batch {now.batch} timed on the {now.timed}; "
                "measure what it holds, or measure a new baseline"
            )
        allowed = then.ratio.value * (1 + fail_if_slower)
        line = (
            f"{now.runner} at batch {now.batch}: {with_interval(now.ratio)} times {report.runners[0].name}, "
            f"baseline {digits(then.ratio.value)}, allowed up to {digits(allowed)}"
        )
        lines.append(line)
        if now.ratio.low > allowed:
            slower.append(line)
    if slower:
        raise SlowerError(
            f"slower than the baseline: {'; '.join(slower)}; find what changed, or measure a new baseline"
        )
    return lines


def check_comparable(runners: Sequence[str], batches: Sequence[int], baseline: BenchReport) -> None:
    """Refuse a baseline that cannot be held against these runners, which can be known before they are measured.

    Args:
        runners: their names, the yardstick first.
        batches: sizes.

    Raises:
        InputError: a single runner, another yardstick, or a runner at a batch size that the baseline does not hold.
    """
    if len(runners) < 2:
        raise InputError("a baseline compares ratios, so it needs at least two runners; the first is the yardstick")
    if not baseline.runners or baseline.runners[0].name != runners[0]:
        yardstick = baseline.runners[0].name if baseline.runners else "nothing"
        raise InputError(
            f"the baseline's ratios are to {yardstick}, this report's to {runners[0]}; "
            "name the runners in the baseline's order"
        )
    for name in runners[1:]:
        for batch in batches:
            if baseline.at(name, batch) is None:
                raise InputError(
                    f"the baseline holds no {name} at batch {batch}; measure what it holds, or measure a new baseline"
                )


def figure_for(path: Path | str, size: tuple[float, float]) -> Any:
    """An empty matplotlib figure for a file; size: width and height in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InputError: another kind of file than .png, .svg or .pdf.
    """
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"{path}: a plot is a .png, .svg or .pdf file; give it one of these suffixes")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("a latency plot", "matplotlib", "train") from None
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style_of(line: int) -> dict[str, Any]:
    """Colour and dashes of a plot's n-th line."""
    return {"color": COLOURS[line % len(COLOURS)], "linestyle": ("-", "--", "-.", ":")[line // len(COLOURS) % 4]}


def _latency_from_json(row: Mapping[str, Any]) -> Latency:
    intervals = {key: Interval(**row[key]) for key in ("p50_ms", "p90_ms", "p99_ms", "ratio")}
    return Latency(**{**row, **intervals, "quantiles_ms": tuple(row["quantiles_ms"])})


def _check_same_kind(report: BenchReport, baseline: BenchReport) -> None:
    """Runners of one name run on the same kind of thing, now and then."""
    then_facts = {runner.name: runner.facts for runner in baseline.runners}
    for runner in report.runners:
        for key in ("backend", "mode", "provider", "precision", "l2"):
            now, then = runner.facts.get(key), then_facts.get(runner.name, runner.facts).get(key)
            if now != then:
                raise InputError(
                    f"{runner.name}: the baseline has {key} {then}, this report {now}; "
                    "measure alike, or measure a new baseline"
                )
