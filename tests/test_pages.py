"""The page and the description of the interface: complete, closed to everything outside, and true of the bundle."""

import asyncio
import base64
import json
import re
from contextlib import contextmanager
from importlib.resources import files

import httpx
import numpy as np
import pytest
from mcruntime.bundle import WIRING, WIRING_MODEL, seal
from mcruntime.manifest import Latency
from mcruntime.server import about as about_module
from mcruntime.server import pages
from mcruntime.server.app import App
from mcruntime.server.auth import Keys
from mcruntime.server.loader import Target, open_model
from mcruntime.server.models import Models
from mcruntime.server.openapi import openapi
from mcruntime.server.options import ServerOptions
from onnx import TensorProto, helper
from PIL import Image
from tiny_onnx import tiny_manifest, write_bundle, write_graph

KEY = "a-key-for-the-tests-0123456789"
ASSETS = pages.load_assets()
TOPOLOGY = {
    "aggregate": "mean",
    "stages": [
        {"name": "layer1", "blocks": ["0", "1", "2"], "reads": [[0], [1], [0, 1]]},
        {"name": "layer2", "blocks": ["0", "output"], "reads": [[0], [0, 1]]},
    ],
}
CANDIDATES = {
    "aggregate": "mean",
    "stages": [
        {"name": "layer1", "blocks": ["0", "1", "2"], "reads": [[0], [0, 1], [0, 1, 2]]},
        {"name": "layer2", "blocks": ["0", "output"], "reads": [["0:1", 0], [0, 1]]},
    ],
}
CERTIFICATE = {
    "removed": {"dead: no stage output depends on it": ["layer1.1"]},
    "parameters": [32, 16],
    "macs": [24, 12],
    "topology": TOPOLOGY,
    "checks": [{"step": "prune", "bn": "as trained", "must_be": "bit-equal in float32", "max_relative": 0.0}],
    "calibration": None,
}
RECIPE = {
    "model": {"backbone": "resnet_tiny", "weights": "/home/somebody/weights.safetensors"},
    "data": {"root": "/home/somebody/data"},
    "connectivity": {"rule": "maskconnect"},
}


def bundle_with(folder, certificate=CERTIFICATE, wiring=None, **changes):
    """The tiny bundle with reports; sealed again."""
    write_bundle(folder)
    (folder / "certificate.json").write_text(json.dumps(certificate))
    if wiring is not None:
        (folder / WIRING).write_text(json.dumps(wiring))
    seal(folder, tiny_manifest(**{"recipe": RECIPE, **changes}))
    return folder


@contextmanager
def served(*targets, options=None, **more):
    """An app over bundles, without a socket."""
    models = Models()
    for target in targets:
        models.add(open_model(target, options or ServerOptions()))
    app = App(models, options or ServerOptions(), routes=pages.routes, **more)
    try:
        yield app
    finally:
        models.close()
        app.close()


def ask(app, method, path, **more):
    async def one():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.request(method, path, **more)

    return asyncio.run(one())


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with served(Target(bundle_with(tmp_path_factory.mktemp("pages") / "tiny"), "tiny")) as app:
        yield app


# ------------------------------------------------------------------------------------------------------------ the files


