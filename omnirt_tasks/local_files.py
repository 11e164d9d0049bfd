"""Local files as inputs: a path in place of an image, mask or audio becomes a reference before the request is sent."""

import base64
import mimetypes
from collections.abc import Callable
from pathlib import Path

from omnirt_tasks.contract import MEDIA_INPUTS, GenerateRequest, Problem
from omnirt_tasks.errors import ValidationFailed

_REFERENCES = ("data:", "upload:", "artifact:", "http:", "https:")  # URLs too: it is not for us to refuse them


def with_files(request: GenerateRequest, put: Callable[[Path], str]) -> GenerateRequest:
    """The request with each local path replaced by what `put` makes of the file.

    Raises ValidationFailed, naming the input, when there is no such file.
    """
    inputs = dict(request.inputs)
    for name in MEDIA_INPUTS:
        value = inputs.get(name)
        if not isinstance(value, str) or value.startswith(_REFERENCES):
            continue
        path = Path(value).expanduser()
        if not path.is_file():
            message = f"{value[:200]!r} is neither a file here nor a data URL, upload:ID or artifact:JOB/NAME"
            raise ValidationFailed([Problem(loc=f"inputs.{name}", rule="file_exists", message=message)])
        inputs[name] = put(path)
    return request if inputs == request.inputs else request.model_copy(update={"inputs": inputs})


def data_url(path: Path) -> str:
    """The file's bytes as a data URL, its type guessed from its name."""
    mime = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"
