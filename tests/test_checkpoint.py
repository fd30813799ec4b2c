import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from mcdeploy.checkpoint import (
    FILE_NAME,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    sha256_of_json,
    unpack_optimizer,
)
from mcdeploy.errors import CheckpointError, TrainingError


def test_a_checkpoint_brings_back_header_and_tensors(tmp_path):
    tensors = {"model.w": torch.arange(6.0).view(2, 3), "optimizer.0.momentum_buffer": torch.ones(2)}
    save_checkpoint(tmp_path / FILE_NAME, {"epochs_done": 3}, tensors)
    loaded = load_checkpoint(tmp_path)
    assert loaded.header == {"schema": 1, "epochs_done": 3}
    assert torch.equal(loaded.part("model")["w"], tensors["model.w"])
    assert list(loaded.part("optimizer")) == ["0.momentum_buffer"]
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / FILE_NAME
    save_checkpoint(path, {}, {"model.w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_checkpoint(path)


def test_missing_foreign_and_future_checkpoints_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        load_checkpoint(tmp_path)
    save_file({"w": torch.ones(1)}, tmp_path / FILE_NAME)
    with pytest.raises(CheckpointError, match="not a checkpoint of mcdeploy"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path / FILE_NAME, {"schema": 99}, {})
    with pytest.raises(CheckpointError, match="schema 99"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_checkpoint_whole_and_nothing_half_written(tmp_path, monkeypatch, step):
    path = tmp_path / FILE_NAME
    save_checkpoint(path, {"epochs_done": 1}, {"model.w": torch.ones(3)})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(TrainingError, match=r"No space left on device\); the previous checkpoint is whole"):
        save_checkpoint(path, {"epochs_done": 2}, {"model.w": torch.zeros(3)})
    monkeypatch.undo()
    assert load_checkpoint(path).header["epochs_done"] == 1
    assert os.listdir(tmp_path) == [FILE_NAME]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_an_optimizer_comes_back_with_its_state(kind):
    def stepped(steps, restored=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind(layer.parameters(), lr=0.1, **options)
        if restored is not None:
            layer.load_state_dict(restored[0])
            unpack_optimizer(optimizer, *restored[1])
        for _ in range(steps):
            optimizer.zero_grad()
            layer(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        return layer, optimizer

    straight, _ = stepped(4)
    half, optimizer = stepped(2)
    resumed, _ = stepped(2, (half.state_dict(), pack_optimizer(optimizer)))
    assert torch.equal(straight.weight, resumed.weight)


def test_the_hash_of_plain_data_does_not_depend_on_the_order_of_keys():
    assert (
        sha256_of_json({"a": 1, "b": [2]}) == sha256_of_json({"b": [2], "a": 1}) != sha256_of_json({"a": 2, "b": [2]})
    )
