"""ModelCache: loaded models within a budget of memory, pinned while in use, least recently used out first.

    use ─► line ─► admitted: pin + the model's bytes + the run's bytes, all at once ─► loaded ─► the run ─► let go
            ▲  evict what nobody uses, or wait │
            └──────────────────────────────────┘

Whoever waits in the line holds nothing, so no two runs can wait for each other.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from omnirt_tasks.contract import ResolvedRequest
from workers.memory import MemoryBudget

log = logging.getLogger(__name__)

# How many later comers may be admitted before one who waits. Some, since a run on a model that is loaded costs no
# load; no more, since ever-new ones would keep their model pinned, and whoever needs its place would wait for ever.
OVERTAKES_MAX = 8


class Loaded(Protocol):
    """What a cache holds."""

    @property
    def size_bytes(self) -> int:
        """What it takes of the device's memory."""
        ...

    @property
    def close(self) -> Callable[[], object]:
        """Ends what dropping it would not."""
        ...


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Loaded)

# Lets a wait be woken: it is called with what wakes the wait, and is entered while the wait lasts.
Wakeable = Callable[[Callable[[], object]], AbstractContextManager[None]]


def _not_told() -> None:
    """Nobody wants to know."""


def _never_woken(wake: Callable[[], object]) -> AbstractContextManager[None]:
    del wake
    return nullcontext()


