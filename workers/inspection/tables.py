"""Tables as the commands print them."""

from __future__ import annotations

from typing import Any

from rich.table import Column, Table
from rich.text import Text


def plain_table(*names: str) -> Table:
    """An empty table without lines, with a column for each of `names`."""
    # Folded: a name that rich cuts in a narrow terminal cannot be copied. The headings stay whole.
    columns = [Column(name, overflow="fold", min_width=len(name)) for name in names]
    return Table(*columns, box=None, pad_edge=False)


def add_row(table: Table, *cells: Any) -> None:
    """Add a row of `cells` as they are."""
    # As Text: rich reads square brackets as markup, and details and reasons may have some.
    table.add_row(*(Text(str(cell)) for cell in cells))
