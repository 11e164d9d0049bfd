"""Where ffmpeg is found, and what is said where there is none."""

import stat
from pathlib import Path

import imageio_ffmpeg
import pytest

from omnirt_tasks import ffmpeg
from omnirt_tasks.errors import ConfigurationError


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of a name of its own, in the only folder of PATH."""
    path = tmp_path / "my-ffmpeg"
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    return path


def test_the_one_that_is_installed_with_us_is_found_whatever_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE", raising=False)
    monkeypatch.setenv("PATH", "")
    assert Path(ffmpeg.executable()).is_absolute()


def test_one_on_the_path_is_given_as_a_path_that_holds_without_it(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", program.name)
    assert ffmpeg.executable() == str(program)


@pytest.mark.parametrize("named", ["no-such-ffmpeg", "/no/such/ffmpeg"])
def test_where_there_is_none_it_is_told_with_a_remedy(
    program: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", named)
    with pytest.raises(ConfigurationError, match="no ffmpeg") as raised:
        ffmpeg.executable()
    assert "IMAGEIO_FFMPEG_EXE" in (raised.value.hint or "")


def test_where_nothing_was_installed_either_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", none)
    with pytest.raises(ConfigurationError, match="no ffmpeg"):
        ffmpeg.executable()
