"""A bundle becomes a model that puts no more images together than its engine, its sizes and its bench allow."""

from __future__ import annotations

import pytest
from mcruntime.errors import InputError
from mcruntime.manifest import Latency
from mcruntime.server.config import model_config
from mcruntime.server.loader import Target, open_model
from mcruntime.server.options import ServerOptions
from tiny_onnx import write_bundle
from tiny_server import model_of


def largest(folder, **options):
    """What a bundle is put together to, and who says so."""
    model = open_model(Target(folder), ServerOptions(threads=1, **options))
    try:
        assert model.batcher.max_batch == model.about["max_batch"]
        assert model_config(model)["dynamic_batching"]["preferred_batch_size"] == [model.about["max_batch"]]
        return model.about["max_batch"], model.about["max_batch_from"]
    finally:
        model.close()


def measured(folder, speeds):
    """A bundle with a bench: images a second by batch size."""
    rows = [
        Latency(
            model="fp32",
            provider="cpu",
            batch=batch,
            p50_ms=1.0,
            low_ms=1.0,
            high_ms=1.0,
            images_per_second=speed,
            machine={},
        )
        for batch, speed in speeds.items()
    ]
    return write_bundle(folder, latency=tuple(rows))


def test_the_largest_of_the_sizes_bounds_a_batch(tmp_path):
    folder = write_bundle(tmp_path / "b")
    assert largest(folder) == (32, "no bench in the bundle")
    assert largest(folder, buckets=(1, 4, 16)) == (16, "the largest there is")
    assert largest(folder, buckets=(1, 64)) == (64, "the largest there is")
    assert largest(folder, buckets=(1, 4, 16), max_batch=3) == (3, "as asked")
    with pytest.raises(InputError, match="--buckets takes at most 16 images, got 17"):
        largest(folder, buckets=(1, 4, 16), max_batch=17)


def test_the_best_batch_of_a_bench_is_bounded_by_the_sizes_too(tmp_path):
    folder = measured(tmp_path / "b", {1: 10.0, 8: 40.0, 16: 90.0})
    assert largest(folder) == (16, "the best of its bench")
    assert largest(folder, buckets=(1, 4)) == (4, "the best of its bench")
    assert largest(folder, buckets=(1, 64)) == (16, "the best of its bench")


@pytest.mark.parametrize(
    ("provider", "kind"), [("cpu", "KIND_CPU"), ("cuda", "KIND_GPU"), ("tensorrt", "KIND_GPU"), (None, "KIND_CPU")]
)
def test_the_configuration_says_what_a_model_runs_on(provider, kind):
    model = model_of(**({"provider": provider} if provider else {}))
    assert [group["kind"] for group in model_config(model)["instance_group"]] == [kind]
    model.close()
