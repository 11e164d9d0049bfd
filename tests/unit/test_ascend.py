"""NPUs are found and driven through torch_npu, and nothing is harmed where it or CANN is missing."""

import importlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from omnirt_tasks.errors import ConfigurationError
from tests.support.processes import PROJECT
from workers.backends import DeviceInfo, MemoryInfo, driver
from workers.backends.probing import probe_apart
from workers.chunks.calls import DeviceCall
from workers.device import DeviceThread
from workers.devices import devices_of, take_device
from workers.thread_host import ThreadHost

GIB = 2**30
STUB = (PROJECT / "tests/support/npu/torch_npu.py").read_text(encoding="utf-8")
WITHOUT_CANN = "raise OSError('libhccl.so: cannot open shared object file')\n"
# How an installed torch-npu says that torch is to import it.
ENTRY_POINT = "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"

Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs this text as torch_npu, for this process and those that it starts."""

    def installed(text: str) -> None:
        info = tmp_path / "torch_npu-2.13.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.13.0\n")
        (info / "entry_points.txt").write_text(ENTRY_POINT)
        (tmp_path / "torch_npu.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    yield installed
    sys.modules.pop("torch_npu", None)


@pytest.fixture
def torch_npu(install: Install) -> ModuleType:
    """The stub, with two devices."""
    install(STUB)
    return importlib.import_module("torch_npu")


def python(script: str) -> "subprocess.CompletedProcess[str]":
    """A fresh process, in which torch imports what it does by itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_")}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False, timeout=100
    )


@pytest.mark.usefixtures("torch_npu")
@pytest.mark.parametrize("probe", [probe_apart, lambda backend: driver(backend).probe()], ids=["apart", "here"])
def test_every_npu_is_a_device_under_our_name(probe: Callable[[str], tuple[DeviceInfo, ...]]) -> None:
    first, second = probe("ascend")

    assert first == DeviceInfo("ascend:0", "NPU 0", 64 * GIB, ("fp32", "fp16", "bf16"))
    assert (second.device, second.name) == ("ascend:1", "NPU 1")
    assert driver("ascend", "ascend:1").torch_device == "npu:1"


@pytest.mark.parametrize("chips", ["npu.is_bf16_supported = lambda: False", "del npu.is_bf16_supported"])
def test_bf16_is_offered_only_where_torch_npu_says_so(install: Install, chips: str) -> None:
    install(f"{STUB}\n{chips}\n")

    assert {info.dtypes for info in probe_apart("ascend")} == {("fp32", "fp16")}


def test_a_host_without_npus_has_none(install: Install) -> None:
    install(f"{STUB}\nnpu.is_available = lambda: False\n")

    assert probe_apart("ascend") == ()


@pytest.mark.parametrize("broken", [WITHOUT_CANN, "raise ImportError('no _C')\n", "raise RuntimeError('no driver')\n"])
def test_a_torch_npu_that_cannot_be_imported_means_no_device(install: Install, broken: str) -> None:
    install(broken)

    assert driver("ascend").probe() == ()
    assert probe_apart("ascend") == ()


def test_a_worker_that_finds_no_cann_refuses_and_the_log_says_what_is_missing(
    install: Install, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(WITHOUT_CANN)

    with caplog.at_level(logging.WARNING), pytest.raises(ConfigurationError, match="no ascend device"):
        take_device("ascend", devices_of("ascend", probe_apart("ascend"), cpu_devices=1), wanted=None, run_dir=tmp_path)
    assert "libhccl.so" in caplog.text
    assert "CANN" in caplog.text


def test_a_host_without_cann_refuses_to_hold_an_npu(install: Install) -> None:
    install(WITHOUT_CANN)

    with pytest.raises(ConfigurationError, match="'ascend:0'"):
        ThreadHost(backend=driver("ascend"), models=[], folders={}, cache_size=1, concurrency=1)
    with pytest.raises(ConfigurationError, match=r"libhccl\.so"):
        DeviceThread(driver("ascend"))


def test_the_cpu_still_works_where_torch_npu_is_installed_without_cann(install: Install) -> None:
    install(WITHOUT_CANN)

    alone = python("import torch")
    ours = python(
        "from workers.backends import driver\n"
        "with driver('cpu').guard():\n"
        "    import torch; print(torch.ones(2).sum().item())"
    )

    assert "libhccl.so" in alone.stderr, "torch imports it by itself, and fails"
    assert (ours.returncode, ours.stdout.strip()) == (0, "2.0"), ours.stderr


def test_the_device_thread_is_on_its_npu_and_waits_for_it(torch_npu: ModuleType) -> None:
    import torch

    device = DeviceThread(driver("ascend", "ascend:1"))
    try:
        call = DeviceCall(None, lambda: (threading.get_ident(), torch.is_grad_enabled()))
        thread, with_gradients = device.submit(call).result(10)
    finally:
        device.close()

    assert torch_npu.device_of_thread[thread] == "npu:1"
    assert not with_gradients
    assert torch_npu.asked[-1] == ("synchronize", "npu:1")


def test_memory_is_told_and_given_back_by_the_device_itself(torch_npu: ModuleType) -> None:
    npu = driver("ascend", "ascend:1")

    assert npu.memory() == MemoryInfo(total_bytes=64 * GIB, free_bytes=40 * GIB)
    assert npu.peak_memory_bytes() == 3 * GIB
    npu.reset_peak()
    npu.release()
    assert torch_npu.asked == [
        ("mem_get_info", "npu:1"),
        ("max_memory_allocated", "npu:1"),
        ("reset_peak_memory_stats", "npu:1"),
        ("empty_cache", ""),
    ]


def test_a_lack_of_memory_is_known_by_its_class_or_its_words() -> None:
    npu = driver("ascend")

    assert npu.is_out_of_memory(RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB"))
    assert not npu.is_out_of_memory(RuntimeError("EE9999: Inner Error"))


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("NPU function error: aclrtSynchronizeStream, error code is 507015", True),
        ("ACL stream synchronize failed, error code:507035", True),
        ("NPU function error: aclrtMalloc, error code is 207001", False),  # memory lacks
        ("NPU function error: call aclnnAdd failed, error code is 161002", False),  # a wrong parameter
    ],
)
def test_a_device_that_broke_off_is_lost(words: str, lost: bool) -> None:
    assert driver("ascend").is_lost(RuntimeError(words)) is lost


@pytest.mark.usefixtures("torch_npu")
def test_two_workers_of_a_host_have_a_device_each(tmp_path: Path) -> None:
    devices = devices_of("ascend", probe_apart("ascend"), cpu_devices=1)
    first = take_device("ascend", devices, wanted=None, run_dir=tmp_path)
    second = take_device("ascend", devices, wanted=None, run_dir=tmp_path)
    try:
        assert [first.device, second.device] == ["ascend:0", "ascend:1"]
        with pytest.raises(ConfigurationError, match=f"process {os.getpid()}"):
            take_device("ascend", devices, wanted=None, run_dir=tmp_path)
        first.close()
        again = take_device("ascend", devices, wanted="ascend:0", run_dir=tmp_path)
        again.close()
    finally:
        first.close()
        second.close()
