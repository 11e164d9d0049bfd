"""Writes the frames of a video as MP4, through ffmpeg. No torch."""

import logging
import subprocess
from typing import TYPE_CHECKING, Any

from omnirt_tasks import ffmpeg
from omnirt_tasks.contract import ArtifactKind
from omnirt_tasks.errors import ModelFailed, StorageError
from workers.context import JobContext
from workers.executors.pictures import picture_seed
from workers.host import OutputFile, RunOrder

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

MP4 = "video/mp4"
TOLD_CHARS_MAX = 2_000


def save_video(frames: "np.ndarray[Any, Any]", index: int, order: RunOrder, job: JobContext) -> OutputFile:
    """Write frames (frames, height, width, 3) of bytes as H.264 into the order's folder, as `0.mp4`, `1.mp4` and so on.

    Raises ModelFailed for sides that H.264 cannot do, StorageError when ffmpeg fails, ConfigurationError when there is
    none, Interrupted when the job is to stop.
    """
    count, height, width, _ = frames.shape
    fps = order.request.inputs.fps
    assert fps is not None, "a resolved request of a video has its frames per second"
    if width % 2 or height % 2:
        raise ModelFailed(
            f"A video of {width}x{height} px cannot be written: its sides are to be even.",
            "Ask for an even width and height.",
        )
    name = f"{index}.mp4"
    # What decodes everywhere: colours at half size, and the index ahead of the pictures.
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "pipe:0"]
    target = ["-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart", str(order.output_dir / name)]
    _encode([ffmpeg.executable(), "-loglevel", "error", "-y", *source, *target], frames, job)
    return OutputFile(
        name=name,
        index=index,
        kind=ArtifactKind.VIDEO,
        mime=MP4,
        width=width,
        height=height,
        num_frames=count,
        seed=picture_seed(order, index),
    )


def _encode(command: list[str], frames: "np.ndarray[Any, Any]", job: JobContext) -> None:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            with job.woken_by(process.kill):
                _, told = process.communicate(frames.tobytes())
        except BaseException:
            process.kill()
            raise
    job.check()
    if process.returncode:
        log.error("ffmpeg failed", extra={"ffmpeg": told.decode(errors="replace")[-TOLD_CHARS_MAX:]})
        raise StorageError("The video could not be written.", "The worker's disk may be full; its log says more.")
