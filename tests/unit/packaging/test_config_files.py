"""The files in config/ and the compose file say what is true."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import redis
import yaml
from pydantic import SecretStr
from redis.backoff import NoBackoff
from redis.retry import Retry

from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.observability import metrics
from omnirt_tasks.settings import Settings, load_settings
from tests.support.compose import ComposeRedis
from tests.support.processes import PROJECT, Processes

CONFIG = PROJECT / "config"
COMPOSE = yaml.safe_load((PROJECT / "docker-compose.yml").read_text(encoding="utf-8"))
NO_RETRY = Retry(NoBackoff(), 0)
# Where the default is taken from the host, the file shows an example.
FROM_THE_HOST = {"data_dir", "run_dir"}


def documented() -> dict[str, tuple[object, bool]]:
    """Each setting in config/omnirt.toml: its value there, and whether it is an example beside a default of none."""
    found = {}
    for line in (CONFIG / "omnirt.toml").read_text(encoding="utf-8").splitlines():
        if matched := re.fullmatch(r"# ([a-z0-9_]+ = .*?)( +# none by default| +#.*)?", line):
            ((name, value),) = tomllib.loads(matched[1]).items()
            found[name] = (value, "none by default" in (matched[2] or ""))
    return found


def test_the_example_settings_have_every_setting_with_its_default() -> None:
    settings = Settings()
    shown = documented()

    assert set(shown) == set(Settings.model_fields)
    for name in set(shown) - FROM_THE_HOST:
        value, example = shown[name]
        default = getattr(settings, name)
        if isinstance(default, SecretStr):
            default = default.get_secret_value()
        if isinstance(default, tuple):
            default = list(default)
        assert (None if example else value) == default, name


def test_every_example_is_a_setting_that_would_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = re.sub(r"(?m)^# ([a-z0-9_]+ = )", r"\1", (CONFIG / "omnirt.toml").read_text(encoding="utf-8"))
    (tmp_path / "omnirt.toml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("OMNIRT_CONFIG", str(tmp_path / "omnirt.toml"))

    assert load_settings().worker_name == "cuda-0"


def test_a_secret_comes_from_a_file_and_an_environment_variable_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "omnirt_redis_url").write_text("redis://worker:secret@redis:6379/0", encoding="utf-8")
    (tmp_path / "omnirt_broker_url").write_text("redis://worker:secret@redis:6379/1", encoding="utf-8")
    monkeypatch.setenv("OMNIRT_SECRETS_DIR", str(tmp_path))
    monkeypatch.setenv("OMNIRT_BROKER_URL", "redis://127.0.0.1:6379/2")

    settings = load_settings()

    assert settings.redis_url.get_secret_value() == "redis://worker:secret@redis:6379/0"
    assert settings.celery_url == "redis://127.0.0.1:6379/2"
    assert "secret" not in repr(settings)


def test_a_secrets_folder_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNIRT_SECRETS_DIR", str(tmp_path / "nowhere"))

    with pytest.raises(ConfigurationError, match="OMNIRT_SECRETS_DIR"):
        load_settings()


@pytest.mark.parametrize("file", ["prometheus-rules.yml", "grafana-dashboard.json"])
def test_rules_and_dashboard_ask_for_metrics_that_exist(file: str) -> None:
    text = (CONFIG / file).read_text(encoding="utf-8")

    asked = set(re.findall(r"\bomnirt_(?!tasks\b)[a-z_]+", text))

    assert asked
    assert asked <= {metric.name for metric in metrics.ALL} | {f"{metrics.STAGE_DURATION.name}_bucket"}


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_every_container_is_closed(name: str) -> None:
    service = COMPOSE["services"][name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service
    assert service["healthcheck"]
    assert re.search(r":[0-9][^:]*$", service["image"]), "an image names its version"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert not [volume for volume in service.get("volumes", []) if "docker.sock" in volume]
    assert not re.search(r"password|redis://", str(service.get("environment", "")), re.IGNORECASE)


def test_redis_is_reached_from_inside_only_and_flower_is_asked_for() -> None:
    services = COMPOSE["services"]

    assert "ports" not in services["redis"]
    assert services["redis"]["networks"] == ["inside"]
    assert COMPOSE["networks"]["inside"]["internal"] is True
    assert services["flower"]["profiles"] == ["flower"]


@pytest.fixture
def server(tmp_path: Path, processes: Processes) -> ComposeRedis:
    return ComposeRedis(tmp_path, processes)


def test_each_role_has_the_redis_rights_that_it_needs_and_no_more(server: ComposeRedis) -> None:
    for role in ("gateway", "worker"):
        with redis.Redis.from_url(server.url(f"{role}_redis_url")) as client:
            client.hset("omnirt:job:1", "prompt", "private")
            client.eval("return redis.call('TIME')", 0)
            for forbidden in ("CONFIG GET *", "FLUSHALL", "KEYS *", "ACL LIST", "SHUTDOWN"):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    client.execute_command(*forbidden.split())

    with redis.Redis.from_url(server.url("flower_broker_url")) as client:
        client.publish("omnirt:celery:/1.celeryev", "seen")
        client.llen("omnirt:celery:cpu-shapes")
        for forbidden in ("HGETALL omnirt:job:1", "XRANGE omnirt:events:1 - +", "SUBSCRIBE omnirt:events", "KEYS *"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*forbidden.split())


def test_nobody_gets_in_without_a_password_and_the_health_check_sees_nothing(server: ComposeRedis) -> None:
    with redis.Redis(port=server.port, retry=NO_RETRY) as nobody, pytest.raises(redis.exceptions.AuthenticationError):
        nobody.ping()
    with (
        redis.Redis(port=server.port, username="health", password="any") as health,
        pytest.raises(redis.exceptions.NoPermissionError),
    ):
        health.get("omnirt:job:1")


def test_secrets_are_made_once_and_kept(tmp_path: Path) -> None:
    script = [str(PROJECT / "docker" / "make-secrets"), str(tmp_path / "secrets")]
    subprocess.run(script, check=True, capture_output=True, timeout=30)
    before = {file.name: file.read_bytes() for file in (tmp_path / "secrets").iterdir()}

    subprocess.run(script, check=True, capture_output=True, timeout=30)

    assert {file.name: file.read_bytes() for file in (tmp_path / "secrets").iterdir()} == before
    assert {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()} == set(before)
    assert (tmp_path / "secrets").stat().st_mode & 0o077 == 0
    # A container reads them as another user than the one who made them.
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in (tmp_path / "secrets").iterdir())
