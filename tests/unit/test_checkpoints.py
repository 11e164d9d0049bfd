"""When a run's state is kept, and what a file of it is worth afterwards. Without torch."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.contract import EventName, Inputs, ResolvedRequest, Task
from omnirt_tasks.registry.spec import Checkpointing
from tests.support.hosts import Bench, Recorder, stub_bench
from tests.support.outcomes import picture, succeeded
from workers.backends import driver
from workers.checkpoints import CheckpointUnusable, CheckpointWriter, StateNotKept, read_checkpoint, write_checkpoint
from workers.context import JobContext
from workers.device import DeviceThread
from workers.host import InterruptReason, RunInterrupted, RunOrder


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def device() -> Iterator[DeviceThread]:
    thread = DeviceThread(driver("cpu-stub"))
    yield thread
    thread.close()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def job(tmp_path: Path, device: DeviceThread, recorder: Recorder) -> JobContext:
    request = ResolvedRequest(task=Task.TEXT2IMAGE, model="stub", backend="cpu-stub", inputs=Inputs(), config={})
    return JobContext(RunOrder("job", 1, request, tmp_path, checkpoint_dir=tmp_path), device, recorder)


def steps_kept(recorder: Recorder) -> list[object]:
    return [event.data["step"] for event in recorder.named(EventName.CHECKPOINT)]


@pytest.mark.parametrize(
    ("checkpointing", "kept"),
    [
        (None, []),
        (Checkpointing(), []),
        (Checkpointing(every_steps=3), [3, 6, 9]),
        (Checkpointing(every_steps=4), [4, 8]),
        (Checkpointing(every_steps=12), []),
        (Checkpointing(every_s=2.5), [3, 6, 9]),
        (Checkpointing(every_s=60), []),
        (Checkpointing(every_steps=4, every_s=3), [3, 4, 7, 8, 11]),
    ],
)
def test_a_state_is_kept_when_steps_or_seconds_say_so_and_never_after_the_last_step(
    job: JobContext, recorder: Recorder, checkpointing: Checkpointing | None, kept: list[int]
) -> None:
    clock = Clock()
    writer = CheckpointWriter(job, checkpointing, clock=clock)
    for step in range(1, 13):
        clock.now_s += 1
        writer.after(step, 12, lambda: b"state")
    assert steps_kept(recorder) == kept


def test_a_file_has_its_name_only_when_it_is_whole(job: JobContext, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step-1.checkpoint", b"what was written")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1.checkpoint"]
    assert read_checkpoint(tmp_path / "step-1.checkpoint") == b"what was written"


def test_a_file_that_cannot_have_its_name_leaves_no_half_behind(tmp_path: Path) -> None:
    (tmp_path / "step-1.checkpoint").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_checkpoint(tmp_path / "step-1.checkpoint", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1.checkpoint"]


@pytest.mark.parametrize("stored", [b"", b"short", b"x" * 32, b"x" * 100])
def test_a_file_that_is_not_what_was_written_is_known_for_it(tmp_path: Path, stored: bytes) -> None:
    (tmp_path / "file").write_bytes(stored)
    with pytest.raises(CheckpointUnusable):
        read_checkpoint(tmp_path / "file")


def test_a_state_that_fails_once_is_tried_again_and_one_that_cannot_be_kept_is_not(
    job: JobContext, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    writer = CheckpointWriter(job, Checkpointing(every_steps=1))
    contents: Iterator[bytes | Exception] = iter(
        [OSError("disk full"), b"state", StateNotKept("the scheduler's x is a module")]
    )

    def content() -> bytes:
        match next(contents):
            case Exception() as error:
                raise error
            case state:
                return state

    for step in range(1, 8):
        writer.after(step, 9, content)
    assert steps_kept(recorder) == [2]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "the scheduler's x is a module" in caplog.text


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Bench]:
    bench = stub_bench(tmp_path)
    yield bench
    bench.host.close()


def test_the_stub_goes_on_after_the_step_it_kept(stub: Bench, tmp_path: Path) -> None:
    wishes: dict[str, Any] = {"num_inference_steps": 10, "checkpoint_every_steps": 3}
    order, first = replace(stub.order(**wishes), checkpoint_dir=tmp_path), Recorder()
    first.on(EventName.CHECKPOINT, lambda: stub.host.interrupt(order.job_id, InterruptReason.GIVE_BACK), count=2)
    assert stub.run(order, first) == RunInterrupted(InterruptReason.GIVE_BACK)
    kept = tmp_path / str(first.named(EventName.CHECKPOINT)[-1].data["file"])

    again, second = replace(stub.order(**wishes), attempt=2, resume_from=kept), Recorder()
    succeeded(stub.run(again, second))

    assert [event.data for event in second.named(EventName.RESUMED)] == [{"step": 6, "total": 10}]
    assert second.progress == [(step, 10) for step in range(7, 11)]
    unbroken = stub.order(**wishes)
    succeeded(stub.run(unbroken))
    assert picture(again).tobytes() == picture(unbroken).tobytes()


@pytest.mark.parametrize("content", [b"no number", b"0", b"10", b"99"])
def test_the_stub_begins_anew_after_a_checkpoint_that_is_none_of_its_own(
    stub: Bench, tmp_path: Path, content: bytes
) -> None:
    write_checkpoint(tmp_path / "kept", content)
    order, recorder = replace(stub.order(num_inference_steps=10), resume_from=tmp_path / "kept"), Recorder()
    succeeded(stub.run(order, recorder))
    assert recorder.progress[0] == (1, 10)
    assert recorder.named(EventName.RESUMED) == []
