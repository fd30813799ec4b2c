"""A request becomes a trace: one span with decoding, queue and engine inside, under the client's own span."""

from __future__ import annotations

import asyncio
import http.server
import io
import sys
import threading
import time
from itertools import pairwise

import pytest
from mcruntime.errors import InputError, MissingExtraError
from mcruntime.server import tracing
from mcruntime.server.seen import Seen
from mcruntime.server.tracing import Tracing, open_tracing, route_of
from mcruntime.server.web import Timing
from PIL import Image
from tiny_onnx import expected_logits
from tiny_server import app_of, call, infer_request, model_of

INFER = "/v2/models/tiny/infer"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def exporter():
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


def spans_of(exporter, *requests, engine=expected_logits):
    """The spans that some requests leave, by name."""
    observer = Tracing(exporter)
    with app_of(model_of(engine), observers=[observer]) as app:
        for method, path, options in requests:
            call(app, method, path, **options)
    observer.close()
    return list(exporter.get_finished_spans())


def of_seen(exporter, **changes):
    fields = {
        "protocol": "http", "method": "POST", "path": INFER, "status": 200, "request_id": "abc", "client": "127.0.0.1",
        "started": time.time_ns(), "seconds": 0.25,
    }  # fmt: skip
    observer = Tracing(exporter)
    observer(Seen(**(fields | changes)))
    observer.close()
    return list(exporter.get_finished_spans())


def png():
    stream = io.BytesIO()
    Image.new("RGB", (900, 900), (250, 10, 10)).save(stream, "PNG")
    return stream.getvalue()


def test_an_image_leaves_spans_in_the_order_things_happened(exporter):
    def engine(images):
        time.sleep(0.01)
        return expected_logits(images)

    before = time.time_ns()
    spans = spans_of(exporter, ("POST", "/v2/models/tiny/predict", {"content": png()}), engine=engine)
    after = time.time_ns()
    (request,) = [span for span in spans if span.parent is None]
    inside = [span for span in spans if span.parent is not None]
    assert request.name == "POST /v2/models/{model}/predict"
    assert [span.name for span in inside] == ["decode", "queue", "compute"]
    assert {span.parent.span_id for span in inside} == {request.context.span_id}
    assert {span.context.trace_id for span in spans} == {request.context.trace_id}
    assert before <= request.start_time <= inside[0].start_time
    for earlier, later in pairwise(inside):
        assert earlier.start_time <= earlier.end_time <= later.start_time
    # The clocks are converted; a millisecond is what that may be off by on a busy machine.
    assert inside[-1].end_time <= request.end_time + 1_000_000 <= after + 2_000_000
    assert inside[2].end_time - inside[2].start_time >= 10_000_000


def test_the_attributes_follow_the_semantic_conventions(exporter):
    from opentelemetry.semconv.attributes import client_attributes, http_attributes, url_attributes
    from opentelemetry.trace import SpanKind

    spans = spans_of(exporter, ("POST", INFER, {"json": infer_request(), "headers": {"x-request-id": "my-id"}}))
    (request,) = [span for span in spans if span.parent is None]
    assert request.kind is SpanKind.SERVER
    assert dict(request.attributes) == {
        client_attributes.CLIENT_ADDRESS: "127.0.0.1",
        http_attributes.HTTP_REQUEST_METHOD: "POST",
        http_attributes.HTTP_RESPONSE_STATUS_CODE: 200,
        http_attributes.HTTP_ROUTE: "/v2/models/{model}/infer",
        url_attributes.URL_PATH: INFER,
        "network.protocol.name": "http",
        "mcdeploy.request_id": "my-id",
        "mcdeploy.model.name": "tiny",
        "mcdeploy.model.version": "1",
        "mcdeploy.images": 1,
        "mcdeploy.batch": 1,
    }
    assert request.resource.attributes["service.name"] == "mcdeploy"
    assert [span.name for span in spans if span.parent] == ["queue", "compute"]


def test_the_clients_span_is_the_parent_and_its_sampling_holds(exporter):
    sampled = {"headers": {"traceparent": f"00-{TRACE}-{PARENT}-01"}, "json": infer_request()}
    dropped = {"headers": {"traceparent": f"00-{TRACE}-{PARENT}-00"}, "json": infer_request()}
    spans = spans_of(exporter, ("POST", INFER, sampled), ("POST", INFER, dropped))
    (request,) = [span for span in spans if span.name.startswith("POST")]
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    assert len(spans) == 3


