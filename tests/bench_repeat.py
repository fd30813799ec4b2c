"""Does a second run of ``mcdeploy bench`` agree with the first? Five runs of A against B, five of A against itself.

PYTHONPATH=tests python -m bench_repeat OUT      writes OUT/bench_repeat.json and .md; about 10 minutes

A is ResNet-34 at 64 pixels with random weights, B the same with 9 of its 16 blocks taken out by mcdeploy. Every run is
a process of its own. All five intervals of a ratio should share a point, and those of A against its copy should hold 1.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
from tiny_models import images

import mcdeploy
from mcdeploy.compile.certify import scramble

DROPPED = ("layer1.0", "layer1.1", "layer2.1", "layer2.2", "layer3.1", "layer3.2", "layer3.3", "layer3.4", "layer4.1")
BATCHES, RUNS, SECONDS = (1, 8), 5, "20"
OPTIONS = ["--threads", "1", "--batch", "1", "--batch", "8", "--seconds", SECONDS]


def write_nets(out: Path) -> None:
    model = timm.create_model("resnet34", num_classes=1000).eval()
    scramble(model)
    example = images(2, 64)
    mcdeploy.export_onnx(mcdeploy.compile_model(model, example), out / "dense.onnx", example)
    shutil.copy(out / "dense.onnx", out / "again.onnx")
    wired = mcdeploy.wire(model, "drop", image_size=64, blocks=DROPPED)
    mcdeploy.export_onnx(mcdeploy.compile_model(wired, example), out / "pruned.onnx", example)


def run(out: Path, first: str, second: str, number: int) -> dict:
    found = out / f"{second}_{number}.json"
    command = [sys.executable, "-m", "mcdeploy.cli", "bench", f"{first}.onnx", f"{second}.onnx", *OPTIONS]
    subprocess.run([*command, "--json", found.name], check=True, cwd=out, stdout=subprocess.DEVNULL)
    return json.loads(found.read_text())


def summary(reports: list[dict], batch: int) -> dict:
    rows = [row for report in reports for row in report["latencies"][1:] if row["batch"] == batch and row["ratio"]]
    rows = [row for row in rows if row["runner"] != reports[0]["runners"][0]["name"]]
    ratios = [row["ratio"] for row in rows]
    return {
        "batch": batch,
        "ratios": ratios,
        "all_overlap": max(r["low"] for r in ratios) <= min(r["high"] for r in ratios),
        "hold_one": sum(r["low"] <= 1 <= r["high"] for r in ratios),
        "stopped": [row["stopped"] for row in rows],
        "loads": [row["num_loads"] for row in rows],
        "rounds": [row["num_rounds"] for row in rows],
        "load_average_before": [report["machine"]["load average before"] for report in reports],
    }


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_nets(work)
        reports = {second: [] for second in ("pruned", "again")}
        for number in range(RUNS):
            for second, found in reports.items():
                found.append(run(work, "dense", second, number))
                print(second, number, [row["ratio"] for row in found[-1]["latencies"][1::2]], flush=True)
    found = {second: [summary(rows, batch) for batch in BATCHES] for second, rows in reports.items()}
    machine = {key: text for key, text in reports["again"][0]["machine"].items() if "load" not in key}
    options = " ".join(OPTIONS)
    result = {
        "command": f"mcdeploy bench dense.onnx pruned.onnx {options}; mcdeploy bench dense.onnx again.onnx {options}",
        "written_by": "PYTHONPATH=tests python -m bench_repeat OUT",
        "created": reports["again"][-1]["created"],
        "machine": machine,
        "method": reports["again"][0]["method"],
        "runs": found,
    }
    (out / "bench_repeat.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "bench_repeat.md").write_text(as_markdown(result))
    print(as_markdown(result))


def as_markdown(result: dict) -> str:
    lines = [
        "# Five runs of `mcdeploy bench`, and five of a model against itself",
        "",
        "ResNet-34 at 64 pixels, random weights, ONNX Runtime, 1 thread. `pruned`: 9 of 16 blocks removed by mcdeploy.",
        "`again`: a copy of the dense file. Each run is a process of its own; 95 % intervals in brackets.",
        f"{result['machine']['cpu']}, {result['machine']['cores usable']} cores shared with other work; "
        f"{result['created']}. Made by `{result['written_by']}`, which runs:",
        "",
        *(f"    {command}" for command in result["command"].split("; ")),
        "",
        "| against `dense` | batch | "
        + " | ".join(f"run {i + 1}" for i in range(RUNS))
        + " | all five share a point |",
        "|---|---|" + "---|" * RUNS + "---|",
    ]
    for second, rows in result["runs"].items():
        for row in rows:
            cells = [f"{r['value']:.4f} [{r['low']:.4f}, {r['high']:.4f}]" for r in row["ratios"]]
            overlap = "yes" if row["all_overlap"] else "no"
            lines.append(f"| {second} | {row['batch']} | " + " | ".join(cells) + f" | {overlap} |")
    lines += [
        "",
        "| against `dense` | batch | runs whose interval holds 1 | models loaded | rounds | load average before |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for second, rows in result["runs"].items():
        for row in rows:
            many = [", ".join(map(str, row[key])) for key in ("loads", "rounds", "load_average_before")]
            lines.append(f"| {second} | {row['batch']} | {row['hold_one']} of {RUNS} | " + " | ".join(many) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
