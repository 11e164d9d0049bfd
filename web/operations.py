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

    `answers` maps each status to its content, where that is not an error in the envelope; `errors` are those of the
    route's own, besides the ones that every route has. `description` is what the summary leaves out. `body` is the
    request's content. `open` routes need no key; `page` ones take it also as the password of Basic authentication,
    since a browser opens them by address.
    """

    summary: str
    answers: Mapping[int, Content]
    errors: tuple[type[OmnirtError], ...] = ()
    body: Content = None
    parameters: tuple[Parameter, ...] = ()
    open: bool = False
    page: bool = False
    description: str | None = None


def documented(
    summary: str,
    answers: Mapping[int, Content],
    *,
    errors: tuple[type[OmnirtError], ...] = (),
    body: Content = None,
    parameters: tuple[Parameter, ...] = (),
    open: bool = False,  # noqa: A002  # the word for it
    page: bool = False,
    description: str | None = None,
) -> Callable[[View], View]:
    """Attach an `Operation` to a view."""
    operation = Operation(summary, answers, errors, body, parameters, open, page, description)

    def attach(view: View) -> View:
        setattr(view, _ATTRIBUTE, operation)
        return view

    return attach


def operation_of(view: Callable[..., object] | None) -> Operation | None:
    """The operation of a view; None for one that has none, and for no view."""
    found = getattr(view, _ATTRIBUTE, None)
    return found if isinstance(found, Operation) else None
