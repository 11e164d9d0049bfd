"""Where ffmpeg is, which reads sound and writes films: imageio-ffmpeg's, or the host's own."""

import shutil

from omnirt_tasks.errors import ConfigurationError


def executable() -> str:
    """The path of ffmpeg. Raises ConfigurationError when there is none, or none that can be run."""
    from imageio_ffmpeg import get_ffmpeg_exe

    try:
        # A path, or a bare name of what PATH holds, which no process without a PATH would find.
        found = shutil.which(str(get_ffmpeg_exe()))
    except RuntimeError:
        found = None
    if found is None:
        raise ConfigurationError(
            "This worker has no ffmpeg.", "Install ffmpeg on its host, or let IMAGEIO_FFMPEG_EXE name it."
        )
    return found
