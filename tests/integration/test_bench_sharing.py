"""`omnirt bench sharing`: every size of chunk is measured, and what it cannot measure it refuses with what to do."""

import pytest
from click.testing import CliRunner

from omnirt_tasks.bench.figures import Table
from omnirt_tasks.bench.sharing import CHUNKS, Subject, measure
from omnirt_tasks.cli import cli


def test_chunks_are_as_large_as_jobs_wait_whatever_pays() -> None:
    subject = Subject("shapes", "cpu:0", None, False, size_px=64, steps=6, dtype="fp32", torch_threads=1)

    *_, table = measure(subject, rounds=1, pictures=max(CHUNKS))

    assert isinstance(table, Table)
    assert [row.name for row in table.rows] == [str(chunk) for chunk in CHUNKS]
    jobs_a_forward = [float(row.cells[table.columns.index("jobs a forward, mean")]) for row in table.rows]
    assert jobs_a_forward[0] == 1
    assert jobs_a_forward[-1] > 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "nothing"], "nothing"),
        (["--model", "sd15"], "--folder"),
        (["--model", "flux-dev", "--random"], "sd15"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_to_do(arguments: list[str], told: str) -> None:
    ended = CliRunner().invoke(cli, ["bench", "sharing", "--rounds", "1", *arguments])

    assert ended.exit_code in {1, 2}
    assert told in ended.stderr
