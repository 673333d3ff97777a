"""docs/memory.md is what the formula says now."""

from __future__ import annotations

from tests.memory_table import HEAD, TARGET, factors, planned


def test_the_page_of_the_trainers_memory_is_that_of_the_formula_of_now() -> None:
    page = TARGET.read_text()
    parts = (HEAD, factors(), planned())
    assert all(part in page for part in parts), "run `make memory-table`"
