"""The model cache: one load for many, pins, a budget of memory, least recently used out, and nobody waits for ever."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnirt_tasks.errors import InsufficientMemory
from tests.support.waiting import eventually
from workers.cache import OVERTAKES_MAX, ModelCache

TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Model:
    """What a cache of these tests holds."""

    name: str
    size_bytes: int = 0
    close: Callable[[], object] = lambda: None


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


class Store:
    """A cache whose models are as large as they were estimated, with a record of what happened to them."""

    def __init__(self, size: int = 100, budget_bytes: int | None = None) -> None:
        self.happened: list[str] = []
        self.cache: ModelCache[str, Model] = ModelCache(
            size, lambda: self.happened.append("released"), budget_bytes=budget_bytes
        )

    @contextmanager
    def using(
        self, key: str, size_bytes: int = 0, working_bytes: int = 0, *, measured_bytes: int | None = None
    ) -> Iterator[bool]:
        """Have the model while inside; yields whether it was a hit."""

        def load() -> Model:
            self.happened.append(f"loaded {key}")
            size = size_bytes if measured_bytes is None else measured_bytes
            return Model(key, size, lambda: self.happened.append(f"closed {key}"))

        with self.cache.use(key, load, estimate_bytes=size_bytes, working_bytes=working_bytes) as (model, hit):
            assert model.name == key
            yield hit

    def use(self, key: str, size_bytes: int = 0, working_bytes: int = 0, *, measured_bytes: int | None = None) -> bool:
        """Have the model for a moment; whether it was a hit."""
        with self.using(key, size_bytes, working_bytes, measured_bytes=measured_bytes) as hit:
            return hit

    @property
    def loaded(self) -> list[str]:
        return list(self.cache.loaded())

    @property
    def waiting(self) -> int:
        return len(self.cache._line)


# One load for many


def test_many_who_ask_at_once_share_one_load(pool: ThreadPoolExecutor) -> None:
    cache: ModelCache[str, Model] = ModelCache(1)
    release, loads = threading.Event(), []

    def load() -> Model:
        loads.append(threading.get_ident())
        assert release.wait(TIMEOUT_S)
        return Model("model")

    def use() -> bool:
        with cache.use("model", load) as (_, hit):
            return hit

    futures = [pool.submit(use) for _ in range(8)]
    eventually(lambda: cache._entries["model"].pins == 8 if loads else False)
    release.set()
    assert [future.result(TIMEOUT_S) for future in futures] == [False] * 8
    assert len(loads) == 1
    assert use()


def test_a_load_holds_up_nobody_who_needs_another_model(pool: ThreadPoolExecutor) -> None:
    store = Store(2)
    release = threading.Event()

    def slow() -> Model:
        assert release.wait(TIMEOUT_S)
        return Model("slow")

    def use_slow() -> None:
        with store.cache.use("slow", slow):
            pass

    slowly = pool.submit(use_slow)
    assert pool.submit(store.use, "quick").result(TIMEOUT_S) is False
    assert not slowly.done()
    release.set()
    slowly.result(TIMEOUT_S)


def test_a_failed_load_leaves_nothing_and_tells_everyone_who_waited(pool: ThreadPoolExecutor) -> None:
    store = Store(1, budget_bytes=10)
    release, loading = threading.Event(), threading.Event()

    def load() -> Model:
        loading.set()
        assert release.wait(TIMEOUT_S)
        raise OSError("half a file")

    def use() -> None:
        with store.cache.use("model", load, estimate_bytes=6, working_bytes=1):
            pass

    first = pool.submit(use)
    assert loading.wait(TIMEOUT_S)
    waiting = [pool.submit(use) for _ in range(3)]
    eventually(lambda: store.cache._entries["model"].pins == 4)
    release.set()
    for future in (first, *waiting):
        with pytest.raises(OSError, match="half a file"):
            future.result(TIMEOUT_S)
    assert store.loaded == []
    assert store.use("whole", 9, 1) is False  # all of the memory is there again


class Stop(BaseException):
    pass


def test_when_the_loading_job_is_stopped_one_that_waits_takes_over(pool: ThreadPoolExecutor) -> None:
    store = Store(1, budget_bytes=10)
    loading, stop = threading.Event(), threading.Event()

    def stopped() -> Model:
        loading.set()
        assert stop.wait(TIMEOUT_S)
        raise Stop

    def use(load: Callable[[], Model]) -> str:
        with store.cache.use("model", load, estimate_bytes=5, working_bytes=2) as (model, _):
            return model.name

    first = pool.submit(use, stopped)
    assert loading.wait(TIMEOUT_S)
    second = pool.submit(use, lambda: Model("whole", 5))
    eventually(lambda: store.cache._entries["model"].pins == 2)
    stop.set()
    assert second.result(TIMEOUT_S) == "whole"
    with pytest.raises(Stop):
        first.result(TIMEOUT_S)


def test_a_load_that_is_stopped_alone_leaves_nothing() -> None:
    store = Store(1, budget_bytes=10)

    def stopped() -> Model:
        raise Stop

    with pytest.raises(Stop), store.cache.use("model", stopped, estimate_bytes=10):
        pass
    assert store.loaded == []
    assert store.use("other", 10) is False


# Who goes, who stays


def test_the_least_recently_used_model_goes_first() -> None:
    store = Store(2)
    assert [store.use(key) for key in ("a", "b", "a", "c")] == [False, False, True, False]
    assert store.loaded == ["a", "c"]
    assert store.use("a")
    assert not store.use("b")


def test_an_evicted_model_is_closed_and_its_memory_given_back_before_the_next_is_loaded() -> None:
    store = Store(1)
    store.use("old")
    store.use("new")
    assert store.happened == ["loaded old", "closed old", "released", "loaded new"]


def test_a_model_that_cannot_be_closed_gives_its_place_away_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    store = Store(1, budget_bytes=4)

    def burst() -> None:
        raise RuntimeError("no such process")

    with store.cache.use("old", lambda: Model("old", 4, burst), estimate_bytes=4):
        pass
    assert store.use("new", 4) is False
    assert "could not be closed" in caplog.text


def test_a_model_in_use_stays_and_the_next_load_waits_for_it(pool: ThreadPoolExecutor) -> None:
    store = Store(1)
    with store.using("pinned"):
        other = pool.submit(store.use, "other")
        eventually(lambda: store.waiting)
        assert store.loaded == ["pinned"]
        assert not other.done()
    assert other.result(TIMEOUT_S) is False
    assert store.loaded == ["other"]


def test_a_wait_for_room_ends_when_its_job_is_stopped(pool: ThreadPoolExecutor) -> None:
    store = Store(1)
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
        with store.cache.use("other", lambda: Model("other"), check=check, woken_by=woken_by):
            pass

    with store.using("pinned"):
        waiting = pool.submit(use)
        wake = wakes.result(TIMEOUT_S)
        stopped.set()
        wake()
        with pytest.raises(Stop):
            waiting.result(TIMEOUT_S)
        assert store.waiting == 0
    assert store.loaded == ["pinned"]


def test_clearing_drops_what_nobody_uses_and_gives_its_memory_back() -> None:
    store = Store(2, budget_bytes=10)
    store.use("idle", 6)
    with store.using("busy", 4):
        store.cache.clear()
        assert store.loaded == ["busy"]
        assert "closed idle" in store.happened
        assert store.use("third", 6) is False


@pytest.mark.parametrize(("size", "budget_bytes"), [(0, None), (1, 0)])
def test_a_cache_without_a_place_or_a_byte_is_refused(size: int, budget_bytes: int | None) -> None:
    with pytest.raises(ValueError, match="at least one"):
        ModelCache(size, budget_bytes=budget_bytes)


# A budget of memory


def test_models_stay_as_long_as_the_budget_holds_them() -> None:
    store = Store(budget_bytes=10)
    for key, size_bytes in (("a", 4), ("b", 3), ("c", 3)):
        store.use(key, size_bytes)
    assert store.cache.loaded() == {"a": 4, "b": 3, "c": 3}
    store.use("d", 5)
    assert store.cache.loaded() == {"c": 3, "d": 5}


def test_a_run_that_needs_memory_to_work_in_has_unused_models_evicted_for_it() -> None:
    store = Store(budget_bytes=10)
    store.use("idle", 4)
    with store.using("busy", 4, working_bytes=5):
        assert store.loaded == ["busy"]
    assert store.use("idle", 4) is False


def test_nothing_is_evicted_where_that_would_not_be_enough(pool: ThreadPoolExecutor) -> None:
    store = Store(budget_bytes=10)
    store.use("idle", 2)
    with store.using("busy", 5):
        large = pool.submit(store.use, "large", 8)
        eventually(lambda: store.waiting)
        assert store.loaded == ["idle", "busy"]
        assert not large.done()
    assert large.result(TIMEOUT_S) is False


def test_working_memory_is_held_as_long_as_the_run_lasts(pool: ThreadPoolExecutor) -> None:
    store = Store(budget_bytes=10)
    with store.using("model", 4, working_bytes=4):
        second = pool.submit(store.use, "model", 4, 4)
        eventually(lambda: store.waiting)
        assert not second.done()
    assert second.result(TIMEOUT_S) is True


def test_what_could_never_fit_is_refused_at_once_with_the_numbers_and_a_remedy() -> None:
    store = Store(budget_bytes=10 * 2**20)
    with store.using("busy", 5 * 2**20), pytest.raises(InsufficientMemory) as refused:
        store.use("large", 8 * 2**20, 3 * 2**20)  # though the device is busy: to wait would not help
    assert "11.00 MiB" in refused.value.message
    assert "10.00 MiB" in refused.value.message
    assert refused.value.hint
    assert store.loaded == ["busy"]


def test_the_size_that_a_model_tells_takes_the_place_of_the_estimate() -> None:
    store = Store(budget_bytes=10)
    store.use("small", 8, measured_bytes=3)
    assert store.cache.loaded() == {"small": 3}
    store.use("other", 7)
    assert store.loaded == ["small", "other"]


def test_a_model_larger_than_estimated_has_others_evicted() -> None:
    store = Store(budget_bytes=10)
    store.use("idle", 5)
    store.use("grown", 4, measured_bytes=8)
    assert store.cache.loaded() == {"grown": 8}


def test_a_model_that_turns_out_too_large_is_dropped_and_refused_at_once_from_then_on() -> None:
    store = Store(budget_bytes=10)
    with pytest.raises(InsufficientMemory):
        store.use("grown", 4, measured_bytes=11)
    assert store.loaded == []
    assert store.happened == ["loaded grown", "closed grown", "released"]
    with pytest.raises(InsufficientMemory):
        store.use("grown", 4)
    assert store.happened.count("loaded grown") == 1
    assert store.use("other", 10) is False


def test_two_runs_that_each_need_working_memory_and_a_load_do_not_wait_for_each_other(
    pool: ThreadPoolExecutor,
) -> None:
    store = Store(budget_bytes=10)
    for _ in range(50):
        # Either fits alone. Were a model taken before the memory to work in, both would hold 4 and lack 5 for ever.
        both = [pool.submit(store.use, key, 4, 5) for key in ("a", "b")]
        for run in both:
            run.result(TIMEOUT_S)


# Nobody waits for ever


def test_who_waits_for_a_place_is_overtaken_only_so_often(pool: ThreadPoolExecutor) -> None:
    store = Store(1)
    with store.using("busy"):
        other = pool.submit(store.use, "other")
        eventually(lambda: store.waiting == 1)
        for _ in range(OVERTAKES_MAX):
            assert store.use("busy")
        late = pool.submit(store.use, "busy")
        eventually(lambda: store.waiting == 2)
        assert not late.done()
    assert other.result(TIMEOUT_S) is False
    assert late.result(TIMEOUT_S) is False  # its model was evicted for the one before
    assert store.happened.count("loaded other") == 1


def test_who_leaves_the_line_holds_up_nobody_any_more(pool: ThreadPoolExecutor) -> None:
    store = Store(1)
    stopped = threading.Event()
    wakes: Future[Callable[[], object]] = Future()

    def check() -> None:
        if stopped.is_set():
            raise Stop

    @contextmanager
    def woken_by(wake: Callable[[], object]) -> Iterator[None]:
        wakes.set_result(wake)
        yield

    def give_up() -> None:
        with store.cache.use("other", lambda: Model("other"), check=check, woken_by=woken_by):
            pass

    with store.using("busy"):
        impatient = pool.submit(give_up)
        eventually(lambda: store.waiting == 1)
        for _ in range(OVERTAKES_MAX):
            store.use("busy")
        late = pool.submit(store.use, "busy")
        eventually(lambda: store.waiting == 2)
        stopped.set()
        wakes.result(TIMEOUT_S)()
        assert late.result(TIMEOUT_S) is True
        with pytest.raises(Stop):
            impatient.result(TIMEOUT_S)


class Ledger:
    """What is really held, counted by the users themselves."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._models: dict[str, int] = {}
        self._working: Counter[str] = Counter()
        self.most_bytes = 0

    def loaded(self, key: str, size_bytes: int) -> None:
        with self._lock:
            assert key not in self._models, "two of one model"
            self._models[key] = size_bytes
            self._weigh()

    def closed(self, key: str) -> None:
        with self._lock:
            del self._models[key]

    @contextmanager
    def working(self, key: str, size_bytes: int) -> Iterator[None]:
        with self._lock:
            assert key in self._models, "a model in use is loaded"
            self._working[key] += size_bytes
            self._weigh()
        yield
        with self._lock:
            assert key in self._models, "a model in use stays"
            self._working[key] -= size_bytes

    def _weigh(self) -> None:
        self.most_bytes = max(self.most_bytes, sum(self._models.values()) + self._working.total())


