"""The processes of a rank group: each keeps one model, and all run one job at a time, together.

    executor ══ socket (`workers.wire`) ══► rank 0 (`host`) ── what is asked ──► every rank (`circle`) ──► its model

`python -m workers.ranks ENTRY FOLDER DEVICE DTYPE ADDRESS` is every rank. What is imported here holds no torch, and a
group of one never imports it.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class RankArguments:
    """What every rank is told on its command line: `entry` is "module:Class", `device` that of rank 0."""

    entry: str
    folder: Path
    device: str
    dtype: str

    def as_words(self) -> list[str]:
        """As words of a command line."""
        return [str(value) for value in astuple(self)]

    @classmethod
    def of_words(cls, words: Sequence[str]) -> Self:
        """What `as_words` gave."""
        entry, folder, device, dtype = words
        return cls(entry, Path(folder), device, dtype)
