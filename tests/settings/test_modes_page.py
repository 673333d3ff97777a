"""docs/modes.md: its files are files that work, and the seed page's are on it.

The file of docs/teacher-prompt.md works too.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onstream.settings.load import resolve

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "modes.md").read_text(encoding="utf-8")
OWN_PROMPT = (ROOT / "docs" / "teacher-prompt.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE, flags=re.DOTALL)
[OWN_PROMPT_BLOCK] = re.findall(r"```toml\n(.*?)```", OWN_PROMPT, flags=re.DOTALL)


@pytest.mark.parametrize("block", [*BLOCKS, OWN_PROMPT_BLOCK])
def test_every_file_on_the_page_checks_clean(block: str, tmp_path: Path) -> None:
    (tmp_path / "mode.toml").write_text(block, encoding="utf-8")
    assert resolve([tmp_path / "mode.toml"], environ={}).problems == []


@pytest.mark.parametrize(
    "snippet", sorted((ROOT / "tests" / "seed_page").glob("*.toml")), ids=lambda path: path.stem
)
def test_the_snippets_of_the_seed_page_are_on_it_as_printed(snippet: Path) -> None:
    text = snippet.read_text(encoding="utf-8")
    without_heading = "".join(
        line for line in text.splitlines(keepends=True) if not line.startswith("#")
    )
    assert without_heading in BLOCKS


def test_each_mode_has_a_picture() -> None:
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:-1]
    assert [section.count("```mermaid") for section in sections] == [1] * 6
