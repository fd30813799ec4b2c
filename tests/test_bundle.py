"""A bundle is what was sealed, byte for byte, and nothing in it can run code."""

from __future__ import annotations

import json
import os
import pickle
import zipfile

import mcruntime.bundle as bundle_module
import numpy as np
import pytest
from mcruntime.bundle import SUFFIXES, load_bundle, seal
from mcruntime.engine import OnnxRunner
from mcruntime.errors import BundleError, InputError, ParityError
from mcruntime.manifest import Manifest, ModelOutput, Parity
from tiny_onnx import BIAS, expected_logits, some_images, tiny_file, tiny_manifest, write_bundle, write_model


class Answers:
    """A runner that answers with a function of the images."""

    name = "fake"

    def __init__(self, answer):
        self.infer = answer

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def facts(self):
        return {}


@pytest.fixture
def folder(tmp_path):
    return write_bundle(tmp_path / "bundle")


def refusal(folder):
    """The sentence with which a folder is refused: it names the place and says what to do."""
    with pytest.raises(BundleError) as caught:
        load_bundle(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert ";" in message or "makes one" in message
    return message


def rewrite(folder, **changes):
    """Change the manifest and give it a fitting id again, as someone who wants to deceive would."""
    path = folder / "manifest.json"
    tree = json.loads(path.read_text()) | changes
    del tree["id"]
    manifest = Manifest.model_validate_json(json.dumps(tree))
    path.write_text(json.dumps({"id": manifest.id, **tree}))


def replace_selftest(folder, **arrays):
    np.savez(folder / "selftest.npz", **arrays)
    seal(folder, tiny_manifest())


def test_a_sealed_bundle_loads_and_lists_every_file(folder):
    bundle = load_bundle(folder)
    assert set(bundle.manifest.files) == {"model.onnx", "certificate.json", "selftest.npz", "reports/parity.md"}
    assert bundle.model_path == folder / "model.onnx"
    assert bundle.manifest.labels == ("red", "green", "blue", "dark")
    assert json.loads((folder / "manifest.json").read_text())["id"] == bundle.manifest.id


def test_the_id_follows_the_content_and_not_the_time(tmp_path, folder):
    first = load_bundle(folder).manifest
    later = first.model_copy(update={"created": "2099-01-01T00:00:00Z"})
    other = first.model_copy(update={"git_commit": "0" * 40})
    assert first.id == later.id != other.id
    again = seal(folder, tiny_manifest())
    assert again.id == first.id
    (folder / "reports" / "parity.md").write_text("# other\n")
    assert seal(folder, tiny_manifest()).id != first.id


def test_one_changed_byte_in_any_file_is_refused(folder):
    names = sorted(load_bundle(folder).manifest.files)
    for name in names:
        path = folder / name
        whole = path.read_bytes()
        for place in {0, len(whole) // 2, len(whole) - 1}:
            damaged = bytearray(whole)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            assert f"{name} was changed" in refusal(folder)
        path.write_bytes(whole)
    load_bundle(folder)


def test_a_changed_manifest_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"red"', '"rad"'))
    assert "changed after it was sealed" in refusal(folder)


def test_a_file_of_another_size_is_refused_with_both_sizes(folder):
    with (folder / "reports" / "parity.md").open("a") as stream:
        stream.write("more")
    assert "has 13 bytes instead of 9" in refusal(folder)


def test_a_missing_file_is_refused(folder):
    (folder / "certificate.json").unlink()
    assert "certificate.json is missing" in refusal(folder)


def test_an_extra_file_is_refused(folder):
    (folder / "reports" / "note.txt").write_text("hello")
    assert "reports/note.txt is not listed" in refusal(folder)


@pytest.mark.parametrize("name", ["model.pt", "model.pt2", "hook.py", "model.pkl", "lib.so", ".hidden", "x.npy", "x"])
def test_a_file_of_a_kind_that_does_not_belong_is_refused_when_sealing_and_when_loading(folder, name):
    (folder / name).write_bytes(b"x")
    assert f"{name} does not belong" in refusal(folder)
    with pytest.raises(BundleError, match="does not belong"):
        seal(folder, tiny_manifest())
    assert not (folder / "manifest.json").exists()


def test_no_kind_of_file_that_holds_code_or_pickles_is_allowed():
    assert set(SUFFIXES) == {".onnx", ".data", ".json", ".npz", ".html", ".svg", ".png", ".md", ".txt"}


@pytest.mark.parametrize("target", ["../outside.txt", "model.onnx", "/etc/hostname", "nowhere"])
def test_a_symbolic_link_is_refused_wherever_it_leads(folder, target):
    (folder.parent / "outside.txt").write_text("secret")
    (folder / "link.txt").symlink_to(target)
    assert "link.txt is a symbolic link" in refusal(folder)


def test_a_linked_folder_or_manifest_is_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    assert "more is a symbolic link" in refusal(folder)
    (folder / "more").unlink()
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    (folder / "manifest.json").symlink_to(tmp_path / "manifest.json")
    assert "no manifest.json" in refusal(folder)


def test_a_pipe_is_refused_and_not_read(folder):
    os.mkfifo(folder / "pipe.txt")
    assert "pipe.txt is not a plain file" in refusal(folder)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a/../b.txt", "./a.txt", "a//b.txt", "a\\b.txt", ""])
def test_a_listed_name_that_could_leave_the_folder_is_refused(folder, name):
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    tree["files"][name] = tree["files"]["model.onnx"]
    path.write_text(json.dumps(tree))
    assert "files" in refusal(folder)


def test_no_folder_no_manifest_and_no_json_are_three_different_sentences(folder, tmp_path):
    assert "no such bundle folder" in refusal(tmp_path / "nowhere")
    path = folder / "manifest.json"
    path.write_text("{")
    assert "not readable as JSON" in refusal(folder)
    path.write_bytes(b"\xff\xfe{")
    assert "not readable as JSON" in refusal(folder)
    path.write_text("[" * 100_000)
    assert "not readable as JSON" in refusal(folder)
    path.write_text("[]")
    assert "expected a JSON object" in refusal(folder)
    path.unlink()
    assert "no manifest.json" in refusal(folder)


@pytest.mark.parametrize("version", [3, 1, "2", None])
def test_another_schema_version_is_refused_by_number(folder, version):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": version}))
    assert f"schema_version is {version!r}, this mcdeploy reads 2" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("surprise", 1), ("git_commit", "main"), ("labels", ["red"]), ("name", "../x"), ("name", "a b"), ("parity", []),
     ("created", "yesterday"), ("parents", {"recipe": "abc"}), ("params", {"before": -1, "after": 0})],
)  # fmt: skip
def test_a_wrong_key_or_value_in_the_manifest_is_refused(folder, key, value):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    message = refusal(folder)
    assert "manifest.json: " in message
    assert "changed after it was sealed" not in message, "refused for what it says, before its id is looked at"


