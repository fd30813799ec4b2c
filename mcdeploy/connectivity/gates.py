"""Gates: real numbers in 0..1 that learn which K of n candidates a node reads, and the optimizer that updates them.

The algorithm is GateConnect's ("Connectivity Learning in Multi-Branch Networks", arXiv 1709.09582, Algorithm 1). With
y_j the output of candidate j, gates g_i in [0, 1]^n for the n candidates of node i, and K the fan-in, each step

    1. normalises     g_i <- g_i / sum(g_i)                       (the stored value is overwritten)
    2. draws          K distinct indices from Mult(g_i);  m_i = 1 there, 0 elsewhere
    3. runs forward   x_i = sum_j m_ij y_j   (or their mean)      and backward with the binary mask m_i
    4. updates        g_ij <- clip(g_ij - lr * dL/dm_ij, 0, 1),   dL/dm_ij = <dL/dx_i, y_j>, also where m_ij = 0

and after the joint phase the top K of every g_i stay for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mcdeploy.errors import WiringError

# G = nodes (rows), N = candidates of a node (columns; shorter rows are padded at the end)


class Gates(nn.Module):
    """The gates of several nodes, one row each.

    ``gates_GN`` holds the learned reals in 0..1, ``mask_GN`` the binary draw of the current step. In training the mask
    is used and its gradient is left in ``gates_GN.grad``; outside training the top K gates are used.

    Nodes with at most K candidates read all of them and have nothing to learn.

    Args:
        counts: candidates of every node.
        fan_in: K.
        init: ``chain`` puts half of a node's mass on its last candidate, the block before.
    """

    def __init__(self, counts: Sequence[int], fan_in: int, init: Literal["uniform", "chain"] = "uniform") -> None:
        super().__init__()
        self.fan_in = fan_in
        self.counts = tuple(counts)
        valid_GN = torch.arange(max(self.counts)).expand(len(self.counts), -1) < torch.tensor(self.counts)[:, None]
        gates_GN = valid_GN.float()
        if init == "chain":
            for g, n in enumerate(self.counts):
                gates_GN[g, n - 1] = max(1, n - 1)
        self.gates_GN = nn.Parameter(gates_GN / gates_GN.sum(1, keepdim=True))
        self.register_buffer("mask_GN", valid_GN.float())
        self.register_buffer("valid_GN", valid_GN, persistent=False)
        self.mask_GN: Tensor
        self.valid_GN: Tensor

    def mask_of(self, node: int) -> Tensor:
        """The mask of one node, [n]: the draw with the gates' gradient in training, the top K otherwise."""
        gates_N = self.gates_GN[node, : self.counts[node]]
        if self.training:  # value: the mask; gradient: what the mask receives
            return self.mask_GN[node, : self.counts[node]] + (gates_N - gates_N.detach())
        return self.top_mask(gates_N)

    def masks_GN(self) -> Tensor:
        """All masks at once, [G, N]; see ``mask_of``."""
        if self.training:
            return self.mask_GN + (self.gates_GN - self.gates_GN.detach())
        rows = [self.top_mask(row[:n]) for row, n in zip(self.gates_GN, self.counts, strict=True)]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def top_mask(self, gates_N: Tensor) -> Tensor:
        """1 for the K largest gates, 0 for the rest; ties go to the nearer (later) candidate."""
        nearest_first_N = torch.argsort(gates_N.flip(0), descending=True, stable=True)
        top_K = len(gates_N) - 1 - nearest_first_N[: self.fan_in]
        return torch.zeros_like(gates_N).index_fill(0, top_K, 1.0)

    def active(self) -> tuple[tuple[int, ...], ...]:
        """The top K candidates of every node, by position, ascending."""
        gates_GN = self.gates_GN.detach().cpu()
        return tuple(
            tuple(self.top_mask(row[:n]).nonzero().flatten().tolist())
            for row, n in zip(gates_GN, self.counts, strict=True)
        )

    def values(self) -> list[list[float]]:
        """The gates for logs and plots: one list a node, one number in 0..1 a candidate."""
        return [row[:n] for row, n in zip(self.gates_GN.tolist(), self.counts, strict=True)]

    @torch.no_grad()
    def descend(self, lr: float, grad: Literal["raw", "normalised"]) -> None:
        """Step 4: one clipped gradient step. ``normalised`` divides each node's gradient by its root mean square."""
        gradient_GN = self.gates_GN.grad
        assert gradient_GN is not None
        if grad == "normalised":
            count_G1 = self.valid_GN.sum(1, keepdim=True)
            rms_G1 = (gradient_GN.square().sum(1, keepdim=True) / count_G1).sqrt()
            gradient_GN = gradient_GN / rms_G1.clamp_min(torch.finfo(gradient_GN.dtype).tiny)
        self.gates_GN.sub_(lr * gradient_GN).clamp_(0, 1).mul_(self.valid_GN)

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Steps 1 and 2: normalise in place, then draw the next mask. A node whose gates are all 0 starts anew."""
        sum_G1 = self.gates_GN.sum(1, keepdim=True)
        uniform_GN = self.valid_GN / self.valid_GN.sum(1, keepdim=True)
        self.gates_GN.copy_(torch.where(sum_G1 > 0, self.gates_GN / sum_G1.clamp_min(1e-38), uniform_GN))
        chances_GN = self.gates_GN.float().cpu()
        mask_GN = torch.zeros_like(chances_GN)
        for g, n in enumerate(self.counts):
            if n <= self.fan_in:
                mask_GN[g, :n] = 1
            else:  # the small constant lets closed gates fill up when fewer than K are open
                drawn = torch.multinomial(chances_GN[g, :n] + 1e-12, self.fan_in, generator=generator)
                mask_GN[g, drawn] = 1
        self.mask_GN.copy_(mask_GN)


class GateOptimizer:
    """Updates the gates of a wired model, beside the optimizer of its weights.

    Call ``step()`` after the weight optimizer's. The draws depend only on ``seed`` and the number of steps, so that
    every process draws the same masks and a resumed run draws what the uninterrupted one would have drawn.

    Raises:
        WiringError: the model has no gates.
    """

    def __init__(
        self, model: nn.Module, lr: float, grad: Literal["raw", "normalised"] = "normalised", seed: int = 0
    ) -> None:
        self.gates = {name: module for name, module in model.named_modules() if isinstance(module, Gates)}
        if not self.gates:
            raise WiringError("the model has no gates; wire it with a learned rule such as maskconnect first")
        self.lr = lr
        self.grad = grad
        self.seed = seed
        self.num_steps = 0
        self._draw()

    def step(self, grad_scale: float = 1.0) -> None:
        """One clipped gradient step of every gate, then the next draw; clears the gates' gradients.

        Args:
            grad_scale: what the loss was multiplied by before backward (fp16 training).

        Raises:
            WiringError: no gradient reached a stage's gates, or another optimizer changed them.
        """
        for name, gates in self.gates.items():
            if gates.gates_GN.grad is None:
                raise WiringError(
                    f"no gradient reached the gates of {name}: call step() after loss.backward(), in training mode, "
                    "and make sure the loss depends on that stage"
                )
            if gates.gates_GN._version != self._versions[name]:
                raise WiringError(
                    f"something else changed the gates of {name}: give your weight optimizer mcdeploy.weights(model) "
                    "instead of model.parameters(), and call resume() after loading a state dict"
                )
            gates.descend(self.lr / grad_scale if self.grad == "raw" else self.lr, self.grad)
            gates.gates_GN.grad = None
        self.num_steps += 1
        self._draw()

    def zero_grad(self) -> None:
        """Forget the gates' gradients, as after a step that the loss scaler skipped."""
        for gates in self.gates.values():
            gates.gates_GN.grad = None

    def _draw(self) -> None:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.num_steps) % 2**63)
        for gates in self.gates.values():
            gates.draw(generator)
        self._versions = {name: gates.gates_GN._version for name, gates in self.gates.items()}

    def resume(self, num_steps: int) -> None:
        """Continue after ``num_steps`` steps on a model whose gates and masks have been loaded."""
        self.num_steps = num_steps
        self._versions = {name: gates.gates_GN._version for name, gates in self.gates.items()}


def weights(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that is not a gate: what the weight optimizer takes."""
    gates = {id(module.gates_GN) for module in model.modules() if isinstance(module, Gates)}
    return [parameter for parameter in model.parameters() if id(parameter) not in gates]
