"""8 bits, measured: static quantisation by ONNX Runtime's quantiser, and proof of what it was worth.

The calibration images give every tensor its range, once. Then

1. convolutions in groups, depthwise ones included, are timed both ways, each distinct one in its context, and
   quantised only where that is clearly not slower, see ``_time``;
2. everything else that may be is quantised, residual additions and pools too, so that the chain stays in 8 bits;
3. if top-1 falls by more than was allowed, every layer is quantised alone, and the layers that move the logits most go
   back to float32, as few as hold the floor;
4. the file is read back, and so is what ONNX Runtime runs of it.

The file has two forms, because no one form is good for both runtimes; see ``Form``. And there is one trap. Where a
convolution or Gemm with float32 weights stands between DQ and Q, ONNX Runtime quantises those weights by itself when it
loads the model, with one scale for all channels: what was left out on purpose comes back, worse. A DQ with one
scale a channel, all of them equal, before such a layer changes no number and keeps ONNX Runtime from that.

What was timed decides which layers are quantised, so it decides about the file. The times themselves are not in
``Int8Report.to_json()``: the same decisions give the same report, byte for byte, whatever else the machine did.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from mcdeploy.backends.fp16 import (
    BATCH,
    Progress,
    check_calibration,
    hash_images,
    infer_types,
    load_fp32,
    put_in_place,
    run_all,
    save_model,
)
from mcdeploy.backends.onnx import data_file
from mcdeploy.backends.readback import HEAVY, FileFacts, check_written, heavy_types, running_types, type_of_nodes
from mcdeploy.errors import AccuracyError, BackendError, InputError, MissingExtraError

# B = batch, C = channels, H/W = height/width, N = classes
Images = NDArray[np.float32]

# "cpu": unsigned activations with a zero point, so that a ReLU is the lower end of a range and disappears, and int32
# biases. "tensorrt": what TensorRT accepts, which is signed, zero point 0, float32 biases, and Q/DQ before every layer.
# EfficientNet-lite0 in ONNX Runtime, one thread: 0.48 of the float32 time in the first form, 2.8 times it in the other.
Form = Literal["cpu", "tensorrt"]
# Ratio of two files' latencies, second to first, with the ends of its 95 % interval; below 1: the second is faster.
Ratio = tuple[float, float, float]
Measure = Callable[[Path, Path, Images], Ratio]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add")  # each of these is counted, and may be left out
FOLLOWERS = ("MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Flatten", "Reshape", "Transpose", "Squeeze")
ACTIVATIONS = ("Relu", "Clip")  # part of the layer before them
# What ONNX Runtime writes Q and DQ behind when it loads a file and a DQ is before it.
PASS_ON = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")
SENSITIVITY_IMAGES = 32
TIMES = 3  # how often a convolution in groups is timed at most
CLEARLY = 0.9  # of the float32 time: as fast as this has int8 to look where no measurement is clear
UNREAD = "nothing reads it in 8 bits"


@dataclass(frozen=True)
class GroupChoice:
    """One distinct convolution in groups, timed in 8 bits against float32, both between 8-bit neighbours."""

    nodes: tuple[str, ...]  # all of this kind; the first was timed
    shape: str  # such as "C 96 -> 96, groups 96, 3x3, stride 2, input 112x112"
    ratio: Ratio | None  # of 8 bits to float32, the one that decided; None: nothing to measure with
    quantised: bool


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantising this layer alone does to the logits of the calibration images."""

    node: str
    operator: str
    snr_db: float  # signal to noise: the larger, the closer to float32
    top1_agreement: float  # share of images with the same predicted class


@dataclass(frozen=True)
class Int8Layer:
    """One convolution, matrix product or addition of the file."""

    node: str
    operator: str
    runs_in: str  # "int8" or "fp32", read from the file
    why: str  # why not int8; empty where it is


