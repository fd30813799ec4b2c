"""Write a compiled model as one ONNX file and as one ExportedProgram, and read back what was really written.

Nodes are named after the PyTorch module they come from, such as ``layer1.0.conv1/Conv``, so that a report that names a
node names a layer. Values keep the names of the exported graph. What the exporter notes down of source files stays out.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mcdeploy.compile.conditional import export_form
from mcdeploy.errors import BackendError

INPUT, OUTPUT = "images", "logits"
# A protobuf message ends at 2 GiB. Above this much of weights they go into a file beside it, NAME.onnx.data.
MAX_INLINE_BYTES = 1 << 30
SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of a node: the modules it is in, outermost first, then its own name
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # what torch.export calls the place of shape arithmetic


def export_onnx(
    model: nn.Module,
    path: Path | str,
    example: Tensor,
    *,
    opset: int = 20,
    dynamic: Literal["if", "masked"] = "if",
    output: str = OUTPUT,
) -> None:
    """Export with ``torch.onnx.export(dynamo=True)``: dynamic batch, checked, the same bytes for the same model.

    Args:
        model: in evaluation mode, float32.
        path: the .onnx file; replaced in one step once everything has been checked. Weights of more than 1 GiB lie in
            ``PATH.data`` beside it.
        example: images [B, C, H, W], B >= 2.
        opset: 18 to 23; what comes out is read back and must be the same.
        dynamic: for per-image wirings: an ONNX ``If`` around every node that some image does not need, or every node
            computed for every image and multiplied by 0.
        output: what the file calls the model's output.

    Raises:
        BackendError: the exporter failed, the opset or the dynamic batch is not what was asked for, or the ONNX checker
            refuses the file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # torch's fused attention returns strides of its own, its decomposition does not: "Cannot view a tensor"
        with _quiet(), sdpa_kernel(SDPBackend.MATH), _FourAxes():
            program = torch.onnx.export(
                export_form(model, skip=dynamic == "if"),
                (example,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                input_names=[INPUT],
                output_names=[output],
                verbose=False,
            )
            assert program is not None  # it is only for dynamo=False
            _name_nodes(program.model)
            _save(program, target, opset)
    except BackendError:
        raise
    except Exception as error:  # the exporter's errors share no base class
        raise BackendError(f"ONNX export of {type(model).__name__} failed: {_reason(error)}") from error


def _save(program: torch.onnx.ONNXProgram, target: Path, opset: int) -> None:
    """Write, check, and only then put in place: weights first, so that the model never points at missing ones."""
    weights = program.model.graph.initializers.values()
    num_bytes = sum(value.const_value.nbytes for value in weights if value.const_value is not None)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        part = Path(folder) / target.name
        program.save(str(part), external_data=num_bytes > MAX_INLINE_BYTES)
        _check(part, opset)
        data = data_file(target)
        if data_file(part).exists():
            os.replace(data_file(part), data)
        else:
            data.unlink(missing_ok=True)
        os.replace(part, target)


def data_file(path: Path) -> Path:
    """Where the weights of a model lie that are too many for one file."""
    return path.with_name(f"{path.name}.data")


def _name_nodes(model: Any) -> None:
    """Name every node after its module, and drop what the exporter noted down of this machine's source files."""
    seen: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "['']"))
        module = next((scope for scope in reversed(scopes[:-1]) if scope not in ("", NO_MODULE)), "")
        for value in node.inputs:  # the exporter's fusions may leave a convolution in the place of the norm behind it
            if value is not None and value.is_initializer() and str(value.name).endswith(".weight"):
                module = str(value.name).removesuffix(".weight")
        name = f"{module}/{node.op_type}"
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}#{seen[name]}"
        for key in [key for key in node.metadata_props if key != SCOPES]:
            del node.metadata_props[key]


def export_program(model: nn.Module, path: Path | str, example: Tensor) -> None:
    """Save the model as a ``torch.export`` program with dynamic batch; ``torch.export.load`` needs torch alone.

    Every node of a per-image wiring is computed for every image, and multiplied by 0 where it is closed.

    Args:
        model: in evaluation mode.
        path: the .pt2 file; replaced in one step.
        example: images [B, C, H, W], B >= 2.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        with _quiet():
            program = torch.export.export(
                export_form(model, skip=False),
                (example,),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                strict=False,
            )
            torch.export.save(program, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_opset(path: Path) -> int:
    """The version of the standard operator set that a file asks for."""
    model = onnx.load(path, load_external_data=False)
    return int(next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")))


class _FourAxes(TorchFunctionMode):
    """The exporter translates attention on [B, heads, N, D] alone: windows join the batch, a missing axis is added."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].ndim != 4:
            return self._attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        def with_four(tensor: Tensor) -> Tensor:
            return tensor.unsqueeze(-3) if tensor.ndim == 3 else tensor.flatten(0, -4)

        if attn_mask is not None:
            attn_mask = with_four(attn_mask.expand(*query.shape[:-1], key.shape[-2]))
        query_BHND, key_BHMD, value_BHMD = map(with_four, (query, key, value))
        joined_BHND = F.scaled_dot_product_attention(query_BHND, key_BHMD, value_BHMD, attn_mask, *args, **kwargs)
        return joined_BHND.reshape(*query.shape[:-1], value.shape[-1])


def _reason(error: BaseException) -> str:
    """The first line of what started it; the exporter's own errors are long and say what step it was."""
    while error.__cause__ is not None:
        error = error.__cause__
    first, _, rest = str(error).strip().partition("\n")
    if first.rstrip().endswith(":"):  # the ONNX checker goes on in the next line
        first = f"{first.rstrip()} {rest.partition(chr(10))[0]}"
    return first or repr(error)


def _check(path: Path, opset: int) -> None:
    onnx.checker.check_model(str(path), full_check=True)
    written = read_opset(path)
    if written != opset:
        raise BackendError(f"asked for opset {opset}, the exporter wrote {written}; ask for {written}")
    batch = onnx.load(path, load_external_data=False).graph.input[0].type.tensor_type.shape.dim[0]
    if not batch.dim_param:
        raise BackendError(f"the exporter fixed the batch to {batch.dim_value}; the model depends on its batch size")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints progress and warns about its own internals; errors are raised, so nothing is lost."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
