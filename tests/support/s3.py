"""A server that speaks S3, as a process, and buckets on it."""

import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import fsspec
import httpx
import pytest

from omnirt_tasks.child_process import ChildProcess
from omnirt_tasks.settings import environment_without_settings
from tests.support.processes import free_port
from tests.support.waiting import eventually

START_S = 60.0


@dataclass(frozen=True)
class S3Server:
    """A running server."""

    endpoint: str

    def bucket(self) -> str:
        """A new bucket; its URL."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        httpx.put(f"{self.endpoint}/{name}").raise_for_status()
        return f"s3://{name}"


@contextmanager
def own_s3() -> Iterator[S3Server]:
    """A server on a free port, for a block in which this process and all that it starts use it."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    told: list[str] = []
    process = ChildProcess(
        "s3",
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", endpoint.rpartition(":")[2]],
        env=environment_without_settings() | {"PYTHONUNBUFFERED": "1"},
        on_line=told.append,
    )
    try:
        eventually(
            lambda: any("Running on" in line for line in told) or process.exit_code is not None,
            START_S,
            told=lambda: "\n".join(told),
        )
        assert process.exit_code is None, "\n".join(told)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
            patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
            patch.setenv("AWS_ACCESS_KEY_ID", "tests")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "of-no-worth")
            forget_connections()
            yield S3Server(endpoint)
        forget_connections()
    finally:
        process.stop()


def forget_connections() -> None:
    """Let the next storage that is opened look at the environment anew: fsspec keeps one for each set of arguments."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
