"""Stages whose blocks are called by a loop of the host: ``for block in self.blocks: x = block(x, rope)``.

Such a container (``nn.ModuleList``, or a ``nn.Sequential`` that is walked) is never called itself, so what takes its
place must be walked like it. Walking a wired stage gives one ``Step`` a block. A step keeps the further arguments of
its block and hands back what it was given; the step of the last block runs the stage. That is the same function, since
the host does nothing with the feature maps between but hand them on; ``find_stages`` makes sure of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Loop:
    """The children of a walked container, and the further arguments of the pass that is running.

    Args:
        names: all children in the host's order, blocks of the stage and others; dead ones keep their place.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Loop:
        """A copied model has arguments of its own, none of a forward pass that was cut short."""
        memo[id(self)] = fresh = Loop(self.names)
        return fresh

    def run(self, name: str, block: nn.Module, x: Tensor) -> Tensor:
        """Call a block with ``x`` and the further arguments that the host gave it."""
        args, kwargs = self.arguments.get(name, ((), {}))
        return block(x, *args, **kwargs)


class Step:
    """What the host's loop gets in the place of a block; attributes are the block's own."""

    def __init__(self, stage: nn.Module, loop: Loop, name: str, is_last: bool) -> None:
        self.stage = stage
        self.loop = loop
        self.name = name
        self.is_last = is_last

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.loop.arguments[self.name] = args, kwargs
        if not self.is_last:
            return x
        output = self.stage(x)
        self.loop.arguments.clear()
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stage.get_submodule(self.name), name)


class Passed(nn.Module):
    """The place of a dead block in a walked container: hands back its first argument."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x
