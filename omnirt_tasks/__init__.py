"""OmniRT Tasks: generation as solid jobs on Celery.

    import omnirt_tasks as omnirt

    omnirt.generate(omnirt.requests.text2image(model="shapes", prompt="a large red circle on a blue background"))

Importing it is light: it loads no torch and no Celery, and reads nothing. `app` is the Celery app of this process'
settings, made when it is first touched, so that `celery -A omnirt_tasks` works.
"""

import importlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery import Celery

    from omnirt_tasks import errors, requests
    from omnirt_tasks.client import Client
    from omnirt_tasks.contract import GenerateRequest, GenerateResult, JobRecord, RunReport
    from omnirt_tasks.validation import Resolution
    from workers.engine import OmniEngine

    app: Celery
    __version__: str

__all__ = [
    "Client",
    "GenerateRequest",
    "GenerateResult",
    "JobRecord",
    "OmniEngine",
    "RunReport",
    "__version__",
    "app",
    "errors",
    "generate",
    "requests",
    "validate",
]

_HOMES = {
    "Client": "omnirt_tasks.client",
    "GenerateRequest": "omnirt_tasks.contract",
    "GenerateResult": "omnirt_tasks.contract",
    "JobRecord": "omnirt_tasks.contract",
    "OmniEngine": "workers.engine",
    "RunReport": "omnirt_tasks.contract",
}
_MODULES = ("errors", "requests")


def validate(request: "GenerateRequest") -> "Resolution":
    """What the request comes to here, in this process: the resolved request, or every problem at once."""
    from omnirt_tasks.registry import discover
    from omnirt_tasks.validation import Door, resolve

    return resolve(request, discover(), door=Door())


def generate(
    request: "GenerateRequest", *, output_dir: "Path | str" = "out", timeout_s: float | None = None
) -> "GenerateResult":
    """Run the request in this process, and return its result; each output's `path` is a file below `output_dir`.

    The model is loaded for this call alone: use an OmniEngine to run several. Raises ValidationFailed and its like for
    a request that cannot run, the job's own error when it fails, and JobTimeout after `timeout_s` (None: no limit).
    """
    from omnirt_tasks.local_files import data_url, with_files
    from omnirt_tasks.results import result_of
    from workers.engine import OmniEngine

    with OmniEngine(output_dir=output_dir) as engine:
        job = engine.submit(with_files(request, data_url))
        return result_of(engine.wait(job.id, timeout_s))


@cache
def _make_app() -> "Celery":
    from omnirt_tasks.celery_app import make_app
    from omnirt_tasks.settings import load_settings

    return make_app(load_settings())


@cache
def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("omnirt-tasks")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+source"


def __getattr__(name: str) -> Any:
    if name == "app":
        return _make_app()
    if name == "__version__":
        return _version()
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
