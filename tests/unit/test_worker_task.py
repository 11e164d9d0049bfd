"""The Celery task around an attempt: what it tells Celery, and what happens when Celery cannot be told."""

from collections.abc import Iterator
from typing import Any

import pytest
from celery.exceptions import Ignore

from omnirt_tasks.celery_app import make_app
from omnirt_tasks.contract import Inputs, ResolvedRequest, Task
from omnirt_tasks.errors import StoreUnavailable
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.store import Cancelled, Claim, NewJob, Requeue, StoredJob
from omnirt_tasks.settings import load_settings
from workers import tasks
from workers.attempts.endings import AttemptEnd
from workers.tasks import GenerateTask

QUEUE = "cpu-stub-stub"
JOB = "job-1"


class AwayBackend:
    """A result backend that is away, whatever it is asked."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: object, **__: object) -> None:
            raise ConnectionError(f"{name}: the result backend is away")

        return refuse


class Ended:
    """A runner whose attempt ends with the job as given."""

    def __init__(self, job: StoredJob, requeue: Requeue | None = None) -> None:
        self.end = AttemptEnd(job, requeue)

    def run(self, job_id: str, *, on_begun: Any) -> AttemptEnd:
        on_begun()
        return self.end


class TellingBackend:
    """A result backend that keeps what it is told of retries."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def mark_as_retry(self, _: str, error: Exception, **__: object) -> None:
        self.told.append(str(error))

    def store_result(self, *_: object, **__: object) -> None:
        """What has started is of no interest."""


@pytest.fixture
def store() -> MemoryJobStore:
    store = MemoryJobStore()
    resolved = ResolvedRequest(
        task=Task.TEXT2IMAGE, model="stub", backend="cpu-stub", inputs=Inputs(prompt="x"), config={"seed": 1}
    )
    store.create(NewJob(id=JOB, owner="", queue=QUEUE, request={}, resolved=resolved))
    return store


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Iterator[GenerateTask]:
    """The task in an app whose broker and result backend are away."""
    app = make_app(load_settings(redis_url="redis://127.0.0.1:1/0"))
    task = GenerateTask()
    app.register_task(task)
    monkeypatch.setattr(task, "_backend", AwayBackend())
    monkeypatch.setattr(task, "send_event", AwayBackend().send_event)
    yield task
    app.close()


def test_a_job_that_is_given_back_while_the_broker_is_away_is_no_failure_and_waits_for_the_reconciler(
    task: GenerateTask, store: MemoryJobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StoreUnavailable("The broker does not take messages.")

    monkeypatch.setattr(tasks, "send_job", refuse)
    monkeypatch.setattr(task, "runner", Ended(store.get(JOB)))

    with pytest.raises(Ignore):
        task.run(JOB)

    assert f"Job {JOB}: the message waits for the reconciler" in caplog.text


def test_a_job_that_is_given_back_is_sent_again_though_celery_could_not_be_told_of_it(
    task: GenerateTask, store: MemoryJobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[tuple[str, str]] = []
    monkeypatch.setattr(tasks, "send_job", lambda _app, job_id, queue, **_: sent.append((job_id, queue)))
    monkeypatch.setattr(task, "runner", Ended(store.get(JOB)))

    with pytest.raises(Ignore):
        task.run(JOB)

    assert sent == [(JOB, QUEUE)]
    assert "mark_as_retry: the result backend is away" in caplog.text


@pytest.mark.parametrize(
    ("requeue", "sends"),
    [
        (Requeue("device_lost", died=True), True),
        (Requeue("out_of_memory", alone=True), True),
        (Requeue("storage_error", retry=True, delay_ms=1_000), False),
    ],
)
def test_a_job_that_goes_back_is_a_retry_for_celery_and_its_message_goes_out_at_once_unless_it_has_to_wait(
    task: GenerateTask, store: MemoryJobStore, monkeypatch: pytest.MonkeyPatch, requeue: Requeue, sends: bool
) -> None:
    sent: list[str] = []
    backend = TellingBackend()
    monkeypatch.setattr(tasks, "send_job", lambda _app, job_id, _queue, **_: sent.append(job_id))
    monkeypatch.setattr(task, "_backend", backend)
    monkeypatch.setattr(task, "runner", Ended(store.get(JOB), requeue))

    with pytest.raises(Ignore):
        task.run(JOB)

    assert sent == [JOB] * sends, "the reconciler sends it when its time has come"
    assert [requeue.reason in told for told in backend.told] == [True]


def test_a_cancelled_job_ends_though_celery_could_not_be_told_of_it(
    task: GenerateTask, store: MemoryJobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    claim = store.claim(JOB, worker_id="w", lease_ttl_ms=60_000)
    assert isinstance(claim, Claim)
    store.commit(claim.lease, Cancelled())
    monkeypatch.setattr(task, "runner", Ended(store.get(JOB)))

    with pytest.raises(Ignore):
        task.run(JOB)

    assert "mark_as_revoked: the result backend is away" in caplog.text


@pytest.mark.parametrize(("argument", "told"), [(JOB, f"Job {JOB} came to a worker"), ({"job": 1}, "names no job")])
def test_a_message_that_is_dropped_is_told_in_the_log(
    task: GenerateTask, argument: object, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Ignore):
        task.run(argument)

    assert told in caplog.text
