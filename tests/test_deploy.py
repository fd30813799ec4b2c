"""A package for Triton or docker says what the bundle is, appears whole, and overwrites only its own."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import mcruntime.deploy.docker as docker_module
import numpy as np
import onnx
import pytest
import yaml
from certificates import make_certificate
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from live_server import live
from mcruntime.bundle import load_bundle, seal
from mcruntime.deploy import LIST
from mcruntime.deploy.docker import EXTRAS, TEMPLATES, build_wheel, check_wheel, find_checkout, package_docker
from mcruntime.deploy.triton import DEFAULT_MAX_BATCH, DEFAULT_PREFERRED, package_triton, quote
from mcruntime.errors import BundleError, InputError, McdeployError
from mcruntime.manifest import Engine, Latency
from mcruntime.server import probe
from mcruntime.server.__main__ import main as server_main
from mcruntime.server.__main__ import make_parser
from mcruntime.server.auth import Keys
from mcruntime.server.http import http_protocol
from mcruntime.server.options import ServerOptions
from tiny_onnx import expected_logits, some_images, tiny_file, tiny_manifest, write_bundle, write_model
from tritonclient.grpc import model_config_pb2

from mcdeploy import cli

ROOT = Path(__file__).parents[1]
ModelConfig = model_config_pb2.ModelConfig


@pytest.fixture
def folder(tmp_path):
    return write_bundle(tmp_path / "bundle")


def config_of(out, name="tiny"):
    """Triton's own reading of what we wrote; an unknown or mistyped field is an error."""
    return text_format.Parse((out / name / "config.pbtxt").read_text(), ModelConfig())


def bench_json(path, rows):
    """What ``mcdeploy bench --json`` writes, as far as it matters: runner, batch, images per second."""
    latencies = [{"runner": runner, "batch": batch, "images_per_second": speed} for runner, batch, speed in rows]
    path.write_text(json.dumps({"kind": "mcdeploy bench", "version": 1, "latencies": latencies}))
    return path


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------------- triton


def test_triton_reads_every_field_as_the_bundle_has_it(folder, tmp_path):
    bundle = load_bundle(folder)
    packaged = package_triton(bundle, tmp_path / "repo")
    assert set(files_in(tmp_path / "repo")) == {
        LIST, "tiny/config.pbtxt", "tiny/labels.txt", "tiny/1/model.onnx",
    }  # fmt: skip
    config = config_of(tmp_path / "repo")
    assert (config.name, config.platform, config.backend) == ("tiny", "onnxruntime_onnx", "onnxruntime")
    assert config.default_model_filename == "model.onnx"
    assert config.max_batch_size == DEFAULT_MAX_BATCH
    assert config.version_policy.latest.num_versions == 1
    (images,), (logits,) = config.input, config.output
    assert (images.name, list(images.dims), images.data_type) == ("image", [3, 8, 8], model_config_pb2.TYPE_FP32)
    assert (logits.name, list(logits.dims), logits.data_type) == ("logits", [4], model_config_pb2.TYPE_FP32)
    assert logits.label_filename == "labels.txt"
    assert (tmp_path / "repo" / "tiny" / "labels.txt").read_text().splitlines() == list(bundle.manifest.labels)
    (group,) = config.instance_group
    assert (group.kind, group.count) == (model_config_pb2.ModelInstanceGroup.KIND_CPU, 1)
    assert tuple(config.dynamic_batching.preferred_batch_size) == DEFAULT_PREFERRED
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert [warm.batch_size for warm in config.model_warmup] == [1, 4, 8]
    for warm in config.model_warmup:
        (tensor,) = warm.inputs.values()
        assert list(warm.inputs) == ["image"]
        assert (list(tensor.dims), tensor.data_type, tensor.random_data) == (
            [3, 8, 8],
            model_config_pb2.TYPE_FP32,
            True,
        )
    assert config.parameters["mcdeploy_bundle"].string_value == bundle.manifest.id
    how = json.loads(config.parameters["mcdeploy_preprocessing"].string_value)
    assert how == bundle.manifest.preprocessing.model_dump(mode="json")
    assert any("our defaults" in note for note in packaged.notes)
    assert any("no Triton ran this package" in note for note in packaged.notes)


