"""A package for KServe: what its types and its webhook allow, values that stay values, a server that understands it.

``kserve_parts`` has what KServe takes, as far as we use it: a key that is not there is a typo, or has to be looked up
first. The rules of its webhook are from pkg/apis/serving/v1beta1/inference_service_validation.go. By hand,
``kserve_types`` holds the files against the types of KServe's own package.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kserve_parts import RUNTIME, SERVICE, applied, misfits
from mcruntime.bundle import load_bundle, seal
from mcruntime.deploy import LIST
from mcruntime.deploy.kserve import COPY, LONGEST_NAME, check_image, check_storage, kubernetes_name, package_kserve
from mcruntime.errors import InputError
from mcruntime.manifest import Latency
from mcruntime.server.__main__ import make_parser
from mcruntime.server.loader import open_model, parse_target
from mcruntime.server.options import ServerOptions, from_flags
from test_deploy import files_in, with_engine
from tiny_onnx import expected_logits, some_images, tiny_file, tiny_manifest, write_bundle, write_model

from mcdeploy import cli

URI, IMAGE = "s3://models/tiny", "registry.example.com/classifier:1"
ISVC_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")  # IsvcNameFmt of the webhook
YAMLS = ("runtime.yaml", "standard/server.yaml", "standard/triton.yaml", "knative/server.yaml", "knative/triton.yaml")


@pytest.fixture
def folder(tmp_path):
    return write_bundle(tmp_path / "bundle", name="Tiny.Net")


@pytest.fixture
def out(folder, tmp_path):
    package_kserve(load_bundle(folder), tmp_path / "out", storage_uri=URI, image=IMAGE)
    return tmp_path / "out"


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def container_of(tree):
    """The runtime's container as KServe lays the service's model over it."""
    return tree["spec"]["containers"][0]


# ------------------------------------------------------------------------------------------------------- KServe's rules


@pytest.mark.parametrize("name", YAMLS)
def test_every_key_is_one_that_kserve_has_and_of_its_type(out, name):
    tree = read(out / name)
    assert misfits(tree, RUNTIME if name == "runtime.yaml" else SERVICE) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [(lambda tree: tree["spec"]["predictor"].update(minReplica=1), "spec.predictor.minReplica: unknown"),
     (lambda tree: tree["spec"]["predictor"].update(minReplicas="1"), "spec.predictor.minReplicas: '1'"),
     (lambda tree: tree["spec"]["predictor"]["model"].pop("modelFormat"), "spec.predictor.model.modelFormat: missing"),
     (lambda tree: tree["spec"]["predictor"].update(scaleMetric="rqs"), "spec.predictor.scaleMetric: 'rqs'")],
)  # fmt: skip
def test_the_check_of_keys_finds_what_it_is_for(out, change, found):
    tree = read(out / "knative/server.yaml")
    change(tree)
    assert [line for line in misfits(tree, SERVICE) if line.startswith(found)]


@pytest.mark.parametrize("name", YAMLS[1:])
def test_the_webhook_would_let_every_service_in(out, name):
    """The rules that KServe checks beyond its types."""
    tree = read(out / name)
    annotations, predictor = tree["metadata"]["annotations"], tree["spec"]["predictor"]
    assert ISVC_NAME.fullmatch(tree["metadata"]["name"])
    assert "name" not in predictor["model"], "is not allowed in a predictor of a model format"
    assert 0 < predictor["minReplicas"] <= predictor["maxReplicas"]
    if name.startswith("standard"):
        assert annotations["serving.kserve.io/deploymentMode"] == "Standard"
        assert annotations["serving.kserve.io/autoscalerClass"] == "hpa"
        assert predictor["scaleMetric"] == "cpu", "without it Kubernetes' autoscaler knows cpu and memory only"
        assert 1 <= predictor["scaleTarget"] <= 100
    else:
        assert annotations == {"serving.kserve.io/deploymentMode": "Knative"}
        assert predictor["scaleMetric"] == "concurrency"


@pytest.mark.parametrize("name", ["knative/server.yaml", "knative/triton.yaml"])
def test_knative_gets_one_port_and_no_field_that_it_forbids(out, name):
    runtime = read(out / "runtime.yaml") if "server" in name else {"spec": {"containers": [{}]}}
    container = container_of(applied(runtime, read(out / name)))
    allowed = {"name", "image", "command", "args", "ports", "env", "resources", "securityContext", "readinessProbe",
               "livenessProbe"}  # fmt: skip
    assert container.keys() <= allowed, "ContainerMask of Knative's Serving"
    assert len(container.get("ports", [])) <= 1
    assert "terminationGracePeriodSeconds" not in read(out / name)["spec"]["predictor"]


def test_the_service_asks_for_the_format_protocol_and_runtime_that_there_is(out):
    runtime = read(out / "runtime.yaml")
    (offered,) = runtime["spec"]["supportedModelFormats"]
    for mode in ("standard", "knative"):
        model = read(out / mode / "server.yaml")["spec"]["predictor"]["model"]
        assert model["runtime"] == runtime["metadata"]["name"] == "mcdeploy"
        assert model["modelFormat"] == {key: offered[key] for key in ("name", "version")}
        assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
        model = read(out / mode / "triton.yaml")["spec"]["predictor"]["model"]
        assert (model["runtime"], model["modelFormat"]) == ("kserve-tritonserver", {"name": "onnx"})


def test_each_service_reads_its_own_folder(out):
    for mode in ("standard", "knative"):
        for service, place in {"server": "bundle", "triton": "triton"}.items():
            model = read(out / mode / f"{service}.yaml")["spec"]["predictor"]["model"]
            assert model["storageUri"] == f"{URI}/{place}"
            assert (out / "storage" / place).is_dir()
    assert {path.name for path in (out / "storage").iterdir()} == {"bundle", "triton"}


def test_both_services_fit_into_one_namespace(out):
    for mode in ("standard", "knative"):
        assert read(out / mode / "server.yaml")["metadata"]["name"] == "tiny-net"
        assert read(out / mode / "triton.yaml")["metadata"]["name"] == "tiny-net-triton"


# ----------------------------------------------------------------------------------------------------- the server in it


def arguments_of(out, mode="standard"):
    """The container's command line as KServe starts it, with the name filled in and /mnt/models where it is here."""
    tree = applied(read(out / "runtime.yaml"), read(out / mode / "server.yaml"))
    name = read(out / mode / "server.yaml")["metadata"]["name"]
    container = container_of(tree)
    assert container["command"] == ["/opt/mcdeploy/bin/python", "-m", "mcruntime.server"]
    return [
        argument.replace("{{.Name}}", name).replace("/mnt/models", str(out / "storage/bundle"))
        for argument in container["args"]
    ]


