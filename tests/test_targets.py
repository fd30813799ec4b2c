"""What is named becomes what runs: engines in TensorRT alone, twins under two names, types as the file has them."""

from __future__ import annotations

import functools
import logging
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from mcruntime.engine import OnnxRunner
from onnx import TensorProto, helper
from tiny_onnx import BIAS, WEIGHT, some_images, write_graph, write_model

from mcdeploy import targets
from mcdeploy.bench import compare_latency
from mcdeploy.errors import BackendError, InputError
from mcdeploy.targets import Target, measure, measure_over_images, open_file, pairs_of, profile_targets, runner_name


def names(found):
    return [runner_name(*pair) for pair in found]


@pytest.fixture
def plain(tmp_path):
    return Target("B", onnx=write_model(tmp_path / "tiny.onnx"), image_size=8)


@pytest.fixture
def engine(tmp_path):
    return Target("B@tensorrt-fp16", engine=tmp_path / "engine.plan", image_size=8)


# ------------------------------------------------------------------------------------------------- what runs on what


def test_an_engine_runs_on_tensorrt_alone_and_a_file_on_everything(plain, engine):
    found = names(pairs_of([plain, engine], ["onnx", "tensorrt"]))
    assert found == ["B [onnx]", "B [tensorrt]", "B@tensorrt-fp16 [tensorrt]"]


@pytest.mark.parametrize("backends", [["onnx"], ["onnx-tensorrt", "openvino"]])
def test_an_engine_without_tensorrt_is_refused(plain, engine, backends):
    words = "B@tensorrt-fp16: is a TensorRT engine; ask for --backend tensorrt"
    with pytest.raises(BackendError, match=words):
        measure([plain, engine], backends, [1], seconds=0.0, threads=1)
    if backends == ["onnx"]:
        with pytest.raises(BackendError, match=words):
            profile_targets([engine], backends, 1, threads=1)


def test_an_unknown_backend_is_refused(plain):
    with pytest.raises(InputError, match="unknown backend 'abacus'"):
        pairs_of([plain], ["abacus"])


def test_twins_are_numbered_and_never_meet_a_name_that_is_taken(plain):
    other = Target("B (2)", onnx=plain.onnx, image_size=8)
    assert names(pairs_of([plain, other, plain, plain], ["onnx"])) == [
        "B [onnx]", "B (2) [onnx]", "B (3) [onnx]", "B (4) [onnx]",
    ]  # fmt: skip
    assert names(pairs_of([plain, plain], ["onnx", "openvino"])) == [
        "B [onnx]", "B [openvino]", "B (2) [onnx]", "B (2) [openvino]",
    ]  # fmt: skip


def test_a_model_is_measured_and_profiled_against_itself(plain):
    report = measure([plain, plain], ["onnx"], [1], seconds=0.0, threads=1)
    assert [row.runner for row in report.latencies] == ["B [onnx]", "B (2) [onnx]"]
    assert [runner.facts["precision"] for runner in report.runners] == ["fp32", "fp32"]
    profiles = profile_targets([plain, plain], ["onnx"], 1, threads=1)
    assert [profile.name for profile in profiles] == ["B [onnx]", "B (2) [onnx]"]


def test_a_model_is_measured_against_itself_over_images():
    from test_bench_images import Validation
    from tiny_dynamic import X, two_ways

    from mcdeploy.data import Loaders

    class How:
        image_size = 16

    target = Target("net", module=two_ways(X), image_size=16)
    loaders = Loaders(None, Validation(), ["a"], How())  # type: ignore[arg-type]
    report = measure_over_images([target, target], ["pytorch"], loaders, 4, threads=1, rounds=1)
    assert {row.runner: row.wirings for row in report.rows} == {
        "net, all open [pytorch]": None,
        "net [pytorch]": 2,
        "net, all open (2) [pytorch]": None,
        "net (2) [pytorch]": 2,
    }


# ----------------------------------------------------------------------------------------------- before the measuring


@pytest.mark.parametrize(
    ("models", "batches", "words"),
    [
        (("B", "other"), [1], r"the baseline holds no other \[onnx\] at batch 1"),
        (("B", "B"), [1, 2], r"the baseline holds no B \(2\) \[onnx\] at batch 2"),
        (("other", "B"), [1], r"the baseline's ratios are to B \[onnx\], this report's to other \[onnx\]"),
        (("B",), [1], "at least two runners"),
    ],
)
def test_a_baseline_of_other_models_is_refused_before_anything_is_opened(plain, monkeypatch, models, batches, words):
    baseline = measure([plain, plain], ["onnx"], [1], seconds=0.0, threads=1)

    def open_nothing(*arguments, **options):
        raise AssertionError("nothing may be opened for a comparison that cannot be made")

    monkeypatch.setattr(targets, "open_runner", open_nothing)
    named = [Target(name, onnx=plain.onnx, image_size=8) for name in models]
    with pytest.raises(InputError, match=words):
        measure(named, ["onnx"], batches, seconds=0.0, threads=1, baseline=baseline)


# ------------------------------------------------------------------------ types in ONNX Runtime's TensorRT provider


def info(name, *shape):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def write_fp16(path):
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
        helper.make_node("Cast", ["features"], ["halves"], to=TensorProto.FLOAT16),
        helper.make_node("Gemm", ["halves", "weight", "bias"], ["answers"], transB=1),
        helper.make_node("Cast", ["answers"], ["logits"], to=TensorProto.FLOAT),
    ]
    weights = {"weight": WEIGHT.astype(np.float16), "bias": BIAS.astype(np.float16)}
    return write_graph(path, nodes, [info("image", "batch", 3, 8, 8)], [info("logits", "batch", 4)], weights)