def test_the_model_in_the_repository_is_the_one_of_the_bundle(folder, tmp_path):
    package_triton(load_bundle(folder), tmp_path / "repo")
    assert (tmp_path / "repo/tiny/1/model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()


@given(st.text())
def test_any_name_survives_the_text_format(text):
    parsed = text_format.Parse(f"name: {quote(text)}", ModelConfig())
    assert parsed.name == text


def test_batch_sizes_come_from_a_bench_of_this_bundle(folder, tmp_path):
    name = str(folder)
    speeds = {1: 100.0, 8: 380.0, 16: 400.0, 32: 300.0}
    rows = [(f"{name} [onnx]", batch, speed) for batch, speed in speeds.items()]
    rows += [("resnet_digits [onnx]", 64, 9000.0), (f"{name} [openvino]", 1, 8000.0)]
    packaged = package_triton(
        load_bundle(folder), tmp_path / "repo", name=name, bench=bench_json(tmp_path / "b.json", rows)
    )
    config = config_of(tmp_path / "repo")
    assert config.max_batch_size == 32
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16]
    assert [warm.batch_size for warm in config.model_warmup] == [1, 8, 16, 32]
    assert any("from b.json" in note and "400 images/s" in note for note in packaged.notes)


def test_a_real_bench_is_understood(folder, tmp_path):
    """The file that ``mcdeploy bench`` writes today, not our idea of it."""
    from mcruntime.engine import OnnxRunner

    from mcdeploy.bench import compare_latency

    with OnnxRunner(folder / "model.onnx", name=f"{folder} [onnx]", threads=1) as runner:
        report = compare_latency([runner], {1: some_images(1), 4: some_images(4)}, seconds=0.2)
    (tmp_path / "b.json").write_text(json.dumps(report.to_json()))
    packaged = package_triton(load_bundle(folder), tmp_path / "repo", name=str(folder), bench=tmp_path / "b.json")
    assert config_of(tmp_path / "repo").max_batch_size == 4
    assert any("from b.json" in note for note in packaged.notes)


def test_where_batches_gain_nothing_requests_are_not_put_together(folder, tmp_path):
    rows = [(f"{folder} [onnx]", 1, 100.0), (f"{folder} [onnx]", 8, 101.0)]
    bench = bench_json(tmp_path / "b.json", rows)
    packaged = package_triton(load_bundle(folder), tmp_path / "repo", name=str(folder), bench=bench)
    config = config_of(tmp_path / "repo")
    assert not config.HasField("dynamic_batching")
    assert config.max_batch_size == 8
    assert any("single images are as fast" in note for note in packaged.notes)


def test_a_bench_of_one_batch_size_decides_nothing(folder, tmp_path):
    bench = bench_json(tmp_path / "b.json", [(f"{folder} [onnx]", 1, 100.0)])
    packaged = package_triton(load_bundle(folder), tmp_path / "repo", name=str(folder), bench=bench)
    assert config_of(tmp_path / "repo").max_batch_size == DEFAULT_MAX_BATCH
    assert any("only batch 1 was measured" in note for note in packaged.notes)


