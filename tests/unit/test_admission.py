"""How many messages a Celery worker takes, as it is told."""

from types import SimpleNamespace

from workers.consumption import BACK_AGAIN, TAKE_NOTHING, CeleryConsumption


def test_the_limit_follows_what_is_admitted_until_the_worker_ends() -> None:
    told = []
    worker = SimpleNamespace(hub=SimpleNamespace(call_soon=lambda *call: told.append(call)), max_concurrency=8)
    consumption = CeleryConsumption(worker)

    def limit_after(messages: int) -> int:
        consumption.admit(messages)
        told[-1][0]()  # as the hub does
        return int(worker.max_concurrency)

    assert [limit_after(messages) for messages in (8, 0, 8)] == [8, BACK_AGAIN, 8]
    worker.max_concurrency = TAKE_NOTHING  # as the consumer does behind the message that it puts back
    assert [limit_after(messages) for messages in (0, 8)] == [TAKE_NOTHING, 8], "it stays closed, and opens again"

    consumption.end(70)
    assert limit_after(8) == BACK_AGAIN, "a worker that ends takes nothing more"