def write_int8(path):
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
        helper.make_node("QuantizeLinear", ["features", "scale", "zero"], ["quantised"]),
        helper.make_node("DequantizeLinear", ["quantised", "scale", "zero"], ["input"]),
        helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["matrix"]),
        helper.make_node("Gemm", ["input", "matrix", "bias"], ["logits"], transB=1),
    ]
    weights = {"weight": (WEIGHT * 50).astype(np.int8), "bias": BIAS, "scale": np.float32(0.02), "zero": np.int8(0)}
    return write_graph(path, nodes, [info("image", "batch", 3, 8, 8)], [info("logits", "batch", 4)], weights)


@pytest.mark.parametrize(("write", "types"), [(write_model, "fp32"), (write_fp16, "fp16"), (write_int8, "int8")])
def test_the_tensorrt_provider_may_use_the_types_of_the_file_and_the_facts_do_not_claim_more(
    tmp_path, monkeypatch, write, types
):
    pytest.importorskip("pynvml")
    from test_gpu_state import NOT_SUPPORTED, GpuWatch, double

    asked = []

    class Pretended(OnnxRunner):
        """On the CPU, but says what the provider of that name would say."""

        def __init__(self, path, *, provider, **options):
            asked.append((provider, options["types"]))
            super().__init__(path, **options)

        def facts(self):
            return super().facts() | {"provider": "tensorrt"}

    monkeypatch.setattr(targets, "OnnxRunner", Pretended)
    nvml = double(nvmlDeviceGetTotalEnergyConsumption=NOT_SUPPORTED)
    monkeypatch.setattr(targets, "GpuWatch", functools.partial(GpuWatch, nvml=nvml))
    monkeypatch.setattr(targets, "compare_latency", functools.partial(compare_latency, warmup_seconds=0.0))
    target = Target("B", onnx=write(tmp_path / "model.onnx"), image_size=8)
    report = measure([target], ["onnx-tensorrt"], [1], seconds=0.0, threads=1)
    assert asked == [("tensorrt", types)]
    assert report.runners[0].facts["precision"] == f"{types}, not readable from the engine"


def test_the_other_providers_are_told_no_types(plain, tmp_path):
    target = Target("B", onnx=write_fp16(tmp_path / "half.onnx"), image_size=8)
    with (
        ExitStack() as stack,
        targets.open_runner(target, "onnx", stack, image_size=8, threads=1) as runner,
    ):
        assert runner.infer(some_images(2)).shape == (2, 4)
        assert "types allowed" not in runner.facts()


# --------------------------------------------------------------------------------------------------- while it is built


def test_the_building_of_an_engine_reports_how_far_it_is(plain, tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings")
    from recording_tensorrt import install

    install(monkeypatch, "10.16")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = []
    with ExitStack() as stack:
        targets.open_runner(
            plain, "tensorrt", stack, image_size=8, threads=1, progress=lambda what, share: told.append(share)
        )
    assert told
    assert told == sorted(told)
    assert 0 <= told[0] <= told[-1] <= 1


def test_the_bench_shows_the_building_of_its_engine(plain, monkeypatch):
    shown = []

    class Bar:
        def __init__(self, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def add_task(self, what, total):
            return 7

        def update(self, task, description, completed):
            shown.append((task, description, completed))

    def build(target, backend, stack, *, progress, **options):
        progress("building", 0.25)
        raise BackendError("no further")

    monkeypatch.setattr(targets, "Progress", Bar)
    monkeypatch.setattr(targets, "open_runner", build)
    with pytest.raises(BackendError, match="no further"):
        measure([plain], ["tensorrt"], [1], seconds=0.0, threads=1)
    assert shown == [(7, "building", 0.25)]


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_truncated_program_is_one_sentence_without_torchs_traceback(tmp_path):
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    said = []

    class Listening(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    logger, handler = logging.getLogger("torch.export"), Listening()
    logger.addHandler(handler)
    try:
        with pytest.raises(InputError, match=r"net\.pt2: not a complete ExportedProgram"):
            open_file(str(path))
        assert said == []
        logger.warning("others are heard again")
        assert said == ["others are heard again"]
    finally:
        logger.removeHandler(handler)


def test_the_int8_file_for_cpus_is_not_offered_to_tensorrt(tmp_path):
    from contextlib import ExitStack

    import numpy as np
    from onnx import TensorProto, helper
    from tiny_onnx import write_graph

    from mcdeploy.errors import BackendError
    from mcdeploy.targets import Target, open_runner

    def file(zero):
        nodes = [
            helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["back"]),
            helper.make_node("Flatten", ["back"], ["logits"]),
        ]
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 2, 2])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 12])
        weights = {"scale": np.array(0.1, np.float32), "zero": zero}
        return write_graph(tmp_path / f"{zero.dtype}.onnx", nodes, [image], [logits], weights)

    with ExitStack() as stack:
        cpu = Target("cpu", onnx=file(np.array(3, np.uint8)))
        with pytest.raises(BackendError, match="is the one for CPUs, which TensorRT refuses"):
            open_runner(cpu, "onnx-tensorrt", stack, image_size=2, threads=1)
        signed = Target("signed", onnx=file(np.array(0, np.int8)))
        open_runner(signed, "onnx-tensorrt", stack, image_size=2, threads=1)
        open_runner(cpu, "onnx", stack, image_size=2, threads=1)
