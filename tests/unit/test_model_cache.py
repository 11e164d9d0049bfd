"""The model cache: one load for many, pins, least recently used out."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.support.waiting import eventually
from workers.cache import ModelCache

TIMEOUT_S = 10.0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(12) as threads:
        yield threads


class Store:
    """A cache of text models, with a count of loads."""

    def __init__(self, size: int) -> None:
        self.evictions = 0
        self.loads: list[str] = []
        self.cache: ModelCache[str, str] = ModelCache(size, self._evicted)

    def _evicted(self) -> None:
        self.evictions += 1

    def use(self, key: str) -> bool:
        """Whether it was a hit."""
        with self.cache.use(key, lambda: self._load(key)) as (model, hit):
            assert model == key.upper()
        return hit

    def _load(self, key: str) -> str:
        self.loads.append(key)
        return key.upper()


def test_many_who_ask_at_once_share_one_load(pool: ThreadPoolExecutor) -> None:
    cache: ModelCache[str, str] = ModelCache(1)
    release, loads = threading.Event(), []

    def load() -> str:
        loads.append(threading.get_ident())
        assert release.wait(TIMEOUT_S)
        return "MODEL"

    def use() -> tuple[str, bool]:
        with cache.use("model", load) as used:
            return used

    futures = [pool.submit(use) for _ in range(8)]
    eventually(lambda: loads)
    release.set()
    assert [future.result(TIMEOUT_S) for future in futures].count(("MODEL", False)) >= 1
    assert len(loads) == 1
    assert use() == ("MODEL", True)


def test_a_load_holds_up_nobody_who_needs_another_model(pool: ThreadPoolExecutor) -> None:
    cache: ModelCache[str, str] = ModelCache(2)
    release = threading.Event()

    def use(key: str, load: Callable[[], str]) -> str:
        with cache.use(key, load) as (model, _):
            return model

    def slow() -> str:
        assert release.wait(TIMEOUT_S)
        return "SLOW"

    slowly = pool.submit(use, "slow", slow)
    assert pool.submit(use, "quick", lambda: "QUICK").result(TIMEOUT_S) == "QUICK"
    assert not slowly.done()
    release.set()
    assert slowly.result(TIMEOUT_S) == "SLOW"


def test_the_least_recently_used_model_goes_first() -> None:
    store = Store(2)
    assert [store.use(key) for key in ("a", "b", "a", "c")] == [False, False, True, False]
    assert store.cache.loaded() == ("a", "c")
    assert store.evictions == 1
    assert store.use("a")
    assert not store.use("b")


def test_a_model_in_use_stays_and_the_next_load_waits_for_it(pool: ThreadPoolExecutor) -> None:
    store = Store(1)
    with store.cache.use("pinned", lambda: "PINNED"):
        other = pool.submit(store.use, "other")
        assert store.cache.loaded() == ("pinned",)
        assert not other.done()
    assert other.result(TIMEOUT_S) is False
    assert store.cache.loaded() == ("other",)


def test_a_failed_load_leaves_nothing_and_tells_everyone_who_waited(pool: ThreadPoolExecutor) -> None:
    cache: ModelCache[str, str] = ModelCache(1)
    release, loading = threading.Event(), threading.Event()

    def load() -> str:
        loading.set()
        assert release.wait(TIMEOUT_S)
        raise OSError("half a file")

    def use(make: Callable[[], str]) -> str:
        with cache.use("model", make) as (model, _):
            return model

    first = pool.submit(use, load)
    assert loading.wait(TIMEOUT_S)
    waiting = [pool.submit(use, load) for _ in range(3)]
    eventually(lambda: cache._entries["model"].pins == 4)
    release.set()
    for future in (first, *waiting):
        with pytest.raises(OSError, match="half a file"):
            future.result(TIMEOUT_S)
    assert cache.loaded() == ()
    assert use(lambda: "MODEL") == "MODEL"


class Stop(BaseException):
    pass


def test_when_the_loading_job_is_stopped_one_that_waits_takes_over(pool: ThreadPoolExecutor) -> None:
    cache: ModelCache[str, str] = ModelCache(1)
    loading, stop = threading.Event(), threading.Event()

    def stopped() -> str:
        loading.set()
        assert stop.wait(TIMEOUT_S)
        raise Stop

    def use(load: Callable[[], str]) -> str:
        with cache.use("model", load) as (model, _):
            return model

    first = pool.submit(use, stopped)
    assert loading.wait(TIMEOUT_S)
    second = pool.submit(use, lambda: "MODEL")
    eventually(lambda: cache._entries["model"].pins == 2)
    stop.set()
    assert second.result(TIMEOUT_S) == "MODEL"
    with pytest.raises(Stop):
        first.result(TIMEOUT_S)


def test_a_wait_for_room_ends_when_its_job_is_stopped(pool: ThreadPoolExecutor) -> None:
    cache: ModelCache[str, str] = ModelCache(1)
    stopped = threading.Event()
    wakes: Future[Callable[[], object]] = Future()

    def check() -> None:
        if stopped.is_set():
            raise Stop

    @contextmanager
    def woken_by(wake: Callable[[], object]) -> Iterator[None]:
        wakes.set_result(wake)
        yield

    def use() -> None:
        with cache.use("other", lambda: "OTHER", check=check, woken_by=woken_by):
            pass

    with cache.use("pinned", lambda: "PINNED"):
        waiting = pool.submit(use)
        wake = wakes.result(TIMEOUT_S)
        stopped.set()
        wake()
        with pytest.raises(Stop):
            waiting.result(TIMEOUT_S)
    assert cache.loaded() == ("pinned",)


def test_clearing_drops_what_nobody_uses() -> None:
    store = Store(2)
    store.use("idle")
    with store.cache.use("busy", lambda: "BUSY"):
        store.cache.clear()
        assert store.cache.loaded() == ("busy",)


def test_a_cache_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ModelCache(0)
