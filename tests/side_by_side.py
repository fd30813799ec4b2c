"""Dense, masked, pruned by mcdeploy, pruned by Torch-Pruning, and plain timm: five nets, one table, one run.

PYTHONPATH=tests python -m side_by_side OUT [SECONDS]     writes OUT/side_by_side.json, .md and .svg; about 20 minutes

Torch-Pruning is not among mcdeploy's packages; put it beside: pip install --no-deps --target DIR torch-pruning, and add
DIR to PYTHONPATH. ONNX Runtime on the CPU, 1 thread, batch 1, 224 pixels, random weights (scrambled batch norm). Every
block between the first and the last of its stage is removed, and Torch-Pruning is asked for the MACs that this leaves.
Accuracy is not looked at: this is about what a given amount of arithmetic costs.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import timm
import torch
from mcruntime.engine import OnnxRunner
from rich.console import Console
from timm.utils.onnx import onnx_export
from torch import Tensor, nn

import mcdeploy
from mcdeploy.backends.onnx import export_onnx
from mcdeploy.bench import compare_latency
from mcdeploy.bench_report import figure_for
from mcdeploy.compile.certify import scramble
from mcdeploy.compile.prune import count_macs, count_parameters
from mcdeploy.connectivity.stages import find_stages

NETS = ("resnet50", "resnext50_32x4d", "mobilenetv2_100", "mobilenetv3_large_100", "tf_efficientnet_lite0")
SIZE = 224
ROWS = {
    "dense": "dense, mcdeploy",
    "timm": "dense, timm's onnx_export",
    "masked": "masked, not removed",
    "pruned": "pruned, mcdeploy",
    "tp": "Torch-Pruning",
    "tp8": "Torch-Pruning, round_to=8",
}


class Masked(nn.Module):
    """A block that a mask switches off: it runs, and its result is multiplied by 0."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("gates", torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.gates[0] * x + self.gates[1] * self.block(x)


