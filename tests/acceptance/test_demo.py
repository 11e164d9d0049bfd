"""`omnirt demo`, as a process: a picture, and nothing else left behind."""

import re
import signal
from pathlib import Path

import pytest
from PIL import Image

from tests.support.commands import Command
from tests.support.waiting import eventually

# Another installation's, which is none of the demo's business.
ELSEWHERE = {"OMNIRT_REDIS_URL": "redis://127.0.0.1:1/0", "OMNIRT_URL": "http://127.0.0.1:1", "OMNIRT_NO_SUCH": "1"}


def test_it_draws_a_picture_tells_path_and_seed_and_leaves_no_process(tmp_path: Path) -> None:
    with Command("demo", cwd=tmp_path, env=ELSEWHERE) as demo:
        assert demo.result() == 0, demo.told()
        assert demo.left() == []

    (picture,) = (tmp_path / "out").iterdir()
    told = re.search(r"^(out/.*\.png)  \(seed (\d+)\)$", "\n".join(demo.out), re.MULTILINE)
    assert told is not None, demo.told()
    assert (told[1], told[2]) == (f"out/{picture.name}", picture.stem.rpartition("-")[2])
    assert "make up" in demo.out[-2]
    with Image.open(picture) as opened:
        opened.load()
        assert (opened.format, opened.size) == ("PNG", (64, 64))
    assert [file for file in tmp_path.iterdir() if file.name != "out"] == []


@pytest.mark.parametrize(
    ("words", "number", "status"),
    [
        ("starting a broker", signal.SIGINT, 130),
        ("starting a broker", signal.SIGTERM, 143),
        ("loading the model", signal.SIGINT, 130),
        ("stopping everything", signal.SIGINT, 130),
    ],
)
def test_interrupted_at_any_point_it_leaves_no_process(
    words: str, number: signal.Signals, status: int, tmp_path: Path
) -> None:
    with Command("demo", cwd=tmp_path) as demo:
        demo.until(words)

        demo.send(number)

        assert demo.result() == status, demo.told()
        assert demo.left() == []
        assert "Traceback" not in demo.told()


def test_killed_outright_it_leaves_no_process_either(tmp_path: Path) -> None:
    with Command("demo", cwd=tmp_path) as demo:
        demo.until("queued on")

        demo.send(signal.SIGKILL)

        assert demo.result() == -signal.SIGKILL
        eventually(lambda: not demo.left(), 20, told=lambda: "\n".join(demo.left()))
