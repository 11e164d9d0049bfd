"""From a body to a GenerateRequest: shape and types, nothing of models."""

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from omnirt_tasks.contract import AUTO, Backend, GenerateRequest, Problem
from omnirt_tasks.errors import InvalidJson, ValidationFailed
from omnirt_tasks.registry.catalog import Catalog
from omnirt_tasks.validation.findings import PLACE_CHARS, Finding, failure, shown, unknown_field
from omnirt_tasks.validation.resolving import Door, resolve

JSON_DEPTH_MAX = 32
DIGITS_MAX = 400


def parse_json(body: bytes | str) -> dict[str, object]:
    """The JSON object in a body. Raises InvalidJson for NaN, Infinity, deep nesting and what is no JSON at all."""
    try:
        parsed = json.loads(body, parse_constant=_refuse_constant, parse_int=_whole_number)
        _check_depth(parsed)
        # A lone surrogate is legal in JSON text and fails wherever the text is written again.
        json.dumps(parsed, ensure_ascii=False).encode()
    except RecursionError:
        raise _too_deep() from None
    except (ValueError, UnicodeError) as error:
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        if isinstance(error, _Constant):
            where = f": it holds {error}, which is no JSON number"
        raise InvalidJson(f"The body is not JSON{where}.", "Send one JSON object in UTF-8.") from None
    if not isinstance(parsed, dict):
        raise ValidationFailed([Problem(loc="body", rule="type", message="It must be a JSON object.")])
    return parsed


def parse_request(
    data: bytes | str | Mapping[str, object], catalog: Catalog | None = None, door: Door | None = None
) -> GenerateRequest:
    """The request in a body or an object.

    Raises InvalidJson, and ValidationFailed with every problem of shape; with a `catalog` also those of meaning that
    the well-formed fields already show.
    """
    found = parse_json(data) if isinstance(data, bytes | str) else dict(data)
    try:
        return GenerateRequest.model_validate(found)
    except ValidationError as error:
        findings = [Finding(_shape_problem(fault)) for fault in error.errors()]
        bad = {str(fault["loc"][0]) for fault in error.errors() if fault["loc"]}
        if catalog is not None and not bad & {"task", "model"}:
            sound = GenerateRequest.model_validate({name: value for name, value in found.items() if name not in bad})
            deeper = resolve(sound, catalog, door=door or Door()).findings
            findings += [finding for finding in deeper if finding.problem.loc.partition(".")[0] not in bad]
        raise failure(findings) from None


# pydantic's kind of fault → the rule's name and the remedy.
_SHAPE_RULES = {
    "missing": ("required", "It is missing."),
    "extra_forbidden": ("unknown_field", ""),
    "enum": ("choice", "use {expected}."),
    "string_pattern_mismatch": ("pattern", "it has not the right form."),
    "string_too_short": ("min_length", "use at least {min_length} character(s)."),
    "string_too_long": ("max_length", "use at most {max_length} characters."),
    "too_long": ("max_length", "use at most {max_length} entries."),
    "none_required": ("unsupported", "it is not supported; leave it out."),
    "greater_than": ("minimum", "use more than {gt}."),
    "less_than_equal": ("maximum", "use at most {le}."),
    "finite_number": ("finite", "use a finite number."),
    "float_type": ("type", "send a number."),
    "string_type": ("type", "send a string."),
    "bool_type": ("type", "send true or false."),
    "list_type": ("type", "send a list."),
    "dict_type": ("type", "send an object."),
}


def _shape_problem(fault: Any) -> Problem:
    rule, remedy = _SHAPE_RULES.get(fault["type"], ("type", "it has not the right type."))
    loc = ".".join(str(part)[:PLACE_CHARS] for part in fault["loc"])
    if rule == "unknown_field":
        return unknown_field("", loc, tuple(GenerateRequest.model_fields))
    if loc == "backend" and rule == "pattern":
        told = f"{shown(fault['input'])} is no backend; use {', '.join((AUTO, *Backend))}."
        return Problem(loc=loc, rule="choice", message=told)
    told = remedy.format_map(fault.get("ctx") or {})
    message = told if rule == "required" else f"{shown(fault['input'])} is not accepted: {told}"
    return Problem(loc=loc, rule=rule, message=message)


class _Constant(ValueError):
    """NaN, Infinity or -Infinity, which Python reads and JSON does not know."""


def _refuse_constant(name: str) -> float:
    raise _Constant(name)


def _whole_number(digits: str) -> float:
    # Beyond any bound of ours, and more digits than Python would read: a number out of bounds, not a syntax error.
    return int(digits) if len(digits) <= DIGITS_MAX else math.inf


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(JSON_DEPTH_MAX):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> InvalidJson:
    return InvalidJson(f"The body is nested deeper than {JSON_DEPTH_MAX} levels.", "Send a flat object.")
