"""What is wrong with a request, and the words for it."""

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from omnirt_tasks.contract import Problem
from omnirt_tasks.errors import OmnirtError, ValidationFailed

SHOWN_CHARS = 60
PLACE_CHARS = 80


@dataclass(frozen=True)
class Finding:
    """One problem; `error` is what it is called when it is the only one, where that has a code of its own."""

    problem: Problem
    error: OmnirtError | None = None


def failure(findings: Iterable[Finding]) -> OmnirtError:
    """The error for these findings: a lone problem's own, else ValidationFailed with all of them."""
    found = tuple(findings)
    if len(found) == 1 and (error := found[0].error) is not None:
        error.details = (found[0].problem,)
        return error
    return ValidationFailed([finding.problem for finding in found])


def unknown_field(place: str, name: str, allowed: tuple[str, ...]) -> Problem:
    """The problem of a field that is not there, with the nearest that is."""
    nearest = difflib.get_close_matches(name, allowed, n=1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"it takes {listed(allowed)}."
    return Problem(
        loc=f"{place}.{name[:PLACE_CHARS]}" if place else name[:PLACE_CHARS],
        rule="unknown_field",
        message=f"There is no such field; {remedy}",
    )


def listed(names: Iterable[str]) -> str:
    """Names as one reads them."""
    return ", ".join(names) or "none"


def shown(value: object) -> str:
    """A value as a message shows it, cut short."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=lambda _: "…")
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."
