"""Run by test_train under torch.distributed.run: train, and leave every mask this process drew."""

import json
import os
import sys
from pathlib import Path

from mcdeploy.connectivity.maskconnect import MaskEdges
from mcdeploy.recipe import load_recipe
from mcdeploy.runs import train_run

drawn: list[list[float]] = []
draw = MaskEdges.draw


def remember(edges, generator):
    draw(edges, generator)
    drawn.append(edges.mask_GN.flatten().tolist())


MaskEdges.draw = remember
out = Path(sys.argv[2])
train_run(load_recipe(Path(sys.argv[1])), out, resume=False)
stages = 3
(out / f"masks{os.environ['RANK']}.json").write_text(
    json.dumps([drawn[i : i + stages] for i in range(0, len(drawn), stages)])
)
