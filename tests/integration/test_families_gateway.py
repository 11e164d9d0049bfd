"""The families at the gateway: what it tells of them, and what it refuses before anything is queued."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.gateway import Gateway, gateway_settings, running_gateway

FILM: dict[str, Any] = {"task": "text2video", "model": "wan2.1-t2v-14b", "inputs": {"prompt": "a cat"}}
PICTURE: dict[str, Any] = {"task": "text2image", "model": "flux-dev", "inputs": {"prompt": "a cat"}}


@pytest.fixture(scope="module")
def gateway(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running_gateway(gateway_settings(redis_url, tmp_path_factory.mktemp("gateway"))) as running:
        yield running


def test_the_limits_of_a_model_show_its_inputs_that_are_numbers(gateway: Gateway) -> None:
    limits = gateway.http.get("/v1/models/wan2.1-t2v-14b").json()["limits"]["text2video"]

    frames = limits["num_frames"]
    assert (frames["type"], frames["min"], frames["default"]) == ("integer", 1, 81)
    assert (frames["multiple_of"], frames["remainder"]) == (4, 1)
    assert (limits["fps"]["min"], limits["fps"]["default"]) == (1, 16)
    assert "remainder" not in limits["width"]


@pytest.mark.parametrize(
    ("body", "loc", "rule", "remedy"),
    [
        (FILM | {"inputs": {"prompt": "a cat", "num_frames": 0}}, "inputs.num_frames", "minimum", "use 1 to"),
        (FILM | {"inputs": {"prompt": "a cat", "num_frames": 10}}, "inputs.num_frames", "multiple_of", "use 9 or 13"),
        (PICTURE | {"config": {"scheduler": "dpm-solver"}}, "config.scheduler", "choice", "native"),
        (
            PICTURE | {"model": "sd15", "config": {"scheduler": "dpm-solve"}},
            "config.scheduler",
            "choice",
            "Did you mean dpm-solver?",
        ),
    ],
)
def test_what_a_family_cannot_do_is_refused_and_nothing_is_queued(
    gateway: Gateway, body: dict[str, Any], loc: str, rule: str, remedy: str
) -> None:
    answer = gateway.http.post("/v1/jobs", json=body)

    assert answer.status_code == 422
    (problem,) = answer.json()["error"]["details"]
    assert (problem["loc"], problem["rule"]) == (loc, rule)
    assert remedy in problem["message"]
    assert gateway.http.get("/v1/jobs").json()["data"] == []
