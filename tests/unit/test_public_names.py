"""`import omnirt_tasks`: light, and whole."""

import os
import subprocess
import sys

import pytest

import omnirt_tasks


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_importing_it_loads_nothing_heavy_and_reads_no_setting() -> None:
    heavy = "{'torch', 'celery', 'flask', 'redis', 'httpx', 'pydantic', 'web', 'workers'}"
    code = f"import sys, omnirt_tasks; print(sorted({heavy} & set(sys.modules)))"

    # A wrong setting would be refused, were it read.
    assert run_python(code, OMNIRT_NO_SUCH_SETTING="1") == "[]"


def test_the_client_side_loads_no_celery_and_no_torch() -> None:
    code = (
        "import sys, omnirt_tasks as omnirt; omnirt.Client, omnirt.requests, omnirt.errors;"
        "print(sorted({'torch', 'celery', 'flask', 'diffusers', 'workers'} & set(sys.modules)))"
    )

    assert run_python(code) == "[]"


def test_app_is_the_celery_app_of_the_environment_s_settings() -> None:
    code = "import omnirt_tasks; a = omnirt_tasks.app; print(a is omnirt_tasks.app, a.conf.broker_url)"

    assert run_python(code, OMNIRT_REDIS_URL="redis://127.0.0.1:7/3") == "True redis://127.0.0.1:7/3"


def test_celery_finds_the_app_by_the_package_s_name() -> None:
    code = "from celery.app.utils import find_app; print(type(find_app('omnirt_tasks')).__name__)"

    assert run_python(code) == "TasksApp"


@pytest.mark.parametrize("name", [name for name in omnirt_tasks.__all__ if name != "app"])
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(omnirt_tasks, name) is not None
    assert name in dir(omnirt_tasks)


def test_another_name_is_an_attribute_error() -> None:
    name = "no_such_name"
    with pytest.raises(AttributeError, match=name):
        getattr(omnirt_tasks, name)
