"""What `omnirt` shows of a job while it waits for it."""

import io

import pytest
from pydantic import JsonValue
from rich.console import Console

from omnirt_tasks.cli.progress import JobProgress
from omnirt_tasks.contract import Event, EventName


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "elsewhere"])
@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("device_lost", "its device's process died"),
        ("lease_expired", "its worker died or fell silent"),
        ("worker_leaving", "its worker leaves"),
        ("storage_error", "storage_error"),
    ],
)
def test_a_watcher_is_told_why_a_job_went_back_to_its_queue(reason: str, words: str, terminal: bool) -> None:
    told = io.StringIO()
    data = {"attempt": 1, "reason": reason}
    event = Event(seq=3, event=EventName.JOB_REQUEUED, stage="job", timestamp_ms=1, data=data)

    with JobProgress(Console(file=told, force_terminal=terminal, width=80)) as progress:
        progress.show(event)

    assert f"queued again: {words}" in told.getvalue()


def event_of(name: EventName, stage: str = "job", **data: JsonValue) -> Event:
    return Event(seq=1, event=name, stage=stage, timestamp_ms=1, data=data)


def test_a_split_job_is_shown_as_one_with_each_stage_said_once() -> None:
    told = io.StringIO()

    with JobProgress(Console(file=told, width=80)) as progress:
        progress.show(event_of(EventName.JOB_STARTED, attempt=1))
        for part in (0, 1):
            progress.show(event_of(EventName.PART_STARTED, part=part, attempt=1))
            progress.show(event_of(EventName.STAGE_START, "denoise", part=part))
        progress.show(event_of(EventName.STAGE_START, "decode", part=1))
        progress.show(event_of(EventName.PART_FINISHED, part=1, outputs=["4.png"]))
        progress.show(event_of(EventName.PART_REQUEUED, part=0, attempt=1, reason="device_lost"))
        progress.show(event_of(EventName.STAGE_START, "denoise", part=0))
        progress.show(event_of(EventName.JOB_FINISHED, outputs=[]))

    assert told.getvalue().splitlines() == [
        "started",
        "denoising",
        "decoding",
        "part 2 done",
        "part 1 queued again: its device's process died",
        "done",
    ]


def test_the_bar_of_a_split_job_goes_through_the_steps_of_all_its_parts() -> None:
    told = io.StringIO()

    with JobProgress(Console(file=told, force_terminal=True, width=80)) as progress:
        for step in range(1, 7):
            progress.show(event_of(EventName.STAGE_PROGRESS, "denoise", part=step % 2, step=step, total=6))

    assert "6/6" in told.getvalue()
