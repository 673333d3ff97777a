"""`onstream check` tells of a student that does not stop where its chat template ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.settings.load import load_settings
from onstream.workers.launcher.model_warnings import model_warnings
from onstream.workers.tiny_models.fresh import ModelShape, write_fresh
from tests.base_student import make_base
from tests.chat_templates import FAMILIES

SHAPE = ModelShape(hidden=32, layers=1, intermediate=32, heads=1, key_value_heads=1)


def warnings_of(model: Path, *settings: str) -> list[str]:
    given = load_settings([], [f"model.name={model}", "task.name=reverse-text", *settings])
    return [line for line in model_warnings(given) if "end_tokens" in line]


def test_a_base_student_is_told_which_end_its_teacher_would_teach_it(tmp_path: Path) -> None:
    instruct = write_fresh(tmp_path / "instruct", SHAPE, seed=0)
    base = make_base(instruct, tmp_path / "base")
    chat = f"model.chat_template={instruct}"
    assert warnings_of(base, chat) == [
        f"{base}: the chat template ends an answer with <|im_end|>, where the student does not "
        'stop; set model.end_tokens = ["<|im_end|>"]'
    ]
    assert warnings_of(base, chat, 'model.end_tokens=["<|im_end|>"]') == []
    assert warnings_of(instruct) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_is_warned_of_its_own_template(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    family.load().save_pretrained(tmp_path)
    arguments = [f"model.chat_template_kwargs.{key}={one}" for key, one in family.arguments.items()]
    assert warnings_of(tmp_path, *arguments) == []
