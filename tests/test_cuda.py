"""What needs an NVIDIA GPU and PyTorch with CUDA, or ONNX Runtime's CUDA provider, but no TensorRT.

    pytest -m "gpu and not onnx_cuda and not tensorrt"    PyTorch alone
    pytest -m "gpu and not tensorrt"                      and onnxruntime-gpu

``tests/test_gpu.py`` holds what needs TensorRT. What is not installed is an error here, not a skip.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from mcruntime.bundle import load_bundle
from mcruntime.engine import OnnxRunner
from mcruntime.errors import BackendError
from mcruntime.gpu import describe_device
from runs import short_recipe, write_recipe
from tiny_models import images, small_resnet
from tiny_onnx import expected_logits, some_images, write_bundle

import mcdeploy as mcdeploy_package
from mcdeploy import cli
from mcdeploy import train as train_module
from mcdeploy.backends.fp16 import to_fp16
from mcdeploy.backends.onnx import export_onnx
from mcdeploy.backends.pytorch import TorchRunner
from mcdeploy.bench import compare_latency
from mcdeploy.checkpoint import FILE_NAME, load_checkpoint
from mcdeploy.errors import TrainingError
from mcdeploy.gpu_state import NOT_READABLE, GpuWatch
from mcdeploy.runs import open_run, train_run
from mcdeploy.verify import verify

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]
SIZE = 16

BRANCHES = {"backbone": "multibranch20_8x4d_cifar", "options": {"channels": 8, "stem_channels": 8}}
CELLS = {"backbone": "nnmass_cells", "options": {"widths": [8, 8], "depths": [4, 4], "skips": [8, 8]}}
# One net a paper; its sections of the recipe.
RULES = {
    "maskconnect": {"connectivity": {"rule": "maskconnect", "fan_in": 1}},
    "gateconnect": {"model": BRANCHES, "connectivity": {"rule": "gateconnect", "fan_in": 2}},
    "sparse": {"connectivity": {"rule": "sparse"}, "train": {"joint_epochs": 0}},
    "nnmass": {"model": CELLS, "connectivity": {"rule": "chain"}, "train": {"joint_epochs": 0}},
    "ddw": {"connectivity": {"rule": "ddw", "warm_up": 1, "target_open": 0.6}, "train": {"joint_epochs": 0}},
}


def recipe_of(rule, **train):
    sections = dict(RULES[rule])
    steps = {"epochs": 2, "joint_epochs": 1, **sections.pop("train", {}), "device": "cuda", **train}
    return short_recipe(train=steps, **sections)


def losses(run):
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "step"]


def pixels(batch=7):
    return images(batch, SIZE).numpy()


def mcdeploy(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["mcdeploy", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def net():
    """A scrambled ResNet: fresh ones multiply every branch by zero."""
    return small_resnet()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs on the GPU, in bf16."""
    run = tmp_path_factory.mktemp("cuda") / "run"
    train_run(recipe_of("maskconnect", precision="bf16"), run, resume=False)
    return run


# ------------------------------------------------------------------------------------------------------------ the card


def test_cuda_and_nvml_speak_of_the_same_gpu():
    device = describe_device()
    assert device.name == torch.cuda.get_device_name(0)
    assert device.compute_capability == "{}.{}".format(*torch.cuda.get_device_capability(0))
    assert re.fullmatch(r"\d+\.\d+\S* \(CUDA \d+\.\d+\)", device.driver)
    with GpuWatch() as watch:
        watch.look()
        facts = watch.facts()
    assert facts["name"] == device.name
    assert device.driver.startswith(facts["driver"])
    assert facts["state"] in ("floating", "throttled")
    assert NOT_READABLE not in facts["sm clock"]


def test_doctor_tried_cuda_and_says_so(tmp_path, monkeypatch, capsys):
    mcdeploy(monkeypatch, "doctor", "--json", tmp_path / "doctor.json")
    assert torch.cuda.get_device_name(0) in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- runners


