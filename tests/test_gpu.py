"""What needs TensorRT on a real NVIDIA GPU; ``tests/test_cuda.py`` holds what needs less. All: ``pytest -m gpu``.

None of this file has run yet: TensorRT's libraries were not to be had where there was a GPU. They come, with
cuda-python and onnxruntime-gpu, with ``pip install 'mcdeploy[gpu]'``; what is missing is an error here, not a skip.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mcruntime.engine import OnnxRunner
from mcruntime.errors import BackendError, InputError
from mcruntime.gpu import describe_device, load_tensorrt
from mcruntime.tensorrt import TensorRTRunner, facts_path
from tiny_models import images, small_resnet

from mcdeploy.backends.fp16 import to_fp16
from mcdeploy.backends.onnx import export_onnx
from mcdeploy.backends.pytorch import TorchRunner
from mcdeploy.backends.tensorrt import EngineOptions, build_engine, cached_engine
from mcdeploy.bench import compare_latency
from mcdeploy.compile.certify import scramble
from mcdeploy.verify import verify

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]
OPTIONS = EngineOptions(batches=(1, 4, 8), optimization_level=1)
SIZE = 16


def pixels(batch: int = 7) -> np.ndarray:
    return images(batch, SIZE).numpy()


def exported(model: torch.nn.Module, path: Path) -> Path:
    export_onnx(model, path, images(2, SIZE))
    return path


@pytest.fixture(scope="module")
def net():
    """A scrambled ResNet: fresh ones multiply every branch by zero."""
    return small_resnet()


@pytest.fixture(scope="module")
def fp32(net, tmp_path_factory):
    return exported(net, tmp_path_factory.mktemp("onnx") / "net.onnx")


@pytest.fixture(scope="module")
def fp16(fp32):
    to_fp16(fp32, fp32.with_name("net.fp16.onnx"), pixels())
    return fp32.with_name("net.fp16.onnx")


@pytest.fixture(scope="module")
def plans(fp32, fp16, tmp_path_factory):
    """One engine of each precision."""
    folder = tmp_path_factory.mktemp("plans")
    for precision, onnx in (("fp32", fp32), ("fp16", fp16)):
        build_engine(onnx, folder / f"{precision}.plan", OPTIONS, precision=precision)
    return folder


def test_the_gpu_and_tensorrt_say_what_they_are():
    device = describe_device()
    assert device.name
    assert "CUDA" in device.driver
    assert float(device.compute_capability) >= 7
    assert load_tensorrt().__version__


@pytest.mark.parametrize(("precision", "max_abs"), [("fp32", 1e-4), ("fp16", 2e-2)])
def test_an_engine_answers_what_pytorch_answers_in_the_precision_that_was_asked_for(net, plans, precision, max_abs):
    with (
        TorchRunner(net, name="torch", threads=1) as torch_runner,
        TensorRTRunner(plans / f"{precision}.plan") as runner,
    ):
        assert runner.facts()["precision"] == precision
        assert runner.facts()["tf32"] == "off"
        assert all(row.passed for row in verify(torch_runner, runner, pixels(), hop="tensorrt", max_abs=max_abs))


def test_an_fp32_file_does_not_pass_as_fp16(fp32, tmp_path):
    with pytest.raises(BackendError, match="asked for fp16, but no layer"):
        build_engine(fp32, tmp_path / "a.plan", OPTIONS, precision="fp16")


def test_replayed_graphs_answer_as_plain_launches_at_every_batch_in_any_order(plans):
    plan = plans / "fp32.plan"
    with TensorRTRunner(plan) as replayed, TensorRTRunner(plan, name="plain", cuda_graphs=False) as plain:
        for batch in (1, 8, 2, 8, 1, 5, 2):
            np.testing.assert_array_equal(replayed.infer(pixels(batch)), plain.infer(pixels(batch)))
        with pytest.raises(InputError, match="batches of 1 to 8, got 9"):
            replayed.infer(pixels(9))


def test_runners_can_be_loaded_again_and_again_without_filling_the_gpu(plans):
    def free_bytes():
        return torch.cuda.mem_get_info()[0]

    def load():
        with TensorRTRunner(plans / "fp32.plan") as runner:
            runner.infer(pixels(3))

    load()
    before = free_bytes()
    for _ in range(20):
        load()
    assert before - free_bytes() < 64 << 20


def test_progress_reaches_its_end_and_an_exception_in_it_ends_the_build(fp32, tmp_path):
    told = []
    build_engine(fp32, tmp_path / "a.plan", OPTIONS, precision="fp32", progress=lambda *step: told.append(step))
    assert told[-1][1] == 1.0

    def stop(what, share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(fp32, tmp_path / "b.plan", OPTIONS, precision="fp32", progress=stop)
    assert not (tmp_path / "b.plan").exists()


def test_the_cache_finds_misses_other_weights_and_builds_what_is_damaged_again(net, fp32, tmp_path):
    cache = tmp_path / "cache"
    path, facts = cached_engine(fp32, OPTIONS, precision="fp32", cache=cache)
    built_at = path.stat().st_mtime_ns
    assert cached_engine(fp32, OPTIONS, precision="fp32", cache=cache) == (path, facts)
    assert path.stat().st_mtime_ns == built_at

    other = small_resnet()
    scramble(other, seed=1)
    other_path, _ = cached_engine(exported(other, tmp_path / "other.onnx"), OPTIONS, precision="fp32", cache=cache)
    assert other_path != path
    with TensorRTRunner(path) as one, TensorRTRunner(other_path, name="other") as two:
        assert np.abs(one.infer(pixels()) - two.infer(pixels())).max() > 1e-3

    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="is not the engine"):
        cached_engine(fp32, OPTIONS, precision="fp32", cache=cache)
    with TensorRTRunner(path) as runner, TorchRunner(net, name="torch", threads=1) as torch_runner:
        verify(torch_runner, runner, pixels(), hop="tensorrt", max_abs=1e-4)


def test_a_timing_cache_of_garbage_is_replaced_with_a_warning(fp32, tmp_path):
    timing = tmp_path / "timing.cache"
    timing.write_bytes(b"garbage")
    options = EngineOptions(batches=(1, 4, 8), optimization_level=1, timing_cache=timing)
    with pytest.warns(UserWarning, match="does not take this timing cache"):
        build_engine(fp32, tmp_path / "a.plan", options, precision="fp32")
    assert timing.stat().st_size > len(b"garbage")
    build_engine(fp32, tmp_path / "a.plan", options, precision="fp32")  # and this time it fits


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(batches=(1, 4, 8), optimization_level=1, version_compatible=True),
        EngineOptions(batches=(1, 4, 8), optimization_level=1, hardware_compatible="same-compute-capability"),
    ],
)
def test_compatible_engines_run_here_too(net, fp32, tmp_path, options):
    build_engine(fp32, tmp_path / "a.plan", options, precision="fp32")
    assert facts_path(tmp_path / "a.plan").is_file()
    with TorchRunner(net, name="torch", threads=1) as torch_runner, TensorRTRunner(tmp_path / "a.plan") as runner:
        verify(torch_runner, runner, pixels(), hop="tensorrt", max_abs=1e-4)


@pytest.mark.onnx_cuda
def test_onnxruntimes_tensorrt_provider_runs_every_node_and_answers_as_pytorch(net, fp32, tmp_path):
    """It needs the TensorRT that onnxruntime-gpu is linked against; where it is another, the error says so."""
    with (
        TorchRunner(net, name="torch", threads=1) as torch_runner,
        OnnxRunner(fp32, provider="tensorrt", batches=(1, 4, 8), cache=tmp_path) as runner,
    ):
        facts = runner.facts()
        assert facts["provider"] == "tensorrt"
        exact = facts["tf32"] == "off"
        verify(torch_runner, runner, pixels(), hop="tensorrt", max_abs=1e-4 if exact else 1e-2)


def test_runners_with_a_cold_cache_answer_as_warm_ones_and_are_timed_on_the_devices_clock(net, plans):
    def pair(cold_l2):
        return (
            TensorRTRunner(plans / "fp32.plan", name="tensorrt", cold_l2=cold_l2),
            TorchRunner(net, name="torch", device="cuda", cold_l2=cold_l2),
        )

    for warm, cold in zip(pair(False), pair(True), strict=True):
        with warm, cold:
            assert (warm.facts()["l2"], cold.facts()["l2"]) == ("warm", "cold")
            cold.time_on_device(pixels(8))
            np.testing.assert_allclose(warm.infer(pixels(8)), cold.infer(pixels(8)), atol=1e-5)
    report = compare_latency(pair(True), {8: pixels(8)}, seconds=1)
    assert {row.timed for row in report.latencies} == {"device"}
    assert [runner.facts["l2"] for runner in report.runners] == ["cold", "cold"]


def test_bench_times_engines_on_the_devices_clock(plans):
    report = compare_latency(
        [TensorRTRunner(plans / "fp32.plan"), TensorRTRunner(plans / "fp16.plan")],
        {batch: pixels(batch) for batch in (1, 8)},
        seconds=1,
        providers={"fp32": "tensorrt", "fp16": "tensorrt"},
    )
    assert {row.timed for row in report.latencies} == {"device"}
    assert all(row.p50_ms.value > 0 for row in report.latencies)
    assert [runner.facts["precision"] for runner in report.runners] == ["fp32", "fp16"]


def test_a_run_goes_from_training_on_the_gpu_to_a_bundle_with_engines_eval_and_bench(tmp_path, monkeypatch):
    """The commands of a user, whole: int8 for TensorRT, the report of the bench, clocks and energy too."""
    import json
    import sys

    from mcruntime.bundle import load_bundle
    from runs import short_recipe, write_recipe

    from mcdeploy import cli

    def mcdeploy(*words):
        monkeypatch.setattr(sys, "argv", ["mcdeploy", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0

    recipe = short_recipe(
        train={"device": "cuda", "precision": "fp16"},
        export={
            "backend": ("onnx", "tensorrt"), "precision": ("fp32", "fp16", "int8"), "batch": (1, 4, 8),
            "max_accuracy_drop": 0.2, "min_agreement": 0.9, "engine_optimization": 1, "calibration_images": 64,
        },
    )  # fmt: skip
    run = tmp_path / "run"
    mcdeploy("train", write_recipe(tmp_path / "short.yaml", recipe), "--out", run)
    mcdeploy("prune-export", run)
    models = load_bundle(run / "bundle").manifest.models
    assert set(models) == {f"{prefix}{kind}" for prefix in ("", "tensorrt-") for kind in ("fp32", "fp16", "int8")}
    for key, model in models.items():
        mcdeploy("eval", f"{run / 'bundle'}@{key}", "--data", "digits", "--json", tmp_path / "eval.json")
        assert json.loads((tmp_path / "eval.json").read_text())["top1"] == pytest.approx(model.accuracy)
    mcdeploy(
        "bench", run, f"{run / 'bundle'}@tensorrt-fp16", "--backend", "tensorrt", "--backend", "pytorch-cuda",
        "--batch", 1, "--batch", 8, "--seconds", 3, "--json", tmp_path / "bench.json", "--html", tmp_path / "b.html",
    )  # fmt: skip
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {row["timed"] for row in report["latencies"]} == {"device"}
    assert report["gpu"]
