"""A TensorRT engine answers what the model says, refuses what it was not built for, and leaves nothing on the GPU.

No TensorRT runs here: the double in ``recording_tensorrt`` computes, from the addresses and at the moment that it was
told to.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from contextlib import ExitStack

import cuda.bindings
import numpy as np
import pytest
from cuda.bindings import runtime as real_cuda
from mcruntime.errors import BackendError, BundleError, InputError, MissingExtraError, ParityError
from mcruntime.gpu import Device
from mcruntime.tensorrt import EngineFacts, TensorRTRunner, check_fits, facts_path, in_words, read_engine
from recording_tensorrt import install
from tiny_onnx import expected_logits, some_images, write_model

from mcdeploy.backends.tensorrt import EngineOptions, build_engine
from mcdeploy.bench import DeviceTimer
from mcdeploy.targets import Target, open_runner

OPTIONS = EngineOptions(batches=(1, 2, 4))
HERE = Device(0, "NVIDIA L4", "8.9", "580.65.06 (CUDA 13.0)")


@pytest.fixture(params=["10.16", "11.4"])
def fakes(request, monkeypatch):
    return install(monkeypatch, request.param)


@pytest.fixture
def plan(fakes, tmp_path):
    """An engine of the tiny model, on a GPU where nothing is left over from building it."""
    path = tmp_path / "tiny.plan"
    build_engine(write_model(tmp_path / "tiny.onnx"), path, OPTIONS, precision="fp32")
    fakes[2].calls.clear()
    return path


def error_code():
    return real_cuda.cudaError_t.cudaErrorIllegalAddress


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_the_answer_is_the_models_at_every_batch_again_and_again(plan, cuda_graphs):
    with TensorRTRunner(plan, cuda_graphs=cuda_graphs) as runner:
        for seed, batch in enumerate((1, 2, 3, 4, 2, 1, 2)):
            images = some_images(batch, seed=seed)
            logits = runner.infer(images)
            np.testing.assert_allclose(logits, expected_logits(images), atol=1e-6)
            assert logits.dtype == np.float32


def test_an_answer_stays_when_the_next_one_is_computed(plan):
    with TensorRTRunner(plan) as runner:
        first = runner.infer(some_images(2, seed=1))
        runner.infer(some_images(2, seed=2))
    np.testing.assert_allclose(first, expected_logits(some_images(2, seed=1)), atol=1e-6)


def test_images_that_are_not_contiguous_give_the_same_answer(plan):
    images = some_images(2)
    turned = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    with TensorRTRunner(plan) as runner:
        np.testing.assert_array_equal(runner.infer(turned), runner.infer(images))


def test_each_batch_size_gets_one_context_and_one_graph_after_a_first_plain_run(plan, fakes):
    calls = fakes[2].calls
    with TensorRTRunner(plan) as runner:  # tuned for 2, so that is ready on entering
        for _ in range(3):
            for batch in (2, 3):
                runner.infer(some_images(batch))
        assert sum("create_execution_context" in call for call in calls) == 2
        assert sum("BeginCapture" in call for call in calls) == 2
        assert sum("GraphLaunch" in call for call in calls) == 6
        assert sum("execute_async_v3" in call for call in calls) == 4  # one plain, one captured, for each batch size


def test_without_cuda_graphs_nothing_is_captured(plan, fakes):
    calls = fakes[2].calls
    with TensorRTRunner(plan, cuda_graphs=False) as runner:
        runner.infer(some_images(2))
        runner.infer(some_images(2))
        assert runner.facts()["cuda graphs"] == "off"
    assert not any("Graph" in call or "Capture" in call for call in calls)
    assert sum("execute_async_v3" in call for call in calls) == 3


def test_contexts_are_let_go_before_the_memory_that_they_use(plan, fakes):
    fakes[2].contexts_at_free.clear()
    with TensorRTRunner(plan) as runner:
        runner.infer(some_images(1))
        assert len(fakes[2].contexts) == 2
    assert fakes[2].contexts_at_free == [0, 0, 0]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_everything_is_freed_on_leaving_and_the_runner_can_be_entered_again(plan, fakes, cuda_graphs):
    machine = fakes[2]
    runner = TensorRTRunner(plan, cuda_graphs=cuda_graphs)
    for _ in range(2):
        with runner:
            runner.infer(some_images(1))
            assert machine.alive
        assert machine.alive == {}
    with pytest.raises(RuntimeError, match="enter the runner before infer"):
        runner.infer(some_images(1))
    with pytest.raises(RuntimeError, match="enter the runner before asking"):
        runner.facts()


@pytest.mark.parametrize(
    "call", ["cudaSetDevice", "cudaStreamCreateWithFlags", "cudaEventCreate", "cudaMalloc", "cudaMallocHost",
             "cudaStreamSynchronize", "cudaStreamBeginCapture", "cudaGraphInstantiate"],
)  # fmt: skip
def test_a_cuda_call_that_fails_on_entering_is_named_and_nothing_is_left(plan, fakes, call):
    _, cuda, machine = fakes
    cuda.fail[call] = error_code()
    with pytest.raises(BackendError, match=r"CUDA could not .* \(cudaErrorIllegalAddress: an illegal memory access"):
        TensorRTRunner(plan).__enter__()
    assert machine.alive == {}


@pytest.mark.parametrize("call", ["cudaMemcpyAsync", "cudaGraphLaunch", "cudaStreamSynchronize"])
def test_a_cuda_call_that_fails_during_an_inference_is_an_error_not_an_answer(plan, fakes, call):
    with TensorRTRunner(plan) as runner:
        fakes[1].fail[call] = error_code()
        with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
            runner.infer(some_images(2))
        fakes[1].fail.clear()


@pytest.mark.parametrize("call", ["cudaEventRecord", "cudaEventSynchronize", "cudaEventElapsedTime"])
def test_a_clock_that_fails_is_an_error_not_a_time(plan, fakes, call):
    with TensorRTRunner(plan) as runner:
        fakes[1].fail[call] = error_code()
        with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
            runner.time_on_device(some_images(2))


def test_a_net_that_cannot_be_captured_says_so_and_nothing_is_left(plan, fakes):
    fake, _, machine = fakes
    fake.refuses_graphs = True
    with pytest.raises(
        BackendError, match=r"cannot be captured .*not permitted when stream.*ask for cuda_graphs=False"
    ):
        TensorRTRunner(plan).__enter__()
    assert machine.alive == {}
    with TensorRTRunner(plan, cuda_graphs=False) as runner:
        assert runner.infer(some_images(2)).shape == (2, 4)


def test_the_devices_time_is_between_two_events_around_the_launch_alone(plan, fakes):
    with TensorRTRunner(plan) as runner:
        assert isinstance(runner, DeviceTimer)
        fakes[2].calls.clear()
        assert runner.time_on_device(some_images(2)) == 1.25
    names = [call.split("(")[0].removeprefix("cuda") for call in fakes[2].calls]
    first, last = names.index("EventRecord"), len(names) - names[::-1].index("EventRecord") - 1
    assert names[first - 1] == "StreamSynchronize"  # the copy is done
    assert names[first : last + 2] == ["EventRecord", "GraphLaunch", "EventRecord", "EventSynchronize"]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_for_a_cold_cache_twice_its_size_is_overwritten_and_waited_for_before_the_first_event(plan, fakes, cuda_graphs):
    _, cuda, machine = fakes
    cuda.l2_bytes = 12_345
    with TensorRTRunner(plan, cold_l2=True, cuda_graphs=cuda_graphs) as runner:
        assert runner.facts()["l2"] == "cold"
        for _ in range(2):
            machine.calls.clear()
            assert runner.time_on_device(some_images(2)) == 1.25
            first = next(i for i, call in enumerate(machine.calls) if "EventRecord" in call)
            copy, flush, wait = machine.calls[first - 3 : first]
            assert "HostToDevice" in copy
            assert flush.startswith("cudaMemsetAsync(gpu")
            assert flush.endswith(", 0, 24690, stream0)")
            assert wait == "cudaStreamSynchronize(stream0)"
            assert sum("Memset" in call for call in machine.calls) == 1
        machine.calls.clear()
        np.testing.assert_allclose(runner.infer(some_images(2)), expected_logits(some_images(2)), atol=1e-6)
        assert not any("Memset" in call for call in machine.calls)
    assert machine.alive == {}


@pytest.mark.parametrize("cold_l2", [True, False])
def test_a_cold_cache_asked_of_a_target_reaches_a_given_engine_and_one_that_is_built_for_it(
    plan, tmp_path, monkeypatch, cold_l2
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for target in (Target("given", engine=plan), Target("built", onnx=tmp_path / "tiny.onnx")):
        with (
            ExitStack() as stack,
            open_runner(target, "tensorrt", stack, image_size=8, threads=1, cold_l2=cold_l2) as runner,
        ):
            assert runner.facts()["l2"] == ("cold" if cold_l2 else "warm")


def test_a_warm_cache_is_left_alone(plan, fakes):
    fakes[2].calls.clear()
    with TensorRTRunner(plan) as runner:
        assert runner.facts()["l2"] == "warm"
        runner.time_on_device(some_images(2))
    assert not any("Memset" in call or "DeviceGetAttribute" in call for call in fakes[2].calls)


def test_a_gpu_that_does_not_say_how_large_its_cache_is_cannot_be_measured_cold(plan, fakes):
    fakes[1].l2_bytes = 0
    with pytest.raises(BackendError, match="does not say how large its L2 cache is"):
        TensorRTRunner(plan, cold_l2=True).__enter__()
    assert fakes[2].alive == {}


@pytest.mark.parametrize("call", ["cudaDeviceGetAttribute", "cudaMemsetAsync"])
def test_a_cache_that_cannot_be_emptied_is_an_error_not_a_time(plan, fakes, call):
    fakes[1].fail[call] = error_code()
    with (
        pytest.raises(BackendError, match=r"L2 cache \(cudaErrorIllegalAddress"),
        TensorRTRunner(plan, cold_l2=True) as runner,
    ):
        runner.time_on_device(some_images(2))
    fakes[1].fail.clear()


@pytest.mark.parametrize("batch", [1, 5])
def test_a_batch_outside_the_profile_is_refused_with_what_fits(tmp_path, fakes, batch):
    build_engine(
        write_model(tmp_path / "m.onnx"), tmp_path / "m.plan", EngineOptions(batches=(2, 2, 4)), precision="fp32"
    )
    with (
        TensorRTRunner(tmp_path / "m.plan") as runner,
        pytest.raises(InputError, match=f"takes batches of 2 to 4, got {batch}"),
    ):
        runner.infer(some_images(batch))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 8, 8)), "expected float32 images, got float64"),
        (np.zeros((1, 3, 8, 9), np.float32), r"expected images \[B, 3, 8, 8\], got \[1, 3, 8, 9\]"),
        (np.zeros((3, 8, 8), np.float32), r"expected images \[B, 3, 8, 8\], got \[3, 8, 8\]"),
        (np.zeros((0, 3, 8, 8), np.float32), r"got \[0, 3, 8, 8\]"),
        (np.full((1, 3, 8, 8), np.nan, np.float32), "NaN or infinite"),
    ],
)
def test_images_that_do_not_fit_are_refused(plan, images, message):
    with TensorRTRunner(plan) as runner, pytest.raises(InputError, match=message):
        runner.infer(images)


def test_an_output_that_is_not_finite_is_an_error_not_an_answer(fakes, tmp_path):
    bias = np.array([0, np.inf, 0, 0], dtype=np.float32)
    build_engine(write_model(tmp_path / "m.onnx", bias=bias), tmp_path / "m.plan", OPTIONS, precision="fp32")
    with TensorRTRunner(tmp_path / "m.plan") as runner, pytest.raises(ParityError, match="NaN or infinite"):
        runner.infer(some_images(1))


def test_threads_may_infer_at_the_same_time(plan):
    answers = {}
    with TensorRTRunner(plan) as runner:
        workers = [
            threading.Thread(
                target=lambda seed=seed: answers.update({seed: runner.infer(some_images(1 + seed % 4, seed=seed))})
            )
            for seed in range(12)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(answers) == 12
    for seed, logits in answers.items():
        np.testing.assert_allclose(logits, expected_logits(some_images(1 + seed % 4, seed=seed)), atol=1e-6)


def test_every_thread_that_infers_chooses_the_gpu_first(plan, fakes):
    with TensorRTRunner(plan) as runner:
        fakes[2].calls.clear()
        worker = threading.Thread(target=lambda: runner.infer(some_images(1)))
        worker.start()
        worker.join()
        assert fakes[2].calls[0] == "cudaSetDevice(0)"


def test_facts_tell_what_really_runs(plan, fakes):
    with TensorRTRunner(plan, name="net") as runner:
        facts = runner.facts()
        assert runner.name == "net"
    assert facts["backend"] == facts["provider"] == "tensorrt"
    assert facts["precision"] == "fp32"
    assert facts["layers"] == "1 fp32"
    assert facts["tf32"] == "off"
    assert facts["batches"] == "1 to 4"
    assert facts["gpu"] == "NVIDIA L4"
    assert facts["tensorrt"] == fakes[0].__version__
    assert all(isinstance(value, str) for value in facts.values())
    assert in_words({}) == "none"


def test_the_precision_is_the_engines_and_not_what_the_facts_beside_it_claim(plan):
    text = facts_path(plan).read_text()
    facts_path(plan).write_text(text.replace('"precision": "fp32"', '"precision": "fp16"'))
    with TensorRTRunner(plan) as runner:
        assert runner.facts()["precision"] == "fp32"


# ---------------------------------------------------------------------------------------------- engines from elsewhere


def facts_of(**changes):
    fields = {
        "tensorrt": "11.4.0.106", "gpu": "NVIDIA L4", "compute_capability": "8.9", "driver": "580.65.06 (CUDA 13.0)",
        "onnx_sha256": "0" * 64, "plan_sha256": "0" * 64, "precision": "fp32", "layers": {"fp32": 1},
        "batches": (1, 2, 4), "workspace_bytes": None, "optimization_level": 3, "tf32": False,
        "version_compatible": False, "hardware_compatible": "none",
    }  # fmt: skip
    return EngineFacts(**(fields | changes))


def refusal(tmp_path, facts, *, tensorrt="11.4.0.106", device=HERE, lean_runtime=False):
    """What ``check_fits`` says of an engine, None when it takes it."""
    try:
        check_fits(facts, tmp_path / "a.plan", tensorrt, device, lean_runtime=lean_runtime)
    except BackendError as error:
        return str(error)
    return None


def test_an_engine_of_this_machine_is_taken(tmp_path):
    assert refusal(tmp_path, facts_of()) is None


def test_an_engine_of_another_tensorrt_is_refused_with_both_versions(tmp_path):
    said = refusal(tmp_path, facts_of(), tensorrt="11.5.0.1")
    assert "was built by TensorRT 11.4.0.106, here is 11.5.0.1" in said
    assert "install tensorrt==11.4.0.106" in said


@pytest.mark.parametrize(
    ("built", "here", "lean", "taken"),
    [
        ("10.12.0.36", "11.4.0.106", True, True),
        ("11.0.0.1", "11.4.0.106", True, True),
        ("11.4.0.106", "11.4.0.106", False, True),
        ("11.0.0.1", "11.4.0.106", False, "lean runtime library"),
        ("11.5.0.1", "11.4.0.106", True, "later versions of its own"),
        ("9.1.0.1", "11.4.0.106", True, "the next major version only"),
    ],
)
def test_a_version_compatible_engine_runs_on_later_versions_with_its_lean_runtime(tmp_path, built, here, lean, taken):
    said = refusal(tmp_path, facts_of(tensorrt=built, version_compatible=True), tensorrt=here, lean_runtime=lean)
    assert (said is None) if taken is True else (taken in said)


@pytest.mark.parametrize(
    ("device", "level", "taken"),
    [
        (
            Device(0, "NVIDIA T4", "7.5", "x"),
            "none",
            "was built on NVIDIA L4 (compute 8.9) for the same GPU type, here",
        ),
        (Device(0, "NVIDIA L40", "8.9", "x"), "none", "here is NVIDIA L40 (compute 8.9)"),
        (Device(0, "NVIDIA L40", "8.9", "x"), "same-compute-capability", True),
        (Device(0, "NVIDIA A10", "8.6", "x"), "same-compute-capability", "for compute 8.9, here is NVIDIA A10"),
        (Device(0, "NVIDIA A10", "8.6", "x"), "ampere-plus", True),
        (Device(0, "NVIDIA B200", "10.0", "x"), "ampere-plus", True),
        (Device(0, "NVIDIA T4", "7.5", "x"), "ampere-plus", "for compute 8.0 or later, here is NVIDIA T4"),
        (Device(1, "NVIDIA L4", "8.9", "another driver"), "none", True),
    ],
)
def test_an_engine_of_another_gpu_is_refused_with_both_names_unless_it_was_built_for_it(tmp_path, device, level, taken):
    said = refusal(tmp_path, facts_of(hardware_compatible=level), device=device)
    assert (said is None) if taken is True else (taken in said)


def test_the_runner_holds_the_facts_against_the_machine(plan, monkeypatch):
    install(monkeypatch, "11.4", gpu="NVIDIA T4", capability=(7, 5))
    with pytest.raises(BackendError, match=r"here is (11\.4\.0\.106|NVIDIA T4)"):
        TensorRTRunner(plan).__enter__()


def test_the_lean_runtime_is_loaded_for_an_older_engine_and_code_in_the_plan_is_never_allowed(tmp_path, monkeypatch):
    options = EngineOptions(batches=(1, 2, 4), version_compatible=True)
    install(monkeypatch, "10.16")
    build_engine(write_model(tmp_path / "m.onnx"), tmp_path / "m.plan", options, precision="fp32")
    _, _, machine = install(monkeypatch, "11.4")
    # The double's engine says what its own version's inspector says, so the answer is all that is looked at here.
    with TensorRTRunner(tmp_path / "m.plan", lean_runtime="/lib/libnvinfer_lean.so.10") as runner:
        np.testing.assert_allclose(runner.infer(some_images(2)), expected_logits(some_images(2)), atol=1e-6)
    assert "Runtime.load_runtime('libnvinfer_lean.so.10')" in machine.calls
    assert not any("engine_host_code_allowed" in call for call in machine.calls)


def test_what_tensorrt_logs_on_refusing_a_plan_is_quoted(plan, fakes):
    fakes[0].refuses_plan = "The engine plan file is not compatible with this version of TensorRT"
    with pytest.raises(BackendError, match=r"refuses the engine \(The engine plan file is not compatible"):
        TensorRTRunner(plan).__enter__()
    assert fakes[2].alive == {}


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda plan: plan.unlink(), r"tiny\.plan: no such file"),
        (lambda plan: facts_path(plan).unlink(), r"tiny\.plan\.json: no such file"),
        (lambda plan: plan.write_bytes(plan.read_bytes() + b"."), "is not the engine that tiny.plan.json describes"),
        (lambda plan: facts_path(plan).write_text("no json"), r"tiny\.plan\.json: the file: Invalid JSON"),
        (lambda plan: facts_path(plan).write_text(facts_path(plan).read_text().replace("gpu", "gpus")), "gpu"),
    ],
)
def test_a_plan_without_its_facts_or_with_others_never_reaches_tensorrt(plan, fakes, damage, says):
    damage(plan)
    with pytest.raises(BundleError, match=says) as caught:
        TensorRTRunner(plan).__enter__()
    assert "\n" not in str(caught.value)
    assert not any("deserialize" in call for call in fakes[2].calls)


def test_facts_are_read_back_as_they_were_written(tmp_path):
    plan = tmp_path / "a.plan"
    plan.write_bytes(b"plan")
    facts = facts_of(plan_sha256=hashlib.sha256(b"plan").hexdigest(), workspace_bytes=5)
    facts_path(plan).write_text(facts.model_dump_json())
    assert read_engine(plan) == (b"plan", facts)


def test_without_cuda_python_the_extra_is_named(plan, monkeypatch):
    monkeypatch.delattr(cuda.bindings, "runtime")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingExtraError, match=r"cuda-python.*pip install 'mcdeploy\[gpu\]'"):
        TensorRTRunner(plan).__enter__()
