"""The Celery task around an attempt: what it tells Celery, and what happens when Celery cannot be told."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from celery.exceptions import Ignore

from omnirt_tasks import chunking
from omnirt_tasks.celery_app import make_app
from omnirt_tasks.contract import ErrorInfo, Inputs, JobState, Priority, ResolvedRequest, Task
from omnirt_tasks.errors import ModelFailed, StoreUnavailable
from omnirt_tasks.jobs.memory import MemoryJobStore
from omnirt_tasks.jobs.values import Cancelled, Claim, NewJob, PartOf, Requeue, StoredJob, WakeUp
from omnirt_tasks.settings import load_settings
from omnirt_tasks.tasks import GENERATE
from workers.attempts.endings import AttemptEnd
from workers.tasks import GenerateTask

QUEUE = "cpu-stub-stub"
JOB = "job-1"
WRONG = ErrorInfo(code="model_failed", message="It went wrong.")


class AwayBackend:
    """A result backend that is away, whatever it is asked."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: object, **__: object) -> None:
            raise ConnectionError(f"{name}: the result backend is away")

        return refuse


class Ended:
    """A runner whose attempt ends with the job as given."""

    def __init__(self, job: StoredJob, requeue: Requeue | None = None, whole: StoredJob | None = None) -> None:
        self.end = AttemptEnd(job, requeue, whole)

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


