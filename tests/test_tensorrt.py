"""TensorRT engines: the names the code uses exist, the builder calls what it should, and its errors say what happened.

No TensorRT runs here. The double in ``recording_tensorrt`` is made from the published names of two versions.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from mcruntime.gpu import Device, cache_folder, content_sha256, describe_device, load_tensorrt, tensorrt_mismatch
from mcruntime.tensorrt import count_precisions, facts_path, precision_of, read_engine
from onnx import TensorProto, helper
from recording_tensorrt import FakeCuda, Machine, engine_information, install
from tensorrt_source import problems
from tiny_onnx import BIAS, NUM_CLASSES, WEIGHT, write_graph, write_model

from mcdeploy.backends.tensorrt import PLAN, EngineOptions, build_engine, cache_key, cached_engine
from mcdeploy.errors import BackendError, InputError, MissingExtraError

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
SOURCES = ("mcdeploy/backends/tensorrt.py", "export/mcruntime/tensorrt.py", "export/mcruntime/gpu.py")
VERSIONS = ("10.16", "11.4")
OPTIONS = EngineOptions(batches=(1, 2, 4))
DEVICE = Device(0, "NVIDIA L4", "8.9", "580.65.06 (CUDA 13.0)")


@pytest.fixture(params=VERSIONS)
def fakes(request, monkeypatch):
    """TensorRT, CUDA and the machine of one version."""
    return install(monkeypatch, request.param)


@pytest.fixture
def fake(monkeypatch):
    """TensorRT 11.4 alone."""
    return install(monkeypatch)[0]


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "tiny.onnx")


def half_model(path):
    """The tiny model with fp16 weights between two casts."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["wide"], axis=1),
        helper.make_node("Cast", ["wide"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Gemm", ["half", "weight", "bias"], ["answer"], transB=1),
        helper.make_node("Cast", ["answer"], ["logits"], to=TensorProto.FLOAT),
    ]
    images = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", NUM_CLASSES])
    weights = {"weight": WEIGHT.astype(np.float16), "bias": BIAS.astype(np.float16)}
    return write_graph(path, nodes, [images], [logits], weights)


# ---------------------------------------------------------------------------------------------------------- the names


@pytest.mark.parametrize("source", SOURCES)
def test_every_name_and_call_exists_in_both_versions_of_tensorrt_and_in_cuda_python(source):
    assert problems((ROOT / source).read_text()) == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", "TensorRT 11.4: type BuilderFlag has no FP16"),
        ("self._config.set_flag(trt.BuilderFlag.FP16)", "TensorRT 11.4: type BuilderFlag has no FP16"),
        ("context.execute_async_v2([1], 2)", "TensorRT 10.16: IExecutionContext has no execute_async_v2"),
        ("context.execute_async_v3(1, 2)", "too many positional arguments"),
        ("ready.context.execute_async_v3(stream=2)", "missing a required argument: 'stream_handle'"),
        ("engine.device_memory_size", "TensorRT 11.4: ICudaEngine has no device_memory_size"),
        ("config.set_timing_cache(timings)", "missing a required argument: 'ignore_mismatch'"),
        ("trt.OnnxParser(network)", "missing a required argument: 'logger'"),
        ("trt.ILogger.__init__(self, 1)", "too many positional arguments"),
        ("trt.volume((1, 2))", "trt has no volume"),
        ("cudart.cudaMalloc(1, 2)", "cudart.cudaMalloc takes 1 arguments"),
        ("cudart.cudaMallocManaged2(1)", "cudart has no cudaMallocManaged2"),
        ("cudart.cudaMemcpyKind.cudaMemcpyUp", "cudart.cudaMemcpyKind has no cudaMemcpyUp"),
        ("pynvml.nvmlDriver()", "pynvml has no nvmlDriver"),
        ("mystery = builder.create_network(1)", "mystery is given a INetworkDefinition"),
        ("def f(mystery: Any) -> None: ...", "what does the parameter mystery of f hold?"),
        ("def f() -> Any: ...", "what does f return?"),
    ],
)
def test_a_name_that_was_removed_or_misspelt_is_found(line, says):
    assert any(says in problem for problem in problems(line)), problems(line)


