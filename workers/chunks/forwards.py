"""Makes the calls of a chunk: as one, and where that fails, in smaller pieces, so that one bad member harms nobody.

merged ──┬─► a result for each
         ├─ out of memory ─► its halves, down to single calls, and those down to single rows
         ├─ device lost ──► the error for each: nothing can be made here any more
         └─ any other error ─► one by one, each with its own result or error
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto
from traceback import clear_frames
from typing import Any

from workers.backends import BackendDriver
from workers.chunks.calls import DeviceCall, Joint
from workers.chunks.limits import Limits, MeasureKey
from workers.chunks.line import Waiting
from workers.chunks.members import TooLarge

log = logging.getLogger(__name__)


class UnevenResults(RuntimeError):
    """A merged call gave another number of results than it had members."""


@dataclass(frozen=True)
class Made:
    """Calls that were made, as one unless there is one: a result for each, or the error that ended the only one.

    `elapsed_s` is how long the device took; 0 where it failed.
    """

    calls: tuple[Waiting, ...]
    results: tuple[Any, ...]
    error: BaseException | None
    elapsed_s: float

    def settle(self) -> None:
        """Give each call its result, or the error; what was given up meanwhile stays so."""
        for place, call in enumerate(self.calls):
            with suppress(InvalidStateError):  # the device was let go while the call ran
                if self.error is None:
                    call.future.set_result(self.results[place])
                else:
                    call.future.set_exception(self.error)


class _Trouble(Enum):
    """Why a call was not made."""

    MEMORY = auto()
    LOST = auto()
    OTHER = auto()


class Forwards:
    """Makes chunks, and tells the limits what they took. For the device thread alone, but for reading `since_s`."""

    def __init__(self, driver: BackendDriver, limits: Limits, clock: Callable[[], float] = time.perf_counter) -> None:
        self._driver = driver
        self._limits = limits
        self._clock = clock
        self.since_s: float | None = None
        """Since when the call in hand is made, by time.monotonic; None without one."""

    def make(self, calls: tuple[Waiting, ...]) -> Iterator[Made]:
        """Make the calls, and give what was made piece by piece, as soon as it is."""
        if len(calls) == 1:
            yield self._single(calls[0])
            return
        made = self._merged(calls)
        match made:
            case Made():
                yield made
            case _Trouble.MEMORY:
                self._make_room(calls[0].measure, sum(call.call.rows for call in calls))
                half = len(calls) // 2
                yield from self.make(calls[:half])
                yield from self.make(calls[half:])
            case _:
                fault = False
                for call in calls:
                    made = self._single(call)
                    fault = fault or made.error is not None
                    yield made
                if not fault:  # it lies in making them together, which would fail at each step
                    log.warning("these %d runs share no further device call", len(calls))
                    _part(calls)

    def _merged(self, calls: tuple[Waiting, ...]) -> Made | _Trouble:
        # The error is dropped here, with its traceback that holds tensors of all: what is tried next needs the room.
        joint = calls[0].call.joint
        assert joint is not None, "calls share a key only where they can be made as one"
        try:
            results, elapsed_s = self._timed(lambda: _together(joint, [call.call for call in calls]))
        except BaseException as error:  # whose it is shows when each is made alone
            trouble = self._trouble(error)
            if trouble is _Trouble.LOST:
                return Made(calls, (), error, 0.0)
            log.warning(
                "a device call of %d runs failed (%s); it is made in pieces",
                len(calls),
                type(error).__name__,
                exc_info=trouble is _Trouble.OTHER,
                extra={"key": str(calls[0].key)},
            )
            return trouble
        self._note(calls[0].measure, sum(call.call.rows for call in calls), elapsed_s)
        return Made(calls, tuple(results), None, elapsed_s)

    def _single(self, waiting: Waiting) -> Made:
        try:
            result, elapsed_s = self._made(waiting, waiting.call)
        except BaseException as error:  # noqa: BLE001 - it belongs to the run that made the call
            # The call's tensors go now: the error holds its frames, and they lead to the future that holds the error.
            clear_frames(error.__traceback__)
            return Made((waiting,), (), error, 0.0)
        return Made((waiting,), (result,), None, elapsed_s)

    def _made(self, waiting: Waiting, call: DeviceCall) -> tuple[Any, float]:
        """The result of one run's call, made in halves where it does not fit, and how long it took."""
        measure, joint = waiting.measure, call.joint
        try:
            result, elapsed_s = self._timed(call)
        except BaseException as error:
            if self._trouble(error) is not _Trouble.MEMORY:
                raise
            if joint is None or (halves := joint.halves(call)) is None:
                if waiting.member is not None:
                    waiting.member.too_large = TooLarge(call.part, call.rows)
                raise
        else:
            self._note(measure, call.rows, elapsed_s)
            return result, elapsed_s
        self._make_room(measure, call.rows)
        first, first_s = self._made(waiting, halves[0])
        second, second_s = self._made(waiting, halves[1])
        return joint.whole(first, second), first_s + second_s

    def _timed(self, make: Callable[[], Any]) -> tuple[Any, float]:
        self.since_s = time.monotonic()
        began_s = self._clock()
        try:
            result = make()
            self._driver.synchronize()
        finally:
            self.since_s = None
        return result, self._clock() - began_s

    def _trouble(self, error: BaseException) -> _Trouble:
        if self._driver.is_lost(error):
            return _Trouble.LOST
        return _Trouble.MEMORY if self._driver.is_out_of_memory(error) else _Trouble.OTHER

    def _make_room(self, measure: MeasureKey | None, rows: int) -> None:
        """Learn what was too large, and give back what the try left."""
        if measure is not None:
            self._limits.note_too_large(measure, rows)
        try:
            self._driver.release()
        except Exception:  # what is wrong with the device, the calls that are made next tell to their runs
            log.warning("the device gives no memory back", exc_info=True)

    def _note(self, measure: MeasureKey | None, rows: int, elapsed_s: float) -> None:
        if measure is not None:
            self._limits.note(measure, rows, elapsed_s)


def _part(calls: Sequence[Waiting]) -> None:
    for call in calls:
        if call.member is not None:
            call.member.alone = True


def _together(joint: Joint, calls: Sequence[DeviceCall]) -> Sequence[Any]:
    results = joint.together(calls)
    if len(results) != len(calls):
        raise UnevenResults(f"A merged call of {len(calls)} runs gave {len(results)} results.")
    return results
