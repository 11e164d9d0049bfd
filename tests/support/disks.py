"""A small disk of a test's own, and what can befall one."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHUNK_BYTES = 64 * 1024


def may_mount() -> bool:
    """Whether whoever runs the tests can make a file system: root, or by sudo without a password. CI is root."""
    asked = ("sudo", "-n", "true")
    return os.geteuid() == 0 or (
        shutil.which("sudo") is not None and subprocess.run(asked, check=False).returncode == 0
    )


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of its own at the folder, which is made; skips the test where nobody may mount one."""
    if not may_mount():
        pytest.skip("a disk of a test's own takes root, or sudo without a password")
    folder.mkdir(parents=True)
    _as_root("mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=1777", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        _as_root("umount", "--lazy", str(folder))


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Not a byte is left on the disk."""
    filler = disk / "filler"
    try:
        with filler.open("wb", buffering=0) as stream:
            try:
                while stream.write(bytes(CHUNK_BYTES)):
                    pass
            except OSError:
                pass
        yield
    finally:
        filler.unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Nothing can be written or removed, as after a fault that the kernel has found."""
    _as_root("mount", "-o", "remount,ro", str(disk))
    try:
        yield
    finally:
        _as_root("mount", "-o", "remount,rw", str(disk))


@contextmanager
def replaced_by_a_file(disk: Path) -> Iterator[None]:
    """Each folder on the disk is a file, as after a restore that went wrong."""
    aside = {folder: folder.with_name(f"{folder.name}-aside") for folder in disk.iterdir()}
    for folder, kept in aside.items():
        folder.rename(kept)
        folder.touch()
    try:
        yield
    finally:
        for folder, kept in aside.items():
            folder.unlink()
            kept.rename(folder)


def _as_root(*command: str) -> None:
    rights = () if os.geteuid() == 0 else ("sudo", "-n")
    subprocess.run([*rights, *command], check=True)
