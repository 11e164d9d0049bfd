"""Device calls of made-up runs, for tests of the line and the forwards: limits that are given, a joint that tells."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from workers.chunks.calls import ChunkKey, DeviceCall
from workers.chunks.limits import MeasureKey
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