def test_a_parity_check_that_did_not_pass_is_refused_when_sealing_and_when_loading(folder):
    failed = Parity(
        hop="fold", batch=1, images="noise", max_abs=1.0, p99=1.0, cosine=0.5, top1_agreement=0.0, passed=False
    )
    rewrite(folder, parity=[failed.model_dump()])
    assert "parity after 'fold' did not pass" in refusal(folder)
    with pytest.raises(BundleError, match="'fold' did not pass"):
        seal(folder, tiny_manifest(parity=(failed,)))


def test_a_bundle_without_its_certificate_cannot_be_sealed(folder):
    (folder / "certificate.json").unlink()
    with pytest.raises(BundleError, match=r"does not list certificate\.json"):
        seal(folder, tiny_manifest())
    assert not (folder / "manifest.json").exists()


def test_a_seal_that_was_cut_off_leaves_no_bundle_and_can_be_repeated(folder):
    (folder / "manifest.json").rename(folder / ".manifest.json.part")
    assert "no manifest.json" in refusal(folder)
    seal(folder, tiny_manifest())
    load_bundle(folder)


class Explosive:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_array_file_with_a_pickle_in_it_is_refused_and_the_pickle_does_not_run(folder, tmp_path):
    np.savez(folder / "extra.npz", trap=np.array([Explosive(tmp_path / "ran")], dtype=object))
    with pytest.raises(BundleError, match=r"extra\.npz: holds a pickle"):
        seal(folder, tiny_manifest())
    (folder / "extra.npz").write_bytes(pickle.dumps(Explosive(tmp_path / "ran")))
    with pytest.raises(BundleError, match=r"extra\.npz: is not an array file"):
        seal(folder, tiny_manifest())
    with zipfile.ZipFile(folder / "extra.npz", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Explosive(tmp_path / "ran")))
    with pytest.raises(BundleError, match="holds something that is no array"):
        seal(folder, tiny_manifest())
    assert not (tmp_path / "ran").exists()