class _Entry(Generic[V]):
    """A model that is loaded, or being loaded; guarded by the cache's condition.

    `size_bytes` is an estimate until the model tells.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.pins = 0
        self.loading = False
        self.model: V | None = None
        self.error: Exception | None = None


@dataclass(eq=False)
class _Waiter:
    """A place in the line, and what is waited for; `overtaken` counts the later comers that were admitted."""

    estimate_bytes: int
    working_bytes: int
    request: ResolvedRequest | None
    overtaken: int = 0


class ModelCache(Generic[K, V]):
    """At most `size` models, which with the runs on them take at most `budget_bytes`.

    One load per key however many ask at once; nobody else waits for it. Where neither room is free nor an unused
    model to evict, a request waits; at most OVERTAKES_MAX later ones go first.
    Owns its entries; safe to share between threads.
    """

    def __init__(
        self,
        size: int,
        on_evicted: Callable[[], object] = lambda: None,
        *,
        budget_bytes: int | None = None,
    ) -> None:
        """`on_evicted` gives back the memory of models that were dropped, in the thread that needs it.

        Without `budget_bytes`, `size` is the only bound.
        """
        if size < 1:
            raise ValueError(f"size {size}; a cache holds at least one model")
        self._size = size
        self._on_evicted = on_evicted
        self._changed = threading.Condition()
        self._budget = MemoryBudget(budget_bytes)
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()  # least recently used first
        self._measured_bytes: dict[K, int] = {}
        self._line: list[_Waiter] = []  # first come first

    @contextmanager
    def use(
        self,
        key: K,
        load: Callable[[], V],
        *,
        estimate_bytes: int = 0,
        working_bytes: int = 0,
        request: ResolvedRequest | None = None,
        check: Callable[[], object] = lambda: None,
        woken_by: Wakeable = _never_woken,
        waits: Callable[[], object] = _not_told,
        admitted: Callable[[], object] = _not_told,
    ) -> Iterator[tuple[V, bool]]:
        """The model, and whether it was loaded before; it stays while inside, and so do `working_bytes`.

        `estimate_bytes` are set aside for a load, until the model tells its size. A wait ends when `check` raises,
        which is asked whenever what `woken_by` was given is called. `waits` is told if there is no room yet, `admitted`
        once there is.
        Raises InsufficientMemory at once for what could never fit, with the remedy for `request`; or what `load`
        raises, to everyone who waited for it: a failed load leaves nothing.
        """
        with woken_by(self._wake):
            entry, hit = self._admitted(key, _Waiter(estimate_bytes, working_bytes, request), check, waits)
        try:
            admitted()
            self._loaded(key, entry, load, check, woken_by)
            self._budget.require(entry.size_bytes, working_bytes, request)  # it may be larger than was estimated
            yield _model(entry), hit
        finally:
            self._let_go(key, entry, working_bytes)

    def loaded(self) -> dict[K, int]:
        """The models that are loaded now and their sizes in bytes, least recently used first."""
        with self._changed:
            return {key: entry.size_bytes for key, entry in self._entries.items() if entry.model is not None}

    def clear(self) -> None:
        """Drop every model that nobody uses."""
        with self._changed:
            idle = [self._entries.pop(key) for key in self._idle()]
        self._drop(idle)

    # In the line

    def _admitted(
        self, key: K, waiter: _Waiter, check: Callable[[], object], waits: Callable[[], object]
    ) -> tuple[_Entry[V], bool]:
        """Wait for room, and take it."""
        with self._changed:
            self._line.append(waiter)
        told = False
        try:
            while True:
                with self._changed:
                    while (evicted := self._make_room(key, waiter)) is None and told:
                        check()
                        self._changed.wait()
                    if evicted == []:
                        return self._take(key, waiter)
                if evicted is None:  # outside the lock, for whoever is told may want it
                    waits()
                    told = True
                else:
                    self._drop(evicted)
        finally:
            with self._changed:
                self._line.remove(waiter)
                self._changed.notify_all()

    def _make_room(self, key: K, waiter: _Waiter) -> list[_Entry[V]] | None:
        """The models taken out to make room: none where there is room. None when there is only waiting."""
        entry = self._entries.get(key)
        model_bytes = self._model_bytes(key, waiter.estimate_bytes)
        self._budget.require(model_bytes, waiter.working_bytes, waiter.request)
        if any(earlier.overtaken >= OVERTAKES_MAX for earlier in self._before(waiter)):
            return None
        more = 0 if entry is not None else 1
        lacking_places = len(self._entries) + more - self._size
        lacking_bytes = self._budget.lacking_bytes(waiter.working_bytes + more * model_bytes)
        victims: list[K] = []
        for idle in self._idle():
            if lacking_places <= 0 and lacking_bytes <= 0:
                break
            if idle != key:
                victims.append(idle)
                lacking_places -= 1
                lacking_bytes -= self._entries[idle].size_bytes
        if lacking_places > 0 or lacking_bytes > 0:
            return None  # to evict would not be enough
        return [self._entries.pop(victim) for victim in victims]

    def _take(self, key: K, waiter: _Waiter) -> tuple[_Entry[V], bool]:
        for earlier in self._before(waiter):
            earlier.overtaken += 1
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(self._model_bytes(key, waiter.estimate_bytes))
            self._budget.take(entry.size_bytes)
        self._budget.take(waiter.working_bytes)
        entry.pins += 1
        self._entries.move_to_end(key)
        return entry, entry.model is not None

    def _before(self, waiter: _Waiter) -> list[_Waiter]:
        return self._line[: self._line.index(waiter)]

    def _model_bytes(self, key: K, estimate_bytes: int) -> int:
        if (entry := self._entries.get(key)) is not None:
            return entry.size_bytes
        return self._measured_bytes.get(key, estimate_bytes)

    def _idle(self) -> list[K]:
        return [key for key, entry in self._entries.items() if not entry.pins]

    # Loading

    def _loaded(
        self, key: K, entry: _Entry[V], load: Callable[[], V], check: Callable[[], object], woken_by: Wakeable
    ) -> None:
        """See that the model is loaded, by this thread or another."""
        with woken_by(self._wake), self._changed:
            while entry.loading:
                check()
                self._changed.wait()
            if entry.error is not None:
                raise entry.error
            if entry.model is not None:
                return
            entry.loading = True  # nobody has begun, or whoever did was interrupted
        try:
            model = load()
        except BaseException as error:
            with self._changed:
                entry.loading = False
                if isinstance(error, Exception):
                    entry.error = error
                    self._forget(key, entry)
                self._changed.notify_all()
            raise
        with self._changed:
            self._budget.take(model.size_bytes - entry.size_bytes)
            entry.size_bytes = self._measured_bytes[key] = model.size_bytes
            entry.model, entry.loading = model, False
            excess = self._excess()
            self._changed.notify_all()
        self._drop(excess)

    def _excess(self) -> list[_Entry[V]]:
        """Models taken out since one turned out larger than was estimated."""
        excess: list[_Entry[V]] = []
        lacking_bytes = self._budget.lacking_bytes()
        for key in self._idle():
            if lacking_bytes <= 0:
                break
            excess.append(self._entries.pop(key))
            lacking_bytes -= excess[-1].size_bytes
        return excess

    # Letting go

    def _let_go(self, key: K, entry: _Entry[V], working_bytes: int) -> None:
        with self._changed:
            entry.pins -= 1
            self._budget.give_back(working_bytes)
            if not entry.pins and entry.model is None and entry.error is None:
                self._forget(key, entry)  # whoever loaded it was interrupted, and nobody else wants it
            if not entry.pins:
                entry.error = None  # its traceback holds what was half loaded
            excess = self._excess()
            self._changed.notify_all()
        self._drop(excess)

    def _forget(self, key: K, entry: _Entry[V]) -> None:
        del self._entries[key]
        self._budget.give_back(entry.size_bytes)

    def _drop(self, evicted: list[_Entry[V]]) -> None:
        """Close models that were taken out and give their memory back; outside the lock, for both may take long."""
        if not evicted:
            return
        freed_bytes = sum(entry.size_bytes for entry in evicted)
        for entry in evicted:
            model, entry.model = _model(entry), None  # whoever used it last may still hold the entry
            try:
                model.close()
            except Exception:
                log.exception("a model could not be closed")
            del model
        try:
            self._on_evicted()
        finally:
            with self._changed:
                self._budget.give_back(freed_bytes)
                self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _model(entry: _Entry[V]) -> V:
    assert entry.model is not None, "a model that was taken out or lent is loaded"
    return entry.model
