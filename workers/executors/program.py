"""Runs a model that is an installed program: one process for each job, which gets its prompt as a file.

    order ─► private folder: prompt, working folder ─► child in a process group of its own ─► output ─► order's folder

The device is the job's alone meanwhile. Whatever ends the run ends the whole process group.
"""

import logging
import os
import shutil
import tempfile
import threading
import wave
from collections.abc import Callable, Sequence
from pathlib import Path

from omnirt_tasks.child_process import ChildProcess
from omnirt_tasks.errors import ModelFailed, StorageError
from omnirt_tasks.registry import LoadRequest, ModelSpec, Program, ProgramRun
from workers.context import JobContext
from workers.executors import LoadedModel
from workers.host import OutputFile, RunOrder

log = logging.getLogger(__name__)

TOLD_BYTES_MAX = 1024 * 1024
"""What a program may write to its terminal in one run."""
WAV = "audio/wav"
FRAGMENT_CHARS = 4
"""A line that shares as many characters in a row with the prompt may repeat it, in any language."""


class ProgramExecutor:
    """Starts the model's program anew for each job. Holds nothing, so threads share it."""

    def load(self, spec: ModelSpec, request: LoadRequest) -> LoadedModel:
        """Raises ModelFailed when a program that the model needs is not on PATH."""
        for name in spec.needs.programs:
            if shutil.which(name) is None:
                raise ModelFailed(
                    f"The program {name!r}, which {spec.id} runs, is not on this worker's PATH.",
                    f"The operator installs {name} there.",
                )
        assert spec.loader is not None, "a model without a loader is not runnable"
        program = spec.loader(spec, request)
        assert isinstance(program, Program), "what a family of this mode loads"
        return LoadedModel(program, dict.fromkeys(spec.needs.programs, request.device))

    def run(self, model: LoadedModel, order: RunOrder, job: JobContext) -> tuple[OutputFile, ...]:
        """Raises ModelFailed when the program fails, leaves no output, or has too much to tell; StorageError."""
        program: Program = model.content
        # In the attempt's own folder, which is removed even when this process dies: the prompt is in it.
        with tempfile.TemporaryDirectory(prefix="program-", dir=order.output_dir) as private:
            folder = Path(private)
            output = folder / program.output_name
            command = program.command(
                ProgramRun(_written(folder / "prompt.txt", order), order.files, output, order.request.config)
            )
            with job.device_held():
                job.stage("generate")
                _execute(command, folder, order, job)
            job.stage("export")
            return (_exported(program, Path(command[0]).name, output, order),)


def _prompt_of(order: RunOrder) -> str:
    prompt = order.request.inputs.prompt or ""
    assert isinstance(prompt, str), "only text2image takes a list of prompts"
    return prompt


def _written(file: Path, order: RunOrder) -> Path:
    try:
        file.write_text(_prompt_of(order), encoding="utf-8", errors="replace")
    except OSError as error:
        raise StorageError("The prompt could not be written for the program.", "Its disk may be full.") from error
    return file


def _execute(command: Sequence[str], folder: Path, order: RunOrder, job: JobContext) -> None:
    """Run the command to its end. Raises Interrupted, once nothing of it is left, or ModelFailed."""
    name = Path(command[0]).name
    over = threading.Event()
    told = _Told(name, order, too_much=over.set)
    try:
        child = ChildProcess(
            f"program-{name}", command, env=_environment(folder), cwd=folder, on_line=told, on_exit=lambda _: over.set()
        )
    except OSError as error:
        raise ModelFailed(f"The program {name} could not be started.", "The worker's host is short of it.") from error
    try:
        with job.woken_by(over.set):
            over.wait()
    finally:
        status = child.exit_code
        if status is None:
            child.kill()
        child.stop()
    if status is None:
        job.check()
    if told.flooded:
        raise ModelFailed(
            f"The program {name} wrote more than {TOLD_BYTES_MAX} bytes to its terminal, and was ended.",
            "Have it write less: its output belongs into the file that it is given.",
        )
    if status:
        how = f"was ended by signal {status - 128}" if status > 128 else f"ended with exit status {status}"
        log.error("the program %s %s", name, how, extra={"last_line": told.last_line})
        raise ModelFailed(f"The program {name} {how}.", "The worker's log has the last line that it wrote.")


def _environment(folder: Path) -> dict[str, str]:
    """All that a program sees of ours: where programs are."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "HOME": str(folder)}


class _Told:
    """What a program writes, line by line: to the log, without the lines that repeat the prompt.

    Called from the child's own thread; `too_much` is called once past the limit.
    """

    def __init__(self, name: str, order: RunOrder, too_much: Callable[[], object]) -> None:
        self.last_line = ""
        self.flooded = False
        self._name = name
        self._job_id = order.job_id
        self._private = _fragments(_prompt_of(order))
        self._too_much = too_much
        self._bytes = 0

    def __call__(self, line: str) -> None:
        if self.flooded:
            return
        self._bytes += len(line.encode()) + 1
        if self._bytes > TOLD_BYTES_MAX:
            self.flooded = True
            self._too_much()
            return
        shown = line if self._private.isdisjoint(_fragments(line)) else "(a line that may repeat the prompt)"
        if shown.strip():
            self.last_line = shown
            log.debug("%s: %s", self._name, shown, extra={"job_id": self._job_id})


def _fragments(text: str) -> frozenset[str]:
    flat = "".join(text.casefold().split())
    return frozenset(flat[i : i + FRAGMENT_CHARS] for i in range(max(len(flat) - FRAGMENT_CHARS + 1, 1)))


def _exported(program: Program, name: str, output: Path, order: RunOrder) -> OutputFile:
    if not output.is_file() or output.stat().st_size == 0:
        raise ModelFailed(f"The program {name} left no output.", "The worker's log has what it wrote.")
    if program.mime == WAV:
        _require_sound(name, output)
    try:
        output.replace(order.output_dir / program.output_name)
    except OSError as error:
        raise StorageError("The program's output could not be moved.", "The worker's disk may be full.") from error
    return OutputFile(program.output_name, index=0, kind=program.kind, mime=program.mime)


def _require_sound(name: str, output: Path) -> None:
    try:
        with wave.open(str(output), "rb") as sound:
            samples = sound.getnframes()
    except (wave.Error, EOFError) as error:
        raise ModelFailed(f"The program {name} left a WAV file that cannot be read.", "Try it by hand.") from error
    if samples == 0:
        raise ModelFailed(f"The program {name} made no sound of the prompt.", "Send words that can be spoken.")
