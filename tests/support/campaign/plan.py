"""What a campaign does, made from its seed alone: which jobs, and which faults between them."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from omnirt_tasks.contract import GenerateRequest
from omnirt_tasks.requests import text2image


class Kind(StrEnum):
    """What a job is there for."""

    QUICK = "quick"
    SLOW = "slow"  # and goes on from checkpoints
    DRAWING = "drawing"  # by a real model
    FAILING = "failing"  # by its model's own fault
    CRASHING = "crashing"  # takes the device's process with it, once
    CANCELLED = "cancelled"
    SPLIT = "split"  # into parts, for whichever workers
    SPLIT_CANCELLED = "split and cancelled"
    TIGHT = "tight"  # too large for the device together with others


class Fault(StrEnum):
    """What is done to the system."""

    DEVICE_KILLED = "device process killed"
    WORKER_KILLED = "worker killed"
    WORKER_GROUP_KILLED = "worker killed with all below it"
    WORKER_FROZEN = "worker frozen past its leases"
    WORKER_RESTARTED = "worker asked to stop"
    GATEWAY_KILLED = "gateway killed"
    BROKER_KILLED = "broker killed and started again"
    CONNECTIONS_CUT = "every connection to the broker cut"
    MESSAGES_DOUBLED = "messages sent twice"
    GARBAGE_QUEUED = "pickle and garbage on a queue"
    DISK_FULL = "storage full for a while"


KINDS = {
    Kind.QUICK: 25,
    Kind.SLOW: 15,
    Kind.DRAWING: 10,
    Kind.FAILING: 8,
    Kind.CRASHING: 7,
    Kind.CANCELLED: 12,
    Kind.SPLIT: 12,
    Kind.SPLIT_CANCELLED: 4,
    Kind.TIGHT: 7,
}
PRIORITIES = ("high", "normal", "normal", "low")
CRASHES = ("kill", "segv", "exit")
COLOURS = ("red", "blue", "green")
KEPT_EVERY_STEPS = 5
PICTURES_MAX = 12


@dataclass(frozen=True)
class PlannedJob:
    """A job and what its caller does; `cancel_after_s` counts from its acceptance, `watched` follows its stream."""

    number: int
    kind: Kind
    request: GenerateRequest
    watched: bool
    cancel_after_s: float | None
    pictures: int = 1


@dataclass(frozen=True)
class Plan:
    """A whole campaign; fault i is due when `i * len(jobs) / len(faults)` jobs are over."""

    seed: int
    jobs: Sequence[PlannedJob]
    faults: Sequence[Fault]


def make_plan(seed: int, jobs: int, faults: int, kinds: Sequence[Fault] = tuple(Fault)) -> Plan:
    """The plan of this seed: every kind of fault comes up before any comes up again."""
    rng = random.Random(seed)
    planned: list[Fault] = []
    while len(planned) < faults:
        planned += rng.sample(kinds, len(kinds))
    return Plan(seed, [_job(number, rng) for number in range(jobs)], planned[:faults])


def _job(number: int, rng: random.Random) -> PlannedJob:
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    pictures = 1
    prompt = f"a large {rng.choice(COLOURS)} circle on a white background"
    given: dict[str, object] = {"prompt": prompt, "seed": number, "priority": rng.choice(PRIORITIES)}
    match kind:
        case Kind.QUICK:
            request = _stub(given, num_inference_steps=rng.randint(2, 6), step_ms=10)
        case Kind.SLOW | Kind.CANCELLED:
            steps = rng.randint(15, 40)
            request = _stub(given, num_inference_steps=steps, step_ms=50, checkpoint_every_steps=KEPT_EVERY_STEPS)
        case Kind.SPLIT | Kind.SPLIT_CANCELLED:
            pictures = rng.randint(5, PICTURES_MAX)
            request = _stub(given, num_inference_steps=rng.randint(4, 12), step_ms=30, num_images_per_prompt=pictures)
        case Kind.TIGHT:
            request = _stub(given, num_inference_steps=rng.randint(2, 6), step_ms=20, oom_above_chunk=2)
        case Kind.DRAWING:
            request = _request("shapes", given, num_inference_steps=rng.randint(3, 8))
        case Kind.FAILING:
            request = _stub(given, num_inference_steps=4, step_ms=10, fail_at_step=2)
        case Kind.CRASHING:
            crash = rng.choice(CRASHES)
            request = _stub(given, num_inference_steps=4, step_ms=10, crash_at_step=2, crash_attempts=1, crash=crash)
    cancelled = kind in {Kind.CANCELLED, Kind.SPLIT_CANCELLED}
    cancel_after_s = rng.uniform(0.0, 1.5) if cancelled else None
    return PlannedJob(number, kind, request, rng.random() < 0.4, cancel_after_s, pictures)


def _stub(given: Mapping[str, object], **config: object) -> GenerateRequest:
    return _request("stub", given, backend="cpu-stub", **config)


def _request(model: str, given: Mapping[str, Any], **more: Any) -> GenerateRequest:
    return text2image(model=model, **given, **more)
