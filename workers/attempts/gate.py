"""The gate to a device: attempts pass in the order in which they came, beside others or alone.

arrive ─► enter(alone=False) ─┬─► settle ─┬─► leave
                              │           └─► wait ─► go_on, or hold    nobody begins beside it meanwhile
                              └─► enter(alone=True) ─► leave    the claim told that its job runs alone
"""

import threading
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(eq=False)
class Place:
    """Somebody's turn at a gate, by order of arrival; the gate alone changes it.

    `accompanied` says that it was inside together with others, since it went in last. Inside, `unsettled` says that it
    may yet have to be alone, `waits` that it cannot begin yet, `surplus` that another one cannot either and has
    precedence, and `holds` that it has the device as a whole.
    """

    number: int
    alone: bool = False
    accompanied: bool = False
    unsettled: bool = False
    waits: bool = False
    surplus: bool = False
    holds: bool = False

    @property
    def closes(self) -> bool:
        """Whether nobody is to begin beside it."""
        return self.alone or self.waits or self.holds


class Gate:
    """Lets in whoever is first in line: beside others, or once nobody else is inside. Safe to share between threads.

    One that waits to be alone lets nobody in before it, nor does one inside that waits or holds the device beside it.
    `on_crowded` is told when any of this begins or somebody is alone inside (True), and when none is so any more
    (False), `on_surplus` when another one inside is surplus: both under the gate's lock, so they must not block, nor
    call back.
    """

    def __init__(
        self,
        on_crowded: Callable[[bool], object] = lambda _: None,
        on_surplus: Callable[[], object] = lambda: None,
    ) -> None:
        self._on_crowded = on_crowded
        self._on_surplus = on_surplus
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

    def enter(self, place: Place, *, alone: bool, timeout_s: float, unless_held_up: bool = False) -> bool:
        """Wait in line, and go in; false after `timeout_s` or a `wake`: then it still waits.

        Who is inside goes out for it, and waits where its number stands. `unless_held_up` does not wait behind one that
        cannot begin. One that is not alone keeps the next out until it is settled that it need not be.
        """
        with self._changed:
            self._stand_in_line(place, alone)
            wakes = self._wakes

            def is_over() -> bool:
                return self._may_enter(place) or self._wakes != wakes or (unless_held_up and self._behind(place))

            self._changed.wait_for(is_over, timeout_s)
            if not self._may_enter(place):
                return False
            self._line.remove(place)
            if self._inside:
                for each in (place, *self._inside):
                    each.accompanied = True
            self._inside.append(place)
            place.unsettled = not alone
            self._tell()
            return True

    def settle(self, place: Place) -> None:
        """Let in whoever is next: this one stays as it is. Idempotent."""
        with self._changed:
            place.unsettled = False
            self._tell()

    def leave(self, place: Place) -> None:
        """Go, from inside or from the line. Idempotent."""
        with self._changed:
            for places in (self._line, self._inside):
                if place in places:
                    places.remove(place)
            self._tell()

    def wait(self, place: Place) -> None:
        """Say that one inside cannot begin yet.

        At most one is to wait at a time: one that waits to be alone, or else the first that came. The others are
        `surplus` as long as it does, but for one that holds the device.
        """
        with self._changed:
            place.waits = place in self._inside
            self._tell()

    def go_on(self, place: Place) -> None:
        """Say that it waits no more. Idempotent."""
        with self._changed:
            place.waits = False
            self._tell()

    def hold(self, place: Place) -> bool:
        """Have the device as a whole, from inside; whether nobody older keeps it from that."""
        with self._changed:
            place.holds = place in self._inside
            self._tell()
            return not self._behind(place)

    def held_up(self, place: Place) -> bool:
        """Whether one that came before waits, is alone or holds the device: it cannot go in before that is over."""
        with self._changed:
            return self._behind(place)

    def wake(self) -> None:
        """Let every `enter` that waits return, whether it may go in or not."""
        with self._changed:
            self._wakes += 1
            self._changed.notify_all()

    def _stand_in_line(self, place: Place, alone: bool) -> None:
        if place in self._inside:
            self._inside.remove(place)
        place.alone, place.accompanied = alone, False
        place.unsettled = place.waits = place.surplus = place.holds = False
        if place not in self._line:
            insort(self._line, place, key=lambda each: each.number)
        self._tell()

    def _may_enter(self, place: Place) -> bool:
        if self._line[0] is not place or any(each.closes or each.unsettled for each in self._inside):
            return False
        return not (place.alone and self._inside)

    def _behind(self, place: Place) -> bool:
        return any(each.number < place.number for each in self._closing())

    def _closing(self) -> Iterator[Place]:
        return (place for place in (*self._inside, *self._line) if place.closes)

    def _tell(self) -> None:
        self._changed.notify_all()
        to_be_alone = any(each.alone for each in self._line)
        before = [each for each in self._inside if each.surplus]
        for each in self._inside:
            each.surplus = each.waits and not each.holds and (to_be_alone or self._behind(each))
        if any(each.surplus and each not in before for each in self._inside):
            self._on_surplus()
        crowded = any(self._closing())
        if crowded is not self._crowded:
            self._crowded = crowded
            self._on_crowded(crowded)
