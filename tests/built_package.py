"""Builds the package of the checkout, as `pip install` does but without a network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = (
    "onstream",
    "pipeline",
    "settings",
    "workers",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
BUILD = "import sys; from setuptools import build_meta; build_meta.{function}(sys.argv[1])"


def copy_checkout(directory: Path) -> Path:
    """Copy what the package is built of to `directory`, which setuptools writes to."""
    directory.mkdir()
    compiled = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, directory / name, symlinks=True, ignore=compiled)
        else:
            shutil.copy(source, directory / name)
    return directory


def build_sdist(project: Path, out: Path) -> Path:
    """Build the source distribution of `project` in the folder `out`."""
    return _build("build_sdist", project, out, "*.tar.gz")


def build_wheel(project: Path, out: Path) -> Path:
    """Build the wheel of `project` in the folder `out`."""
    return _build("build_wheel", project, out, "*.whl")


def build_editable(project: Path, out: Path) -> Path:
    """Build the wheel of an editable install of `project`, which leads to its files."""
    return _build("build_editable", project, out, "*.whl")


def _build(function: str, project: Path, out: Path, pattern: str) -> Path:
    out.mkdir()
    subprocess.run(
        [sys.executable, "-c", BUILD.format(function=function), str(out)],
        cwd=project,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    [built] = out.glob(pattern)
    return built
