"""What is trained of answers in the real templates of the families that people distil.

`tests/chat_templates/expected/` has it, written out and read through: a chat's name, then a line
for each sample, from the question on. `▸` ends the prompt, dots stand between the tokens of what
follows, and brackets around those with mask 0. A refused chat has its reason.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from onstream.pipeline.prompts import render_prompt
from onstream.pipeline.record_codec import ids_array
from onstream.pipeline.redis.bus import Bus
from onstream.workers.generator.reconstruction import (
    ReconstructedSample,
    ReconstructionError,
    Reconstructor,
)
from onstream.workers.generator.student import load_student_model
from tests.chat_templates import EXPECTED, FAMILIES, expected_of
from tests.chat_templates.chats import CHATS, QUESTION
from tests.chat_templates.table import PAGE, page
from tests.faulty_server import Answer, serving
from tests.workers.generator.test_chat_stage import one_rollout, settings_of
from tests.workers.generator.test_template_arguments import with_arguments

QWEN3_IDS = [151667, 271, 151668, 271, 26972, 13, 151645]
MISTRAL_IDS = [3, 7493, 1395, 1032, 1050, 1043, 1050, 1063, 4, 31035, 1046, 2]
GPT_OSS_IDS = [200005, 17196, 200008, 35604, 13, 200002]


@cache
def reconstructor(name: str) -> Reconstructor:
    family = FAMILIES[name]
    tokenizer = family.load()
    stop_ids = set(tokenizer.convert_tokens_to_ids(list(family.ends)))
    return Reconstructor(tokenizer, stop_ids, family.arguments)


@cache
def expected(name: str) -> dict[str, list[str]]:
    return expected_of(name)


def shown(name: str, sample: ReconstructedSample) -> str:
    tokenizer = reconstructor(name)._tokenizer
    prompt = tokenizer.decode(sample.prompt_ids.tolist())
    text = prompt[prompt.index(QUESTION) :] + "▸"
    before = None
    for token, trained in zip(
        sample.completion_ids.tolist(), sample.loss_mask.tolist(), strict=True
    ):
        if before is not None:
            text += "·" if before == trained else "[" if before else "]"
        text += tokenizer.decode([token])
        before = trained
    return text.replace("\n", "⏎")


def results(name: str, chat_name: str) -> list[str]:
    chat = CHATS[chat_name]
    try:
        samples = reconstructor(name).samples(chat.prompt, chat.written, truncated=chat.truncated)
    except ReconstructionError as error:
        return [f"refused: {error}"]
    return [shown(name, sample) for sample in samples]


@pytest.mark.parametrize("chat_name", CHATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_of_a_chat(name: str, chat_name: str) -> None:
    assert results(name, chat_name) == expected(name)[chat_name]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_has_the_tokens_that_the_student_gets(name: str) -> None:
    family = FAMILIES[name]
    for chat in CHATS.values():
        asked = render_prompt(reconstructor(name)._tokenizer, chat.prompt, family.arguments)
        try:
            first, *_ = reconstructor(name).samples(
                chat.prompt, chat.written, truncated=chat.truncated
            )
        except ReconstructionError:
            continue
        assert np.array_equal(first.prompt_ids, asked)
        shown_to_student = reconstructor(name)._tokenizer.decode(asked.tolist())
        assert all(message["content"] in shown_to_student for message in chat.prompt)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_in_one_turn_or_several_are_trained_in_every_family(name: str) -> None:
    plain = list(CHATS)[:6]
    assert plain[-1] == "a turn before"
    assert not any(expected(name)[chat][0].startswith("refused") for chat in plain)


@pytest.mark.parametrize("name", ["Qwen3.5", "Qwen3.5, not thinking", "DeepSeek-R1-Distill"])
def test_a_run_trains_on_what_a_teacher_reasoned_behind_its_students_own_prompt(
    name: str, student_dir: Path, tmp_path: Path, bus: Bus
) -> None:
    FAMILIES[name].load().save_pretrained(student_dir)
    message = {"role": "assistant", "content": "Four.", "reasoning_content": "2+2=4"}
    answer = Answer(body={"choices": [{"finish_reason": "stop", "message": message}]})
    with serving(lambda body: answer) as (_, url):
        arguments = dict(FAMILIES[name].arguments)
        settings = with_arguments(settings_of(student_dir, tmp_path, url), arguments)
        rollout = one_rollout(settings, bus)
    (sample,) = rollout.samples
    student = load_student_model(student_dir, settings)
    assert ids_array(sample.prompt_ids).tolist() == student.prompt(rollout.messages).ids.tolist()
    written = student.tokenizer.decode(ids_array(sample.completion_ids).tolist())
    expected_line = expected(name)["reasoning"][0].partition("▸")[2]
    assert written.replace("\n", "⏎") == expected_line.replace("·", "")


def test_every_family_and_chat_has_an_expectation_and_no_other() -> None:
    assert {path.stem for path in EXPECTED.iterdir()} == set(FAMILIES)
    assert all(list(expected(name)) == list(CHATS) for name in FAMILIES)


def test_trimmed_tokenizers_give_the_ids_of_the_whole_ones() -> None:
    def ids(name: str, text: str) -> list[int]:
        found: list[int] = FAMILIES[name].load()(text).input_ids
        return found

    assert ids("Qwen3", "<think>\n\n</think>\n\nFour.<|im_end|>") == QWEN3_IDS
    assert ids("gpt-oss", "<|channel|>final<|message|>Four.<|return|>") == GPT_OSS_IDS
    assert ids("Mistral v7", "[INST]What is 2+2?[/INST]Four.</s>") == MISTRAL_IDS
    assert ids("SmolLM2", QUESTION) == [1780, 314, 216, 34, 27, 34, 47]


def test_the_page_says_what_the_expectations_say() -> None:
    assert PAGE.read_text() == page(), "write it by `python -m tests.chat_templates.table`"
