"""The setting `broker_fsync` reaches the server that `omnirt up` starts."""

from pathlib import Path

import pytest

from omnirt_tasks.embedded import free_port
from tests.support.commands import Command


@pytest.mark.parametrize(("given", "told"), [({}, "always"), ({"OMNIRT_BROKER_FSYNC": "everysec"}, "everysec")])
def test_the_broker_of_a_system_writes_as_the_setting_says(tmp_path: Path, given: dict[str, str], told: str) -> None:
    env = {
        "OMNIRT_DATA_DIR": str(tmp_path / "data"),
        "OMNIRT_RUN_DIR": str(tmp_path / "run"),
        "OMNIRT_PORT": str(free_port()),
        "OMNIRT_ALLOW_STUB": "true",
    }
    with Command("up", "-Q", "cpu-stub-stub", cwd=tmp_path, env=env | given) as system:
        system.until("Ready: ")
        written = (tmp_path / "data" / "broker" / "valkey.conf").read_text()
        assert f"appendfsync {told}\n" in written
        assert "appendonly yes\n" in written
