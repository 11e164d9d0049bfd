"""How many messages a Celery worker takes, as it is told."""

from types import SimpleNamespace

from workers.consumption import TAKE_NOTHING, CeleryConsumption


def test_the_limit_follows_what_is_admitted_until_the_worker_ends() -> None:
    worker = SimpleNamespace(hub=SimpleNamespace(call_soon=lambda *_: None), max_concurrency=8)
    consumption = CeleryConsumption(worker)
    limits = []
    for messages in (8, 0, 8):
        consumption.admit(messages)
        limits.append(worker.max_concurrency)

    consumption.end(70)
    consumption.admit(8)

    assert [*limits, worker.max_concurrency] == [8, TAKE_NOTHING, 8, TAKE_NOTHING]
