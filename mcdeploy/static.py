"""Cut a net with per-image wirings into its N most frequent ones: N static ONNX models, and a router that picks one.

An ONNX ``If`` stops TensorRT from fusing across it, so some users want models without any. A wiring is the set of edges
that an image opens in the whole net. Wiring n of the N most frequent on calibration images becomes a static net whose
edge weights are the means over the images that have it; blocks it does not need are physically gone. The router sees
the image before anything else runs:

    scores [B, N] = W f(image) + b        largest score: which model to run

with f the averaged input of the first dynamic stage, or a 8x8 thumbnail where computing that would cost more than a
tenth of the net; W and b by logistic regression on the calibration images. An image with a rarer wiring belongs to the
nearest of the N, by the number of edges that differ.

The result is an approximation, so it is measured, on the whole validation set, and not promised.
"""

# B = images, C = channels, N = wirings, E = edges of all dynamic stages, F = features of the router

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mcruntime.engine import OnnxRunner
from mcruntime.preprocess import Preprocessing
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mcdeploy.backends.onnx import INPUT, OUTPUT, export_onnx
from mcdeploy.backends.pytorch import TorchRunner
from mcdeploy.checkpoint import sha256_of
from mcdeploy.compile.dynamic import Record, open_everything, record, settle
from mcdeploy.compile.prune import count_macs, count_parameters, drop_dead_blocks, unwrap_chains
from mcdeploy.connectivity.ddw import dynamic_stages
from mcdeploy.errors import BundleError, InputError
from mcdeploy.recipe import ExportConfig
from mcdeploy.verify import verify

THUMBNAIL = 8  # pixels
DEAREST_STEM = 0.1  # share of the net's MACs that the router may cost
SETTINGS, ROUTER = "static.json", "router.onnx"


@dataclass(frozen=True)
class Piece:
    """One static model. Shares are 0..1."""

    file: str
    sha256: str
    bytes: int
    share: float  # of the calibration images that have exactly this wiring
    sent: float  # of the validation images that the router sends here
    parameters: int
    macs: int


@dataclass(frozen=True)
class Approximation:
    """The validation set through router and static models, against the dynamic net. Shares are 0..1."""

    images: int
    accuracy_dynamic: float
    accuracy_static: float
    top1_agreement: float
    router_agreement: float  # images for which the router picks the nearest of the N wirings
    mean_macs: float  # of one image, router included


