"""Train: one visible loop. A learned wiring passes through two phases: joint (weights and gates), then gates frozen.

Everything random in an epoch depends only on (seed, epoch), and the gates' draws only on (seed, step): a run that was
killed and resumed repeats the losses of one that was not, bit for bit on the same CPU. A GPU's fastest kernels add up
in an order of their own each time, so there two runs of one seed drift apart unless torch is told to be deterministic.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.tensorboard import SummaryWriter

from mcdeploy.checkpoint import (
    FILE_NAME,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
    write_atomically,
)
from mcdeploy.connectivity.gates import GateOptimizer, weights
from mcdeploy.connectivity.topology import Topology
from mcdeploy.connectivity.wiring import candidates_of, fix, gate_values, topology_of, wired_stages
from mcdeploy.data import Loaders, build_mixup, set_epoch
from mcdeploy.errors import BackendError, CheckpointError, RecipeError, TrainingError, WiringError
from mcdeploy.evaluate import Accuracy, evaluate
from mcdeploy.recipe import DataConfig, TrainConfig
from mcdeploy.section import GatedConfig

FLUSH_EVERY = 10  # steps between looks at the losses; each look waits for the device
MAY_CHANGE = {
    "data.root", "data.workers", "data.in_memory", "train.epochs", "train.device", "train.eval_every",
    "train.eval_batch_size",
}  # fmt: skip  # between a run and its resumption
DISTILL_TEMPERATURE = 4.0  # Hinton et al. 2015, https://arxiv.org/abs/1503.02531


@dataclass(frozen=True)
class TrainResult:
    """The trained model, on the CPU, its wiring, and how well it does. Every process has one; one of them is main."""

    model: nn.Module
    topology: Topology
    accuracy: Accuracy
    is_main: bool


def train(
    model: nn.Module,
    loaders: Loaders,
    config: TrainConfig,
    data: DataConfig,
    *,
    seed: int,
    out: Path,
    gate_config: GatedConfig | None = None,
    teacher: nn.Module | None = None,
    header: Mapping[str, Any] | None = None,
    resume: bool = False,
    say: Callable[[str], None] = print,
) -> TrainResult:
    """Train a wired model and leave a checkpoint, ``metrics.jsonl`` and TensorBoard files in ``out``.

    Args:
        model: wired; changed in place.
        gate_config: given when the wiring is learned.
        teacher: given when ``config.distill`` is not 0; its logits are followed, it does not learn.
        header: what a checkpoint must hold beside the training state: the recipe.
        resume: continue from the checkpoint in ``out``.
        say: takes one line of progress at a time; only the main process speaks.

    Raises:
        TrainingError: the loss became NaN or infinite; the GPU's memory is full; a checkpoint could not be written.
        BackendError: CUDA or a precision was asked for that this machine does not have.
        CheckpointError: nothing to resume from, or it belongs to another model.
    """
    accelerator = _accelerator(config)
    is_main = accelerator.is_main_process
    _check_shares(config, accelerator.num_processes)
    speak = say if is_main else (lambda _: None)
    with _out_of_memory(config):
        if teacher is not None:
            teacher = teacher.eval().to(accelerator.device)
        model.to(accelerator.device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        ema = ModelEmaV3(model, decay=config.ema_decay) if config.ema_decay else None
    train_loader, val_loader = accelerator.prepare(loaders.train, loaders.val)
    steps_per_epoch = len(train_loader)
    mixup = build_mixup(data, len(loaders.classes), config.label_smoothing)
    loss_of = _loss(config, soft_targets=mixup is not None)

    optimizer = _optimizer(model, config)
    scheduler = _scheduler(optimizer, config, steps_per_epoch)
    kept = {
        **(header or {}),
        "candidates": candidates_of(model).to_json(),
        "classes": loaders.classes,
        "preprocessing": loaders.preprocessing.model_dump(mode="json"),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "accelerate")},
    }
    gates = GateOptimizer(model, gate_config.gate_lr, gate_config.gate_grad, seed) if gate_config else None
    first_epoch = 0
    if resume:
        first_epoch, gates = _resume(out, model, ema, optimizer, gates, (header or {}).get("recipe"))
        if first_epoch > config.epochs:
            raise CheckpointError(f"{out}: has {first_epoch} epochs already, the recipe asks for {config.epochs}")
        speak(f"resuming after epoch {first_epoch} of {config.epochs}")
    scheduler.step_update(first_epoch * steps_per_epoch)  # its only state is the number of updates
    optimizer = accelerator.prepare(optimizer)
    forward, run = _prepare(accelerator, model, config)
    if gates:
        gates.resume(gates.num_steps)  # with several processes, preparing has written every parameter once

    accuracy: Accuracy | None = None
    with _out_of_memory(config), _progress(is_main) as progress, _open_log(out, first_epoch, is_main) as log:
        for epoch in range(first_epoch, config.epochs):
            if gates and epoch == config.joint_epochs:
                speak(f"after epoch {epoch}: freezing the top gates of every block")
                accelerator.unwrap_model(forward, keep_fp32_wrapper=False)
                topology = topology_of(model)
                gates = None
                for learned in (model, ema.module) if ema else (model,):
                    fix(learned, topology)
                    set_epoch(loaders.train, epoch)
                    _reestimate_bn(learned, train_loader, config.bn_batches)
                forward, run = _prepare(accelerator, model, config)

            _reseed(seed, epoch, accelerator.process_index)
            set_epoch(loaders.train, epoch)
            for learned in (model, ema.module) if ema else (model,):
                for stage in wired_stages(learned).values():
                    stage.start_epoch(epoch, config.epochs)
            stages = wired_stages(model)
            forward.train()
            pending: list[Tensor] = []
            rates: list[float] = []
            started = time.perf_counter()
            bar = progress.add_task(f"epoch {epoch + 1}/{config.epochs}", total=steps_per_epoch)
            epoch_loss, accuracy = 0.0, None
            for step, (images, labels) in enumerate(train_loader):
                update = epoch * steps_per_epoch + step
                if mixup:
                    images, labels = mixup(images, labels)
                if config.channels_last:
                    images = images.to(memory_format=torch.channels_last)
                logits = run(images)
                loss = loss_of(logits, labels)
                if teacher is not None:
                    loss = (1 - config.distill) * loss + config.distill * _distillation(logits, teacher, images)
                loss = sum((added for s in stages.values() if (added := s.penalty()) is not None), start=loss)
                accelerator.backward(loss)
                if config.clip_grad:
                    accelerator.clip_grad_norm_(weights(model), config.clip_grad)
                scale = accelerator.scaler.get_scale() if accelerator.scaler else 1.0
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                if gates and accelerator.optimizer_step_was_skipped:
                    gates.zero_grad()
                elif gates:
                    gates.step(grad_scale=scale)
                optimizer.zero_grad()
                scheduler.step_update(update + 1)
                for stage in stages.values():
                    stage.after_step()
                if ema:
                    ema.update(model, step=update)
                pending.append(loss.detach())
                progress.advance(bar)
                if len(pending) == FLUSH_EVERY or step == steps_per_epoch - 1:
                    losses = accelerator.reduce(torch.stack(pending), "mean").tolist()
                    first = step - len(losses) + 1
                    _stop_if_not_finite(losses, rates, epoch, first, out)
                    epoch_loss += sum(losses)
                    if log:
                        log.steps(epoch, epoch * steps_per_epoch + first, losses, rates)
                    pending, rates = [], []
            progress.remove_task(bar)

            evaluated = ema.module if ema else model
            last = epoch == config.epochs - 1
            if last or (epoch + 1) % config.eval_every == 0:
                accuracy = _evaluate(accelerator, evaluated, val_loader)
            if log:
                statistics = {name: found for name, stage in stages.items() if (found := stage.statistics())}
                log.epoch(epoch, epoch_loss / steps_per_epoch, accuracy, gate_values(model), statistics)
                _save(out, {**kept, "epochs_done": epoch + 1}, model, ema, optimizer.optimizer, gates, accuracy)
            seconds = time.perf_counter() - started
            shown = f", top-1 {accuracy.top1:.2%}" if accuracy else ""
            speak(
                f"epoch {epoch + 1}/{config.epochs}: loss {epoch_loss / steps_per_epoch:.4f}{shown} ({seconds:.0f} s)"
            )
            accelerator.wait_for_everyone()

    if accuracy is None:  # resumed a finished run
        accuracy = _evaluate(accelerator, ema.module if ema else model, val_loader)
    accelerator.unwrap_model(forward, keep_fp32_wrapper=False)
    trained = (ema.module if ema else model).cpu().eval()
    accelerator.end_training()
    return TrainResult(trained, topology_of(trained), accuracy, is_main)


@contextlib.contextmanager
def _out_of_memory(config: TrainConfig) -> Iterator[None]:
    """A GPU that is full is what the user asked for, and not our bug."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the GPU has no memory left for this training ({str(error).splitlines()[0].split('. ')[0]}); lower "
            f"train.batch_size ({config.batch_size}) or train.eval_batch_size ({config.eval_batch_size}), take "
            "train.precision: bf16, or end what else uses the GPU"
        ) from error


