"""A runner answers what the model says, runs where it was told to, and never needs torch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import mcruntime
import numpy as np
import onnx
import onnxruntime
import pytest
from mcruntime import engine
from mcruntime.cgroup import available_threads
from mcruntime.engine import OnnxRunner
from mcruntime.errors import BackendError, BundleError, InputError, MissingExtraError, ParityError
from mcruntime.gpu import Device
from onnx import TensorProto, helper
from tiny_onnx import BIAS, expected_logits, some_images, write_bundle, write_graph, write_model

EXPORT = Path(mcruntime.__file__).parents[1]


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "tiny.onnx")


def float_info(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_the_answer_is_the_models_for_every_batch(model, batch):
    images = some_images(batch)
    with OnnxRunner(model, threads=1) as runner:
        logits = runner.infer(images)
    assert logits.shape == (batch, 4)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected_logits(images), atol=1e-6)


def test_images_that_are_not_contiguous_give_the_same_answer(model):
    images = some_images(2)
    with OnnxRunner(model, threads=1) as runner:
        turned = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(runner.infer(turned), runner.infer(images))


def test_two_threads_may_infer_at_the_same_time(model):
    answers = {}
    with OnnxRunner(model, threads=1) as runner:
        workers = [
            threading.Thread(target=lambda seed=seed: answers.update({seed: runner.infer(some_images(5, seed=seed))}))
            for seed in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for seed, logits in answers.items():
        np.testing.assert_allclose(logits, expected_logits(some_images(5, seed=seed)), atol=1e-6)
    assert len(answers) == 4


def test_facts_tell_what_really_runs(model):
    with OnnxRunner(model, threads=2, spinning=False) as runner:
        facts = runner.facts()
    assert facts["backend"] == "onnxruntime"
    assert facts["provider"] == "cpu"
    assert facts["threads"] == "2"
    assert facts["spinning"] == "off"
    assert facts["onnxruntime"] == onnxruntime.__version__
    assert all(isinstance(value, str) for value in facts.values())


def test_the_options_asked_for_reach_the_session(model, monkeypatch):
    seen = {}
    real = onnxruntime.InferenceSession

    def spy(path, options, **kwargs):
        seen.update(kwargs, threads=options.intra_op_num_threads, inter=options.inter_op_num_threads)
        seen["spin"] = options.get_session_config_entry("session.intra_op.allow_spinning")
        return real(path, options, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    with OnnxRunner(model, threads=2, spinning=False) as runner:
        assert runner.name == "tiny"
    assert seen == {
        "providers": ["CPUExecutionProvider"], "enable_fallback": 0, "threads": 2, "inter": 1, "spin": "0",
    }  # fmt: skip
    with OnnxRunner(model, threads=1, name="other") as runner:
        assert runner.name == "other"
    assert seen["spin"] == "1"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 8, 8)), "expected float32 images, got float64"),
        (np.zeros((1, 3, 8, 8), np.float16), "expected float32 images, got float16"),
        ([[1.0]], "expected float32 images, got list"),
        (np.zeros((1, 3, 8, 9), np.float32), r"expected images \[B, 3, 8, 8\], got \[1, 3, 8, 9\]"),
        (np.zeros((1, 1, 8, 8), np.float32), r"expected images \[B, 3, 8, 8\], got \[1, 1, 8, 8\]"),
        (np.zeros((3, 8, 8), np.float32), r"expected images \[B, 3, 8, 8\], got \[3, 8, 8\]"),
        (np.zeros((0, 3, 8, 8), np.float32), r"expected images \[B, 3, 8, 8\], got \[0, 3, 8, 8\]"),
        (np.full((1, 3, 8, 8), np.nan, np.float32), "NaN or infinite"),
        (np.full((1, 3, 8, 8), np.inf, np.float32), "NaN or infinite"),
    ],
)
def test_images_that_do_not_fit_are_refused(model, images, message):
    with OnnxRunner(model, threads=1) as runner, pytest.raises(InputError, match=message):
        runner.infer(images)


def test_a_fixed_batch_is_named_in_the_refusal(tmp_path):
    with OnnxRunner(write_model(tmp_path / "two.onnx", batch=2), threads=1) as runner:
        assert runner.infer(some_images(2)).shape == (2, 4)
        with pytest.raises(InputError, match=r"expected images \[2, 3, 8, 8\], got \[1, 3, 8, 8\]"):
            runner.infer(some_images(1))


def test_an_output_that_is_not_finite_is_an_error_not_an_answer(tmp_path):
    bias = np.array([0, np.inf, 0, 0], dtype=np.float32)
    with (
        OnnxRunner(write_model(tmp_path / "inf.onnx", bias=bias), threads=1) as runner,
        pytest.raises(ParityError, match="NaN or infinite"),
    ):
        runner.infer(some_images(1))


def test_an_answer_with_another_batch_is_an_error(tmp_path):
    """A batch that was exported as a constant: every batch answers one row."""
    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)]
    path = write_graph(
        tmp_path / "m.onnx", nodes, [float_info("x", ["b", 3, 8, 8])], [float_info("y", ["n", 8])],
        {"axes": np.array([0, 1], dtype=np.int64)},
    )  # fmt: skip
    with OnnxRunner(path, threads=1) as runner, pytest.raises(ParityError, match=r"expected logits \[3, classes\]"):
        runner.infer(some_images(3))


def test_a_runner_must_be_entered_before_it_infers(model):
    runner = OnnxRunner(model, threads=1)
    with pytest.raises(RuntimeError, match="enter the runner"):
        runner.infer(some_images(1))
    with runner:
        runner.infer(some_images(1))
    with pytest.raises(RuntimeError, match="enter the runner"):
        runner.infer(some_images(1))


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_absent_is_an_error_and_not_the_cpu(model, provider, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=rf"asked for provider {provider}.*install 'mcdeploy\[gpu\]'"):
        OnnxRunner(model, provider=provider).__enter__()


GPU_PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
GPU = Device(0, "NVIDIA L4", "8.9", "580.65.06 (CUDA 13.0)")


class FakeSession:
    """A session of onnxruntime-gpu; reading the model on the CPU is real. ``on`` says where it claims to run."""

    on = "CPUExecutionProvider"  # as when the CUDA libraries do not load: a session on the CPU, and no error
    strays = ()  # (name, operator) of nodes that another provider got

    def __new__(cls, path, options, providers, **kwargs):
        if providers == ["CPUExecutionProvider"]:
            return REAL_SESSION(path, options, providers=providers, **kwargs)
        return super().__new__(cls)

    def __init__(self, path, options, providers, enable_fallback):
        self.asked = providers
        self.no_cpu = options.get_session_config_entry("session.disable_cpu_ep_fallback")
        self.fallback_at_start, self.fallback_at_run = bool(enable_fallback), True
        self.real = REAL_SESSION(str(path), providers=["CPUExecutionProvider"])
        FakeSession.last = self

    def disable_fallback(self):
        self.fallback_at_run = False

    def get_providers(self):
        return [self.on]

    def get_inputs(self):
        return self.real.get_inputs()

    def get_outputs(self):
        return self.real.get_outputs()

    def run(self, names, feeds):
        return self.real.run(names, feeds)

    def get_provider_graph_assignment_info(self):
        def part(provider, *nodes):
            made = [SimpleNamespace(name=name, op_type=kind) for name, kind in nodes]
            return SimpleNamespace(ep_name=provider, get_nodes=lambda: made)

        return [part(self.on, ("conv1", "Conv")), *(part("CPUExecutionProvider", stray) for stray in self.strays)]


REAL_SESSION = onnxruntime.InferenceSession


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """onnxruntime-gpu as far as it can be pretended; ``gpu(on, strays)`` says what its sessions claim."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*GPU_PROVIDERS.values(), FakeSession.on])
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    monkeypatch.setattr(engine, "describe_device", lambda: GPU)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def claim(on, strays=()):
        monkeypatch.setattr(FakeSession, "on", on)
        monkeypatch.setattr(FakeSession, "strays", strays)

    return claim


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_fell_back_to_the_cpu_is_an_error(model, provider, gpu):
    with pytest.raises(BackendError, match=f"asked for provider {provider}, but ONNX Runtime loaded CPU"):
        OnnxRunner(model, provider=provider).__enter__()
    assert FakeSession.last.no_cpu == "1"
    assert not FakeSession.last.fallback_at_start
    assert not FakeSession.last.fallback_at_run
    assert [name for name, _ in FakeSession.last.asked] == [GPU_PROVIDERS[provider]]


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_node_that_another_provider_got_is_named(model, provider, gpu):
    gpu(GPU_PROVIDERS[provider], [("layer1.0.conv1", "Conv"), ("", "Gemm")])
    wanted = "leaves out layer1.0.conv1 on CPUExecutionProvider, Gemm on CPUExecutionProvider"
    with pytest.raises(BackendError, match=f"asked for provider {provider}, which {wanted}"):
        OnnxRunner(model, provider=provider).__enter__()


