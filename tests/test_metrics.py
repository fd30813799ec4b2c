"""The metrics say what happened, in forms that Prometheus reads, and no counter goes back."""

from __future__ import annotations

import asyncio
import gzip
import io

import numpy as np
import pytest
from mcruntime.server import metrics
from mcruntime.server.auth import Keys
from mcruntime.server.models import Source
from mcruntime.server.options import ServerOptions
from mcruntime.server.shadow import Shadow, Shadows
from PIL import Image
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from tiny_onnx import expected_logits, some_images
from tiny_server import Gate, app_of, busy_and_waiting, call, client_of, constant, finish, infer_request, model_of

INFER = "/v2/models/tiny/infer"
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
# The names that dashboards written for Triton ask for.
TRITON = {
    "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count", "nv_inference_exec_count",
    "nv_inference_request_duration_us", "nv_inference_queue_duration_us", "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us", "nv_inference_compute_output_duration_us",
    "nv_inference_pending_request_count", "nv_cpu_memory_total_bytes", "nv_cpu_memory_used_bytes",
}  # fmt: skip


def samples_of(app, **headers):
    response = call(app, "GET", "/metrics", headers=headers)
    assert response.status_code == 200
    return read(response.text)


def read(text):
    families = list(parse_text(text))
    assert len({family.name for family in families}) == len(families), "a family stands there twice"
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples, name, **labels):
    labels = {"model": "tiny", "version": "1"} | labels
    return samples[name, frozenset((key, text) for key, text in labels.items() if text is not None)]


def png():
    stream = io.BytesIO()
    Image.new("RGB", (9, 9), (250, 10, 10)).save(stream, "PNG")
    return stream.getvalue()


def test_requests_are_counted_by_outcome_and_in_tritons_names():
    def engine(images):
        if images.mean() > 10:
            raise RuntimeError("broken")
        return expected_logits(images)

    with app_of(model_of(engine), routes=metrics.routes) as app:
        for images in (some_images(1), some_images(3)):
            assert call(app, "POST", INFER, json=infer_request(images)).status_code == 200
        assert call(app, "POST", INFER, json=infer_request(datatype="INT8")).status_code == 400
        assert call(app, "POST", INFER, json=infer_request(np.full((1, 3, 8, 8), 99, np.float32))).status_code == 500
        assert call(app, "POST", "/predict", content=png()).status_code == 200
        assert call(app, "POST", "/predict", content=b"no image").status_code == 400
        samples = samples_of(app)
    for outcome, count in {"success": 3, "input": 2, "internal": 1, "rejected": 0, "timeout": 0}.items():
        assert value(samples, "mcdeploy_requests_total", outcome=outcome) == count, outcome
    assert value(samples, "mcdeploy_images_total") == value(samples, "nv_inference_count") == 5
    assert value(samples, "mcdeploy_executions_total") == value(samples, "nv_inference_exec_count") == 3
    assert value(samples, "nv_inference_request_success") == 3
    assert value(samples, "nv_inference_request_failure", reason="BACKEND") == 1
    assert value(samples, "nv_inference_request_failure", reason="OTHER") == 2
    for part in ("request", "queue", "compute_infer"):
        assert value(samples, f"nv_inference_{part}_duration_us") > 0, part
    assert value(samples, "mcdeploy_decode_duration_seconds_count") == 1
    for part, count in {"request": 3, "queue": 3, "compute": 3}.items():
        assert value(samples, f"mcdeploy_{part}_duration_seconds_bucket", le="+Inf") == count
        assert 0 < value(samples, f"mcdeploy_{part}_duration_seconds_sum") < 60
    assert value(samples, "mcdeploy_http_responses_total", model=None, version=None, status="400") == 2
    names = {name for name, _ in samples}
    assert names >= TRITON, TRITON - names


def test_batch_sizes_are_a_distribution_of_the_engines_runs():
    with app_of(model_of(max_batch=2), routes=metrics.routes) as app:
        for size in (1, 1, 2, 3, 5):
            call(app, "POST", INFER, json=infer_request(some_images(size)))
        samples = samples_of(app)
    counts = {bound: value(samples, "mcdeploy_batch_size_bucket", le=bound) for bound in ("1.0", "2.0", "4.0", "8.0")}
    assert counts == {"1.0": 2, "2.0": 3, "4.0": 4, "8.0": 5}
    assert value(samples, "mcdeploy_batch_size_sum") == 12
    assert value(samples, "mcdeploy_batch_size_count") == 5


