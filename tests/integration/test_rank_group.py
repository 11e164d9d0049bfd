"""A model that lives in processes of its own: started once, kept in step, and ended for sure."""

import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file

from omnirt_tasks.contract import Inputs, ResolvedRequest, Task
from omnirt_tasks.errors import ModelFailed, WorkerLost
from omnirt_tasks.models.pocketsphinx import SPECS
from omnirt_tasks.registry import Launcher, LoadRequest, ModelSpec, Needs, RankGroup, options
from tests.support.hosts import Recorder
from tests.support.ranks import ENTRY
from tests.support.waiting import eventually
from workers.backends import driver
from workers.context import Interrupted, JobContext
from workers.device import DeviceThread
from workers.executors import LoadedModel, executor_for
from workers.executors import rank_group as rank_group_module
from workers.executors.rank_group import RankGroupExecutor
from workers.host import InterruptReason, OutputFile, RunLost, RunOrder, RunOutcome, RunSucceeded
from workers.thread_host import ThreadHost

TIMEOUT_S = 60.0


def spec_of(group: RankGroup) -> ModelSpec:
    return dataclasses.replace(SPECS[0], id="adder", loader=lambda spec, request: group)


@dataclass
class Adders:
    """A loaded group of adders, and jobs for it, each in a thread of its own."""

    executor: RankGroupExecutor
    model: LoadedModel
    device: DeviceThread
    folder: Path
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self, recorder: Recorder | None = None, **config: Any) -> tuple[JobContext, "Future[Any]"]:
        number = len(self.threads)
        output_dir = self.folder / f"outputs-{number}"
        output_dir.mkdir()
        request = ResolvedRequest(
            task=Task.AUDIO2TEXT, model="adder", backend="cpu", inputs=Inputs(), config={"steps": 3} | config
        )
        order = RunOrder(f"job-{number}", 1, request, output_dir)
        job = JobContext(order, self.device, recorder or Recorder())
        result: Future[Any] = Future()

        def work() -> None:
            try:
                with job.entered():
                    result.set_result((order, self.executor.run(self.model, order, job)))
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                result.set_exception(error)

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()
        return job, result

    def sums(self, **config: Any) -> list[int]:
        """What a job that succeeds wrote down."""
        order, (output,) = self.start(**config)[1].result(TIMEOUT_S)
        assert isinstance(output, OutputFile)
        told: list[int] = json.loads((order.output_dir / output.name).read_text(encoding="utf-8"))
        return told

    def rank(self, number: int) -> dict[str, int]:
        """What a rank noted last."""
        noted: dict[str, int] = json.loads((self.folder / f"rank-{number}.json").read_text(encoding="utf-8"))
        return noted


