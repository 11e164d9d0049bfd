"""The file in which measured limits outlive a process. It belongs to one backend and one kind of device.

Whoever writes last is kept: workers that share a kind of device and a folder measure the same thing.
"""

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from omnirt_tasks.contract.base import Value
from workers.chunks.curve import TooLarge

log = logging.getLogger(__name__)

Rows = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


def table_path(folder: Path, backend: str, device: str) -> Path:
    """Where a host keeps the file of one of its devices ("cuda:0"), below `folder`."""
    return folder / f"{backend}-{device.replace(':', '-')}.json"


@dataclass(frozen=True)
class KeptCurve:
    """What was measured of one part of a model at one shape: the newest calls by rows, and what did not fit."""

    model: str
    part: str
    shape: str
    calls_s: Mapping[int, Sequence[float]]
    too_large: TooLarge | None


class _Size(Value):
    rows: Rows
    calls_s: list[Seconds]


class _TooLarge(Value):
    rows: Rows
    fits: Rows


class _Measured(Value):
    model: str
    part: str
    shape: str
    sizes: list[_Size]
    too_large: _TooLarge | None = None


class _Content(Value):
    version: Literal[1]
    backend: str
    device_name: str
    measured: list[_Measured]


class LimitsFile:
    """Reads and writes it; what is wrong with it is a warning, and never ends a run."""

    def __init__(self, path: Path, *, backend: str, device_name: str) -> None:
        self._path = path
        self._backend = backend
        self._device_name = device_name

    def read(self) -> list[KeptCurve]:
        """What it holds; nothing where there is none yet, or none that can be used."""
        try:
            content = _Content.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return []
        except (OSError, ValidationError) as error:
            log.warning("what was measured of chunks cannot be read; it is measured anew", exc_info=error)
            return []
        if (content.backend, content.device_name) != (self._backend, self._device_name):
            log.warning(
                "what was measured of chunks is of another device (%s, %s); it is measured anew",
                content.backend,
                content.device_name,
            )
            return []
        return [_kept(measured) for measured in content.measured]

    def write(self, curves: Sequence[KeptCurve]) -> None:
        """Replace what it holds, whole or not at all."""
        content = _Content(
            version=1,
            backend=self._backend,
            device_name=self._device_name,
            measured=[_measured(curve) for curve in curves],
        )
        partial = self._path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_text(content.model_dump_json())
                partial.replace(self._path)
            finally:
                partial.unlink(missing_ok=True)
        except OSError as error:
            log.warning("what was measured of chunks could not be kept", exc_info=error)


def _kept(measured: _Measured) -> KeptCurve:
    too_large = measured.too_large
    return KeptCurve(
        measured.model,
        measured.part,
        measured.shape,
        {size.rows: size.calls_s for size in measured.sizes},
        None if too_large is None else TooLarge(too_large.rows, too_large.fits),
    )


def _measured(curve: KeptCurve) -> _Measured:
    too_large = curve.too_large
    return _Measured(
        model=curve.model,
        part=curve.part,
        shape=curve.shape,
        sizes=[_Size(rows=rows, calls_s=list(calls_s)) for rows, calls_s in curve.calls_s.items()],
        too_large=None if too_large is None else _TooLarge(rows=too_large.rows, fits=too_large.fits),
    )
