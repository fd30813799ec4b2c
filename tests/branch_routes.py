"""Which form of a static route is faster, and what a pruned multi-branch net gains: {29,8,8} at 32x32, K = 1 and K = 4.

PYTHONPATH=tests python -m branch_routes OUT      writes OUT/<backend>.json and prints the tables; minutes

The yardstick is plain ResNeXt of the same shape, compiled. ``masked`` runs every branch, with the wiring of k1.
Times are CPU time of one thread, so that a busy machine does not count.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import torch
from mcruntime.engine import OnnxRunner
from rich.console import Console
from tiny_models import images
from torch import nn

import mcdeploy
from mcdeploy.backbones.multibranch import MultiBranchNet
from mcdeploy.backends.pytorch import TorchRunner
from mcdeploy.bench import compare_latency
from mcdeploy.compile.branches import merge_summed_branches
from mcdeploy.compile.certify import scramble
from mcdeploy.compile.fold import find_foldable, fold_batch_norms
from mcdeploy.compile.prune import drop_dead_blocks
from mcdeploy.connectivity import gateconnect
from mcdeploy.connectivity.topology import Node, StageWiring, Topology
from mcdeploy.connectivity.wiring import fix, wired_stages

SURVIVORS = (1, 3, 3, 3, 3, 4, 4, 6, 7)  # of 8, top to bottom: Fig. 2 of the paper, K = 1
SECONDS = 10.0  # of every backend and batch size


def branch_topology(reads, sizes, aggregate="sum"):
    """``reads[i][j]``: what branch j of module i + 1 reads; the last entry is the one row of the sum."""
    numbers = itertools.count(1)
    nodes = [[Node(0, next(numbers)) for _ in range(size)] for size in sizes]
    rows = [tuple(nodes[i][k] for k in row) for i, rows in enumerate(reads) for row in rows]
    names = [f"{i}.b{k}" for i, size in enumerate(sizes) for k in range(size)]
    wiring = StageWiring("trunk", (*names, "sum"), ((Node(0, 0),),) * sizes[0] + tuple(rows))
    return Topology((wiring,), aggregate)


def survivors_topology():
    """A K = 1 wiring of nine modules of eight branches that leaves ``SURVIVORS`` live."""
    reads = [
        tuple((k % before if k < after else 7,) for k in range(8)) for before, after in itertools.pairwise(SURVIVORS)
    ]
    return branch_topology([*reads, [tuple(range(SURVIVORS[-1]))]], (8,) * 9)


def branch_net():
    """{29,8,8} for 10 classes, scrambled."""
    torch.manual_seed(0)
    model = MultiBranchNet((3, 3, 3), 8, 8, 64)
    scramble(model)
    return model.eval()


def folded(model: nn.Module) -> nn.Module:
    """Pruned, folded and merged, as ``compile_model`` does it, without its proofs."""
    drop_dead_blocks(model)
    fold_batch_norms(model, find_foldable(model, images(2, 32)))
    merge_summed_branches(model)
    return model


def nets() -> dict[str, nn.Module]:
    made = {"plain": folded(branch_net())}
    for form in ("gather", "matmul"):
        gateconnect.FORM_OF_ONE = gateconnect.FORM_OF_SEVERAL = form
        first = mcdeploy.wire(branch_net(), "gateconnect", image_size=32, connect="full")
        fix(first, survivors_topology())
        made[f"k1 {form}"] = folded(first)
        fourth = mcdeploy.wire(branch_net(), "gateconnect", image_size=32, connect="random", fan_in=4)
        made[f"k4 {form}"] = folded(fourth)
    gateconnect.FORM_OF_ONE = "gather"
    masked = mcdeploy.wire(branch_net(), "gateconnect", image_size=32, connect="full")
    fix(masked, survivors_topology())
    wired_stages(masked)["trunk"].skip = frozenset()
    fold_batch_norms(masked, find_foldable(masked, images(2, 32)))
    merge_summed_branches(masked)
    made["k1 masked"] = masked
    return made


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    made = nets()
    for name, model in made.items():
        mcdeploy.export_onnx(model, out / f"{name.replace(' ', '_')}.onnx", images(2, 32))
    batches = {batch: images(batch, 32).numpy() for batch in (1, 32)}
    runners = {
        "onnxruntime": [OnnxRunner(out / f"{name.replace(' ', '_')}.onnx", name=name, threads=1) for name in made],
        "pytorch": [TorchRunner(model, name=name, threads=1) for name, model in made.items()],
    }
    for backend, entered in runners.items():
        report = compare_latency(entered, batches, seconds=SECONDS, clock=time.process_time)
        (out / f"{backend}.json").write_text(json.dumps(report.to_json(), indent=1))
        Console(width=140).print(report.table())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