def test_many_nodes_elsewhere_are_counted(model, gpu):
    gpu(GPU_PROVIDERS["cuda"], [(f"n{i}", "Conv") for i in range(9)])
    with pytest.raises(BackendError, match="n4 on CPUExecutionProvider and 4 more"):
        OnnxRunner(model, provider="cuda").__enter__()


def test_where_nodes_run_is_asked_of_the_real_onnxruntime(model, monkeypatch):
    """This machine has only the CPU; a runner that expects another name must refuse every node."""
    with OnnxRunner(model, threads=1) as runner:
        parts = runner._session.get_provider_graph_assignment_info()
        assert sorted(node.op_type for part in parts for node in part.get_nodes()) == [
            "Flatten", "Gemm", "GlobalAveragePool",
        ]  # fmt: skip
        monkeypatch.setitem(engine.PROVIDERS, "cpu", "AnotherExecutionProvider")
        with pytest.raises(BackendError, match=r"GlobalAveragePool on CPUExecutionProvider, .*Gemm on CPU"):
            runner._check_every_node(runner._session)


def test_cuda_computes_without_tf32(model, gpu):
    gpu(GPU_PROVIDERS["cuda"])
    with OnnxRunner(model, provider="cuda") as runner:
        facts = runner.facts()
        np.testing.assert_allclose(runner.infer(some_images(40)), expected_logits(some_images(40)), atol=1e-6)
    assert FakeSession.last.asked[0][1] == {"device_id": "0", "use_tf32": "0"}
    assert (facts["provider"], facts["tf32"]) == ("cuda", "off")