def cut_static(
    model: nn.Module,
    calibration: Tensor,
    val: DataLoader[tuple[Tensor, Tensor]],
    config: ExportConfig,
    *,
    count: int,
    out: Path,
    labels: list[str],
    preprocessing: Preprocessing,
    say: Callable[[str], None] = print,
) -> Approximation:
    """Write ``router.onnx``, ``wiring_0.onnx`` ..., ``static.json`` and ``README.md``; fewer models if there are fewer.

    Args:
        model: compiled, with at least one dynamic stage.
        calibration: images [B, C, H, W] that wirings are counted on and the router is fitted to.
        count: N.
        out: the folder; replaced as a whole once everything is written.

    Raises:
        InputError: nothing in the model depends on the image.
        BundleError: ``out`` exists and was not written by this function.
        ParityError: a static model and its ONNX file disagree.
        BackendError: an export failed.
    """
    if not dynamic_stages(model):
        raise InputError("static: after compile no edge depends on the image, so the bundle is static; leave it away")
    if out.exists() and not (out / SETTINGS).exists() and any(out.iterdir()):
        raise BundleError(f"{out}: exists and holds no {SETTINGS}, so it is not overwritten; move it away")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        found = record(model, calibration)
        wirings_NE, shares = most_frequent(found, count)
        nearest_B = nearest_wiring(found, wirings_NE)
        images = calibration[:7].numpy()
        pieces = []
        for n, wiring_E in enumerate(wirings_NE):
            say(f"static: wiring {n} of {len(wirings_NE)}, {shares[n]:.1%} of the calibration images")
            piece = static_net(model, found, wiring_E)
            export_onnx(piece, part / f"wiring_{n}.onnx", calibration[:2], opset=config.opset)
            with (
                TorchRunner(piece, name=f"wiring {n}") as expected,
                OnnxRunner(part / f"wiring_{n}.onnx", name=f"wiring_{n}.onnx") as actual,
            ):
                verify(expected, actual, images, hop=f"wiring {n}", max_abs=config.max_abs)
            pieces.append(piece)
        say("static: router")
        router = fit_router(model, calibration, nearest_B, len(wirings_NE))
        export_onnx(router, part / ROUTER, calibration[:2], opset=config.opset)
        with torch.no_grad():
            fitted = float((router(calibration).argmax(1) == nearest_B).double().mean())
        costs = [count_macs(piece, calibration[:1]) for piece in pieces]
        result, sent = _measure(model, part, wirings_NE, val, [cost + router.macs for cost in costs])
        rows = [
            Piece(
                file=f"wiring_{n}.onnx",
                sha256=sha256_of(part / f"wiring_{n}.onnx"),
                bytes=(part / f"wiring_{n}.onnx").stat().st_size,
                share=shares[n],
                sent=sent[n],
                parameters=count_parameters(piece),
                macs=costs[n],
            )
            for n, piece in enumerate(pieces)
        ]
        settings = {
            "kind": "mcdeploy static",
            "version": 1,
            "input": INPUT,
            "output": OUTPUT,
            "opset": config.opset,
            "labels": labels,
            "preprocessing": preprocessing.model_dump(mode="json"),
            "router": {
                "file": ROUTER,
                "sha256": sha256_of(part / ROUTER),
                "features": router.kind,
                "macs": router.macs,
                "calibration_agreement": fitted,
            },
            "wirings": [asdict(row) for row in rows],
            "calibration_images": len(calibration),
            "coverage": sum(shares),
            "validation": asdict(result),
        }
        (part / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (part / "README.md").write_text(_readme(settings), encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return result


def most_frequent(found: Record, count: int) -> tuple[Tensor, list[float]]:
    """The most frequent whole-net wirings, bool [N, E], and the share of the images that have each, 0..1."""
    open_BE = torch.cat(list(found.open_BE.values()), 1)
    wirings, counts = open_BE.unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:count]
    return wirings[order], (counts[order].double() / len(open_BE)).tolist()


def nearest_wiring(found: Record, wirings_NE: Tensor) -> Tensor:
    """For each image the wiring with the fewest edges that differ, the most frequent of several, int64 [B]."""
    open_BE = torch.cat(list(found.open_BE.values()), 1)
    return (open_BE[:, None] != wirings_NE[None]).sum(2).argmin(1)


def static_net(model: nn.Module, found: Record, wiring_E: Tensor) -> nn.Module:
    """The net of one wiring: its open edges at their mean weight over the images that have it, and nothing else."""
    has_it_B = (torch.cat(list(found.open_BE.values()), 1) == wiring_E).all(1)
    net = copy.deepcopy(model)
    stages = dynamic_stages(net)
    opened = dict(zip(stages, wiring_E.split([len(stage.edges) for stage in stages.values()]), strict=True))
    for name, stage in stages.items():
        mean_E = found.weights_BE[name][has_it_B].double().mean(0)
        constant = {
            edge: stage.constant.get(edge, float(weight))
            for edge, weight, is_open in zip(stage.edges, mean_E, opened[name], strict=True)
            if is_open
        }
        net.set_submodule(name, stage.smaller(tuple(range(1, len(stage.sources))), [], constant))
    drop_dead_blocks(net)
    settle(net)
    unwrap_chains(net)
    return net.eval()


class Router(nn.Module):
    """Images [B, C, H, W] to scores [B, N].

    Args:
        stem: images to a feature map [B, C, H, W] or the like; None: an 8x8 thumbnail.
        macs: multiply-accumulates of one image.
    """

    def __init__(self, stem: nn.Module | None, channel_axis: int, features: int, count: int, macs: int) -> None:
        super().__init__()
        self.stem = stem
        self.channel_axis = channel_axis
        self.linear = nn.Linear(features, count)
        self.macs = macs + features * count
        self.kind = "thumbnail" if stem is None else "stem"

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        if self.stem is None:
            return F.adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)
        feature = self.stem(images)
        return feature.mean([d for d in range(1, feature.dim()) if d != self.channel_axis % feature.dim()])


