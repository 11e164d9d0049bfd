"""The truth tables of a split job's life: each call for one of two parts, from each state that both can be in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from omnirt_tasks.jobs.store import JobStore
from omnirt_tasks.jobs.values import Cancelled, Lease, Outcome, Requeue
from tests.support.jobs import (
    DEATHS_MAX,
    LONG_MS,
    PICTURES_PER_PART,
    Rig,
    claimed,
    failed,
    new_job,
    step,
    succeeded,
    told,
)

LEFT, DIED = Requeue("left"), Requeue("died", died=True)


@dataclass(frozen=True)
class Pair:
    """A job of two parts: `lease` is the newest that was given for the one that the calls are about, part 0."""

    job_id: str
    lease: Lease
    other: Lease | None = None


def _done(number: int) -> Outcome:
    return succeeded("part", first=number * PICTURES_PER_PART, count=PICTURES_PER_PART)


def _begin(rig: Rig, *, other: bool = False, lease_ttl_ms: int = LONG_MS, deaths: int = 0) -> Pair:
    """A job whose part 0 runs, after so many deaths while alone; `other` says that part 1 does too."""
    job = rig.store.create(new_job(parts=2))
    for _ in range(deaths):
        rig.store.give_back(claimed(rig.store, job.parts[0]), DIED)
    beside = claimed(rig.store, job.parts[1], alone=False) if other else None
    lease = claimed(rig.store, job.parts[0], alone=deaths > 0, lease_ttl_ms=lease_ttl_ms)
    return Pair(job.record.id, lease, beside)


def _then(pair: Pair, *calls: Callable[[Pair], object]) -> Pair:
    for call in calls:
        call(pair)
    return pair


def _beside(rig: Rig, outcome: Outcome) -> Callable[[Pair], object]:
    """The other part ends so."""
    return lambda pair: pair.other and rig.store.commit(pair.other, outcome)


def _lapsed(rig: Rig) -> Pair:
    pair = _begin(rig, other=True, lease_ttl_ms=1)
    rig.pass_time(1)
    return pair


def _given_back(rig: Rig) -> Callable[[Pair], object]:
    return lambda pair: rig.store.give_back(pair.lease, LEFT)


def _cancelled(rig: Rig) -> Callable[[Pair], object]:
    return lambda pair: rig.store.cancel(pair.job_id)


STATES: dict[str, Callable[[Rig], Pair]] = {
    "waits, other waits": lambda rig: _then(_begin(rig), _given_back(rig)),
    "waits, other runs": lambda rig: _then(_begin(rig, other=True), _given_back(rig)),
    "waits, other done": lambda rig: _then(_begin(rig, other=True), _given_back(rig), _beside(rig, _done(1))),
    "runs, other waits": _begin,
    "runs, other runs": lambda rig: _begin(rig, other=True),
    "runs, other done": lambda rig: _then(_begin(rig, other=True), _beside(rig, _done(1))),
    "runs, other failed": lambda rig: _then(_begin(rig, other=True), _beside(rig, failed())),
    "to stop, other runs": lambda rig: _then(_begin(rig, other=True), _cancelled(rig)),
    "to stop, other done": lambda rig: _then(_begin(rig, other=True), _beside(rig, _done(1)), _cancelled(rig)),
    "to stop, other over": lambda rig: _then(_begin(rig), _cancelled(rig)),
    "last life, other runs": lambda rig: _begin(rig, other=True, deaths=DEATHS_MAX - 1),
    "lapsed, other runs": _lapsed,
    "done, other runs": lambda rig: _then(_begin(rig, other=True), lambda pair: rig.store.commit(pair.lease, _done(0))),
    "done, other waits": lambda rig: _then(_begin(rig), lambda pair: rig.store.commit(pair.lease, _done(0))),
}

CALLS: dict[str, Callable[[JobStore, Pair], object]] = {
    "claim": lambda store, pair: store.claim(pair.lease.job_id, worker_id="w2", lease_ttl_ms=LONG_MS),
    "append": lambda store, pair: store.append(pair.lease, [step(1)]),
    "succeed": lambda store, pair: store.commit(pair.lease, _done(0)),
    "fail": lambda store, pair: store.commit(pair.lease, failed()),
    "be cancelled": lambda store, pair: store.commit(pair.lease, Cancelled()),
    "give back: left": lambda store, pair: store.give_back(pair.lease, LEFT),
    "give back: died": lambda store, pair: store.give_back(pair.lease, DIED),
    "cancel": lambda store, pair: store.cancel(pair.job_id),
    "reconcile": lambda store, _: store.reconcile(unclaimed_after_ms=LONG_MS),
}


def _shown(store: JobStore, pair: Pair) -> str:
    whole = store.get(pair.job_id)
    own, other = (store.get(part).record.state.value for part in whole.parts)
    facts = [f"{own} + {other} = {whole.record.state.value}"]
    facts += ["to be cancelled"] if whole.record.cancel_requested and not whole.record.finished else []
    facts += ["dead letter"] if whole.record.dead_letter else []
    return ", ".join(facts)


def _rows(rig: Rig, call: str) -> Sequence[str]:
    rows = []
    for state, begin in STATES.items():
        pair = begin(rig)
        before, log = _shown(rig.store, pair), rig.store.events(pair.job_id)
        answer = CALLS[call](rig.store, pair)
        after, more = _shown(rig.store, pair), rig.store.events(pair.job_id)[len(log) :]
        events = " ".join(event.event.value for event in more)
        if after != before or events or told(answer) not in {"-", "lost"}:
            change = after if after != before else ""
            rows.append(f"{state:21} | {told(answer):16} | {change:50} | {events}".rstrip(" |"))
        rig.store.purge(pair.job_id)
    return rows


TABLES: dict[str, str] = {
    # From state | answer | part + other = whole job, if changed | events of the job. From other states: nothing.
    "claim": """
        waits, other waits    | won              | running + queued = running                         | part_started
        waits, other runs     | won              | running + running = running                        | part_started
        waits, other done     | won              | running + succeeded = running                      | part_started
    """,
    "append": """
        runs, other waits     | held             |                                                    | stage_progress
        runs, other runs      | held             |                                                    | stage_progress
        runs, other done      | held             |                                                    | stage_progress
        runs, other failed    | held
        to stop, other runs   | held             |                                                    | stage_progress
        to stop, other done   | held             |                                                    | stage_progress
        to stop, other over   | held             |                                                    | stage_progress
        last life, other runs | held             |                                                    | stage_progress
        lapsed, other runs    | held             |                                                    | stage_progress
    """,
    "succeed": """
        runs, other waits     | held             | succeeded + queued = running                       | part_finished
        runs, other runs      | held             | succeeded + running = running                      | part_finished
        runs, other done      | held             | succeeded + succeeded = succeeded                  | job_finished
        runs, other failed    | held             | succeeded + failed = failed
        to stop, other runs   | held             | succeeded + running = running, to be cancelled     | part_finished
        to stop, other done   | held             | succeeded + succeeded = succeeded                  | job_finished
        to stop, other over   | held             | succeeded + cancelled = cancelled                  | job_cancelled
        last life, other runs | held             | succeeded + running = running                      | part_finished
        lapsed, other runs    | held             | succeeded + running = running                      | part_finished
    """,
    "fail": """
        runs, other waits     | held             | failed + cancelled = failed                        | job_failed
        runs, other runs      | held             | failed + running = failed                          | job_failed
        runs, other done      | held             | failed + succeeded = failed                        | job_failed
        runs, other failed    | held             | failed + failed = failed
        to stop, other runs   | held             | failed + running = failed                          | job_failed
        to stop, other done   | held             | failed + succeeded = failed                        | job_failed
        to stop, other over   | held             | failed + cancelled = failed                        | job_failed
        last life, other runs | held             | failed + running = failed                          | job_failed
        lapsed, other runs    | held             | failed + running = failed                          | job_failed
    """,
    "be cancelled": """
        runs, other waits     | held             | cancelled + cancelled = cancelled                  | job_cancelled
        runs, other runs      | held             | cancelled + running = running, to be cancelled
        runs, other done      | held             | cancelled + succeeded = cancelled                  | job_cancelled
        runs, other failed    | held             | cancelled + failed = failed
        to stop, other runs   | held             | cancelled + running = running, to be cancelled
        to stop, other done   | held             | cancelled + succeeded = cancelled                  | job_cancelled
        to stop, other over   | held             | cancelled + cancelled = cancelled                  | job_cancelled
        last life, other runs | held             | cancelled + running = running, to be cancelled
        lapsed, other runs    | held             | cancelled + running = running, to be cancelled
    """,
    "give back: left": """
        runs, other waits     | held             | queued + queued = running                          | part_requeued
        runs, other runs      | held             | queued + running = running                         | part_requeued
        runs, other done      | held             | queued + succeeded = running                       | part_requeued
        runs, other failed    | held             | cancelled + failed = failed
        to stop, other runs   | held             | cancelled + running = running, to be cancelled
        to stop, other done   | held             | cancelled + succeeded = cancelled                  | job_cancelled
        to stop, other over   | held             | cancelled + cancelled = cancelled                  | job_cancelled
        last life, other runs | held             | queued + running = running                         | part_requeued
        lapsed, other runs    | held             | queued + running = running                         | part_requeued
    """,
    "give back: died": """
        runs, other waits     | held             | queued + queued = running                          | part_requeued
        runs, other runs      | held             | queued + running = running                         | part_requeued
        runs, other done      | held             | queued + succeeded = running                       | part_requeued
        runs, other failed    | held             | cancelled + failed = failed
        to stop, other runs   | held             | cancelled + running = running, to be cancelled
        to stop, other done   | held             | cancelled + succeeded = cancelled                  | job_cancelled
        to stop, other over   | held             | cancelled + cancelled = cancelled                  | job_cancelled
        last life, other runs | held             | failed + running = failed, dead letter             | job_failed
        lapsed, other runs    | held             | queued + running = running                         | part_requeued
    """,
    "cancel": """
        waits, other waits    | cancelled        | cancelled + cancelled = cancelled                  | job_cancelled
        waits, other runs     | requested        | cancelled + running = running, to be cancelled
        waits, other done     | cancelled        | cancelled + succeeded = cancelled                  | job_cancelled
        runs, other waits     | requested        | running + cancelled = running, to be cancelled
        runs, other runs      | requested        | running + running = running, to be cancelled
        runs, other done      | requested        | running + succeeded = running, to be cancelled
        runs, other failed    | already_finished
        to stop, other runs   | requested
        to stop, other done   | requested
        to stop, other over   | requested
        last life, other runs | requested        | running + running = running, to be cancelled
        lapsed, other runs    | requested        | running + running = running, to be cancelled
        done, other runs      | requested        | succeeded + running = running, to be cancelled
        done, other waits     | cancelled        | succeeded + cancelled = cancelled                  | job_cancelled
    """,
    "reconcile": """
        lapsed, other runs    | resend expired   | queued + running = running                         | part_requeued
    """,
}


@pytest.mark.parametrize("call", TABLES)
def test_a_call_does_for_a_part_what_its_table_says(rig: Rig, call: str) -> None:
    expected = [line.strip() for line in TABLES[call].strip().splitlines()]
    assert list(_rows(rig, call)) == expected


def test_every_call_has_its_table() -> None:
    assert TABLES.keys() == CALLS.keys()
