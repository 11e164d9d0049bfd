"""Videos: written whole, counted back, and never from NaN."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omnirt_tasks.contract import ArtifactKind, ExecutionMode, Inputs, ResolvedRequest, Task
from omnirt_tasks.errors import ModelFailed, StorageError
from tests.support.hosts import Bench, family_bench
from tests.support.tiny.wan import tiny_wan
from workers.backends import driver
from workers.context import Interrupted, JobContext
from workers.device import DeviceThread
from workers.executors.videos import save_video
from workers.host import InterruptReason, RunFailed, RunOrder, RunSucceeded


@pytest.fixture
def device() -> Iterator[DeviceThread]:
    thread = DeviceThread(driver("cpu-stub"))
    yield thread
    thread.close()


@pytest.fixture
def job(tmp_path: Path, device: DeviceThread) -> JobContext:
    request = ResolvedRequest(
        task=Task.TEXT2VIDEO,
        model="wan2.1-t2v-14b",
        backend="cpu",
        inputs=Inputs(prompt="a red circle", num_frames=9, fps=8),
        config={"seed": 5},
    )
    return JobContext(RunOrder("job-1", 1, request, tmp_path), device, lambda _: None)


def frames(count: int, width: int, height: int) -> "np.ndarray[Any, Any]":
    """Frame i is grey of 20 i."""
    greys = np.arange(count, dtype=np.uint8) * 20
    return np.broadcast_to(greys[:, None, None, None], (count, height, width, 3)).copy()


def read_back(path: Path, width: int, height: int) -> tuple[str, list["np.ndarray[Any, Any]"]]:
    """What ffmpeg says of the file's video, and its frames."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:1"]
    done = subprocess.run(command, capture_output=True, check=True)
    about = next(line for line in done.stderr.decode().splitlines() if "Video: h264" in line)
    return about, list(np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3))


def test_a_video_has_its_frames_in_order_its_size_and_its_speed(job: JobContext, tmp_path: Path) -> None:
    output = save_video(frames(9, 48, 34), 0, job.order, job)
    about, shown = read_back(tmp_path / "0.mp4", 48, 34)
    assert (output.name, output.kind, output.mime) == ("0.mp4", ArtifactKind.VIDEO, "video/mp4")
    assert (output.width, output.height, output.num_frames, output.seed) == (48, 34, 9, 5)
    for told in ("yuv420p", "48x34", " 8 fps"):
        assert told in about
    assert [round(float(frame.mean()) / 20) for frame in shown] == list(range(9))


def test_a_player_may_begin_before_it_has_the_whole_file(job: JobContext, tmp_path: Path) -> None:
    save_video(frames(9, 48, 34), 0, job.order, job)
    written = (tmp_path / "0.mp4").read_bytes()
    assert 0 < written.find(b"moov") < written.find(b"mdat")


def test_a_video_of_one_frame_is_one(job: JobContext, tmp_path: Path) -> None:
    assert save_video(frames(1, 16, 16), 0, job.order, job).num_frames == 1
    assert len(read_back(tmp_path / "0.mp4", 16, 16)[1]) == 1


@pytest.mark.parametrize("size", [(47, 34), (48, 33)])
def test_odd_sides_are_refused_with_a_remedy(job: JobContext, tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ModelFailed, match=f"{size[0]}x{size[1]} px") as raised:
        save_video(frames(9, *size), 0, job.order, job)
    assert "even" in (raised.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_without_its_path(
    job: JobContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "0.mp4").mkdir()
    with pytest.raises(StorageError) as raised:
        save_video(frames(9, 48, 34), 0, job.order, job)
    assert str(tmp_path) not in str(raised.value)
    assert raised.value.hint
    assert "ffmpeg failed" in caplog.text


def test_a_job_that_is_to_stop_ends_ffmpeg_too(job: JobContext) -> None:
    job.interrupt(InterruptReason.CANCEL)
    with pytest.raises(Interrupted):
        save_video(frames(200, 640, 480), 0, job.order, job)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "wan"
    tiny_wan().save_pretrained(folder)
    return folder


def wan_bench(tmp_path: Path, folder: Path) -> Bench:
    return family_bench(tmp_path, "wan2.1-t2v-14b", folder, mode=ExecutionMode.LEGACY_CALL)[0]


def test_a_model_of_videos_gives_one_with_the_frames_asked_for(wan: Path, tmp_path: Path) -> None:
    bench = wan_bench(tmp_path, wan)
    order = bench.order(task=Task.TEXT2VIDEO, inputs={"num_frames": 9, "fps": 12})
    outcome = bench.run(order)
    bench.host.close()
    assert isinstance(outcome, RunSucceeded), outcome
    (output,) = outcome.outputs
    assert (output.kind, output.width, output.height, output.num_frames) == (ArtifactKind.VIDEO, 64, 64, 9)
    about, shown = read_back(order.output_dir / output.name, 64, 64)
    assert len(shown) == 9
    assert " 12 fps" in about


def test_a_frame_of_nan_is_never_a_video(tmp_path: Path) -> None:
    import torch

    pipeline = tiny_wan()
    torch.nn.init.constant_(pipeline.vae.decoder.conv_out.bias, float("nan"))
    pipeline.save_pretrained(tmp_path / "spoilt")
    bench = wan_bench(tmp_path, tmp_path / "spoilt")
    order = bench.order(task=Task.TEXT2VIDEO, inputs={"num_frames": 9})
    outcome = bench.run(order)
    bench.host.close()
    assert isinstance(outcome, RunFailed), outcome
    assert outcome.error.code == "non_finite_output"
    assert list(order.output_dir.iterdir()) == []
