"""OpenTelemetry traces: a span for each request that wants an engine, and one for each part of its time.

Needs `gemcut[otel]`. Spans are made when a request has ended, of what the log says of it; nothing of what its
user wrote is among it. A `traceparent` header makes them part of the caller's trace.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Self

import gemcut
from gemcut.errors import ConfigError
from gemcut.server.exchange import Exchange

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

# fields of the log -> OpenTelemetry's names for generative models, where it has any
_NAMES = {
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "cached_tokens": "gemcut.cached_tokens",
    "image_tokens": "gemcut.image_tokens",
    "streamed": "gemcut.streamed",
    "broken_off": "gemcut.broken_off",
    "client_request_id": "gemcut.client_request_id",
    "error": "error.type",
}
_S = 1_000_000_000


class Traces:
    """Sends spans by way of a provider."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("gemcut", gemcut.__version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> Self:
        """Traces that go to a collector by OTLP over HTTP. Raises ConfigError without `gemcut[otel]`."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ConfigError("Traces need OpenTelemetry: pip install 'gemcut[otel]'.") from None
        resource = Resource.create({"service.name": "gemcut", "service.version": gemcut.__version__})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider)

    def record(self, exchange: Exchange) -> None:
        """Make the spans of a request that has just ended."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        record, fields = exchange.record, exchange.record.fields
        end = time.time_ns()
        start = end - round((time.monotonic() - record.began_s) * _S)
        carrier = {
            name: exchange.headers[name.encode()].decode("latin-1")
            for name in ("traceparent", "tracestate")
            if name.encode() in exchange.headers
        }
        span = self._tracer.start_span(
            f"{record.method} {record.path}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            start_time=start,
            attributes={
                "http.request.method": record.method,
                "http.route": record.path,
                "http.response.status_code": record.status,
                "gemcut.request_id": record.request_id,
                **{name: fields[field] for field, name in _NAMES.items() if field in fields},
            },
        )
        if record.status >= 500 or "broken_off" in fields:
            span.set_status(StatusCode.ERROR)
        if fields.get("jobs", 1) == 1 and "total_s" in fields:
            self._parts(set_span_in_context(span), start, end, fields)
        span.end(end)

    def _parts(self, parent: Any, start: int, end: int, fields: dict[str, Any]) -> None:
        """Where the time went. The engine's clock began when a request reached it."""
        arrived = end - round(fields["total_s"] * _S)
        seated = arrived + round(fields["queue_s"] * _S)
        first = arrived + round(fields["first_token_s"] * _S)
        cuts = (start, max(start, arrived), max(start, seated), max(start, first), end)
        names = ("prepare", "queue", "prefill", "decode")
        for name, begin, stop in zip(names, cuts, cuts[1:], strict=False):
            span: Span = self._tracer.start_span(name, context=parent, start_time=begin)
            span.end(max(begin, stop))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
