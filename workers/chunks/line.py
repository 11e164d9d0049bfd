"""The line of device calls that wait, and which are made next, together.

    oldest call ─► with it those of an equal key, oldest first, as far as limits allow ─► a chunk
                   whoever shared this key's last forward and is not there yet is waited for, a little;
                   so is whoever encodes its prompts, whose calls go before meanwhile, and who joins so much earlier

`choose` decides, and is a function of what it is given; `Line` keeps what it is given. Neither knows of torch, threads
or clocks.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from workers.chunks.calls import ChunkKey, DeviceCall
from workers.chunks.limits import Limits, MeasureKey
from workers.chunks.members import MISSES_MAX, Member

# How much of a call's time it waits for members that are late, or that prepare to join.
PATIENCE_SHARE = 0.25


@dataclass(eq=False)
class Waiting:
    """A call in the line, since `since_s`; `member` is None for calls of no run.

    `denoises` says that its member is to come again with calls of its kind: others wait for it. `passed_by` are the
    keys of which a later call was made before it.
    """

    call: DeviceCall
    member: Member | None
    since_s: float
    denoises: bool = False
    future: "Future[Any]" = field(default_factory=Future)
    passed_by: set[ChunkKey] = field(default_factory=set)
    shares: bool = field(init=False)
    key: ChunkKey = field(init=False)

    def __post_init__(self) -> None:
        self.shares = self.call.joint is not None and self.member is not None and not self.member.alone
        self.key = self.call.key if self.shares else ChunkKey.alone("it shares with nobody")

    @property
    def measure(self) -> MeasureKey | None:
        """What the call is measured as; None for one that is not."""
        if self.member is None or self.call.joint is None or not self.call.part:
            return None
        return MeasureKey(self.member.model, self.call.part, self.member.shape)

    @property
    def prepares(self) -> bool:
        """Whether its run is yet to denoise."""
        return self.member is not None and not (self.denoises or self.member.begun)


@dataclass(frozen=True)
class Flight:
    """A key's last forward: who took part and has not left, with how many rows each, its end, and how long it took."""

    rows: Mapping[Member, int]
    ended_s: float
    elapsed_s: float


@dataclass(frozen=True)
class Make:
    """Make these calls now, as one. `missed` were waited for in vain."""

    calls: tuple[Waiting, ...]
    missed: tuple[Member, ...] = ()


@dataclass(frozen=True)
class WaitUntil:
    """Make nothing before this time unless something changes: a call comes, a member leaves."""

    time_s: float


def choose(
    line: Sequence[Waiting],
    flights: Mapping[ChunkKey, Flight],
    preparing: Collection[Member],
    limits: Limits,
    now_s: float,
) -> Make | WaitUntil | None:
    """What is to be made of the calls in the line, oldest first; None of an empty one.

    `preparing` are those of whom a call that prepares was made, and none that denoises has come.
    """
    windows_s = [_window_ends_s(call, line, flights, limits) for call in line]
    ready = [call for call, ends_s in zip(line, windows_s, strict=True) if ends_s <= now_s]
    if not ready:
        return WaitUntil(min(windows_s)) if windows_s else None
    head = ready[0]
    chunk = _chunk(head, line, limits)
    flight = flights.get(head.key)
    if flight is None:
        return Make(chunk)
    there = {each.member for each in line if each.key == head.key}
    late = _late(flight, chunk, there, limits)
    waits_until_s = max(head.since_s, flight.ended_s) + PATIENCE_SHARE * _expected_s(chunk, flight, late, limits)
    has_room = len(there) == len(chunk) and _has_room(chunk, 1, limits)
    joining = [member for member in preparing if has_room and _may_join(member, head.member)]
    absent = _not_in(line, (*late, *joining))
    if waits_until_s <= now_s:
        return Make(chunk, missed=absent)
    prepares = (each for each in line if each.prepares and _may_join(each.member, head.member))
    first = _first_of(late, head, line) or next(prepares, None)
    if first is not None:  # its member comes once this call of another key is made
        return Make(_chunk(first, line, limits))
    return WaitUntil(waits_until_s) if absent else Make(chunk)


def _window_ends_s(call: Waiting, line: Sequence[Waiting], flights: Mapping[ChunkKey, Flight], limits: Limits) -> float:
    """When a call has waited long enough for others: the first of a run, of a key that nobody is in flight with."""
    member = call.member
    if member is None or not member.window_s or member.begun or not (call.denoises and call.shares):
        return call.since_s
    if call.key in flights:
        return call.since_s
    alike = [each for each in line if each.key == call.key]
    first = alike[0]
    assert first.member is not None, "calls of one key have members, or none is of that key"
    chunk = _chunk(first, line, limits)
    if len(chunk) < len(alike) or not _has_room(chunk, 1, limits):
        return first.since_s
    return first.since_s + first.member.window_s


def _chunk(head: Waiting, line: Iterable[Waiting], limits: Limits) -> tuple[Waiting, ...]:
    """The call, and those of its key as far as they fit, in the order in which they came."""
    chunk: list[Waiting] = []
    members: set[Member | None] = set()
    for each in line:
        if each.key != head.key or each.member in members:
            continue
        if chunk and not _has_room((*chunk, each), 0, limits):
            break
        chunk.append(each)
        members.add(each.member)
    return tuple(chunk)


