"""A student that is given an end of turn stops there, and its answer is without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.record_codec import ids_array
from onstream.pipeline.records import Rollout
from onstream.pipeline.redis.bus import Bus
from onstream.settings.root import Settings
from onstream.settings.sections.run import ModelSettings
from onstream.workers.generator.chat_stage import ChatGenerator
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.student import load_student
from tests.base_student import make_base
from tests.faulty_server import Answer, serving
from tests.workers.generator.test_chat_stage import delivery, finish, settings_of

OWN_END, IM_END = 0, 3


def settings(student_dir: Path, end: str) -> Settings:
    model = {"chat_template": str(student_dir), "end_tokens": [end]}
    return Settings.model_validate({"model": model, "deployment": {"device": "cpu"}})


def completions(directory: Path, given: Settings) -> tuple[list[Completion], list[str]]:
    """What the engine `transformers` samples, and its texts."""
    student = load_student(directory, given)
    prompt = student.prompt([{"role": "user", "content": "hi"}])
    student.engine.add(
        [GenerationRequest(key, prompt.ids, max_tokens=40, seed=key) for key in range(24)]
    )
    written: list[Completion] = []
    while student.engine.active:
        written += student.engine.step()
    student.engine.close()
    return written, [student.text(one.token_ids) for one in written]


@pytest.mark.parametrize("end", ["<|im_end|>", "a"], ids=["special", "plain"])
def test_completions_stop_at_the_end_that_is_set_and_at_the_students_own(
    student_dir: Path, tmp_path: Path, end: str
) -> None:
    base = make_base(student_dir, tmp_path / "base")
    given = settings(student_dir, end)
    student = load_student(base, given)
    token = student.model.tokenizer.convert_tokens_to_ids(end)
    student.engine.close()
    written, texts = completions(base, given)
    stopped = {int(one.token_ids[-1]) for one in written if one.finish_reason == "stop"}
    assert stopped == {OWN_END, token}
    for one, text in zip(written, texts, strict=True):
        ids = one.token_ids
        assert not np.isin(ids[:-1], [OWN_END, token]).any(), "nothing follows an end"
        assert (one.finish_reason == "stop") == (ids[-1] in stopped)
        assert not text.endswith(end) or one.finish_reason == "length"


def test_a_base_student_that_a_teachers_text_would_end_otherwise_is_refused(
    student_dir: Path, tmp_path: Path, bus: Bus
) -> None:
    base = make_base(student_dir, tmp_path / "base")
    model = {"name": str(base), "chat_template": str(student_dir)}
    with serving(lambda body: Answer(body={"choices": []})) as (_, url):
        hard = settings_of(base, tmp_path, url)
        given = hard.model_copy(update={"model": ModelSettings.model_validate(model)})
        with pytest.raises(UserError, match=r"ends an answer with '<\|im_end\|>'") as refusal:
            ChatGenerator(given, bus).setup()
    assert refusal.value.next_step.startswith('Set model.end_tokens = ["<|im_end|>"]')


def test_a_teachers_text_is_trained_up_to_the_end_that_is_set(
    student_dir: Path, tmp_path: Path, bus: Bus
) -> None:
    base = make_base(student_dir, tmp_path / "base")
    message = {"role": "assistant", "content": "ok"}
    answer = Answer(body={"choices": [{"finish_reason": "stop", "message": message}]})
    with serving(lambda body: answer) as (_, url):
        hard = settings_of(base, tmp_path, url)
        recipe = settings(student_dir, "<|im_end|>").model
        model = recipe.model_copy(update={"name": str(base)})
        given = hard.model_copy(update={"model": model})
        stage = ChatGenerator(given, bus)
        stage.setup()
        rollout = finish(stage, [delivery(1)])[1].record
        stage.close(finished=True)
    assert isinstance(rollout, Rollout)
    assert ids_array(rollout.samples[0].completion_ids).tolist()[-1] == IM_END
    assert len(rollout.samples[0].loss_mask) == len("ok") + 1
