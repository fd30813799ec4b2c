"""OpenTelemetry traces: a span for every request, with spans for decoding, queue and engine inside.

Spans are made afterwards, from the times that were taken anyway, and are sent by a thread of the exporter's own; a
collector that is slow or away costs spans, not answers. OpenTelemetry's environment variables hold: OTEL_SERVICE_NAME,
OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_*, OTEL_EXPORTER_OTLP_HEADERS and so on.
"""

from __future__ import annotations

import os
import re
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mcruntime.errors import InputError, MissingExtraError
from mcruntime.server.seen import Seen

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

CLOSE_S = 2.0  # for the last spans; a collector that is away must not hold up the exit
EXPORT_TIMEOUT_S = 5.0
TRACES_PATH = "/v1/traces"
SERVICE = "inference.GRPCInferenceService"
# gRPC's codes for the statuses that stand in ``Seen``.
GRPC_CODES = {
    200: "OK", 400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED", 499: "CANCELLED", 501: "UNIMPLEMENTED", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip
NAMES = re.compile(r"/models/(?!stats$)[^/]+")
VERSIONS = re.compile(r"/versions/[0-9]+")


class Tracing:
    """An observer that turns finished requests into spans.

    Args:
        exporter: where spans go.

    Raises:
        MissingExtraError: OpenTelemetry is not installed.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise _missing() from None
        from mcruntime.server.app import VERSION

        name = os.environ.get("OTEL_SERVICE_NAME") or "mcdeploy"
        resource = Resource.create({"service.name": name, "service.version": VERSION})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mcdeploy", VERSION)

    def __call__(self, seen: Seen) -> None:
        """Make the spans of a finished request."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract({"traceparent": seen.parent}) if seen.parent else None
        name, attributes = _describe(seen)
        # An empty context, not the current one: the loop's own must not become the parent.
        span = self._tracer.start_span(
            name, _empty() if parent is None else parent, SpanKind.SERVER, attributes, start_time=seen.started
        )
        if span.is_recording():
            inside = set_span_in_context(span)
            for part, start, end in _parts(seen):
                self._tracer.start_span(part, inside, start_time=start).end(end)
            if seen.status >= 500:
                span.set_status(Status(StatusCode.ERROR, seen.error[:200]))
        span.end(seen.started + int(seen.seconds * 1e9))

    def close(self) -> None:
        """Send what there is, for at most ``CLOSE_S``."""
        # OpenTelemetry's own shutdown waits up to 30 s for a collector that is away.
        thread = threading.Thread(target=self._provider.shutdown, name="trace-end", daemon=True)
        thread.start()
        thread.join(CLOSE_S)


def open_tracing(url: str) -> Tracing:
    """Traces to the OTLP collector at a URL such as ``http://127.0.0.1:4318``.

    Args:
        url: without a path, OTLP's own is added.

    Raises:
        InputError: not an http(s) URL.
        MissingExtraError: OpenTelemetry is not installed.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise InputError(f"otlp: expected a URL such as http://127.0.0.1:4318, got {url!r}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise _missing() from None
    endpoint = url if parts.path not in ("", "/") else url.rstrip("/") + TRACES_PATH
    return Tracing(OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT_S))


def route_of(path: str) -> str:
    """A path with its names replaced, so that there are few of them: ``/v2/models/{model}/infer``."""
    return VERSIONS.sub("/versions/{version}", NAMES.sub("/models/{model}", path))


def _describe(seen: Seen) -> tuple[str, dict[str, Any]]:
    """The span's name and attributes, by OpenTelemetry's semantic conventions where there are any."""
    attributes: dict[str, Any] = {
        "client.address": seen.client,
        "mcdeploy.request_id": seen.request_id,
        "mcdeploy.model.name": seen.model,
        "mcdeploy.model.version": seen.version,
        "mcdeploy.images": seen.images,
        "mcdeploy.batch": seen.timing.batch,
    }
    attributes = {key: value for key, value in attributes.items() if value}
    if seen.protocol == "grpc":
        code = GRPC_CODES.get(seen.status, "INTERNAL")
        method = f"{SERVICE}/{seen.method.rpartition('/')[2]}"
        attributes |= {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": code}
        return method, attributes | ({"error.type": code} if seen.status >= 500 else {})
    attributes |= {
        "http.request.method": seen.method,
        "http.response.status_code": seen.status,
        "url.path": seen.path[:256],
        "network.protocol.name": "http",
    }
    if seen.status >= 500:
        attributes["error.type"] = str(seen.status)
    if seen.status in (401, 404):  # a path of the client's invention: no route, and no name of its own
        return seen.method, attributes
    attributes["http.route"] = route_of(seen.path)
    return f"{seen.method} {attributes['http.route']}", attributes


def _parts(seen: Seen) -> list[tuple[str, int, int]]:
    """Name, start and end of the spans inside, in nanoseconds since 1970; none of a request that was not run."""
    timing = seen.timing
    if not timing.ended:
        return []
    ended = time.time_ns() - int((time.monotonic() - timing.ended) * 1e9)
    computing = ended - int(timing.compute_s * 1e9)
    queued = computing - int(timing.queue_s * 1e9)
    parts = [("queue", queued, computing), ("compute", computing, ended)]
    if timing.decode_s:
        parts.insert(0, ("decode", queued - int(timing.decode_s * 1e9), queued))
    return parts


def _empty() -> Any:
    from opentelemetry.context import Context

    return Context()


def _missing() -> MissingExtraError:
    return MissingExtraError("mcdeploy serve --otlp", "opentelemetry-sdk", "trace")
