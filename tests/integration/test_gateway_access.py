"""Who may: keys on every route and WebSocket, owners apart from each other, origins, and loopback without keys."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.settings import Settings, load_settings
from tests.support.gateway import REQUEST, Gateway, code_of, gateway_settings, png, running_gateway
from tests.support.processes import PROJECT, environment
from web.app import create_app
from web.auth import load_keys
from web.openapi import documented_routes

ALICE, ALICE_NEW, BOB = "alice-key-0001", "alice-key-0002", "bob-key-0003"
KEYS = f"# who may\n\nalice:{ALICE}\nalice : {ALICE_NEW}\nbob:{BOB}\n"
OPEN = {"/healthz", "/readyz"}


@pytest.fixture(scope="module")
def gateway(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    keys = folder / "keys"
    keys.write_text(KEYS, encoding="utf-8")
    settings = gateway_settings(
        redis_url, folder, api_keys_file=keys, allowed_origins=("https://studio.example",), log_level="DEBUG"
    )
    with running_gateway(settings, ALICE) as running:
        yield running


@pytest.fixture(scope="module")
def bob(gateway: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, headers={"x-api-key": BOB}, timeout=10) as client:
        yield client


def routes(settings: Settings) -> list[tuple[str, str]]:
    """Every method and address of the app, whatever is registered."""
    app = create_app(settings)
    app.extensions["omnirt"].close()
    found = []
    for rule in app.url_map.iter_rules():
        path = rule.rule.replace("<job_id>", "some-job").replace("<name>", "0.png").replace("<model_id>", "stub")
        assert "<" not in path, f"a new kind of place in {rule.rule}: name one here"
        found += [(method, path) for method in sorted(rule.methods or ()) if not rule.websocket]
    return found


def test_every_route_but_two_asks_for_a_key(gateway: Gateway) -> None:
    asked = routes(gateway.settings)
    assert len(asked) > 20
    anybody = httpx.Client(base_url=gateway.url)
    for method, path in [*asked, ("GET", "/nowhere"), ("PATCH", "/v1/jobs")]:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"x-api-key": "alice"},
            {"Authorization": f"Basic {ALICE}"},
        ):
            answer = anybody.request(method, path, headers=headers)
            if path in OPEN:
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, f"{method} {path}"
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")
            if method != "HEAD":
                assert code_of(answer) == "unauthorized"
    anybody.close()


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {ALICE}"},
        {"authorization": f"bearer  {ALICE}"},
        {"x-api-key": ALICE},
        {"x-api-key": ALICE_NEW},
        {"x-api-key": BOB},
    ],
)
def test_a_key_is_taken_in_either_header(gateway: Gateway, headers: dict[str, str]) -> None:
    assert httpx.get(f"{gateway.url}/v1/jobs", headers=headers).status_code == 200


def test_a_page_for_browsers_takes_the_key_as_a_password(gateway: Gateway) -> None:
    for path in ("/docs", "/openapi.json"):
        refused = httpx.get(gateway.url + path)
        assert "Basic" in refused.headers["WWW-Authenticate"]
        assert httpx.get(gateway.url + path, auth=("alice", ALICE)).status_code == 200
        assert httpx.get(gateway.url + path, auth=("alice", "wrong")).status_code == 401
    assert httpx.get(f"{gateway.url}/v1/jobs", auth=("alice", ALICE)).status_code == 401, "no other route does"


def test_another_owners_job_is_not_there_on_any_route(gateway: Gateway, bob: httpx.Client) -> None:
    job_id = gateway.finished()
    mine = [
        (method, path.replace("some-job", job_id))
        for method, path in routes(gateway.settings)
        if "some-job" in path and method != "OPTIONS"
    ]
    assert len(mine) >= 8
    for method, path in mine:
        theirs = bob.request(method, path)
        unknown = bob.request(method, path.replace(job_id, "11111111-2222-3333-4444-555555555555"))
        assert theirs.status_code == 404, f"{method} {path}"
        if method != "HEAD":
            assert code_of(theirs) == "job_not_found"
            assert theirs.text.replace(job_id, "") == unknown.text.replace("11111111-2222-3333-4444-555555555555", "")
    assert bob.delete(f"/v1/jobs/{job_id}", params={"purge": "true"}).status_code == 404
    assert job_id not in bob.get("/v1/jobs?limit=100").text
    assert gateway.http.get(f"/v1/jobs/{job_id}").json()["state"] == "succeeded"
    with gateway.socket(job_id, subprotocols=["omnirt", f"key.{ALICE_NEW}"]) as ws:
        assert json.loads(ws.recv(timeout=5))["seq"] == 1


def test_another_owners_files_are_no_inputs(gateway: Gateway, bob: httpx.Client) -> None:
    upload = gateway.http.post("/v1/uploads", content=png()).json()["id"]
    artifact = f"artifact:{gateway.finished()}/0.png"
    model = gateway.http.get("/v1/models?task=image2image").json()["data"][0]["id"]
    for reference, code in ((f"upload:{upload}", "upload_not_found"), (artifact, "artifact_not_found")):
        body = {"task": "image2image", "model": model, "inputs": {"prompt": "x", "image": reference}}
        assert gateway.http.post("/v1/validate", json=body).json()["ok"]
        refused = bob.post("/v1/jobs", json=body)
        assert (refused.status_code, code_of(refused)) == (404, code)


@pytest.mark.parametrize(
    ("protocols", "headers", "code"),
    [
        (None, {}, 4401),
        (["omnirt"], {}, 4401),
        (["omnirt", "key.wrong"], {}, 4401),
        ([f"key.{ALICE}"], {}, 4401),
        (["omnirt", f"key.{ALICE}"], {}, 1000),
        (None, {"Authorization": f"Bearer {ALICE}"}, 1000),
        (None, {"x-api-key": ALICE_NEW}, 1000),
        (["omnirt", "key.bob-key"], {}, 4401),
    ],
)
def test_a_websocket_asks_for_a_key(
    gateway: Gateway, protocols: list[str] | None, headers: dict[str, str], code: int
) -> None:
    job_id = gateway.finished()
    with gateway.socket(job_id, subprotocols=protocols, additional_headers=headers) as ws:
        assert ws.subprotocol == ("omnirt" if protocols and "omnirt" in protocols else None)
        messages = list(ws) if code == 1000 else []  # the iterator ends with a normal close
        with pytest.raises(ConnectionClosed) as closed:
            ws.recv(timeout=5)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == code
        assert bool(messages) == (code == 1000)


def test_another_owners_job_is_not_there_on_a_websocket(gateway: Gateway) -> None:
    job_id = gateway.finished()
    with (
        gateway.socket(job_id, additional_headers={"x-api-key": BOB}) as ws,
        pytest.raises(ConnectionClosed) as closed,
    ):
        ws.recv(timeout=5)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4404


def test_a_browser_from_elsewhere_changes_nothing(gateway: Gateway) -> None:
    before = gateway.http.get("/v1/jobs?limit=1").json()["data"]
    for origin in ("http://evil.example", "null", gateway.url + ".evil.example", "https://studio.example:444"):
        for method, path in (
            ("POST", "/v1/jobs"),
            ("POST", "/v1/generate"),
            ("POST", "/v1/uploads"),
            ("DELETE", "/v1/jobs/x"),
        ):
            answer = gateway.http.request(method, path, json=REQUEST, headers={"Origin": origin})
            assert (answer.status_code, code_of(answer)) == (403, "origin_refused")
        with pytest.raises(InvalidStatus) as refused, gateway.socket("x", origin=origin):
            pass
        assert refused.value.response.status_code == 403
    assert gateway.http.get("/v1/jobs?limit=1").json()["data"] == before
    for origin in (gateway.url, "https://studio.example", "HTTPS://STUDIO.example/"[:-1]):
        assert gateway.http.post("/v1/jobs", json=REQUEST, headers={"Origin": origin}).status_code == 202
    answer = gateway.http.get("/v1/jobs", headers={"Origin": "http://evil.example"})
    assert not [name for name in answer.headers if name.lower().startswith("access-control")], "CORS is closed"


def test_no_key_and_no_prompt_gets_into_the_log(gateway: Gateway) -> None:
    gateway.http.post("/v1/jobs", json=REQUEST | {"inputs": {"prompt": "a secret wish"}})
    gateway.http.post("/v1/jobs", json=REQUEST | {"inputs": {"prompt": "a secret wish"}, "config": {"width": 513}})
    with gateway.socket("x", subprotocols=["omnirt", f"key.{ALICE}"]) as ws, pytest.raises(ConnectionClosed):
        ws.recv(timeout=5)
    assert gateway.process is not None
    log = "\n".join(gateway.process.last_lines)
    assert "/v1/jobs/x/stream" in log, "the log tells of requests at this level"
    for secret in (ALICE, BOB, "secret wish"):
        assert secret not in log


def test_without_keys_a_name_that_is_not_loopback_is_not_served(redis_url: str, tmp_path: Path) -> None:
    settings = gateway_settings(redis_url, tmp_path)
    app = create_app(settings)
    with app.test_client() as client:
        assert client.get("/v1/models", headers={"Host": "127.0.0.1:8000"}).status_code == 200
        assert client.get("/v1/models", headers={"Host": "[::1]:8000"}).status_code == 200
        rebound = client.get("/v1/models", headers={"Host": "evil.example:8000", "Origin": "http://evil.example:8000"})
        assert (rebound.status_code, rebound.get_json()["error"]["code"]) == (403, "origin_refused")
    app.extensions["omnirt"].close()


def test_without_keys_the_gateway_does_not_start_on_more_than_loopback(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="OMNIRT_API_KEYS_FILE"):
        load_settings(host="0.0.0.0")  # noqa: S104
    command = [sys.executable, "-m", "omnirt_tasks.cli", "serve", "--host", "0.0.0.0"]  # noqa: S104
    done = subprocess.run(
        command, cwd=PROJECT, env=environment(settings), capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode != 0
    assert "OMNIRT_API_KEYS_FILE" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no key"),
        ("# nothing\n", "no key"),
        ("alice\n", "Line 1"),
        ("a:b\n:c\n", "Line 2"),
        ("a:b c\n", "Line 1"),
        ("a:kéy\n", "Line 1"),
        ("a:same\nb:same\n", "twice"),
    ],
)
def test_a_keys_file_that_is_wrong_opens_nothing(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=told) as refused:
        load_keys(file)
    assert "same" not in str(refused.value)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_keys(tmp_path / "none")


def test_every_route_documents_itself(settings: Settings) -> None:
    app = create_app(settings)
    told = {(rule.rule, method) for rule, method, _ in documented_routes(app)}
    there = {
        (rule.rule, method)
        for rule in app.url_map.iter_rules()
        for method in rule.methods or ()
        if method not in {"HEAD", "OPTIONS"}
    }
    app.extensions["omnirt"].close()
    assert told == there
