"""Where a request goes, as a table."""

from collections.abc import Sequence

import pytest

from omnirt_tasks.contract import Inputs, ResolvedRequest, Task, WorkerCapability
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.registry import discover
from omnirt_tasks.routing import QueueAddress, parse_queue, queue_name, queues_served, route, settle


def request(model: str = "shapes", backend: str = "auto", tags: Sequence[str] = (), **config: str) -> ResolvedRequest:
    return ResolvedRequest(
        task=Task.TEXT2IMAGE,
        model=model,
        backend=backend,
        inputs=Inputs(prompt="a"),
        config=dict(config),
        tags=tuple(tags),
    )


def worker(queue: str, *models: str, tags: Sequence[str] = ()) -> WorkerCapability:
    backend = parse_queue(queue).backend
    queues = queues_served([queue], tags)
    return WorkerCapability(worker_id=queue, backend=backend, device=f"{backend}:0", queues=queues, models=models)


CPU, CUDA = worker("cpu-shapes", "shapes"), worker("cuda-shapes", "shapes")


@pytest.mark.parametrize(
    ("wish", "fleet", "waiting", "queue", "workers"),
    [
        ("auto", [], {}, "cpu-shapes", 0),
        ("auto", [CPU], {}, "cpu-shapes", 1),
        ("auto", [CUDA], {}, "cuda-shapes", 1),
        ("auto", [CPU, CUDA], {}, "cpu-shapes", 1),
        ("auto", [CPU, CUDA], {"cpu-shapes": 3, "cuda-shapes": 2}, "cuda-shapes", 1),
        ("auto", [CPU, CUDA, CUDA], {"cpu-shapes": 2, "cuda-shapes": 3}, "cuda-shapes", 2),
        ("cuda", [CPU], {}, "cuda-shapes", 0),
        ("auto", [worker("cuda-shapes", "other"), CPU], {"cpu-shapes": 9}, "cpu-shapes", 1),
    ],
)
def test_auto_prefers_live_workers_then_the_shortest_wait(
    wish: str, fleet: list[WorkerCapability], waiting: dict[str, int], queue: str, workers: int
) -> None:
    chosen = route(request(backend=wish), discover().find("shapes"), fleet, waiting)

    assert (chosen.queue, chosen.workers) == (queue, workers)


def test_a_request_with_tags_goes_where_a_worker_has_them_all() -> None:
    spec = discover().find("shapes")
    fleet = [CPU, worker("cuda-shapes", "shapes", tags=["eu", "gold"])]

    assert route(request(tags=["gold"]), spec, fleet, {}).queue == "cuda-shapes+gold"
    assert route(request(tags=["gold", "eu"]), spec, fleet, {}).queue == "cuda-shapes+eu+gold"
    assert route(request(tags=["silver"]), spec, fleet, {}) == route(request(tags=["silver"]), spec, [], {})


def test_the_stub_runs_on_the_stub() -> None:
    assert route(request("stub"), discover().find("stub"), [], {}).queue == "cpu-stub-stub"


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("cpu-shapes", QueueAddress("cpu", "shapes")),
        ("cpu-stub-stub", QueueAddress("cpu-stub", "stub")),
        ("cuda-sdxl+eu+gold", QueueAddress("cuda", "sdxl", ("eu", "gold"))),
    ],
)
def test_a_queue_name_is_read_as_it_is_written(name: str, address: QueueAddress) -> None:
    assert parse_queue(name) == address
    assert queue_name(address.backend, address.queue, address.tags) == name


@pytest.mark.parametrize("name", ["celery", "tpu-shapes", "cpu-", "cpu", ""])
def test_a_queue_of_no_backend_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="BACKEND-QUEUE"):
        parse_queue(name)


def test_a_worker_serves_its_queue_for_every_subset_of_its_tags() -> None:
    assert queues_served(["cpu-shapes"], ["gold", "eu"]) == (
        "cpu-shapes", "cpu-shapes+eu", "cpu-shapes+gold", "cpu-shapes+eu+gold",
    )  # fmt: skip


def test_half_precision_on_a_cpu_becomes_single_and_says_so() -> None:
    spec = discover().find("shapes")

    settled = settle(request(dtype="fp16"), route(request(), spec, [], {}))

    assert (settled.backend, settled.config["dtype"]) == ("cpu", "fp32")
    assert "fp16" in settled.warnings[0]


@pytest.mark.parametrize(
    ("fleet", "wish", "becomes"),
    [
        ([("fp32", "fp16")], "fp16", "fp16"),  # a CPU that does compute in it says so
        ([("fp32",)], "bf16", "fp32"),
        ([("fp32", "bf16"), ("fp32",)], "bf16", "fp32"),  # either may take the job
        ([("fp32", "bf16"), ()], "bf16", "bf16"),  # one that says nothing is not asked
        ([("bf16",)], "fp16", "bf16"),
        ([()], "fp16", "fp32"),
    ],
)
def test_a_request_runs_in_what_the_workers_of_its_queue_compute_in(
    fleet: list[tuple[str, ...]], wish: str, becomes: str
) -> None:
    workers = [CPU.model_copy(update={"worker_id": str(n), "dtypes": dtypes}) for n, dtypes in enumerate(fleet)]

    settled = settle(request(dtype=wish), route(request(), discover().find("shapes"), workers, {}))

    assert settled.config["dtype"] == becomes
    assert bool(settled.warnings) == (wish != becomes)