def test_the_latency_in_the_manifest_is_used_when_no_bench_is_given(tmp_path):
    def row(model, batch, speed, provider="cpu"):
        return Latency(
            model=model, provider=provider, batch=batch, p50_ms=1.0, low_ms=1.0, high_ms=1.0, images_per_second=speed,
            machine={},
        )  # fmt: skip

    rows = (row("fp32", 1, 10.0), row("fp32", 4, 20.0), row("fp32", 64, 99.0, "openvino"))
    folder = write_bundle(tmp_path / "bundle", latency=rows)
    packaged = package_triton(load_bundle(folder), tmp_path / "repo")
    assert config_of(tmp_path / "repo").max_batch_size == 4
    assert any("measured when the bundle was made (cpu)" in note for note in packaged.notes)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "is no result of"),
     ('{"kind": "other"}', "is no result of"),
     ('{"kind": "mcdeploy bench", "latencies": [{"runner": "x [onnx]", "batch": 1, "images_per_second": 1}]}',
      "measured x [onnx], but not")],
)  # fmt: skip
def test_a_bench_that_does_not_fit_is_refused_and_nothing_is_written(folder, tmp_path, text, sentence):
    path = tmp_path / "b.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as caught:
        package_triton(load_bundle(folder), tmp_path / "repo", bench=path)
    assert sentence in str(caught.value)
    assert ";" in str(caught.value)
    assert not (tmp_path / "repo").exists()


def two_models(folder):
    """A bundle with a second model, whose bias and therefore whose answer is another one."""
    write_bundle(folder)
    write_model(folder / "model.int8.onnx", bias=np.array([5, 0, 0, 0], dtype=np.float32))
    models = {"fp32": tiny_file(), "int8": tiny_file(file="model.int8.onnx", precision="int8")}
    seal(folder, tiny_manifest(models=models))
    return folder


def test_the_model_that_was_asked_for_is_the_one_that_is_packaged(tmp_path):
    folder = two_models(tmp_path / "bundle")
    package_triton(load_bundle(f"{folder}@int8"), tmp_path / "repo")
    assert (tmp_path / "repo/tiny/1/model.onnx").read_bytes() == (folder / "model.int8.onnx").read_bytes()
    rows = [(f"{folder} [onnx]", 1, 1.0), (f"{folder} [onnx]", 2, 9.0), (f"{folder}@int8 [onnx]", 1, 1.0),
            (f"{folder}@int8 [onnx]", 16, 9.0)]  # fmt: skip
    bench = bench_json(tmp_path / "b.json", rows)
    for key, largest in {"fp32": 2, "int8": 16}.items():
        name = f"{folder}@{key}"
        package_triton(load_bundle(name), tmp_path / key, name=name, bench=bench)
        assert config_of(tmp_path / key).max_batch_size == largest


def test_weights_beside_the_model_come_along_under_their_own_name(tmp_path):
    folder = write_bundle(tmp_path / "bundle")
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    (folder / "other.onnx.data").write_bytes(b"of another model")
    seal(folder, tiny_manifest())
    package_triton(load_bundle(folder), tmp_path / "repo")
    version = tmp_path / "repo/tiny/1"
    assert sorted(path.name for path in version.iterdir()) == ["model.onnx", "model.onnx.data"]
    from mcruntime.engine import OnnxRunner

    with OnnxRunner(version / "model.onnx") as runner:
        np.testing.assert_allclose(runner.infer(some_images(2)), expected_logits(some_images(2)), rtol=1e-5)


def with_engine(folder, batch):
    """A bundle around a plan that nobody can run here."""
    write_bundle(folder)
    (folder / "model.plan").write_bytes(b"an engine")
    engine = Engine(tensorrt="10.16.1.11", gpu="NVIDIA L4", compute_capability="8.9", driver="580", batch=batch)
    plan = tiny_file(file="model.plan", backend="tensorrt", precision="fp16", engine=engine)
    seal(folder, tiny_manifest(models={"fp32": tiny_file(), "tensorrt-fp16": plan}))
    return load_bundle(f"{folder}@tensorrt-fp16")


def test_an_engine_goes_to_the_tensorrt_backend_within_its_profile(tmp_path):
    packaged = package_triton(with_engine(tmp_path / "bundle", (1, 4, 16)), tmp_path / "repo")
    config = config_of(tmp_path / "repo")
    assert (config.platform, config.backend) == ("tensorrt_plan", "tensorrt")
    assert config.default_model_filename == "model.plan"
    assert (tmp_path / "repo/tiny/1/model.plan").read_bytes() == b"an engine"
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (16, [4])
    assert any("NVIDIA L4 with TensorRT 10.16.1.11 only" in note for note in packaged.notes)
    assert any("no Triton ran any engine here" in note for note in packaged.notes)


