"""Peak activation memory: the largest sum of feature maps that are alive at once while one image passes through a net.

Read off ``torch.export``'s graph, so it is exact and the same on every machine. A buffer lives from the operator that
makes it to the last operator that reads it, with all its views: views and in-place operators share the buffer of what
they look at, which the graph knows from its storages. While an operator runs, its inputs and outputs are both alive.

    peak = max over operators of  sum of bytes(buffer) over buffers made at or before it and read at or after it

Counted: the image, every operator's output, what the net returns (alive to the end). Not counted: weights and
statistics, what an operator needs inside itself (im2col, attention scores of a fused kernel), and what an allocator
rounds up to or a framework keeps longer than the data flow asks. It is thus what an executor with perfect reuse and no
fusion needs. Of a ``torch.cond`` the dearer side counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn


def peak_activation_bytes(model: nn.Module, example: Tensor) -> int:
    """The most bytes of feature maps alive at once for one image at inference; see the module's head.

    Args:
        example: images [B, C, H, W]; the first one is used, its values do not matter, its dtype does.
    """
    training = model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export's own deprecations
            exported = torch.export.export(model, (example[:1].clone(),), strict=False)
    finally:
        model.train(training)
    images = set(exported.graph_signature.user_inputs)
    weights = {node.name for node in exported.graph.nodes if node.op == "placeholder" and node.name not in images}
    return _peak(exported.graph_module, weights)


def _peak(graph_module: fx.GraphModule, uncounted: set[str]) -> int:
    """The peak of one graph, without the buffers of the placeholders in ``uncounted``."""
    made: dict[int, int] = {}  # buffer to the operator that makes it
    read: dict[int, int] = {}  # buffer to the last operator that reads it
    size: dict[int, int] = {}
    inside: dict[int, int] = {}  # operator to what its own graphs need beyond its output
    elsewhere: set[int] = set()
    for step, node in enumerate(graph_module.graph.nodes):
        for tensor in _tensors(node):
            key = _buffer_of(tensor)
            if node.name in uncounted or node.op == "get_attr":
                elsewhere.add(key)
            made.setdefault(key, step)
            read[key] = step
            size.setdefault(
                key, _bytes_of(tensor)
            )  # the maker's tensor is all of the buffer, a later one may be a view
        for argument in node.all_input_nodes:
            read.update((_buffer_of(tensor), step) for tensor in _tensors(argument))
        graphs = [
            graph for argument in node.all_input_nodes if (graph := _graph_of(graph_module, argument)) is not None
        ]
        if graphs:
            inner = max(_peak(graph, _placeholders(graph)) for graph in graphs)
            own = sum(_bytes_of(tensor) for tensor in _tensors(node))
            inside[step] = max(0, inner - own)
    changes = [0] * (len(graph_module.graph.nodes) + 1)
    for key in made.keys() - elsewhere:
        changes[made[key]] += size[key]
        changes[read[key] + 1] -= size[key]
    alive, peak = 0, 0
    for step, change in enumerate(changes):
        alive += change
        peak = max(peak, alive + inside.get(step, 0))
    return peak


def _tensors(node: fx.Node) -> Iterator[Tensor]:
    """What a node makes; a node that returns several tensors makes them all."""
    value = node.meta.get("val")
    for item in value if isinstance(value, list | tuple) else (value,):
        if isinstance(item, Tensor):
            yield item


def _buffer_of(tensor: Tensor) -> int:
    """The same number for all tensors that share a storage; the graph keeps them all, so no number comes twice."""
    return tensor.untyped_storage()._cdata


def _bytes_of(tensor: Tensor) -> int:
    size = tensor.untyped_storage().nbytes()
    if isinstance(size, int):
        return size
    return int(tensor.numel()) * tensor.element_size()  # what torch.cond returns has strides that are not known yet


def _graph_of(graph_module: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The graph that a node hands to a control-flow operator, such as one side of ``torch.cond``."""
    found = getattr(graph_module, str(node.target), None) if node.op == "get_attr" else None
    return found if isinstance(found, fx.GraphModule) else None


def _placeholders(graph_module: fx.GraphModule) -> set[str]:
    return {node.name for node in graph_module.graph.nodes if node.op == "placeholder"}
