"""`omnirt calibrate`: what it measures, a worker of the same host begins with."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from omnirt_tasks.cli import cli
from omnirt_tasks.registry import discover
from omnirt_tasks.settings import load_settings
from workers.plan import plan_for_queues
from workers.serving import host_config
from workers.thread_host import ThreadHost

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMNIRT_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("OMNIRT_TORCH_THREADS", "1")
    return tmp_path / "data"


def test_what_was_measured_is_shown_and_a_worker_begins_with_it() -> None:
    told = CliRunner().invoke(cli, ["calibrate", "shapes", "--up-to", "2"])

    assert told.exit_code == 0, told.output
    assert "unet 64x64 fp32" in told.stdout
    settings = load_settings()
    plan = plan_for_queues(["cpu-shapes"], discover(), settings)
    host = ThreadHost.from_config(host_config(settings, plan, "cpu:0", concurrency=2))
    try:
        measured = {measure.module: measure for measure in host.capability().abilities["shapes"].chunks}
    finally:
        host.close()
    assert {"2", "4"} <= measured["unet"].step_ms.keys(), "one picture and two, with guidance"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["shapse"], 2, "shapes"),
        (["shapes", "--size", "64"], 2, "512x512"),
        (["shapes", "--size", "64x65"], 2, "config.height"),
        (["flite"], 2, "task"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_the_remedy(
    data_dir: Path, arguments: list[str], exit_code: int, said: str
) -> None:
    told = CliRunner().invoke(cli, ["calibrate", *arguments])

    assert (told.exit_code, said in told.output) == (exit_code, True), told.output
    assert not data_dir.exists()