def test_a_bench_does_not_push_an_engine_out_of_its_profile(tmp_path):
    bundle = with_engine(tmp_path / "bundle", (1, 4, 16))
    name = f"{tmp_path / 'bundle'}@tensorrt-fp16"
    rows = [(f"{name} [tensorrt]", 1, 1.0), (f"{name} [tensorrt]", 16, 98.0), (f"{name} [tensorrt]", 64, 100.0)]
    package_triton(bundle, tmp_path / "repo", name=name, bench=bench_json(tmp_path / "b.json", rows))
    config = config_of(tmp_path / "repo")
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (16, [16])


def test_an_engine_that_takes_no_single_image_is_refused(tmp_path):
    with pytest.raises(InputError, match="build it for batch 1"):
        package_triton(with_engine(tmp_path / "bundle", (4, 4, 16)), tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_a_label_of_two_lines_is_refused(tmp_path):
    folder = write_bundle(tmp_path / "bundle", labels=("red", "gr\neen", "blue", "dark"))
    with pytest.raises(InputError, match="several lines"):
        package_triton(load_bundle(folder), tmp_path / "repo")
    assert not list(tmp_path.glob("*repo*"))


# ------------------------------------------------------------------------------------------- the folder and its owner


def test_packaging_again_replaces_what_was_packaged_and_leaves_no_traces(folder, tmp_path):
    package_triton(load_bundle(folder), tmp_path / "repo")
    (folder / "reports" / "parity.md").write_text("# again\n")
    write_model(folder / "model.onnx", bias=np.zeros(4, dtype=np.float32))
    seal(folder, tiny_manifest())
    package_triton(load_bundle(folder), tmp_path / "repo")
    assert (tmp_path / "repo/tiny/1/model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    listed = json.loads((tmp_path / "repo" / LIST).read_text())
    assert listed["bundle"] == load_bundle(folder).manifest.id
    assert listed["chosen"]["ran_in_triton"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "repo"]


def test_the_same_bundle_gives_the_same_package(folder, tmp_path):
    for name in ("a", "b"):
        package_triton(load_bundle(folder), tmp_path / name)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")


def foreign_file(repo):
    repo.mkdir()
    (repo / "thesis.txt").write_text("mine")


def another_model(repo):
    (repo / "other" / "1").mkdir(parents=True)
    (repo / "other" / "1" / "model.onnx").write_bytes(b"theirs")


def edited_config(repo):
    (repo / "tiny" / "config.pbtxt").write_text("# tuned by hand\n")


def deleted_file(repo):
    (repo / "tiny" / "labels.txt").unlink()


def linked_file(repo):
    (repo / "more.txt").symlink_to("/etc/hostname")


@pytest.mark.parametrize("fault", [foreign_file, another_model, edited_config, deleted_file, linked_file])
def test_what_mcdeploy_did_not_write_is_never_overwritten(folder, tmp_path, fault):
    if fault is not foreign_file:
        package_triton(load_bundle(folder), tmp_path / "repo")
    fault(tmp_path / "repo")
    before = files_in(tmp_path / "repo")
    with pytest.raises(InputError, match="give another --out"):
        package_triton(load_bundle(folder), tmp_path / "repo")
    assert files_in(tmp_path / "repo") == before


def test_a_file_in_the_way_is_refused(folder, tmp_path):
    (tmp_path / "repo").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        package_triton(load_bundle(folder), tmp_path / "repo")
    assert (tmp_path / "repo").read_text() == "mine"


def test_a_package_that_fails_halfway_leaves_the_old_one_as_it_was(folder, tmp_path):
    package_triton(load_bundle(folder), tmp_path / "repo")
    before = files_in(tmp_path / "repo")
    bundle = load_bundle(folder)
    (folder / "model.onnx").write_bytes(b"changed after it was loaded")
    with pytest.raises(BundleError, match="changed while it was copied"):
        package_triton(bundle, tmp_path / "repo")
    assert files_in(tmp_path / "repo") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "repo"]


# ------------------------------------------------------------------------------------------------------------- docker


def write_wheel(path, *, name="mcdeploy", schema=2, extras=("serve", "grpc", "cpu", "sign"), is_new=True):
    """A file with all that ``check_wheel`` looks for; only pip would find out that it installs nothing."""
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n"
    about += "".join(f"Provides-Extra: {extra}\n" for extra in extras)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mcdeploy-0.1.0.dist-info/METADATA", about)
        archive.writestr("mcruntime/manifest.py", f"SCHEMA_VERSION = {schema}\n")
        archive.writestr("mcruntime/server/__main__.py", "")
        if is_new:
            archive.writestr("mcruntime/server/probe.py", "")
    return path


@pytest.fixture
def wheel(tmp_path):
    return write_wheel(tmp_path / "mcdeploy-0.1.0-py3-none-any.whl")


@pytest.fixture
def image(folder, tmp_path, wheel):
    package_docker(load_bundle(folder), tmp_path / "image", wheel=wheel)
    return tmp_path / "image"


def instructions(path):
    """(instruction, rest) of a Dockerfile; continued lines are one."""
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines]


