"""Query parameters: each is checked, and one that a route does not have is refused by name."""

from collections.abc import Iterable
from enum import StrEnum
from typing import TypeVar

from flask import request

from omnirt_tasks.contract import Problem
from omnirt_tasks.errors import ValidationFailed
from web.operations import Parameter

Choice = TypeVar("Choice", bound=StrEnum)

_TRUE, _FALSE = {"true", "1"}, {"false", "0", ""}


class Query:
    """The query of the current request; problems gather until `check` raises them all at once."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        known = [parameter.name for parameter in parameters if parameter.where == "query"]
        self._problems = [
            Problem(loc=name[:80], rule="unknown_field", message=f"There is no such parameter; use {', '.join(known)}.")
            for name in request.args
            if name not in known
        ]

    def text(self, name: str) -> str | None:
        """A text, or None."""
        return request.args.get(name) or None

    def choice(self, name: str, choices: type[Choice]) -> Choice | None:
        """One of an enum's values, or None."""
        value = self.one_of(name, list(choices))
        return choices(value) if value is not None else None

    def one_of(self, name: str, choices: Iterable[str]) -> str | None:
        """One of the choices, or None."""
        value, allowed = self.text(name), list(choices)
        if value is not None and value not in allowed:
            self._refuse(name, "choice", f"{_shown(value)} is not one of {', '.join(allowed)}.")
            return None
        return value

    def number(self, name: str, default: int, *, minimum: int, maximum: int) -> int:
        """A whole number within bounds."""
        value = self.text(name)
        if value is None:
            return default
        if not (value.isascii() and value.isdigit() and len(value) < 10 and minimum <= int(value) <= maximum):
            self._refuse(name, "range", f"{_shown(value)} is no whole number from {minimum} to {maximum}.")
            return default
        return int(value)

    def digits(self, name: str, most: int) -> str | None:
        """Up to `most` digits, as they stand, or None."""
        value = self.text(name)
        if value is not None and not (value.isascii() and value.isdigit() and len(value) <= most):
            self._refuse(name, "form", f"{_shown(value)} did not come from an answer of this route.")
            return None
        return value

    def flag(self, name: str) -> bool:
        """True or false; false if it is not there."""
        value = request.args.get(name, "").lower()
        if value not in _TRUE | _FALSE:
            self._refuse(name, "type", f"{_shown(value)} is neither true nor false.")
        return value in _TRUE

    def check(self) -> None:
        """Raise ValidationFailed with every problem there was."""
        if self._problems:
            raise ValidationFailed(self._problems)

    def _refuse(self, name: str, rule: str, message: str) -> None:
        self._problems.append(Problem(loc=name, rule=rule, message=message))


def _shown(value: str) -> str:
    return repr(value if len(value) <= 60 else value[:57] + "...")