@contextmanager
def adders(folder: Path, ranks: int, launcher: Launcher) -> Iterator[Adders]:
    with ExitStack() as stack:
        device = DeviceThread(driver("cpu-stub"))
        stack.callback(device.close)
        executor = executor_for("cpu", spec_of(RankGroup(ENTRY)).execution_mode)
        assert isinstance(executor, RankGroupExecutor)
        model = executor.load(spec_of(RankGroup(ENTRY, ranks, launcher)), LoadRequest(folder, "cpu", "fp32"))
        stack.callback(model.close)
        group = Adders(executor, model, device, folder)
        yield group
        for thread in group.threads:
            thread.join(TIMEOUT_S)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Adders]:
    with adders(tmp_path, 2, Launcher.TORCHRUN) as group:
        yield group


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Adders]:
    with adders(tmp_path, 1, Launcher.PYTHON) as group:
        yield group


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("launcher", [Launcher.TORCHRUN, Launcher.ACCELERATE])
def test_both_ranks_take_part_in_every_job_and_are_started_once(tmp_path: Path, launcher: Launcher) -> None:
    with adders(tmp_path, 2, launcher) as two:
        assert two.model.placement == {"rank 0": "cpu", "rank 1": "cpu"}
        assert two.sums() == [11, 11, 11]
        pids = [two.rank(0)["pid"], two.rank(1)["pid"]]
        assert len(set(pids)) == 2
        assert two.sums(steps=1) == [11]
        assert [two.rank(0)["pid"], two.rank(1)["pid"]] == pids
    eventually(lambda: all(gone(pid) for pid in pids))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., RunOutcome]]:
    """Runs a job of a model that takes as many devices as are asked for, on a host; its outputs lie in "outputs"."""

    def load(_: ModelSpec, request: LoadRequest) -> RankGroup:
        return RankGroup(ENTRY, request.devices, Launcher.TORCHRUN if request.devices > 1 else Launcher.PYTHON)

    text = dataclasses.replace(
        SPECS[0].tasks[Task.AUDIO2TEXT], options=options.by_name([options.devices(4)]), required_inputs=()
    )
    spec = dataclasses.replace(
        SPECS[0], id="adder", loader=load, tasks={Task.AUDIO2TEXT: text}, needs=Needs(weights=True)
    )
    folder, outputs = tmp_path / "weights", tmp_path / "outputs"
    outputs.mkdir()
    save_file({"weight": torch.zeros(1)}, _made(folder) / "model.safetensors")
    host = ThreadHost(
        backend=driver("cpu", torch_threads=1), models=[spec], folders={"adder": folder}, cache_size=1, concurrency=1
    )

    def one(**config: Any) -> RunOutcome:
        request = ResolvedRequest(
            task=Task.AUDIO2TEXT, model="adder", backend="cpu", inputs=Inputs(), config={"steps": 2, **config}
        )
        return host.submit(RunOrder("job", 1, request, outputs), Recorder()).result(TIMEOUT_S)

    yield one
    host.close()


@pytest.mark.parametrize("devices", [1, 2])
def test_a_job_has_the_devices_that_it_asks_for_and_says_where_it_ran(
    run: Callable[..., RunOutcome], tmp_path: Path, devices: int
) -> None:
    outcome = run(devices=devices)

    assert isinstance(outcome, RunSucceeded), outcome
    assert json.loads((tmp_path / "outputs" / "0.txt").read_text(encoding="utf-8")) == [int("1" * devices)] * 2
    assert list(outcome.facts.device_placement) == [f"rank {rank}" for rank in range(devices)]


def test_a_run_whose_rank_died_is_lost_and_not_failed_as_with_any_process_of_the_device(
    run: Callable[..., RunOutcome],
) -> None:
    assert isinstance(run(die_in_rank=0), RunLost)
    assert isinstance(run(), RunSucceeded)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_each_step_is_told_as_the_job_s_own(one: Adders) -> None:
    recorder = Recorder()

    one.start(recorder, steps=3)[1].result(TIMEOUT_S)

    assert recorder.progress == [(1, 3), (2, 3), (3, 3)]
    assert recorder.stages == ["generate", "export"]


def test_a_group_of_one_holds_no_torch(one: Adders) -> None:
    assert one.sums() == [1, 1, 1]
    maps = [entry.path for entry in psutil.Process(one.rank(0)["pid"]).memory_maps()]
    assert not [path for path in maps if "torch" in path]


def test_a_cancel_lands_at_the_same_step_in_both_ranks(two: Adders) -> None:
    recorder = Recorder()
    job, result = two.start(recorder, steps=1000, step_ms=5)
    eventually(lambda: len(recorder.progress) >= 3)

    job.interrupt(InterruptReason.CANCEL)

    with pytest.raises(Interrupted):
        result.result(TIMEOUT_S)
    assert two.rank(0)["at_step"] == two.rank(1)["at_step"] < 1000
    pids = two.rank(0)["pid"], two.rank(1)["pid"]
    assert two.sums() == [11, 11, 11]
    assert (two.rank(0)["pid"], two.rank(1)["pid"]) == pids


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_fails_its_job_as_worker_lost_and_the_next_job_has_a_new_group(two: Adders, rank: int) -> None:
    two.sums()
    pids = {two.rank(0)["pid"], two.rank(1)["pid"]}

    with pytest.raises(WorkerLost, match="died while the job ran") as lost:
        two.start(die_in_rank=rank)[1].result(TIMEOUT_S)

    assert lost.value.retryable
    assert two.sums() == [11, 11, 11]
    assert not pids & {two.rank(0)["pid"], two.rank(1)["pid"]}
    eventually(lambda: all(gone(pid) for pid in pids))


