"""Half precision as a strongly typed graph: one file for ONNX Runtime, TensorRT 10 and TensorRT 11.

float16 ends at 65504. Which nodes may come near it is found by running the calibration images through the float32
model and taking the largest |value| of every tensor, of every weight, and of every sum on its way: for a convolution,
matrix product, average or sum the same operator is run on |inputs| and |weights|, which bounds each partial sum in any
order of adding up. Those nodes stay float32. So does an operator that ONNX defines without float16. Not covered: sums
inside softmax and normalisation layers, which the runtimes that we know add up in float32.

The conversion is ONNX Runtime's own. Three things of it are put right here: it leaves the nodes unsorted and writes
some of them twice, which the ONNX checker refuses, and between two neighbours that stay float32 it casts to float16
and back, which overflows after all.

What came out is proven twice on the calibration images. ONNX Runtime's CPU provider runs float16 nodes in float32 and
drops the casts between them, so an overflow does not show there. Therefore the file is also run with every float16
value of it rounded to float16, one tensor after the other; that is what a GPU computes that adds up in float32.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
from mcruntime.cgroup import available_threads
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mcdeploy.backends import onnx as exporter
from mcdeploy.backends.onnx import data_file
from mcdeploy.backends.readback import FileFacts, check_written, read_facts, type_of_nodes
from mcdeploy.errors import BackendError, InputError, MissingExtraError, ParityError

# B = batch, C = channels, H/W = height/width, N = classes
Images = NDArray[np.float32]
Progress = Callable[[str, float], None]

LARGEST = 65504.0  # of float16
BATCH = 8  # images a run; only memory depends on it
# Operators that add up, with the inputs that are added up; the others are attributes or shapes.
SUMS = {"Conv": 3, "ConvTranspose": 3, "Gemm": 3, "MatMul": 2, "ReduceSum": 1, "ReduceSumSquare": 1, "ReduceL2": 1}
MEANS = frozenset({"GlobalAveragePool", "ReduceMean", "AveragePool"})
CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})


@dataclass(frozen=True)
class KeptNode:
    """A node that stays float32."""

    node: str
    operator: str
    why: str  # "output", "input", "weight", "sum", or "no float16 in ONNX"
    peak: float  # the largest |value| of that; 0 for the last

    def sentence(self) -> str:
        what = f"|{self.why}| reaches {self.peak:.3g}" if self.peak else self.why
        return f"{self.node} ({self.operator}): {what}"


@dataclass(frozen=True)
class Fp16Report:
    """What became of a conversion, read from the file and measured on the calibration images."""

    file: FileFacts
    kept: tuple[KeptNode, ...]  # worst first
    limit: float  # a tensor above this stays float32
    largest_converted: KeptNode | None  # the node closest to the limit that was converted
    calibration: str  # hash of the images
    num_images: int
    max_abs: float  # largest difference of a logit from float32, relative to the largest |logit|; every tensor rounded
    top1_agreement: float  # share of images with the same predicted class
    max_abs_onnxruntime: float  # the same in ONNX Runtime on this machine's CPU

    @property
    def float_nodes(self) -> frozenset[str]:
        """Names of the nodes that are float32 for a reason that is written down; for ``check_written``."""
        return frozenset(node.node for node in self.kept)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "file": self.file.to_json()}


def to_fp16(
    source: Path | str,
    target: Path | str,
    calibration: Images,
    *,
    headroom: float = 2.0,
    max_abs: float = 0.02,
    progress: Progress | None = None,
) -> Fp16Report:
    """Convert a float32 file; images and logits stay float32. The same source and images give the same bytes.

    Args:
        source: an ONNX classifier, all float32, without ``If``.
        target: replaced in one step once everything has been checked.
        calibration: prepared images [B, C, H, W], B >= 1, as the model will see them.
        headroom: a tensor stays float32 above 65504 / headroom. For partial sums the bound itself is compared with
            65504: it is hardly ever reached.
        max_abs: allowed difference of a logit, relative to the largest |logit|.
        progress: is told what is going on and which share of the whole, 0 to 1, is done.

    Raises:
        InputError: no calibration images, or ``headroom`` below 1.
        BackendError: the source has ``If`` nodes, is not float32, or the file that came out is not what it should be.
        ParityError: the float16 model is not finite or too far from the float32 one on the calibration images.
    """
    if headroom < 1:
        raise InputError(f"headroom: expected at least 1, got {headroom}")
    tell = progress or (lambda what, share: None)
    source, target = Path(source), Path(target)
    check_calibration(calibration)
    model = load_fp32(source, "fp16", because="the values inside them cannot be measured")
    opset = read_facts(source).opset
    tell("fp16: largest values", 0.0)
    peaks = measure_peaks(model, calibration, lambda share: tell("fp16: largest values", 0.4 * share))
    kept, closest = _choose(model, peaks, headroom)
    tell("fp16: converting", 0.4)
    half = _convert(model, [node.node for node in kept])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        part = save_model(half, Path(folder) / target.name)
        facts = _check(part, opset, frozenset(node.node for node in kept))
        tell("fp16: comparing", 0.5)
        before_BN = run_all(str(source), calibration)
        tell("fp16: comparing", 0.6)
        onnxruntime_BN = run_all(str(part), calibration)
        tell("fp16: comparing", 0.7)
        rounded_BN = run_all(rounded_twin(half), calibration, optimise=False)
        far, same = _distance(before_BN, rounded_BN)
        far_here, _ = _distance(before_BN, onnxruntime_BN)
        if not max(far, far_here) <= max_abs:  # also where it is NaN
            raise ParityError(
                f"{source}: in float16 the logits are {max(far, far_here):.1e} of the largest one away from float32 "
                f"(allowed {max_abs:.1e}) with {len(kept)} nodes kept in float32; raise the headroom above "
                f"{headroom:g}, or ship fp32"
            )
        put_in_place(part, target)
    tell("fp16: done", 1.0)
    return Fp16Report(
        facts, kept, LARGEST / headroom, closest, hash_images(calibration), len(calibration), far, same, far_here
    )


def hash_images(images: Images) -> str:
    """sha256 of a set of images: of its shape and its float32 bytes."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    digest.update(np.ascontiguousarray(images, dtype="<f4").tobytes())
    return digest.hexdigest()


