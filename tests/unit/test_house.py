"""The house keeps its shape: who imports whom, and what runs where torch is not installed."""

import ast
import os
import subprocess
import sys
import tomllib
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.processes import PROJECT

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# What only a device side has. A process with this finder is as good as one without them.
WITHOUT_THE_DEVICE_SIDE = """
import importlib.abc, sys
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "peft", "torch_npu"}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)
sys.meta_path.insert(0, Absent())
"""
IMPORT_ALL = """
import importlib, pkgutil
for package in {packages}:
    root = importlib.import_module(package)
    for module in pkgutil.walk_packages(root.__path__, package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


def run(code: str, **variables: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OMNIRT_")}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:omnirt_tasks", "-c", code],
        cwd=PROJECT,
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_module_of_gateway_and_library_imports_where_torch_is_not_installed() -> None:
    run(WITHOUT_THE_DEVICE_SIDE + IMPORT_ALL.format(packages=["omnirt_tasks", "web"]))


def test_the_gateway_does_not_import_the_device_side() -> None:
    told = run(
        "import sys\nfrom web.app import create_app\nfrom omnirt_tasks.settings import Settings\n"
        "create_app(Settings())\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'workers', 'torch', 'diffusers'}))"
    )
    assert told.strip() == "[]"


def test_a_worker_starts_without_torch_in_the_modules_that_celery_includes() -> None:
    run(
        WITHOUT_THE_DEVICE_SIDE
        + "import importlib\nfrom omnirt_tasks.celery_app import make_app\nfrom omnirt_tasks.settings import Settings\n"
        "for name in make_app(Settings()).conf.include: importlib.import_module(name)"
    )


def test_importing_the_library_reads_no_setting_and_connects_to_nothing() -> None:
    run(
        "import socket\n"
        "def refuse(*_): raise AssertionError('connected')\n"
        "socket.socket.connect = refuse\n"
        "import omnirt_tasks, web.app, omnirt_tasks.celery_app",
        OMNIRT_NO_SUCH_SETTING="1",
    )


def test_the_import_contracts_are_kept() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_installed_is_what_is_pinned() -> None:
    pinned = dict(line.lower().split("==") for line in (PROJECT / "constraints.txt").read_text().split())
    installed = {d.name.lower(): d.version.partition("+")[0] for d in distributions()}
    wrong = {name: (installed[name], pin) for name, pin in pinned.items() if installed.get(name, pin) != pin}
    assert not wrong, "installed, pinned: run `make setup`"


OURS = {"omnirt_tasks", "web", "workers", "tests"}
# Comes with transformers, which the training of shapes uses it with.
COMES_ALONG = {"tokenizers"}


def imported_by(folder: str) -> set[str]:
    """The libraries that the folder's modules import, anywhere in them."""
    names = set()
    for file in (PROJECT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names - OURS - set(sys.stdlib_module_names)


def asked_for(*extras: str) -> set[str]:
    """The distributions that pyproject.toml asks for, by their normal names."""
    wanted = [
        *PYPROJECT["dependencies"],
        *(line for name in extras for line in PYPROJECT["optional-dependencies"][name]),
    ]
    return {canonicalize_name(Requirement(line).name) for line in wanted}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("web", []),
        ("omnirt_tasks", ["worker", "speech", "embedded", "otel", "bench"]),
        ("workers", ["worker", "ascend"]),
        ("tests", ["worker", "embedded", "otel", "s3", "dev"]),
    ],
)
def test_what_is_imported_is_asked_for(folder: str, extras: list[str]) -> None:
    known, asked = packages_distributions(), asked_for(*extras)
    missing = {
        name
        for name in imported_by(folder) - COMES_ALONG
        if not {canonicalize_name(distribution) for distribution in known.get(name, [name])} & asked
    }
    assert not missing


@pytest.mark.parametrize("extra", ["worker", "speech", "embedded", "flower", "otel", "bench", "dev"])
def test_everything_that_is_asked_for_is_pinned(extra: str) -> None:
    lines = (PROJECT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for requirement in map(Requirement, [*PYPROJECT["dependencies"], *PYPROJECT["optional-dependencies"][extra]]):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} against {version}"


def test_the_gateway_is_asked_for_without_torch_and_ascend_by_name_only() -> None:
    extras = PYPROJECT["optional-dependencies"]

    assert not [line for line in PYPROJECT["dependencies"] if line.startswith(("torch", "diffusers", "transformers"))]
    assert [name for name, lines in extras.items() if any(line.startswith("torch-npu") for line in lines)] == ["ascend"]
    assert "torch==2.13.0" in extras["worker"]
