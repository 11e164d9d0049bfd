"""The OpenAPI 3.1 document, made from the routes of the app and what each says of itself."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from flask import Flask
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from werkzeug.routing import Rule

from omnirt_tasks.contract import Event
from omnirt_tasks.errors import Internal, MethodNotAllowed, OmnirtError, OriginRefused, StoreUnavailable, Unauthorized
from web.errors import ErrorEnvelope
from web.operations import Content, Operation, operation_of

TITLE = "OmniRT Tasks"
REF = "#/components/schemas/{model}"
_PLACE = re.compile(r"<(?:[a-z]+:)?([a-z_]+)>")
_IMPLIED = {"HEAD", "OPTIONS"}


def document(app: Flask, version: str) -> dict[str, Any]:
    """The document for every route of the app."""
    routes = list(documented_routes(app))
    schemas = _schemas(operation for _, _, operation in routes)
    paths: dict[str, dict[str, Any]] = {}
    for rule, method, operation in routes:
        paths.setdefault(_PLACE.sub(r"{\1}", rule.rule), {})[method.lower()] = _described(rule, operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": TITLE,
            "version": version,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "Generation as jobs: submit one, watch it live, fetch what it made.",
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"apiKey": []}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def documented_routes(app: Flask) -> Iterator[tuple[Rule, str, Operation]]:
    """Each rule and method of the app, with what it says of itself, in the order of the addresses."""
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule):
        operation = operation_of(app.view_functions.get(rule.endpoint))
        for method in sorted((rule.methods or set()) - _IMPLIED):
            if operation is not None:
                yield rule, method, operation


def _schemas(operations: Iterable[Operation]) -> dict[str, Any]:
    sent: dict[type[BaseModel], None] = {}
    answered: dict[type[BaseModel], None] = {Event: None, ErrorEnvelope: None}
    for operation in operations:
        if isinstance(operation.body, type):
            sent[operation.body] = None
        answered |= {content: None for content in operation.answers.values() if isinstance(content, type)}
    _, found = models_json_schema(
        [*((model, "validation") for model in sent), *((model, "serialization") for model in answered)],
        ref_template=REF,
    )
    schemas: dict[str, Any] = found["$defs"]
    return dict(sorted(schemas.items()))


def _described(rule: Rule, operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": rule.endpoint.rpartition(".")[2],
        "summary": operation.summary,
        "tags": [rule.endpoint.partition(".")[0]],
        "parameters": [_path_parameter(name) for name in _PLACE.findall(rule.rule)]
        + [
            {"name": p.name, "in": p.where, "description": p.summary, "required": False, "schema": p.schema}
            for p in operation.parameters
        ],
        "responses": {str(status): _answer(status, content) for status, content in operation.answers.items()}
        | _error_answers(operation),
    }
    if operation.description is not None:
        described["description"] = operation.description
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": _content(operation.body)}
    if operation.open:
        described["security"] = []
    return described


def _path_parameter(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _answer(status: int, content: Content) -> dict[str, Any]:
    told = {
        101: "The events follow.",
        202: "Accepted.",
        204: "Nothing to say.",
        206: "A part.",
        304: "Not modified.",
        503: "Not now.",
    }
    described: dict[str, Any] = {"description": told.get(status, "Success.")}
    if content is not None:
        described["content"] = _content(content)
    return described


def _content(content: Content) -> dict[str, Any]:
    if isinstance(content, type):
        return {"application/json": {"schema": {"$ref": REF.format(model=content.__name__)}}}
    assert content is not None
    schemas: dict[str, dict[str, Any]] = {
        "application/octet-stream": {"type": "string", "contentEncoding": "binary"},
        "text/event-stream": {"type": "string", "description": "Events; the data of each is an Event."},
    }
    return {content: {"schema": schemas.get(content, {"type": "string"})}}


def _error_answers(operation: Operation) -> dict[str, Any]:
    """Each status of the errors that the route may answer, with their codes."""
    always: tuple[type[OmnirtError], ...] = (MethodNotAllowed, Internal)
    if not operation.open:
        always += (Unauthorized, OriginRefused, StoreUnavailable)
    codes: dict[int, dict[str, None]] = {}
    for error in (*operation.errors, *always):
        codes.setdefault(error.http_status, {})[error.code] = None
    return {
        str(status): {"description": ", ".join(names), "content": _content(ErrorEnvelope)}
        for status, names in sorted(codes.items())
    }