# -------------------------------------------------------------------------------------------------------- the builder


def test_an_engine_is_built_with_its_facts_beside_it(fakes, model, tmp_path):
    fake, _, machine = fakes
    out = tmp_path / "engines" / "tiny.plan"
    facts = build_engine(model, out, OPTIONS, precision="fp32")
    assert read_engine(out)[1] == facts
    assert (facts.tensorrt, facts.gpu, facts.compute_capability) == (fake.__version__, "NVIDIA L4", "8.9")
    assert facts.onnx_sha256 == content_sha256(model)
    assert facts.layers == {"fp32": 1}
    assert facts.batches == (1, 2, 4)
    assert "CUDA 13.1" in facts.driver
    assert sorted(path.name for path in out.parent.iterdir()) == ["tiny.plan", "tiny.plan.json"]
    assert any("set_shape('image', (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))" in call for call in machine.calls)


def test_every_option_reaches_tensorrt(fakes, model, tmp_path):
    _, _, machine = fakes
    options = EngineOptions(
        batches=(2, 2, 2), workspace_bytes=1 << 20, optimization_level=5, tf32=True, version_compatible=True,
        hardware_compatible="ampere-plus", timing_cache=tmp_path / "timing.cache",
    )  # fmt: skip
    facts = build_engine(model, tmp_path / "a.plan", options, precision="fp32")
    calls = "\n".join(machine.calls)
    for wanted in (
        "set_memory_pool_limit(MemoryPoolType.WORKSPACE, 1048576)", "builder_optimization_level = 5",
        "set_flag(BuilderFlag.TF32)", "set_flag(BuilderFlag.VERSION_COMPATIBLE)",
        "set_flag(BuilderFlag.EXCLUDE_LEAN_RUNTIME)",
        "hardware_compatibility_level = HardwareCompatibilityLevel.AMPERE_PLUS",
        "profiling_verbosity = ProfilingVerbosity.DETAILED", "(2, 3, 8, 8), (2, 3, 8, 8), (2, 3, 8, 8)",
    ):  # fmt: skip
        assert wanted in calls
    assert "clear_flag" not in calls
    assert facts.layers == {"tf32": 1}
    assert facts.tf32
    assert (tmp_path / "timing.cache").read_bytes() == b"timing cache."


def test_without_being_asked_for_tf32_is_off_and_nothing_is_compatible(fakes, model, tmp_path):
    _, _, machine = fakes
    build_engine(model, tmp_path / "a.plan", OPTIONS, precision="fp32")
    calls = "\n".join(machine.calls)
    assert "clear_flag(BuilderFlag.TF32)" in calls
    assert "set_flag" not in calls.replace("clear_flag", "")
    assert "hardware_compatibility_level = HardwareCompatibilityLevel.NONE" in calls
    assert "set_memory_pool_limit" not in calls
    assert "timing" not in calls


def test_an_engine_that_computes_in_tf32_all_the_same_is_refused(fake, model, tmp_path, monkeypatch):
    monkeypatch.setattr(fake.IBuilderConfig, "clear_flag", lambda config, flag: None)
    with pytest.raises(BackendError, match="TF32 was switched off, but 1 layers"):
        build_engine(model, tmp_path / "a.plan", OPTIONS, precision="fp32")


def test_fp16_comes_from_the_file_and_is_read_back_from_the_engine(fakes, tmp_path):
    facts = build_engine(half_model(tmp_path / "half.onnx"), tmp_path / "a.plan", OPTIONS, precision="fp16")
    assert facts.layers == {"fp16": 1}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_that_the_engine_does_not_have_is_an_error_and_leaves_no_file(fakes, model, tmp_path, precision):
    with pytest.raises(BackendError, match=rf"asked for {precision}, but no layer .* \(found 1 fp32\)"):
        build_engine(model, tmp_path / "out" / "a.plan", OPTIONS, precision=precision)
    assert not (tmp_path / "out").exists()


