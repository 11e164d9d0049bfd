"""How many rows a device call may have, as measured."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from omnirt_tasks.contract.capability import ChunkMeasure
from workers.chunks.curve import Curve
from workers.chunks.limits_file import KeptCurve, LimitsFile

# Kinds of call that are remembered; callers choose sizes, so there is no end of them. The longest unused goes first.
KEYS_MAX = 256
# Kinds of call of one model that its capability record tells, the newest first: it is sent with every heartbeat.
TOLD_MAX = 16
# How often the file is written at most.
SAVE_EVERY_S = 5.0


@dataclass(frozen=True)
class MeasureKey:
    """What is measured together: one part of a model ("unet", "vae.decode") at one shape ("512x512 fp16")."""

    model: str
    part: str
    shape: str


class Limits(Protocol):
    """What the device's line asks and tells of sizes. Used by the device thread alone, but for reading."""

    def rows_max(self, key: MeasureKey) -> int:
        """The most rows that are to be put into one call now; 1 where sharing does not pay, or is not known to."""
        ...

    def expected_s(self, key: MeasureKey, rows: int) -> float | None:
        """How long a call of so many rows takes, as far as is known."""
        ...

    def note(self, key: MeasureKey, rows: int, elapsed_s: float) -> None:
        """A call of so many rows took so long, its device synchronised."""
        ...

    def note_too_large(self, key: MeasureKey, rows: int) -> None:
        """The device had too little memory for a call of so many rows."""
        ...


class MeasuredLimits:
    """Limits that follow what the device's calls take, and outlive its process in a file.

    Safe to share between threads. The device thread asks and notes, which touches no file; runs `save` at their end.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        backend: str = "",
        device_name: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with what the file at `path` holds, if it is of this backend and device; None keeps none.

        A file that cannot be used is told of by a warning, and written anew with the first `save` that has something.
        """
        self._clock = clock
        self._lock = threading.Lock()  # guards the curves and what follows
        self._curves: dict[MeasureKey, Curve] = {}  # the one that was noted last is last
        self._changed = False
        self._saving = threading.Lock()  # guards the file, and when it was written
        self._saved_at_s: float | None = None
        self._file = None if path is None else LimitsFile(path, backend=backend, device_name=device_name)
        if self._file is not None:
            for kept in self._file.read():
                curve = Curve(clock)
                curve.restore(kept.calls_s, kept.too_large)
                self._curves[MeasureKey(kept.model, kept.part, kept.shape)] = curve

    def rows_max(self, key: MeasureKey) -> int:
        with self._lock:
            curve = self._curves.get(key)
            return 1 if curve is None else curve.rows_max()

    def expected_s(self, key: MeasureKey, rows: int) -> float | None:
        with self._lock:
            curve = self._curves.get(key)
            return None if curve is None else curve.expected_s(rows)

    def note(self, key: MeasureKey, rows: int, elapsed_s: float) -> None:
        with self._lock:
            self._curve(key).note(rows, elapsed_s)

    def note_too_large(self, key: MeasureKey, rows: int) -> None:
        with self._lock:
            self._curve(key).note_too_large(rows)

    def medians_s(self, key: MeasureKey) -> Mapping[int, float]:
        """The median time of a call by rows, for the sizes that were measured often enough to count."""
        with self._lock:
            curve = self._curves.get(key)
            return {} if curve is None else curve.medians_s

    def keys(self) -> tuple[MeasureKey, ...]:
        """What was measured so far, the newest last."""
        with self._lock:
            return tuple(self._curves)

    def chunks(self, model: str) -> tuple[ChunkMeasure, ...]:
        """What sharing calls of the model brings, the newest measured first, as its capability record tells it."""
        with self._lock:
            newest = ((key, curve) for key, curve in reversed(self._curves.items()) if key.model == model)
            told = (measure for key, curve in newest if (measure := _measure(key, curve)) is not None)
            return tuple(measure for measure, _ in zip(told, range(TOLD_MAX), strict=False))

    def save(self, *, at_once: bool = False) -> None:
        """Write the file if there is something new, at most every few seconds unless `at_once`.

        A disk that does not take it is told of by a warning.
        """
        if self._file is None:
            return
        with self._saving:
            now_s = self._clock()
            recent = self._saved_at_s is not None and now_s - self._saved_at_s < SAVE_EVERY_S
            if recent and not at_once:
                return
            with self._lock:
                if not self._changed:
                    return
                self._changed = False
                kept = [_kept(key, curve) for key, curve in self._curves.items()]
            self._saved_at_s = now_s
            self._file.write(kept)

    def _curve(self, key: MeasureKey) -> Curve:
        """The curve to note in, as the newest."""
        curve = self._curves.pop(key, None) or Curve(self._clock)
        self._curves[key] = curve
        if len(self._curves) > KEYS_MAX:
            del self._curves[next(iter(self._curves))]
        self._changed = True
        return curve


def _measure(key: MeasureKey, curve: Curve) -> ChunkMeasure | None:
    if (best := curve.best()) is None:
        return None
    fill = curve.fill
    return ChunkMeasure(
        module=key.part,
        shape=key.shape,
        limit=best.rows,
        gain=round(best.gain, 3),
        fill=None if fill is None else round(fill, 3),
        step_ms={str(rows): round(median_s * 1000, 3) for rows, median_s in curve.medians_s.items()},
    )


def _kept(key: MeasureKey, curve: Curve) -> KeptCurve:
    return KeptCurve(key.model, key.part, key.shape, curve.calls_s, curve.too_large)
