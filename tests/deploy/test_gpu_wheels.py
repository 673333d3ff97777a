"""deploy/gpu-wheels.txt has all that a machine with torch and transformers lacks."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OPTIONAL = {"hiredis"}
"""A faster parser, which redis does without."""


def closure(requirements: list[str]) -> set[str]:
    """What is installed with `requirements`, which are installed here."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if name in found:
            continue
        found.add(name)
        try:
            theirs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # only for another system or version
        wanted = [Requirement(text) for text in theirs]
        waiting += [w for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})]
    return found


def listed() -> set[str]:
    lines = (ROOT / "deploy" / "gpu-wheels.txt").read_text().splitlines()
    return {canonicalize_name(line) for line in lines if not line.startswith("#")}


def test_every_package_that_torch_and_transformers_do_not_bring_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["train"], *extras["embedded"], "peft"]
    needed += ["pytest", "pytest-timeout", "psutil"]
    missing = closure(needed) - closure(["torch", "transformers"]) - listed() - OPTIONAL
    assert {name for name in missing if not name.startswith(("nvidia-", "cuda-"))} == set()


def test_every_package_listed_is_in_the_lock_file() -> None:
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    assert listed() <= {canonicalize_name(line.partition("==")[0]) for line in lock}


def test_a_checkout_that_is_not_installed_gets_its_name_and_version(tmp_path: Path) -> None:
    script = ROOT / "deploy" / "describe_source.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    (named,) = importlib.metadata.distributions(name="onstream", path=[str(tmp_path)])
    assert named.version == importlib.metadata.version("onstream")
