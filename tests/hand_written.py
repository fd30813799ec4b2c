"""A pruned net as a person would write it, to hold the compiled one against.

PYTHONPATH=tests python -m hand_written OUT      writes OUT/hand.onnx and OUT/ours.onnx for mcdeploy bench
"""

import sys
from pathlib import Path

from tiny_models import images, small_resnet, wired_resnet
from torch import nn

import mcdeploy
from mcdeploy.connectivity.topology import Node, StageWiring, Topology
from mcdeploy.connectivity.wiring import fix, topology_of


class HandWritten(nn.Module):
    """``wired_resnet`` under the topology of ``hand_topology``, as a person would write it."""

    def __init__(self, source):
        super().__init__()
        self.stem = nn.Sequential(source.conv1, source.bn1, source.act1)
        self.a, self.b, self.c = source.layer1[0], source.layer1[1], source.layer1[3]
        self.second = nn.Sequential(source.layer2[0], source.layer2[3])
        self.third = nn.ModuleList(source.layer3)
        self.pool, self.linear = source.global_pool, source.linear

    def forward(self, x):
        x = self.stem(x)
        first = self.a(x)
        second = self.b(first)
        x = self.second(self.c((x + second) / 2))
        y1 = self.third[0](x)
        y2 = self.third[1](y1)
        y3 = self.third[2]((y1 + y2) / 2)
        y4 = self.third[3]((y1 + y2 + y3) / 3)
        return self.linear(self.pool(y4))


def hand_topology(model):
    reads = (
        ((0,), (1,), (1,), (0, 2)),  # block 3 is dead
        ((0,), (1,), (1,), (1,)),  # blocks 2 and 3 are dead, a chain is left
        ((0,), (1,), (1, 2), (1, 2, 3)),
    )
    stages = tuple(
        StageWiring(stage.name, stage.blocks, tuple(tuple(Node(s, i) for i in row) for row in reads[s]))
        for s, stage in enumerate(topology_of(model).stages)
    )
    return Topology(stages, "mean")


def main(out: Path) -> None:
    model = wired_resnet("all")
    fix(model, hand_topology(model))
    mcdeploy.export_onnx(mcdeploy.compile_model(model, images(7, 16)), out / "ours.onnx", images(2, 16))
    mcdeploy.export_onnx(HandWritten(small_resnet()).eval(), out / "hand.onnx", images(2, 16))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
