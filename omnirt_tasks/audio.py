"""Sound files as plain samples, by ffmpeg; for models that listen."""

import subprocess
from pathlib import Path

from omnirt_tasks import ffmpeg
from omnirt_tasks.errors import ModelFailed, TooLarge, UnsupportedMediaType

SAMPLE_BYTES = 2
DECODE_TIMEOUT_S = 60.0
# What an upload may be (`uploads`), and nothing that names other files or addresses, as a playlist does.
FORMATS = "wav,flac,ogg,mp3"


def decode_mono(file: Path, *, rate_hz: int, max_s: float, timeout_s: float = DECODE_TIMEOUT_S) -> bytes:
    """The sound as signed 16-bit little-endian samples of one channel.

    Raises UnsupportedMediaType for what is no sound, TooLarge for more than `max_s` seconds of it, ModelFailed when
    decoding takes longer than `timeout_s`, ConfigurationError when there is no ffmpeg.
    """
    limit_bytes = int(max_s * rate_hz) * SAMPLE_BYTES
    command = [
        *(ffmpeg.executable(), "-nostdin", "-hide_banner", "-loglevel", "fatal", "-threads", "1"),
        *("-protocol_whitelist", "pipe", "-format_whitelist", FORMATS, "-i", "pipe:0"),
        *("-map", "0:a:0", "-t", f"{max_s + 1:g}", "-ac", "1", "-ar", str(rate_hz), "-f", "s16le", "pipe:1"),
    ]
    with file.open("rb") as source:
        try:
            done = subprocess.run(
                command,
                stdin=source,  # so that no path is on its command line, and it may open nothing by name
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={},  # none of the worker's secrets
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ModelFailed(
                f"The audio could not be decoded within {timeout_s:g} s.", "Send it as a plain WAV, or in parts."
            ) from error
    if done.returncode != 0 or not done.stdout:
        raise UnsupportedMediaType(
            "The audio holds no sound that can be decoded.", "Send WAV, FLAC, OGG or MP3 that plays elsewhere."
        )
    if len(done.stdout) > limit_bytes:
        raise TooLarge(f"The audio is longer than {max_s:g} s.", f"Send at most {max_s:g} s of it at a time.")
    return done.stdout
