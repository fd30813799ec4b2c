"""A PyTorch runner answers what the module says, leaves the module and torch as they were, and never falls back."""

from __future__ import annotations

import copy
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mcruntime.cgroup import available_threads
from mcruntime.engine import Runner
from torch import nn

from mcdeploy.backends.pytorch import TorchRunner
from mcdeploy.errors import BackendError, InputError, ParityError


def images_of(batch, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, 6, 6)).astype(np.float32)


@pytest.fixture
def module():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 5))
    net[1].running_mean.fill_(0.3)
    return net.train()


@pytest.fixture
def no_compiler(monkeypatch):
    """torch.compile that compiles nothing and remembers what it was asked for."""
    asked = {}

    def fake_compile(model, **options):
        asked.update(options)
        return model

    monkeypatch.setattr(torch, "compile", fake_compile)
    return asked


def expected_logits(module, images):
    with torch.no_grad():
        return copy.deepcopy(module).eval()(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_answer_is_the_modules_in_evaluation_mode(module, batch):
    images = images_of(batch)
    with TorchRunner(module, name="net", threads=1) as runner:
        logits = runner.infer(images)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, expected_logits(module, images))


def test_the_module_keeps_its_mode_type_and_numbers(module):
    module.double()
    before = copy.deepcopy(module.state_dict())
    with TorchRunner(module, name="net", threads=1) as runner:
        assert runner.infer(images_of(2)).dtype == np.float32
    assert module.training
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_changing_the_module_after_entering_changes_no_answer(module):
    images = images_of(1)
    with TorchRunner(module, name="net", threads=1) as runner:
        before = runner.infer(images)
        nn.init.zeros_(module[-1].weight)
        np.testing.assert_array_equal(runner.infer(images), before)


def test_images_in_read_only_or_turned_memory_give_the_same_answer(module):
    images = images_of(2)
    locked = images.copy()
    locked.flags.writeable = False
    turned = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    with TorchRunner(module, name="net", threads=1) as runner, warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns, once a process, of memory that it must not write
        for same in (locked, turned):
            np.testing.assert_array_equal(runner.infer(same), runner.infer(images))


def test_inference_uses_the_threads_asked_for_and_leaving_restores_them(module):
    seen = []
    module[0].register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    with TorchRunner(module, name="one", threads=1) as one, TorchRunner(module, name="three", threads=3) as three:
        for runner in (one, three, one):
            runner.infer(images_of(1))
    assert seen == [1, 3, 1]
    assert torch.get_num_threads() == before


def test_leaving_after_an_error_restores_the_threads(module):
    before = torch.get_num_threads()
    with pytest.raises(InputError), TorchRunner(module, name="net", threads=before + 1) as runner:
        runner.infer(runner.infer(images_of(1)))  # the first call sets the threads, the second gets no images
    assert torch.get_num_threads() == before


def test_facts_tell_what_really_runs(module):
    with TorchRunner(module, name="net") as runner:
        facts = runner.facts()
    assert (facts["backend"], facts["mode"], facts["provider"], facts["precision"]) == (
        "pytorch",
        "eager",
        "cpu",
        "fp32",
    )
    assert facts["threads"] == str(available_threads())
    assert facts["torch"] == torch.__version__
    assert all(isinstance(value, str) for value in facts.values())


def test_a_torch_runner_has_all_that_a_runner_has(module):
    public = {name for name in vars(Runner) if not name.startswith("_") or name in ("__enter__", "__exit__")}
    assert public <= set(dir(TorchRunner(module, name="net")))
    assert TorchRunner(module, name="net").name == "net"


def test_compiled_means_one_whole_graph_for_every_shape(module, no_compiler):
    with TorchRunner(module, name="net", mode="compiled", threads=1) as runner:
        assert runner.facts()["mode"] == "compiled"
        np.testing.assert_array_equal(runner.infer(images_of(2)), expected_logits(module, images_of(2)))
    # Without fullgraph a graph break or too many shapes would run eagerly in silence.
    assert no_compiler == {"fullgraph": True, "dynamic": False}


