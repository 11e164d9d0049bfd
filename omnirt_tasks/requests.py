"""Requests without braces: `requests.text2image(model="shapes", prompt="a red star", preset="fast", seed=7)`.

A keyword argument that is an input of the contract becomes one, one that is a field of GenerateRequest (`backend`,
`priority`, `tags`…) becomes that, and every other goes to `config`. An image, mask or audio is a data URL,
`upload:ID`, `artifact:JOB/NAME`, or the path of a local file. Each raises ValidationFailed for a wrong type.
"""

import os
from collections.abc import Sequence
from typing import Any

from omnirt_tasks.contract import GenerateRequest, Inputs, Task
from omnirt_tasks.validation import parse_request

File = str | os.PathLike[str]

_INPUTS = frozenset(Inputs.model_fields)
_FIELDS = frozenset(GenerateRequest.model_fields) - {"inputs", "config"}


def text2image(*, model: str, prompt: str | Sequence[str], **options: Any) -> GenerateRequest:
    """A picture from words, or of a list of prompts one (or `num_images_per_prompt`) from each."""
    return build(Task.TEXT2IMAGE, model=model, prompt=prompt, **options)


def image2image(*, model: str, image: File, prompt: str, **options: Any) -> GenerateRequest:
    """A picture from a picture and words; `strength` says how far it may go."""
    return build(Task.IMAGE2IMAGE, model=model, image=image, prompt=prompt, **options)


def inpaint(*, model: str, image: File, mask: File, prompt: str, **options: Any) -> GenerateRequest:
    """A picture with its masked part (white) made anew."""
    return build(Task.INPAINT, model=model, image=image, mask=mask, prompt=prompt, **options)


def edit(*, model: str, image: File, prompt: str, **options: Any) -> GenerateRequest:
    """A picture changed as the words say."""
    return build(Task.EDIT, model=model, image=image, prompt=prompt, **options)


def text2video(*, model: str, prompt: str, **options: Any) -> GenerateRequest:
    """A film from words; `num_frames` and `fps` are inputs."""
    return build(Task.TEXT2VIDEO, model=model, prompt=prompt, **options)


def image2video(*, model: str, image: File, **options: Any) -> GenerateRequest:
    """A film that begins with the picture."""
    return build(Task.IMAGE2VIDEO, model=model, image=image, **options)


def audio2video(*, model: str, audio: File, **options: Any) -> GenerateRequest:
    """A film that goes with the sound, usually of the face in `image`."""
    return build(Task.AUDIO2VIDEO, model=model, audio=audio, **options)


def text2audio(*, model: str, prompt: str, **options: Any) -> GenerateRequest:
    """Sound or speech from words; `reference_text` and `audio` may name a voice."""
    return build(Task.TEXT2AUDIO, model=model, prompt=prompt, **options)


def audio2text(*, model: str, audio: File, **options: Any) -> GenerateRequest:
    """The words of a recording."""
    return build(Task.AUDIO2TEXT, model=model, audio=audio, **options)


def build(task: Task, **arguments: Any) -> GenerateRequest:
    """The request of any task; an input that is None counts as not given."""
    fields: dict[str, Any] = {"task": task.value}
    inputs: dict[str, Any] = {}
    config: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in _INPUTS:
            if value is not None:
                inputs[name] = _plain(value)
        elif name in _FIELDS:
            fields[name] = value
        else:
            config[name] = value
    return parse_request(fields | {"inputs": inputs, "config": config})


def _plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return list(value) if isinstance(value, tuple) else value
