from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tokenizers import AddedToken

from onstream.pipeline.errors import UserError
from onstream.workers.teacher.compatibility import ModelInfo, check_compatible, first_difference
from onstream.workers.tiny_models.character_tokenizer import character_tokenizer
from tests.chat_templates import FAMILIES


def model_of(name: str, **changes: Any) -> ModelInfo:
    return dataclasses.replace(
        ModelInfo(
            name, character_tokenizer(), frozenset({3}), context_tokens=512, vocabulary_size=128
        ),
        **changes,
    )


def test_a_teacher_of_the_same_family_is_accepted() -> None:
    check_compatible(model_of("student"), model_of("teacher"), max_completion=511)


def test_a_teacher_with_another_vocabulary_is_refused_naming_both_and_the_first_difference() -> (
    None
):
    other = character_tokenizer()
    other.add_tokens([AddedToken("extra")])
    with pytest.raises(UserError) as refusal:
        check_compatible(
            model_of("our-student"),
            model_of("their-teacher", tokenizer=other),
            max_completion=16,
        )
    text = str(refusal.value)
    assert "'their-teacher' (129 entries)" in text and "'our-student', 128 entries" in text
    assert "id 128 is nothing to the student and 'extra' to the teacher" in text


def test_the_first_difference_is_that_of_the_lowest_id() -> None:
    assert first_difference({"a": 0, "b": 1}, {"a": 0, "b": 1}) is None
    assert (
        first_difference({"a": 0, "b": 1, "c": 2}, {"a": 0, "c": 1, "b": 2})
        == "id 1 is 'b' to the student and 'c' to the teacher"
    )


def test_a_teacher_with_another_chat_template_is_refused_showing_both() -> None:
    other = character_tokenizer()
    other.chat_template = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    with pytest.raises(
        UserError,
        match=r"writes a conversation as '\[1 \+ 1\].*the student 'student' as '<\|im_start\|>",
    ):
        check_compatible(
            model_of("student"),
            model_of("teacher", tokenizer=other),
            max_completion=16,
        )


SWITCHED = (
    "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    "{{ '<|assistant|>' if enable_thinking else '<|assistant|>no thoughts' }}"
)


def switched(name: str, arguments: dict[str, Any]) -> ModelInfo:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = SWITCHED
    return model_of(name, tokenizer=tokenizer, template_arguments=arguments)


def test_chat_templates_are_compared_with_the_variables_of_each() -> None:
    off = {"enable_thinking": False}
    check_compatible(switched("student", off), switched("teacher", {}), max_completion=16)
    with pytest.raises(UserError, match="writes a conversation as") as refusal:
        check_compatible(
            switched("student", off),
            switched("teacher", {"enable_thinking": True}),
            max_completion=16,
        )
    assert "chat_template_kwargs" in refusal.value.next_step


def test_a_teacher_that_ends_its_turns_otherwise_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"ends its turn with token 3, the teacher 'teacher' with \[0, 1\]"
    ):
        check_compatible(
            model_of("student"),
            model_of("teacher", end_ids=frozenset({0, 1})),
            max_completion=16,
        )


def base_of(*end_tokens: str) -> ModelInfo:
    """A base student that ends what it writes with `<|endoftext|>`, and with `end_tokens`."""
    tokenizer = character_tokenizer()
    tokenizer.eos_token = end_tokens[0] if end_tokens else "<|endoftext|>"
    ends = {0, *tokenizer.convert_tokens_to_ids(list(end_tokens))}
    return model_of("base", tokenizer=tokenizer, end_ids=frozenset(ends))


@pytest.mark.parametrize("teacher_ends", [{3}, {0, 3}], ids=["its own", "the student's too"])
def test_a_base_student_under_an_instruct_teacher_is_told_the_setting_that_mends_it(
    teacher_ends: set[int],
) -> None:
    teacher = model_of("teacher", end_ids=frozenset(teacher_ends))
    with pytest.raises(UserError) as refusal:
        check_compatible(base_of(), teacher, max_completion=16)
    assert 'Set model.end_tokens = ["<|im_end|>"]' in refusal.value.next_step
    check_compatible(base_of("<|im_end|>"), teacher, max_completion=16)


@pytest.mark.parametrize("name", ["Qwen3", "Llama 3.1", "Gemma 3", "Mistral v7", "SmolLM2"])
def test_a_base_student_is_told_the_end_of_the_real_family_of_its_teacher(name: str) -> None:
    family = FAMILIES[name]
    own = "<|endoftext|>"

    def model(role: str, *ends: str) -> ModelInfo:
        tokenizer = family.load()
        tokenizer.eos_token = ends[0]
        ids = frozenset(tokenizer.convert_tokens_to_ids(list(ends)))
        return model_of(role, tokenizer=tokenizer, end_ids=ids)

    end = family.ends[0]
    for teacher in (model("teacher", end), model("teacher", end, own)):
        with pytest.raises(UserError) as refusal:
            check_compatible(model("base", own), teacher, max_completion=16)
        assert f'Set model.end_tokens = ["{end}"]' in refusal.value.next_step
        check_compatible(model("base", end, own), teacher, max_completion=16)


def test_a_teacher_that_is_the_base_student_itself_ends_as_it_does() -> None:
    check_compatible(base_of(), base_of(), max_completion=16)


def test_a_context_as_long_as_the_students_holds_whatever_the_student_writes() -> None:
    check_compatible(model_of("student"), model_of("teacher"), max_completion=512)


def test_a_teacher_whose_context_cannot_hold_a_whole_completion_is_refused() -> None:
    with pytest.raises(UserError, match="the context of the teacher 'teacher' is 64 tokens"):
        check_compatible(
            model_of("student"),
            model_of("teacher", context_tokens=64),
            max_completion=64,
        )