class Stem(nn.Module):
    """What one module of a model receives. That module and all that run after it only keep the shapes right.

    They are replaced by zeros, which nothing reads, so that neither they nor their parameters are exported. Leaving
    the host by an exception would be simpler, and torch.export does not survive it.
    """

    def __init__(self, model: nn.Module, name: str, example: Tensor) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.name = name
        for path, shape in _later_shapes(self.model, name, example).items():
            self.model.set_submodule(path, nn.Identity() if shape is None else _Zeros(shape))

    def forward(self, images: Tensor) -> Tensor:
        received: list[Tensor] = []
        handle = self.model.get_submodule(self.name).register_forward_pre_hook(lambda _, args: received.append(args[0]))
        try:
            self.model(images)
        finally:
            handle.remove()
        return received[0]


class _Zeros(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0], *self.shape)


def _later_shapes(model: nn.Module, name: str, example: Tensor) -> dict[str, tuple[int, ...] | None]:
    """The outermost modules that run from ``name`` on, with their output's shape for one image; None: never run."""
    found: dict[str, tuple[int, ...] | None] = {}
    entered: set[str] = set()
    inside: list[str] = []  # at most one: the outermost

    def before(path: str) -> Any:
        def hook(_: nn.Module, __: Any) -> None:
            entered.add(path)
            if not inside and (path == name or found):
                inside.append(path)

        return hook

    def after(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if inside == [path]:
                inside.clear()
                if isinstance(output, Tensor):
                    found[path] = tuple(output.shape[1:])

        return hook

    handles = [module.register_forward_pre_hook(before(path)) for path, module in model.named_modules() if path]
    handles += [module.register_forward_hook(after(path)) for path, module in model.named_modules() if path]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()
    for path, module in model.named_modules():
        is_replaced = any(path == other or path.startswith(f"{other}.") for other in found)
        if path and path not in entered and not is_replaced and not any(True for _ in module.children()):
            found[path] = None
    return found


def fit_router(model: nn.Module, images: Tensor, target_B: Tensor, count: int) -> Router:
    """Logistic regression from what is known before the first dynamic stage to the wiring."""
    from sklearn.linear_model import LogisticRegression

    name, stage = next(iter(dynamic_stages(model).items()))
    whole = count_macs(open_everything(model), images[:1])
    before = _macs_before(model, name, images[:1])
    stem = Stem(model, name, images[:2]) if before <= DEAREST_STEM * whole else None
    with torch.no_grad():
        probe = Router(stem, stage.channel_axis, 1, count, 0)
        features_BF = torch.cat([probe.features(batch) for batch in images.split(64)]).double()
    router = Router(stem, stage.channel_axis, features_BF.shape[1], count, before if stem is not None else 0)
    mean_F, scale_F = features_BF.mean(0), features_BF.std(0).clamp_min(1e-6)
    seen = target_B.unique()
    weight_NF, bias_N = torch.zeros(count, len(mean_F), dtype=torch.float64), torch.full((count,), -1e4).double()
    if len(seen) == 1:
        bias_N[seen] = 0
    else:
        fitted = LogisticRegression(max_iter=2000).fit(((features_BF - mean_F) / scale_F).numpy(), target_B.numpy())
        coefficients, intercept = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
        if len(seen) == 2:  # scikit-learn gives one row, for the second class
            coefficients, intercept = (
                torch.cat([-coefficients, coefficients]) / 2,
                torch.cat([-intercept, intercept]) / 2,
            )
        weight_NF[seen] = coefficients / scale_F
        bias_N[seen] = intercept - (coefficients / scale_F) @ mean_F
    with torch.no_grad():
        router.linear.weight.copy_(weight_NF)
        router.linear.bias.copy_(bias_N)
    return router.eval()


def _macs_before(model: nn.Module, name: str, image: Tensor) -> int:
    """Multiply-accumulates of one image up to a stage."""
    from torch.utils.flop_counter import FlopCounterMode

    spent: list[int] = []
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _, args: spent.append(counter.get_total_flops())
        )
        model(image)
        handle.remove()
    return spent[0] // 2


