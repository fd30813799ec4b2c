"""mcdeploy: learn which connections of a vision backbone matter, remove the rest, prove it, ship it.

    model = mcdeploy.wire(timm.create_model("resnet50", pretrained=True), "maskconnect", fan_in=3)
    optimizer = torch.optim.SGD(mcdeploy.weights(model), lr=0.1)
    gates = mcdeploy.gate_optimizer(model, lr=0.02)     # call gates.step() after optimizer.step()
    small = mcdeploy.compile_model(model, example)      # a plain nn.Module, no gates left in it
    mcdeploy.export_onnx(small, "small.onnx", example)

Names are imported when they are first used, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcdeploy.backends.onnx import export_onnx, export_program
    from mcdeploy.compile import compile_model, compile_with_certificate
    from mcdeploy.connectivity.gates import GateOptimizer as gate_optimizer
    from mcdeploy.connectivity.gates import weights
    from mcdeploy.connectivity.topology import Topology
    from mcdeploy.connectivity.wiring import gate_values, topology_of
    from mcdeploy.errors import McdeployError
    from mcdeploy.model import wire

_HOME = {
    "McdeployError": ("mcdeploy.errors", "McdeployError"),
    "Topology": ("mcdeploy.connectivity.topology", "Topology"),
    "compile_model": ("mcdeploy.compile", "compile_model"),
    "compile_with_certificate": ("mcdeploy.compile", "compile_with_certificate"),
    "export_onnx": ("mcdeploy.backends.onnx", "export_onnx"),
    "export_program": ("mcdeploy.backends.onnx", "export_program"),
    "gate_optimizer": ("mcdeploy.connectivity.gates", "GateOptimizer"),
    "gate_values": ("mcdeploy.connectivity.wiring", "gate_values"),
    "topology_of": ("mcdeploy.connectivity.wiring", "topology_of"),
    "weights": ("mcdeploy.connectivity.gates", "weights"),
    "wire": ("mcdeploy.model", "wire"),
}

__all__ = [
    "McdeployError",
    "Topology",
    "compile_model",
    "compile_with_certificate",
    "export_onnx",
    "export_program",
    "gate_optimizer",
    "gate_values",
    "topology_of",
    "weights",
    "wire",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mcdeploy' has no attribute {name!r}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)
