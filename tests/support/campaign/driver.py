"""The callers of a campaign: each takes the next planned job, submits it until it is accepted, and follows it."""

import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from omnirt_tasks.client import Client
from omnirt_tasks.contract import CancelOutcome, Event
from omnirt_tasks.errors import GatewayUnreachable, OmnirtError, StoreUnavailable
from tests.support.campaign.plan import Plan, PlannedJob

T = TypeVar("T")

CALLERS = 12
PATIENCE_S = 120.0
"""How long a caller asks for what a system that is mended gives: an acceptance, a record, a cancel."""
JOB_PATIENCE_S = 240.0
LOOK_EVERY_S = 0.25
TRY_AGAIN_S = 0.2


@dataclass
class Story:
    """What a caller saw of one job, written by that caller alone; `complaints` are promises broken in front of him."""

    planned: PlannedJob
    job_id: str | None = None
    cancelled: CancelOutcome | None = None
    seen: list[Event] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


class Driver:
    """Runs a plan's jobs to their ends; `on_over` is called, from several threads, after each with how many are."""

    def __init__(self, plan: Plan, urls: Sequence[str], on_over: Callable[[int], None]) -> None:
        self.stories = [Story(job) for job in plan.jobs]
        self._urls = urls
        self._on_over = on_over
        self._rest = iter(self.stories)
        self._guard = threading.Lock()  # guards the two around it
        self._over = 0
        self._threads = [
            threading.Thread(target=self._call, args=(f"{plan.seed}-{number}",), name=f"caller-{number}", daemon=True)
            for number in range(CALLERS)
        ]

    def run(self) -> list[Story]:
        """Return once every caller has seen its jobs' ends, or given up on them."""
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        return self.stories

    def _call(self, seed: str) -> None:
        rng = random.Random(seed)
        clients = [Client(url, timeout_s=10.0, reconnect_s=PATIENCE_S) for url in self._urls]
        while True:
            with self._guard:
                story = next(self._rest, None)
            if story is None:
                break
            try:
                _live_through(story, clients, rng)
            except Exception as error:  # noqa: BLE001 - whatever a caller meets is part of his story
                story.complaints.append(f"the caller gave up: {type(error).__name__}: {error}")
            with self._guard:
                self._over += 1
                over = self._over
            self._on_over(over)
        for client in clients:
            client.close()


def _live_through(story: Story, clients: Sequence[Client], rng: random.Random) -> None:
    planned, key = story.planned, uuid.uuid4().hex
    job = _insist(clients, rng, lambda client: client.submit(planned.request, idempotency_key=key))
    story.job_id = job.id
    if planned.cancel_after_s is not None:
        time.sleep(planned.cancel_after_s)
        story.cancelled = _insist(clients, rng, lambda client: client.cancel(job.id))
    if planned.watched:
        _watch(story, job.id, clients, rng)
    deadline = time.monotonic() + JOB_PATIENCE_S
    while not _insist(clients, rng, lambda client: client.job(job.id)).finished:
        if time.monotonic() > deadline:
            raise TimeoutError(f"job {job.id} is not over after {JOB_PATIENCE_S:.0f} s")
        time.sleep(LOOK_EVERY_S)


def _watch(story: Story, job_id: str, clients: Sequence[Client], rng: random.Random) -> None:
    """Follow the job's stream to its end, and change gateways now and then, going on where it broke off."""
    while not (story.seen and story.seen[-1].terminal):
        after = story.seen[-1].seq if story.seen else 0
        hops = rng.randint(3, 30)
        try:
            for number, event in enumerate(rng.choice(clients).events(job_id, after=after, timeout_s=JOB_PATIENCE_S)):
                story.seen.append(event)
                if number >= hops:
                    break
        except (GatewayUnreachable, StoreUnavailable):
            time.sleep(TRY_AGAIN_S)


def _insist(clients: Sequence[Client], rng: random.Random, ask: Callable[[Client], T]) -> T:
    """The answer of whichever gateway gives one first. Raises what a gateway says for good, or all that it was."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return ask(rng.choice(clients))
        except OmnirtError as error:
            if not isinstance(error, GatewayUnreachable | StoreUnavailable) or time.monotonic() > deadline:
                raise
            time.sleep(TRY_AGAIN_S)
