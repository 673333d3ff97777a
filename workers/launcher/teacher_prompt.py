"""Looks at what the teacher reads in place of the student's prompt, before the first worker starts.

Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onstream.pipeline.images import Message
from onstream.pipeline.models.chat_template import (
    TemplateRefusal,
    refused_teacher_prompt,
    rendered,
    too_long_teacher_prompt,
)
from onstream.pipeline.tasks import Problem
from onstream.settings.root import Settings
from onstream.workers.launcher.model_files import chat_templates, context_tokens, local_model

TOKENIZER = "tokenizer.json"


def check_prompts(settings: Settings, teacher: str, problems: list[Problem]) -> None:
    """Check that the student's chat template renders what `teacher` reads, and that it fits.

    As far as the models' files are on this machine; workers check the rest when they start.

    Raises:
        UserError: the template refuses it, or with a completion it exceeds the teacher's context.
    """
    asked = [_text(settings, problem.messages) for problem in problems]
    read = [_text(settings, problem.teacher_messages or problem.messages) for problem in problems]
    directory = local_model(settings.model.name, ask_hub=False)
    teacher_directory = local_model(teacher, ask_hub=False)
    if directory is None or teacher_directory is None or not (directory / TOKENIZER).is_file():
        return
    students = context_tokens(directory, "model.name")
    teachers = context_tokens(teacher_directory, "teacher_inference.model.name")
    if students is None or teachers is None:
        return
    most = settings.inference.sampling.max_completion
    counts = _tokens(directory / TOKENIZER, [*asked, *read])
    lengths = zip(counts[: len(asked)], counts[len(asked) :], strict=True)
    longest = max(own + min(most, students - prompt) for prompt, own in lengths)
    if longest > teachers:
        raise too_long_teacher_prompt(teacher, longest, teachers)


def _text(settings: Settings, messages: list[Message]) -> str:
    """`messages` by the student's chat template; nothing where that is not to be had here."""
    model = settings.model
    name = model.chat_template or model.name
    template = next(iter(chat_templates(name).values()), "")
    variables: dict[str, Any] = {"add_generation_prompt": True, "bos_token": "", "eos_token": ""}
    try:
        return rendered(template, messages, {**variables, **model.chat_template_kwargs}) or ""
    except TemplateRefusal as error:
        raise refused_teacher_prompt(name, str(error)) from error


def _tokens(tokenizer: Path, texts: Iterable[str]) -> list[int]:
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer)).encode
    return [len(encode(text, add_special_tokens=False).ids) for text in texts]