def test_an_array_file_that_unpacks_to_too_much_is_refused_before_unpacking(folder, monkeypatch):
    np.savez_compressed(folder / "bomb.npz", zeros=np.zeros(3 << 20, dtype=np.uint8))
    assert (folder / "bomb.npz").stat().st_size < 10_000
    seal(folder, tiny_manifest())
    monkeypatch.setattr(bundle_module, "MAX_NPZ_BYTES", 2 << 20)
    assert "bomb.npz: unpacks to more than 2 MiB" in refusal(folder)


@pytest.mark.parametrize("length", [0, 1, 40, -40, -1])
def test_an_array_file_cut_short_is_refused(folder, length):
    whole = (folder / "selftest.npz").read_bytes()
    (folder / "selftest.npz").write_bytes(whole[:length])
    with pytest.raises(BundleError, match=r"selftest\.npz"):
        seal(folder, tiny_manifest())


def test_selftest_arrays_that_do_not_fit_the_manifest_are_refused(folder):
    images, logits = some_images(2), expected_logits(some_images(2))
    nan = np.full_like(logits, np.nan)
    for arrays in (
        {"images": images},
        {"images": images, "logits": logits[:, :3]},
        {"images": images[:, :, :4], "logits": logits},
        {"images": images.astype(np.float64), "logits": logits},
        {"images": images[:1], "logits": logits},
        {"images": images[:0], "logits": logits[:0]},
        {"images": images, "logits": nan},
    ):
        with pytest.raises(BundleError, match=r"selftest\.npz"):
            replace_selftest(folder, **arrays)
    replace_selftest(folder, images=images, logits=logits)


def test_labels_classes_and_shapes_must_agree():
    with pytest.raises(ValueError, match="4 labels for 5 classes"):
        tiny_manifest(output=ModelOutput(name="logits", num_classes=5))
    with pytest.raises(ValueError, match="images are made as"):
        tiny_manifest(input={"name": "image", "shape": (3, 9, 8)})


def test_the_selftest_passes_on_the_real_model(folder):
    bundle = load_bundle(folder)
    with OnnxRunner(bundle.model_path, threads=1) as runner:
        assert bundle.selftest(runner) < 1e-6


def test_the_selftest_fails_on_a_model_that_is_a_little_off(folder):
    bundle = load_bundle(folder)
    with (
        OnnxRunner(write_model(folder / "other.onnx", bias=BIAS + np.float32(1e-3)), threads=1) as runner,
        pytest.raises(ParityError, match="logits differ"),
    ):
        bundle.selftest(runner)


def test_the_selftest_tolerance_is_relative_to_the_largest_logit(folder):
    rewrite(folder, models={"fp32": tiny_file(selftest_max_abs=0.01).model_dump()})
    bundle = load_bundle(folder)
    largest = float(np.abs(expected_logits(some_images(3))).max())
    for factor, passes in ((0.9, True), (1.1, False)):
        runner = Answers(lambda images, shift=np.float32(0.01 * largest * factor): expected_logits(images) + shift)
        if passes:
            assert bundle.selftest(runner) == pytest.approx(0.01 * factor, rel=1e-2)
        else:
            with pytest.raises(ParityError, match=r"more than 1\.0e-02"):
                bundle.selftest(runner)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda images: expected_logits(images) * np.nan, "NaN"),
        (lambda images: expected_logits(images)[:, :2], r"expected logits \[3, 4\], got \[3, 2\]"),
        (lambda images: np.roll(expected_logits(images), 1, axis=0), "differ"),
        (lambda images: expected_logits(images) + (len(images) == 1), "differ"),
    ],
    ids=["nan", "shape", "answers of other images", "wrong only alone"],
)
def test_the_selftest_refuses_wrong_answers(folder, answer, message):
    with pytest.raises(ParityError, match=message):
        load_bundle(folder).selftest(Answers(answer))


