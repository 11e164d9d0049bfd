"""Flower's settings: behind a password, with its API closed (leave FLOWER_UNAUTHENTICATED_API unset)."""

from pathlib import Path

address = "0.0.0.0"  # inside the container; the compose file publishes it on loopback only
port = 5555
# One NAME:PASSWORD a line.
basic_auth = Path("/run/secrets/flower_basic_auth").read_text(encoding="utf-8").split()
# Tasks carry a job id and nothing else, so that there is nothing to hide in what is shown.
max_tasks = 10_000
persistent = False
