"""What the device side of a worker is made from, and where it lives."""

from pathlib import Path
from typing import Any

import pytest

from omnirt_tasks.errors import ConfigurationError
from omnirt_tasks.registry import discover
from omnirt_tasks.settings import Placement, load_settings
from workers.backends.cpu import host_memory_bytes
from workers.host import HostConfig
from workers.plan import plan_for_queues
from workers.serving import host_config, placement_of
from workers.thread_host import BUDGET_SHARE


def config_of(queue: str = "cpu-shapes", **settings: Any) -> HostConfig:
    made = load_settings(**settings)
    plan = plan_for_queues([queue], discover(), made)
    return host_config(made, plan, f"{plan.backend}:0", concurrency=4)


@pytest.mark.parametrize(
    ("placement", "backend", "lives"),
    [
        (Placement.AUTO, "cpu-stub", Placement.THREAD),
        (Placement.AUTO, "cpu", Placement.PROCESS),
        (Placement.AUTO, "cuda", Placement.PROCESS),
        (Placement.AUTO, "ascend", Placement.PROCESS),
        (Placement.THREAD, "cuda", Placement.THREAD),
        (Placement.PROCESS, "cpu-stub", Placement.PROCESS),
    ],
)
def test_every_real_backend_has_a_process_unless_the_operator_says_otherwise(
    placement: Placement, backend: str, lives: Placement
) -> None:
    assert placement_of(load_settings(placement=placement), backend) is lives


def test_the_workers_that_share_a_processor_share_its_memory() -> None:
    host_bytes = host_memory_bytes()
    assert host_bytes is not None

    assert config_of(cpu_devices=4).memory_budget_bytes == int(BUDGET_SHARE * host_bytes / 4)
    assert config_of().memory_budget_bytes is None, "alone it is the host's to say"
    assert config_of(cpu_devices=4, memory_budget_bytes=10**9).memory_budget_bytes == 10**9


def test_how_jobs_share_forward_passes_is_the_settings_to_say_and_kept_for_each_device(tmp_path: Path) -> None:
    config = config_of(max_batch_size=3, batch_window_ms=20, data_dir=tmp_path)

    assert (config.max_batch_size, config.batch_window_ms) == (3, 20)
    assert config.chunk_table == tmp_path / "chunks" / "cpu-cpu-0.json"
    assert config_of().max_batch_size is None


def test_a_warm_up_of_what_is_not_served_is_refused_by_name() -> None:
    assert config_of(warm_up=("shapes",)).warm_up == ("shapes",)
    with pytest.raises(ConfigurationError, match="OMNIRT_WARM_UP names flux-dev; this worker serves shapes"):
        config_of(warm_up=("shapes", "flux-dev"))