def _measure(
    model: nn.Module, folder: Path, wirings_NE: Tensor, val: DataLoader[tuple[Tensor, Tensor]], costs: list[int]
) -> tuple[Approximation, list[float]]:
    """The validation set through the ONNX files, against the dynamic net; and the share that each wiring gets."""
    total = right_before = right_after = same = routed = 0
    sent_N = np.zeros(len(wirings_NE), dtype=np.int64)
    with ExitStack() as stack:
        router = stack.enter_context(OnnxRunner(folder / ROUTER))
        runners = [stack.enter_context(OnnxRunner(folder / f"wiring_{n}.onnx")) for n in range(len(wirings_NE))]
        for images_BCHW, labels_B in val:
            found = record(model, images_BCHW.float())
            expected_B = found.logits_BK.argmax(1).numpy()
            images = images_BCHW.numpy().astype(np.float32)
            picked_B = router.infer(images).argmax(1)
            answer_B = np.empty(len(picked_B), dtype=np.int64)
            for n in np.unique(picked_B):
                answer_B[picked_B == n] = runners[n].infer(images[picked_B == n]).argmax(1)
            total += len(picked_B)
            right_before += int((expected_B == labels_B.numpy()).sum())
            right_after += int((answer_B == labels_B.numpy()).sum())
            same += int((answer_B == expected_B).sum())
            routed += int((picked_B == nearest_wiring(found, wirings_NE).numpy()).sum())
            sent_N += np.bincount(picked_B, minlength=len(sent_N))
    shares = sent_N / total
    return Approximation(
        images=total,
        accuracy_dynamic=right_before / total,
        accuracy_static=right_after / total,
        top1_agreement=same / total,
        router_agreement=routed / total,
        mean_macs=float(shares @ np.array(costs)),
    ), shares.tolist()


def _readme(settings: Mapping[str, Any]) -> str:
    found = settings["validation"]
    return f"""# {len(settings["wirings"])} static models and a router

`{SETTINGS}` says what each file is, with its sha256. On {found["images"]} validation images: top-1
{found["accuracy_static"]:.2%} against {found["accuracy_dynamic"]:.2%} of the dynamic net, the same class for
{found["top1_agreement"]:.2%}.

```python
import json
from pathlib import Path

import numpy as np
import onnxruntime
from mcruntime.preprocess import Preprocessing, open_image, prepare

folder = Path(".")
settings = json.loads((folder / "{SETTINGS}").read_text())
how = Preprocessing.model_validate_json(json.dumps(settings["preprocessing"]))
router = onnxruntime.InferenceSession(folder / "{ROUTER}")
models = [onnxruntime.InferenceSession(folder / row["file"]) for row in settings["wirings"]]

image = prepare(open_image(Path("photo.jpg").read_bytes()), how)[np.newaxis]
scores = router.run(None, {{"{INPUT}": image}})[0]
logits = models[int(scores.argmax())].run(None, {{"{INPUT}": image}})[0]
print(settings["labels"][int(logits.argmax())])
```
"""