def test_tensorrt_gets_explicit_profiles_a_folder_of_its_own_and_no_precision(model, gpu, tmp_path):
    gpu(GPU_PROVIDERS["tensorrt"])
    with OnnxRunner(model, provider="tensorrt", batches=(1, 2, 4)) as runner:
        facts = runner.facts()
        assert runner.infer(some_images(4)).shape == (4, 4)
        with pytest.raises(InputError, match="set up for batches of 1 to 4, got 5"):
            runner.infer(some_images(5))
    options = FakeSession.last.asked[0][1]
    assert {key: options[f"trt_profile_{key}_shapes"] for key in ("min", "opt", "max")} == {
        "min": "image:1x3x8x8", "opt": "image:2x3x8x8", "max": "image:4x3x8x8",
    }  # fmt: skip
    assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
    assert not [key for key in options if "fp16" in key or "bf16" in key or "int8" in key]
    folder = Path(options["trt_engine_cache_path"])
    assert folder.is_dir()
    assert folder.parent == tmp_path / "cache" / "mcdeploy" / "onnxruntime-tensorrt"
    assert (facts["provider"], facts["batches"], facts["tf32"]) == ("tensorrt", "1 to 4", "on")
    assert facts["types allowed"] == "fp32"


@pytest.mark.parametrize(
    ("types", "options", "allowed"),
    [("fp16", {"trt_fp16_enable": "1"}, "fp32 and fp16"), ("int8", {"trt_int8_enable": "1"}, "fp32 and int8")],
)
def test_tensorrt_may_use_the_types_it_is_told_to(model, gpu, types, options, allowed):
    gpu(GPU_PROVIDERS["tensorrt"])
    with OnnxRunner(model, provider="tensorrt", types=types) as runner:
        assert runner.facts()["types allowed"] == allowed
    asked = FakeSession.last.asked[0][1]
    assert {key: value for key, value in asked.items() if key.endswith(("16_enable", "8_enable"))} == options


