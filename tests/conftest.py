"""What every test may ask for; a fixture gives a thing and takes it back."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from omnirt_tasks.embedded import EmbeddedBroker
from omnirt_tasks.settings import PREFIX, Settings, load_settings
from tests.support.leaks import Snapshot
from tests.support.processes import Processes

# Two shared cores: how long an example takes says nothing here.
hypothesis.settings.register_profile("shared", deadline=None, max_examples=100)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "shared")

# Before anything imports torch or a hub client: no downloads, and no more threads than two cores can bear.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a device that is not here."""
    for mark in item.iter_markers("hardware"):
        backend = mark.args[0] if mark.args else "cuda"
        if not _present(backend):
            pytest.skip(f"no {backend} device on this machine")


@pytest.fixture(scope="session", autouse=True)
def _own_environment() -> Iterator[None]:
    """The settings of whoever runs the tests are none of the tests'."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(PREFIX)]:
            patch.delenv(name)
        yield


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """A thread or a process that a test leaves behind fails it; @pytest.mark.leaks("why") lets it."""
    if request.node.get_closest_marker("leaks"):
        yield
        return
    before = Snapshot.take()
    yield
    if leaks := before.leaks():
        pytest.fail("left behind: " + "; ".join(leaks), pytrace=False)


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A real broker of the tests' own, shared by all of them; keep apart by `settings.key_prefix`."""
    with EmbeddedBroker() as broker:
        yield broker.url


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    """Settings of one test: its own key prefix and folders, and a life of jobs that is over soon."""
    return load_settings(
        redis_url=redis_url,
        key_prefix=f"t{uuid.uuid4().hex[:12]}",
        data_dir=tmp_path / "data",
        run_dir=tmp_path / "run",
        allow_stub=True,
        lease_ttl_s=1.5,
        reconcile_every_s=0.2,
        unclaimed_after_s=1.0,
        heartbeat_s=0.3,
        grace_s=1.0,
        job_timeout_s=60.0,
        sync_timeout_s=30.0,
        sse_keepalive_s=1.0,
        torch_threads=1,
    )


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Real workers, gateways and other commands, which end with the test."""
    running = Processes()
    try:
        yield running
    finally:
        running.stop_all()


def _present(backend: str) -> bool:
    from workers.backends import driver

    return bool(driver(backend).probe())
