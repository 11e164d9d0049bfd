"""Figures and how they are shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

MS_PER_S = 1000.0


@dataclass(frozen=True)
class Row:
    """One line of a table: what was measured, and its cells under the table's columns."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The outcome of one bench; `note` says how it was measured."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str

    def markdown(self) -> str:
        """The table as docs/performance.md holds it."""
        head = f"| {' | '.join(('', *self.columns))} |"
        rule = "|" + " --- |" * (len(self.columns) + 1)
        body = "\n".join(f"| {' | '.join((row.name, *row.cells))} |" for row in self.rows)
        return f"### {self.title}\n\n{head}\n{rule}\n{body}\n\n{self.note}\n"


def percentile(values: Sequence[float], percent: int) -> float:
    """The percentile (1 to 99) of at least one value."""
    if len(values) == 1:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def spread_ms(name: str, seconds: Sequence[float]) -> Row:
    """A row of p50, p90 and p99 in milliseconds."""
    return Row(name, tuple(f"{percentile(seconds, percent) * MS_PER_S:.1f}" for percent in (50, 90, 99)))


SPREAD_COLUMNS = ("p50 ms", "p90 ms", "p99 ms")
