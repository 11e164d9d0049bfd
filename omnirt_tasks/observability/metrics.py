"""Every metric of the project: its name, labels, unit and meaning are here and nowhere else.

    gateway   StoreCollector: what the job store knows, read at each scrape, so that every replica tells the same
              GatewayMetrics: requests and streams of one gateway process
    worker    DeviceMetrics: what only the device side sees, counted where it happens

Both take the registry that they join; nothing is registered by importing this module.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from omnirt_tasks.contract import Priority, QueueReadiness
from omnirt_tasks.contract.capability import ChunkMeasure
from omnirt_tasks.errors import ConfigurationError, StoreUnavailable
from omnirt_tasks.jobs.store import JobStore


@dataclass(frozen=True)
class Named:
    """A metric's name as Prometheus shows it, its help text, and its labels."""

    name: str
    help: str
    labels: tuple[str, ...] = ()


JOBS = Named(
    "omnirt_jobs_total",
    "Jobs, counted once for each state that they enter.",
    ("task", "model", "execution_mode", "state"),
)
QUEUE_DEPTH = Named("omnirt_queue_depth", "Jobs that wait in a queue.", ("queue", "priority"))
QUEUE_RUNNING = Named("omnirt_queue_running", "Jobs of a queue that run.", ("queue",))
QUEUE_WORKERS = Named("omnirt_queue_workers", "Live workers that serve a queue.", ("queue",))
STORE_UP = Named("omnirt_store_up", "1 when the job store answered this scrape, else 0.")
STAGE_DURATION = Named("omnirt_stage_duration_seconds", "How long a stage of a job took.", ("stage", "model"))
CACHE_HITS = Named("omnirt_cache_hits_total", "Work that a cache saved.", ("cache_type",))
VRAM_PEAK = Named("omnirt_vram_peak_bytes", "The most device memory that a job has needed so far.", ("device",))
CHUNK_SIZE = Named(
    "omnirt_chunk_size_jobs", "The mean number of jobs in the forward passes of a job, itself included.", ("model",)
)
CHUNK_LIMIT = Named(
    "omnirt_chunk_limit_rows", "The most samples that are put into one call, as measured.", ("model", "module", "shape")
)
CHUNK_FILL = Named(
    "omnirt_chunk_fill_ratio", "How much of that limit the newest calls used.", ("model", "module", "shape")
)
CHUNK_GAIN = Named(
    "omnirt_chunk_gain_ratio",
    "Samples per second at that limit, against the smallest calls.",
    ("model", "module", "shape"),
)
HTTP_REQUESTS = Named(
    "omnirt_http_requests_total", "Requests that this gateway process answered.", ("method", "route", "status")
)
HTTP_DURATION = Named(
    "omnirt_http_request_duration_seconds", "From a request to the headers of its answer.", ("method", "route")
)
HTTP_STREAMS = Named("omnirt_http_streams", "Event streams that this gateway process holds open.")

ALL = (
    JOBS,
    QUEUE_DEPTH,
    QUEUE_RUNNING,
    QUEUE_WORKERS,
    STORE_UP,
    STAGE_DURATION,
    CACHE_HITS,
    VRAM_PEAK,
    CHUNK_SIZE,
    CHUNK_LIMIT,
    CHUNK_FILL,
    CHUNK_GAIN,
    HTTP_REQUESTS,
    HTTP_DURATION,
    HTTP_STREAMS,
)

# From a decode on a large GPU (10 ms) to a video's denoising (10 minutes).
STAGE_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

# From a health check (1 ms) to a synchronous request that waits for its picture.
HTTP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

# Jobs that share a forward pass, from none beside itself.
CHUNK_BUCKETS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)

# Every queue, by a name of a closed set: names without tags.
Queues = Callable[[], Mapping[str, QueueReadiness]]


class StoreCollector(Collector):
    """What the job store knows, asked at each scrape. Safe to share between threads.

    A store that does not answer is told by `omnirt_store_up` 0, and the metrics that need it are left out.
    """

    def __init__(self, store: JobStore, queues: Queues) -> None:
        self._store = store
        self._queues = queues

    def describe(self) -> Iterable[Metric]:
        """The metrics without samples, so that joining a registry asks the store nothing."""
        return [_counter(JOBS), _gauge(QUEUE_DEPTH), _gauge(QUEUE_RUNNING), _gauge(QUEUE_WORKERS), _gauge(STORE_UP)]

    def collect(self) -> Iterable[Metric]:
        """The metrics as they stand."""
        jobs, depth = _counter(JOBS), _gauge(QUEUE_DEPTH)
        running, workers, up = _gauge(QUEUE_RUNNING), _gauge(QUEUE_WORKERS), _gauge(STORE_UP)
        try:
            counts = self._store.state_counts()
            queues = self._queues()
        except StoreUnavailable:
            up.add_metric((), 0)
            return [jobs, depth, running, workers, up]
        up.add_metric((), 1)
        for (task, model, mode, state), count in sorted(counts.items()):
            jobs.add_metric((task, model, mode, state), count)
        for queue, found in sorted(queues.items()):
            for priority in Priority:
                depth.add_metric((queue, priority.value), found.waiting_by_priority.get(priority, 0))
            running.add_metric((queue,), found.running)
            workers.add_metric((queue,), found.workers)
        return [jobs, depth, running, workers, up]


