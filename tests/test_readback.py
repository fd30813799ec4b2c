import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tiny_if import write_if
from tiny_models import images, small_resnet
from tiny_onnx import write_graph, write_model

from mcdeploy.backends.onnx import export_onnx
from mcdeploy.backends.readback import check_written, precision_of, read_facts, running_types
from mcdeploy.errors import BackendError

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def conv_classifier(path, kind=FLOAT, batch="batch"):
    """images -> Cast -> Conv -> GlobalAveragePool -> Flatten -> Cast -> logits, the middle in ``kind``."""
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float16 if kind == HALF else np.float32)
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], "down", to=kind),
        helper.make_node("Conv", ["x", "weight"], ["y"], "conv"),
        helper.make_node("GlobalAveragePool", ["y"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Cast", ["flat"], ["logits"], "up", to=FLOAT),
    ]
    return write_graph(
        path,
        nodes,
        [helper.make_tensor_value_info("images", FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", FLOAT, [batch, 4])],
        {"weight": weight},
    )


def test_the_facts_of_an_exported_net_are_those_of_the_net(tmp_path):
    model = small_resnet()
    export_onnx(model, tmp_path / "m.onnx", images(2, 16), opset=18)
    facts = check_written(tmp_path / "m.onnx", opset=18, precision="fp32")
    convolutions = sum(type(module).__name__ == "Conv2d" for module in model.modules())
    assert facts.nodes["Conv"] == {"fp32": convolutions}
    assert (facts.opset, facts.ir_version, facts.batch, facts.external) == (18, 10, "batch", ())
    assert facts.size_bytes == (tmp_path / "m.onnx").stat().st_size
    assert (facts.inputs, facts.outputs) == ({"images": "fp32"}, {"logits": "fp32"})
    assert facts.precision == facts.to_json()["precision"] == "fp32"


def test_a_float32_file_handed_over_as_float16_or_int8_is_refused(tmp_path):
    path = conv_classifier(tmp_path / "m.onnx")
    for precision in ("fp16", "int8"):
        with pytest.raises(BackendError, match=rf"asked for {precision}, .*\(found 1 in fp32\)"):
            check_written(path, opset=20, precision=precision)


def test_a_float16_file_handed_over_as_float32_is_refused(tmp_path):
    path = conv_classifier(tmp_path / "m.onnx", HALF)
    assert check_written(path, opset=20, precision="fp16").nodes["Conv"] == {"fp16": 1}
    with pytest.raises(BackendError, match="asked for fp32, the file is fp16"):
        check_written(path, opset=20, precision="fp32")


def two_convs(path):
    """One convolution in float16 and one in float32."""
    weights = {"a": np.ones((4, 3, 1, 1), np.float16), "b": np.ones((4, 4, 1, 1), np.float32)}
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], "down", to=HALF),
        helper.make_node("Conv", ["x", "a"], ["y"], "first"),
        helper.make_node("Cast", ["y"], ["z"], "up", to=FLOAT),
        helper.make_node("Conv", ["z", "b"], ["w"], "second"),
        helper.make_node("GlobalAveragePool", ["w"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["logits"], "flatten"),
    ]
    return write_graph(
        path,
        nodes,
        [helper.make_tensor_value_info("images", FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", 4])],
        weights,
    )


def test_one_node_in_the_type_that_was_asked_for_is_not_enough(tmp_path):
    path = two_convs(tmp_path / "m.onnx")
    said = r"asked for fp16, the file is fp16 \(1 of 2 heavy nodes\): second \(fp32\) with no reason on record"
    for allowed in (frozenset(), {"first"}, {"pool"}):
        with pytest.raises(BackendError, match=said):
            check_written(path, opset=20, precision="fp16", allowed=allowed)
    assert check_written(path, opset=20, precision="fp16", allowed={"second"}).nodes["Conv"] == {"fp16": 1, "fp32": 1}
    with pytest.raises(BackendError, match=r"asked for fp32, the file is fp16 \(1 of 2 heavy nodes\): first \(fp16\)"):
        check_written(path, opset=20, precision="fp32")


def test_no_reason_makes_a_float32_file_a_float16_one(tmp_path):
    with pytest.raises(BackendError, match="no convolution or matrix product of the file computes in it"):
        check_written(conv_classifier(tmp_path / "m.onnx"), opset=20, precision="fp16", allowed={"conv"})


def test_only_the_first_few_of_many_nodes_are_named(tmp_path):
    model = onnx.load(conv_classifier(tmp_path / "m.onnx", HALF))
    for i in range(4):
        model.graph.node.append(helper.make_node("Conv", ["images", "float"], [f"o{i}"], f"more{i}"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "float"))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(BackendError, match=r"more0 \(fp32\), more1 \(fp32\), more2 \(fp32\), \.\.\. with no reason"):
        check_written(tmp_path / "m.onnx", opset=20, precision="fp16")


def test_another_opset_and_a_baked_in_batch_are_refused(tmp_path):
    path = conv_classifier(tmp_path / "m.onnx")
    with pytest.raises(BackendError, match="asked for opset 18, the file has 20"):
        check_written(path, opset=18, precision="fp32")
    with pytest.raises(BackendError, match="the batch is fixed to 2"):
        check_written(conv_classifier(tmp_path / "fixed.onnx", batch=2), opset=20, precision="fp32")


def test_images_that_became_float16_are_refused(tmp_path):
    model = onnx.load(conv_classifier(tmp_path / "m.onnx", HALF))
    model.graph.input[0].type.tensor_type.elem_type = HALF
    onnx.save(model, tmp_path / "half.onnx")
    with pytest.raises(BackendError, match="images is fp16, images and logits must stay float32"):
        check_written(tmp_path / "half.onnx", opset=20, precision="fp16")


def test_what_runs_is_not_what_the_file_says(tmp_path):
    """ONNX Runtime has no float16 convolution on x86: it computes in float32 between casts."""
    path = conv_classifier(tmp_path / "m.onnx", HALF)
    file, running = read_facts(path).nodes, running_types(path)
    heavy = {op: kinds for op, kinds in running.items() if "Conv" in op}
    if heavy == {"Conv": {"fp16": 1}}:
        pytest.skip("this CPU has float16 convolutions")
    assert [list(kinds) for kinds in heavy.values()] == [["fp32"]]
    assert precision_of(file, running) == "fp32 (the file is fp16)"


def quantised(path, *, weights=True, output=True):
    """A convolution between Q and DQ, with or without 8-bit weights, with or without Q behind it."""
    scales = {"s": np.float32(0.1), "z": np.uint8(128), "ws": np.float32(0.1), "wz": np.int8(0)}
    kernel = np.ones((4, 3, 1, 1), np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"], "dq"),
        helper.make_node("DequantizeLinear", ["kernel", "ws", "wz"], ["w"], "dqw"),
        helper.make_node("Conv", ["x", "w" if weights else "float"], ["y"], "conv"),
        helper.make_node("Add", ["y", "y"], ["sum"], "add"),
        helper.make_node("GlobalAveragePool", ["sum"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["logits"], "flatten"),
    ]
    if output:
        nodes[4] = helper.make_node("Add", ["ydq", "ydq"], ["sum"], "add")
        nodes[4:4] = [
            helper.make_node("Relu", ["y"], ["r"], "relu"),
            helper.make_node("QuantizeLinear", ["r", "s", "z"], ["yq"], "yq"),
            helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["ydq"], "ydq"),
        ]
    return write_graph(
        path,
        nodes,
        [helper.make_tensor_value_info("images", FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", FLOAT, ["batch", 4])],
        {"kernel": kernel, "float": kernel.astype(np.float32), **scales},
    )


def test_int8_is_counted_where_inputs_and_weights_are_both_dequantised(tmp_path):
    assert read_facts(quantised(tmp_path / "a.onnx")).nodes["Conv"] == {"int8": 1}
    assert read_facts(quantised(tmp_path / "b.onnx", weights=False)).nodes["Conv"] == {"fp32": 1}


def test_an_addition_whose_sum_stays_float32_is_no_int8_addition(tmp_path):
    facts = read_facts(quantised(tmp_path / "a.onnx"))
    assert facts.nodes["Add"] == {"fp32": 1}  # dequantised inputs, but no Q behind it


def test_a_phrase_tells_how_many_heavy_nodes_it_is_true_of():
    assert precision_of({"Conv": {"int8": 52, "fp32": 2}, "Add": {"fp32": 9}}) == "int8 (52 of 54 heavy nodes)"
    assert precision_of({"Conv": {"fp16": 3}, "Cast": {"fp32": 2}}) == "fp16"
    assert precision_of({"Add": {"fp32": 1}}) == "no heavy nodes"
    assert precision_of({"Conv": {"int8": 2}}, {"QLinearConv": {"int8": 1}, "Conv": {"fp32": 1}}) == (
        "int8 (1 of 2 heavy nodes)"
    )


def test_weights_beside_the_file_are_found_and_counted(tmp_path):
    model = onnx.load(conv_classifier(tmp_path / "m.onnx"))
    onnx.save(model, tmp_path / "big.onnx", save_as_external_data=True, location="big.onnx.data", size_threshold=0)
    facts = read_facts(tmp_path / "big.onnx")
    assert facts.external == ("big.onnx.data",)
    assert facts.size_bytes == sum((tmp_path / name).stat().st_size for name in ("big.onnx", "big.onnx.data"))
    (tmp_path / "big.onnx.data").unlink()
    with pytest.raises(BackendError, match=r"big.onnx.data: the model names this file"):
        read_facts(tmp_path / "big.onnx")


def test_a_node_inside_an_if_is_counted(tmp_path):
    nodes = read_facts(write_if(tmp_path / "if.onnx")).nodes
    assert (nodes["Gemm"], nodes["Greater"]) == ({"fp32": 2}, {"fp32": 1})


def test_what_is_no_model_is_an_error_that_names_it(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no model")
    for name, reason in (("x.onnx", "not an ONNX model"), ("y.onnx", "no such model file")):
        with pytest.raises(BackendError, match=rf"{name}: {reason}"):
            read_facts(tmp_path / name)


def test_a_provider_that_is_not_there_is_an_error(tmp_path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(BackendError, match="this onnxruntime has no cuda"):
        running_types(write_model(tmp_path / "m.onnx"), "cuda")
