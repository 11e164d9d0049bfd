"""The family that docs/add-a-model.md shows is one that works."""

import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from omnirt_tasks.contract import Inputs, ResolvedRequest, Task
from omnirt_tasks.registry import Catalog, ModelSpec, discover
from omnirt_tasks.validation import Door, parse_request, resolve
from tests.support.hosts import RUN_TIMEOUT_S, Recorder
from tests.support.processes import PROJECT
from tests.support.tiny.folders import save_tiny
from workers.backends import driver
from workers.host import RunOrder, RunSucceeded
from workers.thread_host import ThreadHost

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def documented_spec() -> ModelSpec:
    page = (PROJECT / "docs" / "add-a-model.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    module = ModuleType("sd21")
    exec(compile(code, "docs/add-a-model.md", "exec"), module.__dict__)  # noqa: S102  # our own page
    (spec,) = module.SPECS
    assert isinstance(spec, ModelSpec)
    return spec


def test_the_documented_family_validates_loads_and_draws(tmp_path: Path) -> None:
    spec = documented_spec()
    catalog = Catalog([*discover(), spec])
    body = {"task": "text2image", "model": "sd21", "inputs": {"prompt": "a"}, "config": {"num_inference_steps": 2}}
    resolved, _ = resolve(parse_request(body), catalog, door=Door()).unwrap()
    folder = save_tiny("sd15", tmp_path / "weights")
    host = ThreadHost(
        backend=driver("cpu", torch_threads=1), models=[spec], folders={spec.id: folder}, cache_size=1, concurrency=1
    )
    order = RunOrder("job", 1, _small(resolved), tmp_path)

    outcome = host.submit(order, Recorder()).result(RUN_TIMEOUT_S)

    host.close()
    assert isinstance(outcome, RunSucceeded), outcome
    with Image.open(tmp_path / "0.png") as picture:
        assert picture.size == (64, 64)


def _small(resolved: ResolvedRequest) -> ResolvedRequest:
    assert resolved.task is Task.TEXT2IMAGE
    assert resolved.inputs == Inputs(prompt="a")
    config = {**resolved.config, "width": 64, "height": 64, "dtype": "fp32"}
    return resolved.model_copy(update={"backend": "cpu", "config": config})