def check_calibration(images: Images) -> None:
    """Refuse what no range can be taken from.

    Raises:
        InputError: not float32 images [B, C, H, W] with B >= 1, or not finite.
    """
    if images.dtype != np.float32 or images.ndim != 4 or len(images) == 0:
        raise InputError(f"calibration: expected float32 images [B, C, H, W], got {images.dtype} {list(images.shape)}")
    if not np.isfinite(images).all():
        raise InputError("calibration: the images hold NaN or infinite values; give prepared images")


def load_fp32(path: Path, what: str, *, because: str) -> onnx.ModelProto:
    """A float32 model with weights, every node named.

    Raises:
        BackendError: no such file, control flow, or nodes that are not float32.
    """
    facts = read_facts(path)
    flow = {op: sum(kinds.values()) for op, kinds in facts.nodes.items() if op in CONTROL_FLOW}
    if flow:
        op, count = next(iter(flow.items()))
        raise BackendError(
            f"{path}: {what} of a model with {count} {op} nodes is refused, because {because}; "
            'export its per-image wirings with dynamic="masked"'
        )
    check_written(path, opset=facts.opset, precision="fp32")
    model = onnx.load(path)
    taken = {node.name for node in model.graph.node}
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}#{index}"
            while node.name in taken:
                node.name += "_"
        seen.add(node.name)
    return model


def run_all(model: str | onnx.ModelProto, images: Images, *, optimise: bool = True) -> NDArray[np.float64]:
    """Logits [B, N] of all images in ONNX Runtime on the CPU, ``BATCH`` at a time."""
    session = open_session(model, optimise=optimise)
    name = session.get_inputs()[0].name
    parts = [session.run(None, {name: images[i : i + BATCH]})[0] for i in range(0, len(images), BATCH)]
    return np.concatenate(parts).astype(np.float64)


def open_session(model: str | onnx.ModelProto, *, optimise: bool = True) -> Any:
    """A quiet session on the CPU with the threads this process may use.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BackendError: the model does not load.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("looking inside an ONNX model", "onnxruntime", "cpu") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = available_threads()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        given: str | bytes
        if isinstance(model, str):
            given = model
        elif _is_large(model):  # a protobuf message ends at 2 GiB
            given = str(save_model(model, Path(folder) / "model.onnx"))
        else:
            given = model.SerializeToString()
        try:
            return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors share no base class but this
            name = model if isinstance(model, str) else "the converted model"
            raise BackendError(f"{name}: ONNX Runtime cannot load it: {str(error)[:200]}; please report it") from error


def save_model(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model, with its weights in ``data_file(path)`` where they are too many for one file."""
    if _is_large(model):
        data_file(path).unlink(missing_ok=True)  # onnx would append to it
        onnx.save(model, path, save_as_external_data=True, location=data_file(path).name, size_threshold=1024)
        # onnx has taken the weights out of the model; the caller goes on with it
        onnx.load_external_data_for_model(model, str(path.parent))
        if data_file(path).exists():  # onnx makes it readable for its owner alone
            data_file(path).chmod(path.stat().st_mode)
    else:
        path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def put_in_place(part: Path, target: Path) -> None:
    """Replace a model and the file of its weights: weights first, so that it never points at missing ones."""
    if data_file(part).exists():
        _point_at(part, data_file(target).name)
        os.replace(data_file(part), data_file(target))
        os.replace(part, target)
    else:
        os.replace(part, target)
        data_file(target).unlink(missing_ok=True)


