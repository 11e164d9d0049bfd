"""Traces: a trace id for every job, and spans where an operator collects them.

    gateway  Tracing.span ─► trace id, traceparent ─► job record
    worker   Tracing.span(…, traceparent=…)            the same trace, in another process

Without `otlp_endpoint` nothing of OpenTelemetry is imported, spans cost nothing, and ids are still given.
The provider belongs to the process that calls `start`, so call it after any fork.
"""

import contextlib
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

INSTRUMENTATION = "omnirt_tasks"
TRACES_PATH = "/v1/traces"
FLUSH_TIMEOUT_MS = 5_000
# Set on traces that begin without OpenTelemetry, so that a worker which has it records its part.
SAMPLED = "01"

# W3C Trace Context, version 00: trace id, parent span id, flags. Ids of zeros only are invalid.
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(frozen=True)
class TraceContext:
    """Where a trace stands: `trace_id` (32 hex digits), and the `traceparent` that hands it on (W3C)."""

    trace_id: str
    traceparent: str


class Tracing(Protocol):
    """Makes spans, or does not. Safe to share between threads."""

    def span(
        self, name: str, *, traceparent: str | None = None, attributes: Mapping[str, str | int] | None = None
    ) -> contextlib.AbstractContextManager[TraceContext]:
        """A span while the block lasts, and the trace that work sent on from inside belongs to.

        It continues the trace of `traceparent` (an invalid one counts as none), else the block it is in, else it
        begins a new trace.
        """
        ...

    def close(self) -> None:
        """Send what was not sent yet (at most 5 s), and stop. Idempotent."""
        ...


def start(settings: Settings, *, service: str) -> Tracing:
    """Tracing for this process, named `service` ("omnirt-gateway"), with Celery's messages in the same traces.

    Raises ConfigurationError when `otlp_endpoint` is set and OpenTelemetry is not installed.
    """
    return ids_only() if settings.otlp_endpoint is None else _Spans(settings.otlp_endpoint, service)


def ids_only() -> Tracing:
    """Tracing that gives ids and sends nothing, whatever the settings say."""
    return _Ids()


def new_context(traceparent: str | None = None) -> TraceContext:
    """A new place in the trace of `traceparent`, or in a new trace."""
    known = _TRACEPARENT.fullmatch(traceparent or "")
    trace_id = known[1] if known else secrets.token_hex(16)
    return TraceContext(trace_id, f"00-{trace_id}-{secrets.token_hex(8)}-{known[3] if known else SAMPLED}")


class _Ids:
    """Ids alone."""

    @contextlib.contextmanager
    def span(
        self, name: str, *, traceparent: str | None = None, attributes: Mapping[str, str | int] | None = None
    ) -> Iterator[TraceContext]:
        yield new_context(traceparent)

    def close(self) -> None:
        pass


class _Spans:
    """Spans, sent by OTLP over HTTP."""

    def __init__(self, endpoint: str, service: str) -> None:
        try:
            from opentelemetry.instrumentation.celery import CeleryInstrumentor
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise ConfigurationError(
                "OMNIRT_OTLP_ENDPOINT is set, but OpenTelemetry is not installed.",
                "Install omnirt-tasks[otel], or unset OMNIRT_OTLP_ENDPOINT.",
            ) from None
        self._provider: TracerProvider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(_exporting(endpoint))
        self._tracer = self._provider.get_tracer(INSTRUMENTATION)
        self._propagator = TraceContextTextMapPropagator()
        self._celery = CeleryInstrumentor()
        self._celery.instrument(tracer_provider=self._provider)
        self._closed = False

    @contextlib.contextmanager
    def span(
        self, name: str, *, traceparent: str | None = None, attributes: Mapping[str, str | int] | None = None
    ) -> Iterator[TraceContext]:
        parent = self._propagator.extract({"traceparent": traceparent}) if traceparent else None
        # Neither the exception nor its text goes into the span: a model's error may quote a prompt.
        with self._tracer.start_as_current_span(
            name, context=parent, attributes=attributes, record_exception=False, set_status_on_exception=False
        ) as span:
            carrier: dict[str, str] = {}
            self._propagator.inject(carrier)
            with _failing(span):
                yield TraceContext(f"{span.get_span_context().trace_id:032x}", carrier["traceparent"])

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._celery.uninstrument()
        self._provider.force_flush(FLUSH_TIMEOUT_MS)
        self._provider.shutdown()


def _exporting(endpoint: str) -> "SpanProcessor":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    address = endpoint.rstrip("/")
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=address.removesuffix(TRACES_PATH) + TRACES_PATH))


@contextlib.contextmanager
def _failing(span: "Span") -> Iterator[None]:
    """Marks the span of a block that raised, by the error's type alone."""
    from opentelemetry.trace import StatusCode

    try:
        yield
    except BaseException as error:
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(StatusCode.ERROR)
        raise
