"""TensorRT and the CUDA runtime as they would be called on a GPU, for machines without one: they check and record.

``FakeTensorRT`` is made from ``tensorrt_names.json``, the public names of a real version: a name that is not there
raises AttributeError, a call with the wrong number of arguments TypeError. ``FakeCuda`` is held against the installed
cuda-python in the same way. Behind both, a tiny engine (mean of each channel, times a matrix) really computes, from
the addresses that it was given and not before the stream is waited for.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import re
import sys
import weakref
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda.bindings
import numpy as np
import onnx
from cuda.bindings import runtime as real_cuda
from onnx import numpy_helper

NAMES = json.loads(Path(__file__).with_name("tensorrt_names.json").read_text())


def signature_of(text: str) -> inspect.Signature | None:
    """The parameters in "(network, flags=) -> X"; None where the binding takes any."""
    inner = text[1 : text.index(")")] if "tuple" not in text else text[1:].split(")")[0]
    if inner == "*":
        return None
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(name.rstrip("="), kind, default=None if name.endswith("=") else inspect.Parameter.empty)
            for name in filter(None, inner.split(", "))
        ]
    )


class Value:
    """A member of an enumeration; prints as such."""

    def __init__(self, owner: str, name: str, number: int) -> None:
        self.name, self._text, self._number = name, f"{owner}.{name}", number

    def __int__(self) -> int:
        return self._number

    def __repr__(self) -> str:
        return self._text


class Handle:
    """A CUDA handle, as cuda-python gives them: an object that is also a number."""

    def __init__(self, label: str, number: int) -> None:
        self.label, self._number = label, number

    def __int__(self) -> int:
        return self._number

    def __repr__(self) -> str:
        return self.label


class Machine:
    """What TensorRT and CUDA share: the record of calls, the memory, and the stream's queue."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.labels: dict[int, str] = {}
        self.memory: dict[int, Any] = {}
        self.alive: dict[int, str] = {}  # handles and memory that were not given back
        self.queue: list[Any] = []  # what was asked of the stream and not yet done
        self.captured: list[Any] | None = None  # inside a capture
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self.contexts_at_free: list[int] = []  # how many there were whenever GPU memory was freed
        self._numbers = count(0x7000_0001)
        self._of_kind: dict[str, Any] = {}

    def record(self, what: str, *arguments: Any, **keywords: Any) -> None:
        shown = [self.show(value) for value in arguments]
        shown += [f"{name}={self.show(value)}" for name, value in keywords.items()]
        self.calls.append(f"{what}({', '.join(shown)})")

    def show(self, value: Any) -> str:
        if isinstance(value, int) and value in self.labels:
            return self.labels[value]
        if isinstance(value, bytes):
            return "<no bytes>" if not value else "<bytes>"
        if isinstance(value, str) and "/" in value:
            return repr(Path(value).name)
        if type(value).__repr__ is object.__repr__:
            return re.sub(r"^_", "", type(value).__name__)
        return repr(value) if not isinstance(value, real_cuda.cudaMemcpyKind) else value.name

    def handle(self, kind: str) -> Handle:
        number = next(self._numbers)
        label = f"{kind}{next(self._of_kind.setdefault(kind, count()))}"
        self.labels[number] = self.alive[number] = label
        return Handle(label, number)

    def allocate(self, kind: str, num_bytes: int) -> int:
        buffer = (ctypes.c_byte * num_bytes)(*[0x55] * num_bytes)
        address = ctypes.addressof(buffer)
        self.memory[address] = buffer
        self.labels[address] = self.alive[address] = f"{kind}{next(self._of_kind.setdefault(kind, count()))}"
        return address

    def give_back(self, kind: str, handle: Any) -> None:
        assert self.alive.get(int(handle), "").startswith(kind), f"{kind}: {handle!r} is not there to give back"
        del self.alive[int(handle)]

    def submit(self, work: Any) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def finish(self) -> None:
        assert self.captured is None, "waiting inside a capture"
        for work in self.queue:
            work()
        self.queue.clear()