@pytest.mark.parametrize("variable", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_compiled_is_refused_where_the_environment_switches_it_off(module, no_compiler, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(BackendError, match=f"asked for mode compiled.*unset .*{variable}"):
        TorchRunner(module, name="net", mode="compiled").__enter__()
    assert no_compiler == {}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("No working C++ compiler found.\nlots of detail", "No working C++ compiler found"),
        ("backend='inductor' raised:\nKeyError: 'conv'\nlots of detail", "backend='inductor' raised: KeyError: 'conv'"),
        ("backend='inductor' raised:", "backend='inductor' raised"),
    ],
)
def test_a_compiler_that_fails_is_a_sentence_with_advice(module, monkeypatch, said, words):
    def broken(model, **options):
        def call(images):
            raise RuntimeError(said)

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with (
        TorchRunner(module, name="net", mode="compiled") as runner,
        pytest.raises(BackendError, match=rf"compiled mode \({re.escape(words)}\); ask for mode eager$"),
    ):
        runner.infer(images_of(1))


def test_cuda_that_is_not_there_is_refused(module, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"net: asked for device cuda.*or ask for cpu"):
        TorchRunner(module, name="net", device="cuda").__enter__()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"mode": "fast"}, "unknown mode 'fast'"), ({"device": "tpu"}, "unknown device 'tpu'"), ({"threads": 0}, "got 0")],
)
def test_options_that_do_not_exist_are_refused(module, options, words):
    with pytest.raises(InputError, match=words):
        TorchRunner(module, name="net", **options)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (images_of(1).astype(np.float64), "expected float32 images, got float64"),
        (images_of(1).tolist(), "expected float32 images, got list"),
        (images_of(1)[0], r"expected images \[B, C, H, W\], got \[3, 6, 6\]"),
        (images_of(1)[:0], r"got \[0, 3, 6, 6\]"),
        (images_of(1) * np.float32(np.nan), "NaN or infinite"),
    ],
)
def test_images_of_the_wrong_kind_are_refused(module, images, words):
    with TorchRunner(module, name="net", threads=1) as runner, pytest.raises(InputError, match=words):
        runner.infer(images)


def test_images_that_the_module_cannot_take_are_a_sentence(module):
    images = np.zeros((2, 5, 6, 6), np.float32)
    with (
        TorchRunner(module, name="net", threads=1) as runner,
        pytest.raises(BackendError, match=r"net: PyTorch stopped at images \[2, 5, 6, 6\] in eager mode \(.*channels"),
    ):
        runner.infer(images)


def test_an_answer_that_is_not_finite_is_an_error(module):
    nn.init.constant_(module[-1].bias, float("nan"))
    with TorchRunner(module, name="net", threads=1) as runner, pytest.raises(ParityError, match="NaN or infinite"):
        runner.infer(images_of(1))


def test_an_answer_of_the_wrong_shape_is_an_error():
    with (
        TorchRunner(nn.Conv2d(3, 2, 3), name="net", threads=1) as runner,
        pytest.raises(ParityError, match=r"expected logits \[2, classes\], got \[2, 2, 4, 4\]"),
    ):
        runner.infer(images_of(2))


def test_a_runner_that_was_not_entered_or_was_left_does_not_answer(module):
    runner = TorchRunner(module, name="net", threads=1)
    with pytest.raises(RuntimeError, match="enter the runner"):
        runner.infer(images_of(1))
    with runner:
        runner.infer(images_of(1))
    with pytest.raises(RuntimeError, match="enter the runner"):
        runner.facts()


def test_on_the_cpu_there_is_no_device_clock(module):
    with TorchRunner(module, name="net", threads=1) as runner:
        assert runner.time_on_device(images_of(1)) is None


