"""What a bundle says of its wiring beyond the certificate, for whoever draws it: the server's page.

wiring.json   what every block could have read, and the gates that were learned; for a wiring that depends on the
              image, its edges, and the share of validation images that each is open for
wiring.onnx   only for such a wiring: images to the weight of every one of these edges, 0 where it is closed
"""

# B = images, E = edges of all stages that depend on the image

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mcruntime.bundle import WIRING, WIRING_MODEL
from mcruntime.engine import OnnxRunner
from numpy.typing import NDArray
from torch import Tensor, nn

from mcdeploy.backends.onnx import export_onnx
from mcdeploy.compile.conditional import WiringForm, told
from mcdeploy.compile.dynamic import NEAR_THRESHOLD, record
from mcdeploy.connectivity.ddw import DynamicStage, dynamic_stages
from mcdeploy.errors import ParityError

MAX_ABS = 1e-3  # of an edge's weight, 0..1 before it is divided by their sum: between PyTorch and wiring.onnx


def write_wiring(
    folder: Path,
    small: nn.Module,
    topology: Mapping[str, Any],
    val: Iterable[Sequence[Tensor]],
    *,
    example: Tensor,
    opset: int,
    candidates: Mapping[str, Any] | None = None,
    gates: Mapping[str, Any] | None = None,
) -> None:
    """Write ``wiring.json``, and ``wiring.onnx`` where the wiring depends on the image, proved on all of ``val``.

    Args:
        small: the compiled model.
        topology: the certificate's, with the blocks that were removed.
        val: validation images and their classes, in batches.
        example: images [B, C, H, W], B >= 2.
        candidates: what each block could have read, as ``Topology.to_json``.
        gates: by stage one list a block and one number a candidate.

    Raises:
        ParityError: PyTorch and ONNX Runtime wire an image differently although it is away from every threshold.
        BackendError: the export failed.
    """
    tree: dict[str, Any] = {"topology": topology, "candidates": candidates, "gates": gates or {}, "dynamic": []}
    stages = dynamic_stages(small)
    if stages:
        path = folder / WIRING_MODEL
        export_onnx(WiringForm(small), path, example, opset=opset, output="weights")
        with OnnxRunner(path, name=WIRING_MODEL) as runner:
            share_E = _prove(small, runner, val)
        places = [place for name, stage in stages.items() for place in _places(name, stage, topology)]
        tree["dynamic"] = [
            {"from": source, "to": reader, "share": share}
            for (source, reader), share in zip(places, share_E.tolist(), strict=True)
        ]
    (folder / WIRING).write_text(json.dumps(tree, indent=1), encoding="utf-8")


def last_gates(metrics: Path) -> dict[str, list[list[float]]]:
    """The gates that a run logged last, before they were frozen; none where it logged none."""
    gates: dict[str, list[list[float]]] = {}
    if metrics.exists():
        for line in metrics.read_text(encoding="utf-8").splitlines():
            gates = json.loads(line).get("gates") or gates
    return gates


def _prove(small: nn.Module, runner: OnnxRunner, val: Iterable[Sequence[Tensor]]) -> NDArray[np.float64]:
    """The share of the images that each edge is open for, [E], if both engines say the same of every image."""
    opened, total = np.zeros(0), 0
    for images_BCHW, *_ in val:
        seen = record(small, images_BCHW.float())
        expected_BE = torch.cat([told(seen.open_BE[name], seen.weights_BE[name]) for name in seen.open_BE], 1).numpy()
        actual_BE = runner.infer(images_BCHW.numpy().astype(np.float32))
        settled_B = seen.margin_B.numpy() >= NEAR_THRESHOLD
        _check(expected_BE[settled_B], actual_BE[settled_B])
        opened = (expected_BE > 0).sum(0) + (opened if total else 0)
        total += len(expected_BE)
    return opened / max(total, 1)


def _check(expected_BE: NDArray[np.float32], actual_BE: NDArray[np.float32]) -> None:
    other = ((expected_BE > 0) != (actual_BE > 0)).any(1)
    if other.any():
        raise ParityError(
            f"{WIRING_MODEL}: wires {int(other.sum())} of {len(other)} validation images otherwise than PyTorch does, "
            "away from every threshold; nothing was written"
        )
    difference = float(np.abs(expected_BE - actual_BE).max(initial=0.0))
    if not difference <= MAX_ABS:
        raise ParityError(
            f"{WIRING_MODEL}: an edge's weight is off by {difference:.1e}, allowed is {MAX_ABS:g}; nothing was written"
        )


def _places(name: str, stage: DynamicStage, topology: Mapping[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """The ends of a stage's edges, each as [stage, node] in the certificate's numbering, where no block is gone yet."""
    s, blocks = next((s, row["blocks"]) for s, row in enumerate(topology["stages"]) if row["name"] == name)
    node = [0, *(1 + list(blocks).index(block) for block in stage.block_names)]
    for source, reader in stage.edges:
        yield [s, node[source]], [s, node[reader]]
