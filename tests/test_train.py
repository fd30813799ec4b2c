import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import short_recipe, write_recipe

from mcdeploy import train as train_module
from mcdeploy.checkpoint import FILE_NAME, load_checkpoint
from mcdeploy.connectivity.ddw import dynamic_stages
from mcdeploy.connectivity.maskconnect import MaskEdges
from mcdeploy.errors import BackendError, CheckpointError, InputError, TrainingError
from mcdeploy.runs import open_run, train_run
from mcdeploy.train import _stop_if_not_finite

ROOT = Path(__file__).parents[1]


def rows(run, kind="step"):
    return [
        row for line in (run / "metrics.jsonl").read_text().splitlines() if (row := json.loads(line))["kind"] == kind
    ]


def losses(run):
    return [(row["epoch"], row["step"], row["loss"]) for row in rows(run)]


def test_the_same_seed_gives_the_same_losses_and_another_one_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        recipe = short_recipe(train={"epochs": 2, "joint_epochs": 1}).model_copy(update={"seed": seed})
        train_run(recipe, tmp_path / name, resume=False)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")
    assert len(losses(tmp_path / "a")) == 2 * 3


CLI = [sys.executable, "-m", "mcdeploy.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'export'}", "OMP_NUM_THREADS": "1"}


PHASES = {"epochs": 4, "joint_epochs": 2}
RESUMED = {
    "learned": {"train": PHASES},
    "ema and dropout": {"train": {**PHASES, "ema_decay": 0.9}, "data": {"mixup": 0.2}},
    "gateconnect": {
        "model": {"backbone": "multibranch20_8x4d_cifar", "options": {"channels": 8, "stem_channels": 8}},
        "connectivity": {"rule": "gateconnect", "fan_in": 1},
        "train": PHASES,
    },
    "ddw": {
        "connectivity": {"rule": "ddw", "warm_up": 1, "temperature_end": 0.5, "target_open": 0.6},
        "train": {"epochs": 4, "joint_epochs": 0, "ema_decay": 0.9},
    },
}


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED)
def test_a_run_killed_with_sigkill_and_resumed_repeats_the_losses_bit_for_bit(tmp_path, changes):
    recipe = short_recipe(**changes)
    train_run(recipe, tmp_path / "straight", resume=False)

    path = write_recipe(tmp_path / "short.yaml", recipe)
    killed = tmp_path / "killed"
    command = [*CLI, "train", str(path), "--out", str(killed)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not (killed / FILE_NAME).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        errors = process.stderr.read().decode()
    done = load_checkpoint(killed).header["epochs_done"]
    assert 1 <= done < 4, errors
    train_run(recipe, killed, resume=True)
    assert losses(killed) == losses(tmp_path / "straight")
    assert rows(killed, "epoch") == rows(tmp_path / "straight", "epoch")
    one, other = (load_checkpoint(run).tensors for run in (killed, tmp_path / "straight"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_an_averaged_copy_warms_up_with_the_model(tmp_path, monkeypatch):
    seen = []

    def remember(accelerator, model, loader):
        seen.append({(float(s.tau), float(s.temperature)) for s in dynamic_stages(model).values()})
        return evaluate(accelerator, model, loader)

    evaluate = train_module._evaluate
    monkeypatch.setattr(train_module, "_evaluate", remember)
    connectivity = {"rule": "ddw", "warm_up": 1, "temperature_end": 0.5}
    train = {"epochs": 2, "joint_epochs": 0, "ema_decay": 0.9}
    train_run(short_recipe(connectivity=connectivity, train=train), tmp_path, resume=False)
    assert seen == [{(0.0, 1.0)}, {(0.5, 0.5)}]


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    recipe = short_recipe()
    first, _ = train_run(recipe, tmp_path, resume=False)
    before = losses(tmp_path)
    again, _ = train_run(recipe, tmp_path, resume=True)
    assert losses(tmp_path) == before
    assert again.accuracy == first.accuracy


def test_the_joint_phase_moves_gates_and_freezing_ends_it(tmp_path):
    result, _ = train_run(short_recipe(), tmp_path, resume=False)
    epochs = rows(tmp_path, "epoch")
    assert [bool(row["gates"]) for row in epochs] == [True, False, False]
    gates = epochs[0]["gates"]["layer1"][3]
    assert sum(gates) == pytest.approx(1, abs=1e-5)
    assert len(set(gates)) > 1
    assert not any(isinstance(module, MaskEdges) for module in result.model.modules())
    assert all(len(sources) == 1 for sources in result.topology.edges().values())


def test_a_finished_run_opens_as_the_model_that_was_evaluated(tmp_path):
    result, loaders = train_run(short_recipe(train={"ema_decay": 0.5}), tmp_path, resume=False)
    _, model, header = open_run(tmp_path)
    images, _ = next(iter(loaders.val))
    with torch.no_grad():
        assert torch.equal(model(images), result.model(images))
    assert header["classes"] == [str(digit) for digit in range(10)]


def test_a_run_that_is_not_finished_is_not_exported(tmp_path):
    train_run(short_recipe(), tmp_path, resume=False)
    checkpoint = load_checkpoint(tmp_path)
    from mcdeploy.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / FILE_NAME, {**checkpoint.header, "epochs_done": 1}, checkpoint.tensors)
    with pytest.raises(InputError, match="stopped after epoch 1 of 3"):
        open_run(tmp_path)


def test_a_loss_that_is_not_finite_stops_with_epoch_step_lr_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    import mcdeploy.train

    def loss_of_a_run_that_breaks(config, soft_targets):
        return lambda logits, labels: logits.square().mean() * (float("nan") if (tmp_path / FILE_NAME).exists() else 1)

    monkeypatch.setattr(mcdeploy.train, "_loss", loss_of_a_run_that_breaks)
    with pytest.raises(TrainingError) as caught:
        train_run(short_recipe(train={"schedule": "constant", "lr": 0.01}), tmp_path, resume=False)
    message = str(caught.value)
    assert "the loss became nan in epoch 2, step 0 (lr 0.01)" in message
    assert f"the last good checkpoint is {tmp_path / FILE_NAME}" in message
    assert load_checkpoint(tmp_path).header["epochs_done"] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named_with_their_step(tmp_path, bad):
    with pytest.raises(TrainingError, match=r"epoch 1, step 12 .*there is no checkpoint yet"):
        _stop_if_not_finite([1.0, 2.0, bad], [0.1, 0.1, 0.1], 0, 10, tmp_path)


@pytest.mark.parametrize("where", ["moving the model", "evaluating"])
def test_a_full_gpu_is_one_sentence_that_names_the_batch_sizes(tmp_path, monkeypatch, where):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 has 79 GiB.\nMore words.")

    if where == "evaluating":
        monkeypatch.setattr(train_module, "_evaluate", full)
    else:
        monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(TrainingError, match=r"\(CUDA out of memory\); lower train\.batch_size \(32\)") as caught:
        train_run(short_recipe(train={"epochs": 2}), tmp_path, resume=False)
    assert "\n" not in str(caught.value)
    assert "79 GiB" not in str(caught.value)


def test_cuda_asked_for_and_absent_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="cuda was asked for"):
        train_run(short_recipe(train={"device": "cuda"}), tmp_path, resume=False)
    with pytest.raises(BackendError, match="fp16 needs a CUDA device"):
        train_run(short_recipe(train={"device": "auto", "precision": "fp16"}), tmp_path, resume=False)


def test_nothing_is_resumed_from_nowhere_or_from_another_recipe(tmp_path):
    train_run(short_recipe(), tmp_path / "run", resume=False)
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        train_run(short_recipe(), tmp_path / "other", resume=True)
    for section, keys in (
        ("model", {"backbone": "resnet20_cifar"}),
        ("train", {"lr": 0.5}),
        ("connectivity", {"rule": "maskconnect", "fan_in": 2}),
    ):
        key = next(reversed(keys))
        with pytest.raises(CheckpointError, match=rf"was trained with {section}\.{key}: .*the recipe says {keys[key]}"):
            train_run(short_recipe(**{section: keys}), tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="has 3 epochs already, the recipe asks for 2"):
        train_run(short_recipe(train={"epochs": 2}), tmp_path / "run", resume=True)


def test_training_works_with_every_option_of_the_loop(tmp_path):
    recipe = short_recipe(
        data={"mixup": 0.5, "hflip": 0.5, "random_erase": 0.2},
        train={
            "epochs": 4, "optimizer": "adamw", "lr": 1.0e-3, "clip_grad": 1.0, "ema_decay": 0.9, "precision": "bf16",
            "channels_last": True, "label_smoothing": 0.1, "schedule": "step", "warmup_epochs": 1.0, "eval_every": 2,
        },
        connectivity={"rule": "maskconnect", "fan_in": 2, "scope": "network", "gate_grad": "raw", "gate_lr": 0.1},
    )  # fmt: skip
    result, _ = train_run(recipe, tmp_path, resume=False)
    assert 0 <= result.accuracy.top1 <= 1
    assert [("top1" in row) for row in rows(tmp_path, "epoch")] == [False, True, False, True]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_distillation_follows_the_unpruned_starting_weights_and_not_the_labels(tmp_path):
    from safetensors.torch import save_file

    train_run(short_recipe(), tmp_path / "first", resume=False)
    _, model, _ = open_run(tmp_path / "first")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")

    def first_loss(name, **connectivity):
        recipe = short_recipe(
            model={"weights": str(tmp_path / "w.safetensors")},
            train={"epochs": 1, "joint_epochs": 0, "distill": 1.0, "lr": 1.0e-6},
            connectivity=connectivity,
        )
        train_run(recipe, tmp_path / name, resume=False)
        return rows(tmp_path / name)[0]["loss"]

    whole, pruned = (
        first_loss("whole", rule="chain"),
        first_loss("pruned", rule="drop", blocks=["layer2.1", "layer3.1"]),
    )
    assert 0 <= whole < pruned  # with distill: 1.0 labels play no part; what was dropped is what the teacher still has


def test_two_processes_draw_the_same_masks_and_repeat_the_single_process_losses(tmp_path):
    # LayerNorm, not BN: batch statistics are each process's own on the CPU
    recipe = short_recipe(
        data={"image_size": 32, "crop": "none"},
        model={"backbone": "test_convnext"},
        train={"epochs": 2, "joint_epochs": 1, "optimizer": "adamw", "lr": 1.0e-3},
    )
    path = write_recipe(tmp_path / "two.yaml", recipe)
    train_run(recipe, tmp_path / "one", resume=False)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
        "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
        str(Path(__file__).parent / "two_processes.py"), str(path), str(tmp_path / "two"),
    ]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    masks = [json.loads((tmp_path / "two" / f"masks{rank}.json").read_text()) for rank in (0, 1)]
    assert masks[0] == masks[1]
    assert len(masks[0]) == 1 + 3  # the first draw and one a joint step
    single, double = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [row[:2] for row in single] == [row[:2] for row in double]
    assert [row[2] for row in double] == pytest.approx([row[2] for row in single], rel=2e-4)
    one, two = (load_checkpoint(tmp_path / name).header["topology"] for name in ("one", "two"))
    assert one == two
