"""A whole system under one roof, where its parts are unlucky."""

import os
import signal
import socket
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

import omnirt_tasks.embedded
from omnirt_tasks.client import Client
from omnirt_tasks.errors import OperatorError
from omnirt_tasks.graces import GATEWAY_GRACE_S
from omnirt_tasks.system import System, hermetic_environment

QUEUE = "cpu-stub-stub"


def ignore(_child: str, _line: str) -> None:
    """Nobody reads it."""


def make_system(folder: Path) -> System:
    environment = hermetic_environment(
        data_dir=folder / "data", run_dir=folder / "run", allow_stub=True, grace_s=1, torch_threads=1
    )
    return System(queues=[QUEUE], environment=environment, on_line=ignore, worker_grace_s=3.0)


def taken_first(port: int) -> Callable[[], int]:
    """What gives this port once, and free ones from then on."""
    ports = [port]
    real = omnirt_tasks.embedded.free_port
    return lambda: ports.pop() if ports else real()


def test_a_broker_that_lost_its_port_to_another_is_started_anew_and_the_system_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(omnirt_tasks.embedded, "free_port", taken_first(other.getsockname()[1]))
        with make_system(tmp_path) as system:
            with Client(system.url) as client:
                assert client.ready().queues[QUEUE].workers == 1
            (gateway,) = (p for p in psutil.Process().children() if "cli serve" in " ".join(p.cmdline()))
            grace_s = float(next(after for word, after in pairwise(gateway.cmdline()) if word.endswith("guard.py")))
            assert grace_s > GATEWAY_GRACE_S, "the gateway leaves by itself before its guard kills it"
            os.kill(gateway.pid, signal.SIGKILL)

            with pytest.raises(OperatorError, match="The gateway ended with exit status 137"):
                system.wait()


def test_an_environment_of_its_own_has_nothing_of_another_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIRT_API_KEY", "of another")
    monkeypatch.setenv("ELSE", "kept")

    environment = hermetic_environment(allow_stub=True, data_dir=Path("/x"), model_folders={"shapes": "/y"})

    assert {name: value for name, value in environment.items() if name.startswith("OMNIRT_")} == {
        "OMNIRT_ALLOW_STUB": "True",
        "OMNIRT_DATA_DIR": "/x",
        "OMNIRT_MODEL_FOLDERS": '{"shapes": "/y"}',
    }
    assert environment["ELSE"] == "kept"