def ignored(name, path):
    """Whether .dockerignore keeps a name of the top folder out: the last pattern that fits decides."""
    out = False
    for line in path.read_text().splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatch(name, line.removeprefix("!")):
            out = not line.startswith("!")
    return out


DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_copies_what_is_there_and_runs_as_nobody(image, name):
    steps = instructions(image / name)
    kinds = [kind for kind, _ in steps]
    known = {"FROM", "COPY", "RUN", "ENV", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT"}
    assert set(kinds) == known
    for kind, rest in steps:
        if kind == "FROM":
            assert re.fullmatch(r"python:3\.12\.\d+-slim-bookworm( AS install)?", rest), "pinned, not :latest"
        elif kind == "COPY" and not rest.startswith("--from=install "):
            source = rest.split()[0]
            assert (image / source).exists()
            assert not ignored(source.rstrip("/"), image / ".dockerignore")
    last_stage = len(kinds) - kinds[::-1].index("FROM") - 1
    (user,) = [rest for kind, rest in steps[last_stage:] if kind == "USER"]
    assert all(part.isdigit() and int(part) >= 1000 for part in user.split(":")), "numeric, so that Kubernetes can tell"
    assert kinds.index("USER") < kinds.index("ENTRYPOINT")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_installs_the_server_and_not_torch(image, name):
    (install,) = [rest for kind, rest in instructions(image / name) if kind == "RUN"]
    assert "torch" not in install
    assert "curl" not in install
    extras = set(re.search(r"\$\{wheel\}\[([a-z,]+)\]", install)[1].split(","))
    assert extras == {"serve", "grpc", "sign"} | ({"cpu"} if name == "Dockerfile.cpu" else set())
    assert extras <= EXTRAS
    assert ("onnxruntime-gpu[cuda,cudnn]" in install) == (name == "Dockerfile.cuda"), "one of the two ONNX Runtimes"
    assert "-c /constraints.txt" in install


@pytest.mark.parametrize("name", DOCKERFILES)
def test_onnx_runtime_tells_nobody_about_the_model(image, name):
    steps = instructions(image / name)
    last_stage = max(i for i, (kind, _) in enumerate(steps) if kind == "FROM")
    assert any(kind == "ENV" and "ORT_DISABLE_TELEMETRY=1" in rest.split() for kind, rest in steps[last_stage:])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_entry_is_a_command_line_that_the_server_understands(image, name, tmp_path, capsys):
    (entry,) = [rest for kind, rest in instructions(image / name) if kind == "ENTRYPOINT"]
    program, flag, module, *arguments = json.loads(entry)
    assert (program, flag, module) == ("/opt/mcdeploy/bin/python", "-m", "mcruntime.server")
    assert arguments[0] == "/srv/bundle"
    assert ("cuda" in arguments) == (name == "Dockerfile.cuda")
    assert server_main([str(tmp_path / "nowhere"), *arguments[1:], "--port", "0", "--grpc-port", "0"]) == 2
    assert "no such bundle folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_exposes_the_ports_that_the_server_listens_on(image, name):
    steps = dict(instructions(image / name))
    values = vars(make_parser().parse_args(json.loads(steps["ENTRYPOINT"])[3:]))
    assert (values["host"], values["provider"]) == ("0.0.0.0", "cuda" if name == "Dockerfile.cuda" else "cpu")
    assert steps["EXPOSE"].split() == [str(values["port"]), str(values["grpc_port"])]
    assert health_check(image / name)[-1] == str(values["port"])


def test_connections_idle_longer_than_load_balancers_keep_them_wherever_it_is_said():
    """A server that hangs up first makes a load balancer answer 502 to a request that was on its way."""
    usual = http_protocol(ServerOptions(), print, {}).limits.idle_s
    assert usual == ServerOptions().keep_alive_s > 60, "nginx and AWS keep idle connections for 60 s"
    assert http_protocol(ServerOptions(keep_alive_s=9.0), print, {}).limits.idle_s == 9.0
    templates = ROOT / "export/mcruntime/deploy/templates"
    entries = [json.loads(dict(instructions(templates / name))["ENTRYPOINT"])[3:] for name in DOCKERFILES]
    (container,) = yaml.safe_load((templates / "kserve_runtime.yaml").read_text())["spec"]["containers"]
    for arguments in (*entries, container["args"]):
        assert make_parser().parse_args(arguments).keep_alive_s == usual
    said = re.findall(r"[Ii]dle connections stay for (\d+) s", (ROOT / "DECISIONS.md").read_text())
    assert [float(seconds) for seconds in said] == [usual]


def health_check(dockerfile):
    """The command of the HEALTHCHECK, and what docker is told about it, in seconds."""
    (check,) = [rest for kind, rest in instructions(dockerfile) if kind == "HEALTHCHECK"]
    return json.loads(check[check.index("CMD ") + 4 :])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_health_check_is_the_servers_own_and_done_before_docker_gives_up_on_it(image, name):
    program, flag, module, _ = health_check(image / name)
    assert (program, flag, module) == ("/opt/mcdeploy/bin/python", "-m", "mcruntime.server.probe")
    (check,) = [rest for kind, rest in instructions(image / name) if kind == "HEALTHCHECK"]
    assert float(re.search(r"--timeout=(\d+)s", check)[1]) > 2 * probe.TIMEOUT_S


def run_check(image, port, **environment):
    """The very command of the Dockerfile, with this Python and a port of ours: its exit code, and what it printed."""
    command = [sys.executable, *health_check(image / "Dockerfile.cpu")[1:-1], str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "export"), "http_proxy": "http://127.0.0.1:1", **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=20)
    assert done.stderr == ""
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize("kind", ["plain", "keys", "tls", "tls and keys"])
def test_the_health_check_tells_a_ready_server_from_one_that_stops_and_from_none(image, kind, tmp_path, caplog):
    options, keys = {}, None
    if "tls" in kind:
        cert, key = make_certificate(tmp_path, "elsewhere.example")
        options = {"tls_cert": cert, "tls_key": key}
    if "keys" in kind:
        (tmp_path / "keys").write_text("k" * 32)
        keys = Keys(tmp_path / "keys")
    with live(keys=keys, **options) as server:
        assert run_check(image, server.port) == (0, "ready")
        server.app.draining = True
        assert run_check(image, server.port) == (1, "not ready")
        server.app.draining = False
    assert run_check(image, server.port)[0] == 1
    assert caplog.messages == [], "the check itself fills the log"