@pytest.mark.parametrize("path", ASSETS)
def test_every_file_of_the_page_is_served_with_a_policy_that_lets_nothing_in(app, path):
    answer = ask(app, "GET", path)
    assert answer.status_code == 200
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert not any("unsafe" in value or "http" in value or "*" in value for value in policy.values())
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ASSETS)
def test_no_file_of_the_page_names_an_address_elsewhere_or_holds_inline_code(path):
    text = ASSETS[path].body.decode()
    addresses = set(re.findall(r"(?:https?:)?//[a-z0-9.]+\.[a-z]+", text)) - {"http://www.w3.org"}
    assert not addresses
    assert "http://www.w3.org/2000/svg" in text or "http" not in text.replace("/https?:", "")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son[a-z]+=|\sstyle=|javascript:|innerHTML|eval\(", text)


def test_every_file_in_the_packages_folder_is_served_and_every_served_one_is_there():
    there = {entry.name for entry in (files("mcruntime.server") / "page").iterdir()}
    assert there == set(pages.FILES) == set(pages.PLACES.values())


def test_whatever_a_page_links_to_is_served(app):
    for path, asset in ASSETS.items():
        for link in re.findall(r'(?:href|src)="([^"#]+)"|from "\./([a-z.]+)"', asset.body.decode()):
            found = f"/{link[0]}" if link[0] else f"/page/{link[1]}"
            assert app.serves("/" if found == "/." else found), f"{path} links to {found}"


def test_a_file_that_the_browser_has_is_not_sent_again(app):
    first = ask(app, "GET", "/page/page.js")
    again = ask(app, "GET", "/page/page.js", headers={"If-None-Match": first.headers["etag"]})
    weak = ask(app, "GET", "/page/page.js", headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    other = ask(app, "GET", "/page/page.js", headers={"If-None-Match": '"other"'})
    assert [again.status_code, weak.status_code, other.status_code] == [304, 304, 200]
    assert again.content == b""
    assert first.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page", "/page/index.html", "/page/../pages.py", "/page/..%2fpages.py", "/page/.", "/index.html",
     "/page/page.js/", "/page/pagexjs", "/page//page.js"],
)  # fmt: skip
def test_nothing_but_the_known_names_is_served(app, path):
    assert ask(app, "GET", path).status_code == 404