def engine_folder(path, **options):
    with OnnxRunner(path, provider="tensorrt", **options):
        return FakeSession.last.asked[0][1]["trt_engine_cache_path"]


def test_other_weights_options_gpus_or_versions_get_another_folder(model, gpu, tmp_path, monkeypatch):
    gpu(GPU_PROVIDERS["tensorrt"])
    other = write_model(tmp_path / "other.onnx", bias=BIAS + np.float32(1e-6))
    same = tmp_path / "copy.onnx"
    same.write_bytes(model.read_bytes())
    folders = [engine_folder(model), engine_folder(other), engine_folder(model, batches=(1, 1, 2))]
    folders += [engine_folder(model, types="fp16"), engine_folder(model, types="int8")]
    assert engine_folder(model) == engine_folder(same) == folders[0]
    monkeypatch.setattr(engine, "describe_device", lambda: Device(0, "NVIDIA T4", "7.5", GPU.driver))
    folders.append(engine_folder(model))
    monkeypatch.setattr(engine, "installed_versions", lambda: {"tensorrt": "10.16.1.11"})
    folders.append(engine_folder(model))
    monkeypatch.setattr(onnxruntime, "__version__", "1.99")
    folders.append(engine_folder(model))
    assert len(set(folders)) == 8
    assert engine_folder(model, cache=tmp_path / "mine").startswith(str(tmp_path / "mine"))


def test_tensorrt_needs_a_fixed_image_size(gpu, tmp_path):
    gpu(GPU_PROVIDERS["tensorrt"])
    with pytest.raises(BackendError, match="TensorRT needs a fixed image size"):
        OnnxRunner(write_model(tmp_path / "any.onnx", size="size"), provider="tensorrt").__enter__()


def test_a_tensorrt_of_another_major_is_the_reason_that_is_given(model, gpu, monkeypatch):
    monkeypatch.setattr(engine, "tensorrt_mismatch", lambda: "the provider is linked against TensorRT 10")
    with pytest.raises(BackendError, match=r"loaded CPUExecutionProvider; the provider is linked against TensorRT 10"):
        OnnxRunner(model, provider="tensorrt").__enter__()
    with pytest.raises(BackendError, match="install the driver and CUDA libraries"):
        OnnxRunner(model, provider="cuda").__enter__()


def test_cuda_libraries_are_looked_for_once_and_what_is_missing_is_quoted(model, gpu, monkeypatch, capsys):
    asked = []

    def preload():
        asked.append(None)
        print("\x1b[33mFailed to load\x1b[0m libcudnn.so.9")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    engine.preload_cuda_libraries.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(BackendError, match=r"onnxruntime-gpu needs \(Failed to load libcudnn\.so\.9\), or ask"):
                OnnxRunner(model, provider="cuda").__enter__()
        with OnnxRunner(model, threads=1):
            pass
    finally:
        engine.preload_cuda_libraries.cache_clear()
    assert len(asked) == 1
    assert capsys.readouterr().out == ""


def test_weights_in_a_file_beside_the_model_are_read(tmp_path):
    plain = onnx.load(write_model(tmp_path / "tiny.onnx"))
    onnx.save(plain, tmp_path / "ext.onnx", save_as_external_data=True, location="ext.data", size_threshold=0)
    with OnnxRunner(tmp_path / "ext.onnx", threads=1) as runner:
        np.testing.assert_allclose(runner.infer(some_images(2)), expected_logits(some_images(2)), atol=1e-6)
    (tmp_path / "ext.data").unlink()
    with pytest.raises(BundleError, match="cannot load the model"):
        OnnxRunner(tmp_path / "ext.onnx", threads=1).__enter__()


def test_an_unknown_provider_or_no_thread_is_refused(model):
    with pytest.raises(InputError, match="unknown provider 'gpu'; valid are cpu, cuda, tensorrt"):
        OnnxRunner(model, provider="gpu")
    with pytest.raises(InputError, match="at least 1, got 0"):
        OnnxRunner(model, threads=0)
    with pytest.raises(InputError, match="unknown types 'bf16'; valid are fp32, fp16, int8"):
        OnnxRunner(model, types="bf16")
    with pytest.raises(InputError, match="1 <= min <= opt <= max, got 4, 2, 8"):
        OnnxRunner(model, batches=(4, 2, 8))


