"""How latency is distributed over images, where it depends on the image: batch 1, real images, models side by side.

Every image is timed several times on every runner, the runners taking turns as in ``bench``, and the median of these is
the image's latency. The table shows how that number is spread over images, and its mean against the first runner's.
"""

# I = images, R = rounds

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from mcruntime.engine import Runner
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from mcdeploy.bench import check_providers, order_of_round
from mcdeploy.bench_report import Measured, figure_for, style_of
from mcdeploy.errors import BackendError, InputError
from mcdeploy.intervals import Interval, with_interval
from mcdeploy.surroundings import describe_afterwards, describe_machine

RESAMPLES = 1000

METHOD = {
    "timed region": (
        "one call of infer on one caller's thread with one image, from float32 pixels to float32 logits in host memory"
    ),
    "order": (
        "rounds over all images in an order of their own; on each image every runner takes one turn, in an order that "
        "changes from image to image and from round to round. A turn is one inference of that image that is not "
        "recorded and one that is"
    ),
    "excluded": "loading, and a warm-up by time of every runner; garbage collection is off",
    "latency of an image": "median over the rounds; percentiles, mean, min and max are over images",
    "interval": (
        "95 %, bootstrap over images (1000 draws), the same images for every runner: how much the mean would change "
        "with other images like these"
    ),
    "ratio": "mean over images divided by the first runner's; below 1 is faster",
}


@dataclass(frozen=True)
class Spread:
    """One runner over all images; times in milliseconds."""

    runner: str
    facts: dict[str, str]
    wirings: int | None  # different ones among the images; None where the wiring cannot be seen or is fixed
    mean_ms: Interval
    ratio: Interval  # of the means, to the first runner
    min_ms: float
    p5_ms: float
    p50_ms: float
    p95_ms: float
    max_ms: float
    images_ms: tuple[float, ...]  # of every image, in the order they were given


@dataclass(frozen=True)
class ImagesReport:
    """Everything one comparison found, as plain data."""

    created: str  # UTC
    images: int
    rounds: int
    rows: tuple[Spread, ...]  # the first one is the yardstick
    machine: dict[str, str]
    method: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {"kind": "mcdeploy bench over images", "version": 1, **asdict(self)}

    def table(self) -> Table:
        """For a terminal."""
        first = self.rows[0].runner
        table = Table(
            title=f"Latency of {self.images} images, milliseconds at batch 1",
            title_style="bold",
            caption_justify="left",
        )
        table.add_column("runner", overflow="fold")
        for head in ("min", "p5", "p50", "p95", "max", "mean", f"mean x {first}", "wirings"):
            table.add_column(Text(head), justify="right")
        for row in self.rows:
            table.add_row(
                Text(row.runner),
                *(f"{ms:.3g}" for ms in (row.min_ms, row.p5_ms, row.p50_ms, row.p95_ms, row.max_ms)),
                with_interval(row.mean_ms),
                "1" if row.runner == first else with_interval(row.ratio),
                "-" if row.wirings is None else str(row.wirings),
            )
        notes = [f"each image: median of {self.rounds} rounds; a ratio below 1 is faster than {first}"]
        notes.append("; ".join(f"{key} {value}" for key, value in self.machine.items()))
        table.caption = Text("\n".join(notes))
        return table

    def plot(self, path: Path | str) -> None:
        """Draw which share of the images is at most how slow, one line a runner, into a .png, .svg or .pdf file.

        Raises:
            MissingExtraError: matplotlib is not installed.
            InputError: another kind of file.
        """
        figure = figure_for(path, (7.5, 3.8 + 0.25 * len(self.rows)))
        axes = figure.subplots()
        widest = max(row.p95_ms for row in self.rows)
        for i, row in enumerate(self.rows):
            style = style_of(i)
            slow = np.sort(row.images_ms)
            shares = 100 * np.arange(1, len(slow) + 1) / len(slow)
            label = f"{row.runner}: mean {with_interval(row.mean_ms)} ms"
            axes.step(slow, shares, where="post", linewidth=2, label=label, **style)
            axes.plot([row.mean_ms.value], [np.interp(row.mean_ms.value, slow, shares)], "o", color=style["color"])
        axes.set_xlim(0, 1.3 * widest)
        axes.set_ylim(0, 100)
        axes.set_xlabel("latency of an image, ms (batch 1)")
        axes.set_ylabel("images at most\nthis slow, %")
        axes.grid(alpha=0.3)
        axes.set_title(f"Latency over {self.images} images; the dot is the mean", loc="left", fontsize=12)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False, fontsize=9)
        figure.savefig(path, dpi=150)