def _accelerator(config: TrainConfig) -> accelerate.Accelerator:
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise BackendError("train.device: cuda was asked for, but torch sees no CUDA device here; use auto or cpu")
    use_cpu = config.device == "cpu" or not cuda
    if config.precision == "fp16" and use_cpu:
        raise BackendError("train.precision: fp16 needs a CUDA device; on this machine use bf16 or fp32")
    for state in (AcceleratorState, GradientState, PartialState):  # one process may train several times
        state._reset_state()
    return accelerate.Accelerator(
        cpu=use_cpu,
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        # every process takes its slice of one global batch, so the batches do not depend on how many there are
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=[DistributedDataParallelKwargs()],
    )


def _check_shares(config: TrainConfig, num_processes: int) -> None:
    for key in ("batch_size", "eval_batch_size"):
        if getattr(config, key) % num_processes:
            raise RecipeError(
                f"train.{key}: {getattr(config, key)} cannot be shared equally by {num_processes} processes"
            )


def _prepare(
    accelerator: accelerate.Accelerator, model: nn.Module, config: TrainConfig
) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The model under accelerate, and what a training step calls: the same, compiled when the recipe says so."""
    has_dead_blocks = any(stage.skip for stage in wired_stages(model).values())
    accelerator.ddp_handler.find_unused_parameters = has_dead_blocks  # they get no gradient
    prepared = accelerator.prepare_model(model)
    return prepared, torch.compile(prepared) if config.compile else prepared


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    keep = {id(parameter) for parameter in weights(model)}
    names_exempt: Callable[[], Any] = getattr(model, "no_weight_decay", tuple)
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=names_exempt())
    groups = [{**group, "params": [p for p in group["params"] if id(p) in keep]} for group in groups]
    return create_optimizer_v2(groups, opt=config.optimizer, lr=config.lr, weight_decay=0.0, momentum=config.momentum)


def _scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> Any:
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if config.schedule == "constant" else config.schedule,
        num_epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        decay_milestones=list(config.decay_at),
        decay_rate=1.0 if config.schedule == "constant" else 0.1,
        min_lr=config.min_lr,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.lr * 1e-2,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def _loss(config: TrainConfig, soft_targets: bool) -> Callable[[Tensor, Tensor], Tensor]:
    if soft_targets:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.label_smoothing) if config.label_smoothing else nn.CrossEntropyLoss()


def _distillation(logits: Tensor, teacher: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = teacher(images).float() / DISTILL_TEMPERATURE
    got = F.log_softmax(logits.float() / DISTILL_TEMPERATURE, dim=1)
    return F.kl_div(got, F.log_softmax(wanted, dim=1), log_target=True, reduction="batchmean") * DISTILL_TEMPERATURE**2


def _reestimate_bn(model: nn.Module, loader: Any, num_batches: int) -> None:
    """The wiring has just changed from a different draw each step to one; BN statistics belong to the old mixture."""
    if num_batches:
        update_bn(itertools.islice(iter(loader), num_batches), model)


def _evaluate(accelerator: accelerate.Accelerator, model: nn.Module, loader: Any) -> Accuracy:
    """Every process takes its share of the validation images; each image counts once."""
    training = model.training
    model.eval()

    def infer(images: Tensor) -> Tensor:
        with accelerator.autocast():
            logits: Tensor = model(images)
        return logits

    accuracy = evaluate(infer, loader, accelerator.gather_for_metrics)
    model.train(training)
    return accuracy


def _save(
    out: Path,
    header: dict[str, Any],
    model: nn.Module,
    ema: ModelEmaV3 | None,
    optimizer: torch.optim.Optimizer,
    gates: GateOptimizer | None,
    accuracy: Accuracy | None,
) -> None:
    """The state after an epoch; ``_resume`` is its inverse."""
    tensors, values = pack_optimizer(optimizer)
    save_checkpoint(
        out / FILE_NAME,
        {
            **header,
            "frozen": gates is None,
            "topology": topology_of(model).to_json(),
            "gate_steps": gates.num_steps if gates else 0,
            "optimizer": values,
            "accuracy": asdict(accuracy) if accuracy else None,
            "uses_ema": ema is not None,
        },
        {
            **{f"model.{key}": tensor for key, tensor in model.state_dict().items()},
            **({f"ema.{key}": tensor for key, tensor in ema.module.state_dict().items()} if ema else {}),
            **{f"optimizer.{key}": tensor for key, tensor in tensors.items()},
        },
    )


def _resume(
    out: Path,
    model: nn.Module,
    ema: ModelEmaV3 | None,
    optimizer: torch.optim.Optimizer,
    gates: GateOptimizer | None,
    recipe: Mapping[str, Any] | None,
) -> tuple[int, GateOptimizer | None]:
    checkpoint = load_checkpoint(out)
    header = checkpoint.header
    if recipe is not None:
        _check_same_recipe(out, header.get("recipe", {}), recipe)
    try:
        if header["frozen"] and gates:
            for learned in (model, ema.module) if ema else (model,):
                fix(learned, Topology.from_json(header["topology"]))
            gates = None
        model.load_state_dict(checkpoint.part("model"))
        if ema:
            ema.module.load_state_dict(checkpoint.part("ema"))
        unpack_optimizer(optimizer, checkpoint.part("optimizer"), header["optimizer"])
    except (RuntimeError, ValueError, WiringError) as error:
        raise CheckpointError(f"{out}: the checkpoint belongs to another recipe ({error})") from None
    if gates:
        gates.resume(header["gate_steps"])
    return header["epochs_done"], gates


def _check_same_recipe(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Only what does not change the training may differ, and the number of epochs."""
    for section in sorted({*before, *now} - {"export", "name"}):
        old, new = before.get(section), now.get(section)
        keys = sorted({*old, *new}) if isinstance(old, Mapping) and isinstance(new, Mapping) else [""]
        for key in keys:
            was, wanted = (old.get(key), new.get(key)) if key else (old, new)  # type: ignore[union-attr]
            if was != wanted and f"{section}.{key}" not in MAY_CHANGE:
                raise CheckpointError(
                    f"{out}: was trained with {f'{section}.{key}'.rstrip('.')}: {was}, the recipe says {wanted}; "
                    "resume with the same recipe, or start anew with another --out"
                )


