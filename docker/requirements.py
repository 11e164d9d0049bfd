"""Prints what pyproject.toml asks for, with the extras named, so that an image's libraries are a layer of their own."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = [project["optional-dependencies"][name] for name in sys.argv[1:]]
sys.stdout.writelines(f"{line}\n" for group in [project["dependencies"], *extras] for line in group)
