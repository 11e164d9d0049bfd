"""The bench of sharing runs where there is a GPU, with random weights of a published model's size."""

import pytest

from omnirt_tasks.bench.figures import Table
from omnirt_tasks.bench.sharing import CHUNKS, Subject, measure


@pytest.mark.slow
@pytest.mark.hardware("cuda")
def test_chunks_of_every_size_are_measured_on_a_gpu() -> None:
    subject = Subject("sd15", "cuda:0", None, True, size_px=512, steps=4, dtype="bf16", torch_threads=1)

    *_, table = measure(subject, rounds=1, pictures=max(CHUNKS))

    assert isinstance(table, Table)
    assert [row.name for row in table.rows] == [str(chunk) for chunk in CHUNKS]