@pytest.mark.parametrize("parent", ["", "00-zz", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 5000, "00-\n"])
def test_a_parent_that_is_none_starts_a_trace_of_its_own(exporter, parent):
    (request,) = of_seen(exporter, parent=parent)
    assert request.parent is None


def test_a_span_around_the_server_is_not_taken_for_the_clients(exporter):
    from opentelemetry.sdk.trace import TracerProvider

    with TracerProvider(shutdown_on_exit=False).get_tracer("test").start_as_current_span("outside"):
        (request,) = of_seen(exporter)
    assert request.parent is None


def test_our_failures_are_errors_and_the_clients_are_not(exporter):
    from opentelemetry.trace import StatusCode

    def broken(images):
        raise RuntimeError("broken")

    spans = spans_of(
        exporter,
        ("POST", INFER, {"json": infer_request()}),
        ("POST", INFER, {"json": infer_request(datatype="INT8")}),
        ("GET", "/an/invented/path", {}),
        engine=broken,
    )
    failed, wrong, nowhere = spans
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.attributes["error.type"] == "500"
    assert wrong.status.status_code is StatusCode.UNSET
    assert wrong.attributes["http.response.status_code"] == 400
    assert nowhere.name == "GET"
    assert "http.route" not in nowhere.attributes


def test_a_grpc_call_is_described_as_one(exporter):
    (request,) = of_seen(exporter, protocol="grpc", method="ModelInfer", path="/x/ModelInfer", status=503, error="full")
    assert request.name == "inference.GRPCInferenceService/ModelInfer"
    assert request.attributes["rpc.system.name"] == "grpc"
    assert request.attributes["rpc.response.status_code"] == request.attributes["error.type"] == "UNAVAILABLE"
    assert request.status.description == "full"


def test_there_are_few_routes():
    assert route_of("/v2/models/a.b-c/versions/12/infer") == "/v2/models/{model}/versions/{version}/infer"
    assert route_of("/v2/models/a") == "/v2/models/{model}"
    assert route_of("/v2/models/stats") == "/v2/models/stats"
    assert route_of("/v2/repository/models/a/load") == "/v2/repository/models/{model}/load"
    assert route_of("/v2/health/live") == "/v2/health/live"


def test_a_request_that_was_not_run_has_no_spans_inside(exporter):
    assert len(of_seen(exporter, timing=Timing())) == 1


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:4318", "ftp://host", "http://", "http://host:0", "http://[::1", "http://h:x"]
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(InputError, match="expected a URL"):
        open_tracing(url)


def test_a_missing_package_names_its_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(MissingExtraError, match=r"mcdeploy\[trace\]"):
        open_tracing("http://127.0.0.1:4318")


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes everything and answers 200."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((self.path, body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def test_the_last_spans_arrive_at_a_real_collector_when_the_server_ends():
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        server.got, server.daemon_threads = [], True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        observer = open_tracing(f"http://127.0.0.1:{server.server_port}")
        with app_of(model_of(), observers=[observer]) as app:
            call(app, "POST", INFER, json=infer_request())
        observer.close()
        server.shutdown()
        thread.join()
    ((path, body),) = server.got
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    names = {span.name for scope in resource.scope_spans for span in scope.spans}
    assert names == {"queue", "compute", "POST /v2/models/{model}/infer"}


def test_a_collector_that_never_answers_does_not_hold_up_the_exit(monkeypatch):
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    monkeypatch.setattr(tracing, "CLOSE_S", 0.1)
    release, closed = threading.Event(), threading.Event()

    class Stuck(SpanExporter):
        def export(self, spans):
            release.wait(20)
            return SpanExportResult.SUCCESS

        def shutdown(self):
            closed.set()

    observer = Tracing(Stuck())
    with app_of(model_of(), observers=[observer]) as app:
        assert call(app, "POST", INFER, json=infer_request()).status_code == 200
    observer.close()
    assert not closed.is_set(), "it waited for the collector"
    release.set()
    assert closed.wait(20)


def test_requests_of_one_loop_do_not_become_each_others_parents(exporter):
    observer = Tracing(exporter)

    async def main(app):
        from tiny_server import client_of

        async with client_of(app) as client:
            await asyncio.gather(*(client.post(INFER, json=infer_request()) for _ in range(5)))

    with app_of(model_of(), observers=[observer]) as app:
        asyncio.run(main(app))
    observer.close()
    roots = [span for span in exporter.get_finished_spans() if span.parent is None]
    assert len(roots) == len({span.context.trace_id for span in roots}) == 5