def test_a_tensorrt_that_ignores_the_types_of_the_file_is_found_out(fakes, tmp_path):
    fakes[0].ignores_types = True
    with pytest.raises(BackendError, match="asked for fp16, but no layer"):
        build_engine(half_model(tmp_path / "half.onnx"), tmp_path / "a.plan", OPTIONS, precision="fp16")


def test_an_engine_narrower_than_asked_for_is_an_error(fakes, tmp_path):
    with pytest.raises(BackendError, match="asked for fp32, but the engine also computes in 1 fp16"):
        build_engine(half_model(tmp_path / "half.onnx"), tmp_path / "a.plan", OPTIONS, precision="fp32")


def test_all_of_the_parsers_errors_are_quoted_with_their_nodes(fakes, model, tmp_path):
    fakes[0].parser_errors = [("If", "layer1.0/choose", "branches\ndiffer"), ("Hmm", "layer2.1", "no such operator")]
    with pytest.raises(BackendError) as caught:
        build_engine(model, tmp_path / "a.plan", OPTIONS, precision="fp32")
    assert "If layer1.0/choose: branches differ; Hmm layer2.1: no such operator" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_build_that_fails_quotes_what_tensorrt_logged(fakes, model, tmp_path):
    fakes[0].no_plan = "Could not find any implementation for node gemm"
    with pytest.raises(BackendError, match="built no engine: Could not find any implementation for node gemm"):
        build_engine(model, tmp_path / "a.plan", OPTIONS, precision="fp32")


def test_a_tensorrt_that_does_not_start_says_why(fakes, model, tmp_path):
    fakes[0].does_not_start = True
    with pytest.raises(BackendError, match="does not start: CUDA initialization failure with error: 35"):
        build_engine(model, tmp_path / "a.plan", OPTIONS, precision="fp32")


def test_an_engine_that_does_not_load_right_after_its_build_is_an_error(fakes, model, tmp_path):
    fakes[0].refuses_plan = "out of memory"
    with pytest.raises(BackendError, match="does not load the engine that it built: out of memory"):
        build_engine(model, tmp_path / "a.plan", OPTIONS, precision="fp32")


def test_a_fixed_batch_is_refused(fakes, tmp_path):
    with pytest.raises(BackendError, match=r"open batch and a fixed image size, found image \[2, 3, 8, 8\]"):
        build_engine(write_model(tmp_path / "m.onnx", batch=2), tmp_path / "a.plan", OPTIONS, precision="fp32")


@pytest.mark.parametrize("old", [b"garbage", b"timing cache of another GPU"])
def test_a_timing_cache_that_does_not_fit_is_replaced_with_a_warning(fakes, model, tmp_path, old):
    fakes[0].refuses_timing_cache = True
    path = tmp_path / "timing.cache"
    path.write_bytes(old)
    with pytest.warns(UserWarning, match=r"timing\.cache: TensorRT does not take this timing cache \(.*(GPU|corrupt)"):
        build_engine(model, tmp_path / "a.plan", EngineOptions(timing_cache=path), precision="fp32")
    assert path.read_bytes() == b"timing cache."


def test_a_timing_cache_that_fits_is_used_and_grows(fakes, model, tmp_path):
    path = tmp_path / "timing.cache"
    for expected in (b"timing cache.", b"timing cache.."):
        build_engine(model, tmp_path / "a.plan", EngineOptions(timing_cache=path), precision="fp32")
        assert path.read_bytes() == expected


