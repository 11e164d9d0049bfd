"""`omnirt worker list`: what an operator sees of the workers that live."""

import json
from contextlib import closing

import pytest
from click.testing import CliRunner

from omnirt_tasks.cli import cli
from omnirt_tasks.contract import ExecutionMode, ModelAbility, Task, WorkerCapability
from omnirt_tasks.contract.capability import ChunkMeasure
from omnirt_tasks.settings import Settings
from omnirt_tasks.stores import open_stores
from tests.support.processes import environment

MEASURE = ChunkMeasure(module="unet", shape="64x64 fp32", limit=8, gain=1.976, step_ms={"2": 6.9, "8": 13.9})
ABILITIES = {
    "shapes": ModelAbility(tasks=(Task.TEXT2IMAGE,), execution_mode=ExecutionMode.LEGACY_CALL, chunks=(MEASURE,)),
    "flite": ModelAbility(tasks=(), execution_mode=ExecutionMode.SUBPROCESS, unchunked="it holds the device"),
}


def test_the_live_workers_are_listed_with_how_many_rows_share_a_call(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(settings).items():
        if name.startswith("OMNIRT_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("COLUMNS", "160")
    record = WorkerCapability(
        worker_id="cpu-0", backend="cpu", device="cpu:0", queues=("cpu-shapes",), loaded=("shapes",), running=3,
        concurrency=8, abilities=ABILITIES,
    )  # fmt: skip
    with closing(open_stores(settings)) as stores:
        stores.fleet.publish(record, ttl_ms=60_000)

    told = CliRunner().invoke(cli, ["worker", "list"])
    as_json = CliRunner().invoke(cli, ["worker", "list", "--json"])

    for words in ("cpu-0", "3 of 8", "shapes unet 64x64 fp32: 8 rows, 1.98x", "flite: none, it holds the device"):
        assert words in told.output
    assert [WorkerCapability.model_validate(each) for each in json.loads(as_json.stdout)] == [record]
