"""`omnirt broker`, as the Procfile runs it."""

import signal
from pathlib import Path

import redis

from omnirt_tasks.embedded import free_port
from tests.support.commands import Command
from tests.support.waiting import eventually


def test_it_serves_at_the_url_of_the_settings_until_it_is_stopped(tmp_path: Path) -> None:
    url = f"redis://:a-password@127.0.0.1:{free_port()}/0"
    with Command("broker", cwd=tmp_path, env={"OMNIRT_REDIS_URL": url}) as broker, redis.Redis.from_url(url) as client:
        eventually(lambda: answers(client), told=broker.told)

        broker.send(signal.SIGINT)

        assert broker.result() == 130
        assert broker.left() == []


def test_it_says_that_it_cannot_be_another_host_s_redis(tmp_path: Path) -> None:
    with Command("broker", cwd=tmp_path, env={"OMNIRT_REDIS_URL": "rediss://redis.example:6379/0"}) as broker:
        assert broker.result() == 1
    assert "OMNIRT_REDIS_URL names another place" in broker.told()


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
