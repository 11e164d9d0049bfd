"""The API's description: /openapi.json for programs, /docs for people."""

import secrets
from importlib import resources

from flask import Blueprint, Response, current_app, render_template_string

import omnirt_tasks
from web.answers import json_answer
from web.openapi import document, documented_routes
from web.operations import documented
from web.services import services

blueprint = Blueprint("docs", __name__)


@blueprint.get("/openapi.json")
@documented("This document", {200: "application/json"}, page=True)
def openapi() -> Response:
    """Made anew each time: it is small, and nothing has to be kept."""
    return json_answer(document(current_app, omnirt_tasks.__version__))


@blueprint.get("/docs")
@documented("A page to read and to try the API", {200: "text/html"}, page=True)
def docs() -> Response:
    """One self-contained page: it loads nothing from elsewhere, and runs no script but its own."""
    nonce = secrets.token_urlsafe(16)
    routes = [
        ("WS" if rule.websocket else method, rule.rule, operation.summary, operation.description)
        for rule, method, operation in documented_routes(current_app)
    ]
    page = render_template_string(
        resources.files("web").joinpath("pages", "docs.html").read_text(encoding="utf-8"),
        nonce=nonce,
        routes=routes,
        keys=bool(services().gate.keys),
        version=omnirt_tasks.__version__,
    )
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return Response(page, headers=headers, mimetype="text/html")