def test_what_waits_is_seen_while_it_waits_and_what_is_refused_is_counted():
    gate = Gate()

    async def main(app):
        async with client_of(app) as client:
            running, waiting = await busy_and_waiting(client, gate, app.models.find("tiny"), 1)
            refused = await client.post(INFER, json=infer_request())
            text = (await client.get("/metrics")).text
            gate.open()
            return [response.status_code for response in (await running, await waiting, refused)], read(text)

    with app_of(model_of(gate, max_queue=1), routes=metrics.routes) as app:
        statuses, samples = asyncio.run(main(app))
        later = samples_of(app)
    assert statuses == [200, 200, 503]
    assert value(samples, "mcdeploy_pending_requests") == value(samples, "nv_inference_pending_request_count") == 1
    assert value(samples, "mcdeploy_max_pending_requests") == 1
    assert value(samples, "mcdeploy_requests_total", outcome="rejected") == 1
    assert value(samples, "nv_inference_request_failure", reason="REJECTED") == 1
    assert value(samples, "mcdeploy_requests_in_flight", model=None, version=None) == 2
    assert value(later, "mcdeploy_pending_requests") == 0
    assert value(later, "mcdeploy_requests_in_flight", model=None, version=None) == 0


def test_a_request_that_was_too_late_is_counted_as_such():
    gate = Gate()
    with app_of(model_of(gate), routes=metrics.routes) as app:
        late = infer_request() | {"parameters": {"timeout": 20_000}}
        assert call(app, "POST", INFER, json=late).status_code == 504
        gate.open()
        samples = samples_of(app)
    assert value(samples, "mcdeploy_requests_total", outcome="timeout") == 1
    assert value(samples, "nv_inference_request_failure", reason="REJECTED") == 1


def test_a_client_that_goes_away_is_counted():
    gate = Gate()

    async def main(app):
        task = asyncio.create_task(app.models.infer("tiny", "", some_images(1), 10.0))
        await asyncio.to_thread(gate.entered.acquire)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()

    with app_of(model_of(gate), routes=metrics.routes) as app:
        asyncio.run(main(app))
        samples = samples_of(app)
    assert value(samples, "mcdeploy_requests_total", outcome="canceled") == 1
    assert value(samples, "nv_inference_request_failure", reason="CANCELED") == 1


def test_counters_go_on_when_a_model_is_replaced_or_unloaded():
    stamps = iter(range(100))
    source = Source("tiny", "1", lambda: model_of(), lambda: str(next(stamps)))

    def successes(app):
        call(app, "POST", INFER, json=infer_request())
        return value(samples_of(app), "mcdeploy_requests_total", outcome="success")

    with app_of(model_of(), sources=lambda: [source], routes=metrics.routes) as app:
        before = next(iter(app.models))
        assert [successes(app), successes(app)] == [1, 2]
        asyncio.run(app.models.load("tiny"))
        assert next(iter(app.models)) is not before, "nothing was replaced"
        assert successes(app) == 3
        asyncio.run(app.models.unload("tiny"))
        samples = samples_of(app)
        assert value(samples, "mcdeploy_requests_total", outcome="success") == 3
        assert not [name for name, labels in samples if name == "mcdeploy_pending_requests" and labels]
        asyncio.run(app.models.load("tiny"))
        assert successes(app) == 4


def test_a_request_that_the_replaced_model_still_answers_is_counted_too():
    gate = Gate()
    source = Source("tiny", "1", lambda: model_of(), lambda: "")

    async def main(app):
        async with client_of(app) as client:
            old = asyncio.create_task(client.post(INFER, json=infer_request()))
            await asyncio.to_thread(gate.entered.acquire)
            await app.models.load("tiny")
            gate.open()
            await old

    with app_of(model_of(gate), sources=lambda: [source], routes=metrics.routes) as app:
        asyncio.run(main(app))
        assert value(samples_of(app), "mcdeploy_requests_total", outcome="success") == 1


def test_names_that_clients_invent_make_no_series():
    with app_of(model_of(), routes=metrics.routes) as app:
        before = set(samples_of(app))
        for number in range(5):
            assert call(app, "POST", f"/v2/models/no{number}/infer", json=infer_request()).status_code == 404
            assert call(app, "POST", f"/v2/models/tiny/versions/{number + 5}/infer").status_code == 404
        after = samples_of(app)
    grown = {name for name, _ in set(after) - before}
    assert grown <= {"mcdeploy_http_responses_total", "nv_cpu_utilization"}
    assert value(after, "mcdeploy_http_responses_total", model=None, version=None, status="404") == 10


