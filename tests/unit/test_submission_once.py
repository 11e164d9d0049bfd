"""Under a key of the caller's, a submit that is repeated is one job."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.errors import IdempotencyMismatch, OmnirtError, QueueFull
from tests.support.submission import House, data_url, png


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_the_same_submit_under_a_key_is_one_job(house: House) -> None:
    first, again = house.once("a key"), house.once("a key")

    assert (first.replayed, again.replayed) == (False, True)
    assert again.job.record.id == first.job.record.id
    assert house.sent == [*first.job.wake_ups], "its message is not sent twice"


def test_a_repeat_is_not_checked_again(house: House) -> None:
    upload = house.uploads.put("anna", io.BytesIO(png()))
    body: dict[str, Any] = {
        "task": "image2image",
        "model": "sdxl-base-1.0",
        "inputs": {"prompt": "a", "image": f"upload:{upload.id}"},
    }
    first = house.once("a key", **body)
    for file in house.folder.glob("uploads/*"):
        file.unlink()

    assert house.once("a key", **body).job.record.id == first.job.record.id


def test_another_request_under_the_same_key_is_refused_and_another_owner_has_keys_of_his_own(house: House) -> None:
    mine = house.once("a key")

    with pytest.raises(IdempotencyMismatch):
        house.once("a key", inputs={"prompt": "a blue circle"})
    theirs = house.once("a key", owner="bert", inputs={"prompt": "a blue circle"})

    assert not theirs.replayed
    assert theirs.job.record.id != mine.job.record.id
    assert len(house.sent) == 2


def test_how_a_request_is_written_and_waited_for_does_not_tell_it_from_another(house: House) -> None:
    first = house.once("a key", config={"preset": "fast", "seed": 3})

    again = house.once("a key", async_run=True, tags=[], config={"seed": 3, "preset": "fast"})

    assert again.job.record.id == first.job.record.id


def test_a_refused_request_leaves_its_key_free(house: House) -> None:
    with pytest.raises(OmnirtError):
        house.once("a key", config={"width": 513})

    assert not house.once("a key").replayed


def test_the_same_submit_at_the_same_time_is_one_job(house: House) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = [future.result() for future in [pool.submit(house.once, "a key") for _ in range(32)]]

    assert len({one.job.record.id for one in made}) == 1
    assert [one.replayed for one in made].count(False) == 1
    assert len(house.sent) == 1


def test_a_submit_that_was_overtaken_by_its_like_is_that_one(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    first = house.once("a key")
    a_moment_before, now = [None], house.store.submitted
    monkeypatch.setattr(
        house.store, "submitted", lambda *asked: a_moment_before.pop() if a_moment_before else now(*asked)
    )

    second = house.once("a key")

    assert (second.job.record.id, second.replayed) == (first.job.record.id, True)
    assert len(house.sent) == 1


def test_what_a_submit_brought_that_made_no_job_stays_nowhere(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body: dict[str, Any] = {
        "task": "image2image",
        "model": "sdxl-base-1.0",
        "inputs": {"prompt": "a", "image": data_url(png())},
    }
    full = House(tmp_path / "full", queue_limit=1)
    full.submit(model="sdxl-base-1.0")
    with pytest.raises(QueueFull):
        full.once("a key", **body)
    assert not list(full.folder.glob("uploads/*"))

    house.once("a key", **body)
    a_moment_before, now = [None], house.store.submitted
    monkeypatch.setattr(
        house.store, "submitted", lambda *asked: a_moment_before.pop() if a_moment_before else now(*asked)
    )
    assert house.once("a key", **body).replayed
    assert len(list(house.folder.glob("uploads/*.bin"))) == 1
