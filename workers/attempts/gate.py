"""The gate to a device: attempts pass in the order in which they came, beside others or alone.

arrive ─► enter(alone=False) ─► leave
             └─► enter(alone=True) ─► leave      the claim told that its job runs alone; it keeps its turn
"""

import threading
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(eq=False)
class Place:
    """Somebody's turn at a gate, by order of arrival; the gate alone changes it.

    `accompanied` says that it was inside together with others, since it went in last.
    """

    number: int
    alone: bool = False
    accompanied: bool = False


class Gate:
    """Lets in whoever is first in line: beside others, or once nobody else is inside. Safe to share between threads.

    One that waits to be alone lets nobody in before it. `on_crowded` is told when that begins or somebody is alone
    inside (True), and when neither is so any more (False): under the gate's lock, so it must not block, nor call back.
    """

    def __init__(self, on_crowded: Callable[[bool], object] = lambda _: None) -> None:
        self._on_crowded = on_crowded
        self._changed = threading.Condition()  # guards what follows
        self._arrived = 0
        self._line: list[Place] = []  # by number
        self._inside: list[Place] = []
        self._crowded = False
        self._wakes = 0

    def arrive(self) -> Place:
        """A turn after all that were given before; to be left."""
        with self._changed:
            self._arrived += 1
            return Place(self._arrived)

    def enter(self, place: Place, *, alone: bool, timeout_s: float) -> bool:
        """Wait in line, and go in; false after `timeout_s` or a `wake`: then it still waits.

        Who is inside goes out for it, and waits where its number stands.
        """
        with self._changed:
            self._stand_in_line(place, alone)
            wakes = self._wakes
            self._changed.wait_for(lambda: self._may_enter(place) or self._wakes != wakes, timeout_s)
            if not self._may_enter(place):
                return False
            self._line.remove(place)
            if self._inside:
                for each in (place, *self._inside):
                    each.accompanied = True
            self._inside.append(place)
            self._tell()
            return True

    def leave(self, place: Place) -> None:
        """Go, from inside or from the line. Idempotent."""
        with self._changed:
            for places in (self._line, self._inside):
                if place in places:
                    places.remove(place)
            self._tell()

    def wake(self) -> None:
        """Let every `enter` that waits return, whether it may go in or not."""
        with self._changed:
            self._wakes += 1
            self._changed.notify_all()

    def _stand_in_line(self, place: Place, alone: bool) -> None:
        if place in self._inside:
            self._inside.remove(place)
        place.alone, place.accompanied = alone, False
        if place not in self._line:
            insort(self._line, place, key=lambda each: each.number)
        self._tell()

    def _may_enter(self, place: Place) -> bool:
        if self._line[0] is not place or _some_alone(self._inside):
            return False
        return not (place.alone and self._inside)

    def _tell(self) -> None:
        self._changed.notify_all()
        crowded = _some_alone(self._inside) or _some_alone(self._line)
        if crowded is not self._crowded:
            self._crowded = crowded
            self._on_crowded(crowded)


def _some_alone(places: Iterable[Place]) -> bool:
    return any(place.alone for place in places)