def test_the_info_names_the_bundle_by_the_start_of_its_id():
    with app_of(model_of(bundle="0123456789abcdef", model="int8", provider="cpu"), routes=metrics.routes) as app:
        samples = samples_of(app)
    assert value(samples, "mcdeploy_model_info", bundle="0123456789ab", file="int8", provider="cpu") == 1
    assert value(samples, "process_resident_memory_bytes", model=None, version=None) > 1e6
    assert any(name == "mcdeploy_build_info" for name, _ in samples)


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain; version=0.0.4"),
        ("*/*", "text/plain; version=0.0.4"),
        (OPENMETRICS, "application/openmetrics-text; version=1.0.0"),
        ("application/openmetrics-text;version=one", "text/plain; version=0.0.4"),
        ("text/plain;version=\u00fc;escaping=;;,,=", "text/plain; version=0.0.4"),
    ],
)
def test_a_client_gets_the_form_it_asks_for_and_an_unreadable_wish_the_oldest(accept, kind):
    with app_of(model_of(), routes=metrics.routes) as app:
        call(app, "POST", INFER, json=infer_request())
        response = call(app, "GET", "/metrics", headers={"accept": accept.encode("latin-1")})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(kind)
    families = {
        family.name: family for family in (parse_openmetrics if "openmetrics" in kind else parse_text)(response.text)
    }
    assert families["mcdeploy_requests"].type == "counter"
    assert families["mcdeploy_compute_duration_seconds"].type == "histogram"
    assert {sample.name for sample in families["nv_inference_count"].samples} == {"nv_inference_count"}


def test_the_answer_is_packed_for_those_who_ask():
    with app_of(model_of(), routes=metrics.routes) as app:

        async def raw():
            async with client_of(app) as client, client.stream("GET", "/metrics") as response:
                return response.headers.get("content-encoding"), b"".join([part async for part in response.aiter_raw()])

        encoding, body = asyncio.run(raw())  # httpx asks for gzip
        plain = call(app, "GET", "/metrics", headers={"accept-encoding": "identity"})
    assert encoding == "gzip"
    assert b"mcdeploy_requests_total" in gzip.decompress(body)
    assert "content-encoding" not in plain.headers


def test_metrics_need_a_key_where_there_are_keys(tmp_path):
    (tmp_path / "keys").write_text("0123456789abcdef\n")
    with app_of(model_of(), keys=Keys(tmp_path / "keys"), routes=metrics.routes) as app:
        assert call(app, "GET", "/metrics").status_code == 401
        allowed = {"authorization": "Bearer 0123456789abcdef"}
        assert call(app, "GET", "/metrics", headers=allowed).status_code == 200


def test_grpc_answers_are_counted_by_their_code():
    with app_of(model_of(), routes=metrics.routes) as app:
        app.grpc_answered.update({200: 3, 404: 2, 500: 1, 418: 1})
        samples = samples_of(app)
    got = {code: value(samples, "mcdeploy_grpc_responses_total", model=None, version=None, code=code) for code in
           ("OK", "NOT_FOUND", "INTERNAL")}  # fmt: skip
    assert got == {"OK": 3, "NOT_FOUND": 2, "INTERNAL": 2}


def test_open_connections_are_told_where_the_server_knows_them():
    with app_of(model_of(), routes=metrics.routes) as app:
        assert "mcdeploy_http_connections" not in call(app, "GET", "/metrics").text
        app.connections = lambda: 7
        assert "mcdeploy_http_connections 7.0" in call(app, "GET", "/metrics").text


def test_what_a_shadow_found_is_exported():
    shadow = Shadow(model_of(constant(1.0), bundle="feedfeedfeedfeed", model="int8"), "tiny")
    shadows = Shadows([shadow])
    with app_of(model_of(), options=ServerOptions(), routes=lambda app: metrics.routes(app, shadows)) as app:
        app.mirror = shadows.mirror
        for _ in range(3):
            call(app, "POST", INFER, json=infer_request(some_images(2)))
        finish(shadows)
        samples = samples_of(app)
    labels = {"shadow": "feedfeedfeed@int8"}
    assert value(samples, "mcdeploy_shadow_mirrored_total", **labels) == 3
    assert value(samples, "mcdeploy_shadow_compared_images_total", **labels) == 6
    expected = 3 * int((expected_logits(some_images(2)).argmax(axis=1) != 0).sum())
    assert value(samples, "mcdeploy_shadow_top1_disagreements_total", **labels) == expected > 0
    assert value(samples, "mcdeploy_shadow_relative_difference_count", **labels) == 3
    assert value(samples, "mcdeploy_shadow_relative_difference_max", **labels) > 0.5
    assert value(samples, "mcdeploy_shadow_dropped_total", **labels) == 0
    assert value(samples, "mcdeploy_shadow_failed_total", **labels) == 0
    assert value(samples, "mcdeploy_shadow_compute_duration_seconds_count", version=None, **labels) >= 1
