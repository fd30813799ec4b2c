"""Would a server be faster that puts images of the same wiring into one batch? Against what it does: as they come.

    PYTHONPATH=tests:. python -m serving_by_wiring export FOLDER [RUN]
    PYTHONPATH=tests:. python -m serving_by_wiring time FOLDER BATCH OUT.json

BATCH is what one batch holds at most. RUN is a trained run of a recipe with ``rule: ddw`` and a CIFAR or digits ResNet;
without one, a ResNet-32 with random routers and noise stands in. Its model is exported as prune-export does it, with
``wiring.onnx``, which says of images which edges they open. A stream of images stands before the engine: four batches
wait at a time, or all 256, which favours whatever groups.

    as they come        in the order of arrival: what ``mcdeploy serve`` does
    as they come, by N  in batches of another size: the server takes the one that the bundle's bench found best
    alone               one by one, so that each skips what it does not need
    known: groups       only images of one wiring in a batch, found before and not timed: nothing can know it for free
    known: sorted       the same, but full batches: sorted by wiring, and cut
    asked: sorted       the same, with wiring.onnx run first on all that wait, which is timed
    first stage: sorted by the wiring of the first stage alone, cut out of wiring.onnx: less to run, and less known
    split at layerN     the net as two files: all that wait run through the first, the router of layerN sorts what comes
                        out, and the second goes on; for every stage that the images wire differently

Every answer is compared with the one of "as they come". Ratios are of times, interleaved: below 1 is faster. OUT.json
keeps what other runs have left in it.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from dynamic_batches import stand_in, trained
from mcruntime.engine import OnnxRunner
from onnx.utils import Extractor
from torch import Tensor, nn

from mcdeploy.backends.onnx import export_onnx
from mcdeploy.bench import compare_latency
from mcdeploy.checkpoint import load_checkpoint
from mcdeploy.compile.conditional import WiringForm
from mcdeploy.connectivity.ddw import dynamic_stages
from mcdeploy.surroundings import describe_machine

IMAGES = 256
SECONDS = 20.0  # for one of these, all ways together
CLOSE = 1e-4  # of logits, between an image alone and in a batch

STAGES = ("layer1", "layer2", "layer3")  # of the CIFAR and digits ResNets

# What waits [W, ...] and where it stands in the stream, to batches of positions among it.
Plan = Callable[[np.ndarray, slice], list[np.ndarray]]


class Part(nn.Module):
    """The first stages of a net with its stem, or the last ones with its head."""

    def __init__(self, net: nn.Module, stages: tuple[str, ...], *, first: bool) -> None:
        super().__init__()
        self.net, self.stages = copy.deepcopy(net), stages
        self.first = first
        for name in set(STAGES) - set(stages):
            self.net.set_submodule(name, nn.Identity())
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """x: images, or what the stage before handed on; returns that of the last of these stages, flat, or logits."""
        if self.first:
            x = self.net.act1(self.net.bn1(self.net.conv1(x)))
        for name in self.stages:
            x = self.net.get_submodule(name)(x)
        return x.flatten(1) if self.first else self.net.forward_head(x)


class Stage(nn.Module):
    """One stage alone."""

    def __init__(self, net: nn.Module, name: str) -> None:
        super().__init__()
        self.stage = copy.deepcopy(net.get_submodule(name))

    def forward(self, x: Tensor) -> Tensor:
        """x: the stage's input."""
        return self.stage(x)


