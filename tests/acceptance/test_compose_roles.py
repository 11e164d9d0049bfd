"""The parts of docker-compose.yml, with the rights and secrets that they have there."""

import base64
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from omnirt_tasks.settings import Settings, load_settings
from tests.support.compose import ComposeRedis
from tests.support.processes import PROJECT, Processes, environment, free_port
from tests.support.waiting import eventually

JOB = {
    "task": "text2image",
    "model": "stub",
    "backend": "cpu-stub",
    "inputs": {"prompt": "something private"},
    "config": {"num_inference_steps": 2},
}


@pytest.fixture
def redis_of_compose(tmp_path: Path, processes: Processes) -> ComposeRedis:
    return ComposeRedis(tmp_path, processes)


def settings_of_compose(tmp_path: Path) -> Settings:
    """What the compose file sets, and what differs on a host: folders, ports, the stub."""
    return load_settings(
        data_dir=tmp_path / "data",
        run_dir=tmp_path / "run",
        allow_stub=True,
        worker_name="cpu-0",
        metrics_port=free_port(),
        grace_s=2,
        log_json=True,
    )


def test_gateway_and_worker_have_the_rights_for_a_job_and_flower_shows_it_without_its_prompt(
    redis_of_compose: ComposeRedis, processes: Processes, tmp_path: Path
) -> None:
    keys = redis_of_compose.secrets / "api_keys"
    key = keys.read_text(encoding="utf-8").strip().partition(":")[2]
    settings = settings_of_compose(tmp_path)
    flower_port = free_port()
    flower_conf = tmp_path / "flowerconfig.py"
    flower_conf.write_text(
        (PROJECT / "config" / "flowerconfig.py")
        .read_text(encoding="utf-8")
        .replace("/run/secrets/", f"{redis_of_compose.secrets}/")
        .replace("5555", str(flower_port))
        .replace("0.0.0.0", "127.0.0.1"),  # noqa: S104  # what the container binds to
        encoding="utf-8",
    )

    gateway, url = processes.gateway(
        settings,
        env={
            "OMNIRT_SECRETS_DIR": str(redis_of_compose.secrets_of("gateway")),
            "OMNIRT_API_KEYS_FILE": str(keys),
        },
    )
    worker_secrets = str(redis_of_compose.secrets_of("worker"))
    worker = processes.worker(settings, "cpu-stub-stub", env={"OMNIRT_SECRETS_DIR": worker_secrets})
    flower = processes.start(
        "flower",
        [sys.executable, "-m", "celery", "-A", "omnirt_tasks", "flower", f"--conf={flower_conf}"],
        env=environment(settings, OMNIRT_SECRETS_DIR=str(redis_of_compose.secrets_of("flower"))),
    )

    headers = {"x-api-key": key, "Content-Type": "application/json"}
    login = base64.b64encode((redis_of_compose.secrets / "flower_basic_auth").read_bytes().strip()).decode()
    pages = f"http://127.0.0.1:{flower_port}"

    def flower_sees_the_worker() -> bool:
        return "cpu-0@" in read(f"{pages}/workers", {"Authorization": f"Basic {login}"})

    eventually(flower_sees_the_worker, 30, told=lambda: "\n".join(flower.last_lines))
    job = json.loads(read(f"{url}/v1/jobs", headers | {"Prefer": "wait=30"}, json.dumps(JOB)))
    assert job["state"] == "succeeded", f"{job}\n" + "\n".join(worker.last_lines)
    page = eventually(lambda: read(f"{pages}/task/{job['id']}", {"Authorization": f"Basic {login}"}), 15)
    assert "omnirt.generate" in page
    assert "private" not in page
    counted = read(f"http://127.0.0.1:{settings.metrics_port}/metrics", {})
    assert 'omnirt_stage_duration_seconds_count{model="stub",stage="denoise"} 1.0' in counted
    assert "private" not in "".join([*worker.last_lines, *gateway.last_lines, *flower.last_lines])
    assert status(f"{pages}/workers", {}) == 401
    assert status(f"{url}/v1/jobs/{job['id']}", {}) == 401


def read(url: str, headers: dict[str, str], body: str | None = None) -> str:
    """The text of an answer; empty for one that is an error, or for none."""
    request = urllib.request.Request(url, data=None if body is None else body.encode(), headers=headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=40) as answer:  # noqa: S310
            text: str = answer.read().decode()
            return text
    except OSError:
        return ""


def status(url: str, headers: dict[str, str]) -> int:
    """The status of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