def _point_at(path: Path, data: str) -> None:
    """Have a model file read its weights from another file beside it."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data
    path.write_bytes(model.SerializeToString(deterministic=True))


def infer_types(model: onnx.ModelProto, *, strict: bool = False) -> None:
    """Note the type and shape of every value down in the model, in place.

    onnx's own function makes one message of the whole model, and a message ends at 2 GiB. So it is shown the weights of
    a large model without their numbers, which it does not need.
    """
    aside: list[tuple[onnx.TensorProto, bytes]] = []
    if _is_large(model):
        aside = [(tensor, tensor.raw_data) for tensor in model.graph.initializer if len(tensor.raw_data) > 1024]
    try:
        for tensor, _ in aside:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=strict)
    finally:
        for tensor, numbers in aside:
            tensor.raw_data = numbers
            tensor.ClearField("data_location")
    for old, new in (
        (model.graph.value_info, inferred.graph.value_info),
        (model.graph.output, inferred.graph.output),
    ):
        del old[:]
        old.extend(new)


def _is_large(model: onnx.ModelProto) -> bool:
    """Whether its weights go into a file of their own."""
    return sum(map(_num_bytes, model.graph.initializer)) > exporter.MAX_INLINE_BYTES


def _num_bytes(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


@dataclass(frozen=True)
class Peaks:
    """Largest |value| that the calibration images produced in the float32 model."""

    tensors: Mapping[str, float]  # of every float tensor, weights too
    sums: Mapping[str, float]  # by node: bound of every partial sum


def measure_peaks(model: onnx.ModelProto, images: Images, told: Callable[[float], None] | None = None) -> Peaks:
    """Run the images and take the largest |value| of every tensor, and a bound of every partial sum.

    Only a few numbers of a tensor and batch leave the runtime, so memory does not grow with the model.

    Raises:
        ParityError: the float32 model itself is not finite.
    """
    watch = _Watch(model)
    session = open_session(watch.model, optimise=False)
    feed = session.get_inputs()[0].name
    tensors = {
        tensor.name: _largest(numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT
    }
    sums: dict[str, float] = {}
    for start in range(0, len(images), BATCH):
        values = session.run(list(watch.wanted), {feed: images[start : start + BATCH]})
        found = {watch.wanted[name]: float(value) for name, value in zip(watch.wanted, values, strict=True)}
        for (about, what), value in found.items():
            if what == "peak":
                tensors[about] = _worse(tensors.get(about, 0.0), value)
            elif what == "sum":
                sums[about] = _worse(sums.get(about, 0.0), value * watch.divided_by(about, found))
        if told:
            told(min(1.0, (start + BATCH) / len(images)))
    for name, peak in tensors.items():
        if not np.isfinite(peak):
            raise ParityError(f"{name}: the float32 model is not finite on the calibration images; train it again")
    return Peaks(tensors, sums)


class _Watch:
    """A copy of a model that hands out the largest |value| of every float tensor, and the bound of every sum."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.wanted: dict[str, tuple[str, str]] = {}  # output -> (tensor or node, "peak", "sum", "from" or "to")
        self._absolute: dict[str, str] = {}
        self._windows = {node.name: _window(node) for node in model.graph.node if node.op_type in MEANS}
        floats = _float_tensors(self.model)
        del self.model.graph.value_info[:]
        for name in sorted(floats):
            peak = self._add("ReduceMax", [self._abs(name)], f"{name}//peak", keepdims=0)
            self._hand_out(peak, TensorProto.FLOAT, (name, "peak"))
        for index, node in enumerate(model.graph.node):
            if (node.op_type in SUMS or node.op_type in MEANS) and node.output[0] in floats:
                self._bound_sum(node, index)

    def divided_by(self, node: str, found: Mapping[tuple[str, str], float]) -> float:
        """By how much a mean divides its sum; 1 for a sum."""
        if node not in self._windows:
            return 1.0
        return self._windows[node] or found[node, "from"] / found[node, "to"]

    def _bound_sum(self, node: onnx.NodeProto, index: int) -> None:
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.name, twin.output[0] = f"{node.name}//twin", f"{node.output[0]}//twin"
        for i in range(min(SUMS.get(node.op_type, 1), len(node.input))):
            if node.input[i]:
                twin.input[i] = self._abs(node.input[i])
        if node.op_type == "ReduceL2":  # the sum is that of the squares
            twin.op_type = "ReduceSumSquare"
        self.model.graph.node.append(twin)
        peak = self._add("ReduceMax", [twin.output[0]], f"//sum{index}", keepdims=0)
        self._hand_out(peak, TensorProto.FLOAT, (node.name, "sum"))
        if node.op_type in MEANS:
            for what, name in (("from", node.input[0]), ("to", node.output[0])):
                self._hand_out(self._add("Size", [name], f"//{what}{index}"), TensorProto.INT64, (node.name, what))

    def _abs(self, name: str) -> str:
        if name not in self._absolute:
            self._absolute[name] = self._add("Abs", [name], f"{name}//abs")
        return self._absolute[name]

    def _add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.model.graph.node.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def _hand_out(self, name: str, kind: int, about: tuple[str, str]) -> None:
        self.model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
        self.wanted[name] = about


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 values that are no weights; their types are noted down in the model."""
    infer_types(model)
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}


def _choose(model: onnx.ModelProto, peaks: Peaks, headroom: float) -> tuple[tuple[KeptNode, ...], KeptNode | None]:
    """Which nodes stay float32, worst first, and the closest of the others."""
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    lacking: list[KeptNode] = []
    loaded: list[tuple[float, KeptNode]] = []
    weights = {tensor.name for tensor in model.graph.initializer}
    for node, kind in type_of_nodes(model):
        if kind not in ("fp32", "none"):  # whole numbers stay what they are
            continue
        if not _has_float16(node, opset):
            lacking.append(KeptNode(node.name, node.op_type, "no float16 in ONNX", 0.0))
        elif found := _loads(node, peaks, weights, headroom):
            load, peak, why = max(found)
            loaded.append((load, KeptNode(node.name, node.op_type, why, peak)))
    loaded.sort(key=lambda entry: -entry[0])
    kept = [node for load, node in loaded if load > LARGEST]
    return (*kept, *lacking), next((node for load, node in loaded if load <= LARGEST), None)


def _loads(
    node: onnx.NodeProto, peaks: Peaks, weights: Collection[str], headroom: float
) -> list[tuple[float, float, str]]:
    """(what is compared with float16's end, the peak, of what) for everything that a node reads, adds up and writes."""
    found = [(peaks.tensors[n] * headroom, peaks.tensors[n], "output") for n in node.output if n in peaks.tensors]
    for name in node.input:
        if name in weights and name in peaks.tensors:  # the same for every image, so it needs no headroom
            found.append((peaks.tensors[name], peaks.tensors[name], "weight"))
        elif name in peaks.tensors:
            found.append((peaks.tensors[name] * headroom, peaks.tensors[name], "input"))
    if node.name in peaks.sums:
        found.append((peaks.sums[node.name], peaks.sums[node.name], "sum"))
    return found


def _has_float16(node: onnx.NodeProto, opset: int) -> bool:
    """Whether ONNX itself defines the operator for float16; an operator of another domain is left alone."""
    if node.domain not in ("", "ai.onnx"):
        return False
    schema = onnx.defs.get_schema(node.op_type, opset)
    allowed = {entry.type_param_str: set(entry.allowed_type_strs) for entry in schema.type_constraints}
    types = [allowed.get(value.type_str, {value.type_str}) for value in (*schema.inputs, *schema.outputs)]
    floats = [kinds for kinds in types if "tensor(float)" in kinds]
    return not floats or any("tensor(float16)" in kinds for kinds in floats)


def _convert(model: onnx.ModelProto, keep: list[str]) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    infer_types(copied)  # the library's own way to do it ends at 2 GiB
    # The library's own list of operators to keep is about kernels that a provider may lack; it casts by itself then.
    half = convert_float_to_float16(
        copied, keep_io_types=True, disable_shape_infer=True, op_block_list=[], node_block_list=keep
    )
    _drop_repeated(half.graph)
    graph_model = onnx_ir.from_proto(half)
    graph_model.graph.sort()
    _drop_detours(graph_model.graph)
    tidy = onnx_ir.to_proto(graph_model)
    del tidy.graph.value_info[:]  # some still name the type before the conversion
    infer_types(tidy, strict=True)
    return tidy


def _drop_repeated(graph: onnx.GraphProto) -> None:
    """Where two nodes that stay float32 read one value, the library writes its cast twice, under one name."""
    seen: set[str] = set()
    for node in list(graph.node):
        if node.op_type == "Cast" and node.output[0] in seen:
            graph.node.remove(node)
        seen.update(node.output)


def _drop_detours(graph: onnx_ir.Graph) -> None:
    """float32 -> float16 -> float32 between two nodes that stay float32 is no detour that a large value survives."""
    half, single = onnx_ir.DataType.FLOAT16, onnx_ir.DataType.FLOAT
    for up in list(graph):
        if not _is_cast(up, single) or up.inputs[0] is None:
            continue
        down = up.inputs[0].producer()
        if down is None or not _is_cast(down, half) or down.inputs[0] is None:
            continue
        start, end = down.inputs[0], up.outputs[0]
        if end in graph.outputs:
            producer = start.producer()
            if producer is None:  # an image that is itself the output keeps its cast
                continue
            name, start.shape, start.type = end.name, end.shape, end.type
            end.name = f"{name}//old"
            start.name = name
            graph.outputs[list(graph.outputs).index(end)] = start
        end.replace_all_uses_with(start)
        graph.remove(up, safe=True)
    for cast in reversed(list(graph)):
        value = cast.outputs[0]
        if cast.op_type == "Cast" and not value.uses() and value not in graph.outputs:
            graph.remove(cast, safe=True)


def _is_cast(node: onnx_ir.Node, kind: onnx_ir.DataType) -> bool:
    return node.op_type == "Cast" and node.attributes["to"].as_int() == kind


def rounded_twin(half: onnx.ModelProto) -> onnx.ModelProto:
    """The same model in float32, with every float16 value of it rounded to float16 after it was computed.

    Run it without graph optimisation. It shows what float16 does to the numbers, infinities included, where the
    provider at hand has no float16 kernels and computes in float32 in silence.
    """
    twin = onnx.ModelProto()
    twin.CopyFrom(half)
    del twin.graph.value_info[:]
    nodes = []
    for node, kind in type_of_nodes(twin, qdq=False):
        nodes.append(node)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                attribute.t.CopyFrom(_as_float32(attribute.t))
        if kind != "fp16" or node.op_type in ("Shape", "Size"):
            continue
        for i, name in enumerate(node.output):
            raw, rounded = f"{name}//raw", f"{name}//half"
            node.output[i] = raw
            nodes.append(helper.make_node("Cast", [raw], [rounded], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [rounded], [name], to=TensorProto.FLOAT))
    for node in nodes:
        if node.op_type == "Cast" and not node.output[0].endswith("//half"):
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                    attribute.i = TensorProto.FLOAT
    weights = [_as_float32(tensor) for tensor in twin.graph.initializer]
    del twin.graph.node[:]
    del twin.graph.initializer[:]
    twin.graph.node.extend(nodes)
    twin.graph.initializer.extend(weights)
    return twin


def _as_float32(tensor: onnx.TensorProto) -> onnx.TensorProto:
    if tensor.data_type != TensorProto.FLOAT16:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)


