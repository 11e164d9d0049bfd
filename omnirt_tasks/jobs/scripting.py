"""The Lua scripts: how they are put together, and called."""

import json
import secrets
from importlib import resources
from typing import Any

import redis

from omnirt_tasks.contract import ErrorInfo
from omnirt_tasks.jobs.connection import reaching_store
from omnirt_tasks.jobs.effects import AWAITED_MS, DEATHS_MAX, EVENT_LOG_LENGTH, deadline_passed, died_too_often

_FOLDER = resources.files("omnirt_tasks.jobs") / "scripts"


def prelude(deaths_max: int = DEATHS_MAX) -> str:
    """What stands before every script: the rules that it shares with the other stores, as constants, then its own."""
    constants = {
        "LOG_LENGTH": str(EVENT_LOG_LENGTH),
        "AWAITED_MS": str(AWAITED_MS),
        "DEATHS_MAX": str(deaths_max),
        "WORKER_LOST": _quoted(died_too_often(deaths_max)),
        "TIMED_OUT": _quoted(deadline_passed()),
    }
    lines = [f"local {name} = {value}" for name, value in constants.items()]
    return "\n".join((*lines, (_FOLDER / "prelude.lua").read_text()))


def _quoted(error: ErrorInfo) -> str:
    return f"[==[{json.dumps(error.model_dump(mode='json'))}]==]"


class Scripts:
    """The Lua scripts, each behind the shared prelude; Redis keeps them, so a call sends a hash."""

    def __init__(self, client: redis.Redis, prefix: str, *, job_ttl_ms: int = 0, deaths_max: int = DEATHS_MAX) -> None:
        before = prelude(deaths_max)
        self._scripts = {
            file.name.removesuffix(".lua"): client.register_script(f"{before}\n{file.read_text()}")
            for file in _FOLDER.iterdir()
            if file.name.endswith(".lua") and file.name != "prelude.lua"
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
