import dataclasses
import hashlib
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tiny_if import write_if
from tiny_models import images, wired_resnet
from tiny_onnx import some_images, write_graph

import mcdeploy
from mcdeploy.backbones.multibranch import MultiBranchNet
from mcdeploy.backends import onnx as exporter
from mcdeploy.backends.fp16 import hash_images, run_all, save_model
from mcdeploy.backends.int8 import UNREAD, _quantise_behind, to_int8
from mcdeploy.backends.onnx import export_onnx
from mcdeploy.backends.readback import check_written, read_facts, running_types
from mcdeploy.compile.certify import scramble
from mcdeploy.errors import AccuracyError, BackendError, InputError

FLOAT = TensorProto.FLOAT


@pytest.fixture(scope="module")
def wired(tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "wired.onnx"
    export_onnx(mcdeploy.compile_model(wired_resnet(fan_in=2), images(7, 16)), path, images(2, 16))
    return path


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    torch.manual_seed(0)
    model = MultiBranchNet(num_modules=(2, 1), num_branches=4, width=4, channels=16)
    scramble(model)
    path = tmp_path_factory.mktemp("int8") / "grouped.onnx"
    export_onnx(mcdeploy.compile_model(model.eval(), images(7, 16)), path, images(2, 16))
    return path


class SameAs:
    """Top-1 on images whose labels are what the float32 file says: its own top-1 is 1."""

    def __init__(self, source, images_BCHW):
        self.images, self.labels = images_BCHW, run_all(str(source), images_BCHW).argmax(1)
        self.calls = 0

    def __call__(self, path):
        self.calls += 1
        return float((run_all(str(path), self.images).argmax(1) == self.labels).mean())


def quantise(source, target, *, calibration=None, top1_of=lambda path: 1.0, **options):
    calibration = images(16, 16, seed=1).numpy() if calibration is None else calibration
    options = {"baseline_top1": 1.0, "max_top1_drop": 0.1, **options}
    return to_int8(source, target, calibration, top1_of=top1_of, **options)


def scale_of(ratio):
    """A measurement that always finds this ratio, and notes what it was given."""

    def measure(first, second, images_BCHW):
        runs = running_types(first), running_types(second)
        answers = run_all(str(first), images_BCHW), run_all(str(second), images_BCHW)
        measure.seen.append((runs, answers, images_BCHW))
        return ratio, ratio - 0.01, ratio + 0.01

    measure.seen = []
    return measure


def outlier(path):
    """Six convolutions; between the third and the fourth one channel is 3000 times the others, and worth as much."""
    rng = np.random.default_rng(0)
    kernels = [rng.normal(0, 0.4, (8, 3 if i == 0 else 8, 3, 3)).astype(np.float32) for i in range(6)]
    kernels[2][0] *= 3000
    kernels[3][:, 0] /= 3000
    nodes, value = [], "images"
    for i in range(6):
        nodes.append(helper.make_node("Conv", [value, f"w{i}"], [f"c{i}"], f"conv{i}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"], f"relu{i}"))
        value = f"r{i}"
    nodes += [
        helper.make_node("GlobalAveragePool", [value], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "head"], ["logits"], "gemm"),
    ]
    weights = {f"w{i}": kernel for i, kernel in enumerate(kernels)}
    weights["head"] = rng.normal(0, 1, (8, 12)).astype(np.float32)
    weights["head"] -= weights["head"].mean(1, keepdims=True)
    return write_graph(
        path,
        nodes,
        [helper.make_tensor_value_info("images", FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", 12])],
        weights,
    )


def test_a_wired_net_runs_in_int8_from_end_to_end_residual_additions_too(tmp_path, wired):
    calibration = images(16, 16, seed=1).numpy()
    top1_of = SameAs(wired, images(64, 16, seed=2).numpy())
    report = quantise(wired, tmp_path / "q.onnx", calibration=calibration, top1_of=top1_of, max_top1_drop=0.25)
    before, after = read_facts(wired).nodes, read_facts(tmp_path / "q.onnx")
    assert report.file == after
    assert after.nodes["Conv"] == {"int8": before["Conv"]["fp32"]}
    assert after.nodes["Gemm"] == {"int8": 1}
    assert (after.opset, after.batch, after.inputs, after.outputs) == (
        20,
        "batch",
        {"images": "fp32"},
        {"logits": "fp32"},
    )
    assert report.residual_adds == (before["Add"]["fp32"], before["Add"]["fp32"])
    assert report.running["QLinearConv"] == {"int8": before["Conv"]["fp32"]}
    assert report.running["QLinearAdd"] == {"int8": before["Add"]["fp32"]}
    assert report.running == running_types(tmp_path / "q.onnx")
    assert not {"Conv", "FusedConv", "Add", "Relu"} & set(report.running)
    assert report.top1 == top1_of(tmp_path / "q.onnx") >= 0.75
    assert (report.excluded, report.sensitivity, report.attempts) == ((), (), ((0, report.top1),))
    assert {row.runs_in for row in report.layers} == {"int8"}
    assert report.calibration == hash_images(calibration)
    assert json.loads(json.dumps(report.to_json()))["file"]["precision"] == "int8"


def test_weights_have_one_scale_a_channel_unless_asked_otherwise(tmp_path, wired):
    for per_channel in (True, False):
        quantise(wired, tmp_path / "q.onnx", per_channel=per_channel)
        model = onnx.load(tmp_path / "q.onnx")
        weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        sizes = {
            weights[node.input[1]].size == weights[node.input[0]].shape[0]
            for node in model.graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in weights and weights[node.input[0]].ndim == 4
        }
        assert sizes == {per_channel}


def test_the_same_file_and_images_give_the_same_bytes(tmp_path, wired):
    hashes = set()
    for name in ("a.onnx", "b.onnx"):
        quantise(wired, tmp_path / name)
        hashes.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(hashes) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_other_calibration_images_give_other_ranges(tmp_path, wired):
    first = quantise(wired, tmp_path / "a.onnx")
    second = quantise(wired, tmp_path / "b.onnx", calibration=3 * images(16, 16, seed=1).numpy())
    assert first.calibration != second.calibration
    assert (tmp_path / "a.onnx").read_bytes() != (tmp_path / "b.onnx").read_bytes()


def test_groups_that_are_slower_in_int8_stay_float32_and_really_run_in_it(tmp_path, grouped):
    measure = scale_of(1.3)
    report = quantise(grouped, tmp_path / "q.onnx", measure=measure)
    groups = {node for choice in report.groups for node in choice.nodes}
    assert groups
    assert {row.node for row in report.layers if row.runs_in == "fp32"} == groups
    assert {row.why for row in report.layers if row.node in groups} == {"in groups, and not clearly faster in int8"}
    assert report.float_nodes == groups
    check_written(tmp_path / "q.onnx", opset=20, precision="int8", allowed=report.float_nodes)
    with pytest.raises(BackendError, match=r"asked for int8, .* \(fp32\), .* with no reason on record"):
        check_written(tmp_path / "q.onnx", opset=20, precision="int8")
    # not again quantised by ONNX Runtime: what it runs in float32 is what was left out, no more and no less
    floats = sum(kinds.get("fp32", 0) for op, kinds in report.running.items() if op in ("Conv", "FusedConv"))
    assert floats == len(groups)
    expected = run_all(str(grouped), images(16, 16, seed=1).numpy())
    actual = run_all(str(tmp_path / "q.onnx"), images(16, 16, seed=1).numpy())
    assert np.abs(expected - actual).max() < 0.2 * np.abs(expected).max()


def test_layers_that_onnx_runtime_quantises_again_are_an_error(tmp_path, grouped, monkeypatch):
    """What happens without one scale a channel before them: the runtime brings back what was left out."""
    monkeypatch.setattr("mcdeploy.backends.int8._keep_from_requantising", lambda model, names: None)
    with pytest.raises(BackendError, match=r"10 .* of the file are int8, but ONNX Runtime runs 13 in int8"):
        quantise(grouped, tmp_path / "q.onnx", measure=scale_of(1.3))
    assert not (tmp_path / "q.onnx").exists()


def test_groups_that_are_not_slower_are_quantised(tmp_path, grouped):
    report = quantise(grouped, tmp_path / "q.onnx", measure=scale_of(0.8))
    assert [choice.ratio[0] for choice in report.groups] == [0.8] * len(report.groups)
    assert read_facts(tmp_path / "q.onnx").nodes["Conv"].keys() == {"int8"}
    assert report.running.keys() >= {"QLinearConv"}
    assert not {"Conv", "FusedConv"} & report.running.keys()


def test_what_is_timed_is_the_layer_in_float32_and_in_int8_between_int8_neighbours(tmp_path, grouped):
    measure = scale_of(0.8)
    report = quantise(grouped, tmp_path / "q.onnx", measure=measure)
    assert len(measure.seen) == len(report.groups)
    assert [len(choice.nodes) for choice in report.groups] == [2, 1]  # the two that are alike are timed once
    for (high, low), (before, after), noise in measure.seen:
        assert sum(kinds["fp32"] for op, kinds in high.items() if op in ("Conv", "FusedConv")) == 1
        assert "QLinearConv" not in high
        assert low["QLinearConv"] == {"int8": 1}
        assert high["QuantizeLinear"] == {"int8": 2}  # before and behind
        assert len(noise) == 1
        assert np.abs(before).max() > 0
        assert np.abs(before - after).max() < 0.1 * np.abs(before).max()


def answers(*ratios):
    """A measurement that finds these ratios, one after the other, and counts how often it was asked."""

    def measure(first, second, images_BCHW):
        measure.asked += 1
        return ratios[(measure.asked - 1) % len(ratios)]

    measure.asked = 0
    return measure


@pytest.mark.parametrize(
    ("ratios", "asked", "quantised"),
    [
        ([(0.95, 0.9, 1.0)], 1, True),  # clear at once
        ([(1.05, 1.01, 1.1)], 1, False),
        ([(0.9, 0.7, 1.1), (0.95, 0.92, 0.98), (2.0, 1.9, 2.1)], 2, True),  # clear the second time
        ([(0.9, 0.7, 1.1), (0.95, 0.7, 1.2), (1.1, 1.05, 1.2)], 3, False),
        ([(0.99, 0.9, 1.1), (0.89, 0.7, 1.2), (0.85, 0.6, 1.2)], 3, True),  # never clear: the median is 0.89
        ([(0.85, 0.7, 1.1), (0.95, 0.7, 1.2), (0.99, 0.6, 1.2)], 3, False),  # never clear: the median is 0.95
    ],
)
def test_an_unclear_time_is_taken_again_and_then_has_to_be_clearly_faster(tmp_path, grouped, ratios, asked, quantised):
    measure = answers(*ratios[:asked])
    report = quantise(grouped, tmp_path / "q.onnx", measure=measure)
    assert measure.asked == asked * len(report.groups)
    assert {choice.quantised for choice in report.groups} == {quantised}
    assert {row.runs_in for row in report.layers if "groups" in row.why or row.runs_in == "fp32"} == (
        set() if quantised else {"fp32"}
    )


def test_the_report_holds_no_time_unless_asked_for_it(tmp_path, grouped):
    told = []
    for ratio in (1.3, 1.7):
        report = quantise(grouped, tmp_path / "q.onnx", measure=scale_of(ratio))
        told.append(json.dumps(report.to_json()))
        with_times = report.to_json(with_times=True)
        assert [choice["ratio"][0] for choice in with_times["groups"]] == [ratio] * len(report.groups)
        for choice in with_times["groups"]:
            del choice["ratio"]
        assert json.dumps(with_times) == told[-1]
    assert told[0] == told[1]
    assert json.loads(told[0])["groups"]


def test_groups_that_nobody_timed_stay_float32_and_say_so(tmp_path, grouped):
    report = quantise(grouped, tmp_path / "q.onnx")
    assert all(choice.ratio is None and not choice.quantised for choice in report.groups)
    reasons = {row.why for row in report.layers if row.runs_in == "fp32"}
    assert reasons == {"in groups, and its int8 time was not measured"}


def test_the_layers_beside_a_huge_channel_are_left_out_and_the_floor_holds(tmp_path):
    source, calibration = outlier(tmp_path / "m.onnx"), some_images(32, 8)
    top1_of = SameAs(source, some_images(200, 8, seed=5))
    report = quantise(source, tmp_path / "q.onnx", calibration=calibration, top1_of=top1_of, max_top1_drop=0.2)
    assert report.attempts[0][1] < 0.6
    assert set(report.excluded) == {"conv2", "conv3"}
    assert {row.node for row in report.sensitivity[:2]} == {"conv2", "conv3"}
    assert [row.snr_db for row in report.sensitivity] == sorted(row.snr_db for row in report.sensitivity)
    assert report.top1 == top1_of(tmp_path / "q.onnx") >= 0.8
    assert {row.node: row.why for row in report.layers if row.runs_in == "fp32"} == dict.fromkeys(
        ("conv2", "conv3"), "left out to hold the accuracy floor"
    )
    assert report.file.nodes["Conv"] == {"fp32": 2, "int8": 4}
    assert report.float_nodes == {"conv2", "conv3"}


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 6])
def test_as_few_layers_as_hold_the_floor_are_left_out(tmp_path, needed):
    source = outlier(tmp_path / "m.onnx")

    def top1_of(path):
        nodes = read_facts(path).nodes
        return 0.9 if nodes["Conv"].get("fp32", 0) + nodes["Gemm"].get("fp32", 0) >= needed else 0.5

    report = quantise(source, tmp_path / "q.onnx", calibration=some_images(8, 8), top1_of=top1_of, max_top1_drop=0.1)
    assert len(report.excluded) == needed
    assert report.excluded == tuple(row.node for row in report.sensitivity[:needed])


