"""The student with an engine: conversations in, completions out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onstream.pipeline.images import Message, PromptImage
from onstream.pipeline.models.loading import limit_gpu_memory
from onstream.pipeline.prompts import Prompt
from onstream.pipeline.records import Ids
from onstream.pipeline.telemetry import get_logger
from onstream.settings.engines import student_engine
from onstream.settings.gpus import memory_share
from onstream.settings.root import Settings
from onstream.workers.generator.engines import open_engine
from onstream.workers.generator.engines.base import Engine, UnsupportedModel
from onstream.workers.generator.student_model import StudentModel, load_student_model

log = get_logger()


class PromptTooLong(ValueError):
    """A prompt leaves no room for a completion."""


@dataclass(frozen=True)
class Student:
    """A model, and the engine that writes with it."""

    model: StudentModel
    engine: Engine

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The conversation through the chat template, up to where the answer begins.

        Raises:
            ImageError: one of its images cannot be used.
        """
        return self.model.prompt(list(messages))

    def completion_room(self, prompt: Prompt, wanted: int) -> int:
        """How many tokens a completion of `prompt` may have: `wanted`, or what the context leaves.

        No prompt is ever cut.

        Raises:
            PromptTooLong: the context leaves none.
        """
        context = self.engine.max_context
        room = wanted if context is None else min(wanted, context - len(prompt.ids))
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt.ids)} tokens{_of_images(prompt.images)}; "
                f"the student's context is {context}, completion included. "
                "Shorten the task's prompts, or choose a `model.name` with a longer context."
            )
        return room

    def text(self, token_ids: Ids) -> str:
        """A completion as text, without special tokens."""
        text: str = self.model.tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)
        return text


def _of_images(images: Sequence[PromptImage]) -> str:
    """How many tokens of a prompt are of its images, for a message."""
    tokens = sum(len(image.features.token_ids) for image in images)
    return f", {tokens} of them of its {len(images)} images" if images else ""


def open_student(settings: Settings) -> Student:
    """The student with the engine that `inference.engine` means here.

    Raises:
        UserError: there is no such model, it has no usable tokenizer, or the engine cannot serve
            it.
    """
    model = load_student_model(settings.model.name, settings)
    name = student_engine(settings)
    try:
        return Student(model, open_engine(name, model))
    except UnsupportedModel as error:
        if settings.inference.engine != "auto":
            raise
        log.warning("the student is served by transformers", reason=error.got)
    share = memory_share(settings, "generator")
    if share is not None:
        limit_gpu_memory(share)
    return Student(model, open_engine("transformers", model))


def load_student(name: str | Path, settings: Settings) -> Student:
    """The model `name` with the engine `transformers`.

    Raises:
        UserError: there is no such model, it has no usable tokenizer, or the engine cannot serve
            it.
    """
    model = load_student_model(name, settings)
    return Student(model, open_engine("transformers", model))
