"""What `pip install` of a wheel brings: one top-level name, whole."""

from __future__ import annotations

import os
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

from tests.built_package import ROOT, build_sdist, build_wheel, copy_checkout

SHIPPED = (".py", ".lua", ".typed")


@dataclass(frozen=True)
class Built:
    """The wheel of a checkout, and the wheel of its source distribution: contents by name."""

    wheel: dict[str, bytes]
    wheel_of_sdist: dict[str, bytes]

    @property
    def metadata_folder(self) -> str:
        [folder] = {name.split("/")[0] for name in self.wheel if ".dist-info/" in name}
        return folder

    def package_files(self) -> dict[str, bytes]:
        """What lies in the package itself."""
        return {name: data for name, data in self.wheel.items() if name.startswith("onstream/")}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both, built in a copy of the checkout by the build backend that pyproject.toml names."""
    directory = tmp_path_factory.mktemp("package")
    checkout = copy_checkout(directory / "checkout")
    wheel = build_wheel(checkout, directory / "wheel")
    sdist = build_sdist(checkout, directory / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory / "unpacked", filter="data")
    [unpacked] = (directory / "unpacked").iterdir()
    wheel_of_sdist = build_wheel(unpacked, directory / "wheel_of_sdist")
    return Built(contents(wheel), contents(wheel_of_sdist))


def contents(wheel: Path) -> dict[str, bytes]:
    """The files in `wheel`, by name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def source_files() -> dict[str, bytes]:
    """The files of the package as they lie in the checkout, behind its links."""
    found = {}
    for folder, _, names in os.walk(ROOT / "onstream", followlinks=True):
        for name in names:
            path = Path(folder, name)
            if path.suffix in SHIPPED:
                found[str(path.relative_to(ROOT))] = path.read_bytes()
    return found


def test_exactly_one_top_level_name_comes_with_its_metadata(built: Built) -> None:
    top = {name.split("/")[0] for name in built.wheel}
    assert top == {"onstream", built.metadata_folder}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = Parser().parsestr(built.wheel[f"{built.metadata_folder}/METADATA"].decode())
    for name, field in (
        ("name", "Name"),
        ("version", "Version"),
        ("description", "Summary"),
        ("requires-python", "Requires-Python"),
        ("license", "License-Expression"),
    ):
        assert metadata[field] == project[name]
    assert f"{built.metadata_folder}/licenses/LICENSE" in built.wheel
    scripts = built.wheel[f"{built.metadata_folder}/entry_points.txt"].decode()
    assert "onstream = onstream.workers.commands.cli:main" in scripts


def test_the_wheel_holds_every_module_script_and_type_marker_and_nothing_else(
    built: Built,
) -> None:
    assert built.package_files() == source_files()
    assert "onstream/py.typed" in built.wheel


def test_all_package_data_that_is_listed_exists(built: Built) -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = [pattern for listed in setuptools["package-data"].values() for pattern in listed]
    assert {"py.typed", "*.lua"} <= set(patterns)
    for pattern in patterns:
        assert any(Path(name).match(pattern) for name in built.package_files()), pattern


def test_a_wheel_of_the_source_distribution_holds_the_same(built: Built) -> None:
    assert built.wheel_of_sdist == built.wheel
