"""What README tells a newcomer to send is accepted."""

import json
import re
from pathlib import Path

from omnirt_tasks.registry import discover
from omnirt_tasks.validation import Door, parse_request, resolve

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_first_curl_of_the_readme_is_a_valid_request() -> None:
    bodies = re.findall(r"-d '(\{.*?\})'", README, re.DOTALL)

    assert bodies
    for body in bodies:
        request = parse_request(json.dumps(json.loads(body)))
        assert resolve(request, discover(), door=Door(allow_stub=False)).problems == ()


def test_flower_is_never_told_to_listen_beyond_this_host() -> None:
    lines = [line for line in README.splitlines() if re.search(r"celery .*flower", line)]

    assert lines
    assert all("--address=127.0.0.1" in line for line in lines)
