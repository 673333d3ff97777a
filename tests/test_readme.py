"""The README names nothing that is not there, and every settings file that ships is one that
`onstream check` takes.
"""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from onstream.settings.load import load_settings
from onstream.workers.commands.cli import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGE_FILES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "EXTENDING.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
PAGES = [page.read_text() for page in PAGE_FILES]
SETTINGS_FILES = [
    path
    for folder in ("examples", "configs", "recipes")
    for path in sorted((ROOT / folder).rglob("*.toml"))
]


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_folder_of_the_readmes_tree_exists() -> None:
    tree = README.split("## The tree")[1].split("## Development")[0]
    folders = re.findall(r"^\| `(\w+)/`", tree, re.MULTILINE)
    assert {"settings", "pipeline", "workers", "tests"} <= set(folders)
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


def test_every_make_target_of_the_readme_and_the_docs_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for page in PAGES for target in re.findall(r"`make ([a-z-]+)`", page)}
    assert {"lint", "test", "bench"} <= named
    assert named <= targets


def test_ci_runs_the_readmes_own_commands() -> None:
    loop = re.search(r"for step in ([a-z -]+); do", (ROOT / ".ci" / "run").read_text())
    assert loop
    steps = loop[1].split()
    assert len(steps) == 7
    assert [step for step in steps if f"`make {step}`" not in README] == []


def test_every_command_of_the_readme_and_the_docs_exists() -> None:
    named = {command for page in PAGES for command in re.findall(r"`onstream ([a-z-]+)", page)}
    assert {"up", "check", "worker", "status", "audit"} <= named
    assert named <= set(cli.list_commands(click.Context(cli)))


@pytest.mark.parametrize("file", SETTINGS_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_settings_file_has_no_problems(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    load_settings([file])
