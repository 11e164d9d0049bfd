"""Each backend's driver finds its devices, and does no harm where there are none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from omnirt_tasks.errors import ConfigurationError
from workers.backends import driver
from workers.backends.cpu import OPENMP_SPINS
from workers.backends.probing import probe_apart

MIB = 2**20


def told_by(script: str, **variables: str) -> str:
    """What a fresh process prints: one that has imported nothing, and in which what it imports breaks nobody."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_", "TORCH_"))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


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
    told = told_by(  # OpenMP reads its variable once, when torch loads it
        "import os; from workers.backends import driver\n"
        "with driver('cpu').guard():\n"
        "    import torch; print(os.environ['GOMP_SPINCOUNT'], torch.get_num_threads())"
    )

    assert told.split() == [OPENMP_SPINS, str(max((os.cpu_count() or 1) - 1, 1))]


@pytest.mark.parametrize("name", ["cuda", "cpu", "ascend"])
def test_a_driver_tells_lack_of_memory_from_other_errors(name: str) -> None:
    import torch

    made = driver(name)
    lack = _lack_of_host_memory() if name == "cpu" else torch.OutOfMemoryError("out of memory")
    assert made.is_out_of_memory(lack)
    assert made.is_out_of_memory(MemoryError())
    assert not made.is_out_of_memory(RuntimeError("shapes differ"))
    assert not made.is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    "words", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"]
)
def test_a_lack_that_the_libraries_beneath_torch_tell_in_words_is_one_too(words: str) -> None:
    assert driver("cuda").is_out_of_memory(RuntimeError(words))


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: out of memory", False),
    ],
)
def test_a_gpu_is_lost_with_its_context_and_not_for_lack_of_memory(words: str, lost: bool) -> None:
    import torch

    assert driver("cuda").is_lost(torch.AcceleratorError(words)) is lost
    assert driver("cuda").is_lost(RuntimeError(words)) is lost
    assert not driver("cuda").is_lost(torch.OutOfMemoryError(words))
    assert not driver("cuda").is_lost(RuntimeError("shapes differ"))
    assert not driver("cpu").is_lost(RuntimeError(words))
    assert not driver("cpu-stub").is_lost(RuntimeError(words))


def test_a_backend_without_a_driver_is_named() -> None:
    with pytest.raises(ConfigurationError, match="'tpu'"):
        driver("tpu")


def test_the_cpu_compiles_with_the_compiler_that_torch_would_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / ("clang++" if sys.platform == "darwin" else "g++")
    compiler.write_text("#!/bin/sh\n")
    monkeypatch.delenv("CXX", raising=False)

    monkeypatch.setenv("PATH", "")
    assert driver("cpu").features() == ()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver("cpu").features() == (), "what cannot be run is no compiler"
    compiler.chmod(0o755)
    assert driver("cpu").features() == ("compile",)
    monkeypatch.setenv("CXX", "another-compiler")
    assert driver("cpu").features() == ()


def test_neither_the_stub_nor_an_npu_compiles() -> None:
    assert driver("cpu-stub").features() == ()
    assert driver("ascend").features() == ()


def test_the_memory_of_the_host_is_told_with_what_of_it_is_free() -> None:
    memory = driver("cpu").memory()

    assert memory is None or 0 < memory.free_bytes < memory.total_bytes
    assert (memory is None) == (sys.platform != "linux")
    assert driver("cpu-stub").memory() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the kernel counts as resident, and glibc gives back")
def test_a_cpu_gives_what_was_freed_back_to_the_system() -> None:
    # Blocks below the size that glibc maps by itself stay in its heap when freed, held by the last one in use.
    told = told_by(
        "import json, resource\n"
        "from workers.backends import driver\n"
        "def resident(): return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()\n"
        "cpu = driver('cpu')\n"
        "blocks = [bytearray(64 * 1024) for _ in range(2_000)]\n"
        "last = bytearray(64 * 1024)\n"
        "held = resident()\n"
        "del blocks\n"
        "freed = resident()\n"
        "cpu.release()\n"
        "print(json.dumps([held, freed, resident()]))"
    )

    held_bytes, freed_bytes, released_bytes = json.loads(told)
    assert freed_bytes > held_bytes - 20 * MIB, "the allocator kept it"
    assert released_bytes < held_bytes - 100 * MIB


def test_torch_imports_no_other_devices_extension_unless_the_operator_says_so() -> None:
    script = (
        "import os; from workers.backends import driver\n"
        "with driver('cpu').guard(): print(os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'])"
    )

    assert told_by(script).strip() == "0"
    assert told_by(script, TORCH_DEVICE_BACKEND_AUTOLOAD="1").strip() == "1"


# Probing from a process without torch


@pytest.mark.parametrize("backend", ["cuda", "ascend", "cpu", "cpu-stub"])
def test_devices_are_found_without_an_import_of_torch(backend: str) -> None:
    told = told_by(
        "import sys; from workers.backends.probing import probe_apart\n"
        f"print(len(probe_apart('{backend}')), 'torch' in sys.modules)"
    )

    assert told.split() == [str(len(driver(backend).probe())), "False"]


def probe_with(monkeypatch: pytest.MonkeyPatch, folder: Path, torch: str) -> None:
    """Have the child import this text as torch."""
    (folder / "torch.py").write_text(torch)
    monkeypatch.setenv("PYTHONPATH", str(folder))


GPUS = """
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    @staticmethod
    def get_device_properties(index):
        class properties:
            name, total_memory, major = f"GPU {index}", 24 * 2**30, 7 + index
        return properties
print("a library says hello")
"""


def test_what_the_child_finds_comes_back_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    probe_with(monkeypatch, tmp_path, GPUS)

    first, second = probe_apart("cuda")

    assert (first.device, first.name, first.memory_bytes) == ("cuda:0", "GPU 0", 24 * 2**30)
    assert first.dtypes == ("fp32", "fp16")
    assert second.dtypes == ("fp32", "fp16", "bf16"), "from compute capability 8 on"


def test_a_probe_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    probe_with(monkeypatch, tmp_path, "raise RuntimeError('the driver is too old')")

    with pytest.raises(ConfigurationError, match="the driver is too old"):
        probe_apart("cuda")


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    probe_with(monkeypatch, tmp_path, "import threading; threading.Event().wait()")

    with pytest.raises(ConfigurationError, match="not ended"):
        probe_apart("cuda", timeout_s=0.5)


def _lack_of_host_memory() -> BaseException:
    import torch

    try:
        torch.empty(2**60, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    raise AssertionError("an exbibyte was to be had")
