import hashlib

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_dynamic import X, two_ways
from tiny_if import write_if
from tiny_models import images, timm_model, wired_resnet
from tiny_onnx import some_images, write_graph

import mcdeploy
from mcdeploy.backends import onnx as exporter
from mcdeploy.backends.fp16 import hash_images, infer_types, measure_peaks, rounded_twin, run_all, save_model, to_fp16
from mcdeploy.backends.onnx import export_onnx
from mcdeploy.backends.readback import check_written, read_facts
from mcdeploy.errors import BackendError, InputError, ParityError

FLOAT = TensorProto.FLOAT


@pytest.fixture(scope="module")
def wired(tmp_path_factory):
    path = tmp_path_factory.mktemp("fp16") / "wired.onnx"
    export_onnx(mcdeploy.compile_model(wired_resnet(fan_in=2), images(7, 16)), path, images(2, 16))
    return path


def network(path, nodes, weights, size=4, classes=3):
    return write_graph(
        path,
        nodes,
        [helper.make_tensor_value_info("images", FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", classes])],
        weights,
    )


def overflowing(path, *, gain=1e5, back=1e-5):
    """Three 1x1 convolutions; between the first and the last values reach ``gain``, the logits are small again."""
    kernel = np.random.default_rng(0).uniform(0.2, 0.4, (3, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["images", "up"], ["a"], "grow"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Conv", ["b", "same"], ["c"], "stay"),
        helper.make_node("Add", ["b", "c"], ["sum"], "residual"),
        helper.make_node("Conv", ["sum", "down"], ["d"], "shrink"),
        helper.make_node("Conv", ["d", "last"], ["e"], "small"),
        helper.make_node("GlobalAveragePool", ["e"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["logits"], "flatten"),
    ]
    weights = {"up": kernel * np.float32(gain), "same": kernel, "last": kernel, "down": kernel * np.float32(back)}
    return network(path, nodes, weights)


def plain_conversion(path, keep=()):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(path), keep_io_types=True, op_block_list=[], node_block_list=list(keep))
    for node in list(model.graph.node):  # it writes some casts twice, which no runtime loads
        if sum(other.output[0] == node.output[0] for other in model.graph.node) > 1:
            model.graph.node.remove(node)
    sorted_model = onnx_ir.from_proto(model)
    sorted_model.graph.sort()
    return onnx_ir.to_proto(sorted_model)


def test_a_wired_net_becomes_float16_with_float32_images_and_logits(tmp_path, wired):
    calibration = images(16, 16).numpy()
    report = to_fp16(wired, tmp_path / "half.onnx", calibration)
    before, after = read_facts(wired), read_facts(tmp_path / "half.onnx")
    assert report.file == after
    assert report.kept == ()
    assert after.nodes["Conv"] == {"fp16": before.nodes["Conv"]["fp32"]}
    assert after.nodes["Gemm"] == {"fp16": 1}
    assert (after.inputs, after.outputs, after.batch) == ({"images": "fp32"}, {"logits": "fp32"}, "batch")
    assert after.size_bytes < 0.6 * before.size_bytes
    assert report.top1_agreement == 1.0
    assert 0 < report.max_abs < 0.01
    assert report.calibration == hash_images(calibration)
    expected, actual = run_all(str(wired), calibration), run_all(str(tmp_path / "half.onnx"), calibration[:7])
    assert np.abs(expected[:7] - actual).max() < 0.01 * np.abs(expected).max()
    onnx.checker.check_model(str(tmp_path / "half.onnx"), full_check=True)


@pytest.mark.parametrize("opset", [18, 21, 23])  # 20 is everywhere else
def test_every_opset_that_is_exported_converts(tmp_path, opset):
    model = mcdeploy.compile_model(wired_resnet(fan_in=2), images(7, 16))
    export_onnx(model, tmp_path / "m.onnx", images(2, 16), opset=opset)
    report = to_fp16(tmp_path / "m.onnx", tmp_path / "half.onnx", images(8, 16).numpy())
    assert (report.file.opset, report.file.precision, report.top1_agreement) == (opset, "fp16", 1.0)


@pytest.mark.parametrize("before", ["inline", "beside"])
def test_weights_too_many_for_one_file_lie_beside_the_float16_model(tmp_path, wired, monkeypatch, before):
    calibration = images(8, 16).numpy()
    small = to_fp16(wired, tmp_path / "small.onnx", calibration)
    monkeypatch.setattr(exporter, "MAX_INLINE_BYTES", 1000)
    source = wired if before == "inline" else save_model(onnx.load(wired), tmp_path / "beside.onnx")
    folder = tmp_path / "out"
    for _ in range(2):  # the second time over the first pair
        report = to_fp16(source, folder / "half.onnx", calibration)
    assert sorted(path.name for path in folder.iterdir()) == ["half.onnx", "half.onnx.data"]
    assert report.file == read_facts(folder / "half.onnx")
    assert report.file.external == ("half.onnx.data",)
    assert report.file.nodes == small.file.nodes
    assert (folder / "half.onnx.data").stat().st_mode == (folder / "half.onnx").stat().st_mode
    assert (folder / "half.onnx.data").stat().st_size < 1.01 * small.file.size_bytes
    assert np.array_equal(
        run_all(str(folder / "half.onnx"), calibration), run_all(str(tmp_path / "small.onnx"), calibration)
    )


def test_a_model_that_fits_into_one_file_again_leaves_no_weights_beside_it(tmp_path, wired, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(exporter, "MAX_INLINE_BYTES", 1000)
        to_fp16(wired, tmp_path / "half.onnx", images(4, 16).numpy())
    to_fp16(wired, tmp_path / "half.onnx", images(4, 16).numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["half.onnx"]


def test_no_large_model_is_handed_over_as_one_message(tmp_path, wired, monkeypatch):
    import onnxruntime

    handed = []
    real = onnxruntime.InferenceSession

    def session(given, *args, **kwargs):
        handed.append(type(given))
        return real(given, *args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    to_fp16(wired, tmp_path / "half.onnx", images(4, 16).numpy())
    assert set(handed) == {str, bytes}
    handed.clear()
    monkeypatch.setattr(exporter, "MAX_INLINE_BYTES", 1000)
    to_fp16(wired, tmp_path / "half.onnx", images(4, 16).numpy())
    assert len(handed) >= 4
    assert set(handed) == {str}


def test_saving_and_inferring_types_leave_the_weights_in_a_large_model(tmp_path, wired, monkeypatch):
    small = onnx.load(wired)
    del small.graph.value_info[:]
    large = onnx.ModelProto()
    large.CopyFrom(small)
    infer_types(small, strict=True)
    monkeypatch.setattr(exporter, "MAX_INLINE_BYTES", 1000)
    seen = []
    real = onnx.shape_inference.infer_shapes

    def infer_shapes(model, **options):
        seen.append(model.SerializeToString())
        return real(model, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", infer_shapes)
    infer_types(large, strict=True)
    assert len(seen[0]) < 0.3 * len(large.SerializeToString())
    assert len(large.graph.value_info) > 50
    assert large.SerializeToString() == small.SerializeToString()
    save_model(large, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size > 100_000
    assert np.array_equal(
        *(run_all(str(path), images(4, 16).numpy()) for path in (wired, tmp_path / "m.onnx")),
    )
    for before, after in zip(small.graph.initializer, large.graph.initializer, strict=True):
        assert np.array_equal(numpy_helper.to_array(before), numpy_helper.to_array(after))


def test_the_same_file_and_images_give_the_same_bytes(tmp_path, wired):
    hashes = set()
    for name in ("a.onnx", "b.onnx"):
        to_fp16(wired, tmp_path / name, images(4, 16).numpy())
        hashes.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(hashes) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_what_overflows_stays_float32_where_the_plain_conversion_gives_infinity(tmp_path):
    path = overflowing(tmp_path / "m.onnx")
    calibration = np.abs(some_images(8, 4)) + 1
    plain = plain_conversion(path)
    assert not np.isfinite(run_all(rounded_twin(plain), calibration, optimise=False)).all()
    report = to_fp16(path, tmp_path / "half.onnx", calibration)
    assert {node.node for node in report.kept} == {"grow", "relu", "stay", "residual", "shrink"}
    assert report.kept[0].peak > 65504
    assert report.file.nodes["Conv"] == {"fp16": 1, "fp32": 3}
    assert report.float_nodes == {"grow", "relu", "stay", "residual", "shrink"}
    check_written(tmp_path / "half.onnx", opset=20, precision="fp16", allowed=report.float_nodes)
    with pytest.raises(BackendError, match=r"grow \(fp32\), stay \(fp32\), shrink \(fp32\) with no reason on record"):
        check_written(tmp_path / "half.onnx", opset=20, precision="fp16")
    half = onnx.load(tmp_path / "half.onnx")
    expected = run_all(str(path), calibration)
    actual = run_all(rounded_twin(half), calibration, optimise=False)
    assert np.allclose(actual, expected, rtol=1e-2)


def test_keeping_nodes_by_the_library_alone_overflows_between_them(tmp_path):
    """Why the casts between neighbours are taken out: the library's own float32 island is cut by float16 casts."""
    path = overflowing(tmp_path / "m.onnx")
    calibration = np.abs(some_images(4, 4)) + 1
    cut = plain_conversion(path, ("grow", "relu", "stay", "residual", "shrink"))
    assert not np.isfinite(run_all(cut, calibration)).all()
    to_fp16(path, tmp_path / "half.onnx", calibration)
    assert np.isfinite(run_all(str(tmp_path / "half.onnx"), calibration)).all()
    casts = [node for node in onnx.load(tmp_path / "half.onnx").graph.node if node.op_type == "Cast"]
    assert len(casts) == 2  # down after "shrink", up before the logits; the images go into "grow" as they are


def test_the_cpu_hides_an_overflow_and_the_rounded_twin_shows_it(tmp_path):
    path = overflowing(tmp_path / "m.onnx")
    calibration = np.abs(some_images(4, 4)) + 1
    plain = plain_conversion(path)
    if not np.isfinite(run_all(plain, calibration)).all():
        pytest.skip("this CPU has float16 convolutions")
    assert not np.isfinite(run_all(rounded_twin(plain), calibration, optimise=False)).all()


def test_a_weight_beyond_float16_stays_float32_and_is_not_clamped(tmp_path):
    kernel = np.full((3, 3, 1, 1), 0.5, np.float32)
    kernel[0, 0] = 7e4
    nodes = [
        helper.make_node("Mul", ["images", "tiny"], ["x"], "scale"),
        helper.make_node("Conv", ["x", "kernel"], ["y"], "heavy"),
        helper.make_node("Conv", ["y", "light"], ["z"], "light"),
        helper.make_node("GlobalAveragePool", ["z"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["logits"], "flatten"),
    ]
    light = np.random.default_rng(0).normal(size=(3, 3, 1, 1)).astype(np.float32)
    path = network(tmp_path / "m.onnx", nodes, {"tiny": np.float32(1e-3), "kernel": kernel, "light": light})
    report = to_fp16(path, tmp_path / "half.onnx", some_images(8, 4))
    assert [(node.node, node.why) for node in report.kept] == [("heavy", "weight")]
    stored = {
        tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "half.onnx").graph.initializer
    }
    assert stored["kernel"].dtype == np.float32
    assert stored["kernel"].max() == np.float32(7e4)


def test_a_sum_that_passes_float16_on_its_way_to_a_small_value_stays_float32(tmp_path):
    """Two large products of opposite sign: inputs, weights and output are all small, a partial sum is not."""
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[:, 0], kernel[:, 1], kernel[:, 2] = 500, -500, 1
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["y"], "cancels"),
        helper.make_node("Conv", ["y", "eye"], ["z"], "small"),
        helper.make_node("GlobalAveragePool", ["z"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["logits"], "flatten"),
    ]
    one = some_images(4, 4)[:, :1]
    calibration = np.concatenate([one * 100, one * 100, some_images(4, 4)[:, :1]], axis=1)
    calibration[0, :2] = 100
    weights = {"kernel": kernel, "eye": np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)}
    path = network(tmp_path / "m.onnx", nodes, weights)
    peaks = measure_peaks(onnx.load(path), calibration)
    assert peaks.tensors["y"] < 10
    assert peaks.sums["cancels"] == pytest.approx(100_000, rel=1e-3)
    report = to_fp16(path, tmp_path / "half.onnx", calibration)
    assert [(node.node, node.why) for node in report.kept] == [("cancels", "sum")]


@pytest.mark.parametrize("op", ["GlobalAveragePool", "ReduceMean", "AveragePool", "ReduceSum"])
def test_the_sum_behind_a_mean_is_what_is_bounded(tmp_path, op):
    axes = {"axes": np.array([2, 3])} if op.startswith("Reduce") else {}
    options = {"kernel_shape": [8, 8]} if op == "AveragePool" else {}
    nodes = [
        helper.make_node(op, ["images", *axes], ["p"], "pool", **options),
        helper.make_node("Flatten", ["p"], ["logits"], "flatten"),
    ]
    path = network(tmp_path / "m.onnx", nodes, axes, size=8)
    calibration = some_images(11, 8)
    expected = np.abs(calibration).sum(axis=(2, 3)).max()
    assert measure_peaks(onnx.load(path), calibration).sums["pool"] == pytest.approx(expected, rel=1e-5)


def test_peaks_are_those_of_every_image(tmp_path, wired):
    calibration = images(11, 16).numpy()  # more than one batch, and the last one is short
    calibration[10] *= 3
    peaks = measure_peaks(onnx.load(wired), calibration).tensors
    assert peaks["images"] == np.abs(calibration).max()
    assert peaks["logits"] == pytest.approx(np.abs(run_all(str(wired), calibration)).max(), rel=1e-5)


def test_a_net_with_depthwise_convolutions_and_gates_converts(tmp_path):
    export_onnx(timm_model("test_mambaout"), tmp_path / "m.onnx", images(2, 64))
    report = to_fp16(tmp_path / "m.onnx", tmp_path / "half.onnx", images(4, 64).numpy(), max_abs=0.05)
    assert report.file.precision == "fp16"
    assert report.top1_agreement == 1.0


def test_a_model_with_if_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(BackendError, match=r'fp16 of a model with 1 If nodes is refused, .* dynamic="masked"'):
        to_fp16(write_if(tmp_path / "if.onnx"), tmp_path / "half.onnx", some_images(4, 2))
    assert not (tmp_path / "half.onnx").exists()


def test_per_image_wirings_convert_when_exported_masked(tmp_path):
    model = mcdeploy.compile_model(two_ways(X), X, X)
    export_onnx(model, tmp_path / "masked.onnx", X[:2], dynamic="masked")
    report = to_fp16(tmp_path / "masked.onnx", tmp_path / "half.onnx", X.numpy(), max_abs=0.05)
    assert report.file.nodes["Conv"].keys() == {"fp16"}


def test_a_converted_file_is_no_source(tmp_path, wired):
    to_fp16(wired, tmp_path / "half.onnx", images(4, 16).numpy())
    with pytest.raises(BackendError, match="asked for fp32, the file is fp16"):
        to_fp16(tmp_path / "half.onnx", tmp_path / "again.onnx", images(4, 16).numpy())


def test_too_far_from_float32_is_a_parity_error_and_leaves_the_old_file(tmp_path, wired):
    (tmp_path / "half.onnx").write_bytes(b"old")
    with pytest.raises(ParityError, match=r"away from float32 \(allowed 1.0e-06\)"):
        to_fp16(wired, tmp_path / "half.onnx", images(4, 16).numpy(), max_abs=1e-6)
    assert (tmp_path / "half.onnx").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["half.onnx"]


def test_images_that_give_no_range_are_refused(tmp_path, wired):
    bad = images(2, 16).numpy()
    bad[0, 0, 0, 0] = np.nan
    for calibration, reason in (
        (bad, "NaN"),
        (bad[:0], r"got float32 \[0, 3, 16, 16\]"),
        (bad.astype(float), "float64"),
    ):
        with pytest.raises(InputError, match=reason):
            to_fp16(wired, tmp_path / "half.onnx", calibration)


def test_the_hash_of_images_depends_on_every_byte_and_on_the_shape():
    one = some_images(2, 4)
    other = one.copy()
    other[1, 2, 3, 3] += 1e-6
    assert len({hash_images(one), hash_images(other), hash_images(one.reshape(1, 6, 4, 4))}) == 3
    assert hash_images(one) == hash_images(np.asfortranarray(one))


def test_progress_goes_from_nothing_to_all(tmp_path, wired):
    told = []
    to_fp16(wired, tmp_path / "half.onnx", images(4, 16).numpy(), progress=lambda what, share: told.append(share))
    assert (told[0], told[-1]) == (0.0, 1.0)
    assert told == sorted(told)
