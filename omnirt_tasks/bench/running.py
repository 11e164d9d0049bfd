"""A system of the bench's own: embedded broker, worker and gateway as processes, gone with it."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from omnirt_tasks.settings import Settings, load_settings
from omnirt_tasks.system import System, hermetic_environment

GRACE_S = 1.0


@contextmanager
def running_system(queues: Sequence[str], **settings: object) -> Iterator[tuple[System, Settings]]:
    """Start a system for these queues, and stop it at the end; `settings` are the children's, beside the defaults.

    Yields the system and settings by which the bench itself reaches the same Redis.
    """
    with tempfile.TemporaryDirectory(prefix="omnirt-bench-", ignore_cleanup_errors=True) as folder:
        own = {"data_dir": f"{folder}/data", "run_dir": f"{folder}/run", "allow_stub": "true", **settings}
        system = System(
            queues=queues,
            environment=hermetic_environment(**own),
            on_line=_ignore,
            worker_grace_s=GRACE_S,
            log_level="WARNING",
            broker_dir=Path(folder) / "broker",
        )
        with system:
            yield system, load_settings(redis_url=system.redis_url, **own)


def _ignore(_child: str, _line: str) -> None:
    """A child that fails is told of with its last lines; the rest of its output is of no use here."""
