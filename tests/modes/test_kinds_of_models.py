"""Students that are not full attention in every layer learn from teachers of their own kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.models.pairs import KINDS, learns

pytestmark = pytest.mark.slow

# For matrices this small a second thread only waits; on a busy machine for seconds.
torch.set_num_threads(1)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            family, marks=pytest.mark.rotates("students of several kinds", place, len(KINDS))
        )
        for place, family in enumerate(KINDS)
    ],
)
def test_a_student_learns_from_a_teacher_of_its_kind(family: str, tmp_path: Path) -> None:
    run = learns(tmp_path, family)
    assert "decoded through its own cache" in (run.directory / "logs/generator-0.log").read_text()
