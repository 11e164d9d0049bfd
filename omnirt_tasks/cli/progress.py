"""A job's progress on standard error: a bar on a terminal, a line per stage elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from omnirt_tasks.contract import Event, EventName

_SAID = {
    "waiting": "waiting for room",
    "load": "loading the model",
    "encode_prompt": "reading the prompt",
    "denoise": "denoising",
    "decode": "decoding",
    "export": "saving",
}
_SAID_AT = {
    EventName.JOB_STARTED: "started",
    EventName.JOB_FINISHED: "done",
    EventName.JOB_FAILED: "failed",
    EventName.JOB_CANCELLED: "cancelled",
}
_BACK_SINCE = {
    "device_lost": "its device's process died",
    "lease_expired": "its worker died or fell silent",
    "worker_leaving": "its worker leaves",
    "no_room": "another job waits for room on that device",
}


class JobProgress:
    """Shows what a job's events tell. Not shared between threads."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live = self._console.is_terminal
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[steps]:>7}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._said = ""
        self._stages_of_parts: set[str] = set()

    def __enter__(self) -> Self:
        self._bar.start()
        self._task = self._bar.add_task("submitting", total=None, steps="")
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, event: Event) -> None:
        """Show one event; some have nothing to show."""
        if (words := _SAID_AT.get(event.event)) is not None:
            self._say(words)
            return
        match event.event:
            case EventName.JOB_ENQUEUED:
                self._say(f"queued on {event.data.get('queue', '?')}")
            case EventName.JOB_REQUEUED:
                self._back(event, "queued again")
                self._steps(0, None)
            case EventName.PART_REQUEUED:
                self._back(event, f"part {_part(event)} queued again")
            case EventName.PART_FINISHED:
                self._say(f"part {_part(event)} done")
            case EventName.STAGE_START:
                self._stage(event)
            case EventName.STAGE_PROGRESS | EventName.RESUMED:
                if event.event is EventName.RESUMED:
                    self._say(f"going on after step {event.data.get('step', '?')}")
                step, total = event.data.get("step"), event.data.get("total")
                if isinstance(step, int) and isinstance(total, int):
                    self._steps(step, total)

    def _back(self, event: Event, words: str) -> None:
        """Say that the job, or a part of it, went back to its queue, and why."""
        reason = str(event.data.get("reason", "?"))
        self._note(words, _BACK_SINCE.get(reason, reason))

    def _stage(self, event: Event) -> None:
        """Say which stage begins; of parts, which go through all of them side by side, the first that does."""
        if "part" in event.data:
            if event.stage in self._stages_of_parts:
                return
            self._stages_of_parts.add(event.stage)
        self._say(_SAID.get(event.stage, event.stage))

    def _say(self, words: str) -> None:
        if self._task is not None and self._live:
            self._bar.update(self._task, description=words)
        elif words != self._said:
            self._console.print(words, highlight=False, markup=False)
        self._said = words

    def _note(self, words: str, why: str) -> None:
        """Say it with the reason, which stays on a terminal though the bar begins anew."""
        if self._live:
            self._console.print(f"{words}: {why}", highlight=False, markup=False)
        self._say(words if self._live else f"{words}: {why}")

    def _steps(self, step: int, total: int | None) -> None:
        if self._task is not None:
            steps = "" if total is None else f"{step}/{total}"
            self._bar.update(self._task, completed=step, total=total, steps=steps)


def _part(event: Event) -> str:
    """The number of the part that the event is of, from 1 as people count."""
    part = event.data.get("part")
    return str(part + 1) if isinstance(part, int) else "?"