class NotingBackend:
    """A result backend that keeps what it is asked, and of which task."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def get_state(self, job_id: str) -> str:
        return "REVOKED" if ("mark_as_revoked", job_id) in self.told else "PENDING"

    def __getattr__(self, name: str) -> Any:
        return lambda job_id, *_, **__: self.told.append((name, job_id))


class NotingDispatcher:
    """An event dispatcher that keeps what it is to send."""

    def __init__(self) -> None:
        self.sent: list[dict[str, object]] = []

    def send(self, event: str, **fields: object) -> None:
        self.sent.append({"type": event, **fields})


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

    monkeypatch.setattr(chunking, "send_job", refuse)
    monkeypatch.setattr(task, "runner", Ended(store.get(JOB)))

    with pytest.raises(Ignore):
        task.run(JOB)

    assert f"Job {JOB}: the message waits for the reconciler" in caplog.text


def test_a_job_that_is_given_back_is_sent_again_though_celery_could_not_be_told_of_it(
    task: GenerateTask, store: MemoryJobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[WakeUp] = []
    monkeypatch.setattr(chunking, "send_job", lambda _app, wake_up, **_: sent.append(wake_up))
    monkeypatch.setattr(task, "runner", Ended(store.get(JOB)))

    with pytest.raises(Ignore):
        task.run(JOB)

    assert sent == [WakeUp(JOB, QUEUE)]
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
    monkeypatch.setattr(chunking, "send_job", lambda _app, wake_up, **_: sent.append(wake_up.job_id))
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


# Jobs that were split


def part_of(whole: StoredJob, number: int, state: JobState, error: ErrorInfo | None = None) -> StoredJob:
    """A part of the job, as its attempt left it."""
    part_job_id = f"{whole.record.id}.{number}"
    record = whole.record.model_copy(update={"id": part_job_id, "job_id": part_job_id, "state": state, "error": error})
    return replace(whole, record=record, part=PartOf(whole.record.id, number, total=2, first_output=number))


def over(job: StoredJob, state: JobState, error: ErrorInfo | None = None) -> StoredJob:
    times = {"enqueued_at_ms": 1_000, "started_at_ms": 2_500, "finished_at_ms": 4_000}
    return replace(job, record=job.record.model_copy(update={"state": state, "error": error, **times}))


@pytest.mark.parametrize(
    ("state", "told", "event"),
    [
        (JobState.SUCCEEDED, ("mark_as_done", JOB), "task-succeeded"),
        (JobState.FAILED, ("mark_as_failure", JOB), "task-failed"),
        (JobState.CANCELLED, ("mark_as_revoked", JOB), "task-revoked"),
    ],
)
def test_with_the_end_of_its_last_part_celery_is_told_of_the_whole_job_under_its_own_id_and_with_its_times(
    task: GenerateTask,
    store: MemoryJobStore,
    monkeypatch: pytest.MonkeyPatch,
    state: JobState,
    told: tuple[str, str],
    event: str,
) -> None:
    whole = over(store.get(JOB), state, WRONG if state is JobState.FAILED else None)
    backend, dispatcher = NotingBackend(), NotingDispatcher()
    monkeypatch.setattr(task, "_backend", backend)
    monkeypatch.setattr(task.app.events, "default_dispatcher", lambda **_: nullcontext(dispatcher))
    last = part_of(whole, 1, JobState.SUCCEEDED)
    monkeypatch.setattr(task, "runner", Ended(last, whole=whole))

    outcome = task.run(last.record.id)

    assert outcome == {"job_id": JOB, "part": 1, "state": "succeeded", "outputs": []}
    assert told in backend.told
    (sent,) = dispatcher.sent
    assert (sent["type"], sent["uuid"], sent["name"]) == (event, JOB, GENERATE)
    assert (sent["sent"], sent["started"], sent["timestamp"]) == (1.0, 2.5, 4.0)


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.CANCELLED])
def test_celery_is_told_of_the_whole_once_though_several_parts_see_that_it_is_over(
    task: GenerateTask, store: MemoryJobStore, monkeypatch: pytest.MonkeyPatch, state: JobState
) -> None:
    whole = over(store.get(JOB), state)
    last, earlier = (part_of(whole, number, JobState.SUCCEEDED) for number in (1, 0))
    if state is JobState.SUCCEEDED:
        earlier = replace(earlier, record=earlier.record.model_copy(update={"finished_at_ms": 3_999}))
    backend, dispatcher = NotingBackend(), NotingDispatcher()
    monkeypatch.setattr(task, "_backend", backend)
    monkeypatch.setattr(task.app.events, "default_dispatcher", lambda **_: nullcontext(dispatcher))

    for part in (last, earlier):
        monkeypatch.setattr(task, "runner", Ended(part, whole=whole))
        task.run(part.record.id)

    assert [sent["uuid"] for sent in dispatcher.sent] == [JOB]


def test_a_part_fails_for_celery_with_its_own_error_though_that_of_the_whole_cannot_be_told(
    task: GenerateTask, store: MemoryJobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = over(store.get(JOB), JobState.FAILED, WRONG)
    monkeypatch.setattr(task, "runner", Ended(part_of(whole, 0, JobState.FAILED, WRONG), whole=whole))

    with pytest.raises(ModelFailed, match="went wrong"):
        task.run(f"{JOB}.0")

    assert f"How job {JOB} stands could not be told to Celery" in caplog.text


def test_celery_is_not_told_of_a_whole_job_that_goes_on(
    task: GenerateTask, store: MemoryJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = NotingBackend()
    monkeypatch.setattr(task, "_backend", backend)
    monkeypatch.setattr(task, "runner", Ended(part_of(store.get(JOB), 0, JobState.SUCCEEDED)))

    task.run(f"{JOB}.0")

    assert [name for name, job_id in backend.told if job_id == JOB] == []


def test_the_messages_of_a_split_job_are_those_of_its_parts(
    task: GenerateTask, store: MemoryJobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[WakeUp, str | None]] = []
    monkeypatch.setattr(chunking, "send_job", lambda _app, wake_up, *, traceparent: sent.append((wake_up, traceparent)))
    split = replace(store.get(JOB), parts=("job-1.0", "job-1.1"), priority=Priority.HIGH, traceparent="00-trace")

    task.send(split)

    assert sent == [(WakeUp(f"job-1.{number}", QUEUE, Priority.HIGH), "00-trace") for number in (0, 1)]
