"""The directory that `onstream init` writes. The run that it makes is in `tests/runs`."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.pipeline.errors import UserError
from onstream.workers.tiny_models.starter import write_starter


def test_init_writes_over_nothing(tmp_path: Path) -> None:
    (tmp_path / "scorer.py").write_text("mine\n")
    with pytest.raises(UserError, match=r"scorer\.py exists"):
        write_starter(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scorer.py"]
    assert (tmp_path / "scorer.py").read_text() == "mine\n"