def test_on_the_gpu_float32_is_float32_although_the_process_allows_tf32(net, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    wide = torch.nn.Sequential(
        torch.nn.Conv2d(3, 256, 3), torch.nn.Conv2d(256, 256, 3), torch.nn.Flatten(), torch.nn.LazyLinear(64)
    )
    with torch.no_grad():
        wide(images(1, SIZE))
        exact = wide.double()(images(7, SIZE).double()).float().numpy()
    loose = wide.float().cuda()

    def error(logits):
        return np.abs(logits - exact).max() / np.abs(exact).max()

    with torch.no_grad():
        assert error(loose(images(7, SIZE).cuda()).cpu().numpy()) > 3e-5  # what TF32 costs here
    with TorchRunner(wide.cpu(), name="wide", device="cuda") as runner:
        assert error(runner.infer(pixels())) < 3e-6
        assert runner.facts()["tf32"] == "off"
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_pytorch_on_the_gpu_answers_as_on_the_cpu_at_every_batch(net, mode):
    with (
        TorchRunner(net, name="cpu", threads=1) as cpu,
        TorchRunner(net, name="cuda", device="cuda", mode=mode) as cuda,
    ):
        assert cuda.facts()["provider"] == "cuda"
        for batch in (1, 8, 3):
            np.testing.assert_allclose(cuda.infer(pixels(batch)), cpu.infer(pixels(batch)), atol=1e-4, rtol=1e-4)


def test_a_full_gpu_is_one_sentence_of_the_runner():
    class Greedy(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) + torch.empty(1 << 45, device=x.device)[:1]

    with (
        TorchRunner(Greedy(), name="greedy", device="cuda") as runner,
        pytest.raises(BackendError, match=r"^greedy: PyTorch stopped at images \[2, .* out of memory") as caught,
    ):
        runner.infer(pixels(2))
    assert "\n" not in str(caught.value)


def test_bench_times_both_modes_warm_and_cold_on_the_devices_clock_and_reads_clock_and_energy(net):
    def pair(cold_l2):
        modes = ("eager", "compiled")
        return [TorchRunner(net, name=mode, mode=mode, device="cuda", cold_l2=cold_l2) for mode in modes]

    for cold_l2 in (False, True):
        report = compare_latency(
            pair(cold_l2),
            {batch: pixels(batch) for batch in (1, 8)},
            seconds=1,
            gpu=GpuWatch(),
            providers={"eager": "cuda", "compiled": "cuda"},
        )
        assert {row.timed for row in report.latencies} == {"device"}
        assert [runner.facts["l2"] for runner in report.runners] == ["cold" if cold_l2 else "warm"] * 2
        for row in report.latencies:
            assert 0 < row.p50_ms.value < row.host_p50_ms
            assert row.energy_mj > 0
        assert report.gpu["name"] == torch.cuda.get_device_name(0)
        assert report.gpu["state"] in ("floating", "throttled")


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_on_the_gpu_with_the_losses_of_the_cpu(tmp_path, rule):
    """The same images, weights and gates; only the last digits of the arithmetic differ, and TF32 in convolutions."""
    train_run(recipe_of(rule), tmp_path / "cuda", resume=False)
    train_run(recipe_of(rule, device="cpu"), tmp_path / "cpu", resume=False)
    on_cuda, on_cpu = losses(tmp_path / "cuda"), losses(tmp_path / "cpu")
    assert len(on_cuda) == len(on_cpu) == 2 * 3
    assert on_cuda[0] == pytest.approx(on_cpu[0], rel=5e-3)
    assert on_cuda[:3] == pytest.approx(on_cpu[:3], rel=5e-2)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_in_bf16_and_compiles_to_the_net_that_was_trained(tmp_path, rule):
    result, loaders = train_run(recipe_of(rule, precision="bf16", channels_last=True), tmp_path, resume=False)
    assert np.isfinite(losses(tmp_path)).all()
    assert {p.device.type for p in result.model.parameters()} == {"cpu"}
    _, restored, _ = open_run(tmp_path)
    batch = next(iter(loaders.val))[0][:5].numpy()
    with TorchRunner(result.model, name="trained", threads=1) as trained_runner:
        with TorchRunner(restored, name="restored", threads=1) as runner:
            np.testing.assert_allclose(runner.infer(batch), trained_runner.infer(batch), atol=1e-5, rtol=1e-5)
        if rule != "ddw":  # its compile step takes calibration images; prune-export does it
            small = mcdeploy_package.compile_model(restored, torch.from_numpy(batch))
            with TorchRunner(small, name="compiled", device="cuda") as runner:
                np.testing.assert_allclose(runner.infer(batch), trained_runner.infer(batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"precision": "fp16"}, {"precision": "bf16", "compile": True, "channels_last": True}], ids=str
)
def test_training_works_with_a_gradient_scaler_and_compiled(tmp_path, options):
    train_run(recipe_of("maskconnect", **options), tmp_path, resume=False)
    assert len(losses(tmp_path)) == 6
    assert np.isfinite(losses(tmp_path)).all()


@pytest.mark.parametrize("rule", ["maskconnect", "ddw"])
def test_a_run_that_was_interrupted_resumes_on_the_gpu_with_the_losses_of_one_that_was_not(
    tmp_path, monkeypatch, request, rule
):
    recipe = recipe_of(rule, epochs=3)
    train_run(recipe, tmp_path / "straight", resume=False)
    evaluations = []
    evaluate = train_module._evaluate

    def stop_at_the_second(*given):
        evaluations.append(1)
        if len(evaluations) == 2:
            raise KeyboardInterrupt
        return evaluate(*given)

    monkeypatch.setattr(train_module, "_evaluate", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train_run(recipe, tmp_path / "stopped", resume=False)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path / "stopped").header["epochs_done"] == 1
    train_run(recipe, tmp_path / "stopped", resume=True)
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "straight"), rel=1e-6)


