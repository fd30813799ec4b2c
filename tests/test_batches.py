"""Every image is answered once and by its own answer, whatever batches the runner inside takes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcruntime.batches import AnyBatch
from mcruntime.errors import InputError
from tiny_onnx import expected_logits, some_images


class Narrow:
    """Answers as the tiny model does, for batches of smallest to largest only, and notes what it was given."""

    name = "narrow"

    def __init__(self, smallest, largest):
        self.smallest, self.largest, self.seen, self.inside = smallest, largest, [], False

    def __enter__(self):
        self.inside = True
        return self

    def __exit__(self, *exc):
        self.inside = False

    def infer(self, images):
        if not (isinstance(images, np.ndarray) and images.ndim == 4 and self.smallest <= len(images) <= self.largest):
            raise InputError(f"this engine takes batches of {self.smallest} to {self.largest}")
        self.seen.append(len(images))
        return expected_logits(images)

    def facts(self):
        return {"backend": "narrow"}


@given(count=st.integers(1, 40), smallest=st.integers(1, 8), more=st.integers(0, 8))
def test_every_image_gets_its_own_answer_in_its_place(count, smallest, more):
    narrow = Narrow(smallest, smallest + more)
    images = some_images(count)
    with AnyBatch(narrow, (smallest, smallest, smallest + more)) as runner:
        assert narrow.inside
        np.testing.assert_array_equal(runner.infer(images), expected_logits(images))
    assert not narrow.inside
    assert all(smallest <= size <= smallest + more for size in narrow.seen)


def test_a_batch_that_fits_goes_through_as_it_is():
    narrow = Narrow(2, 8)
    with AnyBatch(narrow, (2, 4, 8)) as runner:
        runner.infer(some_images(7))
        assert runner.facts() == {"backend": "narrow"}
    assert narrow.seen == [7]


@pytest.mark.parametrize("images", [np.zeros((0, 3, 8, 8), np.float32), np.zeros((3, 8, 8), np.float32), None])
def test_what_are_no_images_is_left_to_the_runner_to_refuse(images):
    with AnyBatch(Narrow(1, 4), (1, 2, 4)) as runner, pytest.raises(InputError):
        runner.infer(images)
