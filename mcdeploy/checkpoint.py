"""One file holds a training run's state: tensors as safetensors, everything else as JSON in the file's header.

Loading means: build the backbone from the header's recipe, apply its topology, fill in the tensors. Nothing in the
file can run code. A file is written beside its target, flushed to the disk, and then takes the target's place in one
step, so that a crash or a full disk leaves the previous one whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mcdeploy.errors import CheckpointError, TrainingError

SCHEMA = 1
FILE_NAME = "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """``header`` is plain JSON data; ``tensors`` are named ``model.*``, ``ema.*``, ``optimizer.*``."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under ``prefix.``, without it."""
        return {key.removeprefix(f"{prefix}."): t for key, t in self.tensors.items() if key.startswith(f"{prefix}.")}


def save_checkpoint(path: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write atomically.

    Raises:
        TrainingError: the disk refused; the previous file, if any, is whole.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(plain, metadata={"mcdeploy": json.dumps({"schema": SCHEMA, **header})})
    try:
        write_atomically(path, data)
    except OSError as error:
        kept = "; the previous checkpoint is whole" if path.exists() else ""
        raise TrainingError(f"{path}: could not write the checkpoint ({error.strerror}){kept}") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, given its file or the run folder it lies in.

    Raises:
        CheckpointError: no such file, truncated, not one of ours, or of another schema.
    """
    if path.is_dir():
        path = path / FILE_NAME
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no checkpoint there; 'mcdeploy train RECIPE --out DIR' makes one") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: the checkpoint is damaged or truncated ({error})") from None
    if "mcdeploy" not in metadata:
        raise CheckpointError(f"{path}: a .safetensors file, but not a checkpoint of mcdeploy")
    header = json.loads(metadata["mcdeploy"])
    if header.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: checkpoint schema {header.get('schema')}, this mcdeploy reads {SCHEMA}")
    return Checkpoint(header, tensors)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step, or leave it as it was.

    Raises:
        OSError: the disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors ``<parameter>.<slot>`` and plain values of the same names."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{slot}"] = value
            elif value is not None:
                values[f"{index}.{slot}"] = value
    return tensors, values


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Fill an optimizer that was built the same way."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **values}.items():
        index, _, slot = key.partition(".")
        state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(data: Any) -> str:
    """Hex digest of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
