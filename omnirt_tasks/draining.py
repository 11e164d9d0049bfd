"""Draining a worker from afar: it takes no more jobs, finishes or gives back those in hand, and ends.

name ─► node ─► control command `drain` ─► control command `in_hand`, until the worker answers no more
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

from omnirt_tasks.errors import NotFound, OperatorError, StoreUnavailable
from omnirt_tasks.jobs.fleet import LiveWorkers

ANSWER_WITHIN_S = 2.0
ASK_EVERY_S = 0.5
SILENT_MAX = 3


@dataclass(frozen=True)
class InHand:
    """What a worker answers: how many jobs it has in hand, since when it runs (Unix ms), whether it is leaving."""

    jobs: int
    started_at_ms: int
    leaving: bool


class Drainer:
    """Drains workers through the broker of `app`; `fleet` knows the names of most."""

    def __init__(self, app: Celery, fleet: LiveWorkers) -> None:
        self._app = app
        self._fleet = fleet

    def drain(
        self, name: str, *, grace_s: float | None = None, on_progress: Callable[[str, int], object] = lambda *_: None
    ) -> None:
        """Drain the worker and return when it is gone; `on_progress` gets its node name and the jobs it has in hand.

        `name` is its node name or the part before the @, where no other worker has the same. `grace_s` is how long its
        jobs may take to finish; None is the worker's own setting. A worker of that name which was started meanwhile is
        another one. Raises NotFound for a name that is no worker's or that of several, StoreUnavailable when the broker
        cannot be reached, and OperatorError when the worker does not answer.
        """
        node = self._find(name)
        first = last = next((told for _ in range(SILENT_MAX) if (told := self._in_hand(node))), None)
        if first is None:
            raise OperatorError(f"The worker {node} does not answer.", "Send its process a SIGTERM.")
        arguments = {} if grace_s is None else {"grace_s": grace_s}
        silent, asked = 0, False
        while silent < SILENT_MAX:
            if last is not None:
                if last.started_at_ms != first.started_at_ms:
                    return
                on_progress(node, last.jobs)
                if not (asked and last.leaving):  # also of one that leaves already, whose grace this may shorten
                    self._ask("drain", node, **arguments)
                    asked = True
            time.sleep(ASK_EVERY_S)
            last = self._in_hand(node)
            silent = silent + 1 if last is None else 0

    def _find(self, name: str) -> str:
        nodes = {worker.worker_id for worker in self._fleet.live()}
        if name not in nodes:
            nodes |= set(self._ask("in_hand"))  # whose device starts, or who is leaving already, is not in the fleet
        if name in nodes:
            return name
        found = sorted(node for node in nodes if node.partition("@")[0] == name)
        if len(found) == 1:
            return found[0]
        if found:
            raise NotFound(f"{name} is the name of {len(found)} workers.", f"Name one of {', '.join(found)}.")
        living = f"There are {', '.join(sorted(nodes))}." if nodes else "No worker lives."
        raise NotFound(f"No live worker has the name {name}.", living)

    def _in_hand(self, node: str) -> InHand | None:
        """What the worker has in hand; None when it does not answer."""
        told = self._ask("in_hand", node).get(node)
        return None if told is None else InHand(int(told["jobs"]), int(told["started_at_ms"]), bool(told["leaving"]))

    def _ask(self, command: str, node: str | None = None, **arguments: object) -> Mapping[str, Any]:
        """The answers to a control command, by node; of all nodes that answer in time without one named."""
        try:
            answers = self._app.control.broadcast(
                command,
                arguments=arguments,
                destination=None if node is None else [node],
                reply=True,
                timeout=ANSWER_WITHIN_S,
            )
        except (OperationalError, OSError) as error:
            raise StoreUnavailable("The broker does not answer.", "Try again shortly.") from error
        return {name: told for answer in answers or () for name, told in answer.items()}
