"""What holds of every ThreadHost: the same stories on the stub and on real diffusers classes."""

import base64
import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from omnirt_tasks.contract import EventName
from omnirt_tasks.registry import discover
from omnirt_tasks.registry.footprint import GIB
from tests.support.hosts import RUN_TIMEOUT_S, Bench, Loads, Recorder, sdxl_bench, stub_bench
from tests.support.media import difference
from tests.support.outcomes import failed, picture, succeeded
from tests.support.tiny_models import save_tiny_sdxl
from tests.support.waiting import eventually
from workers.backends import MemoryInfo
from workers.backends.stub import StubDriver
from workers.host import InterruptReason, RunInterrupted, RunLost, RunOutcome
from workers.thread_host import ThreadHost

# The schedulers meet NumPy's newest wish in an old way of making arrays.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# One level of 255 is what rounding makes of the 2e-3 that batched arithmetic may differ by.
LEVELS_MAX = 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(params=["stub", "tiny-sdxl"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    if request.param == "stub":
        made = stub_bench(tmp_path)
    else:
        made, _ = sdxl_bench(tmp_path, request.getfixturevalue("weights"))
    yield made
    made.host.close()


@pytest.fixture
def tiny(weights: Path, tmp_path: Path) -> Iterator[tuple[Bench, Loads]]:
    bench, loads = sdxl_bench(tmp_path, weights)
    yield bench, loads
    bench.host.close()


def test_a_run_leaves_its_pictures_and_nothing_else(bench: Bench) -> None:
    order = bench.order(num_images_per_prompt=2)
    outputs = succeeded(bench.run(order)).outputs
    assert [output.name for output in outputs] == ["0.png", "1.png"]
    assert sorted(path.name for path in order.output_dir.iterdir()) == ["0.png", "1.png"]
    assert [(output.index, output.mime, output.width, output.height) for output in outputs] == [
        (0, "image/png", 64, 64),
        (1, "image/png", 64, 64),
    ]
    assert picture(order).size == (64, 64)


def test_a_run_goes_through_its_stages_and_counts_each_step(bench: Bench) -> None:
    recorder = Recorder()
    facts = succeeded(bench.run(recorder=recorder, num_inference_steps=5)).facts
    assert recorder.stages == ["load", "encode_prompt", "denoise", "decode", "export"]
    assert recorder.progress == [(step, 5) for step in range(1, 6)]
    assert all(event.stage == "denoise" for event in recorder.named(EventName.STAGE_PROGRESS))
    ends = recorder.named(EventName.STAGE_END)
    assert [event.stage for event in ends] == recorder.stages
    assert {event.stage: event.data["elapsed_ms"] for event in ends} == facts.timings_ms
    assert [stage for stage, _, _ in facts.stages] == recorder.stages
    assert all(started <= ended for _, started, ended in facts.stages)


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(bench: Bench) -> None:
    once, again, other = bench.order(seed=11), bench.order(seed=11), bench.order(seed=12)
    for order in (once, again, other):
        succeeded(bench.run(order))
    assert difference(picture(once), picture(again)) == 0
    assert difference(picture(once), picture(other)) > LEVELS_MAX


def test_picture_i_of_a_seed_is_what_that_seed_plus_i_gives_alone(bench: Bench) -> None:
    together = bench.order(seed=40, num_images_per_prompt=3)
    outputs = succeeded(bench.run(together)).outputs
    assert [output.seed for output in outputs] == [40, 41, 42]
    for output in outputs:
        alone = bench.order(seed=output.seed)
        succeeded(bench.run(alone))
        assert difference(picture(together, output.name), picture(alone)) <= LEVELS_MAX


def test_the_largest_seed_can_be_followed_by_another_picture(bench: Bench) -> None:
    outputs = succeeded(bench.run(seed=2**63 - 1, num_images_per_prompt=2)).outputs
    assert [output.seed for output in outputs] == [2**63 - 1, 0]


def test_eight_runs_at_once_give_what_each_gives_alone(bench: Bench) -> None:
    wishes: list[dict[str, Any]] = [
        {"seed": 100 + number, "prompt": "ab" * (number + 1), "num_inference_steps": 3 + number % 3}
        for number in range(8)
    ]
    orders = [bench.order(**wish) for wish in wishes]
    recorders = [Recorder() for _ in orders]
    futures = [bench.host.submit(order, recorder) for order, recorder in zip(orders, recorders, strict=True)]
    for future in futures:
        succeeded(future.result(RUN_TIMEOUT_S))
    for order, recorder, wish in zip(orders, recorders, wishes, strict=True):
        steps = wish["num_inference_steps"]
        assert recorder.progress == [(step, steps) for step in range(1, steps + 1)]
        alone = bench.order(**wish)
        succeeded(bench.run(alone))
        assert difference(picture(order), picture(alone)) <= LEVELS_MAX


def test_a_cancel_lands_at_the_next_device_call_and_harms_no_other(bench: Bench) -> None:
    neighbour_running, cancelled = threading.Event(), threading.Event()
    doomed = bench.order(seed=1, num_inference_steps=20, job_id="doomed")
    neighbour = bench.order(seed=2, num_inference_steps=20, job_id="neighbour")

    def cancel() -> None:
        assert neighbour_running.wait(RUN_TIMEOUT_S)
        assert bench.host.interrupt("doomed", InterruptReason.CANCEL)
        cancelled.set()

    def meet() -> None:
        neighbour_running.set()
        assert cancelled.wait(RUN_TIMEOUT_S)

    doomed_recorder = Recorder().on(EventName.STAGE_PROGRESS, cancel, count=3)
    neighbour_recorder = Recorder().on(EventName.STAGE_PROGRESS, meet, count=2)
    futures = bench.host.submit(doomed, doomed_recorder), bench.host.submit(neighbour, neighbour_recorder)
    assert futures[0].result(RUN_TIMEOUT_S) == RunInterrupted(InterruptReason.CANCEL)
    succeeded(futures[1].result(RUN_TIMEOUT_S))
    assert len(doomed_recorder.progress) == 3
    assert len(neighbour_recorder.progress) == 20
    assert list(doomed.output_dir.iterdir()) == []
    alone = bench.order(seed=2, num_inference_steps=20)
    succeeded(bench.run(alone))
    assert difference(picture(neighbour), picture(alone)) <= LEVELS_MAX


def test_the_first_reason_to_stop_stays(bench: Bench) -> None:
    order = bench.order(job_id="both")

    def stop_twice() -> None:
        bench.host.interrupt("both", InterruptReason.TIMEOUT)
        bench.host.interrupt("both", InterruptReason.CANCEL)

    outcome = bench.run(order, Recorder().on(EventName.STAGE_PROGRESS, stop_twice))
    assert outcome == RunInterrupted(InterruptReason.TIMEOUT)


def test_a_lost_lease_stops_the_older_attempt_alone(bench: Bench) -> None:
    older_started, newer_done = threading.Event(), threading.Event()

    def hold_older() -> None:
        older_started.set()
        assert newer_done.wait(RUN_TIMEOUT_S)

    older = bench.host.submit(
        bench.order(job_id="twice", attempt=1), Recorder().on(EventName.STAGE_PROGRESS, hold_older)
    )
    assert older_started.wait(RUN_TIMEOUT_S)
    newer = bench.host.submit(
        bench.order(job_id="twice", attempt=2),
        Recorder().on(EventName.STAGE_PROGRESS, lambda: bench.host.interrupt("twice", InterruptReason.LEASE_LOST)),
    )
    succeeded(newer.result(RUN_TIMEOUT_S))
    newer_done.set()
    assert older.result(RUN_TIMEOUT_S) == RunInterrupted(InterruptReason.LEASE_LOST)


def test_a_job_that_does_not_run_here_cannot_be_interrupted(bench: Bench) -> None:
    succeeded(bench.run(job_id="over"))
    assert not bench.host.interrupt("over", InterruptReason.CANCEL)
    assert not bench.host.interrupt("never", InterruptReason.CANCEL)


def test_previews_come_every_few_steps_and_not_after_the_last(bench: Bench) -> None:
    recorder = Recorder()
    succeeded(bench.run(recorder=recorder, num_inference_steps=6, preview_every_steps=2))
    previews = recorder.named(EventName.PREVIEW)
    assert [event.data["step"] for event in previews] == [2, 4]
    for event in previews:
        data = event.data["data_b64"]
        assert event.data["mime"] == "image/png"
        assert isinstance(data, str)
        assert max(_decoded(data).size) <= 128


def test_a_preview_changes_no_picture(bench: Bench) -> None:
    shown, unseen = bench.order(preview_every_steps=1), bench.order()
    succeeded(bench.run(shown))
    succeeded(bench.run(unseen))
    assert difference(picture(shown), picture(unseen)) == 0


def test_the_model_is_loaded_once_and_a_later_run_says_so(bench: Bench) -> None:
    assert bench.host.capability().loaded == ()
    first, second = Recorder(), Recorder()
    assert succeeded(bench.run(recorder=first)).facts.cache_hits == ()
    assert succeeded(bench.run(recorder=second)).facts.cache_hits == ("model",)
    assert first.named(EventName.CACHE_HIT) == []
    assert [event.data for event in second.named(EventName.CACHE_HIT)] == [{"cache": "model", "model": bench.model}]
    assert bench.host.capability().loaded == (bench.model,)


def test_the_capability_names_device_and_models(bench: Bench) -> None:
    capability = bench.host.capability()
    assert capability.models == (bench.model,)
    assert capability.concurrency == 8
    assert capability.device.startswith(capability.backend)
    assert "fp32" in capability.dtypes


def test_an_unwritable_folder_is_a_storage_error_and_the_host_goes_on(bench: Bench) -> None:
    order = bench.order()
    order.output_dir.rmdir()
    error = failed(bench.run(order)).error
    assert error.code == "storage_error"
    assert str(order.output_dir) not in error.message
    succeeded(bench.run())


def test_a_run_cannot_be_stopped_through_its_future(bench: Bench) -> None:
    future = bench.host.submit(bench.order(), Recorder())
    assert not future.cancel()
    succeeded(future.result(RUN_TIMEOUT_S))


def test_a_watcher_that_raises_fails_its_own_run_alone(bench: Bench) -> None:
    def burst() -> None:
        raise ValueError("the watcher's own fault")

    failed(bench.run(recorder=Recorder().on(EventName.STAGE_PROGRESS, burst)))
    succeeded(bench.run())


def test_closing_gives_running_jobs_back_and_later_ones_too(bench: Bench) -> None:
    running, closing = threading.Event(), threading.Event()

    def wait_for_the_close() -> None:
        running.set()
        assert closing.wait(RUN_TIMEOUT_S)

    future = bench.host.submit(
        bench.order(num_inference_steps=20), Recorder().on(EventName.STAGE_PROGRESS, wait_for_the_close)
    )
    assert running.wait(RUN_TIMEOUT_S)
    closer = threading.Thread(target=bench.host.close)
    closer.start()
    eventually(lambda: not bench.host.health().ok)
    closing.set()
    closer.join(RUN_TIMEOUT_S)
    assert future.result(RUN_TIMEOUT_S) == RunInterrupted(InterruptReason.GIVE_BACK)
    assert bench.run() == RunInterrupted(InterruptReason.GIVE_BACK)


# A device that breaks


class BreakingDriver(StubDriver):
    """Takes the model's RuntimeError for the loss of the device, which from then on releases nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.lost = False

    def is_lost(self, error: BaseException) -> bool:
        self.lost = self.lost or isinstance(error, RuntimeError)
        return isinstance(error, RuntimeError)

    def release(self) -> None:
        assert not self.lost, "nothing can be asked of a lost device"


@pytest.fixture
def breaking(tmp_path: Path) -> Iterator[Bench]:
    spec = discover().find("stub")
    host = ThreadHost(backend=BreakingDriver(), models=[spec], folders={}, cache_size=2, concurrency=8)
    yield Bench(host, spec.id, tmp_path)
    host.close()


def test_a_job_that_loses_the_device_fails_and_every_later_one_is_to_run_elsewhere(breaking: Bench) -> None:
    succeeded(breaking.run())
    assert breaking.host.health().ok
    assert failed(breaking.run(fail_at_step=2)).error.code == "model_failed"
    health = breaking.host.health()
    assert (health.ok, health.detail) == (False, "the device is lost")
    assert isinstance(breaking.run(), RunLost)
    assert isinstance(breaking.run(fail_at_step=2), RunLost)


def test_of_those_that_ran_when_the_device_was_lost_none_is_to_blame(breaking: Bench) -> None:
    running, lost = threading.Event(), threading.Event()

    def wait() -> None:
        running.set()
        assert lost.wait(RUN_TIMEOUT_S)

    def waiting(**wishes: Any) -> "Future[RunOutcome]":
        running.clear()
        recorder = Recorder().on(EventName.STAGE_PROGRESS, wait)
        future = breaking.host.submit(breaking.order(num_inference_steps=4, **wishes), recorder)
        assert running.wait(RUN_TIMEOUT_S)
        return future

    # Of another size, so that it shares no call with the one that breaks the device.
    fails, stopped, ends = waiting(fail_at_step=3), waiting(job_id="stopped"), waiting(width=128)
    assert isinstance(breaking.run(fail_at_step=1), RunLost), "the device may tell him of what another did"
    breaking.host.interrupt("stopped", InterruptReason.CANCEL)
    lost.set()
    assert isinstance(fails.result(RUN_TIMEOUT_S), RunLost)
    assert stopped.result(RUN_TIMEOUT_S) == RunInterrupted(InterruptReason.CANCEL)
    succeeded(ends.result(RUN_TIMEOUT_S))


class MeasuringDriver(StubDriver):
    """Counts how often the peak was reset, and has a little memory."""

    def __init__(self) -> None:
        super().__init__()
        self.resets = 0

    def reset_peak(self) -> None:
        self.resets += 1

    def memory(self) -> MemoryInfo | None:
        return MemoryInfo(total_bytes=8 * GIB, free_bytes=1 * GIB)


def test_the_peak_is_of_the_runs_that_were_there_together_and_a_lack_is_told_in_numbers(tmp_path: Path) -> None:
    spec = discover().find("stub")
    device = MeasuringDriver()
    host = ThreadHost(backend=device, models=[spec], folders={}, cache_size=2, concurrency=8)
    bench = Bench(host, spec.id, tmp_path)
    beside = Recorder().on(EventName.STAGE_PROGRESS, lambda: succeeded(bench.run()))
    succeeded(bench.run(recorder=beside))
    assert device.resets == 1
    told = failed(bench.run(num_images_per_prompt=3, oom_above_chunk=0)).error.message
    assert device.resets == 2
    assert "a call of its denoise with one sample of 64x64" in told
    assert "1.00 GiB of its 8.00 GiB are free" in told
    host.close()


# Faults: the stub has them on order; the real modules get them put in.


def test_the_stub_fails_at_the_step_it_was_told_to(tmp_path: Path) -> None:
    bench = stub_bench(tmp_path)
    recorder = Recorder()
    error = failed(bench.run(recorder=recorder, fail_at_step=3)).error
    assert (error.code, error.message) == ("model_failed", "The model's code raised RuntimeError.")
    assert len(recorder.progress) == 2
    assert [(event.stage, event.data["code"]) for event in recorder.named(EventName.STAGE_ERROR)] == [
        ("denoise", "model_failed")
    ]
    succeeded(bench.run())
    bench.host.close()


def test_the_stub_gives_non_finite_output_as_told(tmp_path: Path) -> None:
    bench = stub_bench(tmp_path)
    order = bench.order(non_finite=True)
    assert failed(bench.run(order)).error.code == "non_finite_output"
    assert list(order.output_dir.iterdir()) == []
    bench.host.close()


def test_a_job_too_large_for_memory_is_made_in_smaller_calls_and_fails_where_one_picture_does_not_fit(
    tmp_path: Path,
) -> None:
    bench = stub_bench(tmp_path)
    for fits in (2, 1):
        assert len(succeeded(bench.run(num_images_per_prompt=3, oom_above_chunk=fits)).outputs) == 3
    error = failed(bench.run(num_images_per_prompt=3, oom_above_chunk=0)).error
    assert error.code == "out_of_memory"
    assert error.hint
    bench.host.close()


def test_a_step_of_the_stub_costs_what_it_was_told(tmp_path: Path) -> None:
    bench = stub_bench(tmp_path)
    succeeded(bench.run())
    started = time.perf_counter()
    succeeded(bench.run(num_inference_steps=4, step_ms=10, item_ms=5, num_images_per_prompt=3))
    assert time.perf_counter() - started >= 4 * (10 + 3 * 5) / 1000
    bench.host.close()


def test_a_stall_holds_up_its_own_job_and_not_the_device(tmp_path: Path) -> None:
    bench = stub_bench(tmp_path)
    stalled = bench.host.submit(bench.order(stall_at_step=2, stall_ms=60_000), Recorder())
    succeeded(bench.run())
    assert not stalled.done()
    assert bench.host.health().stuck_for_s is None
    bench.host.close()
    assert stalled.result(RUN_TIMEOUT_S) == RunInterrupted(InterruptReason.GIVE_BACK)


def test_a_hanging_call_shows_in_health_and_ends_with_the_host(tmp_path: Path) -> None:
    bench = stub_bench(tmp_path)
    hanging = bench.host.submit(bench.order(hang_at_step=2), Recorder())
    eventually(lambda: (bench.host.health().stuck_for_s or 0.0) > 0.05)
    waiting = bench.host.submit(bench.order(job_id="behind"), Recorder())
    bench.host.interrupt("behind", InterruptReason.CANCEL)
    # A job that waits behind the hanging call leaves at once, though the device is not free.
    assert waiting.result(RUN_TIMEOUT_S) == RunInterrupted(InterruptReason.CANCEL)
    bench.host.close()
    assert hanging.result(RUN_TIMEOUT_S) == RunInterrupted(InterruptReason.GIVE_BACK)


def test_closing_leaves_a_real_call_that_never_returns_behind(tiny: tuple[Bench, Loads]) -> None:
    bench, loads = tiny
    succeeded(bench.run())
    release = threading.Event()

    def hang(*_: object) -> None:
        release.wait(RUN_TIMEOUT_S)

    hook = loads.module.unet.conv_in.register_forward_pre_hook(hang)
    hanging = bench.host.submit(bench.order(), Recorder())
    eventually(lambda: (bench.host.health().stuck_for_s or 0.0) > 0.05)
    bench.host.close(timeout_s=0.2)
    assert hanging.result(RUN_TIMEOUT_S) == RunInterrupted(InterruptReason.GIVE_BACK)
    release.set()
    hook.remove()


def test_the_stub_kills_its_process_as_told() -> None:
    script = """
import tempfile
from pathlib import Path
from tests.support.hosts import stub_bench
with tempfile.TemporaryDirectory() as folder:
    stub_bench(Path(folder)).run(crash_at_step=2)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


def _decoded(data_b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data_b64)))