def test_progress_is_told_and_ends_at_1(fakes, model, tmp_path):
    told = []
    build_engine(model, tmp_path / "a.plan", OPTIONS, precision="fp32", progress=lambda *step: told.append(step))
    assert told == [("Building", share) for share in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_in_the_progress_ends_the_build_and_comes_out(fakes, model, tmp_path, error):
    seen = []

    def progress(what, share):
        seen.append(share)
        if share >= 0.5:
            raise error

    with pytest.raises(error):
        build_engine(model, tmp_path / "out" / "a.plan", OPTIONS, precision="fp32", progress=progress)
    assert seen == [0.0, 0.25, 0.5]
    assert fakes[0].steps == 2  # TensorRT was told to stop after the second of four
    assert not (tmp_path / "out").exists()


@pytest.fixture
def ctrl_c():
    """SIGINT raises KeyboardInterrupt, whatever the tests before have left."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_waiting_thread_stops_tensorrt_at_its_next_step(fake, model, tmp_path, ctrl_c):
    started, steps = threading.Event(), []
    main = threading.main_thread().ident

    def progress(what, share):
        steps.append(share)
        if share == 0.25:
            signal.pthread_kill(main, signal.SIGINT)
            started.wait(2)  # Ctrl-C reaches the main thread meanwhile

    with pytest.raises(KeyboardInterrupt):
        build_engine(model, tmp_path / "out" / "a.plan", OPTIONS, precision="fp32", progress=progress)
    assert steps == [0.0, 0.25]
    assert fake.steps == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batches": (2, 1, 4)}, "1 <= min <= opt <= max, got 2, 1, 4"),
        ({"batches": (0, 1, 4)}, "1 <= min"),
        ({"optimization_level": 6}, "expected 0 to 5, got 6"),
        ({"workspace_bytes": 0}, "at least 1, got 0"),
        ({"hardware_compatible": "all"}, "unknown hardware_compatible 'all'; valid are none, same-compute"),
    ],
)
def test_options_outside_their_range_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        EngineOptions(**options)


def test_a_missing_file_and_an_unknown_precision_are_refused(fake, model, tmp_path):
    with pytest.raises(InputError, match=r"none\.onnx: no such file"):
        build_engine(tmp_path / "none.onnx", tmp_path / "a.plan", OPTIONS, precision="fp32")
    with pytest.raises(InputError, match="unknown precision 'fp8'; valid are fp32, fp16, int8"):
        build_engine(model, tmp_path / "a.plan", OPTIONS, precision="fp8")


@pytest.mark.parametrize(("version", "says"), [("10.11.0", "is too old.*10.12"), ("12.0.1", "is newer than 11.x")])
def test_a_tensorrt_that_the_code_was_not_written_for_is_refused(fake, version, says):
    fake.__version__ = version
    with pytest.raises(BackendError, match=f"TensorRT {version} {says}"):
        load_tensorrt()


@pytest.mark.parametrize("version", ["10.12.0.36", "10.16.1.11", "11.0.0.1", "11.99.9"])
def test_a_tensorrt_that_the_code_was_written_for_is_taken(fake, version):
    fake.__version__ = version
    assert load_tensorrt() is fake


def test_without_tensorrt_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mcdeploy\[gpu\]'"):
        load_tensorrt()


def test_without_a_gpu_the_sentence_is_cudas(monkeypatch):
    _, cuda, _ = install(monkeypatch)
    cuda.num_gpus = 0
    with pytest.raises(BackendError, match="no usable NVIDIA GPU"):
        describe_device()
    cuda.num_gpus = 1
    with pytest.raises(BackendError, match="GPU 3: this machine has 1"):
        describe_device(3)
    with pytest.raises(AttributeError, match="cudaMalloc2"):
        FakeCuda(Machine()).cudaMalloc2(1)


# ---------------------------------------------------------------------------------------------------- the types found


@pytest.mark.parametrize("major", [10, 11])
@pytest.mark.parametrize(
    ("word", "expected"), [("Half", "fp16"), ("Int8", "int8"), ("Float", "fp32"), ("BF16", "bf16")]
)
def test_types_are_read_in_both_forms_of_the_inspectors_json(major, word, expected):
    assert count_precisions(json.dumps(engine_information(major, word))) == {expected: 1}


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        ({"LayerType": "CaskConvolution", "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}],
          "Weights": {"Type": "Half", "Count": 9}}, "fp16"),
        ({"LayerType": "CaskConvolution", "TacticName": "sm80_xmma_fprop_implicit_gemm_i8i8_i8i32_f32"}, "int8"),
        ({"LayerType": "CaskConvolution", "TacticName": "sm86_xmma_fprop_implicit_gemm_f16f16_f16f16_f16"}, "fp16"),
        ({"LayerType": "CaskConvolution", "TacticName": "ampere_h884_tn"}, "fp16"),
        ({"LayerType": "Convolution", "Inputs": [{"Format/Datatype": "Row major linear FP32"}],
          "TacticName": "sm80_xmma_tf32f32_tf32f32_f32"}, "tf32"),
        ({"LayerType": "gemm", "Inputs": [{"Format/Datatype": "Thirty-two wide channel vectorized Int8 format"},
                                          {"Format/Datatype": "Half"}]}, "int8"),
        ({"LayerType": "kgen", "ParameterType": "MatrixMultiply", "Inputs": [{"Datatype": "BFloat16"}]}, "bf16"),
        ({"LayerType": "CaskConvolution"}, "unknown"),
    ],
)  # fmt: skip
def test_a_layers_type_is_its_inputs_then_its_weights_then_its_kernels(layer, expected):
    assert count_precisions(json.dumps({"Layers": [layer]})) == {expected: 1}


def test_layers_that_only_move_data_do_not_make_an_engine_fp16_or_int8():
    layers = [
        {"LayerType": "CaskConvolution", "Inputs": [{"Datatype": "Float"}]},
        {"LayerType": "Reformat", "Inputs": [{"Datatype": "Int8"}]},
        {"LayerType": "kgen", "Inputs": [{"Datatype": "Int8"}]},
    ]
    counts = count_precisions(json.dumps({"Layers": layers}))
    assert counts == {"fp32": 1}
    assert precision_of(counts) == "fp32"
    assert precision_of({"fp32": 9, "int8": 1}) == "int8"
    assert precision_of({"unknown": 1}) == "unknown"


# ---------------------------------------------------------------------------------------------------------- the cache


def test_an_engine_is_built_once_and_then_found(fakes, model, tmp_path):
    _, _, machine = fakes
    path, facts = cached_engine(model, OPTIONS, precision="fp32", cache=tmp_path / "cache")
    builds = [call for call in machine.calls if "build_serialized" in call]
    assert cached_engine(model, OPTIONS, precision="fp32", cache=tmp_path / "cache") == (path, facts)
    assert [call for call in machine.calls if "build_serialized" in call] == builds
    assert len(builds) == 1
    names = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert len(names) == 2  # the entry and the timing cache: nothing half-built
    assert path == tmp_path / "cache" / names[0] / PLAN
    assert names[1].startswith("timing-")


def test_other_weights_never_share_an_engine(fakes, tmp_path):
    one = write_model(tmp_path / "one.onnx")
    other = write_model(tmp_path / "other.onnx", bias=BIAS + np.float32(1e-6))
    paths = {cached_engine(model, OPTIONS, precision="fp32", cache=tmp_path / "c")[0] for model in (one, other, one)}
    assert len(paths) == 2


def key_of(model, options=OPTIONS, precision="fp32", tensorrt="11.4.0.106", device=DEVICE):
    return cache_key(model, options, precision=precision, tensorrt=tensorrt, device=device)


def test_everything_that_decides_the_engine_is_in_its_key_and_the_timing_cache_is_not(model, tmp_path):
    keys = [
        key_of(model),
        key_of(model, precision="fp16"),
        key_of(model, tensorrt="11.5.0.1"),
        key_of(model, device=Device(0, "NVIDIA L40", "8.9", DEVICE.driver)),
        key_of(model, device=Device(0, "NVIDIA L4", "9.0", DEVICE.driver)),
        key_of(model, device=Device(0, "NVIDIA L4", "8.9", "590.1 (CUDA 13.1)")),
        key_of(model, EngineOptions(batches=(1, 2, 8))),
        key_of(model, EngineOptions(batches=(1, 2, 4), workspace_bytes=1)),
        key_of(model, EngineOptions(batches=(1, 2, 4), optimization_level=2)),
        key_of(model, EngineOptions(batches=(1, 2, 4), tf32=True)),
        key_of(model, EngineOptions(batches=(1, 2, 4), version_compatible=True)),
        key_of(model, EngineOptions(batches=(1, 2, 4), hardware_compatible="ampere-plus")),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(model, EngineOptions(batches=(1, 2, 4), timing_cache=tmp_path / "t")) == keys[0]
    assert key_of(model, device=Device(1, "NVIDIA L4", "8.9", DEVICE.driver)) == keys[0]


def test_external_data_counts_in_the_content(tmp_path):
    model = onnx.load(write_model(tmp_path / "tiny.onnx"))
    onnx.save(model, tmp_path / "ext.onnx", save_as_external_data=True, location="weights.data", size_threshold=0)
    assert (tmp_path / "weights.data").stat().st_size > 0
    before = content_sha256(tmp_path / "ext.onnx")
    assert content_sha256(tmp_path / "ext.onnx") == before
    data = bytearray((tmp_path / "weights.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "weights.data").write_bytes(data)
    assert content_sha256(tmp_path / "ext.onnx") != before


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def exchange_facts(plan):
    text = facts_path(plan).read_text()
    assert "NVIDIA L4" in text
    facts_path(plan).write_text(text.replace("NVIDIA L4", "NVIDIA T4"))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flip, "is not the engine that engine.plan.json describes"),
        (lambda plan: plan.unlink(), "engine.plan: no such file"),
        (lambda plan: facts_path(plan).unlink(), "engine.plan.json: no such file"),
        (lambda plan: facts_path(plan).write_text("{}"), "engine.plan.json: tensorrt: Field required"),
        (exchange_facts, "gpu is NVIDIA T4, but its key stands for NVIDIA L4"),
    ],
)
def test_a_cache_entry_that_is_wrong_is_named_and_built_again(fake, model, tmp_path, damage, says):
    path, facts = cached_engine(model, OPTIONS, precision="fp32", cache=tmp_path / "c")
    damage(path)
    with pytest.warns(UserWarning, match=says):
        assert cached_engine(model, OPTIONS, precision="fp32", cache=tmp_path / "c") == (path, facts)
    assert read_engine(path)[1] == facts
    assert len(list((tmp_path / "c").iterdir())) == 2
    assert cached_engine(model, OPTIONS, precision="fp32", cache=tmp_path / "c")[0] == path  # and no warning now


def test_a_process_that_finishes_second_keeps_the_first_ones_engine(fake, model, tmp_path):
    """Whoever comes second finds an entry where it wants to put its own."""

    def meanwhile(what, share):
        if share == 0.5 and not inner:
            inner.append(None)
            inner.append(cached_engine(model, OPTIONS, precision="fp32", cache=tmp_path / "c"))
            times.append(inner[1][0].stat().st_mtime_ns)

    inner, times = [], []
    outer = cached_engine(model, OPTIONS, precision="fp32", cache=tmp_path / "c", progress=meanwhile)
    assert outer == inner[1]
    assert outer[0].stat().st_mtime_ns == times[0]
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_an_entry_that_appears_in_the_last_moment_stays(fake, model, tmp_path, monkeypatch):
    rename = os.rename

    def after_somebody_else(source, target):
        if Path(target).parent == tmp_path / "c" and not Path(target).exists():
            shutil.copytree(source, target)
            times.append((Path(target) / PLAN).stat().st_mtime_ns)
        rename(source, target)

    times = []
    monkeypatch.setattr(os, "rename", after_somebody_else)
    path, facts = cached_engine(model, OPTIONS, precision="fp32", cache=tmp_path / "c")
    assert read_engine(path)[1] == facts
    assert [path.stat().st_mtime_ns] == times
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_a_failed_build_leaves_no_entry(fake, model, tmp_path):
    fake.no_plan = "no memory"
    with pytest.raises(BackendError, match="no memory"):
        cached_engine(model, OPTIONS, precision="fp32", cache=tmp_path / "c")
    assert not [path for path in (tmp_path / "c").iterdir() if path.is_dir()]


def test_the_default_cache_is_the_users(fake, model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    path, _ = cached_engine(model, OPTIONS, precision="fp32")
    assert path.is_relative_to(tmp_path / "xdg" / "mcdeploy" / "engines")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("engines") == tmp_path / ".cache" / "mcdeploy" / "engines"


# ------------------------------------------------------------------------------------------------- packages that clash


def test_a_provider_linked_against_another_tensorrt_is_explained(tmp_path):
    library = tmp_path / "libonnxruntime_providers_tensorrt.so"
    library.write_bytes(b"\x7fELF...\0libnvinfer.so.10\0libnvonnxparser.so.10\0")
    clash = {"onnxruntime-gpu": "1.31.1", "tensorrt": "11.4.0.106", "tensorrt-cu13": "11.4.0.106"}
    said = tensorrt_mismatch(clash, library)
    assert said is not None
    assert "onnxruntime-gpu 1.31.1 is linked against TensorRT 10 (libnvinfer.so.10), but tensorrt 11.4.0.106" in said
    assert "install 'tensorrt-cu13==10.*'" in said
    assert "'tensorrt-cu12==10.*'" in str(tensorrt_mismatch({"tensorrt-cu12": "11.0.1"}, library))
    assert tensorrt_mismatch({"tensorrt": "10.16.1.11"}, library) is None
    assert tensorrt_mismatch({}, library) is None
    assert tensorrt_mismatch(clash, tmp_path / "none.so") is None
    library.write_bytes(b"nothing of the kind")
    assert tensorrt_mismatch(clash, library) is None


def test_nothing_is_wrong_with_this_machine():
    assert tensorrt_mismatch() is None


# ------------------------------------------------------------------------------------------------- the calls, in order


@pytest.mark.parametrize("version", VERSIONS)
def test_the_calls_of_a_build_and_of_three_inferences_are_these(version, tmp_path, monkeypatch):
    """``REGENERATE_GOLDEN=1`` writes the files anew; read the difference."""
    from mcruntime.tensorrt import TensorRTRunner
    from tiny_onnx import some_images

    _, _, machine = install(monkeypatch, version)
    options = EngineOptions(batches=(1, 2, 4), workspace_bytes=1 << 30, timing_cache=tmp_path / "timing.cache")
    (tmp_path / "timing.cache").write_bytes(b"timing cache.")
    build_engine(half_model(tmp_path / "tiny.onnx"), tmp_path / "tiny.plan", options, precision="fp16")
    machine.calls.append("# run: batch 2, batch 2, batch 3 on the device's clock")
    with TensorRTRunner(tmp_path / "tiny.plan") as runner:
        for _ in range(2):
            runner.infer(some_images(2))
        runner.time_on_device(some_images(3))
    found = "\n".join(machine.calls) + "\n"
    golden = GOLDEN / f"tensorrt_calls_{version.split('.')[0]}.txt"
    if os.environ.get("REGENERATE_GOLDEN"):
        golden.write_text(found)
    assert found == golden.read_text()
