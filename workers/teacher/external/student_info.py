"""The student as an external teacher is compared with it: its tokenizer, and the longest sample it
may write.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import ImageError, Message, grey_image, image_urls
from onstream.pipeline.images.vllm_prompts import VllmPrompts
from onstream.pipeline.models.tokenizer import has_vision, load_configs
from onstream.pipeline.prompts import PromptBuilder, prompt_builder, render_prompt
from onstream.pipeline.tasks import load_task
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.workers.teacher.compatibility import ModelInfo
from onstream.workers.teacher.model_info import load_model_info
from onstream.workers.teacher.scorer import ScoreRequest

PROMPTS = 64
"""Prompts of the task that are measured."""
PROBE_TOKENS = 96
WORD = 8
"""Tokens that are scored after a picture."""
TRIED = 64, 48
"""Width and height, in pixels, of that picture."""
TEXT = "The 7 quick brown foxes (lazy dogs: none!) jumped over x_1 = [3.14, -2]; naïve café, 東京, ≤ 100 %\n\tdef f(a): return a**2\n"

log = get_logger()


@dataclass(frozen=True)
class StudentInfo:
    """The student, `probe` to be scored at start, and the tokens of the longest sample that the
    teacher may be sent.

    `shown` is to be scored as well: a prompt with a picture, where the task's prompts show any.
    """

    model: ModelInfo
    check_request: ScoreRequest
    longest_sample: int
    image_request: ScoreRequest | None = None


def load_student_info(settings: Settings) -> StudentInfo:
    """The student of `settings`, from its tokenizer and configuration alone.

    Raises:
        UserError: it has no usable tokenizer, or the task's prompts hold images and it reads none.
    """
    student = load_model_info(settings.model.name)
    prompts = _first_prompts(settings)
    shows = any(image_urls(messages) for messages in prompts)
    builder = _prompt_builder(settings) if shows else None
    longest = max((_tokens(messages, student, builder) for messages in prompts), default=1)
    longest = min(student.context_tokens, longest + settings.inference.sampling.max_completion)
    probe = make_check_request(student, longest)
    return StudentInfo(
        student,
        probe,
        longest,
        _shown(settings, student, builder, probe) if builder is not None else None,
    )


def make_check_request(student: ModelInfo, longest: int) -> ScoreRequest:
    """What each endpoint scores at start: a question by the chat template and a text of many kinds
    of characters.
    """
    asked = prompt_ids(student, [{"role": "user", "content": "1 + 1 = ?"}])
    ids = np.array(
        [*asked, *student.tokenizer.encode(TEXT, add_special_tokens=False)], dtype=np.int32
    )
    ids = ids[: max(2, min(PROBE_TOKENS, longest))]
    return ScoreRequest(ids[:1], ids[1:])


def prompt_ids(student: ModelInfo, messages: list[Message]) -> list[int]:
    """`messages` by the student's chat template, up to where the answer begins."""
    ids = student.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return [int(token) for token in ids]


def _first_prompts(settings: Settings) -> list[list[Message]]:
    """The task's first prompts; none where the task's data is not on this machine."""
    try:
        task = load_task(settings)
    except UserError as error:
        log.warning(
            "the task cannot be loaded here, so its prompts are not measured against the teacher's context",
            reason=str(error),
        )
        return []
    return [list(task.train(index).messages) for index in range(PROMPTS)]


def _tokens(messages: list[Message], student: ModelInfo, builder: PromptBuilder | None) -> int:
    """The tokens of a prompt; 1 of one whose images cannot be used, which no teacher will see."""
    if builder is None:
        return len(prompt_ids(student, messages))
    try:
        return len(
            builder.build(
                render_prompt(student.tokenizer, messages), messages, builder.images_of(messages)
            ).ids
        )
    except ImageError:
        return 1


def _prompt_builder(settings: Settings) -> PromptBuilder:
    config, _ = load_configs(settings.model.name)
    if not has_vision(config):
        raise UserError(
            f"the task's prompts hold images, and {settings.model.name} reads none",
            expected="a vision-language student, or prompts without images",
            next_step="Choose another model.name or task (docs/images.md).",
        )
    return prompt_builder(settings.model.name, config, settings)


def _shown(
    settings: Settings, student: ModelInfo, builder: PromptBuilder, probe: ScoreRequest
) -> ScoreRequest:
    """A prompt that is a picture, and a word after it."""
    picture = grey_image(*TRIED)
    messages: list[Message] = [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture.data_url}}]}
    ]
    prompt = builder.build(
        render_prompt(student.tokenizer, messages), messages, builder.images_of(messages)
    )
    word = probe.completion_ids[-WORD:]
    sent = VllmPrompts(load_configs(settings.model.name)[0]).fields(
        prompt.ids, prompt.images, word.tolist()
    )
    return ScoreRequest(prompt.ids, word, (picture.digest,), sent)
