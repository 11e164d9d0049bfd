"""Opening what a job made, as any other program would."""

import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import imageio_ffmpeg
from PIL import Image, ImageChops

FFMPEG_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Film:
    """A film as ffmpeg reads it: its frames as RGB bytes, its size in pixels, its frames per second."""

    frames: tuple[bytes, ...]
    size: tuple[int, int]
    fps: float


def opened(path: Path) -> Image.Image:
    """The picture, read to its last byte."""
    with Image.open(path) as stored:
        stored.verify()
    picture: Image.Image = Image.open(path)
    with picture:
        picture.load()
    return picture


def frames_of(path: Path) -> Film:
    """The film, read to its last frame. Raises CalledProcessError when it is none."""
    # As a stream of yuv4mpeg a film begins with what it is: b"YUV4MPEG2 W64 H48 F8:1 …".
    told = {word[:1]: word[1:].decode() for word in _decoded(path, "-f", "yuv4mpegpipe").split(b"\n", 1)[0].split()}
    width, height = int(told[b"W"]), int(told[b"H"])
    pixels, frame_bytes = _decoded(path, "-f", "rawvideo", "-pix_fmt", "rgb24"), width * height * 3
    frames = tuple(pixels[start : start + frame_bytes] for start in range(0, len(pixels), frame_bytes))
    return Film(frames, (width, height), float(Fraction(told[b"F"].replace(":", "/"))))


def _decoded(path: Path, *form: str) -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path), "-fps_mode", "passthrough"]
    return subprocess.run([*command, *form, "-"], capture_output=True, check=True, timeout=FFMPEG_TIMEOUT_S).stdout


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures in any channel of any pixel, of 255."""
    extrema: Any = ImageChops.difference(one, other).getextrema()
    return max(int(high) for _, high in extrema)
