"""What only the demo does: ask a real server for one prediction, and print the table at the end."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcruntime.preprocess import Preprocessing
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from mcdeploy.bench_report import BenchReport
from mcdeploy.errors import McdeployError
from mcdeploy.intervals import with_interval
from mcdeploy.package import Shipped

START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What the server said about one held-out image."""

    true_label: str
    label: str
    probability: float  # 0..1


def ask_server(bundle: Path, val: DataLoader[Any], how: Preprocessing, labels: tuple[str, ...]) -> Answer:
    """Start ``mcruntime.server`` on a free local port, post the first validation image as PNG, stop the server.

    Raises:
        McdeployError: the server did not start or did not answer.
    """
    images, numbers = next(iter(val))
    pixels = images[0].permute(1, 2, 0).numpy() * how.std + how.mean
    png = io.BytesIO()
    Image.fromarray((pixels * 255).round().clip(0, 255).astype("uint8")).save(png, format="PNG")

    command = [sys.executable, "-m", "mcruntime.server", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            address = _address(server)
            request = urllib.request.Request(f"{address}/predict", png.getvalue(), {"Content-Type": "image/png"})
            with urllib.request.urlopen(request, timeout=START_TIMEOUT_S) as response:
                answer = json.load(response)
        finally:
            server.terminate()
            server.wait(START_TIMEOUT_S)
    return Answer(labels[int(numbers[0])], answer["label"], answer["probability"])


def _address(server: subprocess.Popen[str]) -> str:
    said = []
    for line in server.stdout or ():
        said.append(line.strip())
        if "listening on " in line:
            return line.rpartition("listening on ")[2].strip()
    raise McdeployError(f"demo: the server did not start: {' / '.join(said) or 'it said nothing'}")


def print_summary(trained_top1: float, shipped: Shipped, bench: BenchReport, report: Path) -> None:
    """The table that ends the demo."""
    certificate, agreement = shipped.certificate, shipped.agreement
    table = Table(title="mcdeploy demo: dense backbone against pruned net")
    for column in ("", "before", "after"):
        table.add_column(column)
    table.add_row("top-1, held-out digits", f"{agreement.accuracy_before:.2%}", f"{agreement.accuracy_after:.2%}")
    table.add_row("parameters", *(f"{count:,}" for count in certificate.parameters))
    table.add_row("MACs an image", *(f"{count:,}" for count in certificate.macs))
    for row in bench.latencies:
        first = bench.at(bench.runners[0].name, row.batch)
        if first is not None and row.runner != first.runner:
            low, high = 1 / row.ratio.high, 1 / row.ratio.low
            table.add_row(
                f"ONNX Runtime p50 ms, batch {row.batch}", with_interval(first.p50_ms), with_interval(row.p50_ms)
            )
            table.add_row(
                "  measured speed-up", "1", f"{1 / row.ratio.value:.2f}x (95 % interval {low:.2f} to {high:.2f})"
            )
    Console(width=100 if not sys.stdout.isatty() else None).print(table)
    print(f"trained top-1 {trained_top1:.2%}; bundle {shipped.bundle.folder}; open {report}")