class PretendCuda:
    """Stands for torch.device("cuda") where there is none: says "cuda", computes on the CPU."""

    type = "cuda"


@pytest.fixture
def pretend_gpu(module, monkeypatch):
    """What a module on a pretended GPU did, in order; and the size of that GPU's L2 cache, to be changed."""
    done, properties = [], SimpleNamespace(L2_cache_size=1000)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def synchronize(self):
            done.append("wait for the event")

        def elapsed_time(self, end):
            assert end is not self
            return 1.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait for the GPU"))
    real_to = torch.Tensor.to

    def pretend_to(tensor, device, *args, **kwargs):
        if isinstance(device, PretendCuda):
            done.append("copy")
            return tensor
        return real_to(tensor, device, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", pretend_to)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    real_zero = torch.Tensor.zero_

    def pretend_zero(tensor):
        done.append(f"overwrite {tensor.nbytes} bytes")
        return real_zero(tensor)

    monkeypatch.setattr(torch.Tensor, "zero_", pretend_zero)
    module[0].register_forward_hook(lambda *_: done.append("model"))
    return done, properties


def test_device_time_is_between_two_events_around_the_model_alone(module, pretend_gpu, monkeypatch):
    done, _ = pretend_gpu
    with TorchRunner(module, name="net", threads=1) as runner:
        monkeypatch.setattr(runner, "_device", PretendCuda())
        assert runner.time_on_device(images_of(1)) == 1.25
        monkeypatch.undo()
    assert done == ["copy", "wait for the GPU", "record", "model", "record", "wait for the event"]


def cold_runner(module, monkeypatch):
    """A runner for a cold cache on the pretended GPU, which computes and keeps its buffers on the CPU."""
    runner = TorchRunner(module, name="net", device="cuda", threads=1, cold_l2=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    monkeypatch.setattr(runner, "_device", torch.device("cpu"))
    return runner


def test_for_a_cold_cache_twice_its_size_is_overwritten_and_waited_for_before_the_first_event(
    module, pretend_gpu, monkeypatch
):
    done, properties = pretend_gpu
    properties.L2_cache_size = 12_345
    with cold_runner(module, monkeypatch) as runner:
        monkeypatch.setattr(runner, "_device", PretendCuda())
        assert runner.facts()["l2"] == "cold"
        expected = ["copy", "overwrite 24690 bytes", "wait for the GPU", "record", "model", "record"]
        for _ in range(2):
            done.clear()
            assert runner.time_on_device(images_of(1)) == 1.25
            assert done == [*expected, "wait for the event"]
        done.clear()
        runner.infer(images_of(1))
        assert done == ["copy", "model"]
        monkeypatch.undo()


def test_a_gpu_that_does_not_say_how_large_its_cache_is_cannot_be_measured_cold(module, pretend_gpu, monkeypatch):
    pretend_gpu[1].L2_cache_size = 0
    with pytest.raises(BackendError, match="does not say how large its L2 cache is"):
        cold_runner(module, monkeypatch).__enter__()


def test_the_cpus_caches_are_not_said_to_be_cold(module):
    with pytest.raises(InputError, match="caches cannot be emptied"):
        TorchRunner(module, name="net", cold_l2=True)
    with TorchRunner(module, name="net", threads=1) as runner:
        assert "l2" not in runner.facts()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_the_answer_is_the_cpus_and_time_is_the_devices(module):
    images = images_of(4)
    tf32 = torch.backends.cudnn.allow_tf32
    with TorchRunner(module, name="net", device="cuda") as runner:
        np.testing.assert_allclose(runner.infer(images), expected_logits(module, images), atol=1e-5)
        assert runner.facts()["provider"] == "cuda"
        times_ms = [runner.time_on_device(images) for _ in range(20)]
        assert not torch.backends.cudnn.allow_tf32
    assert 0 < min(times_ms) < 100
    assert torch.backends.cudnn.allow_tf32 == tf32
