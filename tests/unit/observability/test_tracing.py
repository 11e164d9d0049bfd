"""A trace id for every job; spans only where they are collected."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from omnirt_tasks.observability import tracing
from omnirt_tasks.settings import Settings

TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """A trace collector that keeps what it gets."""

    def __init__(self) -> None:
        self.services: list[str] = []
        self.spans: dict[str, Span] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                collector.keep(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def keep(self, sent: ExportTraceServiceRequest) -> None:
        for resource in sent.resource_spans:
            self.services += [a.value.string_value for a in resource.resource.attributes if a.key == "service.name"]
            self.spans |= {span.name: span for scope in resource.scope_spans for span in scope.spans}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


def test_every_job_gets_a_trace_of_its_own_without_any_collector() -> None:
    off = tracing.start(Settings(), service="omnirt-gateway")

    with off.span("submit") as first, off.span("submit") as second:
        assert first.trace_id != second.trace_id
        assert TRACEPARENT.fullmatch(first.traceparent)
        assert first.trace_id in first.traceparent
    off.close()


def test_a_callers_trace_goes_on() -> None:
    off = tracing.start(Settings(), service="omnirt-gateway")

    with off.span("submit", traceparent=GIVEN) as joined:
        assert joined.trace_id == "0af7651916cd43dd8448eb211c80319c"
        assert joined.traceparent != GIVEN


@pytest.mark.parametrize(
    "wrong", ["", "garbage", GIVEN[:-1], GIVEN.upper(), GIVEN + "\n", "00-" + "0" * 32 + "-b7ad6b7169203331-01"]
)
def test_an_invalid_traceparent_counts_as_none(wrong: str) -> None:
    found = tracing.new_context(wrong)

    assert TRACEPARENT.fullmatch(found.traceparent)
    assert found.trace_id not in {"0" * 32, GIVEN[3:35]}


def test_without_an_endpoint_nothing_of_opentelemetry_is_imported() -> None:
    code = (
        "import sys; from omnirt_tasks.observability import tracing; from omnirt_tasks.settings import Settings\n"
        "with tracing.start(Settings(), service='x').span('y'): pass\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_spans_of_gateway_and_worker_are_one_trace_at_the_collector(collector: Collector) -> None:
    on = tracing.start(Settings(otlp_endpoint=collector.endpoint), service="omnirt-test")
    try:
        with on.span("submit", attributes={"model": "shapes"}) as submitted:
            pass
        with pytest.raises(RuntimeError), on.span("attempt", traceparent=submitted.traceparent):
            raise RuntimeError("a prompt could be quoted here")
    finally:
        on.close()

    submit, attempt = collector.spans["submit"], collector.spans["attempt"]
    assert submit.trace_id.hex() == attempt.trace_id.hex() == submitted.trace_id
    assert attempt.parent_span_id == submit.span_id
    assert set(collector.services) == {"omnirt-test"}
    assert attempt.status.code == attempt.status.STATUS_CODE_ERROR
    assert b"quoted" not in attempt.SerializeToString()
