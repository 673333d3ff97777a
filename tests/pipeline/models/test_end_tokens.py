"""Where a model's turns end: by its files, by its chat template, and by `model.end_tokens`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.end_tokens import (
    add_stops,
    end_token_ids,
    ends_of_template,
    stop_ids,
)
from onstream.pipeline.models.loading import load_model
from onstream.pipeline.models.tokenizer import (
    load_configs,
    load_student_tokenizer,
    load_tokenizer,
)
from onstream.settings.sections.run import ModelSettings
from onstream.workers.tiny_models.character_tokenizer import CHAT_TEMPLATE, character_tokenizer
from tests.base_student import make_base
from tests.chat_templates import FAMILIES
from tests.workers.generator import templates
from tests.workers.generator.conftest import student, student_dir

__all__ = ["student", "student_dir"]  # fixtures

PAD, END = 0, 3
RECIPE = {"end_tokens": ["<|im_end|>"]}


def test_a_special_token_or_a_plain_one_ends_turns_by_its_text() -> None:
    tokenizer = character_tokenizer()
    newline = tokenizer("\n").input_ids
    assert end_token_ids(tokenizer, ["<|im_end|>", "\n"]) == [END, *newline]


@pytest.mark.parametrize("text", ["<|eot_id|>", "two", "é"])
def test_a_text_that_is_no_token_cannot_end_turns(text: str) -> None:
    with pytest.raises(UserError, match=f"model.end_tokens has '{text[:1]}") as refusal:
        end_token_ids(character_tokenizer(), [text])
    assert "one token each" in refusal.value.expected


@pytest.mark.parametrize(
    ("template", "ends"),
    [(CHAT_TEMPLATE, [END]), (templates.PLAIN, [END]), (templates.ENDLESS, []), ("{{ x.y }}", [])],
)
def test_the_template_says_what_follows_an_answer(template: str, ends: list[int]) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    assert ends_of_template(tokenizer, {}) == ends


@pytest.mark.parametrize("name", FAMILIES)
def test_real_templates_end_an_answer_with_an_end_of_their_family(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.load()
    ends = tokenizer.convert_ids_to_tokens(ends_of_template(tokenizer, family.arguments))
    assert set(ends) & set(family.ends)
    assert ends[0] in (*family.ends, "<|end|>")


@pytest.mark.parametrize("template", ["directory", "file"])
def test_a_base_student_has_the_template_and_the_end_that_are_set_and_its_own_end_too(
    student_dir: Path, tmp_path: Path, template: str
) -> None:
    named = student_dir
    if template == "file":
        named = tmp_path / "chat.jinja"
        named.write_text(CHAT_TEMPLATE)
    base = make_base(student_dir, tmp_path / "base")
    model = ModelSettings.model_validate({**RECIPE, "chat_template": str(named)})
    tokenizer = load_student_tokenizer(base, model)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.eos_token_id == END
    assert stop_ids(tokenizer, *load_configs(base), model.end_tokens) == {PAD, END}
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert (saved.eos_token_id, saved.chat_template) == (END, CHAT_TEMPLATE)


def test_a_base_student_without_a_template_is_told_what_to_set(
    student_dir: Path, tmp_path: Path
) -> None:
    base = make_base(student_dir, tmp_path / "base")
    with pytest.raises(UserError, match=r"has no chat template") as refusal:
        load_student_tokenizer(base, ModelSettings())
    assert "set model.chat_template to the teacher's model id" in refusal.value.next_step
    with pytest.raises(UserError, match=r"model\.chat_template = .*no chat template itself"):
        load_student_tokenizer(base, ModelSettings(chat_template=str(base)))


def test_files_of_a_model_name_the_added_ends_first_and_its_own_after(
    student_dir: Path, tmp_path: Path
) -> None:
    base = make_base(student_dir, tmp_path / "base")
    model = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    add_stops(model, [END])
    model.save_pretrained(tmp_path / "saved")
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == [END, PAD]
    add_stops(model, [PAD])
    assert model.generation_config.eos_token_id == [END, PAD], "it is named already"
