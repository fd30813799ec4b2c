"""Does accuracy follow log NN-Mass at fixed width? Trains small cell nets on CIFAR-10 and draws accuracy against both.

python examples/nnmass_experiment.py DATA OUT      DATA holds train/<class>/* and val/<class>/*

Every net has cells of width 8, 16, 32. Depth and skips vary so that parameters and NN-Mass do not go together: nets
of one mass differ in parameters by up to three times, and the other way round. A net whose result lies in OUT already
is not trained again. At the end OUT holds ``nnmass.json`` and ``nnmass.svg``.
"""

import json
import math
import sys
import time
from functools import cache
from pathlib import Path

import timm
import torch

import mcdeploy
import mcdeploy.backbones  # registers nnmass_cells
from mcdeploy.compile.prune import count_macs, count_parameters
from mcdeploy.data import Loaders, build_loaders
from mcdeploy.recipe import DataConfig, TrainConfig
from mcdeploy.train import train

WIDTHS = (8, 16, 32)
NETS = (  # layers of a cell, skip channels of a layer in the first cell; twice and four times as many in the others
    (5, 2), (10, 2), (7, 8), (5, 16), (10, 4), (5, 8), (7, 2), (5, 4), (8, 4), (6, 16),
)  # fmt: skip
SEED = 0
IMAGES = 8000  # an epoch
TRAIN = TrainConfig(
    epochs=5, batch_size=128, eval_batch_size=500, eval_every=5, lr=0.1, warmup_epochs=1, weight_decay=5e-4,
    device="cpu", precision="bf16",
)  # fmt: skip


@cache
def loaders_of(data: str) -> Loaders:
    """The same for all nets: what an epoch holds depends on the seed and the epoch alone."""
    return build_loaders(data_config(data), TRAIN.batch_size, TRAIN.eval_batch_size, SEED)


def data_config(data: str) -> DataConfig:
    return DataConfig(source="folder", root=data, image_size=32, images_per_epoch=IMAGES)


def train_net(depth: int, skips: int, data: str, out: Path) -> dict[str, object]:
    """One net from its seed to its accuracy on all validation images."""
    loaders = loaders_of(data)
    torch.manual_seed(SEED)
    shape = {"widths": WIDTHS, "depths": (depth,) * 3, "skips": (skips, 2 * skips, 4 * skips)}
    model = timm.create_model("nnmass_cells", num_classes=len(loaders.classes), **shape)
    size = {"parameters": count_parameters(model), "macs": count_macs(model, torch.zeros(1, 3, 32, 32))}
    started, cpu = time.perf_counter(), time.process_time()
    wired = mcdeploy.wire(model, "chain", image_size=32)
    accuracy = train(wired, loaders, TRAIN, data_config(data), seed=SEED, out=out).accuracy
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
    return {**shape, **size, "top1": accuracy.top1, "loss": accuracy.loss, "images": accuracy.images, **seconds}


def fit(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Least squares line: slope, intercept and R^2, which is 1 - residual / total sum of squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    intercept = mean_y - slope * mean_x
    residual = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return slope, intercept, 1 - residual / sum((b - mean_y) ** 2 for b in y)


def summarise(results: list[dict]) -> dict[str, object]:
    """The results with their NN-Mass, and how well a line in the log of each quantity fits the accuracy."""
    from mcdeploy.connectivity.nnmass import Cell, nn_mass

    for result in results:
        cells = [Cell(*cell) for cell in zip(result["widths"], result["depths"], result["skips"], strict=True)]
        result["nn_mass"], result["layers"] = nn_mass(cells), sum(result["depths"]) + 1
    top1 = [100 * result["top1"] for result in results]
    logs = {key: [math.log(result[key]) for result in results] for key in ("nn_mass", "parameters", "macs", "layers")}
    return {
        "nets": results,
        "r2": {key: fit(values, top1)[2] for key, values in logs.items()},
        "percent_per_e_fold": {key: fit(values, top1)[0] for key, values in logs.items()},
        "r2_between_log_mass_and_log_parameters": fit(logs["nn_mass"], logs["parameters"])[2],
        "train": TRAIN.model_dump(mode="json"),
        "images_per_epoch": IMAGES,
        "seed": SEED,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }


def plot(results: list[dict], path: Path) -> None:
    """Accuracy against NN-Mass and, beside it, against parameters; nets of one depth share a colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    depths = sorted({result["depths"][0] for result in results})
    shades = plt.get_cmap("viridis")([0.85 * i / max(len(depths) - 1, 1) for i in range(len(depths))])
    colours = dict(zip(depths, shades, strict=True))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
    top1 = [100 * result["top1"] for result in results]
    for axis, key, label, ticks in (
        (axes[0], "nn_mass", "NN-Mass (log scale)", (30, 60, 120, 240)),
        (axes[1], "parameters", "parameters (log scale)", (70_000, 100_000, 150_000)),
    ):
        slope, intercept, r2 = fit([math.log(result[key]) for result in results], top1)
        for depth in depths:
            mine = [result for result in results if result["depths"][0] == depth]
            axis.scatter(
                [result[key] for result in mine], [100 * result["top1"] for result in mine],
                color=colours[depth], s=45, label=f"{3 * depth + 1} layers", zorder=3,
            )  # fmt: skip
        for result in results:
            note = f"t = {result['skips'][0]}"
            axis.annotate(
                note, (result[key], 100 * result["top1"]), (5, 4), textcoords="offset points", fontsize=7, color="0.35"
            )
        ends = [min(result[key] for result in results), max(result[key] for result in results)]
        axis.plot(ends, [intercept + slope * math.log(end) for end in ends], color="0.5", linewidth=1)
        axis.set(xscale="log", xlabel=label, title=f"R² = {r2:.2f}")
        axis.set_xticks(ticks)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}K" if x >= 1000 else f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.12)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CIFAR-10 top-1, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside right center")
    figure.savefig(path)
    plt.close(figure)


def main(data: str, out: Path) -> dict[str, object]:
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for depth, skips in NETS:
        path = out / f"d{depth}_t{skips}.json"
        if not path.exists():
            result = train_net(depth, skips, data, out / f"d{depth}_t{skips}")
            path.write_text(json.dumps(result, indent=2) + "\n")
            print(f"{path.stem}: top-1 {result['top1']:.2%}, {result['parameters']:,} parameters", flush=True)
        results.append(json.loads(path.read_text()))
    summary = summarise(results)
    (out / "nnmass.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(results, out / "nnmass.svg")
    print("R^2 of top-1 against the log of " + ", ".join(f"{key} {r2:.2f}" for key, r2 in summary["r2"].items()))
    return summary


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