class Stream:
    """A runner that takes the whole stream, as many at a time as wait, in the batches of a plan.

    Args:
        before: the first file of a net that is split; ``model`` is the second then, and what it reads has ``shape``.
        asked: the runner that the plan asks, held open together with the others.
    """

    def __init__(
        self, name: str, model: OnnxRunner, waiting: int, batch: int, plan: Plan, asked: OnnxRunner | None = None,
        before: OnnxRunner | None = None, shape: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        self.name, self.model, self.waiting, self.batch, self.plan = name, model, waiting, batch, plan
        self.before, self.shape = before, shape
        self.all = [runner for runner in (model, asked, before) if runner]
        self.calls = 0

    def __enter__(self) -> Stream:
        for runner in self.all:
            runner.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        for runner in self.all:
            runner.__exit__(*exc)

    def facts(self) -> Any:
        return self.model.facts()

    def infer(self, images: np.ndarray) -> np.ndarray:
        logits, self.calls = [], 0
        for start in range(0, len(images), self.waiting):
            place = slice(start, start + self.waiting)
            waiting = images[place]
            if self.before:
                parts = [self.before.infer(waiting[part]) for part in cut(np.arange(len(waiting)), self.batch)]
                waiting = np.concatenate(parts).reshape(len(waiting), *self.shape)
            answers: Any = None
            for batch in self.plan(waiting, place):
                answer = self.model.infer(waiting[batch])
                answers = np.empty((len(waiting), answer.shape[1]), np.float32) if answers is None else answers
                answers[batch] = answer
                self.calls += 1
            logits.append(answers)
        return np.concatenate(logits)


def cut(order: np.ndarray, batch: int) -> list[np.ndarray]:
    """Positions in that order, as many as a batch takes at a time."""
    return [order[at : at + batch] for at in range(0, len(order), batch)]


def by_wiring(open_WE: np.ndarray, batch: int, *, mixed: bool) -> list[np.ndarray]:
    """Batches of images that open the same edges; mixed: full ones, of neighbours as sorting makes them."""
    order = np.lexsort(open_WE.T[::-1])
    if mixed:
        return cut(order, batch)
    changes = np.flatnonzero((open_WE[order[1:]] != open_WE[order[:-1]]).any(1)) + 1
    return [part for group in np.split(order, changes) for part in cut(group, batch)]


def asking(runner: OnnxRunner, batch: int, *, mixed: bool) -> Plan:
    """Find out on the way: the wiring model runs on all that wait, in batches, before anything else does."""

    def plan(waiting: np.ndarray, _: slice) -> list[np.ndarray]:
        parts = [runner.infer(waiting[at : at + batch]) for at in range(0, len(waiting), batch)]
        return by_wiring(np.concatenate(parts) > 0, batch, mixed=mixed)

    return plan


def ways(folder: Path, open_NE: np.ndarray, splits: dict[str, tuple[int, ...]], batch: int, w: int) -> list[Stream]:
    """All that are compared, the present one first; w wait."""

    def engine(name: str) -> OnnxRunner:
        return OnnxRunner(folder / name, spinning=False)  # as the server opens it

    def asked(name: str, file: str, model: str = "model.onnx", **more: Any) -> Stream:
        wiring = engine(file)
        return Stream(name, engine(model), w, batch, asking(wiring, batch, mixed=True), wiring, **more)

    other = 8 if batch > 8 else 32
    plans: dict[str, Plan] = {
        "as they come": lambda images, _: cut(np.arange(len(images)), batch),
        f"as they come, by {other}": lambda images, _: cut(np.arange(len(images)), other),
        "alone": lambda images, _: cut(np.arange(len(images)), 1),
        "known: groups": lambda _, place: by_wiring(open_NE[place], batch, mixed=False),
        "known: sorted": lambda _, place: by_wiring(open_NE[place], batch, mixed=True),
    }
    return [
        *(Stream(name, engine("model.onnx"), w, batch, plan) for name, plan in plans.items()),
        asked("asked: sorted", "wiring.onnx"),
        asked("first stage: sorted", "first.onnx"),
        *(
            asked(
                f"split at {name}", f"{name}.router.onnx", f"{name}.after.onnx",
                before=engine(f"{name}.before.onnx"), shape=shape,
            )
            for name, shape in splits.items()
        ),
    ]  # fmt: skip


def split(model: nn.Module, images: Tensor, folder: Path) -> dict[str, tuple[int, ...]]:
    """Two files and a router for every stage that these images wire differently; the shape of what it reads."""
    found = {}
    for name in dynamic_stages(model):
        at = STAGES.index(name)
        before, router = Part(model, STAGES[:at], first=True), Stage(model, name)
        heard: list[Tensor] = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args, heard=heard: heard.append(args[0]))
        with torch.no_grad():
            model(images)
        handle.remove()
        export_onnx(WiringForm(router), folder / f"{name}.router.onnx", heard[0][:2], output="weights")
        if len(np.unique(edges(folder / f"{name}.router.onnx", heard[0].numpy()), axis=0)) == 1:
            continue
        export_onnx(before, folder / f"{name}.before.onnx", images[:2])
        export_onnx(Part(model, STAGES[at:], first=False), folder / f"{name}.after.onnx", heard[0][:2])
        found[name] = tuple(heard[0].shape[1:])
    return found


def export(model: Any, images: Any, folder: Path) -> None:
    """``model.onnx`` and ``wiring.onnx`` as in a bundle, and ``first.onnx``: the edges of the first stage alone."""
    export_onnx(model, folder / "model.onnx", images[:2])
    export_onnx(WiringForm(model), folder / "wiring.onnx", images[:2], output="weights")
    whole = onnx.load(folder / "wiring.onnx")
    (last,) = [node for node in whole.graph.node if "weights" in node.output]
    first = last.input[0] if last.op_type == "Concat" else "weights"  # one input a stage
    if first == "weights":
        onnx.save(whole, folder / "first.onnx")
        return
    kind = onnx.helper.make_tensor_value_info(first, onnx.TensorProto.FLOAT, ["batch", None])
    whole.graph.value_info.append(kind)
    onnx.save(Extractor(whole).extract_model([whole.graph.input[0].name], [first]), folder / "first.onnx")


