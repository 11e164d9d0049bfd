"""What parsing leaves behind: nothing that grows with the number of jobs."""

import json

import pytest

from omnirt_tasks.contract import ErrorInfo, GenerateRequest
from omnirt_tasks.contract.base import Answer, Value


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        (GenerateRequest, {"task": "text2image", "model": "shapes", "inputs": {"prompt": "a red circle"}}, "model"),
        (ErrorInfo, {"code": "timeout", "message": "It took too long."}, "message"),
    ],
)
def test_a_parsed_text_is_held_by_its_value_alone(kind: type[Value | Answer], fields: object, text: str) -> None:
    parsed = json.dumps(fields)
    first, second = kind.model_validate_json(parsed), kind.model_validate_json(parsed)

    assert getattr(first, text) == getattr(second, text)
    # One that pydantic had kept would be the same object.
    assert getattr(first, text) is not getattr(second, text)


def test_what_a_system_says_in_undecodable_words_can_be_kept_and_read() -> None:
    told = ErrorInfo(code="storage_error", message="no such file: '\udcff.png'", hint="look at \udcff")

    assert ErrorInfo.model_validate_json(told.model_dump_json()) == told
    assert told.message == "no such file: '?.png'"