def test_a_rank_that_dies_while_nothing_runs_costs_no_job(two: Adders) -> None:
    two.sums()
    pid = two.rank(1)["pid"]

    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not two.model.content.alive)

    assert two.sums() == [11, 11, 11]


def test_what_every_rank_refuses_reaches_the_caller_and_the_group_stays(two: Adders) -> None:
    two.sums()
    pids = two.rank(0)["pid"], two.rank(1)["pid"]

    with pytest.raises(ModelFailed, match="does not add this"):
        two.start(refuse_in_rank=-1)[1].result(TIMEOUT_S)

    assert two.sums() == [11, 11, 11]
    assert (two.rank(0)["pid"], two.rank(1)["pid"]) == pids


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_rank_alone_is_told_though_the_other_waits_for_it(two: Adders, rank: int) -> None:
    with pytest.raises(ModelFailed, match="ValueError"):
        two.start(fail_in_rank=rank)[1].result(TIMEOUT_S)

    assert two.sums() == [11, 11, 11]


def test_what_rank_0_alone_refuses_reaches_the_caller_too_and_the_next_job_has_a_new_group(two: Adders) -> None:
    with pytest.raises(ModelFailed, match="does not add this"):
        two.start(refuse_in_rank=0)[1].result(TIMEOUT_S)

    assert two.sums() == [11, 11, 11]


def test_an_unknown_error_of_the_only_rank_is_the_model_s_and_the_group_stays(one: Adders) -> None:
    with pytest.raises(ModelFailed, match="ValueError"):
        one.start(fail_in_rank=0)[1].result(TIMEOUT_S)

    assert one.sums() == [1, 1, 1]


def test_a_rank_that_does_not_stop_is_ended_by_force(one: Adders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group_module, "STOP_PATIENCE_S", 0.2)
    job, result = one.start(hang_in_rank=0)
    pid = eventually(lambda: (one.folder / "rank-0.json").exists() and one.rank(0)["pid"])

    job.interrupt(InterruptReason.TIMEOUT)

    with pytest.raises(Interrupted) as interrupted:
        result.result(TIMEOUT_S)
    assert interrupted.value.reason is InterruptReason.TIMEOUT
    eventually(lambda: gone(pid))
    assert one.sums() == [1, 1, 1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_model_that_cannot_be_made_says_why(tmp_path: Path, rank: int) -> None:
    (tmp_path / f"no-model-{rank}").touch()

    with pytest.raises(ModelFailed, match=f"Rank {rank} has no model"), adders(tmp_path, 2, Launcher.TORCHRUN):
        pass


def test_a_start_that_nobody_wants_any_more_is_broken_off(tmp_path: Path) -> None:
    with ExitStack() as stack:
        device = DeviceThread(driver("cpu-stub"))
        stack.callback(device.close)
        request = ResolvedRequest(task=Task.AUDIO2TEXT, model="adder", backend="cpu", inputs=Inputs(), config={})
        job = JobContext(RunOrder("job", 1, request, tmp_path), device, Recorder())
        group = RankGroup("time:sleep")  # never a model: what is waited for does not come

        job.interrupt(InterruptReason.CANCEL)

        with job.entered(), pytest.raises(Interrupted):
            RankGroupExecutor().load(spec_of(group), LoadRequest(tmp_path, "cpu", "fp32"))


def test_no_rank_outlives_the_process_that_started_the_group(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from tests.integration.test_rank_group import adders\n"
        "from omnirt_tasks.registry import Launcher\n"
        "with adders(pathlib.Path(sys.argv[1]), 2, Launcher.TORCHRUN) as two:\n"
        "    two.start(hang_in_rank=1)\n"
        "    time.sleep(600)\n"
    )
    parent = psutil.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2])
    try:
        eventually(lambda: all((tmp_path / f"rank-{rank}.json").exists() for rank in (0, 1)), TIMEOUT_S)
        pids = [json.loads((tmp_path / f"rank-{rank}.json").read_text())["pid"] for rank in (0, 1)]
    finally:
        parent.kill()
        parent.wait()

    eventually(lambda: all(gone(pid) for pid in pids), 20)