def _reseed(seed: int, epoch: int, process: int) -> None:
    """What is random outside the loaders, such as dropout and mixup, starts anew each epoch."""
    value = (seed * 1_000_003 + epoch * 1_009 + process) % 2**32
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002  timm's mixup draws from the global generator
    torch.manual_seed(value)


def _stop_if_not_finite(losses: list[float], rates: list[float], epoch: int, first_step: int, out: Path) -> None:
    for step, (loss, lr) in enumerate(zip(losses, rates, strict=True), start=first_step):
        if not math.isfinite(loss):
            good = out / FILE_NAME
            kept = f"the last good checkpoint is {good}" if good.exists() else "there is no checkpoint yet"
            raise TrainingError(
                f"the loss became {loss} in epoch {epoch + 1}, step {step} (lr {lr:.3g}); {kept}; "
                "lower train.lr, set train.clip_grad, or use aggregate: mean"
            )


def _progress(visible: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, transient=True)
    progress.disable = not (visible and progress.console.is_terminal)
    return progress


@contextlib.contextmanager
def _open_log(out: Path, from_epoch: int, is_main: bool) -> Iterator[_Log | None]:
    """Only the main process keeps one; it is closed whatever ends the training."""
    log = _Log(out, from_epoch) if is_main else None
    try:
        yield log
    finally:
        if log:
            log.close()