def test_the_server_understands_its_arguments_and_serves_what_is_mounted(out):
    values = vars(make_parser().parse_args(arguments_of(out)))
    (bundle,) = values.pop("bundles")
    options = from_flags(values)
    assert (options.host, options.port, options.grpc_port) == ("0.0.0.0", 8080, 9000)
    model = open_model(parse_target(bundle), ServerOptions(threads=1, max_batch=2))
    model.close()
    assert model.spec.name == "tiny-net", "by the service's name, as KServe's own servers are"
    assert model.about["bundle"] == load_bundle(out / "storage/bundle").manifest.id


def test_a_folder_of_bundles_can_be_mounted_too(out, tmp_path):
    """What the README says of several bundles: ``--repository /mnt/models`` in place of the first argument."""
    from mcruntime.server.loader import find_in

    (tmp_path / "mounted").mkdir()
    (out / "storage/bundle").rename(tmp_path / "mounted/first")
    values = vars(make_parser().parse_args(["--repository", str(tmp_path / "mounted"), *arguments_of(out)[1:]]))
    assert values.pop("bundles") == []
    assert [target.name for target in find_in(from_flags(values).repository)] == ["first"]


def test_a_model_on_a_linked_mount_is_loaded(out, tmp_path):
    """KServe mounts what comes from a registry as a link."""
    (tmp_path / "models").symlink_to(out / "storage/bundle")
    assert load_bundle(tmp_path / "models").key == "fp32"


def test_the_ports_of_the_container_are_those_that_the_server_listens_on(out):
    for mode, ports in {"standard": [8080, 9000], "knative": [8080]}.items():
        container = container_of(applied(read(out / "runtime.yaml"), read(out / mode / "server.yaml")))
        values = vars(make_parser().parse_args(arguments_of(out, mode)))
        del values["bundles"]
        options = from_flags(values)
        found = [port["containerPort"] for port in container["ports"]]
        assert found == ports, "REST first: KServe sends to the first one"
        assert set(found) <= {options.port, options.grpc_port}
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] == options.port
            assert container[probe]["httpGet"]["path"] in ("/v2/health/ready", "/v2/health/live")


