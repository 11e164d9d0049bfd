"""Each backend's driver finds its devices, and does no harm where there are none."""

import os
import subprocess
import sys

import pytest

from omnirt_tasks.errors import ConfigurationError
from workers.backends import driver
from workers.backends.cpu import OPENMP_SPINS


def test_the_cpu_is_one_device_under_the_name_asked_for() -> None:
    (info,) = driver("cpu", "cpu:1").probe()
    assert info.device == "cpu:1"
    assert info.dtypes == ("fp32", "bf16")
    assert info.memory_bytes is None or info.memory_bytes > 2**30


def test_the_stub_is_a_device_of_every_dtype() -> None:
    (info,) = driver("cpu-stub").probe()
    assert (info.device, info.dtypes) == ("cpu-stub:0", ("fp32", "fp16", "bf16"))


def test_gpus_are_found_where_there_are_any() -> None:
    import torch

    found = driver("cuda").probe()
    assert len(found) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_the_guard_of_a_real_backend_switches_gradients_off_in_its_thread() -> None:
    import torch

    with driver("cpu", torch_threads=torch.get_num_threads()).guard():
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_cpu_worker_leaves_a_core_free_and_its_threads_do_not_starve_each_other() -> None:
    # In a process of its own: OpenMP reads its variable once, when torch loads it.
    script = (
        "import os; from workers.backends import driver\n"
        "with driver('cpu').guard():\n"
        "    import torch; print(os.environ['GOMP_SPINCOUNT'], torch.get_num_threads())"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}

    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)

    assert told.stdout.split() == [OPENMP_SPINS, str(max((os.cpu_count() or 1) - 1, 1))]


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_a_driver_tells_lack_of_memory_from_other_errors(name: str) -> None:
    import torch

    made = driver(name)
    assert made.is_out_of_memory(MemoryError())
    assert not made.is_out_of_memory(RuntimeError("shapes differ"))
    lack = torch.OutOfMemoryError("CUDA out of memory") if name == "cuda" else _lack_of_host_memory()
    assert made.is_out_of_memory(lack)


def test_a_backend_without_a_driver_is_named() -> None:
    with pytest.raises(ConfigurationError, match="'ascend'"):
        driver("ascend")


def _lack_of_host_memory() -> BaseException:
    import torch

    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("an exbibyte was to be had")
