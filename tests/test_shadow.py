"""A shadow gets copies, its answers are compared and never sent, and it cannot hold up or break a request."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time

import numpy as np
import pytest
from mcruntime.bundle import seal
from mcruntime.errors import InputError
from mcruntime.preprocess import Preprocessing
from mcruntime.server import shadow as shadow_module
from mcruntime.server.loader import parse_target
from mcruntime.server.options import ServerOptions
from mcruntime.server.run import open_models
from mcruntime.server.shadow import Shadow, Shadows, open_shadows, relative_difference
from tiny_onnx import BIAS, expected_logits, some_images, tiny_manifest, write_bundle, write_model
from tiny_server import Gate, app_of, call, client_of, constant, finish, infer_request, logits_of, model_of, until

INFER = "/v2/models/tiny/infer"


def shadowed(engine, *, share=1.0, pick=lambda: 0.0, version="", models=None, **settings):
    """An application with one shadow, and the shadow."""
    shadow = Shadow(model_of(engine, name="other", bundle="cafe" * 16, **settings), "tiny", version)
    shadows = Shadows([shadow], share, pick)
    return app_of(*(models or [model_of()])), shadow, shadows


def run(parts, *requests):
    """Send requests, wait for the copies, and return the answers and what the shadow found."""
    application, shadow, shadows = parts
    with application as app:
        app.mirror = shadows.mirror
        answers = [call(app, "POST", path, json=body) for path, body in requests]
        finish(shadows)
    return answers, shadow.snapshot()


def test_equal_answers_differ_by_nothing():
    _, seen = run(shadowed(expected_logits), *[(INFER, infer_request(some_images(2, seed=i))) for i in range(3)])
    found = seen["1"]
    assert (found.mirrored, found.images, found.disagreements, found.failed, found.dropped) == (3, 6, 0, 0, 0)
    assert found.worst < 1e-6


def test_another_answer_is_counted_with_its_difference_and_is_never_sent():
    def engine(images):
        logits = expected_logits(images)
        logits[0] = -logits[0]
        return logits

    images = some_images(3)
    (answer,), seen = run(shadowed(engine), (INFER, infer_request(images)))
    np.testing.assert_allclose(logits_of(answer), expected_logits(images), atol=1e-5)
    found = seen["1"]
    assert (found.images, found.disagreements) == (3, 1)
    assert found.worst == pytest.approx(2.0, rel=1e-4)
    assert found.differences[-1] == 1


def test_the_difference_is_relative_to_each_rows_own_scale():
    reference = np.array([[1.0, -4.0], [100.0, 0.0]], np.float32)
    answer = np.array([[1.0, -3.0], [100.0, 10.0]], np.float32)
    assert relative_difference(answer, reference) == pytest.approx(0.25)
    assert relative_difference(reference, reference) == 0.0
    assert np.isfinite(relative_difference(np.ones((1, 2), np.float32) * 1e-38, np.zeros((1, 2), np.float32)))


def test_the_answer_is_written_before_the_copy_is_even_offered(monkeypatch):
    order = []
    application, shadow, shadows = shadowed(expected_logits)
    monkeypatch.setattr(shadow, "offer", lambda *_: order.append("copy"))
    sent = json.dumps(infer_request()).encode()

    async def receive():
        return {"type": "http.request", "body": sent}

    async def send(message):
        if message["type"] == "http.response.body":
            order.append("answer")

    scope = {"type": "http", "method": "POST", "path": INFER, "query_string": b"", "headers": [], "client": None}
    with application as app:
        app.mirror = shadows.mirror

        async def main():
            await app(scope, receive, send)
            await until(lambda: "copy" in order)

        asyncio.run(main())
        finish(shadows)
    assert order == ["answer", "copy"]


def test_a_stuck_shadow_holds_up_nobody_and_copies_that_do_not_fit_are_dropped():
    gate = Gate()
    application, shadow, shadows = shadowed(gate, max_queue=2, max_batch=1)
    with application as app:
        app.mirror = shadows.mirror

        async def main():
            async with client_of(app) as client:
                first = await client.post(INFER, json=infer_request())
                await asyncio.to_thread(gate.entered.acquire)
                return [first, *[await client.post(INFER, json=infer_request()) for _ in range(9)]]

        answers = asyncio.run(main())
        assert [answer.status_code for answer in answers] == [200] * 10
        gate.open()
        finish(shadows)
    found = shadow.snapshot()["1"]
    assert (found.mirrored, found.dropped, found.images) == (3, 7, 3)


def test_the_bytes_that_wait_are_bounded_too(monkeypatch):
    gate = Gate()
    one = some_images(1)
    monkeypatch.setattr(shadow_module, "MAX_WAITING_BYTES", 2 * one.nbytes)
    _, shadow, shadows = shadowed(gate, max_batch=1)
    for _ in range(5):
        shadow.offer("1", one, expected_logits(one))
    assert shadow.snapshot()["1"].dropped == 3
    gate.open()
    deadline = time.monotonic() + 10
    while shadow.snapshot()["1"].images < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    shadow.offer("1", one, expected_logits(one))
    finish(shadows)
    found = shadow.snapshot()["1"]
    assert (found.mirrored, found.dropped, found.images) == (3, 3, 3)


def test_the_end_does_not_wait_for_copies_that_wait():
    gate = Gate()
    one = some_images(1)
    _, shadow, shadows = shadowed(gate, max_batch=1)
    for _ in range(5):
        shadow.offer("1", one, expected_logits(one))
    assert gate.entered.acquire(timeout=20)
    threading.Timer(0.05, gate.open).start()
    shadows.close()
    assert not gate.entered.acquire(blocking=False), "it ran another copy"


@pytest.mark.parametrize(
    "engine",
    [
        lambda images: 1 / 0,
        lambda images: np.full((len(images), 4), np.nan, np.float32),
        lambda images: np.zeros((len(images), 3), np.float32),
    ],
)
def test_a_shadow_that_fails_is_counted_and_nobody_notices(engine):
    (answer,), seen = run(shadowed(engine), (INFER, infer_request()))
    assert answer.status_code == 200
    assert (seen["1"].failed, seen["1"].images, seen["1"].disagreements) == (1, 0, 0)


def test_a_share_of_the_requests_is_copied():
    picks = iter([0.1, 0.5, 0.29, 0.3, 0.9])
    parts = shadowed(expected_logits, share=0.3, pick=lambda: next(picks))
    _, seen = run(parts, *[(INFER, infer_request())] * 5)
    assert seen["1"].mirrored == 2


def test_no_share_copies_nothing():
    _, seen = run(shadowed(expected_logits, share=0.0), (INFER, infer_request()))
    assert seen == {}


def test_only_the_named_version_is_copied_and_each_version_is_compared_by_itself():
    models = [model_of(), model_of(constant(1.0), version="2")]
    requests = [(f"/v2/models/tiny/versions/{version}/infer", infer_request()) for version in (1, 2, 2)]
    _, seen = run(shadowed(expected_logits, version="2", models=models), *requests)
    assert {version: found.mirrored for version, found in seen.items()} == {"2": 2}
    models = [model_of(), model_of(constant(1.0), version="2")]
    _, seen = run(shadowed(expected_logits, models=models), *requests)
    assert {version: (found.mirrored, found.worst > 0.1) for version, found in seen.items()} == {
        "1": (1, False),
        "2": (2, True),
    }


def test_other_models_are_left_alone():
    parts = shadowed(expected_logits, models=[model_of(), model_of(name="else")])
    _, seen = run(parts, ("/v2/models/else/infer", infer_request()))
    assert seen == {}


def test_a_model_that_was_replaced_by_one_of_another_size_is_not_compared():
    parts = shadowed(expected_logits, models=[model_of(size=4)])
    images = some_images(1, size=4)
    (answer,), seen = run(parts, (INFER, infer_request(images)))
    assert answer.status_code == 200
    assert (seen["1"].dropped, seen["1"].mirrored) == (1, 0)


def test_a_model_that_was_replaced_by_one_with_other_preprocessing_is_not_compared():
    """The shapes are equal, so the copies would run; they would differ by what was prepared, and not by the nets."""
    how = Preprocessing(image_size=8, mean=(0.1, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", crop_pct=1.0)
    application, shadow, shadows = shadowed(expected_logits)
    with application as app:
        app.mirror = shadows.mirror
        assert call(app, "POST", INFER, json=infer_request()).status_code == 200
        before = app.models.add(model_of(how=how))
        for _ in range(2):
            assert call(app, "POST", INFER, json=infer_request()).status_code == 200
        before.close()
        finish(shadows)
    found = shadow.snapshot()["1"]
    assert (found.mirrored, found.images, found.dropped) == (1, 1, 2)


def test_an_image_is_copied_as_the_model_read_it():
    import io

    from PIL import Image

    got = []

    def engine(images):
        got.append(images.copy())
        return expected_logits(images)

    application, shadow, shadows = shadowed(engine)
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(stream, "PNG")
    with application as app:
        app.mirror = shadows.mirror
        assert call(app, "POST", "/predict", content=stream.getvalue()).status_code == 200
        finish(shadows)
    np.testing.assert_allclose(got[0][0, :, 0, 0], [1, -1, -1])
    assert shadow.snapshot()["1"].worst < 1e-6


def opened(tmp_path, *texts, served=("tiny",), **options):
    options = ServerOptions(max_batch=2, **options)
    targets = [parse_target(f"{name}={write_bundle(tmp_path / f'served-{name}', name)}") for name in served]
    models = open_models(targets, options)
    try:
        shadows = open_shadows(texts, models, options)
        shadows.close()
        return shadows
    finally:
        models.close()


def test_a_shadow_is_opened_by_name_version_or_its_own_name(tmp_path, capsys):
    write_bundle(tmp_path / "new", "tiny", seeds={"train": 1})
    for text, version in (("new", ""), ("tiny=new", ""), ("tiny:1=new", "1")):
        name, _, folder = text.rpartition("=")
        (shadow,) = opened(tmp_path, f"{name}{'=' if name else ''}{tmp_path / folder}").all
        assert (shadow.name, shadow.version) == ("tiny", version)
        assert shadow.model.about["threads"] == 1
        assert shadow.id == f"{json.loads((tmp_path / 'new' / 'manifest.json').read_text())['id'][:12]}@fp32"
    assert "shadow of tiny version 1: tiny: bundle" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused_at_the_start(tmp_path):
    other = write_bundle(tmp_path / "new", "new", seeds={"train": 1})
    with pytest.raises(InputError, match="no model 'new' is served; say whose requests it gets"):
        opened(tmp_path, str(other))
    with pytest.raises(InputError, match="no model 'tiny' version 7 is served"):
        opened(tmp_path, f"tiny:7={other}")
    with pytest.raises(InputError, match="shadows 'tiny' already"):
        opened(tmp_path, f"tiny={other}", f"tiny={other}")
    large = write_bundle(tmp_path / "large", "large", size=16)
    with pytest.raises(InputError, match="takes images"):
        opened(tmp_path, f"tiny={large}")
    how = Preprocessing(image_size=8, mean=(0.1, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", crop_pct=1.0)
    dark = write_bundle(tmp_path / "dark", "dark", preprocessing=how)
    with pytest.raises(InputError, match="prepares images in another way"):
        opened(tmp_path, f"tiny={dark}")
    named = write_bundle(tmp_path / "named", "named", labels=("a", "b", "c", "d"))
    with pytest.raises(InputError, match="other names"):
        opened(tmp_path, f"tiny={named}")


def changed(folder, shift):
    """Another bundle at the same place, whose classes answer so much more."""
    write_model(folder / "model.onnx", bias=BIAS + np.float32(shift))
    images = some_images(3)
    np.savez(folder / "selftest.npz", images=images, logits=expected_logits(images) + np.float32(shift))
    (folder / "manifest.json").unlink()
    seal(folder, tiny_manifest(seeds={"train": int(10 * shift)}))


def test_a_shadow_is_read_again_when_its_files_have_changed_and_counts_anew(tmp_path, caplog):
    caplog.set_level("INFO")
    options = ServerOptions(max_batch=2)
    models = open_models([parse_target(f"tiny={write_bundle(tmp_path / 'served')}")], options)
    folder = write_bundle(tmp_path / "new", seeds={"train": 7})
    twin = write_bundle(tmp_path / "twin", seeds={"train": 8})
    shadows = open_shadows([f"tiny={folder}", f"tiny={twin}"], models, options)
    first, second = shadows.all
    one = some_images(1)
    first.offer("1", one, expected_logits(one))
    asyncio.run(shadows.reload(models))
    assert shadows.all == [first, second], "nothing has changed"

    changed(folder, 1.0)
    asyncio.run(shadows.reload(models))
    fresh = shadows.all[0]
    assert fresh is not first
    assert fresh.id != first.id
    assert shadows.all[1] is second
    assert (fresh.name, fresh.version, fresh.snapshot()) == ("tiny", "", {})
    assert fresh.model.about["threads"] == 1
    first.offer("1", one, expected_logits(one))  # a copy that was on its way
    assert first.snapshot()["1"].dropped == 1, "the old engine is gone"
    fresh.offer("1", one, expected_logits(one) + 1)

    refused = {
        "shadows 'tiny' already": lambda: (shutil.rmtree(folder), shutil.copytree(twin, folder)),
        "takes images": lambda: (shutil.rmtree(folder), write_bundle(folder, size=16)),
        "no manifest.json": lambda: (folder / "manifest.json").unlink(),
        "cannot be read": lambda: (shutil.rmtree(folder), shutil.copytree(twin, folder), spoil(folder)),
    }
    for number, (words, act) in enumerate(refused.items(), 1):
        act()
        asyncio.run(shadows.reload(models))
        assert shadows.all == [fresh, second], words
        errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert len(errors) == number
        assert words in errors[-1] or words == "cannot be read"
        assert "the shadow stays as it was" in errors[-1]
    finish(shadows)
    found = fresh.snapshot()["1"]
    assert (found.mirrored, found.images) == (1, 1)
    assert found.worst < 1e-6, "it is the changed net that answered"
    models.close()


def spoil(folder):
    """Change a bit of the model, and the manifest's time, as a deployment that went wrong."""
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)
    (folder / "manifest.json").touch()


def test_a_damaged_shadow_stops_the_start(tmp_path):
    bundle = write_bundle(tmp_path / "new", "tiny", seeds={"train": 1})
    write_model(bundle / "model.onnx", bias=np.ones(4, np.float32))
    with pytest.raises(InputError):
        opened(tmp_path, str(bundle))
