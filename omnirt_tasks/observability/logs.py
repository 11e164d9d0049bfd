"""Logging of gateway, worker and command line, in one form: a line of prose, with what is bound beside it.

Modules log with `logging.getLogger(__name__)`; whoever works on a job binds it once, and every line inherits:

    with bound(job_id=job.id, model=spec.id, worker=worker_id):
        logger.info("stage ended", extra={"stage": "denoise", "elapsed_ms": 12})

A line never holds a prompt or a key: nothing here logs requests, fields with such names are masked, and tracebacks
are printed without the values of local variables.
"""

import contextlib
import logging
import sys
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.settings import Settings

PRIVATE_FIELDS = frozenset(
    {
        "prompt",
        "negative_prompt",
        "reference_text",
        "request",
        "resolved",
        "inputs",
        "api_key",
        "authorization",
        "password",
    }
)
MASK = "…"
# Libraries whose INFO tells of every request or message.
QUIET_LOGGERS = ("httpx", "httpcore", "urllib3", "filelock", "PIL", "werkzeug")


def configure(settings: Settings, *, stream: TextIO | None = None) -> None:
    """Set up this process's logging; to stderr unless told otherwise. Done again, it replaces what was set up before.

    Raises ConfigurationError for an unknown `log_level`.
    """
    level = logging.getLevelNamesMapping().get(settings.log_level.upper())
    if level is None:
        raise ConfigurationError(f"OMNIRT_LOG_LEVEL is {settings.log_level!r}.", "Set DEBUG, INFO, WARNING or ERROR.")
    out = stream if stream is not None else sys.stderr
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_shared(), processors=_rendering(json_lines=settings.log_json, colors=out.isatty())
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def bound(**fields: str) -> contextlib.AbstractContextManager[None]:
    """Give every line of this thread (and of contexts copied from it) these fields, while the block lasts."""
    return structlog.contextvars.bound_contextvars(**fields)


def _shared() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _mask_private,
    ]


def _rendering(*, json_lines: bool, colors: bool) -> list[Processor]:
    strip = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if json_lines:
        # Tracebacks as text: structlog's own form holds the values of local variables, prompts among them.
        return [
            strip,
            structlog.processors.format_exc_info,
            structlog.processors.EventRenamer("message"),
            structlog.processors.JSONRenderer(),
        ]
    return [
        strip,
        structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback, pad_event_to=0),
    ]


def _mask_private(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for name in PRIVATE_FIELDS & event.keys():
        event[name] = MASK
    return event
