"""What the check of an external teacher needs of the student.

That is its tokenizer, requests to be scored at the start, and the longest sample it may write.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import ImageError, Message, grey_image, image_urls
from onstream.pipeline.images.vllm_prompts import VllmPrompts
from onstream.pipeline.models.chat_template import refused_teacher_prompt
from onstream.pipeline.models.tokenizer import has_vision, load_configs
from onstream.pipeline.prompts import Prompt, PromptBuilder, prompt_builder, render_prompt
from onstream.pipeline.tasks import Problem, load_task
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.workers.teacher.compatibility import ModelInfo, load_student
from onstream.workers.teacher.scorer import ScoreRequest

PROMPTS = 64
"""Prompts of the task that are measured."""
CHECK_TOKENS = 96
IMAGE_ANSWER_TOKENS = 8
"""Tokens that are scored after an image."""
IMAGE_SIZE = (64, 48)
"""Width and height of that image, in pixels."""
TEXT = (
    "The 7 quick brown foxes (lazy dogs: none!) jumped over x_1 = [3.14, -2]; "
    "naïve café, 東京, ≤ 100 %\n\tdef f(a): return a**2\n"
)

log = get_logger()


@dataclass(frozen=True)
class StudentInfo:
    """The student, as an external teacher is checked against it.

    Each endpoint scores `check_request` at the start, and `image_request` too, a prompt with an
    image, where the task's prompts hold images. `longest_sample` is in tokens.
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
    student = load_student(settings)
    problems = _first_problems(settings)
    builder = None
    if any(image_urls(problem.messages) for problem in problems):
        builder = _prompt_builder(settings)
    longest_completion = settings.inference.sampling.max_completion
    longest_sample = max(
        (_tokens(problem, student, builder, longest_completion) for problem in problems),
        default=min(student.context_tokens, 1 + longest_completion),
    )
    check_request = make_check_request(student, longest_sample)
    image_request = None
    if builder is not None:
        image_request = _make_image_request(settings, student, builder, check_request)
    return StudentInfo(student, check_request, longest_sample, image_request)


def make_check_request(student: ModelInfo, longest_sample: int) -> ScoreRequest:
    """What each endpoint scores at the start.

    It is a question by the chat template, then a text with many kinds of characters.
    """
    question = prompt_ids(student, [{"role": "user", "content": "1 + 1 = ?"}])
    text = student.tokenizer.encode(TEXT, add_special_tokens=False)
    length = max(2, min(CHECK_TOKENS, longest_sample))
    ids = np.array([*question, *text], dtype=np.int32)[:length]
    return ScoreRequest(ids[:1], ids[1:])


def prompt_ids(student: ModelInfo, messages: list[Message]) -> list[int]:
    """`messages` by the student's chat template, up to where the answer begins."""
    ids = student.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **student.template_arguments
    )
    return [int(token) for token in ids]


def _first_problems(settings: Settings) -> list[Problem]:
    """The task's first problems; none where the task's data is not on this machine."""
    try:
        task = load_task(settings)
    except UserError as error:
        log.warning(
            "the task cannot be loaded here, so its prompts are not compared with the context "
            "of the teacher",
            reason=str(error),
        )
        return []
    return [task.train(index) for index in range(PROMPTS)]


def _tokens(
    problem: Problem, student: ModelInfo, builder: PromptBuilder | None, longest_completion: int
) -> int:
    """What the teacher reads of the longest sample of `problem`, in tokens.

    Raises:
        UserError: the chat template refuses what the teacher is to read.
    """
    asked = _prompt_tokens(problem.messages, student, builder)
    completion = min(longest_completion, student.context_tokens - asked)
    if problem.teacher_messages is None:
        return asked + completion
    try:
        return len(prompt_ids(student, problem.teacher_messages)) + completion
    except TemplateError as error:
        raise refused_teacher_prompt(student.name, str(error)) from error


def _prompt_tokens(
    messages: list[Message], student: ModelInfo, builder: PromptBuilder | None
) -> int:
    """The tokens of a prompt; 1 where its images cannot be used, since no teacher will get it."""
    if builder is None:
        return len(prompt_ids(student, messages))
    try:
        return len(_build(messages, student, builder).ids)
    except ImageError:
        return 1


def _build(messages: list[Message], student: ModelInfo, builder: PromptBuilder) -> Prompt:
    rendered = render_prompt(student.tokenizer, messages, student.template_arguments)
    return builder.build(rendered, messages, builder.images_of(messages))


def _prompt_builder(settings: Settings) -> PromptBuilder:
    config, _ = load_configs(settings.model.name)
    if not has_vision(config):
        raise UserError(
            f"the task's prompts hold images, and {settings.model.name} reads none",
            expected="a vision-language student, or prompts without images",
            next_step="Choose another model.name or task (docs/images.md).",
        )
    return prompt_builder(settings.model.name, config, settings)


def _make_image_request(
    settings: Settings, student: ModelInfo, builder: PromptBuilder, check_request: ScoreRequest
) -> ScoreRequest:
    """A prompt that is an image, and a few tokens after it."""
    image = grey_image(*IMAGE_SIZE)
    part = {"type": "image_url", "image_url": {"url": image.data_url}}
    prompt = _build([{"role": "user", "content": [part]}], student, builder)
    answer = check_request.completion_ids[-IMAGE_ANSWER_TOKENS:]
    config, _ = load_configs(settings.model.name)
    fields = VllmPrompts(config).fields(prompt.ids, prompt.images, answer.tolist())
    return ScoreRequest(prompt.ids, answer, (image.digest,), fields)
