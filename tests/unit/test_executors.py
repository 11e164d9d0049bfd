"""Every way to run a model has its executor."""

from pathlib import Path

import pytest

from omnirt_tasks.contract import ExecutionMode
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.registry import Launcher
from workers.executors import executor_for
from workers.launchers import RANK, command
from workers.ranks import RankArguments


@pytest.mark.parametrize("mode", [mode for mode in ExecutionMode if mode is not ExecutionMode.REMOTE])
def test_a_mode_is_run_by_the_executor_of_its_name(mode: ExecutionMode) -> None:
    names = {
        ExecutionMode.MODULAR: "ModularExecutor",
        ExecutionMode.LEGACY_CALL: "LegacyCallExecutor",
        ExecutionMode.SUBPROCESS: "ProgramExecutor",
        ExecutionMode.PERSISTENT_WORKER: "RankGroupExecutor",
    }

    assert type(executor_for("cpu", mode)).__name__ == names[mode]
    assert type(executor_for("cpu-stub", mode)).__name__ == "StubExecutor"


def test_a_mode_without_an_executor_says_so() -> None:
    with pytest.raises(ConfigurationError, match="remote"):
        executor_for("cpu", ExecutionMode.REMOTE)


@pytest.mark.parametrize("launcher", list(Launcher))
def test_every_launcher_gives_each_rank_the_same_words(launcher: Launcher) -> None:
    arguments = RankArguments("module:Class", Path("a folder"), "cuda:0", "bf16")

    words = command(launcher, 1 if launcher is Launcher.PYTHON else 2, arguments)

    place = words.index(RANK[1])
    assert tuple(words[place - 1 : place + 1]) == RANK
    assert RankArguments.of_words(words[place + 1 :]) == arguments
