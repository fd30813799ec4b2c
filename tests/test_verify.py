import numpy as np
import pytest

from mcdeploy.errors import ParityError
from mcdeploy.verify import BATCHES, agree, verify

IMAGES = np.random.default_rng(0).standard_normal((7, 3, 4, 4)).astype(np.float32)
WEIGHT = np.random.default_rng(1).standard_normal((48, 5)).astype(np.float32)


class Fake:
    def __init__(self, change=lambda logits: logits, name="fake"):
        self.change, self.name, self.batches = change, name, []

    def infer(self, images):
        self.batches.append(len(images))
        return self.change(images.reshape(len(images), -1) @ WEIGHT)


def test_equal_runners_pass_at_every_batch_on_images_and_on_noise():
    runner = Fake()
    rows = verify(Fake(), runner, IMAGES, hop="onnx", max_abs=1e-6)
    assert [(row.images, row.batch) for row in rows] == [(k, b) for k in ("validation", "noise") for b in BATCHES]
    assert all(row.passed and row.max_abs == 0 and row.top1_agreement == 1 for row in rows)
    assert runner.batches == [1, 2, 3, 7] * 2


def test_a_difference_beyond_the_tolerance_names_the_batch_and_its_size():
    def wrong_at_batch_3(logits):
        return logits + (0.01 * np.abs(logits).max() if len(logits) == 3 else 0)

    with pytest.raises(ParityError, match=r"1\.0e-02 away from .*batch 3.*allowed 1\.0e-03"):
        verify(Fake(), Fake(wrong_at_batch_3), IMAGES, hop="onnx", max_abs=1e-3)


def test_cosine_and_agreement_are_those_of_known_answers():
    row = verify(Fake(), Fake(lambda logits: -logits), IMAGES, hop="x", max_abs=10)[3]
    assert row.cosine == pytest.approx(-1)
    assert row.max_abs == pytest.approx(2)
    assert row.top1_agreement == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_an_error_not_a_large_number(bad):
    with pytest.raises(ParityError, match="NaN or infinity"):
        verify(Fake(), Fake(lambda logits: logits * bad), IMAGES, hop="onnx", max_abs=1e9)


def test_another_shape_is_an_error():
    with pytest.raises(ParityError, match=r"answers with shape \[1, 4\], fake with \[1, 5\]"):
        verify(Fake(), Fake(lambda logits: logits[:, :4]), IMAGES, hop="onnx", max_abs=1e9)


def test_accuracy_before_and_after_and_agreement_are_counted_over_all_batches():
    labels = Fake().infer(IMAGES).argmax(1)

    def first_wrong(logits):
        logits = logits.copy()
        logits[0] = -logits[0]
        return logits

    batches = [(IMAGES[:4], labels[:4]), (IMAGES[4:], labels[4:])]
    found = agree(Fake(), Fake(first_wrong), batches)
    assert (found.images, found.accuracy_before) == (7, 1.0)
    assert found.accuracy_after == found.top1_agreement == pytest.approx(5 / 7)
