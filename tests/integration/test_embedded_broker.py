"""The embedded broker, as a real server."""

import stat
from pathlib import Path

import psutil
import pytest
import redis

from omnirt_tasks.embedded import EmbeddedBroker, free_port, port_is_free
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.settings import Fsync
from tests.support.waiting import eventually


def client(broker: EmbeddedBroker) -> redis.Redis:
    return redis.Redis.from_url(broker.url, decode_responses=True)


def test_it_serves_who_has_the_url_and_refuses_who_has_no_password() -> None:
    with EmbeddedBroker() as broker, client(broker) as connection:
        assert connection.ping()
        port = broker.url.rpartition(":")[2].removesuffix("/0")
        with redis.Redis(port=int(port)) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()


def test_the_password_is_in_no_command_line_and_in_no_file_that_others_read(tmp_path: Path) -> None:
    with EmbeddedBroker(data_dir=tmp_path) as broker:
        password = broker.url.split(":")[2].split("@")[0]
        assert broker.child is not None
        guard = psutil.Process(broker.child.pid)
        lines = [" ".join(process.cmdline()) for process in (guard, *guard.children())]
        assert len(lines) == 2
        assert not any(password in line for line in lines)
        assert stat.S_IMODE((tmp_path / "valkey.conf").stat().st_mode) == 0o600


def test_stopped_and_started_again_it_has_the_same_url() -> None:
    broker = EmbeddedBroker()
    with broker:
        url = broker.url
    with broker, client(broker) as connection:
        assert broker.url == url
        assert connection.ping()


def test_with_a_folder_the_data_outlive_the_server(tmp_path: Path) -> None:
    with EmbeddedBroker(data_dir=tmp_path) as broker, client(broker) as connection:
        connection.set("kept", "yes")
    with EmbeddedBroker(data_dir=tmp_path) as broker, client(broker) as connection:
        assert connection.get("kept") == "yes"


@pytest.mark.parametrize("fsync", Fsync)
def test_what_it_answered_survives_that_it_is_killed(tmp_path: Path, fsync: Fsync) -> None:
    broker = EmbeddedBroker(data_dir=tmp_path, fsync=fsync)
    with broker, client(broker) as connection:
        assert connection.config_get("append*") == {
            "appendonly": "yes",
            "appendfsync": fsync.value,
            "appendfilename": "appendonly.aof",
            "appenddirname": "appendonlydir",
        }
        connection.set("kept", "yes")
        assert broker.child is not None
        broker.child.kill()
        assert broker.child.wait(10.0)
    with broker, client(broker) as connection:
        assert connection.get("kept") == "yes"


def test_two_servers_never_share_a_folder(tmp_path: Path) -> None:
    with EmbeddedBroker(data_dir=tmp_path) as first:
        with pytest.raises(ConfigurationError, match="Another embedded broker uses"):
            EmbeddedBroker(data_dir=tmp_path).start()
        with client(first) as connection:
            assert connection.ping()


def test_a_port_that_is_taken_is_an_error_that_says_so() -> None:
    port = free_port()
    with EmbeddedBroker(port=port):
        assert not port_is_free("127.0.0.1", port)
        with pytest.raises(ConfigurationError, match="Address already in use"):
            EmbeddedBroker(port=port).start()


def test_a_password_of_the_operator_s_may_have_any_character() -> None:
    with EmbeddedBroker(password='a "b"/:@ c') as broker, client(broker) as connection:
        assert connection.ping()


def test_its_end_is_told() -> None:
    ended: list[str] = []
    broker = EmbeddedBroker(on_exit=lambda child: ended.append(child.name))
    with broker:
        assert broker.child is not None
        broker.child.kill()
        assert eventually(lambda: ended) == ["broker"]
