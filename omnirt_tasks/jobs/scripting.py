"""The Lua scripts: how they are put together, and called."""

import json
import secrets
from collections.abc import Mapping
from importlib import resources
from typing import Any

import redis

from omnirt_tasks.contract import ErrorInfo
from omnirt_tasks.jobs.connection import reaching_store
from omnirt_tasks.jobs.effects import (
    AWAITED_MS,
    DEATHS_MAX,
    EVENT_LOG_LENGTH,
    NEXT_HIGHER,
    RANKS,
    SERVICE_TIMES_KEPT_MS,
    SERVICE_TIMES_MAX,
    deadline_passed,
    died_too_often,
)

RANK_SPAN = 2**50
"""How far the ranks of priorities lie apart among the scores of those that wait: no serial comes to it."""

_FOLDER = resources.files("omnirt_tasks.jobs") / "scripts"
_PRELUDE = ("prelude.lua", "parts.lua")


def prelude(deaths_max: int = DEATHS_MAX) -> str:
    """What stands before every script: the rules that it shares with the other stores, as constants, then its own."""
    constants = {
        "LOG_LENGTH": str(EVENT_LOG_LENGTH),
        "AWAITED_MS": str(AWAITED_MS),
        "DEATHS_MAX": str(deaths_max),
        "WORKER_LOST": _quoted(died_too_often(deaths_max)),
        "TIMED_OUT": _quoted(deadline_passed()),
        "RANKS": _table({priority: str(rank) for priority, rank in RANKS.items()}),
        "RANK_SPAN": str(RANK_SPAN),
        "NEXT_HIGHER": _table({priority: f"'{higher}'" for priority, higher in NEXT_HIGHER.items()}),
        "SERVICE_TIMES_MAX": str(SERVICE_TIMES_MAX),
        "SERVICE_TIMES_KEPT_MS": str(SERVICE_TIMES_KEPT_MS),
    }
    lines = [f"local {name} = {value}" for name, value in constants.items()]
    return "\n".join((*lines, *((_FOLDER / name).read_text() for name in _PRELUDE)))


def _quoted(error: ErrorInfo) -> str:
    return f"[==[{json.dumps(error.model_dump(mode='json'))}]==]"


def _table(values: Mapping[str, str]) -> str:
    return "{ " + ", ".join(f"{name} = {value}" for name, value in values.items()) + " }"


class Scripts:
    """The Lua scripts, each behind the shared prelude; Redis keeps them, so a call sends a hash."""

    def __init__(self, client: redis.Redis, prefix: str, *, job_ttl_ms: int = 0, deaths_max: int = DEATHS_MAX) -> None:
        before = prelude(deaths_max)
        self._scripts = {
            file.name.removesuffix(".lua"): client.register_script(f"{before}\n{file.read_text()}")
            for file in _FOLDER.iterdir()
            if file.name.endswith(".lua") and file.name not in _PRELUDE
        }
        self._prefix = prefix
        self._job_ttl_ms = job_ttl_ms

    def run(self, name: str, job_id: str, *args: str | int, call: str | None = None) -> Any:
        """Run one script; its answer is as Redis gives it. Raises StoreUnavailable.

        `call` is the id of the call, for one that may be made again after that.
        """
        call = secrets.token_hex(8) if call is None else call
        with reaching_store():
            return self._scripts[name](args=(self._prefix, job_id, self._job_ttl_ms, call, *args))
