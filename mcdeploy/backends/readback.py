"""What a model file really holds, and what really runs: read from the file, never from what was asked for.

Complaint number one about precision is a flag that is accepted and ignored: the file is called fp16, and every node in
it computes in float32. So nothing here looks at an option. ``read_facts`` reads the file, ``running_types`` what ONNX
Runtime makes of it, which is a third thing: on a CPU it runs most fp16 nodes in float32 between two casts.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
from mcruntime.engine import PROVIDERS
from mcruntime.manifest import Precision
from onnx import TensorProto

from mcdeploy.errors import BackendError, MissingExtraError

Types = Mapping[str, Mapping[str, int]]  # operator -> element type it computes in -> number of nodes

# Where the time of a vision net goes. The lines after the first are what ONNX Runtime makes of it.
HEAVY = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul"),
        *("FusedConv", "NhwcFusedConv", "FusedGemm", "FusedMatMul", "TransposeMatMul"),
        *("QLinearConv", "QLinearConvTranspose", "QGemm", "QLinearMatMul"),
        *("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"),
    }
)
NAMED = 3  # nodes in a message
_INT8 = frozenset({"QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"})  # beside QLinear*
# Names of ONNX element types in tables; the rest keep their own in lower case.
_SHORT = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64", "UINT8": "int8"}
_FLOATS = frozenset({"fp16", "fp32", "bf16", "fp64"})
_ALWAYS_INT64 = frozenset({"Shape", "Size", "ArgMax", "ArgMin", "NonZero"})
_ALWAYS_BOOL = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not", "IsNaN"})


@dataclass(frozen=True)
class FileFacts:
    """One ONNX file, as it lies on the disk."""

    opset: int
    ir_version: int
    producer: str
    batch: str | int  # name of the dynamic axis, or the number it was fixed to
    inputs: dict[str, str]  # name -> element type
    outputs: dict[str, str]
    nodes: dict[str, dict[str, int]]  # operator -> element type it computes in -> number of nodes
    external: tuple[str, ...]  # files beside it that hold weights
    size_bytes: int  # with those files

    @property
    def precision(self) -> str:
        """For tables, such as "fp16 (49 of 51 heavy nodes)"."""
        return precision_of(self.nodes)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "precision": self.precision}


def read_facts(path: Path | str) -> FileFacts:
    """Read a model file.

    A node that the Q/DQ convention marks for 8 bits counts as "int8": its inputs, weights included, all come out of
    ``DequantizeLinear``, and, where it is no Conv, Gemm or MatMul, its output goes into ``QuantizeLinear``. Signed and
    unsigned 8 bits are both "int8". Nodes inside ``If`` count like others.

    Raises:
        BackendError: no such file, or no ONNX model.
    """
    return _facts(Path(path), _load(Path(path)))


def _facts(path: Path, model: onnx.ModelProto) -> FileFacts:
    external = tuple(sorted({entry.value for entry in _external(model.graph) if entry.key == "location"}))
    dim = model.graph.input[0].type.tensor_type.shape.dim[0] if _first_shape(model.graph) else None
    return FileFacts(
        opset=_opset(model),
        ir_version=model.ir_version,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        batch="" if dim is None else dim.dim_param or int(dim.dim_value),
        inputs={value.name: _name(value.type.tensor_type.elem_type) for value in model.graph.input},
        outputs={value.name: _name(value.type.tensor_type.elem_type) for value in model.graph.output},
        nodes=_count(type_of_nodes(model)),
        external=external,
        size_bytes=path.stat().st_size + sum(_size(path.parent / name) for name in external),
    )


def check_written(
    path: Path | str, *, opset: int, precision: Precision, allowed: Collection[str] = frozenset()
) -> FileFacts:
    """Hold a file against what was asked for.

    Args:
        allowed: names of nodes that may compute in another type, because somebody wrote down why: ``float_nodes`` of
            the report of a conversion.

    Raises:
        BackendError: another opset, a fixed batch, an input or output that is not float32, a Conv, Gemm or MatMul that
            computes in another precision and is not allowed to, or none that computes in the one asked for.
    """
    path = Path(path)
    model = _load(path)
    facts = _facts(path, model)
    if facts.opset != opset:
        raise BackendError(f"{path}: asked for opset {opset}, the file has {facts.opset}; ask for {facts.opset}")
    if not isinstance(facts.batch, str) or not facts.batch:
        raise BackendError(f"{path}: the batch is fixed to {facts.batch}; export again with an example of 2 images")
    for name, kind in {**facts.inputs, **facts.outputs}.items():
        if kind != "fp32":
            raise BackendError(f"{path}: {name} is {kind}, images and logits must stay float32; convert it again")
    again = "export it again" if precision == "fp32" else "convert the fp32 file again"
    heavy = heavy_types(facts.nodes)
    if precision != "fp32" and not heavy.get(precision):
        raise BackendError(
            f"{path}: asked for {precision}, but no convolution or matrix product of the file computes in it "
            f"(found {_listed(heavy)}); {again}"
        )
    others = [
        f"{node.name or node.op_type} ({kind})"
        for node, kind in type_of_nodes(model)
        if node.op_type in HEAVY and kind != precision and node.name not in allowed
    ]
    if others:
        more = ", ..." if len(others) > NAMED else ""
        raise BackendError(
            f"{path}: asked for {precision}, the file is {facts.precision}: {', '.join(others[:NAMED])}{more} "
            f"with no reason on record; {again}"
        )
    return facts


def running_types(path: Path | str, provider: Literal["cpu", "cuda"] = "cpu") -> dict[str, dict[str, int]]:
    """What ONNX Runtime runs after its own optimisation, for this machine: operator -> element type -> count.

    Raises:
        BackendError: the provider is not there, or the model does not load.
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("reading what really runs", "onnxruntime", "cpu") from None
    if provider not in ("cpu", "cuda"):
        raise BackendError(f"{provider} keeps what it runs to itself; ask for cpu or cuda, or inspect the engine")
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        raise BackendError(f"{path}: this onnxruntime has no {provider}; install 'mcdeploy[gpu]' or ask for cpu")
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(Path(folder) / "running.onnx")
        # Large weights may not fit into one file; nobody reads them here.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "running.data")
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=[PROVIDERS[provider]], enable_fallback=0
            )
        except Exception as error:  # onnxruntime's errors share no base class but this
            raise BackendError(f"{path}: ONNX Runtime cannot load it on {provider}: {str(error)[:200]}") from error
        if session.get_providers()[0] != PROVIDERS[provider]:
            raise BackendError(f"{path}: asked for {provider}, ONNX Runtime loaded {session.get_providers()[0]}")
        return _count(type_of_nodes(_load(Path(folder) / "running.onnx"), qdq=False))