def _check(path: Path, opset: int, kept: Collection[str]) -> FileFacts:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker's errors share no base class
        raise BackendError(f"{path.name}: the converted model is not valid ONNX: {str(error)[:300]}") from error
    return check_written(path, opset=opset, precision="fp16", allowed=kept)


def _distance(before_BN: NDArray[np.float64], after_BN: NDArray[np.float64]) -> tuple[float, float]:
    """Largest difference relative to the largest |logit|, infinite where not finite, and top-1 agreement."""
    same = float((before_BN.argmax(1) == after_BN.argmax(1)).mean())
    if not np.isfinite(after_BN).all():
        return float("inf"), same
    return float(np.abs(before_BN - after_BN).max() / max(np.abs(before_BN).max(), 1e-12)), same


def _largest(array: NDArray[Any]) -> float:
    return float(np.abs(array).max()) if array.size else 0.0


def _worse(old: float, new: float) -> float:
    return new if np.isnan(new) else max(old, new)


def _window(node: onnx.NodeProto) -> float | None:
    """How many numbers an AveragePool averages; None where the sizes of its tensors tell."""
    sizes: Iterable[int] = next((a.ints for a in node.attribute if a.name == "kernel_shape"), ())
    return float(np.prod(list(sizes))) if sizes else None
