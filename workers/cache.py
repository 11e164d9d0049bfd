"""ModelCache: loaded models, pinned while in use, least recently used out first."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# Lets a wait be woken: it is called with what wakes the wait, and is entered while the wait lasts.
Wakeable = Callable[[Callable[[], object]], AbstractContextManager[None]]


def _never_woken(wake: Callable[[], object]) -> AbstractContextManager[None]:
    del wake
    return nullcontext()


class _Entry(Generic[V]):
    """A model that is loaded, or being loaded; guarded by the cache's condition."""

    def __init__(self) -> None:
        self.model: Future[V] = Future()
        self.pins = 0


class ModelCache(Generic[K, V]):
    """At most `size` models. One load per key however many ask at once; nobody else waits for it.

    Where every place is taken by a model in use, the next load waits until one is let go.
    Owns its entries; safe to share between threads.
    """

    def __init__(self, size: int, on_evicted: Callable[[], object] = lambda: None) -> None:
        """`on_evicted` runs after a model was dropped, in the thread that needs its place."""
        if size < 1:
            raise ValueError(f"size {size}; a cache holds at least one model")
        self._size = size
        self._on_evicted = on_evicted
        self._changed = threading.Condition()
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()  # least recently used first

    @contextmanager
    def use(
        self,
        key: K,
        load: Callable[[], V],
        *,
        check: Callable[[], object] = lambda: None,
        woken_by: Wakeable = _never_woken,
    ) -> Iterator[tuple[V, bool]]:
        """The model, and whether it was loaded before; it stays while inside.

        A wait ends when `check` raises, which is asked whenever what `woken_by` was given is called.
        Raises what `load` raises, to everyone who waited for it; a failed load leaves nothing.
        """
        entry, hit = self._pinned(key, load, check, woken_by)
        try:
            yield entry.model.result(), hit
        finally:
            self._unpin(entry)

    def loaded(self) -> tuple[K, ...]:
        """The keys of the models that are loaded now, least recently used first."""
        with self._changed:
            return tuple(key for key, entry in self._entries.items() if _is_loaded(entry))

    def clear(self) -> None:
        """Drop every model that nobody uses."""
        with self._changed:
            idle = [key for key, entry in self._entries.items() if not entry.pins]
            for key in idle:
                del self._entries[key]
        if idle:
            self._on_evicted()

    def _pinned(
        self, key: K, load: Callable[[], V], check: Callable[[], object], woken_by: Wakeable
    ) -> tuple[_Entry[V], bool]:
        while True:
            evicted = False
            with woken_by(self._wake), self._changed:
                while (entry := self._entries.get(key)) is None and not self._has_room():
                    if self._evict():
                        evicted = True
                    else:
                        check()
                        self._changed.wait()
                mine = entry is None
                if entry is None:
                    entry = self._entries[key] = _Entry()
                entry.pins += 1
                self._entries.move_to_end(key)
                hit = entry.model.done()
                try:
                    while not mine and not entry.model.done():
                        check()
                        self._changed.wait()
                except BaseException:
                    entry.pins -= 1
                    raise
            if evicted:
                self._on_evicted()
            if mine:
                self._load(key, entry, load)
            if not entry.model.cancelled():
                return entry, hit
            self._unpin(entry)  # its loader was interrupted: whoever still wants the model loads it

    def _load(self, key: K, entry: _Entry[V], load: Callable[[], V]) -> None:
        try:
            model = load()
        except BaseException as error:
            with self._changed:
                del self._entries[key]
                entry.pins -= 1
                if isinstance(error, Exception):
                    entry.model.set_exception(error)
                else:
                    entry.model.cancel()
                self._changed.notify_all()
            raise
        with self._changed:
            entry.model.set_result(model)
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._entries) < self._size

    def _evict(self) -> bool:
        for key, entry in self._entries.items():
            if not entry.pins and _is_loaded(entry):
                del self._entries[key]
                return True
        return False

    def _unpin(self, entry: _Entry[V]) -> None:
        with self._changed:
            entry.pins -= 1
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _is_loaded(entry: _Entry[V]) -> bool:
    if not entry.model.done() or entry.model.cancelled():
        return False
    return entry.model.exception() is None
