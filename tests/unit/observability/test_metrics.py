"""The metrics that dashboards rely on."""

import urllib.request
from dataclasses import dataclass
from typing import cast

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from omnirt_tasks.contract import Priority, QueueReadiness
from omnirt_tasks.contract.capability import ChunkMeasure
from omnirt_tasks.errors import ConfigurationError, StoreUnavailable
from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.observability import metrics
from omnirt_tasks.observability.metrics import DeviceMetrics, GatewayMetrics, MetricsServer, StoreCollector

Counts = dict[tuple[str, str, str, str], int]


class Store:
    """The part of a job store that the collector asks."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def state_counts(self) -> Counts:
        return self._counts


@dataclass(frozen=True)
class Facts:
    """The part of a run's facts that is counted."""

    batch_size_mean: float


class Away(Store):
    def state_counts(self) -> Counts:
        raise StoreUnavailable("Redis does not answer.")


def gateway_text(store: Store, queues: dict[str, QueueReadiness]) -> str:
    registry = CollectorRegistry()
    DeviceMetrics(registry)
    GatewayMetrics(registry, count_streams=lambda: 0)
    registry.register(StoreCollector(cast(JobStore, store), lambda: queues))
    return generate_latest(registry).decode()


def test_the_names_and_labels_that_dashboards_use_are_kept() -> None:
    assert {(metric.name, metric.labels) for metric in metrics.ALL} >= {
        ("omnirt_jobs_total", ("task", "model", "execution_mode", "state")),
        ("omnirt_stage_duration_seconds", ("stage", "model")),
        ("omnirt_queue_depth", ("queue", "priority")),
        ("omnirt_cache_hits_total", ("cache_type",)),
        ("omnirt_vram_peak_bytes", ("device",)),
    }


def test_no_metric_has_a_job_as_a_label() -> None:
    assert not [metric.name for metric in metrics.ALL if {"job", "job_id", "id", "prompt"} & set(metric.labels)]


def test_every_metric_is_declared_before_anything_has_happened() -> None:
    text = gateway_text(Store({}), {})

    for metric in metrics.ALL:
        assert f"# TYPE {metric.name} " in text
        assert f"# HELP {metric.name} {metric.help}" in text


def test_a_scrape_tells_what_the_store_knows() -> None:
    store = Store(
        {("text2image", "shapes", "unknown", "queued"): 3, ("text2image", "shapes", "modular", "succeeded"): 2},
    )

    text = gateway_text(
        store,
        {
            "cpu-shapes": QueueReadiness(workers=1, waiting=1, running=2, waiting_by_priority={Priority.LOW: 1}),
            "cuda-sdxl": QueueReadiness(workers=4, waiting=0, running=0),
        },
    )

    samples = {
        (s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples
    }
    job = (("model", "shapes"), ("task", "text2image"))
    assert samples["omnirt_jobs_total", ("execution_mode", "unknown"), job[0], ("state", "queued"), job[1]] == 3
    assert samples["omnirt_jobs_total", ("execution_mode", "modular"), job[0], ("state", "succeeded"), job[1]] == 2
    assert samples["omnirt_queue_depth", ("priority", "low"), ("queue", "cpu-shapes")] == 1
    assert samples["omnirt_queue_depth", ("priority", "normal"), ("queue", "cpu-shapes")] == 0
    assert samples["omnirt_queue_running", ("queue", "cpu-shapes")] == 2
    assert samples["omnirt_queue_workers", ("queue", "cuda-sdxl")] == 4
    assert samples["omnirt_queue_depth", ("priority", "normal"), ("queue", "cuda-sdxl")] == 0
    assert samples[("omnirt_store_up",)] == 1


def test_a_scrape_without_a_store_answers_and_says_so() -> None:
    text = gateway_text(Away({}), {})

    assert "\nomnirt_store_up 0.0\n" in text
    assert "\nomnirt_jobs_total{" not in text


def test_the_device_side_counts_stages_cache_hits_and_peaks() -> None:
    registry = CollectorRegistry()
    counted = DeviceMetrics(registry)

    counted.stage_ended("denoise", "shapes", 0.2)
    counted.stage_ended("denoise", "shapes", 0.3)
    counted.cache_hit("model")
    counted.memory_peak("cuda:0", 200)
    counted.memory_peak("cuda:0", 100)

    labels = {"stage": "denoise", "model": "shapes"}
    assert registry.get_sample_value("omnirt_stage_duration_seconds_count", labels) == 2
    assert registry.get_sample_value("omnirt_stage_duration_seconds_sum", labels) == pytest.approx(0.5)
    assert registry.get_sample_value("omnirt_cache_hits_total", {"cache_type": "model"}) == 1
    assert registry.get_sample_value("omnirt_vram_peak_bytes", {"device": "cuda:0"}) == 200


def test_the_device_side_tells_how_many_share_a_forward_pass_and_what_it_brings() -> None:
    registry = CollectorRegistry()
    counted = DeviceMetrics(registry)
    small = ChunkMeasure(module="unet", shape="64x64 fp32", limit=8, gain=2.5, fill=0.75)
    large = ChunkMeasure(module="unet", shape="512x512 fp32", limit=1, gain=1.0)

    counted.chunk_shared("shapes", Facts(batch_size_mean=3.5))
    counted.chunks_measured("shapes", (small, large))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, {"model": "shapes"} | labels)

    at = {"module": "unet", "shape": "64x64 fp32"}
    assert value("omnirt_chunk_size_jobs_sum") == 3.5
    assert value("omnirt_chunk_size_jobs_bucket", le="3.0") == 0
    assert value("omnirt_chunk_size_jobs_bucket", le="4.0") == 1
    assert value("omnirt_chunk_limit_rows", **at) == 8
    assert value("omnirt_chunk_gain_ratio", **at) == 2.5
    assert value("omnirt_chunk_fill_ratio", **at) == 0.75
    assert value("omnirt_chunk_fill_ratio", module="unet", shape="512x512 fp32") is None
    counted.chunks_measured("shapes", (large,))
    assert value("omnirt_chunk_limit_rows", **at) is None


def test_a_worker_serves_its_metrics_and_stops() -> None:
    server = MetricsServer(CollectorRegistry(), host="127.0.0.1", port=0)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as answer:
            assert answer.status == 200
        with pytest.raises(ConfigurationError, match=str(server.port)):
            MetricsServer(CollectorRegistry(), host="127.0.0.1", port=server.port)
    finally:
        server.close()
