"""A plain PyTorch module behind the runner interface: what everything else is compared with.

``tests/test_cuda.py`` and a test in ``tests/test_pytorch_runner.py``, marked ``gpu``, hold CUDA's answers against the
CPU's.
"""

# B = batch, C = channels, H/W = height/width, N = classes.
from __future__ import annotations

import copy
import os
import platform
from importlib.metadata import version
from typing import Any, Literal, Self

import numpy as np
import torch
from mcruntime.cgroup import available_threads
from numpy.typing import NDArray
from torch import Tensor, nn

from mcdeploy.errors import BackendError, InputError, ParityError


class TorchRunner:
    """A module in PyTorch: float32, evaluation mode, no gradients.

    Entering copies the module, so the caller's stays in its mode, type and place. While entered, inference on the CPU
    uses ``threads`` threads of torch's pool, and on CUDA float32 means float32: TF32 is off for the whole process.
    Leaving puts both back; leave runners in the reverse order of entering, as nested ``with`` does.

    Args:
        module: takes images [B, C, H, W] and returns logits [B, N].
        name: for tables and messages.
        mode: "compiled" is ``torch.compile``, one graph for every batch size and no graph breaks.
        threads: of one inference on the CPU; None: ``available_threads()``.
        cold_l2: ``time_on_device`` first overwrites twice the size of the GPU's L2 cache, so that weights and images
            come from the GPU's memory. CUDA only.

    Raises:
        InputError: an unknown mode or device, fewer than 1 thread, or a cold L2 cache without a GPU.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        mode: Literal["eager", "compiled"] = "eager",
        device: Literal["cpu", "cuda"] = "cpu",
        threads: int | None = None,
        cold_l2: bool = False,
    ) -> None:
        if mode not in ("eager", "compiled"):
            raise InputError(f"{name}: unknown mode {mode!r}; valid are eager, compiled")
        if device not in ("cpu", "cuda"):
            raise InputError(f"{name}: unknown device {device!r}; valid are cpu, cuda")
        if threads is not None and threads < 1:
            raise InputError(f"{name}: threads: expected at least 1, got {threads}")
        if cold_l2 and device != "cuda":
            raise InputError(
                f"{name}: cold_l2: the CPU's caches cannot be emptied; ask for device cuda, or leave it out"
            )
        self._module = module
        self._name = name
        self._mode = mode
        self._device = torch.device(device)
        self._threads = threads or available_threads()
        self._cold_l2 = cold_l2
        self._flush_bytes: Tensor | None = None  # overwritten to empty the L2 cache
        self._model: Any = None
        self._before: tuple[int, bool, bool] | None = None  # torch's threads, TF32 of convolutions and of matmul

    @property
    def name(self) -> str:
        return self._name

    def __enter__(self) -> Self:
        """Copy the module to its device.

        Raises:
            BackendError: CUDA was asked for and is not there, torch.compile is switched off, or the L2 cache shall be
                cold and its size is not known.
        """
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise BackendError(
                f"{self._name}: asked for device cuda, but PyTorch {torch.__version__} finds no usable NVIDIA GPU; "
                "install a CUDA build of torch and a driver, or ask for cpu"
            )
        if self._mode == "compiled" and "1" in (
            os.environ.get("TORCH_COMPILE_DISABLE"),
            os.environ.get("TORCHDYNAMO_DISABLE"),
        ):
            raise BackendError(
                f"{self._name}: asked for mode compiled, but the environment switches torch.compile off; "
                "unset TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE, or ask for eager"
            )
        model = copy.deepcopy(self._module).to(device=self._device, dtype=torch.float32).eval()
        flush_bytes = self._allocate_flush() if self._cold_l2 else None
        # A graph break or a 9th batch size would fall back to eager in silence; fullgraph makes both an error.
        self._model = torch.compile(model, fullgraph=True, dynamic=False) if self._mode == "compiled" else model
        self._flush_bytes = flush_bytes
        backends = torch.backends
        self._before = (torch.get_num_threads(), backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32)
        if self._device.type == "cuda":
            backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False
        return self

    def __exit__(self, *exc: object) -> None:
        self._model = self._flush_bytes = None
        if self._before is not None:
            threads, conv_tf32, matmul_tf32 = self._before
            torch.set_num_threads(threads)
            if self._device.type == "cuda":
                torch.backends.cudnn.allow_tf32 = conv_tf32
                torch.backends.cuda.matmul.allow_tf32 = matmul_tf32
            self._before = None

    def infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """See ``Runner``; on CUDA the images are copied there and the logits back."""
        images_BCHW = self._to_tensor(images)
        logits_BN = self._run(images_BCHW.to(self._device))
        return self._checked(logits_BN, len(images))

    def time_on_device(self, images: NDArray[np.float32]) -> float | None:
        """Milliseconds that one inference takes on the GPU, between two CUDA events; None when this runs on the CPU.

        The images are on the GPU before the first event, and nothing else is queued; with ``cold_l2`` its L2 cache has
        been overwritten by then. What lies between the events is
        the model alone: no copies, but with gaps wherever the host launches kernels more slowly than the GPU runs
        them.

        Raises:
            InputError, ParityError: as ``infer``.
        """
        if self._device.type == "cpu":
            return None
        images_BCHW = self._to_tensor(images).to(self._device)
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        if self._flush_bytes is not None:
            self._flush_bytes.zero_()
        torch.cuda.synchronize(self._device)
        start.record()
        logits_BN = self._run(images_BCHW)
        end.record()
        end.synchronize()
        self._checked(logits_BN, len(images))
        return float(start.elapsed_time(end))

    def facts(self) -> dict[str, str]:
        """What really runs; the provider is read off the model's own tensors."""
        if self._model is None:
            raise RuntimeError("enter the runner before asking what runs")
        places = {tensor.device.type for tensor in (*self._model.parameters(), *self._model.buffers())}
        facts = {
            "backend": "pytorch",
            "mode": self._mode,
            "provider": " and ".join(sorted(places)) or self._device.type,
            "precision": "fp32",
            "threads": str(self._threads),
            "torch": str(torch.__version__),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        }
        if self._device.type == "cuda":
            facts |= {
                "gpu": torch.cuda.get_device_name(self._device),
                "cuda": str(torch.version.cuda),
                "tf32": "off",
                "l2": "cold" if self._cold_l2 else "warm",
            }
        return facts

    def _allocate_flush(self) -> Tensor:
        size = int(torch.cuda.get_device_properties(self._device).L2_cache_size)
        if size < 1:
            raise BackendError(
                f"{self._name}: this GPU does not say how large its L2 cache is; measure with a warm one"
            )
        return torch.empty(2 * size, dtype=torch.uint8, device=self._device)

    def _to_tensor(self, images: NDArray[np.float32]) -> Tensor:
        if self._model is None:
            raise RuntimeError("enter the runner before infer")
        if not isinstance(images, np.ndarray) or images.dtype != np.float32:
            kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
            raise InputError(f"{self._name}: expected float32 images, got {kind}")
        if images.ndim != 4 or len(images) == 0:
            raise InputError(f"{self._name}: expected images [B, C, H, W], got {list(images.shape)}")
        if not np.isfinite(images).all():
            raise InputError(f"{self._name}: the images hold NaN or infinite values; send finite pixels")
        return torch.from_numpy(np.require(images, requirements=["C", "W"]))  # torch warns of read-only memory

    def _run(self, images_BCHW: Tensor) -> Tensor:
        if torch.get_num_threads() != self._threads:  # another runner's; the setting belongs to the calling thread
            torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                return self._model(images_BCHW)
        except Exception as error:  # a wrong shape, no memory, no compiler: torch has a class for each
            lines = str(error).strip().splitlines() or [type(error).__name__]
            said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # "backend='inductor' raised:" and why
            reason = said[:200].rstrip(" .:")
            advice = "; ask for mode eager" if self._mode == "compiled" else ""
            raise BackendError(
                f"{self._name}: PyTorch stopped at images {list(images_BCHW.shape)} in {self._mode} mode "
                f"({reason}){advice}"
            ) from error

    def _checked(self, logits_BN: Tensor, batch: int) -> NDArray[np.float32]:
        if not isinstance(logits_BN, Tensor) or logits_BN.ndim != 2 or len(logits_BN) != batch:
            got = list(logits_BN.shape) if isinstance(logits_BN, Tensor) else type(logits_BN).__name__
            raise ParityError(f"{self._name}: expected logits [{batch}, classes], got {got}")
        logits: NDArray[np.float32] = logits_BN.cpu().numpy()
        if not np.isfinite(logits).all():
            raise ParityError(
                f"{self._name}: an output is NaN or infinite for finite images; check the model's weights"
            )
        return logits
