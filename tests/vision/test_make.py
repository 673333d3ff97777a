"""Models that see are made of every family: what they learn is rendered by its own template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from onstream.workers.tiny_models.make import make
from onstream.workers.tiny_models.recipes import PICTURES
from onstream.workers.tiny_models.vlm_families import VlmFamily


def test_a_student_that_sees_is_made_of_any_family(
    any_family: tuple[VlmFamily, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, _ = any_family
    quick = replace(PICTURES["student"], most=1.0, round_steps=2, batch_size=4, eval_samples=8)
    monkeypatch.setitem(PICTURES, "student", quick)
    [made] = make("colour-words", tmp_path, only="student", family=family)
    assert made.steps == 2
