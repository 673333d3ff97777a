"""The student: how its prompts are built, and with an engine, how its completions are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onstream.pipeline.images import Message, PromptImage, grey_image
from onstream.pipeline.models.end_tokens import require_template_end, stop_ids
from onstream.pipeline.models.loading import limit_gpu_memory
from onstream.pipeline.models.tokenizer import (
    has_vision,
    load_configs,
    load_student_tokenizer,
    warn_of_unread_arguments,
)
from onstream.pipeline.prompts import Prompt, PromptBuilder, prompt_builder, render_prompt
from onstream.pipeline.records import Ids
from onstream.pipeline.telemetry import get_logger
from onstream.settings.engines import student_engine
from onstream.settings.gpus import memory_share
from onstream.settings.root import Settings
from onstream.settings.sections.inference import EngineName
from onstream.workers.generator.engines import engine_module
from onstream.workers.generator.engines.base import Engine, GenerationRequest, UnsupportedModel

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

TEST_IMAGE = 64, 48
"""Width and height, in pixels, of the image that an engine is tested with."""

log = get_logger()


@dataclass(frozen=True)
class StudentModel:
    """What is known of a student without its weights. Every engine is opened with one."""

    name: str | Path
    settings: Settings
    tokenizer: Any
    config: PretrainedConfig
    generation_config: GenerationConfig
    prompts: PromptBuilder

    @property
    def reads_images(self) -> bool:
        """Whether it is a vision-language model."""
        return has_vision(self.config)

    @property
    def max_context(self) -> int | None:
        """The most tokens that the model takes; None where its configuration names no bound."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    @property
    def template_arguments(self) -> Mapping[str, Any]:
        """The variables that its chat template is rendered with."""
        return self.settings.model.chat_template_kwargs

    @cached_property
    def stop_ids(self) -> set[int]:
        """Every token that ends a turn.

        One that marks an image does: there is no image to go on with. Being the last, it is scored
        and trained on as any other, and no model reads it.
        """
        ends = stop_ids(
            self.tokenizer,
            self.config,
            self.generation_config,
            self.settings.model.end_tokens,
        )
        return ends | set(self.prompts.image_marks(grey_image(*TEST_IMAGE)))

    def prompt(self, messages: list[Message]) -> Prompt:
        """The conversation through the chat template, up to where the answer begins.

        Raises:
            ImageError: one of its images cannot be used.
        """
        images = self.prompts.images_of(messages)
        rendered = render_prompt(self.tokenizer, messages, self.template_arguments)
        return self.prompts.build(rendered, messages, images)

    def teacher_prompt_ids(self, messages: list[Message]) -> Ids:
        """What the teacher reads before the completion, rendered as the student's prompts are."""
        return render_prompt(self.tokenizer, messages, self.template_arguments)

    def require_template_end(self) -> None:
        """Check that it stops where its chat template ends an answer.

        Raises:
            UserError: it does not.
        """
        name = str(self.name)
        require_template_end(name, self.tokenizer, self.template_arguments, self.stop_ids)

    def test_request(self) -> GenerationRequest | None:
        """A request with an image, to test an engine with; None for a student that reads none."""
        if not self.reads_images:
            return None
        part = {"type": "image_url", "image_url": {"url": grey_image(*TEST_IMAGE).data_url}}
        prompt = self.prompt([{"role": "user", "content": [part]}])
        return GenerationRequest(0, prompt.ids, max_tokens=1, seed=0, images=prompt.images)


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
        """A completion as text, without special tokens and the token that ended it."""
        ids = token_ids.tolist()
        if ids and ids[-1] in self.model.stop_ids:
            ids.pop()
        text: str = self.model.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _of_images(images: Sequence[PromptImage]) -> str:
    """How many tokens of a prompt are of its images, for a message."""
    tokens = sum(len(image.features.token_ids) for image in images)
    return f", {tokens} of them of its {len(images)} images" if images else ""


def require_possible(request: GenerationRequest, max_context: int | None) -> None:
    """Check that there is something to write, and that it fits.

    Raises:
        ValueError: an empty prompt, no token to write, or more tokens than `max_context`.
    """
    prompt_tokens = len(request.prompt_ids)
    total = prompt_tokens + request.max_tokens
    if not prompt_tokens or request.max_tokens < 1:
        raise ValueError(
            f"request {request.key} has {prompt_tokens} prompt tokens "
            f"and asks for {request.max_tokens}"
        )
    if max_context is not None and total > max_context:
        raise ValueError(
            f"request {request.key} may come to {total} tokens; the model takes {max_context}"
        )


def open_student(settings: Settings) -> Student:
    """The student with the engine that `inference.engine` means here.

    Raises:
        UserError: there is no such model, it has no usable tokenizer, or the engine cannot serve
            it.
    """
    model = load_student_model(settings.model.name, settings)
    name = student_engine(settings)
    try:
        return Student(model, _open_engine(name, model))
    except UnsupportedModel as error:
        if settings.inference.engine != "auto":
            raise
        log.warning("the student is served by transformers", reason=error.got)
    share = memory_share(settings, "generator")
    if share is not None:
        limit_gpu_memory(share)
    return Student(model, _open_engine("transformers", model))


def load_student(name: str | Path, settings: Settings) -> Student:
    """The model `name` with the engine `transformers`.

    Raises:
        UserError: there is no such model, it has no usable tokenizer, or the engine cannot serve
            it.
    """
    model = load_student_model(name, settings)
    return Student(model, _open_engine("transformers", model))


def _open_engine(name: EngineName, model: StudentModel) -> Engine:
    """The engine `name`, ready to write with the weights that `model` starts with.

    Raises:
        UserError: something that the engine needs is not installed, or it cannot serve the model.
    """
    engine: Engine = engine_module(name).open_engine(model)
    return engine


def load_student_model(name: str | Path, settings: Settings) -> StudentModel:
    """The student `name`, a model id or directory.

    Raises:
        UserError: there is no such model, or it has no usable tokenizer or image processor.
    """
    tokenizer = load_student_tokenizer(name, settings.model)
    arguments = settings.model.chat_template_kwargs
    warn_of_unread_arguments("model.chat_template_kwargs", tokenizer, arguments)
    config, generation_config = load_configs(name)
    prompts = prompt_builder(name, config, settings)
    return StudentModel(name, settings, tokenizer, config, generation_config, prompts)
