"""What a log line holds, and what it never holds."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.observability import logs
from omnirt_tasks.settings import Settings

logger = logging.getLogger("omnirt_tasks.example")
SECRET = "a lighthouse that nobody may read of"


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    quiet = {name: logging.getLogger(name).level for name in logs.QUIET_LOGGERS}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, was in quiet.items():
        logging.getLogger(name).setLevel(was)


def configured(**given: object) -> io.StringIO:
    stream = io.StringIO()
    logs.configure(Settings(**given), stream=stream)  # type: ignore[arg-type]  # pydantic checks every value
    return stream


def test_a_line_has_what_was_bound_around_it_and_only_there() -> None:
    stream = configured(log_json=True)

    with logs.bound(job_id="j1", model="shapes", worker="cpu-0@here"):
        logger.info("stage ended", extra={"stage": "denoise"})
    logger.info("idle")

    inside, outside = (json.loads(line) for line in stream.getvalue().splitlines())
    assert inside["message"] == "stage ended"
    assert (inside["job_id"], inside["model"], inside["worker"]) == ("j1", "shapes", "cpu-0@here")
    assert (inside["stage"], inside["level"], inside["logger"]) == ("denoise", "info", "omnirt_tasks.example")
    assert "job_id" not in outside


def test_lines_for_people_are_one_line_each_without_colours_where_nobody_looks() -> None:
    stream = configured()

    with logs.bound(job_id="j1"):
        logger.warning("no worker for %s", "cuda-sdxl")

    (line,) = stream.getvalue().splitlines()
    assert "no worker for cuda-sdxl" in line
    assert "job_id=j1" in line
    assert "\x1b" not in line


@pytest.mark.parametrize("log_json", [True, False])
@pytest.mark.parametrize("field", sorted(logs.PRIVATE_FIELDS))
def test_a_private_field_is_masked(field: str, *, log_json: bool) -> None:
    stream = configured(log_json=log_json)

    logger.info("careless", extra={field: SECRET})

    assert SECRET not in stream.getvalue()


@pytest.mark.parametrize("log_json", [True, False])
def test_a_traceback_shows_where_and_never_what_the_variables_held(*, log_json: bool) -> None:
    stream = configured(log_json=log_json)

    def generate(prompt: str) -> None:
        raise RuntimeError("the model failed")

    try:
        generate(SECRET)
    except RuntimeError:
        logger.exception("attempt failed")

    assert "the model failed" in stream.getvalue()
    assert "in generate" in stream.getvalue()
    assert SECRET not in stream.getvalue()


def test_setting_up_again_does_not_say_everything_twice() -> None:
    configured(log_json=True)
    stream = configured(log_json=True)

    logger.info("once")

    assert len(stream.getvalue().splitlines()) == 1


def test_the_level_is_kept_and_an_unknown_one_is_refused() -> None:
    stream = configured(log_level="warning")
    logger.info("quiet")
    assert not stream.getvalue()

    with pytest.raises(ConfigurationError, match="LOUD"):
        configured(log_level="LOUD")