def test_a_model_that_takes_other_images_than_the_manifest_says_is_a_bundle_error(folder):
    write_model(folder / "model.onnx", size=16)
    seal(folder, tiny_manifest())
    bundle = load_bundle(folder)
    with OnnxRunner(bundle.model_path, threads=1) as runner, pytest.raises(BundleError, match="the model is not what"):
        bundle.selftest(runner)


def two_models(folder):
    """A bundle of two models; the second one is a little off, and says so."""
    write_model(folder / "model.int8.onnx", bias=BIAS + np.float32(0.01))
    coarse = tiny_file(file="model.int8.onnx", precision="int8", selftest_max_abs=0.1)
    seal(folder, tiny_manifest(models={"fp32": tiny_file(), "int8": coarse}))
    return folder


def test_a_bundle_may_hold_several_models_and_each_has_its_own_selftest(folder):
    two_models(folder)
    assert load_bundle(folder).model_path.name == "model.onnx", "what it serves unless asked otherwise"
    coarse = load_bundle(f"{folder}@int8")
    assert coarse.model_path.name == "model.int8.onnx"
    with OnnxRunner(coarse.model_path, threads=1) as runner:
        assert 1e-4 < coarse.selftest(runner) < 0.1
        with pytest.raises(ParityError, match="logits differ"):
            load_bundle(f"{folder}@fp32").selftest(runner)


def test_a_model_that_a_bundle_does_not_have_is_named_with_those_it_has(folder):
    with pytest.raises(BundleError, match="has no model 'fp16'; ask for fp32 or int8, or export it"):
        load_bundle(f"{two_models(folder)}@fp16")


def test_a_folder_with_an_at_sign_in_its_name_is_a_folder(folder, tmp_path):
    assert load_bundle(folder.rename(tmp_path / "b@int8")).key == "fp32"


def test_an_engine_is_refused_unless_a_model_names_it(folder):
    (folder / "model.plan").write_bytes(b"plan")
    with pytest.raises(BundleError, match=r"model\.plan is an engine that no model names"):
        seal(folder, tiny_manifest())
    place = {"tensorrt": "10.12.0", "gpu": "X", "compute_capability": "9.0", "driver": "1", "batch": (1, 8, 32)}
    plan = tiny_file(file="model.plan", backend="tensorrt", engine=place)
    seal(folder, tiny_manifest(models={"fp32": tiny_file(), "tensorrt-fp32": plan}))
    with pytest.raises(ValueError, match="says where it runs"):
        tiny_file(file="model.plan")
    with pytest.raises(ValueError, match="says where it runs"):
        tiny_file(engine=place)


def test_the_model_that_is_served_must_be_there():
    with pytest.raises(ValueError, match="there is no model 'int8'; there are fp32"):
        tiny_manifest(serve="int8")


def test_what_was_measured_does_not_change_the_id_and_must_name_a_model():
    row = {"model": "fp32", "provider": "cpu", "batch": 1, "p50_ms": 1.0, "low_ms": 0.9, "high_ms": 1.1,
           "images_per_second": 1000.0, "machine": {"cpu": "X"}}  # fmt: skip
    assert tiny_manifest(latency=(row,)).id == tiny_manifest().id
    with pytest.raises(ValueError, match="there is no model 'int8'"):
        tiny_manifest(latency=(row | {"model": "int8"},))


def test_sealing_again_takes_an_old_signature_away(folder):
    (folder / "manifest.sig").write_text("of the old manifest")
    load_bundle(folder)
    seal(folder, tiny_manifest())
    assert not (folder / "manifest.sig").exists()


def test_a_bundle_can_be_moved(folder, tmp_path):
    moved = folder.rename(tmp_path / "moved")
    assert load_bundle(str(moved)).manifest.name == "tiny"
    (tmp_path / "latest").symlink_to(moved)
    assert load_bundle(tmp_path / "latest").manifest.name == "tiny", "the way to a bundle may be a link"


def test_every_refusal_counts_as_wrong_input():
    assert issubclass(BundleError, InputError)
    assert BundleError.exit_code == 2
