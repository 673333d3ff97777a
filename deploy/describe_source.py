"""Writes into a directory of packages the name and the version of this checkout.

Where nothing can be built, the source is used from PYTHONPATH, and asks for its own version.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def describe(directory: Path) -> None:
    """Write the metadata of a distribution into `directory`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = directory / f"{project['name']}-{project['version']}.dist-info"
    named.mkdir(parents=True, exist_ok=True)
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}"]
    (named / "METADATA").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    describe(Path(sys.argv[1]))
