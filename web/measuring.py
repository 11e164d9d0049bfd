"""Counts and times the gateway's own requests, for /metrics."""

from time import perf_counter

from flask import Flask, Response, g, request
from prometheus_client import CollectorRegistry

from omnirt_tasks.observability.metrics import DeviceMetrics, GatewayMetrics, StoreCollector
from web.services import EXTENSION, Services

REGISTRY = "omnirt_metrics"
UNKNOWN = "unknown"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def register(app: Flask) -> None:
    """Give the app a registry of its own, and count its requests there."""
    parts = app.extensions[EXTENSION]
    assert isinstance(parts, Services)
    registry = CollectorRegistry()
    registry.register(StoreCollector(parts.store, parts.queues))
    DeviceMetrics(registry)  # declares what workers count, so that every name is there from the start
    counted = GatewayMetrics(registry, count_streams=lambda: parts.streams.count)
    app.extensions[REGISTRY] = registry

    def begin() -> None:
        g.began_at = perf_counter()

    def count(response: Response) -> Response:
        rule = request.url_rule
        if rule is None or not rule.websocket:  # a WebSocket's length is no latency; streams are counted as such
            # Labels are a closed set, whatever a caller sends.
            method = request.method if request.method in METHODS else UNKNOWN
            route = rule.rule if rule is not None else UNKNOWN
            counted.answered(method, route, response.status_code, perf_counter() - g.began_at)
        return response

    app.before_request(begin)
    app.after_request(count)
