"""The gate to a device: who may be inside together, and in what order."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import given
from hypothesis import strategies as st

from tests.support.waiting import eventually
from workers.attempts.gate import Gate, Place

AT_ONCE_S = 0.0
LONG_S = 30.0


@contextmanager
def waiting(gate: Gate, place: Place, *, alone: bool) -> Iterator[list[bool]]:
    """Somebody who waits to enter in a thread of his own; what he was told, once he was."""
    told: list[bool] = []
    thread = threading.Thread(target=lambda: told.append(gate.enter(place, alone=alone, timeout_s=LONG_S)))
    thread.start()
    try:
        yield told
    finally:
        thread.join()


def entered(gate: Gate, place: Place) -> bool:
    """Whether it could go in at once, to stay beside others."""
    went_in = gate.enter(place, alone=False, timeout_s=AT_ONCE_S)
    gate.settle(place)
    return went_in


def test_those_beside_others_enter_at_once_and_know_of_each_other() -> None:
    gate = Gate()
    first, second, third = gate.arrive(), gate.arrive(), gate.arrive()

    assert entered(gate, first)
    assert not first.accompanied
    assert entered(gate, second)
    gate.leave(second)
    gate.leave(first)
    assert entered(gate, third)

    assert (first.accompanied, second.accompanied, third.accompanied) == (True, True, False)


def test_who_is_to_be_alone_waits_until_everybody_left_and_lets_nobody_in_before() -> None:
    gate = Gate()
    inside, alone, late = gate.arrive(), gate.arrive(), gate.arrive()
    assert entered(gate, inside)

    assert not gate.enter(alone, alone=True, timeout_s=AT_ONCE_S)
    assert not entered(gate, late), "he came later"

    with waiting(gate, alone, alone=True) as told:
        gate.leave(inside)
    assert told == [True]
    assert not entered(gate, late), "somebody is alone inside"
    with waiting(gate, late, alone=False) as told:
        gate.leave(alone)
    assert told == [True]
    assert not alone.accompanied


def test_who_learns_inside_that_he_is_to_be_alone_keeps_his_turn() -> None:
    gate = Gate()
    first, second = gate.arrive(), gate.arrive()
    assert entered(gate, first)
    assert entered(gate, second)

    assert not gate.enter(second, alone=True, timeout_s=AT_ONCE_S)
    assert gate.enter(first, alone=True, timeout_s=AT_ONCE_S)
    assert not gate.enter(second, alone=True, timeout_s=AT_ONCE_S)
    gate.leave(first)
    assert gate.enter(second, alone=True, timeout_s=AT_ONCE_S)
    assert not second.accompanied, "what was before he went out counts no more"


def test_who_leaves_the_line_holds_nobody_up() -> None:
    gate = Gate()
    inside, alone, late = gate.arrive(), gate.arrive(), gate.arrive()
    entered(gate, inside)
    gate.enter(alone, alone=True, timeout_s=AT_ONCE_S)

    with waiting(gate, late, alone=False) as told:
        gate.leave(alone)
        gate.leave(alone)

    assert told == [True]


def test_a_wake_lets_who_waits_look_around() -> None:
    gate = Gate()
    inside, alone = gate.arrive(), gate.arrive()
    entered(gate, inside)

    with waiting(gate, alone, alone=True) as told:

        def woken() -> list[bool]:
            gate.wake()
            return told

        eventually(woken)

    assert told == [False]


def test_it_is_told_when_it_gets_crowded_and_when_that_is_over() -> None:
    told: list[bool] = []
    gate = Gate(told.append)
    inside, alone, other = gate.arrive(), gate.arrive(), gate.arrive()
    entered(gate, inside)
    assert told == []

    gate.enter(alone, alone=True, timeout_s=AT_ONCE_S)
    assert told == [True], "somebody waits to be alone"
    gate.enter(other, alone=True, timeout_s=AT_ONCE_S)
    gate.leave(inside)
    gate.enter(alone, alone=True, timeout_s=AT_ONCE_S)
    gate.leave(alone)
    assert told == [True], "the next one waits"
    gate.leave(other)
    assert told == [True, False]


def test_while_one_inside_waits_nobody_comes_in_and_it_is_told_so() -> None:
    told: list[bool] = []
    gate = Gate(told.append)
    waits, late = gate.arrive(), gate.arrive()
    assert entered(gate, waits)

    gate.wait(waits)
    assert not entered(gate, late)
    assert gate.held_up(late)
    assert not gate.held_up(waits)
    gate.go_on(waits)

    assert entered(gate, late)
    assert told == [True, False]


def test_of_several_that_wait_all_but_the_first_that_came_are_surplus() -> None:
    gate = Gate()
    first, second, third = gate.arrive(), gate.arrive(), gate.arrive()
    for place in (first, second, third):
        assert entered(gate, place)

    for waits, surplus in ((second, []), (third, [third]), (first, [second, third])):
        gate.wait(waits)
        assert [place for place in (first, second, third) if place.surplus] == surplus

    gate.go_on(second)
    assert not second.surplus
    gate.leave(first)
    assert not third.surplus, "it is the first that waits now"


def test_those_that_wait_make_way_for_one_that_waits_to_be_alone() -> None:
    gate = Gate()
    inside, alone, waits = gate.arrive(), gate.arrive(), gate.arrive()
    for place in (inside, waits):
        assert entered(gate, place)
    assert not gate.enter(alone, alone=True, timeout_s=AT_ONCE_S)

    gate.wait(waits)
    gate.wait(inside)
    assert inside.surplus, "other workers count on the one that waits to be alone"
    assert waits.surplus


def test_one_that_waits_is_surplus_and_told_so_when_another_comes_to_wait_to_be_alone() -> None:
    told: list[bool] = []
    gate = Gate(on_surplus=lambda: told.append(True))
    inside, waits, alone = gate.arrive(), gate.arrive(), gate.arrive()
    for place in (inside, waits, alone):
        assert entered(gate, place)
    gate.wait(waits)
    assert (waits.surplus, told) == (False, [])

    assert not gate.enter(alone, alone=True, timeout_s=AT_ONCE_S)
    assert (waits.surplus, told) == (True, [True])

    gate.leave(alone)
    assert not waits.surplus


def test_one_that_holds_the_device_is_the_first_or_is_told_that_it_is_not_and_is_never_surplus() -> None:
    gate = Gate()
    first, second = gate.arrive(), gate.arrive()
    for place in (first, second):
        assert entered(gate, place)

    assert gate.hold(first)
    assert not gate.hold(second)
    gate.wait(second)
    assert not second.surplus, "it would have to be ended in the midst of its work"

    gate.leave(first)
    assert gate.hold(second)


def test_the_next_comes_in_once_the_one_before_knows_that_it_need_not_be_alone() -> None:
    gate = Gate()
    first, second, third = gate.arrive(), gate.arrive(), gate.arrive()
    assert gate.enter(first, alone=False, timeout_s=AT_ONCE_S)

    with waiting(gate, second, alone=False) as told:
        assert not told
        gate.settle(first)
    assert told == [True]

    gate.leave(first)
    assert gate.enter(second, alone=True, timeout_s=AT_ONCE_S), (
        "it learned that it is to be alone, and nobody is beside"
    )
    assert not gate.enter(third, alone=False, timeout_s=LONG_S, unless_held_up=True), "at once, since it is held up"


@given(st.lists(st.tuples(st.sampled_from(["arrive", "alone", "leave"]), st.integers(0, 5)), max_size=60))
def test_nobody_is_beside_one_who_is_alone_and_nobody_overtakes(moves: list[tuple[str, int]]) -> None:
    crowded: list[bool] = [False]
    gate = Gate(crowded.append)
    wishes: dict[Place, bool] = {}
    inside: list[Place] = []

    def let_in() -> None:
        """Everybody in line tries, the last first: order must not depend on who asks."""
        before = None
        while before != inside:
            before = list(inside)
            for place in [place for place in reversed(wishes) if place not in inside]:
                if gate.enter(place, alone=wishes[place], timeout_s=AT_ONCE_S):
                    gate.settle(place)
                    inside.append(place)

    for move, index in moves:
        if move == "leave":
            if wishes:
                place = list(wishes)[index % len(wishes)]
                gate.leave(place)
                del wishes[place]
                inside = [other for other in inside if other is not place]
        else:
            wishes[gate.arrive()] = move == "alone"
        let_in()

        line = [place for place in wishes if place not in inside]
        assert not any(wishes[place] for place in inside) or len(inside) == 1
        assert not line or not inside or max(place.number for place in inside) < line[0].number, "nobody overtakes"
        assert not line or inside, "nobody waits for nothing"
        assert not line or wishes[line[0]] or wishes[inside[0]], "nobody waits beside others"
        assert crowded[-1] is any(wishes.values())
