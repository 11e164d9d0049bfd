"""Device calls of made-up runs: limits that are given, a joint that tells, and a line with a clock that tests move."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from workers.chunks.calls import ChunkKey, DeviceCall
from workers.chunks.limits import MeasureKey
from workers.chunks.line import Line, Waiting, WaitUntil
from workers.chunks.members import Member

STEP_S = 1.0
"""How long a call is expected to take, unless a test says otherwise."""


class GivenLimits:
    """Limits as a test gives them; keeps what it is told."""

    def __init__(self, rows: int = 64, expected_s: float | None = STEP_S) -> None:
        self.rows = rows
        self.expected = expected_s
        self.noted: list[tuple[str, int]] = []
        self.too_large: list[tuple[str, int]] = []

    def rows_max(self, key: MeasureKey) -> int:
        return self.rows

    def expected_s(self, key: MeasureKey, rows: int) -> float | None:
        return self.expected

    def note(self, key: MeasureKey, rows: int, elapsed_s: float) -> None:
        self.noted.append((key.part, rows))

    def note_too_large(self, key: MeasureKey, rows: int) -> None:
        self.too_large.append((key.part, rows))
        self.rows = min(self.rows, max(rows // 2, 1))


class TellingJoint:
    """Makes calls together by making each; `before` sees them first, and may raise. Keeps how many each time were."""

    def __init__(self, before: Callable[[Sequence[DeviceCall]], object] = lambda _: None) -> None:
        self.sizes: list[int] = []
        self._before = before

    def together(self, calls: Sequence[DeviceCall]) -> Sequence[Any]:
        self.sizes.append(len(calls))
        self._before(calls)
        return [call() for call in calls]

    def halves(self, call: DeviceCall) -> tuple[DeviceCall, DeviceCall] | None:
        """A call's rows are its arguments."""
        half = call.rows // 2
        if not half:
            return None
        first, second = call.args[:half], call.args[half:]
        return replace(call, args=first, rows=len(first)), replace(call, args=second, rows=len(second))

    def whole(self, first: Any, second: Any) -> Any:
        return (*first, *second)


class Story:
    """A line with a clock: calls come, and are made."""

    def __init__(self, limits: GivenLimits | None = None) -> None:
        self.limits = limits or GivenLimits()
        self.line = Line(self.limits)
        self.now_s = 100.0
        self.waited_s = 0.0

    def comes(self, who: Member | None, key: str = "unet", *, rows: int = 1, denoises: bool = True) -> Waiting:
        return self.comes_with(call(key, rows=rows), who, denoises=denoises)

    def comes_with(self, it: DeviceCall, who: Member | None, *, denoises: bool = True) -> Waiting:
        waiting = Waiting(it, who, self.now_s, denoises)
        self.line.add(waiting)
        return waiting

    def next(self) -> tuple[Waiting, ...] | WaitUntil | None:
        return self.line.next(self.now_s)

    def makes(self, elapsed_s: float = STEP_S) -> list[Member | None]:
        """Whose calls are made next, once nothing is waited for any more: as one, in order."""
        while isinstance(decision := self.next(), WaitUntil):
            self.waited_s += decision.time_s - self.now_s
            self.now_s = decision.time_s
        if decision is None:
            return []
        self.now_s += elapsed_s
        self.line.made(decision, elapsed_s, self.now_s)
        return [each.member for each in decision]


def member(name: str = "model", **bounds: Any) -> Member:
    return Member(name, "64x64 fp32", **bounds)


def call(
    key: str = "unet",
    function: Callable[..., Any] = lambda *rows: rows,
    *args: Any,
    joint: TellingJoint | None = None,
    rows: int = 1,
) -> DeviceCall:
    """A call that may be made as one with others of the key."""
    joint = TellingJoint() if joint is None else joint
    return DeviceCall(None, function, args, key=ChunkKey(key), joint=joint, rows=rows, part="unet")
