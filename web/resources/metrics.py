"""GET /metrics, for Prometheus."""

from flask import Blueprint, Response, current_app, request
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from web.measuring import REGISTRY
from web.operations import documented

blueprint = Blueprint("metrics", __name__)


@blueprint.get("/metrics")
@documented("Metrics for Prometheus", {200: "text/plain"})
def metrics() -> Response:
    """Also while the store is away: `omnirt_store_up` tells it."""
    registry = current_app.extensions[REGISTRY]
    assert isinstance(registry, CollectorRegistry)
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return Response(encode(registry), content_type=content_type)
