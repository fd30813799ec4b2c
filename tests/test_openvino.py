"""OpenVINO under the Runner protocol: the same answers, and what was asked for is what is read back."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from mcruntime.engine import OnnxRunner
from tiny_models import images, small_resnet

import mcdeploy
from mcdeploy.backends.openvino import OpenVINORunner
from mcdeploy.compile.certify import scramble
from mcdeploy.errors import BackendError, BundleError, InputError, MissingExtraError

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    model = small_resnet()
    scramble(model)
    file = tmp_path_factory.mktemp("openvino") / "net.onnx"
    mcdeploy.export_onnx(model.eval(), file, images(2, 16))
    return file


def test_the_answers_are_onnx_runtimes_at_several_batch_sizes(path):
    with OpenVINORunner(path, threads=1) as ours, OnnxRunner(path, threads=1) as theirs:
        for batch in (1, 2, 5):
            some = images(batch, 16).numpy()
            expected = theirs.infer(some)
            np.testing.assert_allclose(ours.infer(some), expected, atol=1e-4 * np.abs(expected).max())


def test_answers_do_not_change_when_the_next_batch_is_run(path):
    with OpenVINORunner(path, threads=1) as runner:
        first = runner.infer(images(2, 16).numpy())
        kept = first.copy()
        runner.infer(np.zeros((2, 3, 16, 16), np.float32))
        assert (first == kept).all()


def test_the_facts_are_read_from_the_compiled_model(path):
    with OpenVINORunner(path, threads=1, name="net") as runner:
        facts = runner.facts()
    assert facts["backend"] == "openvino"
    assert (facts["provider"], facts["precision"], facts["threads"], facts["streams"]) == ("cpu", "fp32", "1", "1")
    assert (facts["hint"], facts["batch"]) == ("latency", "dynamic")


def test_another_type_than_asked_for_is_refused(path, monkeypatch):
    import openvino

    real = openvino.Core.compile_model

    def in_bf16(self, model, device, config):
        return real(self, model, device, config | {"INFERENCE_PRECISION_HINT": "bf16"})

    monkeypatch.setattr(openvino.Core, "compile_model", in_bf16)
    with pytest.raises(BackendError, match="in f32, it took 1 in bf16"), OpenVINORunner(path, threads=1):
        pass


def test_what_it_cannot_run_is_refused(path, tmp_path, monkeypatch):
    with pytest.raises(BundleError, match="no such model file"), OpenVINORunner(tmp_path / "none.onnx"):
        pass
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(BackendError, match="cannot compile"), OpenVINORunner(tmp_path / "broken.onnx"):
        pass
    with OpenVINORunner(path) as runner, pytest.raises(InputError, match="expected images"):
        runner.infer(np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(InputError, match="at least 1"):
        OpenVINORunner(path, threads=0)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"mcdeploy\[openvino\]"), OpenVINORunner(path):
        pass
