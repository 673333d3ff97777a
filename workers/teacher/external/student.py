"""The student as an external teacher is compared with it: its tokenizer, and the longest sample it may write."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.errors import UserError
from pipeline.images import image_urls
from pipeline.tasks import load_task
from pipeline.telemetry import get_logger
from settings.root import Settings
from workers.teacher.compatibility import Party
from workers.teacher.party import party
from workers.teacher.scorer import ScoreRequest

PROMPTS = 64
"""Prompts of the task that are measured."""
PROBE_TOKENS = 96
TEXT = "The 7 quick brown foxes (lazy dogs: none!) jumped over x_1 = [3.14, -2]; naïve café, 東京, ≤ 100 %\n\tdef f(a): return a**2\n"

log = get_logger()


@dataclass(frozen=True)
class Judged:
    """The student, `probe` to be scored at start, and the tokens of the longest sample that the teacher may be sent."""

    party: Party
    probe: ScoreRequest
    longest_sample: int


def judged_student(settings: Settings) -> Judged:
    """The student of `settings`, from its tokenizer and configuration alone.

    Raises:
        UserError: it has no usable tokenizer.
    """
    student = party(settings.model.name)
    longest = min(student.context_tokens, _longest_prompt(settings, student) + settings.inference.sampling.max_completion)
    return Judged(student, probe_request(student, longest), longest)


def probe_request(student: Party, longest: int) -> ScoreRequest:
    """What each endpoint scores at start: a question by the chat template and a text of many kinds of characters."""
    asked = prompt_ids(student, [{"role": "user", "content": "1 + 1 = ?"}])
    ids = np.array([*asked, *student.tokenizer.encode(TEXT, add_special_tokens=False)], dtype=np.int32)
    ids = ids[: max(2, min(PROBE_TOKENS, longest))]
    return ScoreRequest(ids[:1], ids[1:])


def prompt_ids(student: Party, messages: list[dict[str, str]]) -> list[int]:
    """`messages` by the student's chat template, up to where the answer begins."""
    ids = student.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return [int(token) for token in ids]


def _longest_prompt(settings: Settings, student: Party) -> int:
    """The tokens of the longest of the task's first prompts; 1 where the task's data is not on this machine."""
    try:
        task = load_task(settings)
    except UserError as error:
        log.warning("the task cannot be loaded here, so its prompts are not measured against the teacher's context", reason=str(error))
        return 1
    first = [task.train(index).messages for index in range(PROMPTS)]
    if any(image_urls(messages) for messages in first):
        raise UserError(
            "the task's prompts hold images, and an external teacher is sent token ids alone: it would judge them blind",
            expected="prompts without images, or a teacher that sees them",
            next_step="Score with a local teacher, teacher_inference.model.name, or distill hard from a chat endpoint (docs/images.md).",
        )
    return max(len(prompt_ids(student, messages)) for messages in first)