def test_a_server_that_wants_a_certificate_of_its_clients_is_healthy_while_it_asks_for_one(image, tmp_path):
    cert, key = make_certificate(tmp_path, "server")
    with live(tls_cert=cert, tls_key=key, tls_client_ca=cert) as server:
        assert run_check(image, server.port) == (0, "ready")
        assert not server.app.answered, "and answers nothing"
    assert run_check(image, server.port)[0] == 1


def test_the_health_check_is_not_fooled_by_what_is_no_server_of_ours(image):
    for answer in (b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"):
        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer_all(listener=listener, answer=answer):
                with contextlib.suppress(OSError):
                    while True:
                        with listener.accept()[0] as client:
                            client.recv(1000)
                            client.sendall(answer)

            threading.Thread(target=answer_all, daemon=True).start()
            assert run_check(image, listener.getsockname()[1])[0] == 1
            listener.shutdown(socket.SHUT_RDWR)
    assert probe.main([]) == probe.main(["x"]) == probe.main(["70000"]) == 1


def test_the_folder_holds_the_bundle_whole_and_signed(folder, tmp_path, wheel):
    from mcruntime.signature import keygen, sign_bundle, verify_signature

    public, _ = keygen(tmp_path / "key")
    sign_bundle(folder, tmp_path / "key")
    package_docker(load_bundle(folder), tmp_path / "image", wheel=wheel)
    assert load_bundle(tmp_path / "image" / "bundle").manifest == load_bundle(folder).manifest
    verify_signature(tmp_path / "image" / "bundle", public)
    assert (tmp_path / "image/wheels" / wheel.name).read_bytes() == wheel.read_bytes()


def test_onnx_runtime_is_pinned_to_the_one_whose_parity_was_proven(tmp_path, wheel):
    folder = write_bundle(tmp_path / "bundle", versions={"onnxruntime": "1.31.1"})
    packaged = package_docker(load_bundle(folder), tmp_path / "image", wheel=wheel)
    assert (tmp_path / "image/constraints.txt").read_text().split() == [
        "onnxruntime==1.31.1",
        "onnxruntime-gpu==1.31.1",
    ]
    assert any("is pinned" in note for note in packaged.notes)
    assert any("docker was not run here" in note for note in packaged.notes)


def test_another_model_of_the_bundle_is_served_by_its_name(tmp_path, wheel):
    folder = two_models(tmp_path / "bundle")
    package_docker(load_bundle(f"{folder}@int8"), tmp_path / "image", wheel=wheel)
    for name in DOCKERFILES:
        (entry,) = [rest for kind, rest in instructions(tmp_path / "image" / name) if kind == "ENTRYPOINT"]
        place = json.loads(entry)[3]
        assert place == "/srv/bundle@int8"
        assert load_bundle(place.replace("/srv", str(tmp_path / "image"))).key == "int8"


def test_an_engine_is_not_put_into_an_image(tmp_path, wheel):
    with pytest.raises(InputError, match="is a TensorRT engine"):
        package_docker(with_engine(tmp_path / "bundle", (1, 4, 16)), tmp_path / "image", wheel=wheel)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"name": "other"}, "is no wheel of mcdeploy"), ({"is_new": False}, "is no wheel of mcdeploy"),
     ({"schema": 1}, "reads bundles of schema 1"),
     ({"extras": ("serve", "cpu")}, "has no extra grpc, sign")],
)  # fmt: skip
def test_a_wheel_that_does_not_fit_is_refused(folder, tmp_path, change, sentence):
    path = write_wheel(tmp_path / "mcdeploy-9-py3-none-any.whl", **change)
    with pytest.raises(InputError, match=re.escape(sentence)):
        package_docker(load_bundle(folder), tmp_path / "image", wheel=path)
    assert not (tmp_path / "image").exists()


