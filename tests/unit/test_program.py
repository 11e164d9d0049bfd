"""A model that is a program: what it gets to see, how it ends, and that nothing of it stays."""

import dataclasses
import logging
import threading
import time
import wave
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest

from omnirt_tasks.contract import ArtifactKind, EventName, Inputs, ResolvedRequest, Task
from omnirt_tasks.errors import ModelFailed
from omnirt_tasks.models.flite import SPECS
from omnirt_tasks.registry import LoadRequest, Needs, Program, ProgramRun
from tests.support.hosts import Recorder
from tests.support.waiting import eventually
from workers.backends import driver
from workers.chunks.calls import DeviceCall
from workers.context import Interrupted, JobContext
from workers.device import DeviceThread
from workers.executors import program as program_module
from workers.executors.program import ProgramExecutor
from workers.host import InterruptReason, OutputFile, RunOrder

PROMPT = "a confidential sentence"
TIMEOUT_S = 20.0


@pytest.fixture
def device() -> Iterator[DeviceThread]:
    device = DeviceThread(driver("cpu-stub"))
    yield device
    device.close()


class Shell:
    """Runs scripts of /bin/sh as a model: $1 is the prompt's file, $2 the output."""

    def __init__(self, device: DeviceThread, folder: Path) -> None:
        self.folder = folder
        self.recorder = Recorder()
        self._device = device
        self._executor = ProgramExecutor()

    def context(self) -> JobContext:
        request = ResolvedRequest(
            task=Task.TEXT2AUDIO, model="sh", backend="cpu", inputs=Inputs(prompt=PROMPT), config={"voice": "slt"}
        )
        output_dir = self.folder / "outputs"
        output_dir.mkdir()
        return JobContext(RunOrder("job", 1, request, output_dir), self._device, self.recorder)

    def run(self, script: str, job: JobContext | None = None, *, mime: str = "text/plain") -> tuple[OutputFile, ...]:
        def command(run: ProgramRun) -> list[str]:
            assert run.config == {"voice": "slt"}
            return ["/bin/sh", "-c", script, "sh", str(run.prompt_file), str(run.output)]

        program = Program(command, ArtifactKind.TEXT, "0.txt", mime)
        spec = dataclasses.replace(
            SPECS[0], id="sh", needs=Needs(programs=("sh",)), loader=lambda spec, request: program
        )
        model = self._executor.load(spec, LoadRequest(Path(), "cpu", "fp32"))
        job = job or self.context()
        return self._executor.run(model, job.order, job)

    @property
    def left(self) -> list[str]:
        """What lies in the order's folder."""
        return sorted(path.name for path in (self.folder / "outputs").iterdir())


@pytest.fixture
def shell(device: DeviceThread, tmp_path: Path) -> Shell:
    return Shell(device, tmp_path)


def test_the_prompt_is_a_file_and_the_output_alone_stays(shell: Shell) -> None:
    (output,) = shell.run('cat "$1" > "$2"; touch beside; echo "$1"')

    assert (output.name, output.mime, output.kind) == ("0.txt", "text/plain", ArtifactKind.TEXT)
    assert (shell.folder / "outputs" / "0.txt").read_text(encoding="utf-8") == PROMPT
    assert shell.left == ["0.txt"]
    assert shell.recorder.stages == ["generate", "export"]


def test_a_program_sees_nothing_of_the_worker_s_environment(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIRT_REDIS_URL", "redis://:secret@host")
    monkeypatch.setenv("ANYTHING", "else")

    shell.run('env > "$2"')

    written = (shell.folder / "outputs" / "0.txt").read_text(encoding="utf-8").splitlines()
    names = {line.partition("=")[0] for line in written}
    assert names - {"PWD", "OLDPWD", "SHLVL", "_"} == {"PATH", "LANG", "HOME"}  # the shell makes those itself
    assert "LANG=C.UTF-8" in written


def test_no_other_device_call_is_made_meanwhile(shell: Shell, device: DeviceThread) -> None:
    calls: list[Future[object]] = []
    job = shell.context()

    def call_meanwhile() -> None:
        calls.append(device.submit(DeviceCall(None, object)))
        with pytest.raises(TimeoutError):
            calls[0].result(0.1)

    shell.recorder.on(EventName.STAGE_START, call_meanwhile)

    shell.run('echo done > "$2"', job)

    assert calls[0].result(10), "and it is made once the program has ended"


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("exit 3", "The program sh ended with exit status 3"),
        ("kill -SEGV $$", "The program sh was ended by signal 11"),
        ("true", "The program sh left no output"),
        (': > "$2"', "The program sh left no output"),
    ],
)
def test_a_run_that_failed_says_how(shell: Shell, script: str, told: str) -> None:
    with pytest.raises(ModelFailed, match=told) as failed:
        shell.run(script)

    assert failed.value.hint
    assert str(shell.folder) not in str(failed.value)
    assert shell.left == []


def test_sound_that_is_none_is_not_handed_out(shell: Shell) -> None:
    with pytest.raises(ModelFailed, match="cannot be read"):
        shell.run('echo noise > "$2"', mime="audio/wav")


def test_sound_without_a_sample_is_not_handed_out(shell: Shell) -> None:
    with wave.open(str(shell.folder / "silent.wav"), "wb") as silent:
        silent.setparams((1, 2, 16_000, 0, "NONE", ""))

    with pytest.raises(ModelFailed, match="made no sound"):
        shell.run(f'cp {shell.folder}/silent.wav "$2"', mime="audio/wav")


def test_a_program_that_is_not_there_names_its_remedy() -> None:
    spec = dataclasses.replace(SPECS[0], needs=Needs(weights=False, programs=("no-such-program",)))

    with pytest.raises(ModelFailed, match="The operator installs no-such-program"):
        ProgramExecutor().load(spec, LoadRequest(Path(), "cpu", "fp32"))


def test_one_that_writes_for_ever_is_ended(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "TOLD_BYTES_MAX", 4096)

    with pytest.raises(ModelFailed, match="more than 4096 bytes"):
        shell.run("while :; do echo; done")


def test_an_interrupt_ends_the_whole_process_group_at_once(shell: Shell) -> None:
    job = shell.context()
    result: Future[object] = Future()

    def work() -> None:
        try:
            result.set_result(shell.run('trap "" TERM; sleep 600 & echo $! > "$HOME/../pid"; wait', job))
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            result.set_exception(error)

    thread = threading.Thread(target=work)
    thread.start()
    noted = shell.folder / "outputs" / "pid"
    pid = int(eventually(lambda: noted.exists() and noted.read_text(encoding="utf-8")) or 0)
    begun_s = time.monotonic()

    job.interrupt(InterruptReason.TIMEOUT)

    with pytest.raises(Interrupted) as interrupted:
        result.result(TIMEOUT_S)
    thread.join()
    assert interrupted.value.reason is InterruptReason.TIMEOUT
    assert not psutil.pid_exists(pid)
    assert time.monotonic() - begun_s < 5
    assert shell.left == ["pid"]


def test_what_it_writes_is_logged_without_the_prompt(shell: Shell, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    with pytest.raises(ModelFailed):
        shell.run('echo working; cat "$1"; echo; echo "cannot go on with a Confidential thing"; exit 1')

    assert "sh: working" in caplog.text
    assert "confidential" not in caplog.text.casefold()
