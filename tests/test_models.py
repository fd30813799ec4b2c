"""Many models: names, versions, shares, loading and unloading under load; no answer is lost or mixed up."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import threading

import numpy as np
import pytest
from mcruntime.errors import BundleError, InputError
from mcruntime.preprocess import Preprocessing
from mcruntime.server.app import App
from mcruntime.server.auth import Keys
from mcruntime.server.batcher import Closed
from mcruntime.server.errors import NotFoundError, RequestError
from mcruntime.server.loader import find_in, parse_target
from mcruntime.server.models import Models, Source
from mcruntime.server.options import ServerOptions
from mcruntime.server.run import DrainingServer, open_models
from tiny_onnx import BIAS, expected_logits, some_images, write_bundle, write_model
from tiny_server import (
    Gate,
    app_of,
    busy_and_waiting,
    call,
    client_of,
    constant,
    infer_request,
    logits_of,
    model_of,
    until,
)

INFER = "/v2/models/tiny/infer"
KEY = "control-key-0123456789"


def ask(app, path=INFER, **headers):
    """What the model says, as one number: models of ``constant`` answer their own."""
    logits = logits_of(call(app, "POST", path, json=infer_request(), headers=headers))
    return float(logits[0, 0])


def index(app):
    return {(row["name"], row["version"]): row["state"] for row in call(app, "POST", "/v2/repository/index").json()}


def control(app, name, what):
    return call(app, "POST", f"/v2/repository/models/{name}/{what}", headers={"x-control-key": KEY})


class Shelf:
    """Sources whose contents a test changes: by version what is loaded next."""

    def __init__(self, name="tiny", **versions):
        self.name, self.now, self.num_loaded = name, dict(versions), 0
        self.made = []

    def __call__(self):
        return [self._source(version[1:], make) for version, make in self.now.items()]

    def _source(self, version, make):
        def load():
            self.num_loaded += 1
            model = make(version)
            self.made.append(model)
            return model

        return Source(self.name, version, load, lambda: str(id(make)))


def versioned(value, **settings):
    return lambda version: model_of(constant(value), version=version, **settings)


def damaged(version):
    raise BundleError("/secret/path: model.onnx was changed")


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "control").write_text(KEY + "\n")
    return Keys(tmp_path / "control")


# --------------------------------------------------------------------------------------------- names and versions


def test_each_name_and_version_answers_for_itself_and_the_newest_by_default():
    models = [model_of(constant(i), name, version) for i, (name, version) in enumerate(
        [("a", "1"), ("a", "2"), ("a", "10"), ("b", "1")]
    )]  # fmt: skip
    with app_of(*models) as app:
        assert [ask(app, f"/v2/models/a/versions/{version}/infer") for version in (1, 2, 10)] == [0, 1, 2]
        assert ask(app, "/v2/models/a/infer") == 2, "not the newest"
        assert ask(app, "/v2/models/b/infer") == 3
        assert call(app, "POST", "/v2/models/b/versions/2/infer", json=infer_request()).status_code == 404
        assert call(app, "GET", "/v2/models/a").json()["versions"] == ["1", "2", "10"]
        assert call(app, "GET", "/v2/models").json() == {"models": ["a", "b"]}


def test_shares_split_the_requests_that_name_no_version():
    picks = iter([0.0, 0.899, 0.9, 0.95, 0.5])
    models = [model_of(constant(i), version=str(i)) for i in (1, 2, 3)]
    with app_of(*models, split={"tiny": {"1": 90.0, "2": 10.0}}, pick=lambda: next(picks)) as app:
        assert [ask(app) for _ in range(5)] == [1, 1, 2, 2, 1]
        assert ask(app, "/v2/models/tiny/versions/3/infer") == 3


def test_a_split_comes_out_as_asked():
    rng = random.Random(0)
    models = Models(split={"tiny": {"1": 3.0, "2": 1.0}}, pick=rng.random)
    for version in ("1", "2"):
        models.add(model_of(version=version))
    chosen = [models.find("tiny").spec.version for _ in range(2000)]
    models.close()
    assert 0.72 < chosen.count("1") / 2000 < 0.78


def test_one_request_chooses_one_version_even_if_the_versions_take_other_images():
    # The request is checked, run and named by the same version; a second choice would have taken the other.
    picks = iter([0.0, 0.9] * 10)
    models = [model_of(version="1", size=8), model_of(version="2", size=4)]
    with app_of(*models, split={"tiny": {"1": 50.0, "2": 50.0}}, pick=lambda: next(picks)) as app:
        response = call(app, "POST", INFER, json=infer_request(some_images(1, size=8)))
        assert response.status_code == 200, response.text
        assert response.json()["model_version"] == "1"
        assert next(picks) == 0.9, "it chose twice"


def test_an_image_is_prepared_for_the_version_that_reads_it():
    import io

    from PIL import Image

    picks = iter([0.0, 0.9] * 10)
    dark = Preprocessing(image_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bicubic", crop_pct=1.0)
    got = {}

    def engine(version):
        def infer(images):
            got[version] = float(images[0, 0, 0, 0])
            return expected_logits(images)

        return infer

    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (0, 0, 0)).save(stream, "PNG")
    models = [model_of(engine("1"), version="1"), model_of(engine("2"), version="2", how=dark)]
    with app_of(*models, split={"tiny": {"1": 50.0, "2": 50.0}}, pick=lambda: next(picks)) as app:
        assert call(app, "POST", "/predict", content=stream.getvalue()).json()["version"] == "1"
    assert got == {"1": -1.0}


def test_a_failure_is_counted_for_the_version_that_was_chosen():
    picks = iter([0.0, 0.9] * 10)
    models = [model_of(version="1"), model_of(version="2")]
    with app_of(*models, split={"tiny": {"1": 50.0, "2": 50.0}}, pick=lambda: next(picks)) as app:
        assert call(app, "POST", INFER, json=infer_request(datatype="INT8")).status_code == 400
    assert [model.statistics.failures["input"] for model in models] == [1, 0]


def test_a_share_of_a_version_that_was_unloaded_goes_to_the_others():
    shelf = Shelf(v1=versioned(1), v2=versioned(2))
    with app_of(split={"tiny": {"1": 90.0, "2": 10.0}}, sources=shelf, pick=lambda: 0.0) as app:
        asyncio.run(app.models.load("tiny"))
        assert ask(app) == 1
        del shelf.now["v1"]
        asyncio.run(app.models.load("tiny"))
        assert ask(app) == 2


# ------------------------------------------------------------------------------------------- control through HTTP


def test_models_are_unloaded_and_loaded_by_who_has_a_control_key(keys):
    shelf = Shelf(v1=versioned(1))
    with app_of(sources=shelf, control=keys) as app:
        assert index(app) == {("tiny", "1"): "UNAVAILABLE"}
        assert control(app, "tiny", "load").status_code == 200
        assert ask(app) == 1
        assert index(app) == {("tiny", "1"): "READY"}
        refused = call(
            app, "POST", "/v2/repository/models/tiny/unload", headers={"x-control-key": "wrong-key-01234567"}
        )
        assert refused.status_code == 403
        assert ask(app) == 1
        assert control(app, "tiny", "unload").status_code == 200
        assert call(app, "POST", INFER, json=infer_request()).status_code == 404
        assert index(app) == {("tiny", "1"): "UNAVAILABLE"}
        assert call(app, "GET", "/v2/models/tiny/ready").status_code == 400
        assert control(app, "tiny", "load").status_code == 200
        assert ask(app) == 1


def test_control_is_off_without_control_keys(keys):
    with app_of(model_of()) as app:
        for what in ("load", "unload"):
            assert control(app, "tiny", what).status_code == 403
        assert call(app, "POST", INFER, json=infer_request()).status_code == 200


def test_only_names_that_are_known_can_be_loaded(keys):
    with app_of(sources=Shelf(v1=versioned(1)), control=keys) as app:
        for name in ("nope", "..", "%2e%2e%2fetc", "tiny%00"):
            response = control(app, name, "load")
            assert response.status_code in (400, 404), name
        assert control(app, "nope", "unload").status_code == 200  # as in Triton


def test_a_damaged_bundle_leaves_the_old_one_and_tells_no_path(keys, caplog):
    shelf = Shelf(v1=versioned(1))
    with app_of(sources=shelf, control=keys) as app:
        assert control(app, "tiny", "load").status_code == 200
        shelf.now["v1"] = damaged
        response = control(app, "tiny", "load")
        assert response.status_code == 400
        assert "still answers" in response.json()["error"]
        assert "secret" not in response.text
        assert "/secret/path" in caplog.text
        assert ask(app) == 1
        assert index(app) == {("tiny", "1"): "READY"}


def test_a_failure_that_is_our_own_leaves_the_old_one_too(keys, caplog):
    shelf = Shelf(v1=versioned(1))
    with app_of(sources=shelf, control=keys) as app:
        control(app, "tiny", "load")
        shelf.now["v1"] = lambda version: 1 / 0
        assert control(app, "tiny", "load").status_code == 400
        assert "ZeroDivisionError" in caplog.text
        assert ask(app) == 1


def test_a_name_is_loaded_whole_or_not_at_all(keys):
    shelf = Shelf(v1=versioned(1), v2=versioned(2))
    with app_of(sources=shelf, control=keys) as app:
        control(app, "tiny", "load")
        shelf.now = {"v1": versioned(10), "v2": damaged}
        assert control(app, "tiny", "load").status_code == 400
        assert [ask(app, f"/v2/models/tiny/versions/{version}/infer") for version in (1, 2)] == [1, 2]
        shelf.made[-1].batcher.join(10)
        with pytest.raises(Closed):
            shelf.made[-1].batcher.submit(some_images(1), print)


def test_a_repository_that_cannot_be_read_stops_control_and_nothing_else(keys, caplog):
    def gone():
        raise InputError("/secret/repository: cannot be read")

    with app_of(model_of(constant(1)), sources=gone, control=keys) as app:
        for path in ("models/tiny/load", "index"):
            response = call(app, "POST", f"/v2/repository/{path}", headers={"x-control-key": KEY})
            assert response.status_code == 500
            assert response.json() == {"error": "the model repository cannot be read"}
        asyncio.run(app.models.reload())
        assert ask(app) == 1
    assert caplog.text.count("/secret/repository") == 3


# ------------------------------------------------------------------------------------------- while requests come in


def test_hot_reload_under_load_loses_no_request_and_mixes_no_batch():
    """Each generation answers its own number, and notes in which batches it ran."""
    generation = [0]
    mixed, sizes = [], []

    def make(version):
        generation[0] += 1
        mine = float(generation[0])

        def infer(images):
            sizes.append(len(images))
            # Requests carry their number in the image; whole batches come back as one generation's.
            return np.stack([np.array([mine, image[0, 0, 0], 0, 0], np.float32) for image in images])

        return model_of(infer, version=version, max_queue=1000, max_batch=8)

    shelf = Shelf(v1=make)
    answers = []

    async def client_loop(client, number, stop):
        count = 0
        while not stop.is_set():
            images = np.full((1 + count % 3, 3, 8, 8), number * 1000 + count, np.float32)
            logits = logits_of(await client.post(INFER, json=infer_request(images)))
            assert (logits[:, 1] == images[0, 0, 0, 0]).all(), "somebody else's answer"
            if len(set(logits[:, 0].tolist())) != 1:
                mixed.append(logits)
            answers.append(logits[0, 0])
            count += 1

    async def main(app):
        await app.models.load("tiny")
        stop = asyncio.Event()
        async with client_of(app) as client:
            clients = [asyncio.create_task(client_loop(client, number, stop)) for number in range(8)]
            for _ in range(20):
                await app.models.load("tiny")
                await asyncio.sleep(0.01)
            stop.set()
            await asyncio.gather(*clients)

    with app_of(sources=shelf) as app:
        asyncio.run(main(app))
        statistics = app.models.statistics["tiny", "1"]
    assert not mixed
    assert len(set(answers)) >= 15, "the reloads did not happen under load"
    assert max(sizes) > 1, "nothing was batched"
    with statistics.settled():
        assert statistics.durations["success"].count == len(answers)
        assert statistics.inferences == sum(sizes)
        assert not statistics.failures
    for model in shelf.made:
        assert model.batcher.join(10), "a replaced model is still there"


def test_a_request_in_flight_is_answered_by_the_model_that_took_it():
    gate = Gate(constant(1.0))
    shelf = Shelf(v1=lambda version: model_of(gate))

    async def main(app):
        async with client_of(app) as client:
            await app.models.load("tiny")
            old = await busy_and_waiting(client, gate, app.models.find("tiny"), 2)
            shelf.now["v1"] = versioned(2.0)
            await app.models.load("tiny")
            new = await client.post(INFER, json=infer_request())
            gate.open()
            return [float(logits_of(await task)[0, 0]) for task in old], float(logits_of(new)[0, 0])

    with app_of(sources=shelf) as app:
        assert asyncio.run(main(app)) == ([1.0] * 3, 2.0)


def test_unload_answers_what_was_accepted():
    gate = Gate(constant(1.0))

    async def main(app):
        async with client_of(app) as client:
            tasks = await busy_and_waiting(client, gate, app.models.find("tiny"), 2)
            await app.models.unload("tiny")
            refused = await client.post(INFER, json=infer_request())
            gate.open()
            return [(await task).status_code for task in tasks], refused.status_code

    with app_of(model_of(gate)) as app:
        assert asyncio.run(main(app)) == ([200] * 3, 404)


def test_a_request_that_met_a_closed_batcher_goes_to_the_next_model_of_the_same_inputs():
    async def ask_after(app, replacement):
        old = app.models.find("tiny")
        old.batcher.close()
        app.models.add(replacement)
        _, answer = await app.models.infer("tiny", "", some_images(1), 5.0, first=old)
        return float(answer.logits[0, 0])

    with app_of(model_of(constant(1.0))) as app:
        assert asyncio.run(ask_after(app, model_of(constant(2.0)))) == 2.0
    with app_of(model_of()) as app, pytest.raises(RequestError, match="other inputs"):
        asyncio.run(ask_after(app, model_of(size=4)))
    with app_of(model_of()) as app:
        app.models.find("tiny").batcher.close()
        with pytest.raises(RequestError, match="being unloaded"):
            asyncio.run(app.models.infer("tiny", "", some_images(1), 5.0))


def test_what_is_asked_for_while_a_load_lasts_happens_after_it():
    running, most = [0], [0]

    def make(version):
        running[0] += 1
        most[0] = max(most[0], running[0])
        threading.Event().wait(0.02)
        running[0] -= 1
        return model_of(constant(1))

    async def main(app):
        await asyncio.gather(*(app.models.load("tiny") for _ in range(4)), app.models.unload("tiny"))

    with app_of(sources=Shelf(v1=make)) as app:
        asyncio.run(main(app))
        with pytest.raises(NotFoundError):  # unloaded last, as asked last
            app.models.find("tiny")
    assert most == [1]


# ------------------------------------------------------------------------------------------------------- reloading


def test_reload_loads_what_is_new_or_changed_and_drops_what_is_gone():
    shelf = Shelf(v1=versioned(1), v2=versioned(2))

    async def reload(app):
        before = shelf.num_loaded
        await app.models.reload()
        return shelf.num_loaded - before

    with app_of(sources=shelf) as app:
        assert asyncio.run(reload(app)) == 2
        assert asyncio.run(reload(app)) == 0, "it loaded what had not changed"
        shelf.now["v2"] = versioned(20)
        shelf.now["v3"] = versioned(3)
        assert asyncio.run(reload(app)) == 2
        assert [ask(app, f"/v2/models/tiny/versions/{version}/infer") for version in (1, 2, 3)] == [1, 20, 3]
        del shelf.now["v3"]
        asyncio.run(reload(app))
        assert ask(app) == 20
        shelf.now.clear()
        asyncio.run(reload(app))
        with pytest.raises(NotFoundError):
            app.models.find("tiny")


def test_reload_leaves_alone_what_a_client_has_unloaded():
    shelf = Shelf(v1=versioned(1))
    with app_of(sources=shelf) as app:
        asyncio.run(app.models.load("tiny"))
        asyncio.run(app.models.unload("tiny"))
        asyncio.run(app.models.reload())
        with pytest.raises(NotFoundError):
            app.models.find("tiny")
        asyncio.run(app.models.load("tiny"))
        assert ask(app) == 1


def test_reload_goes_on_after_one_name_has_failed(caplog):
    good, bad = Shelf("good", v1=versioned(1, name="good")), Shelf("bad", v1=damaged)
    with app_of(sources=lambda: [*bad(), *good()]) as app:
        asyncio.run(app.models.reload())
        assert ask(app, "/v2/models/good/infer") == 1
    assert "bad" in caplog.text


def test_sighup_reloads_a_running_server(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    options = ServerOptions(max_batch=2)
    models = open_models([parse_target(f"tiny={bundle}")], options)
    app = App(models, options)
    images = some_images(1)

    async def main(listener):
        server = DrainingServer(app, options)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        before = models.find("tiny")
        write_anew(bundle, bias=BIAS + 1)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: models.find("tiny") is not before)
        _, answer = await models.infer("tiny", "", images, 5.0)
        server.should_exit = True
        await task
        return answer.logits

    with socket.create_server(("127.0.0.1", 0)) as listener:
        logits = asyncio.run(main(listener))
    app.close()
    models.close()
    np.testing.assert_allclose(logits, expected_logits(images) + 1, atol=1e-5)


# ------------------------------------------------------------------------------------------------- bundles on disk


def write_anew(folder, bias):
    """Another bundle at the same place, by one rename, as a deployment would."""
    new = folder.with_name(folder.name + ".new")
    write_bundle(new)
    from mcruntime.bundle import seal
    from tiny_onnx import tiny_manifest

    write_model(new / "model.onnx", bias=bias)
    images = some_images(3)
    np.savez(new / "selftest.npz", images=images, logits=expected_logits(images) - BIAS + bias)
    seal(new, tiny_manifest())
    shutil.rmtree(folder)
    new.rename(folder)


def test_a_repository_is_names_and_versions_and_nothing_that_points_elsewhere(tmp_path):
    repository = tmp_path / "repository"
    outside = write_bundle(tmp_path / "outside")
    write_bundle(repository / "plain")
    write_bundle(repository / "many" / "1")
    write_bundle(repository / "many" / "12")
    for name in ("01", "0", "x", "1234567890", "-1"):
        write_bundle(repository / "many" / name)
    write_bundle(repository / ".hidden")
    write_bundle(repository / "bad name")
    (repository / "empty").mkdir()
    (repository / "file").write_text("x")
    (repository / "link").symlink_to(outside)
    (repository / "many" / "2").symlink_to(outside)
    found = [(target.name, target.version, target.path.name) for target in find_in(repository)]
    assert found == [("many", "1", "1"), ("many", "12", "12"), ("plain", "1", "plain")]
    with pytest.raises(InputError, match="cannot be read"):
        find_in(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_read_does_not_hide_the_others(tmp_path, monkeypatch, caplog):
    write_bundle(tmp_path / "good")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [target.name for target in find_in(tmp_path)] == ["good"]
    assert "Permission denied" in caplog.text


def test_a_repository_of_real_bundles_is_served_and_follows_the_disk(tmp_path, keys):
    repository = tmp_path / "repository"
    write_bundle(repository / "a")
    options = ServerOptions(repository=repository, max_batch=2)
    models = open_models([], options)
    app = App(models, options, control=keys)
    images = some_images(1)
    try:
        assert index(app) == {("a", "1"): "READY"}
        write_bundle(repository / "b" / "3")
        assert index(app) == {("a", "1"): "READY", ("b", "3"): "UNAVAILABLE"}
        assert control(app, "b", "load").status_code == 200
        assert call(app, "GET", "/v2/models/b").json()["versions"] == ["3"]
        # A bundle whose files were changed without sealing them anew: refused, and the old one answers.
        write_model(repository / "a" / "model.onnx", bias=BIAS + 1)
        assert control(app, "a", "load").status_code == 400
        logits = logits_of(call(app, "POST", "/v2/models/a/infer", json=infer_request(images)))
        np.testing.assert_allclose(logits, expected_logits(images), atol=1e-5)
        # One that is sealed, but fails its self-test.
        write_anew(repository / "a", bias=BIAS)
        from mcruntime.bundle import seal
        from tiny_onnx import tiny_manifest

        np.savez(repository / "a" / "selftest.npz", images=some_images(3), logits=np.ones((3, 4), np.float32))
        seal(repository / "a", tiny_manifest())
        assert control(app, "a", "load").status_code == 400
        np.testing.assert_allclose(
            logits_of(call(app, "POST", "/v2/models/a/infer", json=infer_request(images))),
            expected_logits(images),
            atol=1e-5,
        )
        # A good one.
        write_anew(repository / "a", bias=BIAS + 2)
        assert control(app, "a", "load").status_code == 200
        logits = logits_of(call(app, "POST", "/v2/models/a/infer", json=infer_request(images)))
        np.testing.assert_allclose(logits, expected_logits(images) + 2, atol=1e-5)
        shutil.rmtree(repository / "b")
        asyncio.run(models.reload())
        assert index(app)[("b", "3")] == "UNAVAILABLE"
        assert call(app, "GET", "/v2/models/b").status_code == 404
    finally:
        app.close()
        models.close()


def test_a_bundle_that_changes_while_it_is_loaded_is_loaded_again_by_the_next_reload():
    changes = [0]

    def load():
        changes[0] = 1  # by somebody else, in the middle of it
        return model_of()

    source = Source("tiny", "1", load, lambda: str(changes[0]))
    models = Models(lambda: [source])
    first = models.load_first(source)
    asyncio.run(models.reload())
    second = models.find("tiny")
    assert second is not first
    asyncio.run(models.reload())
    assert models.find("tiny") is second
    models.close()


def test_a_split_that_names_what_is_not_there_stops_the_start(tmp_path):
    bundle = write_bundle(tmp_path / "bundle")
    with pytest.raises(InputError, match="no version 2 of 'tiny'"):
        open_models([parse_target(bundle)], ServerOptions(split={"tiny": {"1": 1.0, "2": 1.0}}))


def test_two_bundles_of_one_name_must_be_numbered(tmp_path):
    first, second = write_bundle(tmp_path / "a"), write_bundle(tmp_path / "b")
    with pytest.raises(InputError, match="tiny:1=FOLDER tiny:2=FOLDER"):
        open_models([parse_target(first), parse_target(second)], ServerOptions())
    models = open_models([parse_target(first), parse_target(f"tiny:2={second}")], ServerOptions())
    assert models.versions("tiny") == ["1", "2"]
    models.close()


def test_the_index_is_read_while_models_come_and_go():
    with app_of(model_of()) as app:

        class Busy(dict):
            """Versions; whoever looks at them meets another model that is loaded just then."""

            def __iter__(self):
                app.models.add(model_of(name="late"))
                return super().__iter__()

        entry = app.models._entries["tiny"]
        entry.loaded = Busy(entry.loaded)
        names = {row["name"] for row in app.models.index()}
        entry.loaded = dict(entry.loaded)
    assert "tiny" in names


def test_those_whose_statistics_are_asked_for_are_all_of_a_name_or_one_in_the_order_of_their_numbers():
    models = Models()
    for name, version in (("b", "10"), ("b", "9"), ("a", "1")):
        models.add(model_of(name=name, version=version))

    def chosen(*which):
        return [(model.spec.name, model.spec.version) for model in models.chosen(*which)]

    try:
        assert chosen() == [("a", "1"), ("b", "9"), ("b", "10")]
        assert chosen("b") == [("b", "9"), ("b", "10")]
        assert chosen("b", "10") == [("b", "10")]
        for which in (("c",), ("b", "11"), ("c", "1")):
            with pytest.raises(NotFoundError):
                chosen(*which)
    finally:
        models.close()


def test_the_index_can_be_of_what_answers_only():
    async def unloaded():
        await models.unload("b")

    models = Models()
    models.add(model_of(name="a"))
    models.add(model_of(name="b"))
    asyncio.run(unloaded())
    try:
        assert [(row["name"], row["state"]) for row in models.index()] == [("a", "READY"), ("b", "UNAVAILABLE")]
        assert [row["name"] for row in models.index(only_ready=True)] == ["a"]
    finally:
        models.close()