def test_the_pages_are_open_to_all_and_what_they_ask_for_is_not(tmp_path):
    (tmp_path / "keys").write_text(KEY)
    bundle = Target(bundle_with(tmp_path / "tiny"), "tiny")
    with served(bundle, keys=Keys(tmp_path / "keys")) as app:
        assert {ask(app, "GET", path).status_code for path in ASSETS} == {200}
        for path in ("/openapi.json", "/v2/models/tiny/about", "/v2/models"):
            assert ask(app, "GET", path).status_code == 401
            assert ask(app, "GET", path, headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        assert ask(app, "POST", "/v2/models/tiny/wiring").status_code == 401


# ------------------------------------------------------------------------------------------------------------ the facts


def test_the_facts_are_those_of_the_bundle(app):
    told = ask(app, "GET", "/v2/models/tiny/about").json()
    assert (told["name"], told["version"], told["versions"]) == ("tiny", "1", ["1"])
    assert told["bundle"]["params"] == {"before": 32, "after": 16}
    assert told["bundle"]["backbone"] == "resnet_tiny"
    assert told["bundle"]["parity"][0]["hop"] == "onnx"
    assert told["certificate"]["removed"] == CERTIFICATE["removed"]
    assert told["certificate"]["checks"] == CERTIFICATE["checks"]
    assert told["served"]["bundle"] == told["bundle"]["id"]


def test_no_path_of_any_machine_is_among_the_facts(tmp_path):
    row = {"model": "fp32", "provider": "cpu", "threads": 1, "batch": 1, "p50_ms": 1.0, "low_ms": 1.0, "high_ms": 1.0,
           "images_per_second": 1.0, "machine": {"cpu": "x", "python": "/usr/bin/python"}}  # fmt: skip
    recipe = {**RECIPE, "model": {"backbone": "/home/somebody/net"}}
    bundle = bundle_with(tmp_path / "tiny", recipe=recipe, latency=(Latency.model_validate(row),))
    with served(Target(bundle, "tiny")) as app:
        text = ask(app, "GET", "/v2/models/tiny/about").text
    assert '"machine":{"cpu":"x"}' in text
    assert "/home" not in text
    assert "/usr" not in text
    assert str(tmp_path) not in text


def test_a_bundle_without_reports_is_described_by_what_there_is(tmp_path):
    with served(Target(write_bundle(tmp_path / "tiny"), "tiny")) as app:
        told = ask(app, "GET", "/v2/models/tiny/about").json()
    assert told["certificate"] is None  # of the tiny bundle: {"removed": []}
    assert told["wiring"] is None
    assert told["bundle"]["latency"] == []


@pytest.mark.parametrize("text", ['{"removed": {}, "topology": {"stages": [{"name": 3}]}}', "[1]", '{"topology": 7}'])
def test_a_report_of_another_form_is_left_out(tmp_path, text):
    bundle = bundle_with(tmp_path / "tiny", certificate=json.loads(text))
    with served(Target(bundle, "tiny")) as app:
        answer = ask(app, "GET", "/v2/models/tiny/about")
    assert answer.status_code == 200
    assert answer.json()["wiring"] is None


def test_a_report_that_was_changed_after_the_bundle_was_loaded_is_not_told(tmp_path):
    bundle = bundle_with(tmp_path / "tiny")
    with served(Target(bundle, "tiny")) as app:
        (bundle / "certificate.json").write_text(json.dumps({**CERTIFICATE, "removed": {"a lie": ["layer1.0"]}}))
        assert ask(app, "GET", "/v2/models/tiny/about").json()["certificate"] is None


def test_of_a_bundle_that_was_replaced_by_another_nothing_is_told(tmp_path):
    bundle = bundle_with(tmp_path / "tiny")
    with served(Target(bundle, "tiny")) as app:
        bundle_with(bundle, certificate={**CERTIFICATE, "removed": {}})
        assert ask(app, "GET", "/v2/models/tiny/about").json()["bundle"] is None


def test_each_version_tells_its_own_facts(tmp_path):
    one, two = bundle_with(tmp_path / "one"), bundle_with(tmp_path / "two", certificate={**CERTIFICATE, "removed": {}})
    with served(Target(one, "tiny", "1"), Target(two, "tiny", "2")) as app:
        told = [ask(app, "GET", f"/v2/models/tiny/versions/{number}/about").json() for number in (1, 2)]
        assert ask(app, "GET", "/v2/models/tiny/versions/3/about").status_code == 404
    assert [row["version"] for row in told] == ["1", "2"]
    assert [row["versions"] for row in told] == [["1", "2"]] * 2
    assert [bool(row["certificate"]["removed"]) for row in told] == [True, False]


# ----------------------------------------------------------------------------------------------------------- the wiring


def edges_of(wiring, state):
    return {(*edge["from"], *edge["to"]) for edge in wiring["edges"] if edge["state"] == state}


def test_the_wiring_says_what_is_live_what_is_dead_and_what_was_cut(tmp_path):
    gates = {"layer1": [[1.0], [0.2, 0.9], [0.5, 0.4, 0.1]]}
    more = {"topology": TOPOLOGY, "candidates": CANDIDATES, "gates": gates, "dynamic": []}
    with served(Target(bundle_with(tmp_path / "tiny", wiring=more), "tiny")) as app:
        wiring = ask(app, "GET", "/v2/models/tiny/about").json()["wiring"]
    assert edges_of(wiring, "live") == {
        (0, 0, 0, 1),
        (0, 0, 0, 3),
        (0, 1, 0, 3),
        (1, 0, 1, 1),
        (1, 0, 1, 2),
        (1, 1, 1, 2),
    }
    assert edges_of(wiring, "dead") == {(0, 1, 0, 2)}
    assert edges_of(wiring, "cut") == {(0, 0, 0, 2), (0, 2, 0, 3), (0, 1, 1, 1)}
    assert [node["name"] for node in wiring["stages"][0]["nodes"] if not node["live"]] == ["1"]
    gate = {(*edge["from"], *edge["to"]): edge.get("gate") for edge in wiring["edges"]}
    assert gate[0, 0, 0, 2] == 0.2
    assert gate[0, 1, 0, 3] == 0.4
    assert gate[0, 0, 0, 1] is None  # it had no choice
    assert (wiring["knows_candidates"], wiring["per_image"]) == (True, False)


def test_a_bundle_without_the_candidates_says_so(app):
    wiring = ask(app, "GET", "/v2/models/tiny/about").json()["wiring"]
    assert not edges_of(wiring, "cut")
    assert not wiring["knows_candidates"]


def write_watching_model(path, num_edges=3):
    """Weights of edges: the mean of each channel, so that the image decides."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
        helper.make_node("Relu", ["flat"], ["weights"]),
    ]
    write_graph(
        path,
        nodes,
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["batch", num_edges])],
        {},
    )


@pytest.fixture
def dynamic(tmp_path):
    folder = tmp_path / "dynamic"
    write_bundle(folder)
    edges = [{"from": [1, 0], "to": [1, 1], "share": 0.5}, {"from": [1, 0], "to": [1, 2], "share": 1.0},
             {"from": [1, 1], "to": [1, 2], "share": 0.25}]  # fmt: skip
    tree = {"topology": TOPOLOGY, "candidates": None, "gates": {}, "dynamic": edges}
    (folder / WIRING).write_text(json.dumps(tree))
    write_watching_model(folder / WIRING_MODEL)
    (folder / "certificate.json").write_text(json.dumps(CERTIFICATE))
    seal(folder, tiny_manifest())
    return folder


def png(colour):
    from io import BytesIO

    stream = BytesIO()
    Image.new("RGB", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


def test_an_image_opens_its_own_edges_and_the_nodes_it_does_not_run_are_named(dynamic):
    with served(Target(dynamic, "dynamic")) as app:
        assert ask(app, "GET", "/v2/models/dynamic/about").json()["wiring"]["per_image"]
        found = {}
        for name, colour in (("red", (255, 0, 0)), ("green", (0, 255, 0))):
            answer = ask(
                app, "POST", "/v2/models/dynamic/wiring", content=png(colour), headers={"content-type": "image/png"}
            )
            assert answer.status_code == 200, answer.text
            found[name] = answer.json()
    assert [edge["weight"] for edge in found["red"]["edges"]] == [1.0, 0.0, 0.0]
    assert found["red"]["idle"] == [[1, 2]]
    assert [edge["weight"] for edge in found["green"]["edges"]] == [0.0, 1.0, 0.0]
    assert found["green"]["idle"] == [[1, 1]]


def test_the_wiring_of_a_model_that_has_one_for_all_images_is_not_found(app):
    answer = ask(app, "POST", "/v2/models/tiny/wiring", content=png((0, 0, 0)))
    assert answer.status_code == 404
    assert "does not depend on the image" in answer.json()["error"]


def test_a_wiring_model_that_was_changed_after_loading_is_not_run(dynamic):
    with served(Target(dynamic, "dynamic")) as app:
        (dynamic / WIRING_MODEL).write_bytes(b"something else")
        assert ask(app, "POST", "/v2/models/dynamic/wiring", content=png((255, 0, 0))).status_code == 404


def test_what_is_no_image_is_refused_by_the_wiring_as_it_is_by_predict(dynamic):
    with served(Target(dynamic, "dynamic")) as app:
        for path in ("/predict", "/v2/models/dynamic/wiring"):
            assert ask(app, "POST", path, content=b"no image").status_code == 400


# -------------------------------------------------------------------------------------------------------- the interface


def filled(path, file="page.css"):
    names = {"model": "tiny", "version": "1", "file": file}
    return re.sub(r"\{(\w+)\}", lambda match: names[match[1]], path)


def test_every_route_of_the_server_is_in_the_document_and_every_path_of_it_is_served(app):
    document = ask(app, "GET", "/openapi.json").json()
    documented = {}
    for path, item in document["paths"].items():
        route, _ = app._router.find(filled(path))
        assert {method.upper() for method in item} == set(route.handlers), path
        documented.setdefault(route.pattern, path)
    files_of_the_page = {
        pattern for pattern in (route.pattern for _, route in app._router._routes) if "/page/" in pattern
    }
    everything = {route.pattern for _, route in app._router._routes}
    assert everything - files_of_the_page == set(documented) - files_of_the_page
    names = next(row for row in document["paths"]["/page/{file}"]["get"]["parameters"] if row["name"] == "file")
    assert {f"/page/{name}" for name in names["schema"]["enum"]} == {path for path in ASSETS if "/page/" in path}


def references(tree):
    if isinstance(tree, dict):
        if isinstance(tree.get("$ref"), str):
            yield tree["$ref"]
        for value in tree.values():
            yield from references(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from references(value)


def test_every_reference_of_the_document_leads_somewhere(app):
    document = openapi(app)
    found = set(references(document))
    assert len(found) > 20
    for reference in found:
        place = document
        for key in reference.removeprefix("#/").split("/"):
            place = place[key]


def test_the_document_has_the_parts_that_openapi_asks_for(app):
    document = openapi(app)
    assert document["openapi"] == "3.1.0"
    tags = {tag["name"] for tag in document["tags"]}
    for path, item in document["paths"].items():
        for operation in item.values():
            assert set(operation["tags"]) <= tags
            assert operation["summary"]
            assert all(re.fullmatch(r"[2-5]\d\d", status) for status in operation["responses"])
            rows = [
                document["components"]["parameters"][row["$ref"].rpartition("/")[2]] if "$ref" in row else row
                for row in operation.get("parameters", [])
            ]
            assert {row["name"] for row in rows if row["in"] == "path"} == set(re.findall(r"\{(\w+)\}", path))
            assert all(row["required"] for row in rows if row["in"] == "path")


def test_the_document_knows_the_models_their_shapes_and_the_limits(tmp_path):
    bundle = Target(bundle_with(tmp_path / "tiny"), "colours")
    with served(bundle, options=ServerOptions(max_batch_size=2)) as app:
        document = openapi(app)
    assert document["components"]["parameters"]["model"]["schema"]["enum"] == ["colours"]
    body = document["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    tensors = body["properties"]["inputs"]["items"]["anyOf"]
    assert [tensor["properties"]["data"]["anyOf"][0]["minItems"] for tensor in tensors] == [192, 384]
    sizes = [part["maximum"] for part in tensors[1]["properties"]["shape"]["prefixItems"]]
    assert sizes == [2, 3, 8, 8]


def test_a_key_is_documented_where_one_is_asked_for_and_only_there(app, tmp_path):
    assert "securitySchemes" not in openapi(app)["components"]
    (tmp_path / "keys").write_text(KEY)
    with served(Target(bundle_with(tmp_path / "tiny"), "tiny"), keys=Keys(tmp_path / "keys")) as locked:
        document = openapi(locked)
        for path, item in document["paths"].items():
            for method, operation in item.items():
                is_open = operation.get("security") == []
                assert ("401" in operation["responses"]) != is_open, path
                status = ask(locked, method.upper(), filled(path)).status_code
                assert (status == 401) != is_open, path


# ----------------------------------------------------------------------------------- what schemathesis found, kept away


def predict(app, query="", **json_body):
    image = base64.b64encode(png((255, 0, 0))).decode()
    return ask(app, "POST", f"/predict{query}", json={"image": image, **json_body})


def test_many_or_repeated_parameters_of_a_query_are_an_error_of_the_client(app):
    assert predict(app, "?" + "&".join(f"a{i}=1" for i in range(40))).status_code == 400
    assert predict(app, "?top=1&top=2").status_code == 400
    assert predict(app, "?top=nonsense", top=1).status_code == 400
    assert predict(app, "?top=2").status_code == 200


def test_a_whole_number_may_be_written_with_a_point(app):
    assert len(predict(app, top=2.0).json()["top"]) == 2
    assert predict(app, top=2.5).status_code == 400
    assert predict(app, top=True).status_code == 400


def test_finite_numbers_to_which_the_net_answers_nan_are_the_clients_error(app):
    def infer(value):
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 3, 8, 8], "data": [value] * 192}
        return ask(app, "POST", "/v2/models/tiny/infer", json={"inputs": [tensor]})

    assert infer(1.0).status_code == 200
    answer = infer(3e38)
    assert answer.status_code == 400
    assert "far too large" in answer.json()["error"]


def test_one_right_key_opens_whatever_the_other_header_holds(app, tmp_path):
    (tmp_path / "keys").write_text(KEY)
    keys = Keys(tmp_path / "keys")
    right, wrong = KEY.encode(), b"another-key-0123456789"
    assert keys.allow({b"authorization": b"Bearer " + right, b"x-api-key": wrong})
    assert keys.allow({b"authorization": b"Bearer " + wrong, b"x-api-key": right})
    assert not keys.allow({b"authorization": b"Bearer " + wrong, b"x-api-key": wrong})
    assert not keys.allow({b"authorization": b"Basic " + right})
    assert not keys.allow({})


def test_an_edge_of_a_topology_may_come_from_another_stage():
    assert about_module._place(1, "0:3") == (0, 3)
    assert about_module._place(1, 2) == (1, 2)
    assert np.shape(list(about_module._edges(TOPOLOGY))) == (7, 2, 2)
