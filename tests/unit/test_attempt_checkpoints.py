"""The parent's side of checkpoints, on a store in memory: kept, handed to the next attempt, and gone in the end."""

from collections.abc import Callable
from pathlib import Path

import pytest

from omnirt_tasks.artifacts import ArtifactStorage
from omnirt_tasks.contract import EventName, JobState
from omnirt_tasks.errors import StorageError, StoreUnavailable
from omnirt_tasks.jobs.values import Checkpoint
from tests.support.attempts import Bench
from tests.support.waiting import eventually
from workers.host import HostEvent, RunLost

LOST = RunLost("its process was killed")


def make_checkpoint(bench: Bench, step: int, job_id: str = "job-1") -> Path:
    """What the device side does after a step."""
    folder = bench.host.orders[job_id].checkpoint_dir
    assert folder is not None
    file = folder / f"step-{step}"
    file.write_bytes(b"state after %d" % step)
    bench.host.tell[job_id](HostEvent(EventName.CHECKPOINT, "denoise", {"step": step, "file": file.name}))
    return file


def kept(bench: Bench, job_id: str = "job-1") -> Checkpoint | None:
    return bench.store.get(job_id).checkpoint


def test_a_checkpoint_is_stored_noted_and_told_and_the_one_before_goes(bench: Bench) -> None:
    bench.begun()

    first = make_checkpoint(bench, 5)
    eventually(lambda: kept(bench) == Checkpoint(1, "step-5", 5))
    second = make_checkpoint(bench, 10)
    eventually(lambda: bench.stored() == ["1/checkpoints/step-10"])

    assert kept(bench) == Checkpoint(1, "step-10", 10)
    assert [event.data for event in bench.events(EventName.CHECKPOINT)] == [{"step": 5}, {"step": 10}]
    assert not first.exists()
    assert not second.exists(), "the scratch disk holds what is not kept yet, and no more"
    bench.host.succeed("job-1")


def test_the_next_attempt_gets_it_and_the_end_leaves_the_committed_files_alone(bench: Bench) -> None:
    job_id = bench.begun()
    assert bench.host.orders[job_id].resume_from is None
    make_checkpoint(bench, 5)
    eventually(lambda: kept(bench))
    bench.host.end(job_id, LOST)
    bench.end()

    bench.again()

    resume_from = bench.host.orders[job_id].resume_from
    assert resume_from is not None
    assert resume_from.read_bytes() == b"state after 5"
    make_checkpoint(bench, 8)
    eventually(lambda: bench.stored() == ["2/checkpoints/step-8"])
    bench.host.succeed(job_id)
    bench.end()
    assert bench.stored() == ["2/0.png"]


def test_a_first_attempt_that_succeeds_leaves_no_checkpoint(bench: Bench) -> None:
    job_id = bench.begun()
    make_checkpoint(bench, 5)
    eventually(lambda: kept(bench))

    bench.host.succeed(job_id)

    bench.end()
    assert bench.stored() == ["1/0.png"]


def test_a_cancelled_job_leaves_no_checkpoint(bench: Bench) -> None:
    job_id = bench.begun()
    make_checkpoint(bench, 5)
    eventually(lambda: kept(bench))

    bench.store.cancel(job_id)
    bench.runner.cancel(job_id)

    assert bench.end().record.state is JobState.CANCELLED  # type: ignore[union-attr]
    assert bench.stored() == []


def test_while_one_is_being_stored_the_newest_waits_and_the_others_go(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = bench.begun()
    files: list[Path] = []
    keep = ArtifactStorage.keep_checkpoint

    def slowly(artifacts: ArtifactStorage, *arguments: object) -> None:
        if not files:
            files.extend(make_checkpoint(bench, step) for step in (2, 3, 4))
            assert [file.exists() for file in files] == [False, False, True]
        keep(artifacts, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ArtifactStorage, "keep_checkpoint", slowly)
    make_checkpoint(bench, 1)

    eventually(lambda: kept(bench) == Checkpoint(1, "step-4", 4))
    assert [event.data["step"] for event in bench.events(EventName.CHECKPOINT)] == [1, 4]
    bench.host.succeed(job_id)


def test_a_storage_that_takes_no_checkpoint_costs_the_checkpoint_and_not_the_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise StorageError("The checkpoint could not be stored: No space left on device.")

    job_id = bench.begun()
    monkeypatch.setattr(ArtifactStorage, "keep_checkpoint", refuse)
    file = make_checkpoint(bench, 5)
    eventually(lambda: not file.exists())

    bench.host.succeed(job_id)

    assert bench.end().record.state is JobState.SUCCEEDED  # type: ignore[union-attr]
    assert "checkpoint of step 5 is not kept" in caplog.text
    assert bench.events(EventName.CHECKPOINT) == []


def test_a_checkpoint_that_is_gone_lets_the_next_attempt_begin_anew(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = bench.begun()
    make_checkpoint(bench, 5)
    eventually(lambda: kept(bench))
    bench.artifacts.remove_job(job_id)
    bench.host.end(job_id, LOST)
    bench.end()

    bench.again()

    assert bench.host.orders[job_id].resume_from is None
    assert "begins anew" in caplog.text
    bench.host.succeed(job_id)
    assert bench.end().record.state is JobState.SUCCEEDED  # type: ignore[union-attr]


def test_when_the_store_does_not_answer_the_last_two_stay_until_the_job_is_over(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = bench.begun()
    make_checkpoint(bench, 5)
    eventually(lambda: kept(bench))

    def lose_answer(*_: object, **__: object) -> bool:
        raise StoreUnavailable("its answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "checkpoint", lose_answer)
        file = make_checkpoint(bench, 6)
        eventually(lambda: not file.exists())
    assert bench.stored() == ["1/checkpoints/step-5", "1/checkpoints/step-6"], "the record may know either"

    bench.host.succeed(job_id)

    bench.end()
    assert bench.stored() == ["1/0.png"]


def test_an_attempt_that_was_fenced_keeps_its_hands_off_the_checkpoint_that_the_next_one_needs(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench()
    other = make_bench(beside=bench)
    job_id = bench.begun()
    make_checkpoint(bench, 5)
    eventually(lambda: kept(bench))
    bench.let_the_lease_lapse()  # it does not know
    other.again()

    bench.host.succeed(job_id)

    assert bench.end().record.attempt == 2  # type: ignore[union-attr]
    assert "1/checkpoints/step-5" in bench.stored()
    other.host.succeed(job_id)
    assert other.end().record.worker_id == "w2"  # type: ignore[union-attr]
    assert other.stored() == ["2/0.png"]


def test_what_a_fenced_attempt_publishes_after_the_job_is_over_goes(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    other = make_bench(beside=bench)
    job_id = bench.begun()
    bench.let_the_lease_lapse()
    other.host.succeed(other.again(), b"the second attempt's")
    other.end()

    bench.host.succeed(job_id, b"the first attempt's")

    assert bench.end().record.attempt == 2  # type: ignore[union-attr]
    assert bench.stored() == ["2/0.png"]


def test_an_event_of_a_checkpoint_that_names_none_harms_nobody(bench: Bench) -> None:
    job_id = bench.begun()

    bench.host.tell[job_id](HostEvent(EventName.CHECKPOINT, "denoise", {"step": "5"}))
    bench.host.succeed(job_id)

    assert bench.end().record.state is JobState.SUCCEEDED  # type: ignore[union-attr]
