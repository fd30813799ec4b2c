"""The command line as a user meets it: exit codes, one sentence, and nothing half-written."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import short_recipe, write_recipe

from mcdeploy import cli
from mcdeploy.runs import ship_run, train_run

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "demo",
    "train",
    "prune-export",
    "eval",
    "bench",
    "inspect",
    "serve",
    "package",
    "keygen",
    "doctor",
    "recipes",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with its bundle; tests that change something copy it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train_run(short_recipe(export={"min_agreement": 0.9}), run, resume=False)
    ship_run(run, run / "bundle")
    return run


def mcdeploy(capsys, *arguments):
    """Exit code, what was printed, what was printed as error."""
    before = sys.argv
    sys.argv = ["mcdeploy", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as left:
        code = left.code or 0
    finally:
        sys.argv = before
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_run_goes_from_recipe_to_bundle_eval_and_bench(tmp_path, capsys):
    recipe, run = write_recipe(tmp_path / "short.yaml", short_recipe()), tmp_path / "run"
    code, out, _ = mcdeploy(
        capsys, "train", recipe, "--out", run, "--set", "train.lr=0.02", "--json", tmp_path / "t.json"
    )
    assert code == 0
    assert "next: mcdeploy prune-export" in out
    assert json.loads((tmp_path / "t.json").read_text())["images"] == 360
    assert mcdeploy(capsys, "prune-export", run)[0] == 0
    assert {"checkpoint.safetensors", "metrics.jsonl", "compiled.pt2", "report.html", "bundle"} <= set(os.listdir(run))
    tops = []
    for target in (run, run / "bundle", run / "bundle" / "model.onnx", run / "compiled.pt2"):
        extra = ("--data", "digits") if target != run else ()
        code, out, error = mcdeploy(capsys, "eval", target, *extra, "--json", tmp_path / "e.json")
        assert code == 0, error
        tops.append(out.split("top-1 ")[1].split(" ")[0])
    assert len(set(tops)) == 1
    code, out, _ = mcdeploy(
        capsys,
        "bench",
        "resnet_digits",
        run / "bundle",
        "--seconds",
        0.2,
        "--image-size",
        8,
        "--json",
        tmp_path / "b.json",
    )
    assert code == 0
    assert len(json.loads((tmp_path / "b.json").read_text())["latencies"]) == 2
    code, out, _ = mcdeploy(capsys, "inspect", run, "--out", tmp_path / "w.svg")
    assert code == 0
    assert "reads input of layer1" in out
    assert (tmp_path / "w.svg").read_text().startswith("<svg")
    assert "(gate 0." in (tmp_path / "w.svg").read_text()
    assert " could have read " in (tmp_path / "w.svg").read_text()


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def folder(tmp_path, **classes):
    """An image folder with two images a class; ``classes`` maps split to class names."""
    for split, names in classes.items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def recipe_with(tmp_path, **changes):
    return write_recipe(tmp_path / "r.yaml", short_recipe(**changes))


# name -> (how to make it: returns the arguments, exit code, part of the sentence)
WRONG = {}


def wrong(code, sentence):
    def add(make):
        WRONG[make.__name__] = (make, code, sentence)
        return make

    return add


@wrong(2, "unknown key train.epoch (did you mean 'epochs'?)")
def a_mistyped_key(tmp_path, run):
    tree = yaml.safe_load(recipe_with(tmp_path).read_text())
    tree["train"]["epoch"] = tree["train"].pop("epochs")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    return "train", tmp_path / "r.yaml", "--out", tmp_path / "run"


@wrong(2, "is not YAML")
def a_file_that_is_not_yaml(tmp_path, run):
    (tmp_path / "r.yaml").write_text("a: [1")
    return "train", tmp_path / "r.yaml", "--out", tmp_path / "run"


@wrong(2, "cannot read the recipe")
def a_recipe_that_is_not_there(tmp_path, run):
    return "train", tmp_path / "r.yaml", "--out", tmp_path / "run"


@wrong(2, "did you mean 'fan_in'?")
def a_mistyped_override(tmp_path, run):
    return "train", recipe_with(tmp_path), "--set", "connectivity.fanin=3", "--out", tmp_path / "run"


@wrong(2, "there is no folder")
def data_that_is_not_there(tmp_path, run):
    return (
        "train", recipe_with(tmp_path), "--set", "data.source=folder", "--set", "data.root=nowhere", "--out",
        tmp_path / "run",
    )  # fmt: skip


@wrong(2, "class 'owl' is in val/ but not in train/")
def a_class_only_in_val(tmp_path, run):
    folder(tmp_path / "d", train=["cat", "dog"], val=["cat", "dog", "owl"])
    return (
        "train",
        recipe_with(tmp_path, data={"source": "folder", "root": str(tmp_path / "d")}),
        "--out",
        tmp_path / "run",
    )


@wrong(2, "train/cat/1.png: ")
def a_corrupt_image(tmp_path, run):
    path = folder(tmp_path / "d", train=["cat", "dog"], val=["cat", "dog"]) / "train" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:40])
    data = {"source": "folder", "root": str(tmp_path / "d"), "images_per_epoch": 4}
    return "train", recipe_with(tmp_path, data=data), "--out", tmp_path / "run"


@wrong(2, "class 'dog' has no images")
def an_empty_class(tmp_path, run):
    folder(tmp_path / "d", train=["cat"], val=["cat", "dog"])
    (tmp_path / "d" / "train" / "dog").mkdir()
    return (
        "train",
        recipe_with(tmp_path, data={"source": "folder", "root": str(tmp_path / "d")}),
        "--out",
        tmp_path / "run",
    )


@wrong(2, "timm has no model 'resnet_digit'")
def a_backbone_that_timm_does_not_know(tmp_path, run):
    return "train", recipe_with(tmp_path, model={"backbone": "resnet_digit"}), "--out", tmp_path / "run"


@wrong(2, "no wirable stage")
def a_backbone_that_cannot_be_wired(tmp_path, run):
    recipe = recipe_with(tmp_path, model={"backbone": "densenet121"}, data={"image_size": 32})
    return "train", recipe, "--out", tmp_path / "run"


@wrong(2, "no such weights file")
def weights_that_are_not_there(tmp_path, run):
    return "train", recipe_with(tmp_path, model={"weights": str(tmp_path / "w.safetensors")}), "--out", tmp_path / "run"


@wrong(2, "does not fit")
def weights_of_another_net(tmp_path, run):
    from safetensors.torch import save_file

    save_file({"conv1.weight": torch.ones(2, 2)}, tmp_path / "w.safetensors")
    return "train", recipe_with(tmp_path, model={"weights": str(tmp_path / "w.safetensors")}), "--out", tmp_path / "run"


@wrong(2, "cuda was asked for")
def cuda_on_a_machine_without(tmp_path, run):
    return "train", recipe_with(tmp_path, train={"device": "cuda"}), "--out", tmp_path / "run"


@wrong(2, "asked for provider cuda")
def the_cuda_provider_on_a_machine_without(tmp_path, run):
    return "bench", run / "bundle", "--backend", "onnx-cuda"


@wrong(2, "asked for device cuda")
def torch_on_cuda_on_a_machine_without(tmp_path, run):
    return "bench", run, "--backend", "pytorch-cuda"


@wrong(2, "--cold-l2: empties a GPU's cache between inferences that the GPU itself times, and the host times onnx; ask")
def a_cold_gpu_cache_on_the_cpu(tmp_path, run):
    return "bench", run / "bundle", "--backend", "onnx", "--cold-l2", "--json", tmp_path / "b.json"


@wrong(2, "the host times onnx-cuda, onnx-tensorrt; ask for tensorrt, pytorch-cuda, compiled-cuda alone")
def a_cold_gpu_cache_with_a_backend_that_the_host_times(tmp_path, run):
    gpu = ("tensorrt", "onnx-tensorrt", "onnx-cuda")
    return "bench", run / "bundle", *(word for name in gpu for word in ("--backend", name)), "--cold-l2"


@wrong(2, "asked for device cuda")
def a_cold_gpu_cache_on_a_machine_without_a_gpu(tmp_path, run):
    return "bench", run, "--backend", "pytorch-cuda", "--cold-l2"


@wrong(2, "damaged or truncated")
def a_truncated_checkpoint(tmp_path, run):
    path = Path(shutil.copytree(run, tmp_path / "copy")) / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    return "prune-export", tmp_path / "copy"


@wrong(2, "model.onnx was changed after it was sealed")
def a_flipped_byte_in_a_bundle(tmp_path, run):
    flip_a_byte(Path(shutil.copytree(run / "bundle", tmp_path / "b")) / "model.onnx")
    return "serve", tmp_path / "b", "--port", 0


@wrong(2, "is missing")
def a_bundle_without_its_certificate(tmp_path, run):
    (Path(shutil.copytree(run / "bundle", tmp_path / "b")) / "certificate.json").unlink()
    return "serve", tmp_path / "b", "--port", 0


@wrong(1, "self-test: logits differ")
def a_bundle_whose_model_is_another_one(tmp_path, run):
    from mcruntime.bundle import load_bundle, seal

    bundle = load_bundle(shutil.copytree(run / "bundle", tmp_path / "b"))
    with np.load(bundle.folder / "selftest.npz") as arrays:
        np.savez(bundle.folder / "selftest.npz", images=arrays["images"], logits=arrays["logits"] + 1)
    seal(bundle.folder, bundle.manifest)
    return "serve", tmp_path / "b", "--port", 0


@wrong(2, "expected images [B, 3, 8, 8], got")
def images_of_another_size(tmp_path, run):
    return "bench", run / "bundle", "--image-size", 16


@wrong(2, "no such file, folder or timm model")
def something_that_is_nothing(tmp_path, run):
    return "eval", tmp_path / "nothing"


@wrong(2, "was trained on other classes")
def data_with_other_classes(tmp_path, run):
    return "eval", run, "--data", folder(tmp_path / "d", train=["cat", "dog"], val=["cat", "dog"])


@wrong(2, "has no PyTorch form")
def a_bundle_in_pytorch(tmp_path, run):
    return "bench", run / "bundle", "--backend", "pytorch"


@wrong(2, "--precision fp8: not available; this version has fp32, fp16, int8")
def a_precision_that_is_not_there(tmp_path, run):
    return "prune-export", run, "--precision", "fp8", "--out", tmp_path / "b"


@wrong(2, "--batch: batch: expected min <= opt <= max, got [8, 1, 32]")
def batch_sizes_in_the_wrong_order(tmp_path, run):
    return "prune-export", run, "--batch", 8, 1, 32, "--out", tmp_path / "b"


@wrong(2, "mcdeploy[gpu]")
def an_engine_without_tensorrt(tmp_path, run):
    return "prune-export", run, "--backend", "tensorrt", "--out", tmp_path / "b"


@wrong(2, "no such key file")
def a_key_that_is_not_there(tmp_path, run):
    return "prune-export", run, "--sign", tmp_path / "key", "--out", tmp_path / "b"


@wrong(2, "is the baseline; give another file")
def a_result_that_would_replace_its_baseline(tmp_path, run):
    path = tmp_path / "b.json"
    path.write_text("{}")
    return "bench", run / "bundle", "resnet_digits", "--baseline", path, "--json", path


@wrong(2, "is no ed25519 private key")
def a_key_that_is_none(tmp_path, run):
    (tmp_path / "key").write_text("hello")
    return "prune-export", run, "--sign", tmp_path / "key", "--out", tmp_path / "b"


@wrong(2, "--sensitivity, export.sensitivity: is about int8")
def a_sensitivity_of_nothing(tmp_path, run):
    return "prune-export", run, "--sensitivity", "--out", tmp_path / "b"


@wrong(2, "has no model 'int8'; ask for fp32")
def a_model_that_the_bundle_does_not_hold(tmp_path, run):
    return "eval", f"{run / 'bundle'}@int8", "--data", "digits"


@wrong(2, "exists and is not a bundle")
def an_output_folder_that_holds_something_else(tmp_path, run):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    return "prune-export", run, "--out", tmp_path / "b"


@wrong(2, "holds a run already")
def a_run_folder_that_is_taken(tmp_path, run):
    return "train", recipe_with(tmp_path), "--out", run


@wrong(2, "has random weights")
def accuracy_of_random_weights(tmp_path, run):
    return "eval", "resnet_digits", "--data", "digits"


@wrong(2, "does not know its images")
def a_bundle_without_images(tmp_path, run):
    return "eval", run / "bundle"


@wrong(2, "nothing says how its images are prepared")
def a_bare_file(tmp_path, run):
    shutil.copy(run / "bundle" / "model.onnx", tmp_path / "m.onnx")
    return "eval", tmp_path / "m.onnx", "--data", "digits"


@wrong(2, "not a complete ONNX model")
def a_truncated_onnx_file(tmp_path, run):
    (tmp_path / "m.onnx").write_bytes((run / "bundle" / "model.onnx").read_bytes()[:-100])
    return "bench", tmp_path / "m.onnx"


@wrong(2, "there is no folder")
def a_result_with_nowhere_to_go(tmp_path, run):
    return "bench", run / "bundle", "--json", tmp_path / "nowhere" / "b.json"


@wrong(2, "needs --baseline")
def a_limit_without_a_baseline(tmp_path, run):
    return "bench", run / "bundle", "--fail-if-slower", "5%"


@wrong(2, "--fail-if-slower nan: expected 0% or more")
def a_limit_that_is_no_number(tmp_path, run):
    (tmp_path / "b.json").write_text("{}")
    return "bench", run / "bundle", "--baseline", tmp_path / "b.json", "--fail-if-slower", "nan"


@wrong(2, "--fail-if-slower inf%: expected 0% or more")
def a_limit_without_end(tmp_path, run):
    (tmp_path / "b.json").write_text("{}")
    return "bench", run / "bundle", "--baseline", tmp_path / "b.json", "--fail-if-slower", "inf%"


@wrong(2, "/bundle@int8")
def a_precision_of_a_run(tmp_path, run):
    return "eval", f"{run}@int8"


@wrong(2, "--provider: unknown provider 'rocm'; valid are cpu, cuda, tensorrt")
def a_provider_that_is_not_there(tmp_path, run):
    return "serve", run / "bundle", "--provider", "rocm"


@wrong(2, "is a file")
def an_output_that_is_a_file(tmp_path, run):
    (tmp_path / "b").write_text("mine")
    return "prune-export", run, "--out", tmp_path / "b"


@wrong(2, "holds a run already")
def a_demo_over_a_run(tmp_path, run):
    return "demo", "--out", run


@wrong(2, "expected a percentage")
def a_limit_that_is_no_percentage(tmp_path, run):
    (tmp_path / "b.json").write_text("{}")
    return "bench", run / "bundle", "--seconds", 0.1, "--baseline", tmp_path / "b.json", "--fail-if-slower", "a lot"


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_gives_one_sentence_an_exit_code_and_no_half_written_file(name, tmp_path, finished, capsys):
    make, code, sentence = WRONG[name]
    arguments = make(tmp_path, finished)
    capsys.readouterr()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    got, _, error = mcdeploy(capsys, *arguments)
    assert sentence in error
    assert got == code
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_tensor_that_became_nan_is_not_exported(tmp_path, finished, capsys):
    from mcdeploy.checkpoint import FILE_NAME, load_checkpoint, save_checkpoint

    checkpoint = load_checkpoint(finished)
    tensors = {**checkpoint.tensors, "model.linear.bias": torch.full((10,), float("nan"))}
    save_checkpoint(tmp_path / FILE_NAME, checkpoint.header, tensors)
    code, _, error = mcdeploy(capsys, "prune-export", tmp_path)
    assert code == 1
    assert "NaN or infinity" in error
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_a_disk_that_fills_up_during_training_keeps_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    from mcdeploy.checkpoint import FILE_NAME, load_checkpoint

    write, calls = os.fsync, []

    def full_the_second_time(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:  # metrics.jsonl, first checkpoint, second checkpoint
            raise OSError(errno.ENOSPC, "No space left on device")
        write(descriptor)

    monkeypatch.setattr(os, "fsync", full_the_second_time)
    code, _, error = mcdeploy(capsys, "train", recipe_with(tmp_path), "--out", tmp_path / "run")
    assert code == 1
    assert "No space left on device" in error
    assert load_checkpoint(tmp_path / "run").header["epochs_done"] == 1
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(f".{FILE_NAME}")]


def test_an_export_that_fails_leaves_the_old_bundle_as_it_was(tmp_path, finished, monkeypatch, capsys):
    from mcruntime.bundle import load_bundle

    from mcdeploy.errors import BackendError

    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = load_bundle(run / "bundle").manifest.id

    def fail(*_, **__):
        raise BackendError("the exporter broke")

    monkeypatch.setattr("mcdeploy.package.export_onnx", fail)
    assert mcdeploy(capsys, "prune-export", run)[0] == 2
    assert load_bundle(run / "bundle").manifest.id == before
    assert not [name for name in os.listdir(run) if name.endswith(".part")]


def test_a_promise_that_fails_leaves_the_old_program_and_bundle(tmp_path, finished, monkeypatch, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    from mcdeploy.checkpoint import load_checkpoint

    def stricter(path):
        checkpoint = load_checkpoint(path)
        checkpoint.header["recipe"]["export"]["max_abs"] = 1e-15
        return checkpoint

    monkeypatch.setattr("mcdeploy.checkpoint.load_checkpoint", stricter)
    code, _, error = mcdeploy(capsys, "prune-export", run)
    assert code == 1
    assert "allowed 1.0e-15" in error
    left = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert json.loads(left.pop(run / "bundle.departure.json"))["hop"] == "compile"
    assert b"first tensor that departs is that of" in left.pop(run / "bundle.departure.html")
    assert left == before


@pytest.mark.parametrize("words", [("--cold-l2",), ()])
def test_a_cold_gpu_cache_is_asked_of_the_runners(finished, monkeypatch, capsys, words):
    from mcdeploy import targets
    from mcdeploy.errors import BackendError

    asked = []

    def stop(module, **options):
        asked.append(options["cold_l2"])
        raise BackendError("no further")

    monkeypatch.setattr(targets, "TorchRunner", stop)
    code, _, error = mcdeploy(capsys, "bench", finished, "--backend", "pytorch-cuda", *words)
    assert (code, error) == (2, "error: no further\n")
    assert asked == [bool(words)]


def test_a_bench_slower_than_its_baseline_exits_with_1(tmp_path, finished, capsys):
    path = tmp_path / "b.json"
    arguments = ("bench", finished / "bundle", "resnet_digits", "--image-size", 8, "--seconds", 0.3, "--json", path)
    assert mcdeploy(capsys, *arguments)[0] == 0
    tree = json.loads(path.read_text())
    for row in tree["latencies"]:
        if row["runner"] != tree["runners"][0]["name"]:
            row["ratio"] = {key: value / 100 for key, value in row["ratio"].items()}
    path.write_text(json.dumps(tree))
    code, _, error = mcdeploy(capsys, *arguments[:-2], "--baseline", path)
    assert code == 1, error
    assert error.startswith("error: ")


def test_a_baseline_of_other_models_is_refused_before_the_bench(tmp_path, finished, monkeypatch, capsys):
    path = tmp_path / "b.json"
    arguments = ("bench", finished / "bundle", finished / "bundle", "--seconds", 0.1)
    assert mcdeploy(capsys, *arguments, "--json", path)[0] == 0

    def never(*_, **__):
        raise AssertionError("measured for nothing")

    monkeypatch.setattr("mcdeploy.targets.compare_latency", never)
    code, _, error = mcdeploy(capsys, *arguments, "--batch", 2, "--baseline", path)
    assert (code, error.count("\n")) == (2, 1)
    assert f"the baseline holds no {finished / 'bundle'} (2) [onnx] at batch 2" in error


def test_a_profile_that_fails_does_not_cost_the_bench_before_it(tmp_path, finished, monkeypatch, capsys):
    from mcdeploy.errors import BackendError

    def fail(*_, **__):
        raise BackendError("the profiler broke")

    monkeypatch.setattr("mcdeploy.targets.profile_targets", fail)
    path = tmp_path / "b.json"
    code, _, error = mcdeploy(capsys, "bench", finished / "bundle", "--seconds", 0.1, "--profile", "--json", path)
    assert (code, error) == (2, "error: the profiler broke\n")
    left = json.loads(path.read_text())
    assert len(left["latencies"]) == 1
    assert left["profiles"] == []


@pytest.mark.parametrize(("words", "provider"), [((), "cpu"), (("--provider", "cuda"), "cuda")])
def test_the_provider_reaches_the_server(finished, monkeypatch, capsys, words, provider):
    asked = {}
    monkeypatch.setattr(
        "mcruntime.server.serve", lambda bundles, options: asked.update(bundles=bundles, options=options)
    )
    assert mcdeploy(capsys, "serve", finished / "bundle", *words)[0] == 0
    assert asked["bundles"] == [str(finished / "bundle")]
    assert asked["options"].provider == provider


def test_what_can_be_evaluated_is_in_the_help(capsys):
    _, out, _ = mcdeploy(capsys, "eval", "--help")
    assert "RUN|BUNDLE[@MODEL]|MODEL" in out
    assert "in fp32." not in out


def test_commands_and_options_are_these(capsys):
    found = {}
    for command in COMMANDS:
        code, out, _ = mcdeploy(capsys, command, "--help")
        assert code == 0
        found[command] = sorted(set(re.findall(r"(?<![\w-])--[a-z-]+", out)))
    golden = ROOT / "tests" / "golden" / "options.json"
    if os.environ.get("REGENERATE_GOLDEN"):
        golden.write_text(json.dumps(found, indent=1) + "\n")
    assert found == json.loads(golden.read_text())


def test_recipes_lists_every_recipe_that_ships(capsys):
    _, out, _ = mcdeploy(capsys, "recipes")
    assert [line.split()[0] for line in out.splitlines()] == sorted(
        path.stem for path in (ROOT / "recipes").glob("*.yaml")
    )


def test_a_missing_package_names_the_extra_to_install():
    code = "import sys, mcdeploy.cli as c; sys.modules['torch'] = None; sys.argv = ['mcdeploy', 'train', 'digits']; c.main()"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "pip install 'mcdeploy[train]'" in done.stderr
    assert done.stderr.count("\n") == 1