def heavy_types(types: Types) -> dict[str, int]:
    """Element types of convolutions and matrix products alone, most frequent first."""
    found: Counter[str] = Counter()
    for op, kinds in types.items():
        if op in HEAVY:
            found.update(kinds)
    return dict(found.most_common())


def precision_of(types: Types, running: Types | None = None) -> str:
    """A short phrase for tables.

    Args:
        types: of a file.
        running: of the same file in a runtime; where it runs in something else, the phrase says both.

    Returns:
        "fp16", "int8 (52 of 54 heavy nodes)", "fp32 (the file is fp16)", or "no heavy nodes".
    """
    in_file = _phrase(heavy_types(types))
    if running is None:
        return in_file
    runs = _phrase(heavy_types(running))
    return runs if runs.split()[0] == in_file.split()[0] else f"{runs} (the file is {in_file.split()[0]})"


def type_of_nodes(model: onnx.ModelProto, *, qdq: bool = True) -> list[tuple[onnx.NodeProto, str]]:
    """Every node with the element type it computes in, in the order of the file, nodes inside ``If`` too.

    Types are followed from the inputs and weights forwards, because the runtime's own operators have no public schema:
    an operator computes in the type of its first float input, and hands on the same.

    Args:
        qdq: count what the Q/DQ convention marks for 8 bits as "int8", as in ``read_facts``.
    """
    found: list[tuple[onnx.NodeProto, str]] = []
    _walk(model.graph, {}, found)
    if not qdq:
        return found
    marked = _marked_int8(model.graph)
    return [(node, "int8" if node.output[0] in marked else kind) for node, kind in found]


def _walk(graph: onnx.GraphProto, outer: Mapping[str, str], found: list[tuple[onnx.NodeProto, str]]) -> dict[str, str]:
    known = {**outer, "": "none"}
    known |= {value.name: _name(value.type.tensor_type.elem_type) for value in graph.input}
    known |= {tensor.name: _name(tensor.data_type) for tensor in graph.initializer}
    for node in graph.node:
        inner = [_walk(g, known, found) for g in _subgraphs(node)]
        given = [known.get(name, "none") for name in node.input if name]
        out = _output_type(node, given, known, inner)
        floats = [kind for kind in given if kind in _FLOATS]
        computes = floats[0] if floats and node.op_type not in ("Cast", "QuantizeLinear") else out
        if node.op_type.startswith("QLinear") or node.op_type in _INT8:
            computes = "int8"
        found.append((node, computes))
        known |= dict.fromkeys(node.output, out)
    return known