@dataclass(frozen=True)
class Int8Report:
    """What became of a quantisation, read from the file and measured."""

    file: FileFacts
    running: dict[str, dict[str, int]]  # what ONNX Runtime makes of it on this machine's CPU
    form: Form
    per_channel: bool
    layers: tuple[Int8Layer, ...]
    residual_adds: tuple[int, int]  # in 8 bits, of all
    groups: tuple[GroupChoice, ...]
    sensitivity: tuple[LayerSensitivity, ...]  # worst first; empty where nobody needed it
    excluded: tuple[str, ...]  # for the sake of accuracy
    attempts: tuple[tuple[int, float], ...]  # layers excluded, top-1 of that
    top1: float  # 0..1
    baseline_top1: float
    max_top1_drop: float
    calibration: str  # hash of the images
    num_images: int

    @property
    def float_nodes(self) -> frozenset[str]:
        """Names of the nodes that are float32 for a reason that is written down; for ``check_written``."""
        return frozenset(row.node for row in self.layers if row.runs_in != "int8" and row.why != UNREAD)

    def to_json(self, *, with_times: bool = False) -> dict[str, Any]:
        """For a file that is hashed, or with what was timed, which no second run repeats."""
        told = {**asdict(self), "file": self.file.to_json()}
        if not with_times:
            for choice in told["groups"]:
                del choice["ratio"]
        return told


def to_int8(
    source: Path | str,
    target: Path | str,
    calibration: Images,
    *,
    top1_of: Callable[[Path], float],
    baseline_top1: float,
    max_top1_drop: float,
    measure: Measure | None = None,
    form: Form = "cpu",
    per_channel: bool = True,
    sensitivity: bool = False,
    progress: Progress | None = None,
) -> Int8Report:
    """Quantise a float32 file. The same source, images and measurements give the same bytes.

    Args:
        source: an ONNX classifier, all float32, without ``If``.
        target: replaced in one step, once the floor holds and the file was read back.
        calibration: prepared images [B, C, H, W] from the training set; 64 to 256 are usual.
        top1_of: runs a labelled validation set through a file; a share, 0..1.
        baseline_top1: of the float32 model on the same set.
        max_top1_drop: how much of it may be lost, as a share: 0.01 is one point of a hundred.
        measure: times the second file against the first, in the runtime that the form is for; asked up to 3 times about
            each distinct convolution in groups, until the answer is clear. Without it they stay float32.
        form: what the file is for, see ``Form``.
        per_channel: one scale for every output channel of the weights, or one for all.
        sensitivity: measure every layer alone even where the first attempt holds the floor.
        progress: is told what is going on and which share of the whole, 0 to 1, is done.

    Raises:
        InputError: no calibration images, or shares outside 0..1.
        BackendError: the source has ``If`` nodes or is not float32; nothing in it can be quantised; or the file, or
            what ONNX Runtime makes of it, is not what was written.
        AccuracyError: the floor does not hold even with one layer in 8 bits. No file is left behind.
        MissingExtraError: onnxruntime is not installed.
    """
    for name, share in (("baseline_top1", baseline_top1), ("max_top1_drop", max_top1_drop)):
        if not 0 <= share <= 1:
            raise InputError(f"{name}: expected a share from 0 to 1, got {share:g}; one point is 0.01")
    check_calibration(calibration)
    source, target = Path(source), Path(target)
    tell = progress or (lambda what, share: None)
    model = load_fp32(source, "int8", because="the quantiser sees only the nodes outside them")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        tell("int8: ranges", 0.0)
        quantiser = _Quantiser(model, Path(folder), calibration, form, per_channel)
        layers = quantiser.layers()
        if not layers:
            raise BackendError(f"{source}: no convolution, matrix product or addition to quantise; ship fp32 or fp16")
        groups = _choose_groups(quantiser, measure, lambda share: tell("int8: groups", 0.1 + 0.3 * share))
        slow = {node for choice in groups if not choice.quantised for node in choice.nodes}
        may_be = [node for node in layers if node.name not in slow]
        if not any(node.op_type in HEAVY for node in may_be):
            raise BackendError(
                f"{source}: nothing is left to quantise: all {len(slow)} convolutions are in groups and "
                + ("slower in int8; ship fp32 or fp16" if measure else "were not timed; give a way to measure")
            )
        search = _Search(quantiser, slow, may_be, calibration, top1_of, baseline_top1 - max_top1_drop - 1e-9, tell)
        part, top1 = search.run(sensitivity)
        final = Path(folder) / target.name  # its name is in the file where the weights lie beside it
        put_in_place(quantiser.shipped(part), final)
        reasons = (
            quantiser.not_quantisable
            | {name: "left out to hold the accuracy floor" for name in search.excluded}
            | {node: _why_slow(choice) for choice in groups if not choice.quantised for node in choice.nodes}
        )
        file, running, types = _read_back(final, quantiser, source, form, reasons.keys())
        put_in_place(final, target)
    tell("int8: done", 1.0)
    rows = tuple(
        Int8Layer(
            node.name,
            node.op_type,
            types.get(node.name, "fp32"),
            "" if types.get(node.name) == "int8" else reasons.get(node.name, UNREAD),
        )
        for node in model.graph.node
        if node.op_type in LAYERS
    )
    adds = [row for row in rows if row.operator == "Add"]
    return Int8Report(
        file=file,
        running=running,
        form=form,
        per_channel=per_channel,
        layers=rows,
        residual_adds=(sum(row.runs_in == "int8" for row in adds), len(adds)),
        groups=groups,
        sensitivity=tuple(search.sensitivity),
        excluded=tuple(search.excluded),
        attempts=tuple(search.attempts),
        top1=top1,
        baseline_top1=baseline_top1,
        max_top1_drop=max_top1_drop,
        calibration=hash_images(calibration),
        num_images=len(calibration),
    )


