"""What `omnirt` shows of a job while it waits for it."""

import io

import pytest
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