def _output_type(node: onnx.NodeProto, given: list[str], known: Mapping[str, str], inner: list[dict[str, str]]) -> str:
    attributes = {attribute.name: attribute for attribute in node.attribute}
    match node.op_type:
        case "Cast":
            return _name(attributes["to"].i)
        case "QuantizeLinear" | "DynamicQuantizeLinear":
            return known.get(node.input[2], "int8") if len(node.input) > 2 else "int8"
        case "DequantizeLinear" | "MatMulIntegerToFloat":
            return next((kind for kind in given if kind in _FLOATS), "fp32")
        case "ConvInteger" | "MatMulInteger":
            return "int32"
        case "QGemm":  # without a scale of the output it hands on float32
            return "int8" if len(node.input) > 7 else "fp32"
        case "Constant":
            return _name(attributes["value"].t.data_type) if "value" in attributes else _constant_type(attributes)
        case "ConstantOfShape":
            return _name(attributes["value"].t.data_type) if "value" in attributes else "fp32"
        case "If":
            branch = next(attribute.g for attribute in node.attribute if attribute.name == "then_branch")
            return inner[0].get(branch.output[0].name, "none")
        case "Where":
            return given[1] if len(given) > 1 else "none"
    if node.op_type.startswith("QLinear"):
        return "int8"
    if node.op_type in _ALWAYS_INT64:
        return "int64"
    if node.op_type in _ALWAYS_BOOL:
        return "bool"
    return given[0] if given else "none"


def _constant_type(attributes: Mapping[str, Any]) -> str:
    return next(
        (kind for key, kind in (("value_float", "fp32"), ("value_floats", "fp32")) if key in attributes), "int64"
    )


def _marked_int8(graph: onnx.GraphProto) -> set[str]:
    """First outputs of the nodes that the Q/DQ convention marks."""
    dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {tensor.name for tensor in graph.initializer}

    def is_quantised(name: str) -> bool:
        after = readers.get(name, [])
        if len(after) == 1 and after[0].op_type in ("Relu", "Clip"):
            return is_quantised(after[0].output[0])
        return bool(after) and all(reader.op_type == "QuantizeLinear" for reader in after)

    marked: set[str] = set()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast"):
            continue
        if node.op_type in HEAVY:
            if len(node.input) > 1 and set(node.input[:2]) <= dequantised:
                marked.add(node.output[0])
        elif (data := [name for name in node.input if name and name not in constants]) and (
            set(data) <= dequantised and is_quantised(node.output[0])
        ):
            marked.add(node.output[0])
    return marked


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _external(graph: onnx.GraphProto) -> Iterator[Any]:
    for tensor in graph.initializer:
        yield from tensor.external_data
    for node in graph.node:
        for inner in _subgraphs(node):
            yield from _external(inner)


def _first_shape(graph: onnx.GraphProto) -> bool:
    return bool(graph.input) and len(graph.input[0].type.tensor_type.shape.dim) > 0


def _load(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise BackendError(f"{path}: no such model file; give the path of an .onnx file")
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors share no base class but this
        raise BackendError(f"{path}: not an ONNX model ({str(error)[:100]}); export it again") from error


def _opset(model: onnx.ModelProto) -> int:
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _name(element_type: int) -> str:
    name = str(TensorProto.DataType.Name(element_type))
    return _SHORT.get(name, name.lower())


def _count(nodes: Iterable[tuple[onnx.NodeProto, str]]) -> dict[str, dict[str, int]]:
    found: dict[str, Counter[str]] = {}
    for node, kind in nodes:
        found.setdefault(node.op_type, Counter())[kind] += 1
    return {op: dict(sorted(found[op].items())) for op in sorted(found)}


def _size(path: Path) -> int:
    if not path.is_file():
        raise BackendError(f"{path}: the model names this file for its weights, and it is not there; copy both files")
    return path.stat().st_size


def _listed(heavy: Mapping[str, int]) -> str:
    return ", ".join(f"{count} in {kind}" for kind, count in heavy.items()) or "none at all"


def _phrase(heavy: Mapping[str, int]) -> str:
    if not heavy:
        return "no heavy nodes"
    total = sum(heavy.values())
    # The lower precision names the file, however few its nodes: the share beside it tells the rest.
    kind = next((kind for kind in ("int8", "fp16", "bf16") if heavy.get(kind)), next(iter(heavy)))
    return kind if heavy[kind] == total else f"{kind} ({heavy[kind]} of {total} heavy nodes)"