class _Log:
    """``metrics.jsonl`` and TensorBoard; rows of epochs that will be run again are dropped."""

    def __init__(self, out: Path, from_epoch: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "metrics.jsonl"
        old = self.path.read_text().splitlines() if self.path.exists() and from_epoch else []
        rows = [row for row in old if row.endswith("}") and json.loads(row)["epoch"] < from_epoch]
        write_atomically(self.path, "".join(f"{row}\n" for row in rows).encode())
        self.file = self.path.open("a")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tensorboard's own deprecations
            self.board = SummaryWriter(out / "tensorboard")

    def steps(self, epoch: int, first: int, losses: list[float], rates: list[float]) -> None:
        for step, (loss, lr) in enumerate(zip(losses, rates, strict=True), start=first):
            self.file.write(json.dumps({"kind": "step", "epoch": epoch, "step": step, "loss": loss, "lr": lr}) + "\n")
            self.board.add_scalar("train/loss", loss, step)
            self.board.add_scalar("train/lr", lr, step)

    def epoch(
        self,
        epoch: int,
        loss: float,
        accuracy: Accuracy | None,
        gates: dict[str, list[list[float]]],
        statistics: dict[str, dict[str, Any]],
    ) -> None:
        row = {"kind": "epoch", "epoch": epoch, "loss": loss, "gates": gates}
        if statistics:
            row["statistics"] = statistics
        for stage, numbers in statistics.items():
            for what, number in numbers.items():
                if isinstance(number, float | int):
                    self.board.add_scalar(f"{stage}/{what}", number, epoch)
        if accuracy:
            row |= {"top1": accuracy.top1, "val_loss": accuracy.loss}
            self.board.add_scalar("val/top1", accuracy.top1, epoch)
            self.board.add_scalar("val/loss", accuracy.loss, epoch)
        for stage, rows in gates.items():
            for block, values in enumerate(rows, start=1):
                self.board.add_scalars(f"gates/{stage}.{block}", {str(i): v for i, v in enumerate(values)}, epoch)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.board.flush()

    def close(self) -> None:
        self.file.close()
        self.board.close()