@pytest.mark.parametrize("content", [b"", b"hello", bytes(1000)])
def test_a_file_that_is_no_onnx_model_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"bad\.onnx: ONNX Runtime cannot load the model.*export it again") as caught:
        OnnxRunner(path).__enter__()
    assert "\n" not in str(caught.value)


def test_a_model_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(BundleError, match="no such model file"):
        OnnxRunner(tmp_path / "none.onnx").__enter__()


def test_weights_outside_the_models_folder_are_refused(tmp_path):
    """ONNX Runtime's own check, on which bundles rely (CVE-2024-27318 and its kin)."""
    (tmp_path / "secret.data").write_bytes(np.eye(4, dtype=np.float32).tobytes())
    folder = tmp_path / "bundle"
    folder.mkdir()
    for location in ("../secret.data", str(tmp_path / "secret.data")):
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
        for key, value in {"location": location, "offset": "0", "length": "64"}.items():
            tensor.external_data.add(key=key, value=value)
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
        graph = helper.make_graph(nodes, "g", [float_info("x", ["b", 4])], [float_info("y", ["b", 4])], [tensor])
        path = folder / "model.onnx"
        path.write_bytes(helper.make_model(graph, ir_version=10).SerializeToString())
        with pytest.raises(BundleError, match="cannot load the model"):
            OnnxRunner(path, threads=1).__enter__()


def test_a_model_that_is_no_image_classifier_is_refused_with_what_it_has(tmp_path):
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    shape = ["b", 3, 8, 8]
    path = write_graph(tmp_path / "relu.onnx", relu, [float_info("x", shape)], [float_info("y", shape)], {})
    with pytest.raises(BackendError, match="expected one float32 output with 2 axes, found y: tensor"):
        OnnxRunner(path).__enter__()
    path = write_graph(tmp_path / "flat.onnx", relu, [float_info("x", ["b", 4])], [float_info("y", ["b", 4])], {})
    with pytest.raises(BackendError, match="expected one float32 input with 4 axes"):
        OnnxRunner(path).__enter__()
    half = TensorProto.FLOAT16
    path = write_graph(tmp_path / "h.onnx", relu, [float_info("x", shape, half)], [float_info("y", shape, half)], {})
    with pytest.raises(BackendError, match="float16"):
        OnnxRunner(path).__enter__()


def test_without_onnxruntime_the_extra_to_install_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mcdeploy\[cpu\]'"):
        OnnxRunner(model).__enter__()


def test_the_default_is_what_this_machine_has(model):
    with OnnxRunner(model) as runner:
        assert runner.facts()["threads"] == str(available_threads())
    assert 1 <= available_threads() <= len(os.sched_getaffinity(0))


def test_a_bundle_loads_and_infers_where_torch_timm_and_mcdeploy_cannot_be_imported(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    program = textwrap.dedent(
        """
        import importlib, pkgutil, sys

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "torchvision", "timm", "mcdeploy", "onnx", "onnxscript"):
                    raise ImportError(f"{name} was imported")

        sys.meta_path.insert(0, Refuse())
        import mcruntime
        for module in pkgutil.walk_packages(mcruntime.__path__, "mcruntime."):
            importlib.import_module(module.name)
        from mcruntime.bundle import load_bundle
        from mcruntime.engine import OnnxRunner
        bundle = load_bundle(sys.argv[1])
        with OnnxRunner(bundle.model_path, threads=1) as runner:
            print("self-test", bundle.selftest(runner))
        try:
            import torch
        except ImportError:
            print("torch is refused")
        """
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(bundle)],
        env={**os.environ, "PYTHONPATH": str(EXPORT)}, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("self-test")
    assert "torch is refused" in done.stdout


def test_onnxruntime_is_asked_not_to_report_home():
    code = "import mcruntime, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    for given, expected in ((None, "1"), ("0", "0")):
        environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
        environment |= {"PYTHONPATH": str(Path(mcruntime.__file__).parents[1])}
        environment |= {"ORT_DISABLE_TELEMETRY": given} if given else {}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
