"""The zoo: one small model of every timm module file through the whole pipeline.

    python -m tests.zoo                            all families, about 90; continues where it stopped
    python -m tests.zoo --only convnext swin       these again

For each: find the stages, wire as a chain (bit-identical to timm's own), wire with MaskConnect, one training step of
weights and gates, freeze, compile with certificate, export to ONNX with dynamic batch, onnxruntime against torch at
batches of 1 and 3. Weights are random and scrambled: nothing constant is left that could hide a mistake. A row is

    ok                    all of it held
    refused because ...   mcdeploy said no in one sentence, or timm's own model cannot be exported either
    broken: ...           anything else
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import multiprocessing
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
from mcruntime.engine import OnnxRunner
from timm.models import list_modules
from torch import Tensor, nn

import mcdeploy
from mcdeploy.backends.onnx import export_onnx
from mcdeploy.compile import compile_with_certificate
from mcdeploy.compile.certify import scramble
from mcdeploy.compile.prune import freeze
from mcdeploy.connectivity.gates import Gates
from mcdeploy.connectivity.wiring import wired_stages
from mcdeploy.errors import BackendError, InputError, WiringError
from tests.tiny_models import images, train_a_step

CLASSES = 10
SIZES = (64, 96, 128, 160, 224)
RTOL = 1e-3  # of the largest difference between two images' answers, float32 onnxruntime against float32 torch
DEPENDS = 1e-4  # the least that this difference must be, of the largest output
DEPTH = 4  # blocks, where the constructor takes a depth: a transformer of 12 equal blocks shows no more
TRIED = 16  # models of a family that are looked at for one with something to wire
PROCESSES = multiprocessing.get_context("forkserver")  # imports torch and timm once
HEAD = ("family", "model", "pixels", "stages", "blocks", "parameters", "compiled", "result")
PAGE = f"""# The zoo: one small model of every timm module file through the whole pipeline

Command: `python -m tests.zoo`

{{date}}, {{versions}}, CPU, one thread.

**{{summary}}** of {{families}} families.

Each: random scrambled weights, stages found, chain bit-identical to timm's own with the same keys, one step of
MaskConnect (fan-in 1, gates that start at random), frozen, compiled with certificate, exported to ONNX with dynamic
batch, onnxruntime at batches of 1 and 3 within {RTOL:g} of torch, measured by how far the answers to two images are
apart. *model* is the smallest of its file that has something to wire (timm's `test_*` first; with {DEPTH} blocks
where it takes a depth), *pixels* the smallest image it takes, *blocks* those in wired stages, *compiled* the
parameters left without the dead blocks; which ones die is chance here, nothing was trained.

Files without a model of their own: {{others}}, and those that start with `_`.

"""


@dataclass
class Row:
    """What became of one family."""

    family: str
    model: str = "-"
    image_size: int = 0
    stages: int = 0  # wired
    blocks: int = 0  # in wired stages
    parameters: tuple[int, int] = (0, 0)  # of the frozen model, of the compiled one
    passed_over: list[str] = field(default_factory=list)  # smaller models with nothing to wire
    result: Literal["ok", "refused", "broken"] = "broken"
    reason: str = ""
    seconds: float = 0.0  # of processor time

    def cells(self) -> tuple[str, ...]:
        before, after = (f"{n / 1e6:.2f} M" if n else "-" for n in self.parameters)
        said = {"ok": "ok", "refused": f"refused because {self.reason}", "broken": f"broken: {self.reason}"}
        counts = (str(n) if n else "-" for n in (self.image_size, self.stages, self.blocks))
        return (self.family, self.model, *counts, before, after, said[self.result].replace("|", "/"))


def families() -> list[str]:
    """The module files under timm/models that register a model. The rest builds, loads or re-exports."""
    files = {path.stem for path in Path(timm.models.__file__).parent.glob("*.py")}
    return sorted(files.intersection(list_modules()))


def by_size(family: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Model names with options, timm's own ``test_*`` first, then by parameters, counted without memory."""
    names = timm.list_models(module=family)
    for tests in (True, False):
        counts = sorted((count_on_meta(name), name) for name in names if name.startswith("test_") == tests)
        for count, name in counts:
            yield name, {"depth": DEPTH} if 0 < count_on_meta(name, depth=DEPTH) < count else {}


