"""The API's own description: an OpenAPI document that holds together, and a page that loads nothing from elsewhere."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from omnirt_tasks.settings import Settings
from web.app import create_app


@pytest.fixture
def client(settings: Settings) -> Iterator[FlaskClient]:
    app = create_app(settings)
    with app.test_client() as client:
        yield client
    app.extensions["omnirt"].close()


def references(value: Any) -> Iterator[str]:
    """Every $ref in a document."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_the_openapi_document_holds_together(client: FlaskClient) -> None:
    document = client.get("/openapi.json").get_json()
    assert document["openapi"].startswith("3.1.")
    schemas = document["components"]["schemas"]
    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in schemas
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(names) == len(set(names))
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            places = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
            assert places == set(re.findall(r"{(\w+)}", path)), path
            assert operation["summary"], (path, method)
            assert operation["responses"], (path, method)
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    schema = answer["content"]["application/json"]["schema"]
                    told = "Readiness" if (path, status) == ("/readyz", "503") else "ErrorEnvelope"
                    assert schema == {"$ref": f"#/components/schemas/{told}"}
    watch = document["paths"]["/v1/jobs/{job_id}/stream"]["get"]
    assert watch["operationId"] == "stream_job"
    assert '{"action": "cancel"}' in watch["description"]
    submit = document["paths"]["/v1/jobs"]["post"]
    assert submit["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/GenerateRequest")
    assert {"202", "400", "401", "404", "413", "422", "429", "503"} <= submit["responses"].keys()
    for path in ("/v1/jobs", "/v1/generate", "/v1/jobs/{job_id}/retry"):
        operation = document["paths"][path]["post"]
        assert ("Idempotency-Key", "header") in {(p["name"], p["in"]) for p in operation["parameters"]}, path
        assert "idempotency_mismatch" in operation["responses"]["422"]["description"], path
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert {"prompt", "image"} <= set(str(schemas["ResolvedRequest"]) and schemas["Inputs"]["properties"])


def test_the_page_loads_nothing_from_elsewhere_and_runs_only_its_own_script(client: FlaskClient) -> None:
    first, second = client.get("/docs"), client.get("/docs")
    nonces = [
        re.search(r"script-src 'nonce-([^']+)'", page.headers["Content-Security-Policy"]) for page in (first, second)
    ]
    assert nonces[0]
    assert nonces[1]
    assert nonces[0][1] != nonces[1][1], "a nonce is used once"
    text = first.get_data(as_text=True)
    assert set(re.findall(r'nonce="([^"]+)"', text)) == {nonces[0][1]}
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', text)
    assert not re.findall(r'\sstyle="|\son\w+="', text), "the policy would drop it"
    assert "default-src 'none'" in first.headers["Content-Security-Policy"]
    assert "/v1/jobs/&lt;job_id&gt;/events" in text
    assert 'id="key"' not in text, "without keys none is asked for"
    labelled = set(re.findall(r'<label for="(\w+)"', text))
    assert set(re.findall(r'<(?:input|select) id="(\w+)"', text)) == labelled