class _Quantiser:
    """One model and its calibrated ranges, from which any selection of layers is quantised."""

    def __init__(
        self, model: onnx.ModelProto, folder: Path, calibration: Images, form: Form, per_channel: bool
    ) -> None:
        try:
            from onnxruntime.quantization import CalibrationMethod
            from onnxruntime.quantization.calibrate import create_calibrator
            from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
        except ImportError:
            raise MissingExtraError("converting to int8", "onnxruntime", "cpu") from None
        self.folder, self.form, self.per_channel = folder, form, per_channel
        self.opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        path = save_model(model, folder / "named.onnx")
        self.model = load_model_with_shape_infer(path)
        calibrator = create_calibrator(
            path,
            [*LAYERS, *FOLLOWERS, *ACTIVATIONS],
            augmented_model_path=str(folder / "watched.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
            use_external_data_format=data_file(path).exists(),
        )
        calibrator.collect_data(_Reader(model.graph.input[0].name, calibration))
        self.ranges = calibrator.compute_data()
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.constants = {tensor.name for tensor in self.model.graph.initializer}
        self.values = {value.name: value for value in (*self.model.graph.value_info, *self.model.graph.input)}
        found = {node.name: self._why_not(node) for node in self.model.graph.node if node.op_type in LAYERS}
        self.not_quantisable = {name: why for name, why in found.items() if why}

    def _why_not(self, node: onnx.NodeProto) -> str:
        """Why the quantiser does not take this layer; empty where it does."""
        if node.op_type == "Add":
            if self.constants & set(node.input):
                return "adds a constant"
            values = self.values | {value.name: value for value in self.model.graph.output}
            kinds = {values[name].type.tensor_type.elem_type for name in node.input if name in values}
            return "" if kinds == {onnx.TensorProto.FLOAT} else "adds integers"
        if node.input[1] not in self.constants:
            return "its weights are computed"
        if _attribute(node, "group", 1) > 1 and node.op_type == "ConvTranspose":
            return "a transposed convolution in groups"
        return ""

    def layers(self) -> list[onnx.NodeProto]:
        """Nodes that can be quantised, in the order of the file."""
        nodes = self.model.graph.node
        return [node for node in nodes if node.op_type in LAYERS and node.name not in self.not_quantisable]

    def write(self, name: str, *, leave_out: Collection[str] = (), only: Collection[str] | None = None) -> Path:
        """Quantise into a file of the working folder, for trials in ONNX Runtime.

        Args:
            leave_out: layers that stay float32.
            only: if given, no other layer, pool or reshape is quantised.
        """
        layers = {node.name for node in self.layers()}
        wanted = layers - set(leave_out) if only is None else set(only)
        out = {node.name for node in self.model.graph.node if node.op_type in LAYERS} - wanted
        if only is not None:
            out |= {node.name for node in self.model.graph.node if node.op_type in FOLLOWERS}
        model = self._quantise(self.model, out)
        path = self.folder / name
        if self.form == "tensorrt":  # which refuses such a DQ, so it is only for the runtime that does the trials
            save_model(_tidied(model), self.shipped(path))
        _keep_from_requantising(model, out)
        return save_model(_tidied(model), path)

    def shipped(self, path: Path) -> Path:
        """The file for its own runtime that belongs to one that ``write`` returned."""
        return path.with_suffix(".shipped.onnx") if self.form == "tensorrt" else path

    def _quantise(
        self, model: onnx.ModelProto, leave_out: Collection[str], *more: str, **extra: bool
    ) -> onnx.ModelProto:
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        on_cpu = self.form == "cpu"
        options: dict[str, Any] = {"MatMulConstBOnly": True, "WeightSymmetric": True, **extra}
        types = [*LAYERS, *FOLLOWERS, *more]
        if on_cpu:
            types += ACTIVATIONS
        else:
            options |= {"ActivationSymmetric": True, "QuantizeBias": False}
            options["OpTypesToExcludeOutputQuantization"] = [*LAYERS, *FOLLOWERS]
        given = onnx.ModelProto()
        given.CopyFrom(model)
        with _no_log():
            quantiser = QDQQuantizer(
                given,
                self.per_channel,
                False,
                QuantType.QInt8,
                QuantType.QUInt8 if on_cpu else QuantType.QInt8,
                copy.deepcopy(self.ranges),  # the quantiser adjusts them
                [],
                sorted(leave_out),
                types,
                options,
            )
            low = quantiser.quantize_model()
        if not on_cpu and self.opset >= 21:
            _quantise_behind(low)
        return low

    def in_context(self, node: onnx.NodeProto, name: str) -> tuple[Path, Path]:
        """The layer alone between 8-bit neighbours, once in float32 and once in 8 bits, as files that are classifiers.

        Both are images [B, C, H, W] -> Q -> DQ -> layer -> activation -> Q -> one pixel -> DQ -> logits [B, N].
        """
        end = node.output[0]
        nodes = [node]
        after = self.readers.get(end, [])
        if len(after) == 1 and after[0].op_type in ACTIVATIONS:
            nodes.append(after[0])
            end = after[0].output[0]
        used = {name for each in nodes for name in each.input} & self.constants
        images = self.values[node.input[0]]
        pixel = [("//zero", np.zeros(2, np.int64)), ("//one", np.ones(2, np.int64)), ("//axes", np.array([2, 3]))]
        nodes += [
            helper.make_node("Slice", [end, "//zero", "//one", "//axes"], ["//pixel"], "//slice"),
            helper.make_node("Flatten", ["//pixel"], ["//logits"], "//flatten", axis=1),
        ]
        graph = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info(node.input[0], 1, ["batch", *_sizes(images)[1:]])],
            [helper.make_tensor_value_info("//logits", 1, ["batch", None])],
            [tensor for tensor in self.model.graph.initializer if tensor.name in used]
            + [numpy_helper.from_array(array.astype(np.int64), name) for name, array in pixel],
        )
        opsets = [entry for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")]
        model = onnx.shape_inference.infer_shapes(
            helper.make_model(graph, opset_imports=opsets, ir_version=self.model.ir_version), strict_mode=True
        )
        model.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")  # else the quantiser infers once more
        low = self._quantise(model, (), "Slice", ForceQuantizeNoInputCheck=True)  # Q before the pixel is taken
        high = onnx.ModelProto()
        high.CopyFrom(low)
        weights = {tensor.name: tensor for tensor in self.model.graph.initializer}
        layer = next(each for each in high.graph.node if each.name == node.name)
        for i, name in enumerate(node.input[1:], start=1):
            layer.input[i] = f"{name}//float"  # the quantiser gave the bias's own name to its DQ
            high.graph.initializer.add().CopyFrom(weights[name])
            high.graph.initializer[-1].name = layer.input[i]
        _drop_unread(high)
        if self.form == "cpu":
            _keep_from_requantising(high, {node.name})
        return (
            save_model(_tidied(high), self.folder / f"{name}-fp32.onnx"),
            save_model(_tidied(low), self.folder / f"{name}-int8.onnx"),
        )

    def noise_for(self, node: onnx.NodeProto) -> Images:
        """One image [1, C, H, W] for ``in_context``, over the calibrated range of the layer's input."""
        name = node.input[0]
        lowest, highest = (float(np.ravel(end)[0]) for end in self.ranges[name].range_value)
        shape = (1, *_sizes(self.values[name])[1:])
        return np.random.default_rng(0).uniform(lowest, highest, shape).astype(np.float32)


class _Reader:
    """Calibration images, a batch at a time, the way the library asks for them."""

    def __init__(self, name: str, images: Images) -> None:
        self._batches = ({name: images[i : i + BATCH]} for i in range(0, len(images), BATCH))

    def get_next(self) -> dict[str, Images] | None:
        return next(self._batches, None)


class _Search:
    """Which layers must stay float32 for the floor to hold: none, or the fewest of the most sensitive."""

    def __init__(
        self,
        quantiser: _Quantiser,
        slow: Collection[str],
        layers: list[onnx.NodeProto],
        calibration: Images,
        top1_of: Callable[[Path], float],
        floor: float,
        tell: Progress,
    ) -> None:
        self._quantiser, self._slow, self._layers, self._floor, self._tell = quantiser, slow, layers, floor, tell
        self._calibration, self._top1_of = calibration, top1_of
        self.sensitivity: list[LayerSensitivity] = []
        self.excluded: list[str] = []
        self.attempts: list[tuple[int, float]] = []

    def run(self, sensitivity: bool) -> tuple[Path, float]:
        """The file that holds the floor, and its top-1.

        Raises:
            AccuracyError: none does.
        """
        self._tell("int8: quantising", 0.4)
        part, top1 = self._attempt(0)
        if sensitivity or top1 < self._floor:
            self._measure_layers()
        if top1 >= self._floor:
            return part, top1
        return self._fewest()

    def _attempt(self, count: int) -> tuple[Path, float]:
        out = [row.node for row in self.sensitivity[:count]]
        quantiser = self._quantiser
        part = quantiser.write(f"attempt-{count}.onnx", leave_out={*self._slow, *out})
        allowed = {*self._slow, *out, *quantiser.not_quantisable}
        check_written(part, opset=quantiser.opset, precision="int8", allowed=allowed)
        top1 = self._top1_of(part)
        self.attempts.append((count, top1))
        return part, top1

    def _fewest(self) -> tuple[Path, float]:
        """Double the number of layers that are left out until the floor holds, then halve the step back."""
        # One convolution or matrix product has to be left, or nothing is int8.
        heavy = [i for i, row in enumerate(self.sensitivity) if row.operator in HEAVY]
        most = heavy[-1]
        bad, good = 0, 0
        best: tuple[Path, float] | None = None
        while best is None:
            if bad == most:
                raise AccuracyError(
                    f"int8 loses too much: top-1 {self.attempts[0][1]:.2%} with everything in int8, "
                    f"{self.attempts[-1][1]:.2%} with {bad} of {len(self.sensitivity)} layers left in float32, asked "
                    f"for at least {self._floor:.2%}; worst layer: {self.sensitivity[0].node}; "
                    "allow a larger drop, or ship fp16"
                )
            good = min(max(1, 2 * bad), most)
            self._tell(f"int8: {good} layers left out", 0.8)
            part, top1 = self._attempt(good)
            if top1 >= self._floor:
                best = part, top1
            else:
                bad = good
        while good - bad > 1:
            middle = (good + bad) // 2
            self._tell(f"int8: {middle} layers left out", 0.9)
            part, top1 = self._attempt(middle)
            if top1 >= self._floor:
                good, best = middle, (part, top1)
            else:
                bad = middle
        self.excluded = [row.node for row in self.sensitivity[:good]]
        return best

    def _measure_layers(self) -> None:
        images = self._calibration[:SENSITIVITY_IMAGES]
        before_BN = run_all(str(self._quantiser.folder / "named.onnx"), images)
        for done, node in enumerate(self._layers):
            self._tell(f"int8: sensitivity of {node.name}", 0.4 + 0.4 * done / len(self._layers))
            part = self._quantiser.write("alone.onnx", only={node.name})
            self.sensitivity.append(_sensitivity(node, before_BN, run_all(str(part), images)))
        self.sensitivity.sort(key=lambda row: row.snr_db)


def _sensitivity(
    node: onnx.NodeProto, before_BN: NDArray[np.float64], after_BN: NDArray[np.float64]
) -> LayerSensitivity:
    noise = float(((after_BN - before_BN) ** 2).sum())
    snr = 10 * np.log10(max(float((before_BN**2).sum()), 1e-30) / max(noise, 1e-30))
    same = float((before_BN.argmax(1) == after_BN.argmax(1)).mean())
    return LayerSensitivity(node.name, node.op_type, float(snr) if np.isfinite(snr) else -999.0, same)


def _choose_groups(
    quantiser: _Quantiser, measure: Measure | None, told: Callable[[float], None]
) -> tuple[GroupChoice, ...]:
    kinds: dict[str, list[onnx.NodeProto]] = {}
    for node in quantiser.layers():
        if _attribute(node, "group", 1) > 1:
            kinds.setdefault(_signature(node, quantiser.model), []).append(node)
    choices = []
    for done, (shape, nodes) in enumerate(kinds.items()):
        told(done / len(kinds))
        names = tuple(node.name for node in nodes)
        if measure is None:
            choices.append(GroupChoice(names, shape, None, False))
            continue
        high, low = quantiser.in_context(nodes[0], f"group-{done}")
        ratio, quantised = _time(measure, high, low, quantiser.noise_for(nodes[0]))
        choices.append(GroupChoice(names, shape, ratio, quantised))
    return tuple(choices)


def _time(measure: Measure, high: Path, low: Path, images: Images) -> tuple[Ratio, bool]:
    """Whether int8 is worth it: the same answer on a quiet machine and a noisy one, as far as that can be had.

    An interval that ends at 1 or below decides for int8, one that begins above 1 for float32. One with 1 inside decides
    nothing: it is measured again, at most ``TIMES`` times. If none is clear, int8 has to look ``CLEARLY`` faster in the
    median of them; else the layer stays float32, which costs no accuracy.
    """
    found: list[Ratio] = []
    for _ in range(TIMES):
        ratio = measure(high, low, images)
        if ratio[2] <= 1.0 or ratio[1] > 1.0:
            return ratio, ratio[2] <= 1.0
        found.append(ratio)
    middle = sorted(found)[TIMES // 2]
    return middle, middle[0] <= CLEARLY


def _signature(node: onnx.NodeProto, model: onnx.ModelProto) -> str:
    values = {value.name: value for value in (*model.graph.value_info, *model.graph.input)}
    _, channels, height, width = _sizes(values[node.input[0]])
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    strides, dilations = _attribute(node, "strides", [1, 1]), _attribute(node, "dilations", [1, 1])
    pads = _attribute(node, "pads", [0, 0, 0, 0])
    parts = [
        f"{node.op_type} {channels} -> {weight.dims[0]}, groups {_attribute(node, 'group', 1)}",
        f"{weight.dims[2]}x{weight.dims[3]}, stride {strides[0]}x{strides[1]}, padding {','.join(map(str, pads))}",
        f"input {height}x{width}",
    ]
    if set(dilations) != {1}:
        parts.insert(2, f"dilation {dilations[0]}x{dilations[1]}")
    return ", ".join(parts)


def _why_slow(choice: GroupChoice) -> str:
    if choice.ratio is None:
        return "in groups, and its int8 time was not measured"
    return "in groups, and not clearly faster in int8"


def _quantise_behind(model: onnx.ModelProto) -> None:
    """Write Q and DQ behind whatever hands a DQ on unchanged. Those numbers are in 8 bits already: none changes.

    ONNX Runtime does the same when it loads a file, with an ``output_dtype`` from opset 21 on. Then, on a CPU, it turns
    signed into unsigned 8 bits, leaves that attribute as it was, and refuses its own node (its issue 25526). With our
    pair in place it adds none.
    """
    graph = model.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    one_scale = {tensor.name for tensor in graph.initializer if np.prod(tensor.dims) == 1}
    waiting = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[1] in one_scale]
    while waiting:
        before = waiting.pop()
        for node in readers.get(before.output[0], []):
            value = node.output[0]
            if node.op_type not in PASS_ON or any(
                after.op_type == "QuantizeLinear" for after in readers.get(value, [])
            ):
                continue
            node.output[0], low, scale = f"{value}//passed_on", f"{value}//int8", before.input[1:]
            quantise = helper.make_node("QuantizeLinear", [node.output[0], *scale], [low], f"{node.name}//Q")
            graph.node.append(quantise)
            graph.node.append(helper.make_node("DequantizeLinear", [low, *scale], [value], f"{node.name}//DQ"))
            waiting.append(graph.node[-1])


def _keep_from_requantising(model: onnx.ModelProto, names: Collection[str]) -> None:
    """Give the DQ before every float32 layer one scale a channel, all equal; see the module's docstring."""
    graph = model.graph
    scales = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    changed: list[tuple[onnx.NodeProto, onnx.NodeProto]] = []
    for node in graph.node:
        if node.name not in names or node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        dequantise = producers.get(node.input[0])
        weight = scales.get(node.input[1])
        if dequantise is None or dequantise.op_type != "DequantizeLinear" or weight is None:
            continue
        channels = _input_channels(node, weight)
        scale = numpy_helper.to_array(scales[dequantise.input[1]])
        zero = numpy_helper.to_array(scales[dequantise.input[2]])
        prefix = f"{node.name}//each"
        graph.initializer.append(numpy_helper.from_array(np.full(channels, scale), f"{prefix}_scale"))
        graph.initializer.append(numpy_helper.from_array(np.full(channels, zero), f"{prefix}_zero"))
        own = helper.make_node(
            "DequantizeLinear",
            [dequantise.input[0], f"{prefix}_scale", f"{prefix}_zero"],
            [prefix],
            f"{prefix}/DequantizeLinear",
            axis=1,
        )
        node.input[0] = prefix
        changed.append((node, own))
    if not changed:
        return
    own_of = {node.name: own for node, own in changed}
    nodes = []
    for node in graph.node:
        if node.name in own_of:
            nodes.append(own_of[node.name])
        nodes.append(node)
    ordered = [copy.deepcopy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(ordered)
    _drop_unread(model)


def _input_channels(node: onnx.NodeProto, weight: onnx.TensorProto) -> int:
    if node.op_type == "Conv":
        return int(weight.dims[1]) * int(_attribute(node, "group", 1))
    if node.op_type == "ConvTranspose":
        return int(weight.dims[0])
    return int(weight.dims[1 if _attribute(node, "transB", 0) else 0])


def _drop_unread(model: onnx.ModelProto) -> None:
    """Remove nodes and weights that nobody reads."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    while True:
        read = {name for node in graph.node for name in node.input} | outputs
        dead = [node for node in graph.node if not read & set(node.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def _tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    """Nodes in order, the quantiser's mark gone, the types of values read anew."""
    import onnx_ir

    given = onnx_ir.from_proto(model)
    given.graph.sort()
    tidy = onnx_ir.to_proto(given)
    for entry in [entry for entry in tidy.metadata_props if entry.key == "onnx.infer"]:
        tidy.metadata_props.remove(entry)
    del tidy.graph.value_info[:]
    infer_types(tidy, strict=True)
    return tidy


def _read_back(
    path: Path, quantiser: _Quantiser, source: Path, form: Form, allowed: Collection[str]
) -> tuple[FileFacts, dict[str, dict[str, int]], dict[str, str]]:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker's errors share no base class
        raise BackendError(f"{source}: the quantised model is not valid ONNX: {str(error)[:300]}") from error
    facts = check_written(path, opset=quantiser.opset, precision="int8", allowed=allowed)
    types = {node.name: kind for node, kind in type_of_nodes(onnx.load(path, load_external_data=False))}
    running = running_types(path)
    in_file, runs = heavy_types(facts.nodes).get("int8", 0), heavy_types(running).get("int8", 0)
    if form == "cpu" and (runs > in_file or not runs):  # fewer is told by the report: it depends on the machine
        raise BackendError(
            f"{source}: {in_file} convolutions and matrix products of the file are int8, but ONNX Runtime runs {runs} "
            "in int8; use the onnxruntime this version was tested with, or ship fp32"
        )
    return facts, running, types


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    """The quantiser warns about constants and shapes by the root logger; what matters is read from the file."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = next((attribute for attribute in node.attribute if attribute.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def _sizes(value: onnx.ValueInfoProto) -> list[int]:
    """Its shape; 0 where it is dynamic."""
    return [int(dim.dim_value) for dim in value.type.tensor_type.shape.dim]