def count_on_meta(name: str, **options: Any) -> int:
    """Parameters of a model that is never allocated; 0 where it does not take the options."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=CLASSES, **options)
    except (TypeError, ValueError, AssertionError):
        return 0
    return sum(parameter.numel() for parameter in model.parameters())


def build(name: str, **options: Any) -> tuple[nn.Module, int]:
    """The model, scrambled, in evaluation mode, with the smallest image size it takes.

    Raises:
        RuntimeError: it runs at none of the sizes, its own included.
    """
    own = timm.get_pretrained_cfg_value(name, "input_size")[-1]
    error: Exception | None = None
    for size in [size for size in SIZES if size < own] + [own]:
        sized = options | ({"img_size": size} if timm.get_pretrained_cfg_value(name, "fixed_input_size") else {})
        torch.manual_seed(0)
        try:
            model = timm.create_model(name, num_classes=CLASSES, **sized)
            with torch.no_grad():
                model.eval()(images(2, size))
            scramble_all(model, images(8, size))
            return model, size
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError, ZeroDivisionError) as failed:
            error = failed
    raise RuntimeError(f"timm's {name} does not run on images of {own} pixels: {error}")


def scramble_all(model: nn.Module, batch: Tensor) -> None:
    """``scramble``, and noise on every parameter whose numbers are all equal: LayerNorm, LayerScale, zero biases.

    Batch norms get the statistics of ``batch``, and noise: with others the signal dies on its way through the model,
    and what no longer depends on the image proves nothing.
    """
    scramble(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel() and parameter.min() == parameter.max():
                parameter.add_(torch.rand(parameter.shape, generator=generator).mul_(0.4).sub_(0.2))
    estimate_statistics(model, batch)
    with torch.no_grad():
        for norm in batch_norms(model):
            norm.running_mean.add_(
                torch.rand(norm.running_mean.shape, generator=generator).sub_(0.5).mul_(0.4) * norm.running_var.sqrt()
            )
            norm.running_var.mul_(torch.rand(norm.running_var.shape, generator=generator).add_(0.5))


def batch_norms(model: nn.Module) -> list[Any]:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]


def estimate_statistics(model: nn.Module, batch: Tensor) -> None:
    """Every batch norm gets the statistics of one batch."""
    norms = batch_norms(model)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(batch)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def wire_first(family: str) -> tuple[Row, nn.Module, nn.Module]:
    """The smallest model of a family that has something to wire: its row, the plain model and the wired one.

    Raises:
        WiringError: none of the smallest ``TRIED`` has; the sentence is about the smallest.
    """
    row, first = Row(family), None
    for name, options in islice(by_size(family), TRIED):
        plain, size = build(name, **options)
        if first is None:
            row.model, row.image_size = describe(name, options), size
        wired = copy.deepcopy(plain)
        try:
            mcdeploy.wire(wired, "maskconnect", image_size=size, fan_in=1)
        except WiringError as error:
            first = first or Refused(row, error)
            row.passed_over.append(name)
            continue
        row.model, row.image_size = describe(name, options), size
        return row, plain, wired
    assert first is not None
    raise first


class Refused(Exception):
    """A refusal of mcdeploy with the row so far."""

    def __init__(self, row: Row, error: InputError | BackendError | str) -> None:
        super().__init__(str(error))
        self.row = row


def describe(name: str, options: dict[str, Any]) -> str:
    return ", ".join([name, *(f"{key}={value}" for key, value in options.items())])


def check(family: str) -> Row:
    """One family through everything. An error that is no refusal is raised as it comes."""
    try:
        row, plain, wired = wire_first(family)
        check_chain(plain, row.image_size)
        stages = wired_stages(wired).values()
        row.stages, row.blocks = len(stages), sum(len(stage.block_names) for stage in stages)
        small = train_and_compile(row, wired)
        check_onnx(row, plain, small)
        row.result = "ok"
    except Refused as refused:
        row = refused.row
        row.result, row.reason = "refused", str(refused)
    return row


def check_chain(plain: nn.Module, size: int) -> None:
    """Wired as a chain the model must be bit-identical, with the same keys in the same order."""
    batch, chain = images(2, size), copy.deepcopy(plain)
    mcdeploy.wire(chain, "chain", image_size=size)
    assert list(chain.state_dict()) == list(plain.state_dict()), "wired as a chain the state dict has other keys"
    with torch.no_grad():
        assert torch.equal(chain(batch), plain(batch)), "wired as a chain the output differs"


def train_and_compile(row: Row, wired: nn.Module) -> nn.Module:
    """One step of weights and gates, freeze, the statistics of the new wiring, then compile with certificate.

    The gates start uneven, so that blocks are skipped and die.
    """
    batch, generator = images(4, row.image_size), torch.Generator().manual_seed(2)
    for gates in wired.modules():
        if isinstance(gates, Gates):
            with torch.no_grad():
                gates.gates_GN.copy_(torch.rand(gates.gates_GN.shape, generator=generator) * gates.valid_GN)
    train_a_step(wired, batch)
    freeze(wired)
    estimate_statistics(wired, batch)
    small, certificate = compile_with_certificate(wired, batch)
    assert not any(isinstance(module, Gates) for module in small.modules()), "a gate survived compile"
    row.parameters = certificate.parameters
    return small


def check_onnx(row: Row, plain: nn.Module, small: nn.Module) -> None:
    """Export with dynamic batch, then onnxruntime against torch.

    Raises:
        Refused: timm's own model cannot be exported either.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            export_onnx(small, path, images(2, row.image_size))
        except BackendError as error:
            try:
                export_onnx(plain, path, images(2, row.image_size))
            except BackendError as own:
                raise Refused(row, f"timm's own model does not export: {own}") from own
            raise error
        with OnnxRunner(path) as runner:
            compare(small, runner, images(3, row.image_size, seed=3))