def test_a_floor_that_cannot_be_held_is_an_error_and_leaves_the_old_file(tmp_path):
    source = outlier(tmp_path / "m.onnx")
    (tmp_path / "q.onnx").write_bytes(b"old")
    with pytest.raises(AccuracyError, match=r"50.00% with everything in int8, 50.00% with 6 of 7 .* at least 90.00%"):
        quantise(source, tmp_path / "q.onnx", calibration=some_images(8, 8), top1_of=lambda path: 0.5)
    assert (tmp_path / "q.onnx").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "q.onnx"]


def test_sensitivity_on_request_measures_every_layer_alone(tmp_path, wired):
    report = quantise(wired, tmp_path / "q.onnx", sensitivity=True)
    assert {row.node for row in report.sensitivity} == {row.node for row in report.layers}
    assert report.excluded == ()
    assert all(0 <= row.snr_db < 200 for row in report.sensitivity)


def test_the_form_for_tensorrt_is_symmetric_signed_and_has_no_8_bit_bias(tmp_path, wired):
    report = quantise(wired, tmp_path / "q.onnx", form="tensorrt")
    model = onnx.load(tmp_path / "q.onnx")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    quantisers = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert {tensors[node.input[2]].dtype for node in quantisers} == {np.dtype(np.int8)}
    assert {float(np.abs(tensors[node.input[2]]).max()) for node in quantisers} == {0.0}
    producers = {name: node.op_type for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert [producers.get(name) for name in node.input] == ["DequantizeLinear", "DequantizeLinear", None]
        if node.op_type == "Add":
            assert [producers[name] for name in node.input] == ["DequantizeLinear"] * 2
    assert report.file.nodes["Conv"].keys() == {"int8"}
    assert report.form == "tensorrt"


@pytest.fixture(scope="module", params=[18, 20, 21, 23])
def of_opset(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / f"opset{request.param}.onnx"
    model = mcdeploy.compile_model(wired_resnet(fan_in=2), images(7, 16))
    export_onnx(model, path, images(2, 16), opset=request.param)
    return request.param, path


@pytest.mark.parametrize("form", ["cpu", "tensorrt"])
def test_every_opset_that_is_exported_is_quantised_and_runs(tmp_path, of_opset, form):
    opset, source = of_opset
    top1_of = SameAs(source, images(32, 16, seed=2).numpy())
    report = quantise(source, tmp_path / "q.onnx", form=form, top1_of=top1_of, max_top1_drop=0.25, sensitivity=True)
    assert (report.file.opset, report.file.precision) == (opset, "int8")
    assert report.top1 == top1_of(tmp_path / "q.onnx") >= 0.75


@pytest.mark.parametrize("before", ["inline", "beside"])
@pytest.mark.parametrize("form", ["cpu", "tensorrt"])
def test_weights_too_many_for_one_file_lie_beside_the_int8_model(tmp_path, wired, monkeypatch, form, before):
    small = quantise(wired, tmp_path / "small.onnx", form=form)
    monkeypatch.setattr(exporter, "MAX_INLINE_BYTES", 1000)
    source = wired if before == "inline" else save_model(onnx.load(wired), tmp_path / "beside.onnx")
    folder = tmp_path / "out"
    for _ in range(2):  # the second time over the first pair
        report = quantise(source, folder / "q.onnx", form=form)
    assert sorted(path.name for path in folder.iterdir()) == ["q.onnx", "q.onnx.data"]
    assert report.file == read_facts(folder / "q.onnx")
    assert report.file.external == ("q.onnx.data",)
    assert report.file.nodes == small.file.nodes
    assert np.array_equal(
        *(run_all(str(path), images(4, 16).numpy()) for path in (folder / "q.onnx", tmp_path / "small.onnx"))
    )


def passing_on(path, opset):
    """Two convolutions; between them what the first sees is also sliced twice, transposed there and back, and added."""
    kernel = np.random.default_rng(0).normal(0, 0.4, (3, 3, 1, 1)).astype(np.float32)
    ends = {
        "zero": np.array([0]),
        "two": np.array([2]),
        "six": np.array([6]),
        "axis": np.array([2]),
        "last": np.array([3]),
    }
    nodes = [
        helper.make_node("Conv", ["images", "first"], ["a"], "conv0"),
        helper.make_node("Slice", ["a", "two", "six", "axis"], ["b"], "rows"),
        helper.make_node("Slice", ["b", "two", "six", "last"], ["c"], "columns"),
        helper.make_node("Transpose", ["c"], ["d"], "turn", perm=[0, 1, 3, 2]),
        helper.make_node("Sigmoid", ["d"], ["e"], "gate"),
        helper.make_node("Conv", ["a", "second"], ["f"], "conv1"),
        helper.make_node("GlobalAveragePool", ["f"], ["g"], "pool"),
        helper.make_node("Mul", ["e", "g"], ["h"], "mul"),
        helper.make_node("ReduceMean", ["h", "both"], ["logits"], "mean", keepdims=0),
    ]
    weights = {"first": kernel, "second": kernel[::-1].copy(), "both": np.array([2, 3]), **ends}
    write_graph(
        path,
        nodes,
        [helper.make_tensor_value_info("images", FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", 3])],
        weights,
    )
    model = onnx.load(path)
    model.opset_import[0].version = opset
    onnx.save(model, path)
    return path


def test_what_hands_numbers_on_is_in_int8_for_tensorrt_and_no_number_changes(tmp_path):
    calibration = some_images(16, 8)
    quantise(passing_on(tmp_path / "m20.onnx", 20), tmp_path / "q20.onnx", calibration=calibration, form="tensorrt")
    quantise(passing_on(tmp_path / "m21.onnx", 21), tmp_path / "q21.onnx", calibration=calibration, form="tensorrt")
    pairs = [read_facts(tmp_path / name).nodes["QuantizeLinear"]["int8"] for name in ("q20.onnx", "q21.onnx")]
    assert pairs[1] == pairs[0] + 3  # behind both slices and the transposition
    before, after = (run_all(str(tmp_path / name), calibration, optimise=False) for name in ("q20.onnx", "q21.onnx"))
    assert np.array_equal(before, after)
    again = onnx.load(tmp_path / "q21.onnx")
    _quantise_behind(again)
    assert again == onnx.load(tmp_path / "q21.onnx")


def test_onnx_runtime_refuses_a_signed_opset_21_file_without_those_pairs(tmp_path, monkeypatch):
    """Its issue 25526. Once this fails, ``_quantise_behind`` may go."""
    monkeypatch.setattr("mcdeploy.backends.int8._quantise_behind", lambda model: None)
    with pytest.raises(BackendError, match="output_dtype INT8 does not match"):
        quantise(
            passing_on(tmp_path / "m.onnx", 21),
            tmp_path / "q.onnx",
            calibration=some_images(16, 8),
            form="tensorrt",
            top1_of=lambda path: float(run_all(str(path), some_images(4, 8)).shape[0] == 4),
        )


def test_a_layer_that_is_float32_without_a_reason_is_not_excused(tmp_path, wired):
    report = quantise(wired, tmp_path / "q.onnx")
    rows = [dataclasses.replace(row, runs_in="fp32", why=UNREAD) for row in report.layers]
    assert dataclasses.replace(report, layers=tuple(rows)).float_nodes == frozenset()


def test_what_is_left_out_for_tensorrt_has_no_scale_a_channel_on_activations(tmp_path, wired):
    """TensorRT refuses them; only the file that the trials run has them."""
    trials = []

    def top1_of(path):
        trials.append(activation_scales(path))
        return 0.95 if read_facts(path).nodes["Conv"].get("fp32", 0) >= 8 else 0.5

    quantise(wired, tmp_path / "q.onnx", form="tensorrt", top1_of=top1_of)
    assert max(trials[-1]) > 1
    assert activation_scales(tmp_path / "q.onnx") == {1}


def activation_scales(path):
    """How many scales the DQs of activations have."""
    model = onnx.load(path)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    activations = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in tensors]
    return {tensors[node.input[1]].size for node in activations}


def test_per_image_wirings_with_if_are_refused(tmp_path):
    source = write_if(tmp_path / "if.onnx")
    with pytest.raises(BackendError, match=r'int8 of a model with 1 If nodes is refused, .* dynamic="masked"'):
        quantise(source, tmp_path / "q.onnx", calibration=some_images(4, 2))


def test_a_net_of_nothing_but_slow_groups_is_an_error(tmp_path):
    kernel = np.ones((4, 1, 3, 3), np.float32)
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["y"], "depthwise", group=4),
        helper.make_node("GlobalAveragePool", ["y"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["logits"], "flatten"),
    ]
    path = write_graph(
        tmp_path / "m.onnx",
        nodes,
        [helper.make_tensor_value_info("images", FLOAT, ["batch", 4, 8, 8])],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", 4])],
        {"kernel": kernel},
    )
    calibration = np.concatenate([some_images(4, 8), some_images(4, 8)[:, :1]], axis=1)
    with pytest.raises(BackendError, match="all 1 convolutions are in groups and slower in int8"):
        quantise(path, tmp_path / "q.onnx", calibration=calibration, measure=scale_of(2.0))
    assert not (tmp_path / "q.onnx").exists()


def test_a_share_in_percent_is_refused(tmp_path, wired):
    with pytest.raises(InputError, match=r"max_top1_drop: expected a share from 0 to 1, got 1\.5; one point is 0\.01"):
        quantise(wired, tmp_path / "q.onnx", max_top1_drop=1.5)


def test_a_quantised_file_is_no_source(tmp_path, wired):
    quantise(wired, tmp_path / "q.onnx")
    with pytest.raises(BackendError, match="asked for fp32, the file is int8"):
        quantise(tmp_path / "q.onnx", tmp_path / "again.onnx")


def test_progress_goes_from_nothing_to_all(tmp_path, grouped):
    told = []
    quantise(
        grouped, tmp_path / "q.onnx", sensitivity=True, measure=scale_of(0.9), progress=lambda *now: told.append(now)
    )
    shares = [share for _, share in told]
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert shares == sorted(shares)
    assert any("sensitivity of" in what for what, _ in told)
