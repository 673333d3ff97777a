"""The pages in docs/: each is on the index, and what they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TOP_PAGES = [
    ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "EXTENDING.md")
]
RECIPES = ROOT.glob("recipes/**/README.md")
PAGES = sorted([*TOP_PAGES, *DOCS.glob("*.md"), *ROOT.glob("examples/*/README.md"), *RECIPES])
NAMING = (
    *("settings", "pipeline", "workers", "tests"),
    *("deploy", "examples", "recipes", "configs", "benchmarks"),
)
TEXT = {".py", ".toml", ".yaml", ".md", ".lua"}
PAGE_NAME = re.compile(r"\bdocs/[a-z0-9-]+\.md")
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")


def test_every_page_is_on_the_index_once() -> None:
    linked = re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "README.md").read_text())
    assert sorted(linked) == sorted({page.name for page in DOCS.glob("*.md")} - {"README.md"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_of_it(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


def test_every_page_that_a_file_names_exists() -> None:
    """Messages, comments and settings say `docs/….md`."""
    files = [file for top in NAMING for file in (ROOT / top).rglob("*") if file.suffix in TEXT]
    named = {name for file in files for name in PAGE_NAME.findall(file.read_text())}
    assert "docs/settings.md" in named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_tour_has_at_most_ten_files_in_order() -> None:
    steps = re.findall(r"^(\d+)\. \[`([\w/.]+)`\]", (DOCS / "tour.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1))
    assert 5 <= len(steps) <= 10
    assert [name for _, name in steps if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", ["glossary.md", "streams.md"])
def test_every_redis_key_is_on_the_page(page: str) -> None:
    source = (ROOT / "pipeline" / "redis" / "keys.py").read_text()
    keys = set(re.findall(r"_key\(f?\"([\w:]+)", source))
    assert {"stream:", "issued", "weights:"} <= keys
    text = (DOCS / page).read_text()
    assert [key for key in sorted(keys) if f"`{key}" not in text] == []


def test_every_module_that_the_upgrade_names_exists() -> None:
    rows = re.findall(
        r"^\| `[\w.]+` \| `onstream\.([\w.]+)` \|", (DOCS / "upgrading.md").read_text(), re.M
    )
    assert len(rows) > 100
    paths = [ROOT / row.replace(".", "/") for row in rows]
    assert [p for p in paths if not (p.is_dir() or p.with_suffix(".py").exists())] == []
