"""Traces: the spans of a request, in memory and as a collector gets them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from server_rig import ROOT, Server

from gemcut.server.exchange import Exchange
from gemcut.server.settings import ServerConfig
from gemcut.server.traces import Traces

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
DONE = {"prompt_tokens": 7, "completion_tokens": 3, "finish_reasons": ["stop"]}
TIMES = {"queue_s": 0.1, "first_token_s": 0.3, "total_s": 0.7}


def spans(status: int, headers: dict[str, str] | None = None, **fields: Any) -> dict[str, ReadableSpan]:
    """What is recorded of a request that began a second ago."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    scope = {
        "method": "POST",
        "path": "/v1/responses",
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
    }
    nobody: Any = None
    exchange = Exchange(scope, nobody, nobody, ServerConfig(served_model_names=("x",)))
    exchange.record.status, exchange.record.began_s = status, time.monotonic() - 1.0
    exchange.record.fields.update(fields)
    Traces(provider).record(exchange)
    return {span.name: span for span in exporter.get_finished_spans()}


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def test_where_the_time_went() -> None:
    found = spans(200, {"traceparent": PARENT}, **DONE, **TIMES)
    whole = found.pop("POST /v1/responses")
    assert whole.attributes is not None
    assert whole.attributes["gen_ai.usage.input_tokens"] == 7
    assert whole.attributes["gen_ai.usage.output_tokens"] == 3
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.status.status_code is StatusCode.UNSET
    assert whole.parent is not None
    assert f"{whole.parent.trace_id:032x}-{whole.parent.span_id:016x}" == PARENT[3:-3]
    assert seconds(whole) == pytest.approx(1.0, abs=0.05)
    expected = {"prepare": 0.3, "queue": 0.1, "prefill": 0.2, "decode": 0.4}
    assert list(found) == list(expected)
    for name, span in found.items():
        assert seconds(span) == pytest.approx(expected[name], abs=0.05), name
        assert span.parent is not None
        assert span.parent.span_id == whole.context.span_id
    last = list(found.values())[-1]
    assert last.end_time == whole.end_time


def test_refusals_and_failures() -> None:
    (refused,) = spans(400, error="InvalidRequest").values()
    assert refused.status.status_code is StatusCode.UNSET  # the caller's mistake is no failure of ours
    assert refused.attributes is not None
    assert refused.attributes["error.type"] == "InvalidRequest"
    assert refused.parent is None
    (failed,) = spans(503, error="EngineDied").values()
    assert failed.status.status_code is StatusCode.ERROR
    broken = spans(200, broken_off=True, error="EngineDied")["POST /v1/responses"]
    assert broken.status.status_code is StatusCode.ERROR
    assert len(spans(200, jobs=2, **DONE, **TIMES)) == 1  # the times of one of them would mislead


def test_a_collector_gets_them() -> None:
    received: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        with Server.scripted(config={"otlp_endpoint": endpoint}) as server:
            assert server.chat("hello").status == 200
            assert server.chat("hello", foo=1).status == 400
            assert server.get("/v1/models").status == 200
            server.signal()
            assert server.process.wait(20) == 0  # what is left is sent at the end
        collector.shutdown()
        thread.join()
    names = [
        span.name
        for export in received
        for resource in export.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    path = "POST /v1/chat/completions"
    assert sorted(names) == sorted([path, path, "prepare", "queue", "prefill", "decode"])


def test_without_traces_the_library_is_not_loaded() -> None:
    """It need not be installed, and its import takes time."""
    code = "import sys, gemcut.server.main; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