def test_what_is_no_wheel_is_refused(tmp_path):
    (tmp_path / "mcdeploy-1.whl").write_text("no zip")
    for path, sentence in ((tmp_path / "mcdeploy-1.whl", "is no wheel"), (tmp_path / "no.whl", "no such file")):
        with pytest.raises(InputError, match=sentence):
            check_wheel(path)


def test_outside_of_a_checkout_the_wheel_has_to_be_given(folder, tmp_path, monkeypatch):
    assert find_checkout() == ROOT
    monkeypatch.setattr(docker_module, "__file__", str(tmp_path / "site-packages/mcruntime/deploy/docker.py"))
    with pytest.raises(InputError, match="give its wheel with --wheel"):
        package_docker(load_bundle(folder), tmp_path / "image")
    assert not (tmp_path / "image").exists()


def test_in_a_checkout_the_wheel_is_built_by_pip_without_dependencies(folder, tmp_path, monkeypatch):
    commands = []

    def pip(command, **_):
        commands.append(command)
        write_wheel(Path(command[command.index("--wheel-dir") + 1]) / "mcdeploy-0.1.0-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    package_docker(load_bundle(folder), tmp_path / "image")
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "wheel"]
    assert "--no-deps" in command
    assert command[-1] == str(ROOT)
    assert (tmp_path / "image/wheels/mcdeploy-0.1.0-py3-none-any.whl").exists()


