"""What a worker decides before it starts: its queues, its models, its device."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omnirt_tasks.contract import Backend, ExecutionMode
from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.registry import Catalog, discover
from omnirt_tasks.settings import load_settings
from workers.backends import DeviceInfo
from workers.devices import device_index, devices_of, take_device
from workers.plan import plan_for_backend, plan_for_queues

SDXL = "sdxl-base-1.0"


def test_the_queues_of_a_worker_tell_its_backend_and_models() -> None:
    plan = plan_for_queues(["cpu-stub-stub"], discover(), load_settings())

    assert plan.backend == Backend.CPU_STUB
    assert plan.queues == ("cpu-stub-stub",)
    assert [spec.id for spec in plan.models] == ["stub"]
    assert plan.execution_mode is ExecutionMode.LEGACY_CALL


def test_a_model_is_served_where_its_weights_are(tmp_path: Path) -> None:
    settings = load_settings(model_folders={SDXL: tmp_path})

    plan = plan_for_queues(["cuda-sdxl"], discover(), settings)

    assert [spec.id for spec in plan.models] == [SDXL]
    assert plan.folders == {SDXL: tmp_path}


@pytest.mark.parametrize(
    ("queues", "told"),
    [
        (["celery"], "no queue of this project"),
        (["cpu-none"], "No model lives on the queue 'cpu-none'"),
        (["cuda-sdxl"], "OMNIRT_MODEL_FOLDERS"),
        (["cpu-stub-stub", "cuda-sdxl"], "cpu-stub and cuda"),
        (["cpu-stub-stub+eu"], "OMNIRT_TAGS"),
    ],
)
def test_queues_that_cannot_be_served_are_refused_with_a_remedy(queues: list[str], told: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        plan_for_queues(queues, discover(), load_settings())

    assert told in str(refused.value)


def test_a_host_serves_all_that_a_backend_can_run_here(tmp_path: Path) -> None:
    assert plan_for_backend(Backend.ASCEND, discover(), load_settings()) is None
    plan = plan_for_backend(Backend.CUDA, discover(), load_settings(model_folders={SDXL: tmp_path}))
    assert plan is not None
    assert set(plan.queues) == {"cuda-sdxl", "cuda-shapes"}


def test_a_model_whose_folder_is_not_there_is_not_served(tmp_path: Path) -> None:
    plan = plan_for_backend(Backend.CUDA, discover(), load_settings(model_folders={SDXL: tmp_path / "gone"}))

    assert plan is not None
    assert SDXL not in {spec.id for spec in plan.models}
    assert set(plan.folders) == {spec.id for spec in plan.models}


def test_the_stub_runs_any_model_of_its_backend_without_weights() -> None:
    real = discover().find(SDXL)
    catalog = Catalog([dataclasses.replace(real, backends=(Backend.CPU_STUB, Backend.CUDA))])

    plan = plan_for_backend(Backend.CPU_STUB, catalog, load_settings())

    assert plan is not None
    assert [spec.id for spec in plan.models] == [SDXL]
    assert plan_for_backend(Backend.CUDA, catalog, load_settings()) is None


def test_the_processors_count_as_as_many_devices_as_the_operator_says() -> None:
    probed = (DeviceInfo("cpu:0", "a processor", None, ("fp32",)),)

    assert devices_of("cpu", probed, cpu_devices=2) == ("cpu:0", "cpu:1")
    assert devices_of("cpu", (), cpu_devices=2) == ()
    assert devices_of("cuda", (DeviceInfo("cuda:0", "a GPU", 1, ()),), cpu_devices=2) == ("cuda:0",)


def test_each_worker_takes_the_next_free_device_until_there_is_none(tmp_path: Path) -> None:
    first = take_device("cuda", ("cuda:0", "cuda:1"), wanted=None, run_dir=tmp_path)
    second = take_device("cuda", ("cuda:0", "cuda:1"), wanted=None, run_dir=tmp_path)
    assert (first.device, second.device, second.index) == ("cuda:0", "cuda:1", 1)

    with pytest.raises(ConfigurationError) as refused:
        take_device("cuda", ("cuda:0", "cuda:1"), wanted=None, run_dir=tmp_path)
    assert f"cuda:0 is taken by process {os.getpid()}; cuda:1 is taken" in str(refused.value)

    first.close()
    again = take_device("cuda", ("cuda:0", "cuda:1"), wanted=None, run_dir=tmp_path)
    assert again.device == "cuda:0"
    again.close()
    second.close()


def test_a_wanted_device_is_taken_or_nothing(tmp_path: Path) -> None:
    held = take_device("cuda", ("cuda:0", "cuda:1"), wanted="cuda:1", run_dir=tmp_path)
    assert held.device == "cuda:1"
    with pytest.raises(ConfigurationError, match="unset OMNIRT_DEVICE"):
        take_device("cuda", ("cuda:0", "cuda:1"), wanted="cuda:1", run_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="this host has cuda:0"):
        take_device("cuda", ("cuda:0",), wanted="cuda:7", run_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="no cuda device"):
        take_device("cuda", (), wanted=None, run_dir=tmp_path)
    with pytest.raises(ConfigurationError):
        device_index("cuda")
    held.close()


def test_the_workers_task_module_is_imported_without_torch() -> None:
    code = (
        "import sys, omnirt_tasks\n"
        "omnirt_tasks.app.loader.import_default_modules()\n"
        "assert 'workers.bootsteps' in sys.modules\n"
        "assert not {'torch', 'diffusers', 'flask'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