class FakeCuda:
    """The CUDA runtime with one GPU; every name and number of arguments is held against the real module."""

    def __init__(self, machine: Machine, gpu: str = "NVIDIA L4", capability: tuple[int, int] = (8, 9)) -> None:
        self._machine, self._gpu, self._capability = machine, gpu, capability
        self.fail: dict[str, Any] = {}  # name of a call -> the error code it answers
        self.num_gpus = 1
        self.l2_bytes = 4096

    def __getattr__(self, name: str) -> Any:
        real = getattr(real_cuda, name)  # AttributeError where cuda-python has no such name
        if not name.startswith("cuda") or not callable(real) or isinstance(real, type):
            return real
        if name in ("cudaGetErrorName", "cudaGetErrorString"):
            return real
        do = inspect.getattr_static(type(self), f"_{name}")
        wanted = cuda_arity(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            if len(arguments) != wanted:
                raise TypeError(f"{name} takes {wanted} arguments, got {len(arguments)}")
            self._machine.record(name, *arguments)
            if name in self.fail:
                return (self.fail[name], None) if name in RETURNS_ONE else (self.fail[name],)
            result = do(self, *arguments)
            return (
                (real_cuda.cudaError_t.cudaSuccess,) if result is None else (real_cuda.cudaError_t.cudaSuccess, result)
            )

        return call

    def _cudaGetDeviceCount(self) -> int:
        return self.num_gpus

    def _cudaGetDeviceProperties(self, index: int) -> Any:
        major, minor = self._capability
        return SimpleNamespace(name=self._gpu.encode(), major=major, minor=minor)

    def _cudaDeviceGetAttribute(self, attribute: Any, index: int) -> int:
        assert attribute == real_cuda.cudaDeviceAttr.cudaDevAttrL2CacheSize
        assert 0 <= index < self.num_gpus
        return self.l2_bytes

    def _cudaDriverGetVersion(self) -> int:
        return 13010

    def _cudaSetDevice(self, index: int) -> None:
        assert 0 <= index < self.num_gpus

    def _cudaMalloc(self, num_bytes: int) -> int:
        return self._machine.allocate("gpu", num_bytes)

    def _cudaFree(self, address: int) -> None:
        self._machine.contexts_at_free.append(len(self._machine.contexts))
        self._machine.give_back("gpu", address)

    def _cudaMallocHost(self, num_bytes: int) -> int:
        return self._machine.allocate("host", num_bytes)

    def _cudaFreeHost(self, address: int) -> None:
        self._machine.give_back("host", address)

    def _cudaStreamCreateWithFlags(self, flags: int) -> Handle:
        assert flags == real_cuda.cudaStreamNonBlocking
        return self._machine.handle("stream")

    def _cudaStreamDestroy(self, stream: Handle) -> None:
        self._machine.give_back("stream", stream)

    def _cudaStreamSynchronize(self, stream: Handle) -> None:
        self._machine.finish()

    def _cudaMemcpyAsync(self, to: int, source: int, num_bytes: int, kind: Any, stream: Handle) -> None:
        down = kind == real_cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        assert down or kind == real_cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        here, there = ("host", "gpu") if down else ("gpu", "host")
        assert self._machine.alive[to].startswith(here)
        assert self._machine.alive[source].startswith(there)
        assert num_bytes <= min(len(self._machine.memory[to]), len(self._machine.memory[source]))
        self._machine.submit(lambda: ctypes.memmove(to, source, num_bytes))

    def _cudaMemsetAsync(self, to: int, value: int, num_bytes: int, stream: Handle) -> None:
        assert self._machine.alive[to].startswith("gpu")
        assert num_bytes <= len(self._machine.memory[to])
        self._machine.submit(lambda: ctypes.memset(to, value, num_bytes))

    def _cudaEventCreate(self) -> Handle:
        return self._machine.handle("event")

    def _cudaEventRecord(self, event: Handle, stream: Handle) -> None:
        self._machine.submit(lambda: None)

    def _cudaEventSynchronize(self, event: Handle) -> None:
        self._machine.finish()

    def _cudaEventElapsedTime(self, start: Handle, end: Handle) -> float:
        assert not self._machine.queue, "the events have not happened yet"
        return 1.25

    def _cudaEventDestroy(self, event: Handle) -> None:
        self._machine.give_back("event", event)

    def _cudaStreamBeginCapture(self, stream: Handle, mode: Any) -> None:
        self._machine.captured = []

    def _cudaStreamEndCapture(self, stream: Handle) -> Handle:
        graph = self._machine.handle("graph")
        self._machine.memory[int(graph)], self._machine.captured = self._machine.captured, None
        return graph

    def _cudaGraphInstantiate(self, graph: Handle, flags: int) -> Handle:
        launchable = self._machine.handle("launchable")
        self._machine.memory[int(launchable)] = list(self._machine.memory[int(graph)])
        return launchable

    def _cudaGraphLaunch(self, launchable: Handle, stream: Handle) -> None:
        self._machine.queue.extend(self._machine.memory[int(launchable)])

    def _cudaGraphDestroy(self, graph: Handle) -> None:
        self._machine.give_back("graph", graph)

    def _cudaGraphExecDestroy(self, launchable: Handle) -> None:
        self._machine.give_back("launchable", launchable)


RETURNS_ONE = tuple(
    name.removeprefix("_")
    for name, function in vars(FakeCuda).items()
    if name.startswith("_cuda") and inspect.get_annotations(function)["return"] != "None"
)


def cuda_arity(name: str) -> int:
    """How many arguments a function of cuda-python takes, as the first line of its documentation says."""
    line = (getattr(real_cuda, name).__doc__ or "").splitlines()[0]
    inner = line[line.index("(") + 1 : line.rindex(")")]
    return len([part for part in inner.split(",") if part.strip()])


class FakeTensorRT:
    """One version of TensorRT, "10.16" or "11.4", on a ``Machine``.

    What it does can be set: ``parser_errors`` (operator, node, message), ``refuses_timing_cache``, ``ignores_types``
    (builds fp32 whatever the file holds), ``refuses_graphs``, ``does_not_start``, ``no_plan`` and ``refuses_plan`` (an
    error that it logs then).
    """

    def __init__(self, version: str, machine: Machine) -> None:
        names = NAMES[version]
        self.__version__ = names[""]
        self.machine = machine
        self.major = int(version.split(".")[0])
        self.parser_errors: list[tuple[str, str, str]] = []
        self.refuses_timing_cache = self.ignores_types = self.refuses_graphs = self.does_not_start = False
        self.no_plan = self.refuses_plan = ""
        self.steps = 0  # of builds
        self.logger: Any = None
        for name, members in names.items():
            if name:
                setattr(self, name, self._enum(name, members) if members[""] == "enum" else self._class(name, members))
        flag = 1 << int(self.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        machine.labels[flag] = "1 << STRONGLY_TYPED"

    @staticmethod
    def _enum(owner: str, members: dict[str, str]) -> Any:
        values = [name for name, kind in members.items() if kind == "value"]
        return type(owner, (), {name: Value(owner, name, 40 + i) for i, name in enumerate(values)})

    def _class(self, owner: str, members: dict[str, str]) -> type:
        body: dict[str, Any] = {"_owner": owner, "_trt": self, "_properties": frozenset(), "_of": None}
        body["_properties"] = frozenset(name for name, kind in members.items() if kind == "property")
        for number, (name, kind) in enumerate(members.items()):
            if kind == "value":
                body[name] = Value(owner, name, number)
            elif kind.startswith("("):
                body[name] = self._method(owner, name, kind)
        body["__setattr__"], body["__getattr__"] = _set, _get
        if owner == "IHostMemory":
            body["__bytes__"] = lambda memory: memory.__dict__["content"]
        return type(owner, (), body)

    def _method(self, owner: str, name: str, text: str) -> Any:
        signature, trt = signature_of(text), self
        answer = getattr(self, f"_{owner}_{name.strip('_')}", None)

        def method(this: Any, *arguments: Any, **keywords: Any) -> Any:
            if signature is not None:
                signature.bind(*arguments, **keywords)  # TypeError, as pybind11 raises
            if name not in ("log",):
                trt.machine.record(owner if name == "__init__" else f"{owner}.{name}", *arguments, **keywords)
            return None if answer is None else answer(this, *arguments, **keywords)

        return method

    def new(self, owner: str, **state: Any) -> Any:
        """An object that TensorRT makes itself."""
        made = object.__new__(getattr(self, owner))
        made.__dict__.update(state)
        return made

    # ------------------------------------------------------------------------------------------------------ building

    def _Builder_init(self, builder: Any, logger: Any) -> None:
        self.logger = logger
        if self.does_not_start:
            logger.log(self.ILogger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def _Builder_create_network(self, builder: Any, flags: int = 0) -> Any:
        wanted = 1 << int(self.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert flags & wanted, "without the flag, TensorRT 10 chooses precisions of its own"
        return self.new("INetworkDefinition", inputs=[], model=None)

    def _Builder_create_builder_config(self, builder: Any) -> Any:
        return self.new("IBuilderConfig", flags={"TF32"}, profiles=[])

    def _Builder_create_optimization_profile(self, builder: Any) -> Any:
        return self.new("IOptimizationProfile", shapes={})

    def _OnnxParser_init(self, parser: Any, network: Any, logger: Any) -> None:
        parser.__dict__["network"] = network

    def _OnnxParser_parse_from_file(self, parser: Any, model: str) -> bool:
        parser.__dict__["num_errors"] = len(self.parser_errors)
        if self.parser_errors:
            return False
        graph = onnx.load(model).graph
        network = parser.__dict__["network"]
        network.__dict__.update(model=graph, num_inputs=len(graph.input))
        network.__dict__["inputs"] = [
            self.new("ITensor", name=one.name, shape=tuple(d.dim_value or -1 for d in one.type.tensor_type.shape.dim))
            for one in graph.input
        ]
        return True

    def _OnnxParser_get_error(self, parser: Any, index: int) -> Any:
        operator, node, message = self.parser_errors[index]
        return self.new("ParserError", operator=operator, node_=node, message=message)

    def _ParserError_node_operator(self, error: Any) -> str:
        return error.__dict__["operator"]

    def _ParserError_node_name(self, error: Any) -> str:
        return error.__dict__["node_"]

    def _ParserError_desc(self, error: Any) -> str:
        return error.__dict__["message"]

    def _INetworkDefinition_get_input(self, network: Any, index: int) -> Any:
        return network.__dict__["inputs"][index]

    def _IBuilderConfig_set_flag(self, config: Any, flag: Value) -> None:
        config.__dict__["flags"].add(flag.name)

    def _IBuilderConfig_clear_flag(self, config: Any, flag: Value) -> None:
        config.__dict__["flags"].discard(flag.name)

    def _IOptimizationProfile_set_shape(self, profile: Any, name: str, low: Any, best: Any, high: Any) -> None:
        profile.__dict__["shapes"][name] = (low, best, high)

    def _IBuilderConfig_add_optimization_profile(self, config: Any, profile: Any) -> int:
        config.__dict__["profiles"].append(profile.__dict__["shapes"])
        return len(config.__dict__["profiles"]) - 1

    def _IBuilderConfig_create_timing_cache(self, config: Any, content: bytes) -> Any:
        if content and not content.startswith(b"timing cache"):
            self.logger.log(self.ILogger.ERROR, "Serialized timing cache is corrupt")
            return None
        return self.new("ITimingCache", content=content)

    def _IBuilderConfig_set_timing_cache(self, config: Any, cache: Any, ignore_mismatch: bool) -> bool:
        if self.refuses_timing_cache and cache.__dict__["content"]:
            self.logger.log(self.ILogger.WARNING, "The timing cache was made on another GPU")
            return False
        config.__dict__["cache"] = cache
        return True

    def _IBuilderConfig_get_timing_cache(self, config: Any) -> Any:
        return config.__dict__["cache"]

    def _ITimingCache_serialize(self, cache: Any) -> Any:
        return self.new("IHostMemory", content=b"timing cache" + cache.__dict__["content"][12:] + b".")

    def _Builder_build_serialized_network(self, builder: Any, network: Any, config: Any) -> Any:
        monitor = config.__dict__.get("progress_monitor")
        if monitor is not None:
            monitor.phase_start("Building", None, 4)
            for step in range(4):
                self.steps += 1
                if not monitor.step_complete("Building", step):
                    return None
            monitor.phase_finish("Building")
        if self.no_plan:
            self.logger.log(self.ILogger.ERROR, self.no_plan)
            return None
        graph, shapes = network.__dict__["model"], config.__dict__["profiles"][0]
        (name, profile), weights = next(iter(shapes.items())), {w.name: w for w in graph.initializer}
        types = {w.data_type for w in weights.values()} | {  # integers only set shapes
            onnx.TensorProto.INT8 for node in graph.node if node.op_type == "QuantizeLinear"
        }
        word = "Half" if onnx.TensorProto.FLOAT16 in types else "Int8" if onnx.TensorProto.INT8 in types else "Float"
        content = {
            "input": name,
            "output": graph.output[0].name,
            "profile": profile,
            "weight": numpy_helper.to_array(weights["weight"]).astype(float).tolist(),
            "bias": numpy_helper.to_array(weights["bias"]).astype(float).tolist(),
            "type": "Float" if self.ignores_types else word,
            "tf32": "TF32" in config.__dict__["flags"],
            "detailed": config.__dict__.get("profiling_verbosity") is self.ProfilingVerbosity.DETAILED,
        }
        return self.new("IHostMemory", content=json.dumps(content).encode())

    # ------------------------------------------------------------------------------------------------------- running

    def _Runtime_init(self, runtime: Any, logger: Any) -> None:
        self.logger = logger

    def _Runtime_load_runtime(self, runtime: Any, path: str) -> Any:
        return self.new("Runtime")

    def _Runtime_deserialize_cuda_engine(self, runtime: Any, content: bytes) -> Any:
        if self.refuses_plan:
            self.logger.log(self.ILogger.ERROR, self.refuses_plan)
            return None
        plan = json.loads(content)
        return self.new("ICudaEngine", plan=plan, num_io_tensors=2, device_memory_size_v2=1024)

    def _ICudaEngine_get_tensor_name(self, engine: Any, index: int) -> str:
        return (engine.__dict__["plan"]["input"], engine.__dict__["plan"]["output"])[index]

    def _ICudaEngine_get_tensor_mode(self, engine: Any, name: str) -> Any:
        is_input = name == engine.__dict__["plan"]["input"]
        return self.TensorIOMode.INPUT if is_input else self.TensorIOMode.OUTPUT

    def _ICudaEngine_get_tensor_dtype(self, engine: Any, name: str) -> Any:
        return self.DataType.FLOAT

    def _ICudaEngine_get_tensor_shape(self, engine: Any, name: str) -> Any:
        plan = engine.__dict__["plan"]
        return (-1, *plan["profile"][0][1:]) if name == plan["input"] else (-1, len(plan["bias"]))

    def _ICudaEngine_get_tensor_profile_shape(self, engine: Any, name: str, profile_index: int) -> Any:
        return [tuple(shape) for shape in engine.__dict__["plan"]["profile"]]

    def _ICudaEngine_create_execution_context(self, engine: Any, strategy: Any = None) -> Any:
        own_memory = strategy is not self.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.new("IExecutionContext", engine_=engine, memory=own_memory, shape=None, at={}, profile=None)
        self.machine.contexts.add(context)
        return context

    def _IExecutionContext_set_device_memory(self, context: Any, memory: int, size: int) -> None:
        assert self.machine.alive[memory].startswith("gpu")
        assert size >= 1024
        context.__dict__["memory"] = True

    def _IExecutionContext_set_optimization_profile_async(self, context: Any, index: int, stream: int) -> bool:
        assert self.machine.alive[stream].startswith("stream")
        return index == 0

    def _IExecutionContext_set_input_shape(self, context: Any, name: str, shape: Any) -> bool:
        assert not context.__dict__.get("captured"), "a context whose graph was captured must not change"
        low, _, high = context.__dict__["engine_"].__dict__["plan"]["profile"]
        if not low[0] <= shape[0] <= high[0]:
            return False
        context.__dict__["shape"] = tuple(shape)
        return True

    def _IExecutionContext_infer_shapes(self, context: Any) -> list[str]:
        return [] if context.__dict__["shape"] else ["input"]

    def _IExecutionContext_set_tensor_address(self, context: Any, name: str, memory: int) -> bool:
        assert self.machine.alive[memory].startswith("gpu")
        context.__dict__["at"][name] = memory
        return True

    def _IExecutionContext_execute_async_v3(self, context: Any, stream_handle: int) -> bool:
        state, machine = context.__dict__, self.machine
        assert machine.alive[stream_handle].startswith("stream")
        plan = state["engine_"].__dict__["plan"]
        if not (state["memory"] and state["shape"] and set(state["at"]) == {plan["input"], plan["output"]}):
            self.logger.log(self.ILogger.ERROR, "the context has no memory, no shape or no addresses")
            return False
        if machine.captured is not None:
            assert state.get("ran"), "a first run initialises TensorRT; it cannot be captured"
            if self.refuses_graphs:
                self.logger.log(self.ILogger.ERROR, "operation not permitted when stream is capturing")
                return False
            state["captured"] = True
        state["ran"] = True
        shape, at = state["shape"], dict(state["at"])

        def compute() -> None:
            images = _floats(at[plan["input"]], int(np.prod(shape))).reshape(shape)
            logits = images.mean(axis=(2, 3)) @ np.array(plan["weight"], np.float32).T + np.array(plan["bias"])
            _floats(at[plan["output"]], logits.size)[:] = logits.astype(np.float32).reshape(-1)

        machine.submit(compute)
        return True

    def _ICudaEngine_create_engine_inspector(self, engine: Any) -> Any:
        return self.new("EngineInspector", engine_=engine)

    def _EngineInspector_get_engine_information(self, inspector: Any, format: Any) -> str:
        assert format is self.LayerInformationFormat.JSON
        plan = inspector.__dict__["engine_"].__dict__["plan"]
        if not plan["detailed"]:
            return json.dumps({"Layers": ["pooled", "logits"]})
        context = inspector.__dict__.get("execution_context")
        known = context is not None and context.__dict__["shape"]
        return json.dumps(engine_information(self.major, plan["type"] if known else "", tf32=plan["tf32"]))


def engine_information(major: int, word: str, *, tf32: bool = False) -> dict[str, Any]:
    """What the inspector says of a net with one multiplying layer; ``word`` is its type, "" before shapes are set."""

    def tensor(name: str, kind: str) -> dict[str, Any]:
        if not word:
            return {"Name": name, "Format/Datatype": "N/A due to dynamic shapes"}
        if major == 10:
            return {"Name": name, "Format/Datatype": f"{kind} NCHW"}
        return {"Name": name, "Datatype": kind, "Format": "Row major linear"}

    kernel = "sm80_xmma_gemm_tf32f32_tf32f32_f32_tn_n" if tf32 and word == "Float" else "a_kernel"
    layers = [
        {"Name": "copy", "LayerType": "Reformat", "Inputs": [tensor("image", "Float")], "TacticName": ""},
        {"Name": "pool", "LayerType": "CaskPooling", "Inputs": [tensor("x", word)], "TacticName": "pool"},
        {"Name": "gemm", "LayerType": "gemm", "Inputs": [tensor("pooled", word)], "TacticName": kernel},
    ]
    return {"Layers": layers, "I/O Tensors" if major > 10 else "Bindings": ["image", "logits"]}


def _floats(address: int, size: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address))


def _set(this: Any, name: str, value: Any) -> None:
    """Properties that exist can be set; a Python subclass may hold what it likes, as with pybind11."""
    if name in this._properties:
        this._trt.machine.calls.append(f"{this._owner}.{name} = {this._trt.machine.show(value)}")
    elif "_owner" in type(this).__dict__:
        raise AttributeError(f"{this._owner} has no property {name}")
    this.__dict__[name] = value


def _get(this: Any, name: str) -> Any:
    raise AttributeError(f"{type(this).__name__} has no {name}, or the double does not know it")


def install(
    monkeypatch: Any, version: str = "11.4", gpu: str = "NVIDIA L4", capability: tuple[int, int] = (8, 9)
) -> tuple[FakeTensorRT, FakeCuda, Machine]:
    """Put both in the place of the real modules."""
    machine = Machine()
    fake_trt, fake_cuda = FakeTensorRT(version, machine), FakeCuda(machine, gpu, capability)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_trt)
    monkeypatch.setattr(cuda.bindings, "runtime", fake_cuda)
    return fake_trt, fake_cuda, machine