def edges(path: Path, images: np.ndarray) -> np.ndarray:
    """Which edges every image opens, [N, E]."""
    with OnnxRunner(path) as runner:
        return runner.infer(images) > 0


def check_answers(streams: list[Stream], images: np.ndarray) -> dict[str, float]:
    """The largest difference of a logit from the present way, by way."""
    found: dict[str, float] = {}
    expected: Any = None
    for stream in streams:
        with stream:
            logits = stream.infer(images)
        expected = logits if expected is None else expected
        found[stream.name] = float(np.abs(logits - expected).max())
    if max(found.values()) > CLOSE:
        raise SystemExit(f"answers differ by more than {CLOSE}: {found}")
    return found


def compare(
    folder: Path, images: np.ndarray, open_NE: np.ndarray, splits: dict[str, tuple[int, ...]], batch: int, waiting: int
) -> list[dict[str, Any]]:
    """One row for every way."""
    streams = ways(folder, open_NE, splits, batch, waiting)
    differences = check_answers(streams, images)
    report = compare_latency(streams, {len(images): images}, seconds=SECONDS, until=0.0, reload=False)
    rows = []
    for row, stream in zip(report.latencies, streams, strict=True):
        assert row.runner == stream.name
        ratio = [round(number, 4) for number in (row.ratio.value, row.ratio.low, row.ratio.high)]
        rows.append({
            "batch": batch, "waiting": waiting, "way": row.runner, "batches_run": stream.calls,
            "images_per_second": round(len(images) / row.p50_ms.value * 1000), "ratio": ratio,
            "largest_difference": differences[row.runner],
        })  # fmt: skip
        print(
            f"batch {batch:2}, {waiting:3} wait: {row.runner:20} {rows[-1]['images_per_second']:6} images/s, "
            f"x {ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]",
            flush=True,
        )
    return rows


def prepare(folder: Path, run: Path | None) -> None:
    """Write all files of a model into the folder, and what is to be known of it."""
    folder.mkdir(parents=True)
    name, recipe = "resnet32_cifar with random routers, noise", None
    if run:
        recipe = load_checkpoint(run).header["recipe"]
        name = recipe["name"]
        recipe["data"].pop("root")  # where its images lie is of this machine only
    model, images = trained(run, IMAGES) if run else stand_in(IMAGES)
    export(model, images, folder)
    splits = split(model, images, folder)
    stream = images.numpy().astype(np.float32)
    np.save(folder / "images.npy", stream)
    tree: dict[str, Any] = {"name": name, "images": len(stream), "size": stream.shape[-1]}
    for key, file in (("wiring", "wiring.onnx"), ("wiring_of_the_first_stage", "first.onnx")):
        open_NE = edges(folder / file, stream)
        _, counts = np.unique(open_NE, axis=0, return_counts=True)
        tree[f"images_of_each_{key}"] = sorted(counts.tolist(), reverse=True)
    (folder / "model.json").write_text(json.dumps(tree | {"splits": splits, "recipe": recipe}), encoding="utf-8")
    print(f"{name}: {len(tree['images_of_each_wiring'])} wirings, split at {', '.join(splits)}")


def measure(folder: Path, batch: int, out: Path) -> None:
    """Time every way, and put the rows into OUT.json in place of those of this model and batch."""
    told = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    name, splits, stream = told.pop("name"), told.pop("splits"), np.load(folder / "images.npy")
    open_NE = edges(folder / "wiring.onnx", stream)
    rows = [row for w in (4 * batch, IMAGES) for row in compare(folder, stream, open_NE, splits, batch, w)]
    tree = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    tree["command"] = "PYTHONPATH=tests:. python -m serving_by_wiring time FOLDER BATCH OUT.json"
    tree["what"] = "images a second where images of one wiring share a batch, against batches in the order of arrival"
    tree["machine"] = describe_machine()
    models = tree.setdefault("models", {})
    others = [row for row in models.get(name, {}).get("rows", []) if row["batch"] != batch]
    models[name] = told | {"rows": sorted(others + rows, key=lambda row: (row["batch"], row["waiting"]))}
    out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """See the docstring of the module."""
    if arguments[:1] == ["export"] and len(arguments) in (2, 3):
        prepare(Path(arguments[1]), Path(arguments[2]) if len(arguments) > 2 else None)
    elif arguments[:1] == ["time"] and len(arguments) == 4:
        measure(Path(arguments[1]), int(arguments[2]), Path(arguments[3]))
    else:
        print(__doc__)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