def test_a_gpu_without_room_ends_training_in_one_sentence(tmp_path):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        with pytest.raises(TrainingError, match=r"memory.*train\.batch_size") as caught:
            train_run(recipe_of("maskconnect"), tmp_path, resume=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- the commands of a user


def test_a_run_goes_from_training_on_the_gpu_to_a_verified_bundle_and_a_bench(tmp_path, monkeypatch):
    path = write_recipe(tmp_path / "short.yaml", recipe_of("maskconnect", precision="fp16"))
    run = tmp_path / "run"
    mcdeploy(monkeypatch, "train", path, "--out", run)
    assert (run / FILE_NAME).exists()
    mcdeploy(monkeypatch, "prune-export", run)
    manifest = load_bundle(run / "bundle").manifest
    mcdeploy(monkeypatch, "eval", run / "bundle", "--data", "digits", "--json", tmp_path / "eval.json")
    top1 = json.loads((tmp_path / "eval.json").read_text())["top1"]
    assert top1 == pytest.approx(next(iter(manifest.models.values())).accuracy)
    mcdeploy(
        monkeypatch, "bench", run, run / "compiled.pt2", "--backend", "pytorch-cuda", "--backend", "compiled-cuda",
        "--batch", 1, "--batch", 8, "--seconds", 2, "--json", tmp_path / "bench.json", "--html", tmp_path / "b.html",
        "--markdown", tmp_path / "b.md", "--plot", tmp_path / "b.svg",
    )  # fmt: skip
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {row["timed"] for row in report["latencies"]} == {"device"}
    assert {runner["facts"]["provider"] for runner in report["runners"]} == {"cuda"}
    assert report["gpu"]["name"] in (tmp_path / "b.html").read_text()


def test_per_image_wirings_are_timed_over_images_on_the_gpu(tmp_path, monkeypatch):
    train_run(recipe_of("ddw", precision="bf16"), tmp_path / "run", resume=False)
    mcdeploy(
        monkeypatch, "bench", tmp_path / "run", "--over-images", 8, "--backend", "pytorch-cuda",
        "--json", tmp_path / "bench.json",
    )  # fmt: skip
    text = (tmp_path / "bench.json").read_text()
    assert "all open" in text
    assert "cuda" in text


# ----------------------------------------------------------------------------------- ONNX Runtime's CUDA provider


@pytest.fixture(scope="module")
def fp32(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    export_onnx(net, path, images(2, SIZE))
    return path


@pytest.mark.onnx_cuda
def test_onnxruntimes_cuda_provider_runs_every_node_and_answers_as_pytorch(net, fp32):
    with (
        TorchRunner(net, name="torch", threads=1) as torch_runner,
        OnnxRunner(fp32, provider="cuda") as runner,
    ):
        facts = runner.facts()
        assert (facts["provider"], facts["tf32"]) == ("cuda", "off")
        assert all(row.passed for row in verify(torch_runner, runner, pixels(), hop="cuda", max_abs=1e-4))


@pytest.mark.onnx_cuda
def test_onnxruntimes_cuda_provider_runs_an_fp16_file(net, fp32):
    half = fp32.with_name("net.fp16.onnx")
    to_fp16(fp32, half, pixels())
    with TorchRunner(net, name="torch", threads=1) as torch_runner, OnnxRunner(half, provider="cuda") as runner:
        assert all(row.passed for row in verify(torch_runner, runner, pixels(), hop="cuda", max_abs=2e-2))


@pytest.mark.onnx_cuda
def test_bench_times_onnxruntime_on_the_gpu_on_the_hosts_clock(fp32, tmp_path, monkeypatch):
    mcdeploy(
        monkeypatch, "bench", fp32, fp32, "--backend", "onnx-cuda", "--batch", 1, "--seconds", 1,
        "--json", tmp_path / "bench.json",
    )  # fmt: skip
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {row["timed"] for row in report["latencies"]} == {"host"}
    assert {runner["facts"]["provider"] for runner in report["runners"]} == {"cuda"}
    assert report["gpu"]


@pytest.mark.onnx_cuda
def test_a_bundle_is_served_by_the_cuda_provider_and_drains_on_sigterm(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "export"), *sys.path])}
    command = [sys.executable, "-m", "mcdeploy.cli", "serve", str(bundle), "--port", "0", "--provider", "cuda"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as it:
        killer = threading.Timer(120, it.kill)
        killer.start()
        try:
            port, seen = None, []
            for line in it.stdout:
                seen.append(line)
                if found := re.search(r"127\.0\.0\.1:(\d+)", line):
                    port = found[1]
                    break
            assert port, "".join(seen)
            batch = some_images(3)
            name = load_bundle(bundle).manifest.name
            asked = {
                "inputs": [
                    {"name": "image", "shape": list(batch.shape), "datatype": "FP32", "data": batch.ravel().tolist()}
                ]
            }
            base = f"http://127.0.0.1:{port}"
            meta = httpx.get(f"{base}/v2/models/{name}").json()
            asked["inputs"][0]["name"] = meta["inputs"][0]["name"]
            answer = httpx.post(f"{base}/v2/models/{name}/infer", json=asked, timeout=30).json()
            got = np.array(answer["outputs"][0]["data"], np.float32).reshape(3, -1)
            np.testing.assert_allclose(got, expected_logits(batch), atol=1e-4)
        finally:
            it.send_signal(signal.SIGTERM)
            rest = it.stdout.read()
            killer.cancel()
    assert it.returncode == 0, rest
