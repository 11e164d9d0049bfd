"""A job's context: its stages, its reason to stop, what it tells."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from omnirt_tasks.contract import EventName, Inputs, ResolvedRequest, Task
from tests.support.hosts import Recorder
from tests.support.waiting import eventually
from workers.backends.stub import StubDriver
from workers.chunks.calls import DeviceCall
from workers.chunks.members import Member
from workers.context import Interrupted, JobContext, current_job
from workers.device import DeviceThread
from workers.host import InterruptReason, RunOrder

TIMEOUT_S = 10.0


@pytest.fixture
def device() -> Iterator[DeviceThread]:
    thread = DeviceThread(StubDriver())
    yield thread
    thread.close()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def job(device: DeviceThread, recorder: Recorder, tmp_path: Path) -> JobContext:
    request = ResolvedRequest(
        task=Task.TEXT2IMAGE, model="stub", backend="cpu-stub", inputs=Inputs(prompt="a"), config={"seed": 1}
    )
    return JobContext(RunOrder("job", 1, request, tmp_path, preview_every_steps=3), device, recorder)


def test_a_job_is_current_in_its_own_thread_and_not_on_the_device(job: JobContext) -> None:
    seen: list[JobContext | None] = []
    with job.entered():
        assert current_job() is job
        job.on_device(DeviceCall(None, lambda: seen.append(current_job())))
        other = threading.Thread(target=lambda: seen.append(current_job()))
        other.start()
        other.join(TIMEOUT_S)
    assert seen == [None, None]
    assert current_job() is None


def test_a_stage_ends_when_another_begins_and_one_that_comes_again_adds_up(job: JobContext, recorder: Recorder) -> None:
    for stage in ("load", "encode_prompt", "encode_prompt", "denoise", "encode_prompt"):
        job.stage(stage)
    job.end_stage()
    told = [(event.event.value, event.stage) for event in recorder.events]
    assert told == [
        (name, stage)
        for stage in ("load", "encode_prompt", "denoise", "encode_prompt")
        for name in ("stage_start", "stage_end")
    ]
    assert set(job.timings_ms) == {"load", "encode_prompt", "denoise"}
    assert [stage for stage, _, _ in job.stages] == ["load", "encode_prompt", "denoise", "encode_prompt"]


def test_a_call_of_an_interrupted_job_is_never_made_and_begins_no_stage(job: JobContext, recorder: Recorder) -> None:
    job.interrupt(InterruptReason.CANCEL)
    job.interrupt(InterruptReason.TIMEOUT)
    made = threading.Event()
    with pytest.raises(Interrupted) as stopped:
        job.on_device(DeviceCall(None, made.set), "denoise")
    assert stopped.value.reason is InterruptReason.CANCEL
    assert not made.is_set()
    assert recorder.events == []


def test_a_job_that_waits_for_the_device_leaves_as_soon_as_it_is_interrupted(
    device: DeviceThread, job: JobContext
) -> None:
    release = threading.Event()
    other = device.submit(DeviceCall(None, release.wait, (TIMEOUT_S,)))
    eventually(lambda: device.busy_for_s() is not None)
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            job.on_device(DeviceCall(None, lambda: None), "denoise")
        except Interrupted as interrupted:
            ended.append(interrupted)

    waiting = threading.Thread(target=wait)
    waiting.start()
    job.interrupt(InterruptReason.CANCEL)
    waiting.join(TIMEOUT_S)
    assert not waiting.is_alive()
    assert len(ended) == 1
    assert not other.done()
    release.set()
    other.result(TIMEOUT_S)


def test_an_interrupt_is_no_exception_that_a_pipeline_could_swallow() -> None:
    assert not issubclass(Interrupted, Exception)


def test_a_closed_device_gives_the_job_back(device: DeviceThread, job: JobContext) -> None:
    device.close()
    with pytest.raises(Interrupted) as stopped:
        job.on_device(DeviceCall(None, lambda: None))
    assert stopped.value.reason is InterruptReason.GIVE_BACK


@pytest.mark.parametrize(
    ("step", "total", "wanted"), [(1, 9, False), (3, 9, True), (6, 9, True), (9, 9, False), (3, 3, False)]
)
def test_a_preview_is_wanted_every_third_step_but_not_at_the_end(
    job: JobContext, step: int, total: int, wanted: bool
) -> None:
    assert job.wants_preview(step, total) is wanted


def test_a_failed_stage_has_an_error_and_no_end(job: JobContext, recorder: Recorder) -> None:
    job.stage("denoise")
    job.stage_failed("model_failed", "it raised")
    job.end_stage()
    assert [event.event for event in recorder.events] == [EventName.STAGE_START, EventName.STAGE_ERROR]


def test_a_job_says_that_it_waits_for_the_whole_device_only_where_it_has_to(
    device: DeviceThread, job: JobContext, recorder: Recorder
) -> None:
    with job.device_held():
        job.stage("generate")
    job.end_stage()
    assert recorder.stages == ["generate"]

    other = device.hold()
    recorder.on(EventName.STAGE_START, other.release, count=2)
    with job.device_held():
        assert other.mine.done()
        job.stage("generate")
    assert recorder.stages == ["generate", "waiting", "generate"]
    assert "waiting" in job.timings_ms


def test_a_job_that_waits_for_the_whole_device_leaves_as_soon_as_it_is_interrupted(
    device: DeviceThread, job: JobContext, recorder: Recorder
) -> None:
    other = device.hold()
    recorder.on(EventName.STAGE_START, lambda: job.interrupt(InterruptReason.NO_ROOM))
    with pytest.raises(Interrupted) as stopped, job.device_held():
        pytest.fail("another job holds the device")
    assert stopped.value.reason is InterruptReason.NO_ROOM
    other.release()


@pytest.mark.parametrize("ends", ["its last step", "an interrupt", "the end of the run"])
def test_nobody_waits_for_a_job_that_has_no_further_step(job: JobContext, ends: str) -> None:
    left: list[Member] = []
    job.device.leave = left.append  # type: ignore[method-assign, assignment]
    with job.entered():
        job.step(7, 8)
        assert left == []
        if ends == "its last step":
            job.step(8, 8)
            assert left == [job.member]
        if ends == "an interrupt":
            job.interrupt(InterruptReason.CANCEL)
            assert left == [job.member]
    assert left[-1] is job.member