def compare(model: nn.Module, runner: Any, batch: Tensor) -> None:
    """Torch and onnxruntime on all images together and on the first alone.

    A difference counts in terms of what tells images apart: the largest difference between two images' answers.
    """
    with torch.no_grad():
        expected = model(batch).numpy()
    assert np.isfinite(expected).all(), "the output is not finite"
    spread = np.abs(expected - expected[:1]).max()
    assert spread > DEPENDS * np.abs(expected).max(), "every image gets the same answer, so parity proves nothing"
    for count in (1, len(batch)):
        actual = runner.infer(batch[:count].numpy())
        assert actual.shape == expected[:count].shape, f"onnxruntime answers {actual.shape} at batch {count}"
        off = float(np.abs(actual - expected[:count]).max() / spread)
        assert off <= RTOL, f"onnxruntime is off by {off:.1e} at batch {count}"


# The command: every family in a process of its own.


def worker(family: str, path: Path, seconds: int, memory_gib: int) -> None:
    """Check one family and leave its row as JSON."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (memory_gib << 30, memory_gib << 30))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        row = check(family)
    except Exception as error:  # whatever it is, it is the row's result
        lines = str(error).strip().splitlines() or ["without a word"]
        row = Row(family, reason=f"{type(error).__name__}: {lines[0]}")
        path.with_suffix(".txt").write_text(traceback.format_exc())
    row.seconds = round(time.process_time(), 1)
    path.write_text(json.dumps(asdict(row)))


def run_family(family: str, work: Path, seconds: int, memory_gib: int) -> Row:
    """A process for one family; ``seconds`` of processor time, five times that by the clock."""
    path = work / f"{family}.json"
    path.unlink(missing_ok=True)
    path.with_suffix(".txt").unlink(missing_ok=True)
    process = PROCESSES.Process(target=worker, args=(family, path, seconds, memory_gib))
    process.start()
    process.join(5 * seconds)
    if process.is_alive():
        process.kill()
        process.join()
    if not path.exists():
        ended = f"its process ended with {process.exitcode} (limits: {seconds} s, {memory_gib} GiB)"
        path.write_text(json.dumps(asdict(Row(family, reason=ended))))
    return read_row(path)


def read_row(path: Path) -> Row:
    data = json.loads(path.read_text())
    return Row(**(data | {"parameters": tuple(data["parameters"])}))


def table(rows: list[Row]) -> str:
    """The page ``recipes/results/zoo.md``."""
    import onnxruntime

    count = {result: sum(row.result == result for row in rows) for result in ("ok", "refused", "broken")}
    files = {path.stem for path in Path(timm.models.__file__).parent.glob("*.py")}
    others = sorted(name for name in files.difference(list_modules()) if not name.startswith("_"))
    head = PAGE.format(
        date=datetime.date.today(),
        versions=f"torch {torch.__version__}, timm {timm.__version__}, onnxruntime {onnxruntime.__version__}",
        summary=f"{count['ok']} ok, {count['refused']} refused, {count['broken']} broken",
        families=len(rows),
        others=", ".join(others),
    )
    lines = [f"| {' | '.join(cells)} |\n" for cells in (HEAD, *(row.cells() for row in rows))]
    return "".join([head, lines[0], f"|{'---|' * len(HEAD)}\n", *lines[1:]])


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 when a family is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these again; the table keeps the others")
    parser.add_argument("--out", type=Path, default=Path("recipes/results/zoo.md"))
    parser.add_argument("--json", type=Path, help="all rows as JSON")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/zoo"), help="one JSON a family; delete it to start anew"
    )
    parser.add_argument("--seconds", type=int, default=300, help="processor time a family may take")
    parser.add_argument("--memory", type=int, default=14, help="GiB a family may take")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    known = families()
    if unknown := sorted(set(options.only or ()).difference(known)):
        parser.error(f"timm has no module file {unknown[0]!r} with models")
    todo = options.only or [name for name in known if not (options.work / f"{name}.json").exists()]

    def run(family: str) -> Row:
        return run_family(family, options.work, options.seconds, options.memory)

    def finished() -> list[Row]:
        return [read_row(path) for name in known if (path := options.work / f"{name}.json").exists()]

    with ThreadPoolExecutor(options.jobs) as pool:
        for number, row in enumerate(pool.map(run, todo), start=1):
            print(f"{number}/{len(todo)} {' | '.join(row.cells())} | {row.seconds:.0f} s", flush=True)
            options.out.write_text(table(finished()))
    options.out.write_text(table(finished()))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in finished()], indent=1) + "\n")
    return 1 if any(row.result == "broken" for row in finished()) else 0


if __name__ == "__main__":
    sys.exit(main())