def droppable(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    stages = find_stages(model, example)
    return tuple(f"{stage.name}.{name}" for stage in stages for name in stage.blocks[1:-1])


def torch_pruned(model: nn.Module, example: Tensor, macs: int, round_to: int | None) -> nn.Module:
    """By the ratio, found by bisection, whose MACs come nearest to those asked for."""
    import torch_pruning

    low, high = 0.0, 0.9
    best: nn.Module | None = None
    for step in range(6):
        ratio = 1 - (macs / count_macs(model, example)) ** 0.5 if step == 0 else (low + high) / 2
        small = copy.deepcopy(model)
        pruner = torch_pruning.pruner.BasePruner(
            small,
            example,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=ratio,
            round_to=round_to,
            ignored_layers=[small.get_classifier()],
        )
        pruner.step()
        got = count_macs(small, example)
        print(f"  round_to={round_to} ratio {ratio:.3f}: {got / macs:.3f} of the MACs asked for", flush=True)
        if best is None or abs(got - macs) < abs(count_macs(best, example) - macs):
            best = small
        if abs(got / macs - 1) < 0.015:
            break
        low, high = (ratio, high) if got > macs else (low, ratio)
    assert best is not None
    return best


def build(name: str, out: Path) -> list[dict]:
    """Write every form as ONNX; one row each, with what went wrong in the words of the tool."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    scramble(model)
    example = torch.randn(2, 3, SIZE, SIZE)
    dropped = droppable(model, example)
    wired = mcdeploy.wire(copy.deepcopy(model), "drop", image_size=SIZE, blocks=dropped)
    pruned = mcdeploy.compile_model(wired, example)
    masked = copy.deepcopy(model)
    for path in dropped:
        parent, _, child = path.rpartition(".")
        setattr(masked.get_submodule(parent), child, Masked(model.get_submodule(path)))
    with torch.no_grad():
        before, after = masked(example), pruned(example)
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())), name
    forms = {"dense": mcdeploy.compile_model(model, example), "timm": model, "masked": masked, "pruned": pruned}
    macs = count_macs(pruned, example)
    forms |= {"tp": torch_pruned(model, example, macs, None), "tp8": torch_pruned(model, example, macs, 8)}
    rows = []
    for key, module in forms.items():
        row = {"net": name, "form": key, "macs": count_macs(module, example), "parameters": count_parameters(module)}
        path = out / f"{name}.{key}.onnx"
        try:
            if key == "timm":
                free = not name.startswith("tf_")  # padding that depends on a free image size never ends the export
                onnx_export(module, str(path), example_input=example, batch_size=2, dynamic_size=free, use_dynamo=True)
            else:
                export_onnx(module, path, example)
        except Exception as error:  # the row says so; the others are measured
            row["failed"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        rows.append(row)
        print(f"  {key}: {row}", flush=True)
    return [{**row, "dropped": list(dropped)} if row["form"] == "pruned" else row for row in rows]


def measure(rows: list[dict], folder: Path, seconds: float) -> tuple[list[dict], dict]:
    images = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)
    there = [row for row in rows if "failed" not in row]
    runners = [
        OnnxRunner(folder / f"{row['net']}.{row['form']}.onnx", name=ROWS[row["form"]], threads=1) for row in there
    ]
    report = compare_latency(runners, {1: images}, seconds=seconds, threads=1, warmup_seconds=0.3)
    Console(width=150).print(report.table())
    found = {row.runner: row for row in report.latencies}
    for row in there:
        latency = found[ROWS[row["form"]]]
        row["p50_ms"] = latency.p50_ms.value
        row["ratio"] = {"value": latency.ratio.value, "low": latency.ratio.low, "high": latency.ratio.high}
        row |= {"rounds": latency.num_rounds, "loads": latency.num_loads, "stopped": latency.stopped}
    return rows, {"machine": report.machine, "method": report.method, "created": report.created}


def as_markdown(rows: list[dict], facts: dict) -> str:
    machine = facts["machine"]
    lines = [
        "# Side by side: what removing blocks, masking them, and cutting channels is worth",
        "",
        "ONNX Runtime on the CPU, 1 thread, batch 1, 224 pixels, random weights; latency over that of the dense net",
        "exported by mcdeploy, with 95 % intervals; below 1 is faster. The forms of a net take turns in one run.",
        f"{machine['cpu']}, {machine['cores usable']} cores shared with other work (load average {facts['loads']});",
        f"onnxruntime {facts['onnxruntime']}, timm {timm.__version__}, torch {torch.__version__}, Torch-Pruning "
        f"{facts['torch_pruning']}; {facts['created']}.",
        "",
        f"    {facts['command']}",
        "",
        "| net | form | MACs | parameters | p50 ms | latency / dense | speed-up per MACs saved |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        dense = next(other for other in rows if (other["net"], other["form"]) == (row["net"], "dense"))
        costs = f"{row['macs'] / 1e6:,.0f} M ({row['macs'] / dense['macs']:.2f}) | {row['parameters'] / 1e6:.2f} M"
        if "failed" in row:
            lines.append(f"| {row['net']} | {ROWS[row['form']]} | {costs} | - | failed: {row['failed']} | - |")
            continue
        ratio = row["ratio"]
        text = f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]" if row["form"] != "dense" else "1"
        saved = dense["macs"] / row["macs"]
        worth = f"{1 / ratio['value']:.2f}x of {saved:.2f}x" if row["form"] != "dense" else ""
        lines.append(f"| {row['net']} | {ROWS[row['form']]} | {costs} | {row['p50_ms']:.1f} | {text} | {worth} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], path: Path) -> None:
    figure = figure_for(path, (9, 5))
    axes = figure.subplots()
    colours = ("#888888", "#56B4E9", "#CC79A7", "#0072B2", "#E69F00", "#D55E00")
    names = [name for name in NETS if any(row["net"] == name for row in rows)]
    for k, (key, label) in enumerate(ROWS.items()):
        mine = [(names.index(row["net"]), row["ratio"]) for row in rows if row["form"] == key and "ratio" in row]
        at = [x + (k - 2.5) * 0.14 for x, _ in mine]
        values = [ratio["value"] for _, ratio in mine]
        reach = [[r["value"] - r["low"] for _, r in mine], [r["high"] - r["value"] for _, r in mine]]
        axes.bar(at, values, 0.13, yerr=reach, color=colours[k], label=label, ecolor="#222222", capsize=2)
    for x, name in enumerate(names):
        by_form = {row["form"]: row["macs"] for row in rows if row["net"] == name}
        share = by_form["pruned"] / by_form["dense"]
        axes.plot([x - 0.45, x + 0.45], [share, share], color="black", linestyle=":", linewidth=1.2)
    axes.plot([], [], color="black", linestyle=":", label="MACs of the pruned net / dense")
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_ylabel("latency / dense; lower is faster")
    axes.set_title("Same MACs, different latency (ONNX Runtime CPU, 1 thread, batch 1)", loc="left", fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def main(out: Path, seconds: float, nets: Path | None) -> None:
    import onnxruntime

    out.mkdir(parents=True, exist_ok=True)
    every: list[dict] = []
    facts: dict = {}
    loads = []
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = nets or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in NETS:
            print(name, flush=True)
            made = folder / f"{name}.json"
            if not made.exists():
                made.write_text(json.dumps(build(name, folder)))
            if seconds <= 0:
                continue
            rows, facts = measure(json.loads(made.read_text()), folder, seconds)
            loads.append(facts["machine"]["load average before"])
            every += rows
            facts |= {
                "onnxruntime": onnxruntime.__version__,
                "torch_pruning": version("torch-pruning"),
                "loads": ", ".join(loads),
                "command": f"PYTHONPATH=tests:DIR python -m side_by_side OUT {seconds:g}",
            }
            (out / "side_by_side.json").write_text(json.dumps({**facts, "rows": every}, indent=1) + "\n")
            (out / "side_by_side.md").write_text(as_markdown(every, facts))
            draw(every, out / "side_by_side.svg")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        float(sys.argv[2]) if len(sys.argv) > 2 else 60.0,
        Path(sys.argv[3]) if len(sys.argv) > 3 else None,  # where the nets are kept; SECONDS 0 only makes them
    )