def _has_room(chunk: Sequence[Waiting], more_rows: int, limits: Limits) -> bool:
    """Whether the calls, and another one of so many rows (0: no other), are not too many."""
    size = len(chunk) + (1 if more_rows else 0)
    sizes_max = [each.member.size_max for each in chunk if each.member is not None and each.member.size_max is not None]
    if sizes_max and size > min(sizes_max):
        return False
    measure = chunk[0].measure
    return measure is None or sum(each.call.rows for each in chunk) + more_rows <= limits.rows_max(measure)


def _late(flight: Flight, chunk: Sequence[Waiting], there: Collection[Member | None], limits: Limits) -> list[Member]:
    """Who shared the key's last forward, is not there, and would find room."""
    if len(there) > len(chunk):  # more are there than fit
        return []
    late = [member for member in flight.rows if member not in there and member.misses < MISSES_MAX]
    return [member for member in late if _has_room(chunk, flight.rows[member], limits)]


def _may_join(member: Member | None, head: Member | None) -> bool:
    """Whether one that prepares is to denoise what the head's run does, and was not waited for in vain too often."""
    if member is None or head is None or member.alone or member.misses >= MISSES_MAX:
        return False
    return (member.model, member.shape) == (head.model, head.shape)


def _expected_s(chunk: Sequence[Waiting], flight: Flight, late: Sequence[Member], limits: Limits) -> float:
    """How long the call takes once those are there who are late."""
    measure = chunk[0].measure
    rows = sum(each.call.rows for each in chunk) + sum(flight.rows[member] for member in late)
    expected_s = None if measure is None else limits.expected_s(measure, rows)
    return flight.elapsed_s if expected_s is None else expected_s


def _not_in(line: Sequence[Waiting], members: Sequence[Member]) -> tuple[Member, ...]:
    there = {each.member for each in line}
    return tuple(member for member in members if member not in there)


def _first_of(members: Sequence[Member], head: Waiting, line: Sequence[Waiting]) -> Waiting | None:
    """The first call of these members that may pass those before it: of a key that passed none of them yet."""
    for place, each in enumerate(line):
        if each.member in members and each.key != head.key:
            passed = islice(line, place)
            return None if any(each.key in before.passed_by for before in passed if before.key != each.key) else each
    return None


class Line:
    """The calls that wait, and what was made of each key last. Not safe to share between threads: its owner's lock is.

    Whoever owns it has the calls made that `next` gives, and tells by `made` what was.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._calls: list[Waiting] = []  # oldest first
        self._flights: dict[ChunkKey, Flight] = {}
        self._preparing: set[Member] = set()
        self._idle = False  # the device stands still for somebody, as of the last decision

    def add(self, call: Waiting) -> None:
        """Let a call wait behind the others."""
        self._calls.append(call)
        if call.denoises and call.member is not None:
            self._preparing.discard(call.member)
        if call.denoises and call.shares and call.member is not None:
            if call.member.key == call.key:  # twice in a row: where it was before, it comes no more
                self._leave(call.member, but=call.key)
            call.member.key = call.key

    def next(self, now_s: float) -> tuple[Waiting, ...] | WaitUntil | None:
        """Take out the calls to be made now, as one; none of them can be cancelled any more. None where none waits."""
        while True:
            self._calls = [call for call in self._calls if not call.future.cancelled()]
            decision = choose(self._calls, self._flights, self._preparing, self._limits, now_s)
            idle, self._idle = self._idle, isinstance(decision, WaitUntil)
            if not isinstance(decision, Make):
                return decision
            if idle:
                for member in decision.missed:
                    member.misses += 1
            self._take_out(decision.calls)
            if taken := tuple(call for call in decision.calls if call.future.set_running_or_notify_cancel()):
                return taken

    def made(self, calls: Sequence[Waiting], elapsed_s: float, now_s: float) -> None:
        """Note that these calls were made as one; it counts where they are steps of their runs."""
        self._preparing.update(call.member for call in calls if call.prepares and call.member is not None)
        rows = {call.member: call.call.rows for call in calls if call.denoises and call.member is not None}
        members = list(rows)
        for member in members:
            member.count(len(members))
        for other in members[1:]:
            members[0].meet(other)
        if members and calls[0].shares:
            self._flights[calls[0].key] = Flight(rows, now_s, elapsed_s)

    def leave(self, member: Member) -> None:
        """Wait for this member no more, unless it takes part again."""
        self._preparing.discard(member)
        self._leave(member)

    def clear(self) -> Sequence[Waiting]:
        """Take out all calls."""
        calls, self._calls = self._calls, []
        return calls

    @property
    def empty(self) -> bool:
        """Whether no call waits."""
        return not self._calls

    def _take_out(self, calls: Sequence[Waiting]) -> None:
        key = calls[0].key
        for each in self._calls:
            if each in calls:
                break
            each.passed_by.add(key)
        self._calls = [each for each in self._calls if each not in calls]

    def _leave(self, member: Member, but: ChunkKey | None = None) -> None:
        for key, flight in list(self._flights.items()):
            if key == but or member not in flight.rows:
                continue
            rows = {each: rows for each, rows in flight.rows.items() if each is not member}
            if rows:
                self._flights[key] = replace(flight, rows=rows)
            else:
                del self._flights[key]
