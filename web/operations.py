"""What a route says of itself: the one source of the OpenAPI document, beside the view that it tells of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import BaseModel

from omnirt_tasks.contract.base import JsonObject
from omnirt_tasks.errors import OmnirtError

# What an answer holds: a model of JSON, or the media type of something else; None for no body.
Content = type[BaseModel] | str | None
View = TypeVar("View", bound=Callable[..., object])

_ATTRIBUTE = "omnirt_operation"


@dataclass(frozen=True)
class Parameter:
    """A parameter in the query or a header; `schema` is JSON Schema."""

    name: str
    summary: str
    schema: JsonObject = field(default_factory=lambda: {"type": "string"})
    where: str = "query"


@dataclass(frozen=True)
class Operation:
    """One route as documented.

    `answers` maps each status below 400 to its content; `errors` are those of the route's own, besides the ones that
    every route has. `body` is the request's content. `open` routes need no key; `page` ones take it also as the
    password of Basic authentication, since a browser opens them by address.
    """

    summary: str
    answers: Mapping[int, Content]
    errors: tuple[type[OmnirtError], ...] = ()
    body: Content = None
    parameters: tuple[Parameter, ...] = ()
    open: bool = False
    page: bool = False


def documented(
    summary: str,
    answers: Mapping[int, Content],
    *,
    errors: tuple[type[OmnirtError], ...] = (),
    body: Content = None,
    parameters: tuple[Parameter, ...] = (),
    open: bool = False,  # noqa: A002  # the word for it
    page: bool = False,
) -> Callable[[View], View]:
    """Attach an `Operation` to a view."""
    operation = Operation(summary, answers, errors, body, parameters, open, page)

    def attach(view: View) -> View:
        setattr(view, _ATTRIBUTE, operation)
        return view

    return attach


def operation_of(view: Callable[..., object] | None) -> Operation | None:
    """The operation of a view; None for one that has none, and for no view."""
    found = getattr(view, _ATTRIBUTE, None)
    return found if isinstance(found, Operation) else None
