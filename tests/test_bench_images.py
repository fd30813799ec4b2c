"""Latency over images: every image on every runner, in turns; what is reported is spread over images."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_dynamic import X, two_ways

from mcdeploy.bench_images import compare_over_images
from mcdeploy.compile.dynamic import record
from mcdeploy.data import Loaders
from mcdeploy.errors import BackendError, InputError
from mcdeploy.targets import Target, measure_over_images


class Clock:
    """Stands still but for what runners take."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Fake:
    """Takes as many milliseconds as the image's first pixel says, times a factor."""

    def __init__(self, name, clock, factor=1.0, log=None, provider="cpu"):
        self.name, self.clock, self.factor, self.provider = name, clock, factor, provider
        self.log = [] if log is None else log

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def facts(self):
        return {"backend": "fake", "provider": self.provider}

    def infer(self, images):
        assert len(images) == 1
        self.log.append((self.name, float(images[0, 0, 0, 0])))
        self.clock.now += self.factor * float(images[0, 0, 0, 0]) / 1e3


def pixels(*milliseconds):
    images = np.zeros((len(milliseconds), 3, 2, 2), np.float32)
    images[:, 0, 0, 0] = milliseconds
    return images


def test_spread_mean_and_ratio_are_over_images():
    clock = Clock()
    times = [1.0] * 50 + [3.0] * 50
    report = compare_over_images(
        [Fake("slow", clock, 2.0), Fake("fast", clock)], pixels(*times), wirings={"fast": 2}, rounds=3, clock=clock
    )
    slow, fast = report.rows
    assert (fast.min_ms, fast.p5_ms, fast.p95_ms, fast.max_ms) == pytest.approx((1, 1, 3, 3))
    assert fast.p50_ms == pytest.approx(2)
    assert fast.mean_ms.value == pytest.approx(2)
    assert fast.mean_ms.low < 2 < fast.mean_ms.high
    assert slow.mean_ms.value == pytest.approx(4)
    assert (fast.ratio.value, fast.ratio.low, fast.ratio.high) == pytest.approx((0.5, 0.5, 0.5))  # paired: no spread
    assert fast.images_ms == pytest.approx(times)
    assert (slow.wirings, fast.wirings) == (None, 2)
    assert report.to_json()["images"] == 100
    json.dumps(report.to_json())


def test_runners_take_turns_on_each_image_and_a_turn_opens_unrecorded():
    clock, log = Clock(), []
    runners = [Fake("a", clock, log=log), Fake("b", clock, log=log)]
    compare_over_images(runners, pixels(1, 2, 3), rounds=4, warmup_seconds=0, clock=clock)
    turns = log[2 * 3 :]  # after the warm-up, one pass each
    assert len(turns) == 4 * 3 * 2 * 2
    for i in range(0, len(turns), 4):
        first, again, second, last = turns[i : i + 4]
        assert first == again
        assert second == last
        assert {first[0], second[0]} == {"a", "b"}
        assert first[1] == second[1]
    assert {turns[i][0] for i in range(0, len(turns), 4)} == {"a", "b"}
    assert sorted(turns[i][1] for i in range(0, 12, 4)) == [1, 2, 3]


def test_a_disturbed_round_does_not_move_the_median():
    clock = Clock()
    runner = Fake("a", clock)
    count = [0]
    infer = runner.infer

    def disturbed(images):
        count[0] += 1
        infer(images)
        clock.now += 1.0 if count[0] == 40 else 0.0

    runner.infer = disturbed
    report = compare_over_images([runner], pixels(*[1.0] * 10), rounds=5, warmup_seconds=0, clock=clock)
    assert report.rows[0].max_ms == pytest.approx(1)


def test_wrong_input_and_another_provider_are_refused():
    clock = Clock()
    two = pixels(1, 2)
    with pytest.raises(InputError, match="different names"):
        compare_over_images([Fake("a", clock), Fake("a", clock)], two, clock=clock)
    with pytest.raises(InputError, match="2 images or more"):
        compare_over_images([Fake("a", clock)], two[:1], clock=clock)
    with pytest.raises(BackendError, match="asked for provider cuda"):
        compare_over_images([Fake("a", clock)], two, providers={"a": "cuda"}, clock=clock)


def test_table_and_plot_name_every_runner(tmp_path):
    clock = Clock()
    report = compare_over_images([Fake("a", clock, 2.0), Fake("b", clock)], pixels(1, 2, 3), rounds=2, clock=clock)
    console = Console(width=140, file=io.StringIO())
    console.print(report.table())
    text = console.file.getvalue()
    assert "mean x a" in text
    assert "0.500 [0.500, 0.500]" in text
    report.plot(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().lstrip().startswith("<?xml")
    with pytest.raises(InputError, match=r"\.png, \.svg or \.pdf"):
        report.plot(tmp_path / "plot.txt")


class Images:
    def __len__(self):
        return len(X)

    def __getitems__(self, indices):
        return X[indices], torch.zeros(len(indices))


class Validation:
    dataset = Images()


def test_the_all_open_net_is_measured_beside_a_dynamic_one():
    class How:
        image_size = 16

    model = two_ways(X)
    loaders = Loaders(None, Validation(), ["a"], How())  # type: ignore[arg-type]
    report = measure_over_images(
        [Target("net", module=model, image_size=16)], ["pytorch"], loaders, 12, threads=1, rounds=1
    )
    assert [row.runner for row in report.rows] == ["net, all open [pytorch]", "net [pytorch]"]
    assert report.images == 12
    assert report.rows[1].wirings == 2
    assert report.rows[0].wirings is None


def test_the_all_open_net_runs_every_block_for_every_image():
    from mcdeploy.compile.dynamic import open_everything

    model = two_ways(X)
    assert not record(model, X).executed_BN["layer1"].all()
    found = record(open_everything(model), X)
    assert all(executed_BN.all() for executed_BN in found.executed_BN.values())
    assert all(open_BE.all() for open_BE in found.open_BE.values())
