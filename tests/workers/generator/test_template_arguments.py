"""Variables of the chat template reach every prompt, and the text of a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.record_codec import ids_array
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.tasks import load_task
from onstream.settings.root import Settings
from onstream.workers.generator.chat_stage import ChatGenerator
from onstream.workers.generator.student import load_student, load_student_model
from onstream.workers.tiny_models.character_tokenizer import character_tokenizer
from tests.faulty_server import Answer, Body, serving
from tests.workers.generator import templates
from tests.workers.generator.test_chat_stage import delivery, finish, one_rollout, settings_of

OFF = {"enable_thinking": False}
OPENED = "<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"
TOKENIZER = character_tokenizer()


@pytest.fixture
def thinking_dir(student_dir: Path) -> Path:
    """A student whose template thinks unless told not to."""
    (student_dir / "chat_template.jinja").write_text(templates.SWITCHED)
    return student_dir


def with_arguments(settings: Settings, arguments: dict[str, Any]) -> Settings:
    model = settings.model.model_copy(update={"chat_template_kwargs": arguments})
    return settings.model_copy(update={"model": model})


@pytest.mark.parametrize(
    ("arguments", "reasoning", "prompt_end", "completion"),
    [
        ({}, "hm", OPENED, "<think>\nhm\n</think>\n\nok<|im_end|>"),
        (OFF, None, OPENED + EMPTY, "ok<|im_end|>"),
    ],
    ids=["on", "off"],
)
def test_thinking_is_on_or_off_in_the_prompt_and_in_what_a_teachers_text_becomes(
    thinking_dir: Path,
    tmp_path: Path,
    bus: Bus,
    arguments: dict[str, Any],
    reasoning: str | None,
    prompt_end: str,
    completion: str,
) -> None:
    message = {"role": "assistant", "content": "ok", "reasoning_content": reasoning}

    def answer(body: Body) -> Answer:
        return Answer(body={"choices": [{"finish_reason": "stop", "message": message}]})

    with serving(answer) as (server, url):
        settings = with_arguments(settings_of(thinking_dir, tmp_path, url), arguments)
        rollout = one_rollout(settings, bus)
    (sample,) = rollout.samples
    prompt = ids_array(sample.prompt_ids).tolist()
    assert TOKENIZER.decode(prompt).endswith("<|im_end|>\n" + prompt_end)
    assert TOKENIZER.decode(ids_array(sample.completion_ids).tolist()) == completion
    asked = load_student_model(thinking_dir, settings).prompt(rollout.messages)
    assert asked.ids.tolist() == prompt, "as the student is asked for its own completions"
    assert server.bodies[0].get("chat_template_kwargs", {}) == arguments


@pytest.mark.parametrize(
    ("own", "sent"), [(None, OFF), ({"reasoning_effort": "low"}, {"reasoning_effort": "low"})]
)
def test_an_endpoint_is_sent_its_own_variables_or_the_students(
    student_dir: Path, tmp_path: Path, bus: Bus, own: dict[str, Any] | None, sent: dict[str, Any]
) -> None:
    body = asked_with(student_dir, tmp_path, bus, own)
    assert body["chat_template_kwargs"] == sent


def test_an_endpoint_that_refuses_the_field_can_be_sent_none(
    student_dir: Path, tmp_path: Path, bus: Bus
) -> None:
    assert "chat_template_kwargs" not in asked_with(student_dir, tmp_path, bus, {})


def asked_with(
    student_dir: Path, tmp_path: Path, bus: Bus, own: dict[str, Any] | None
) -> dict[str, Any]:
    """What the endpoint is asked with by a student that does not think."""
    message = {"role": "assistant", "content": "ok"}
    with serving(lambda body: Answer(body={"choices": [{"message": message}]})) as (server, url):
        teacher = {"name": "teacher", "chat_template_kwargs": own}
        settings = settings_of(student_dir, tmp_path, url, model=teacher)
        stage = ChatGenerator(with_arguments(settings, OFF), bus)
        stage.setup()
        finish(stage, [delivery(1)])
        stage.close(finished=True)
    body: dict[str, Any] = server.bodies[0]
    return body


def test_an_evaluation_asks_with_the_same_prompts(thinking_dir: Path) -> None:
    settings = with_arguments(Settings(), OFF)
    messages = load_task(settings).held_out(0).messages
    student = load_student(thinking_dir, settings)
    assert TOKENIZER.decode(student.prompt(messages).ids.tolist()).endswith(OPENED + EMPTY)
    student.engine.close()


def test_a_variable_that_the_template_does_not_read_is_warned_of(
    thinking_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_and_not = {"enable_thinking": False, "reasoning_effort": "low"}
    load_student_model(thinking_dir, with_arguments(Settings(), read_and_not))
    said = capsys.readouterr().out
    assert "model.chat_template_kwargs: the chat template of" in said
    assert "reads no reasoning_effort" in said and "enable_thinking" not in said