class Shared(Protocol):
    """How far a run shared its device calls with others."""

    @property
    def batch_size_mean(self) -> float:
        """The mean number of runs in its calls, itself included."""
        ...


class _ChunkCollector(Collector):
    """What sharing device calls brought, by model, as it was told last: a shape that is told no more is gone."""

    def __init__(self) -> None:
        self._measures: dict[str, Sequence[ChunkMeasure]] = {}  # replaced whole, by model
        self._lock = threading.Lock()

    def told(self, model: str, measures: Sequence[ChunkMeasure]) -> None:
        with self._lock:
            self._measures[model] = tuple(measures)

    def collect(self) -> Iterable[Metric]:
        limit, fill, gain = _gauge(CHUNK_LIMIT), _gauge(CHUNK_FILL), _gauge(CHUNK_GAIN)
        with self._lock:
            told = [(model, measure) for model, measures in self._measures.items() for measure in measures]
        for model, measure in told:
            labels = (model, measure.module, measure.shape)
            limit.add_metric(labels, measure.limit)
            gain.add_metric(labels, measure.gain)
            if measure.fill is not None:
                fill.add_metric(labels, measure.fill)
        return [limit, fill, gain]


class DeviceMetrics:
    """What the device side counts. Safe to share between threads.

    A gateway makes one too, so that every name is declared wherever a dashboard looks.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._stages = Histogram(
            STAGE_DURATION.name, STAGE_DURATION.help, STAGE_DURATION.labels, buckets=STAGE_BUCKETS_S, registry=registry
        )
        self._hits = Counter(CACHE_HITS.name, CACHE_HITS.help, CACHE_HITS.labels, registry=registry)
        self._vram = Gauge(VRAM_PEAK.name, VRAM_PEAK.help, VRAM_PEAK.labels, registry=registry)
        self._peaks: dict[str, int] = {}
        self._lock = threading.Lock()
        self._sizes = Histogram(
            CHUNK_SIZE.name, CHUNK_SIZE.help, CHUNK_SIZE.labels, buckets=CHUNK_BUCKETS, registry=registry
        )
        self._chunks = _ChunkCollector()
        registry.register(self._chunks)

    def stage_ended(self, stage: str, model: str, elapsed_s: float) -> None:
        """A stage of a job of `model` (its canonical id) took `elapsed_s`."""
        self._stages.labels(stage, model).observe(elapsed_s)

    def cache_hit(self, cache_type: str) -> None:
        """A cache ("model") saved work."""
        self._hits.labels(cache_type).inc()

    def memory_peak(self, device: str, peak_bytes: int) -> None:
        """A job on `device` ("cuda:0") needed `peak_bytes`; the gauge only ever rises."""
        with self._lock:
            if peak_bytes > self._peaks.get(device, -1):
                self._peaks[device] = peak_bytes
                self._vram.labels(device).set(peak_bytes)

    def chunk_shared(self, model: str, shared: Shared) -> None:
        """A run of `model` has ended that shared its device calls so."""
        self._sizes.labels(model).observe(shared.batch_size_mean)

    def chunks_measured(self, model: str, measures: Sequence[ChunkMeasure]) -> None:
        """All that is known of what sharing the device calls of `model` brings, as its capability record tells it."""
        self._chunks.told(model, measures)


class GatewayMetrics:
    """What one gateway process counts of its own requests. Safe to share between threads.

    `route` is the rule ("/v1/jobs/<job_id>"), never an address. `count_streams` is asked at each scrape.
    """

    def __init__(self, registry: CollectorRegistry, *, count_streams: Callable[[], int]) -> None:
        self._requests = Counter(HTTP_REQUESTS.name, HTTP_REQUESTS.help, HTTP_REQUESTS.labels, registry=registry)
        self._duration = Histogram(
            HTTP_DURATION.name, HTTP_DURATION.help, HTTP_DURATION.labels, buckets=HTTP_BUCKETS_S, registry=registry
        )
        Gauge(HTTP_STREAMS.name, HTTP_STREAMS.help, registry=registry).set_function(count_streams)

    def answered(self, method: str, route: str, status: int, elapsed_s: float) -> None:
        """A request was answered with `status`, its headers after `elapsed_s`."""
        self._requests.labels(method, route, status).inc()
        self._duration.labels(method, route).observe(elapsed_s)


class MetricsServer:
    """Serves a registry at /metrics on a port of its own, for a worker."""

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int) -> None:
        """Start to serve; port 0 takes a free one. Raises ConfigurationError when the port cannot be had."""
        try:
            self._server, self._thread = _start(registry, host, port)
        except OSError as error:
            raise ConfigurationError(
                f"The metrics cannot be served on {host}:{port}: {error.strerror}.",
                "Set another OMNIRT_METRICS_PORT for each worker of this host, or none.",
            ) from None

    @property
    def port(self) -> int:
        """The port that is served."""
        return self._server.server_port

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _start(registry: CollectorRegistry, host: str, port: int) -> tuple[WSGIServer, threading.Thread]:
    return start_http_server(port, addr=host, registry=registry)


def _counter(metric: Named) -> CounterMetricFamily:
    return CounterMetricFamily(metric.name, metric.help, labels=metric.labels)


def _gauge(metric: Named) -> GaugeMetricFamily:
    return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
