"""How many messages a worker takes, by what its device can do."""

from types import SimpleNamespace
from typing import Any

import pytest

from workers.bootsteps import TAKE_NOTHING, DeviceStep


@pytest.fixture
def worker() -> Any:
    app = SimpleNamespace(
        settings=None,
        amqp=SimpleNamespace(queues=SimpleNamespace(select=lambda names: None)),
        tasks={"omnirt.generate": SimpleNamespace()},
    )
    seat = SimpleNamespace(plan=None, device=None, queues=lambda settings: ("cpu-stub-stub",))
    hub = SimpleNamespace(call_soon=lambda *_: None)
    return SimpleNamespace(app=app, seat=seat, hub=hub, hostname="w1", concurrency=8, max_concurrency=8)


def test_a_worker_takes_messages_only_while_its_device_is_there(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def serving(*_: object, **options: Any) -> Any:
        given.update(options)
        return SimpleNamespace(runner=None)

    monkeypatch.setattr("workers.serving.Serving", serving)
    step = DeviceStep(worker)
    step.start(worker)
    limits = [worker.max_concurrency]
    for messages in (8, 0, 8):
        given["on_available"](messages)
        limits.append(worker.max_concurrency)
    given["on_ended"](70)
    given["on_available"](8)
    assert [*limits, worker.max_concurrency] == [TAKE_NOTHING, 8, TAKE_NOTHING, 8, TAKE_NOTHING]
