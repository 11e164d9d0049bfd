"""A trace id for every job; spans only where they are collected."""

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from omnirt_tasks.observability import tracing
from omnirt_tasks.settings import Settings
from tests.support.collector import Collector

TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


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