def compare_over_images(
    runners: Sequence[Runner],
    images: NDArray[np.float32],
    *,
    wirings: Mapping[str, int] | None = None,
    rounds: int = 5,
    warmup_seconds: float = 0.5,
    providers: Mapping[str, str] | None = None,
    progress: Callable[[str, float], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> ImagesReport:
    """Time every image on every runner; see ``METHOD``.

    Args:
        runners: not entered yet; all are held at once. The first one is the yardstick of the ratios.
        images: prepared images [I, C, H, W] float32, I >= 2.
        wirings: by runner name, how many different wirings the images have, where that is known.
        rounds: how often every image is timed.
        warmup_seconds: of every runner; at least one pass over 8 images.
        providers: the provider asked for, by runner name; a runner that says otherwise is refused.
        progress: is told what is going on and which share of the whole, 0 to 1, is done.
        clock: seconds; tests bring their own.

    Raises:
        InputError: no runner, two of one name, fewer than 2 images or 1 round.
        BackendError: a runner runs on another provider than asked, or changed what it runs on.
        MissingExtraError: psutil is not installed.
    """
    names = [runner.name for runner in runners]
    if not names or len(set(names)) < len(names):
        raise InputError(f"bench: expected runners of different names, got {', '.join(names) or 'none'}")
    if len(images) < 2 or rounds < 1:
        raise InputError(f"bench: expected 2 images or more and 1 round or more, got {len(images)} and {rounds}")
    tell = progress or (lambda what, share: None)
    machine = describe_machine()
    with ExitStack() as stack:
        for runner in runners:
            stack.enter_context(runner)
        facts = [runner.facts() for runner in runners]
        check_providers(
            [Measured(name, found, 0, 0) for name, found in zip(names, facts, strict=True)], providers or {}
        )
        tell("warm-up", 0.0)
        for runner in runners:
            start, runs = clock(), 0
            while runs < min(8, len(images)) or clock() - start < warmup_seconds:
                runner.infer(images[runs % len(images)][None])
                runs += 1
        times = _interleave(runners, images, rounds, clock, tell)
        for runner, before in zip(runners, facts, strict=True):
            if runner.facts() != before:
                raise BackendError(
                    f"{runner.name}: what it runs on changed while it was measured, from {before} to "
                    f"{runner.facts()}; the numbers were thrown away, measure again"
                )
    tell("done", 1.0)
    machine |= describe_afterwards()
    return ImagesReport(
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        images=len(images),
        rounds=rounds,
        rows=tuple(_summarise(names, facts, times, wirings or {})),
        machine=machine,
        method=dict(METHOD),
    )


def _interleave(
    runners: Sequence[Runner],
    images: NDArray[np.float32],
    rounds: int,
    clock: Callable[[], float],
    tell: Callable[[str, float], None],
) -> NDArray[np.float64]:
    """Milliseconds of every image, [runners, I]: the median over the rounds."""
    times = np.empty((len(runners), len(images), rounds))
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        turn = 0
        for r in range(rounds):
            for i in np.random.default_rng(r).permutation(len(images)):
                image = images[i][None]
                for k in order_of_round(turn, len(runners)):
                    runners[k].infer(image)
                    start = clock()
                    runners[k].infer(image)
                    times[k, i, r] = clock() - start
                turn += 1
            tell("measuring", (r + 1) / rounds)
    finally:
        if was_enabled:
            gc.enable()
    return np.median(times, axis=2) * 1e3


def _summarise(
    names: list[str], facts: list[dict[str, str]], times: NDArray[np.float64], wirings: Mapping[str, int]
) -> list[Spread]:
    count = times.shape[1]
    drawn = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    means = [row[drawn].mean(1) for row in times]
    rows = []
    for name, fact, row, mean in zip(names, facts, times, means, strict=True):
        rows.append(
            Spread(
                runner=name,
                facts=fact,
                wirings=wirings.get(name),
                mean_ms=_interval(row.mean(), mean),
                ratio=_interval(row.mean() / times[0].mean(), mean / means[0]),
                min_ms=float(row.min()),
                p5_ms=float(np.percentile(row, 5)),
                p50_ms=float(np.median(row)),
                p95_ms=float(np.percentile(row, 95)),
                max_ms=float(row.max()),
                images_ms=tuple(round(float(ms), 6) for ms in row),
            )
        )
    return rows


def _interval(value: float, draws: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(float(value), float(low), float(high))