def test_a_pod_has_the_time_to_drain(out):
    for service in ("server", "triton"):
        predictor = read(out / f"standard/{service}.yaml")["spec"]["predictor"]
        sleep, seconds = predictor["model"]["lifecycle"]["preStop"]["exec"]["command"]
        assert sleep == "sleep"
        assert predictor["terminationGracePeriodSeconds"] > int(seconds) + ServerOptions().drain_s


def test_the_container_may_do_nothing_but_serve(out):
    security = container_of(read(out / "runtime.yaml"))["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    dockerfile = Path(__file__).parents[1] / "export/mcruntime/deploy/templates/Dockerfile.cpu"
    assert f"\nUSER {security['runAsUser']}:{security['runAsGroup']}\n" in dockerfile.read_text()


def test_onnx_runtime_tells_nobody_about_the_model(out):
    assert {"name": "ORT_DISABLE_TELEMETRY", "value": "1"} in container_of(read(out / "runtime.yaml"))["env"]


def test_memory_grows_with_the_model_and_holds_all_requests(tmp_path, monkeypatch):
    from mcruntime.deploy import kserve as module

    def memory(folder):
        bundle = load_bundle(folder)
        package_kserve(bundle, tmp_path / "m", storage_uri=URI, image=IMAGE)
        resources = read(tmp_path / "m/standard/server.yaml")["spec"]["predictor"]["model"]["resources"]
        assert resources["limits"] == resources["requests"], "a pod must not be ended for memory that it was promised"
        return int(resources["limits"]["memory"].removesuffix("Mi")) << 20

    folder = write_bundle(tmp_path / "b")
    small = memory(folder)
    container = container_of(read(tmp_path / "m/runtime.yaml"))
    values = vars(make_parser().parse_args(container["args"]))
    images = int(container["resources"]["limits"]["cpu"]) * values["max_pixels"] * 16
    assert small > ServerOptions().max_inflight_bytes + images, "a decoder runs on each core"
    size = (folder / "model.onnx").stat().st_size
    monkeypatch.setattr(module, "MODEL_COPIES", (300 << 20) // size)
    assert memory(folder) - small in (256 << 20, 512 << 20)


# ----------------------------------------------------------------------------------------------------------- the bundle


def test_concurrency_follows_the_measured_batch(tmp_path):
    def row(batch, speed):
        return Latency(
            model="fp32", provider="cpu", batch=batch, p50_ms=1.0, low_ms=1.0, high_ms=1.0, images_per_second=speed,
            machine={},
        )  # fmt: skip

    for number, (rows, target) in enumerate([((row(1, 10.0), row(16, 90.0)), 16), ((row(1, 10.0), row(16, 9.0)), 2)]):
        folder = write_bundle(tmp_path / str(number), latency=rows)
        package_kserve(load_bundle(folder), tmp_path / "o" / str(number), storage_uri=URI, image=IMAGE)
        for service in ("server", "triton"):
            predictor = read(tmp_path / "o" / str(number) / f"knative/{service}.yaml")["spec"]["predictor"]
            assert predictor["scaleTarget"] == target


def test_another_model_of_the_bundle_has_a_runtime_of_its_own(tmp_path):
    folder = write_bundle(tmp_path / "bundle")
    write_model(folder / "model.int8.onnx", bias=np.array([5, 0, 0, 0], dtype=np.float32))
    images = some_images(3)
    logits = expected_logits(images) + np.array([5, 0, 0, -0.5], dtype=np.float32)
    np.savez(folder / "selftest.npz", images=images, logits=logits)
    models = {"fp32": tiny_file(), "int8": tiny_file(file="model.int8.onnx", precision="int8")}
    seal(folder, tiny_manifest(models=models))
    package_kserve(load_bundle(f"{folder}@int8"), tmp_path / "out", storage_uri=URI, image=IMAGE)
    (bundle, *_) = arguments_of(tmp_path / "out")
    model = open_model(parse_target(bundle), ServerOptions(threads=1, max_batch=2))
    model.close()
    assert (model.spec.name, model.about["model"]) == ("tiny", "int8")
    runtime = read(tmp_path / "out/runtime.yaml")
    assert runtime["metadata"]["name"] == "mcdeploy-int8"
    assert runtime["spec"]["supportedModelFormats"][0]["name"] == "mcdeploy-int8", "never chosen for another service"


def test_an_engine_goes_to_triton_on_a_gpu_and_into_no_image(tmp_path):
    bundle = with_engine(tmp_path / "bundle", (1, 4, 16))
    packaged = package_kserve(bundle, tmp_path / "out", storage_uri=URI)
    model = read(tmp_path / "out/standard/triton.yaml")["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "tensorrt"}
    assert model["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    assert misfits(read(tmp_path / "out/standard/triton.yaml"), SERVICE) == []
    assert any("TensorRT 10.16.1.11 only" in note for note in packaged.notes)
    assert "TensorRT 10.16.1.11 only" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(InputError, match="leave --image away"):
        package_kserve(bundle, tmp_path / "other", storage_uri=URI, image=IMAGE)
    assert not (tmp_path / "other").exists()


def test_without_an_image_only_tritons_part_is_written_and_said_so(folder, tmp_path):
    packaged = package_kserve(load_bundle(folder), tmp_path / "out", storage_uri=URI)
    assert set(files_in(tmp_path / "out")) == {
        LIST, "README.md", "standard/triton.yaml", "knative/triton.yaml", "storage/triton/Tiny.Net/config.pbtxt",
        "storage/triton/Tiny.Net/labels.txt", "storage/triton/Tiny.Net/1/model.onnx",
    }  # fmt: skip
    assert any("only Triton's part" in note for note in packaged.notes)
    assert "server" not in (tmp_path / "out/README.md").read_text().replace("kserve-tritonserver", "")


def test_packaging_twice_gives_the_same_and_says_what_was_not_run(folder, tmp_path):
    for _ in range(2):
        packaged = package_kserve(load_bundle(folder), tmp_path / "a", storage_uri=URI, image=IMAGE)
    package_kserve(load_bundle(folder), tmp_path / "b", storage_uri=URI, image=IMAGE)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    listed = json.loads((tmp_path / "a" / LIST).read_text())
    assert (listed["kind"], listed["chosen"]["ran_in_kserve"]) == ("kserve", False)
    assert any("no KServe ran it here" in note for note in packaged.notes)
    assert "Nothing here was applied to a cluster" in (tmp_path / "a/README.md").read_text()


# ----------------------------------------------------------------------------------------------------- the README in it


def test_the_readme_names_every_file_and_no_other(out):
    text = (out / "README.md").read_text()
    named = set(re.findall(r"(?:standard|knative|storage)/[a-z]+(?:\.yaml)?|runtime\.yaml", text))
    assert all((out / name).exists() for name in named)
    for name in (*YAMLS, "storage/triton", "storage/bundle"):
        assert name in named
    assert "$" not in text, "all was filled in"


def test_the_commands_of_the_readme_are_in_order(out):
    lines = [line.strip() for line in (out / "README.md").read_text().splitlines() if line.startswith("       ")]
    programs = [shlex.split(line, comments=True)[:2] for line in lines]
    assert programs == [["aws", "s3"], ["docker", "build"], ["docker", "push"], *[["kubectl", "apply"]] * 3,
                        ["kubectl", "wait"], ["kubectl", "get"], ["curl", "http://HOST/v2/health/ready"]]  # fmt: skip


@pytest.mark.parametrize(
    "uri",
    ["gs://b/f", "pvc://claim/a/b", "hdfs://node:9000/models", "webhdfs://node/m",
     "https://store.blob.core.windows.net/models/digits"],
)  # fmt: skip
def test_every_kind_of_storage_has_its_command(folder, tmp_path, uri):
    package_kserve(load_bundle(folder), tmp_path / "out", storage_uri=uri)
    text = (tmp_path / "out/README.md").read_text()
    tool = shlex.split(COPY[uri.partition(":")[0]])[0]
    assert f"       {tool} " in text
    assert read(tmp_path / "out/knative/triton.yaml")["spec"]["predictor"]["model"]["storageUri"] == f"{uri}/triton"


# ------------------------------------------------------------------------------------------------------- hostile values


@given(st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,200}\Z"))
def test_any_name_of_a_bundle_becomes_one_that_kubernetes_takes(name):
    found = kubernetes_name(name)
    assert ISVC_NAME.fullmatch(found)
    assert len(found) <= LONGEST_NAME
    assert len(f"{found}-triton-predictor-00001") <= 63


def test_names_that_are_fine_stay_and_long_ones_stay_apart():
    assert kubernetes_name("resnet18-digits") == "resnet18-digits"
    assert kubernetes_name("Tiny.Net_1") == "tiny-net-1"
    assert kubernetes_name("9lives") == "m-9lives"
    assert kubernetes_name("a" * 100) != kubernetes_name("a" * 101)
    assert len(kubernetes_name("a" * 100)) <= LONGEST_NAME
    assert len(kubernetes_name("9" * 100)) <= LONGEST_NAME


@given(st.from_regex(r"\A(s3|pvc|hdfs)://.{1,60}\Z") | st.text(max_size=60))
def test_an_address_either_survives_yaml_or_is_refused(text):
    try:
        uri = check_storage(text)
    except InputError:
        return
    assert yaml.safe_load(yaml.safe_dump({"storageUri": uri})) == {"storageUri": text.rstrip("/")}
    assert not re.search(r"[\s'\"`$;&|<>(){}\\#*?!]", uri), "it is part of commands and of KServe's own templates"


@pytest.mark.parametrize(
    "uri",
    ["", "models", "/mnt/models", "s3://", "s3://b/../c", "s3://b//c", "s3://b/x y", "s3://b/{{.Name}}", "s3://b/$(id)",
     "s3://b\nimage: evil", "ftp://host/f", "http://host/f", "oci://registry/image:1", "https://example.com/f", "s3://b;ls"],
)  # fmt: skip
def test_an_address_that_kserve_cannot_read_as_a_folder_is_refused(folder, tmp_path, uri):
    with pytest.raises(InputError, match="is no folder that KServe reads; give one such as"):
        package_kserve(load_bundle(folder), tmp_path / "out", storage_uri=uri)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("image", "sentence"),
    [("classifier", "may be another one tomorrow"), ("classifier:latest", "may be another one tomorrow"),
     *((image, "is no image's name") for image in (
         "Classifier:1", "a:1\nprivileged: true", "a b:1", "{{.Name}}:1", "https://registry/a:1", "a:1;ls"))],
)  # fmt: skip
def test_an_image_that_is_none_or_not_pinned_is_refused(folder, tmp_path, image, sentence):
    with pytest.raises(InputError, match=sentence):
        package_kserve(load_bundle(folder), tmp_path / "out", storage_uri=URI, image=image)
    assert not (tmp_path / "out").exists()


def test_the_usual_images_are_taken():
    for image in ("classifier:1", "localhost:5000/team/classifier:v1.2-cpu", "ghcr.io/a/b@sha256:" + "0" * 64,
                  "123.dkr.ecr.eu-west-1.amazonaws.com/a_b/c--d:latest@sha256:" + "f" * 64):  # fmt: skip
        check_image(image)


# -------------------------------------------------------------------------------------------------------------- command


def mcdeploy(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mcdeploy", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as left:
        return left.code or 0
    return 0


def test_the_command_writes_the_package(folder, tmp_path, monkeypatch, capsys):
    arguments = ("--to", "kserve", "--out", tmp_path / "out", "--storage-uri", f"{URI}/", "--image", IMAGE)
    assert mcdeploy(monkeypatch, "package", folder, *arguments) == 0
    said = capsys.readouterr().out
    assert "no KServe ran it here" in said
    assert said.endswith(f"wrote {tmp_path / 'out'}\n")
    assert container_of(read(tmp_path / "out/runtime.yaml"))["image"] == IMAGE
    assert read(tmp_path / "out/standard/server.yaml")["spec"]["predictor"]["model"]["storageUri"] == f"{URI}/bundle"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [(("--to", "kserve"), "give --storage-uri"), (("--to", "triton", "--image", IMAGE), "--image: is read by kserve"),
     (("--to", "docker", "--storage-uri", URI), "--storage-uri: is read by kserve"),
     (("--to", "kserve", "--storage-uri", URI, "--wheel", "m.whl"), "--wheel: is what a docker image installs")],
)  # fmt: skip
def test_options_of_the_command_that_do_not_fit_are_refused(folder, tmp_path, monkeypatch, capsys, options, sentence):
    assert mcdeploy(monkeypatch, "package", folder, *options, "--out", tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_commands_on_the_page_of_the_path_have_options_that_exist():
    import typer

    commands = typer.main.get_command(cli.app).commands
    page = (Path(__file__).parents[1] / "docs/serving_path.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("mcdeploy ")]
    assert len(lines) >= 6
    for words in lines:
        known = {option for parameter in commands[words[1]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words