BUDGET_BYTES = 12
requests = st.tuples(st.sampled_from("abcd"), st.integers(0, 9), st.sampled_from(("run", "raise", "stop")))


@settings(max_examples=60)
@given(
    sizes=st.fixed_dictionaries({key: st.integers(1, 8) for key in "abcd"}),
    size=st.integers(1, 3),
    jobs=st.lists(st.lists(requests, max_size=6), min_size=2, max_size=6),
)
def test_whatever_is_asked_the_budget_holds_and_every_request_comes_to_its_end(
    sizes: dict[str, int], size: int, jobs: list[list[tuple[str, int, str]]]
) -> None:
    ledger = Ledger(BUDGET_BYTES)
    cache: ModelCache[str, Model] = ModelCache(size, budget_bytes=BUDGET_BYTES)
    ends: Counter[str] = Counter()

    def load(key: str, fate: str) -> Model:
        if fate == "raise":
            raise OSError(key)
        if fate == "stop":
            raise Stop
        ledger.loaded(key, sizes[key])
        return Model(key, sizes[key], lambda: ledger.closed(key))

    def run(work: list[tuple[str, int, str]]) -> None:
        for key, working_bytes, fate in work:
            try:
                with (
                    cache.use(
                        key,
                        partial(load, key, fate),
                        estimate_bytes=sizes[key],
                        working_bytes=working_bytes,
                    ),
                    ledger.working(key, working_bytes),
                ):
                    pass
            except (OSError, Stop):
                ends["broken off"] += 1
            except InsufficientMemory:
                assert sizes[key] + working_bytes > BUDGET_BYTES
                ends["refused"] += 1
            else:
                ends["served"] += 1

    with ThreadPoolExecutor(len(jobs)) as threads:
        for job in [threads.submit(run, work) for work in jobs]:
            job.result(TIMEOUT_S)
    assert ends.total() == sum(map(len, jobs))
    assert ledger.most_bytes <= BUDGET_BYTES
    cache.clear()
    assert cache.loaded() == {}
    assert ledger._models == {}


def test_whoever_has_to_wait_for_room_is_told_so_once_and_again_when_there_is(pool: ThreadPoolExecutor) -> None:
    cache: ModelCache[str, Model] = ModelCache(1)
    told: list[str] = []
    waits = threading.Event()

    def use(key: str) -> None:
        def wait() -> None:
            told.append(f"{key} waits")
            assert pool.submit(cache.loaded).result(TIMEOUT_S).keys() == {"first"}, "the cache is not locked meanwhile"
            waits.set()

        with cache.use(key, partial(Model, key), waits=wait, admitted=lambda: told.append(f"{key} is admitted")):
            told.append(f"{key} runs")

    with cache.use("first", partial(Model, "first"), waits=lambda: told.append("nobody is before it")):
        use("first")
        second = pool.submit(use, "second")
        assert waits.wait(TIMEOUT_S)
        assert told == ["first is admitted", "first runs", "second waits"]
    second.result(TIMEOUT_S)
    assert told[3:] == ["second is admitted", "second runs"]