def test_a_wheel_that_cannot_be_built_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        McdeployError, match=r"building mcdeploy's wheel failed \(.+\); give one with --wheel"
    ) as caught:
        build_wheel(tmp_path / "empty", tmp_path)
    assert "\n" not in str(caught.value)


def test_the_dockerfiles_are_files_that_ship(image):
    """hatch takes every file below ``export/mcruntime``; nothing may be ignored by git, which it follows."""
    templates = ROOT / "export/mcruntime/deploy/templates"
    assert {path.name for path in templates.iterdir() if not path.name.startswith("kserve_")} == set(TEMPLATES)
    for source, target in TEMPLATES.items():
        assert (image / target).read_bytes() == (templates / source).read_bytes()
    patterns = (ROOT / ".gitignore").read_text().split()
    for path in templates.iterdir():
        assert not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)


def test_the_lines_on_top_of_a_dockerfile_name_it_and_its_options(image):
    """What a reader copies: the file it is in, and options that the server has."""
    for name in DOCKERFILES:
        comments = [line[2:].strip() for line in (image / name).read_text().splitlines() if line.startswith("#  ")]
        words = [word for line in comments for word in shlex.split(line)]
        assert name in words
        assert "--require-signature" in words


# ------------------------------------------------------------------------------------------------------------ command


def mcdeploy(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mcdeploy", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as left:
        return left.code or 0
    return 0


def test_the_command_packages_the_model_that_is_named(tmp_path, wheel, monkeypatch, capsys):
    folder = two_models(tmp_path / "bundle")
    bench = bench_json(tmp_path / "b.json", [(f"{folder}@int8 [onnx]", 1, 1.0), (f"{folder}@int8 [onnx]", 16, 9.0)])
    arguments = ("package", f"{folder}@int8", "--to", "triton", "--out", tmp_path / "repo", "--bench", bench)
    assert mcdeploy(monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    assert "no Triton ran this package" in said
    assert said.endswith(f"wrote {tmp_path / 'repo'}\n")
    assert config_of(tmp_path / "repo").max_batch_size == 16
    assert mcdeploy(monkeypatch, "package", folder, "--to", "docker", "--out", tmp_path / "i", "--wheel", wheel) == 0
    assert "docker was not run here" in capsys.readouterr().out
    assert (tmp_path / "i" / "Dockerfile.cpu").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(("--to", "torch"), "this version has triton, docker"), (("--to", "docker", "--bench", "b.json"), "--bench: "),
     (("--to", "triton", "--wheel", "m.whl"), "--wheel: ")],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(folder, tmp_path, monkeypatch, capsys, options, sentence):
    assert mcdeploy(monkeypatch, "package", folder, *options, "--out", tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
