"""What bad input gets: a clear error with a stable code and place, nothing queued, and a gateway that goes on."""

import base64
import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.gateway import REQUEST, Gateway, code_of, gateway_settings, png, running_gateway

SUBMITS = ("/v1/jobs", "/v1/generate")


@pytest.fixture(scope="module")
def gateway(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings = gateway_settings(
        redis_url, tmp_path_factory.mktemp("gateway"), max_body_bytes=2_000_000, max_upload_bytes=1_000_000
    )
    with running_gateway(settings) as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_is_queued_and_all_goes_on(gateway: Gateway) -> Iterator[None]:
    before = gateway.http.get("/v1/jobs?limit=1").json()["data"]
    yield
    assert gateway.http.get("/v1/jobs?limit=1").json()["data"] == before, "a refused request was queued"
    assert gateway.http.get("/healthz").json() == {"ok": True}


def changed(**changes: Any) -> dict[str, Any]:
    return REQUEST | changes


def config(**options: Any) -> dict[str, Any]:
    return changed(config=options)


def inputs(**given: Any) -> dict[str, Any]:
    return changed(inputs={"prompt": "a red circle"} | given)


PNG = base64.b64encode(png()).decode()
SHAPES = {"task": "text2image", "model": "shapes", "inputs": {"prompt": "a red circle"}}

# Each: what is sent, then status, code, param of the answer, and a word that its message must hold.
BAD: dict[str, tuple[Any, int, str, str | None, str]] = {
    "unknown model": (changed(model="shape"), 404, "model_not_found", "model", "shapes"),
    "empty model": (changed(model=""), 422, "validation_failed", "model", "at least 1"),
    "task the model lacks": (changed(task="text2video"), 422, "validation_failed", "task", "text2image"),
    "unknown task": (changed(task="text2smell"), 422, "validation_failed", "task", "text2image"),
    "misspelt field": (changed(input={}), 422, "validation_failed", "input", "inputs"),
    "unknown option": (config(stepz=3), 422, "validation_failed", "config.stepz", "no such field"),
    "width 513": (config(width=513), 422, "validation_failed", "config.width", "512"),
    "steps 0": (config(num_inference_steps=0), 422, "validation_failed", "config.num_inference_steps", "1 to 200"),
    "steps 10^9": (config(num_inference_steps=10**9), 422, "validation_failed", "config.num_inference_steps", "200"),
    "n -1": (config(num_images_per_prompt=-1), 422, "validation_failed", "config.num_images_per_prompt", "1"),
    "seed -1": (config(seed=-1), 422, "validation_failed", "config.seed", "null"),
    "seed 2^63": (config(seed=2**63), 422, "validation_failed", "config.seed", "0 to"),
    "text as number": (config(width="64"), 422, "validation_failed", "config.width", "number"),
    "1 MB prompt": (inputs(prompt="x" * 1_000_000), 422, "validation_failed", "inputs.prompt", "8000"),
    "empty prompt": (inputs(prompt=""), 422, "validation_failed", "inputs.prompt", "prompt"),
    "blank prompt": (inputs(prompt="   "), 422, "validation_failed", "inputs.prompt", "prompt"),
    "no prompts": (inputs(prompt=[]), 422, "validation_failed", "inputs.prompt", "empty"),
    "17 prompts": (inputs(prompt=["a"] * 17), 422, "validation_failed", "inputs.prompt", "16"),
    "an empty prompt of three": (inputs(prompt=["a", "", "c"]), 422, "validation_failed", "inputs.prompt.1", "empty"),
    "a number of three": (inputs(prompt=["a", "b", 3]), 422, "validation_failed", "inputs.prompt.2", "no text"),
    "a null among prompts": (inputs(prompt=[None, "b"]), 422, "validation_failed", "inputs.prompt.0", "no text"),
    "a list among prompts": (inputs(prompt=["a", ["b"]]), 422, "validation_failed", "inputs.prompt.1", "list"),
    "1 MB prompt of two": (inputs(prompt=["a", "x" * 1_000_000]), 422, "validation_failed", "inputs.prompt.1", "8000"),
    "prompts for an edit": (
        changed(
            task="image2image", model="sdxl-base-1.0",
            inputs={"prompt": ["a", "b"], "image": f"data:image/png;base64,{PNG}"},
        ),
        422, "validation_failed", "inputs.prompt", "text2image",
    ),
    "negative prompts": (inputs(negative_prompt=["a", "b"]), 422, "validation_failed", "inputs.negative_prompt", "one"),
    "18 pictures": (
        changed(inputs={"prompt": ["a", "b"]}, config={"num_images_per_prompt": 9}),
        422, "validation_failed", "config.num_images_per_prompt", "2 prompts of 9 picture(s) each are 18",
    ),
    "no seed for the last picture": (
        changed(inputs={"prompt": ["a", "b"]}, config={"seed": 2**63 - 1}),
        422, "validation_failed", "config.seed", "2 pictures",
    ),
    "no prompt": (changed(inputs={}), 422, "validation_failed", "inputs.prompt", ""),
    "inputs a list": (changed(inputs=[]), 422, "validation_failed", "inputs", "object"),
    "config a text": (changed(config="fast"), 422, "validation_failed", "config", "object"),
    "unknown preset": (config(preset="fastest"), 422, "validation_failed", "config.preset", "fast"),
    "model_path": (changed(model_path="/etc"), 422, "validation_failed", "model_path", ""),
    "output_dir": (config(output_dir="/tmp"), 422, "validation_failed", "config.output_dir", ""),  # noqa: S108
    "backend nobody can serve": (
        SHAPES | {"backend": "ascend"}, 422, "backend_unsupported", "backend", "cpu"
    ),
    "no backend at all": (changed(backend="quantum"), 422, "validation_failed", "backend", "auto"),
    "remote URL as image": (inputs(image="http://example.com/a.png"), 422, "validation_failed", "inputs.image", ""),
    "adapters": (changed(adapters=[]), 422, "validation_failed", "adapters", "supported"),
    "webhook": (changed(webhook="http://x"), 422, "validation_failed", "webhook", "supported"),
    "priority urgent": (changed(priority="urgent"), 422, "validation_failed", "priority", "high"),
    "priority 0": (changed(priority=0), 422, "validation_failed", "priority", "normal"),
    "17 metadata": (
        changed(metadata={str(n): "x" for n in range(17)}), 422, "validation_failed", "metadata", "16"
    ),
    "metadata not text": (changed(metadata={"a": 1}), 422, "validation_failed", "metadata.a", "string"),
    "a list": ([], 422, "validation_failed", "body", "object"),
    "a number": (7, 422, "validation_failed", "body", "object"),
}  # fmt: skip


@pytest.mark.parametrize("path", SUBMITS)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_its_code_place_and_remedy(gateway: Gateway, name: str, path: str) -> None:
    body, status, code, param, word = BAD[name]
    answer = gateway.http.post(path, json=body)
    assert (answer.status_code, code_of(answer)) == (status, code), answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert word in " ".join([error["message"], *(detail["message"] for detail in error["details"])])
    assert len(answer.content) < 5_000, "an error must not repeat what it refuses"


BAD_BODIES: dict[str, tuple[bytes, int, str]] = {
    "no JSON": (b"{", 400, "invalid_json"),
    "empty": (b"", 400, "invalid_json"),
    "NaN guidance": (json.dumps(config(guidance_scale=float("nan"))).encode(), 400, "invalid_json"),
    "Infinity": (json.dumps(config(guidance_scale=float("inf"))).encode(), 400, "invalid_json"),
    "1e999": (b'{"task":"text2image","model":"stub","inputs":{"prompt":"x"},"config":{"guidance_scale":1e999}}',
              422, "validation_failed"),
    "deep nesting": (b'{"inputs":' * 100_000, 400, "invalid_json"),
    "deep nesting, closed": (b"[" * 5_000 + b"]" * 5_000, 400, "invalid_json"),
    "not UTF-8": (b'{"task": "\xff\xfe"}', 400, "invalid_json"),
    "lone surrogate": (b'{"task": "\\ud800"}', 400, "invalid_json"),
    "thousands of digits": (b'{"config": {"seed": ' + b"9" * 100_000 + b"}}", 422, "validation_failed"),
    "too large": (b'"' + b"x" * 2_000_001 + b'"', 413, "too_large"),
}  # fmt: skip


@pytest.mark.parametrize("path", [*SUBMITS, "/v1/validate"])
@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_body_that_is_no_request_is_refused(gateway: Gateway, name: str, path: str) -> None:
    body, status, code = BAD_BODIES[name]
    answer = gateway.http.post(path, content=body, headers={"Content-Type": "application/json"})
    if path == "/v1/validate" and status == 422:
        assert (answer.status_code, answer.json()["ok"]) == (200, False)
    else:
        assert (answer.status_code, code_of(answer)) == (status, code), answer.text[:500]


def test_a_body_that_is_too_large_is_refused_also_when_it_does_not_say_how_long_it_is(gateway: Gateway) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(30):
            yield b"x" * 100_000

    answer = gateway.http.post("/v1/jobs", content=endless())
    assert (answer.status_code, code_of(answer)) == (413, "too_large")


def test_every_problem_is_told_at_once_and_those_beyond_fifty_are_counted(gateway: Gateway) -> None:
    answer = gateway.http.post("/v1/jobs", json=config(width=513, height=9, num_inference_steps=0, wat=1))
    places = {detail["loc"] for detail in answer.json()["error"]["details"]}
    assert places == {"config.width", "config.height", "config.num_inference_steps", "config.wat"}

    answer = gateway.http.post("/v1/jobs", json=config(**{f"x{n}": 1 for n in range(70)}))
    error = answer.json()["error"]
    assert len(error["details"]) == 50
    assert error["details_omitted"] == 20


def test_an_asynchronous_route_refuses_to_be_synchronous(gateway: Gateway) -> None:
    answer = gateway.http.post("/v1/jobs", json=changed(async_run=False, config={"width": 513}))
    assert code_of(answer) == "validation_failed"
    assert [detail["loc"] for detail in answer.json()["error"]["details"]] == ["async_run", "config.width"]


def bomb(side: int) -> bytes:
    """A PNG of a few KB that says it has side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 2) * side))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BAD_UPLOADS: dict[str, tuple[bytes, int, str]] = {
    "no picture": (b"GIF89a is not on the list", 415, "unsupported_media_type"),
    "empty": (b"", 415, "unsupported_media_type"),
    "cut off": (png(64, 64)[:60], 422, "validation_failed"),
    "50 megapixels": (bomb(7_200), 422, "validation_failed"),
    "too large": (b"\x89PNG\r\n\x1a\n" + bytes(1_000_001), 413, "too_large"),
}


@pytest.mark.parametrize("name", BAD_UPLOADS)
@pytest.mark.parametrize("form", [False, True], ids=["raw", "form"])
def test_an_upload_that_is_no_picture_is_refused(gateway: Gateway, name: str, form: bool) -> None:
    content, status, code = BAD_UPLOADS[name]
    if form:
        answer = gateway.http.post("/v1/uploads", files={"file": ("x.png", content)})
    else:
        answer = gateway.http.post("/v1/uploads", content=content)
    assert (answer.status_code, code_of(answer)) == (status, code), answer.text


@pytest.mark.parametrize(
    "files", [{"picture": png()}, [("file", png()), ("file", png())], [("file", png()), ("mask", png())]]
)
def test_an_upload_form_must_hold_the_one_file(gateway: Gateway, files: Any) -> None:
    answer = gateway.http.post("/v1/uploads", files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "file")


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("upload:0123456789abcdef", "upload_not_found"),
        ("artifact:11111111-2222-3333-4444-555555555555/0.png", "artifact_not_found"),
        ("upload:../../etc/passwd", "validation_failed"),
        ("file:///etc/passwd", "validation_failed"),
        ("/etc/passwd", "validation_failed"),
        ("data:image/png;base64,####", "validation_failed"),
        ("http://127.0.0.1:1/x.png", "validation_failed"),
    ],
)
def test_an_image_that_is_no_reference_of_the_callers_is_refused(gateway: Gateway, reference: str, code: str) -> None:
    model = next(m for m in gateway.http.get("/v1/models?task=image2image").json()["data"])
    body = {"task": "image2image", "model": model["id"], "inputs": {"prompt": "x", "image": reference}}
    answer = gateway.http.post("/v1/jobs", json=body)
    assert code_of(answer) == code, answer.text
    assert answer.json()["error"]["param"] == "inputs.image"


JOB = "11111111-2222-3333-4444-555555555555"
NOT_THERE = [
    ("GET", f"/v1/jobs/{JOB}", 404, "job_not_found"),
    ("DELETE", f"/v1/jobs/{JOB}", 404, "job_not_found"),
    ("GET", f"/v1/jobs/{JOB}/events", 404, "job_not_found"),
    ("GET", f"/v1/jobs/{JOB}/trace", 404, "job_not_found"),
    ("GET", f"/v1/jobs/{JOB}/artifacts/0.png", 404, "job_not_found"),
    ("GET", f"/v1/jobs/{JOB}/stream", 404, "not_found"),  # no WebSocket
    ("GET", "/v1/jobs/%00", 404, "job_not_found"),
    ("GET", "/v1/jobs/" + "x" * 4_000, 404, "job_not_found"),
    ("GET", "/v1/models/nope", 404, "model_not_found"),
    ("GET", "/", 404, "not_found"),
    ("GET", "/v1/jobs/", 404, "job_not_found"),
    ("POST", "/v2/generate", 404, "not_found"),
    ("GET", "/v1/generate", 405, "method_not_allowed"),
    ("PUT", "/v1/jobs", 405, "method_not_allowed"),
    ("BREW", "/v1/jobs", 405, "method_not_allowed"),
    ("GET", "/v1/jobs?limit=0", 422, "validation_failed"),
    ("GET", "/v1/jobs?limit=101", 422, "validation_failed"),
    ("GET", "/v1/jobs?limit=ten", 422, "validation_failed"),
    ("GET", "/v1/jobs?state=sleeping", 422, "validation_failed"),
    ("GET", "/v1/jobs?task=text2smell", 422, "validation_failed"),
    ("GET", "/v1/jobs?cursor=../x", 422, "validation_failed"),
    ("GET", "/v1/jobs?stat=queued", 422, "validation_failed"),
    ("GET", "/v1/models?task=text2smell", 422, "validation_failed"),
    ("GET", "/v1/models?tier=gold", 422, "validation_failed"),
    ("DELETE", f"/v1/jobs/{JOB}?purge=perhaps", 422, "validation_failed"),
    ("GET", "/healthz?" + "x" * 9_000, 413, "too_large"),
]


@pytest.mark.parametrize(("method", "path", "status", "code"), NOT_THERE)
def test_what_is_not_there_is_told_in_the_envelope(
    gateway: Gateway, method: str, path: str, status: int, code: str
) -> None:
    answer = gateway.http.request(method, path)
    if path == "/v1/jobs/":
        code = "not_found"
    assert (answer.status_code, code_of(answer)) == (status, code), answer.text
    if status == 405:
        assert answer.headers["Allow"]


def raw(gateway: Gateway, request: bytes) -> tuple[int, dict[str, Any]]:
    """The status and the JSON that some bytes get."""
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        answer = io.BytesIO()
        while chunk := connection.recv(65_536):
            answer.write(chunk)
    head, _, body = answer.getvalue().partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"HELLO\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nBad Header: secret-key\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: many\r\n\r\n",
        (
            b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            b"Connection: close\r\n\r\nzz\r\nxx\r\n0\r\n\r\n"
        ),
    ],
)
def test_what_is_no_http_gets_the_envelope_too(gateway: Gateway, request_bytes: bytes) -> None:
    status, body = raw(gateway, request_bytes)
    assert 400 <= status < 500
    assert body["error"]["message"]
    assert "secret-key" not in json.dumps(body)


@pytest.mark.parametrize(
    "name", ["../0.png", "..%2f0.png", "%2e%2e/0.png", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "0.png%00"]
)
def test_an_artifact_has_no_name_that_leads_elsewhere(gateway: Gateway, name: str) -> None:
    job_id = gateway.finished()
    host = gateway.url.removeprefix("http://")
    request = f"GET /v1/jobs/{job_id}/artifacts/{name} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    status, body = raw(gateway, request.encode())
    assert status == 404
    assert body["error"]["code"] in {"artifact_not_found", "not_found"}
    gateway.http.delete(f"/v1/jobs/{job_id}", params={"purge": "true"})


def test_validate_tells_every_problem_and_writes_nothing(gateway: Gateway) -> None:
    answer = gateway.http.post("/v1/validate", json=config(width=513, height=9))
    assert answer.status_code == 200
    told = answer.json()
    assert (told["ok"], told["request"], len(told["errors"])) == (False, None, 2)

    told = gateway.http.post("/v1/validate", json=changed(model="shape")).json()
    assert (told["ok"], told["errors"][0]["loc"]) == (False, "model")

    told = gateway.http.post("/v1/validate", json=config(preset="fast")).json()
    assert told["ok"]
    assert told["request"]["config"]["num_inference_steps"] == 20
    assert isinstance(told["request"]["config"]["seed"], int)


def test_cancelling_twice_is_told_and_harms_nothing(gateway: Gateway) -> None:
    job_id = gateway.submit()
    answers: list[httpx.Response] = [gateway.http.delete(f"/v1/jobs/{job_id}") for _ in range(2)]
    assert [answer.json()["cancel"] for answer in answers] == ["cancelled", "already_finished"]
    assert all(answer.json()["state"] == "cancelled" for answer in answers)
    gateway.http.delete(f"/v1/jobs/{job_id}", params={"purge": "true"})
