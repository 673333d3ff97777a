"""The student as generation needs it: its tokenizer, its engine, and a conversation as the ids of a
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import Message, PromptImage, grey_image
from onstream.pipeline.models.loading import (
    limit_gpu_memory,
    load_model,
    resolve_device,
    resolve_dtype,
)
from onstream.pipeline.models.tokenizer import has_vision, load_configs, load_tokenizer
from onstream.pipeline.models.weight_shapes import shapes_of
from onstream.pipeline.prompts import Prompt, PromptBuilder, prompt_builder, render_prompt
from onstream.pipeline.records import Ids
from onstream.pipeline.telemetry import get_logger
from onstream.settings.engines import student_engine
from onstream.settings.gpus import memory_share
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import Engine, GenerationRequest
from onstream.workers.generator.engines.server.engine import ServerEngine
from onstream.workers.generator.engines.transformers.engine import TransformersEngine
from onstream.workers.generator.engines.vllm.startup import (
    UnsupportedByVllm,
    configure,
    did_not_start,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TRIED = 64, 48
"""Width and height, in pixels, of the picture that vLLM is tried with."""

log = get_logger()


class PromptTooLong(ValueError):
    """A prompt that leaves no room for a completion."""


@dataclass(frozen=True)
class Student:
    """An engine, and the tokenizer and the eyes that go with it."""

    tokenizer: Any
    engine: Engine
    prompts: PromptBuilder

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """The conversation through the chat template, up to where the answer begins.

        Raises:
            ImageError: an image of it cannot be used.
        """
        images = self.prompts.images_of(messages)
        return self.prompts.build(render_prompt(self.tokenizer, messages), messages, images)

    def completion_room(self, prompt: Prompt, wanted: int) -> int:
        """How many tokens a completion of `prompt` may have: `wanted`, or what the context leaves.
        No prompt is ever cut.

        Raises:
            PromptTooLong: it leaves none.
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
        text: str = self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)
        return text


def _of_images(images: Sequence[PromptImage]) -> str:
    """What to add where a message names the tokens of a prompt: how many of them are of its images."""
    tokens = sum(len(image.features.token_ids) for image in images)
    return f", {tokens} of them of its {len(images)} images" if images else ""


def open_student(settings: Settings) -> Student:
    """The student with the engine that `inference.engine` means here.

    Raises:
        UserError: there is no such model, it has no usable tokenizer, or the engine cannot serve
            it.
    """
    if student_engine(settings) == "vllm":
        try:
            return _on_vllm(settings)
        except UnsupportedByVllm as error:
            if settings.inference.engine == "vllm":
                raise
            log.warning("the student is served by transformers", reason=error.got)
            if (share := memory_share(settings, "generator")) is not None:
                limit_gpu_memory(share)
    if student_engine(settings) == "server":
        return _on_servers(settings)
    return load_student(settings.model.name, settings)


def load_student(name: str | Path, settings: Settings) -> Student:
    """The model `name` with the engine `transformers`, on the device and at the precision of
    `settings`.

    Raises:
        UserError: there is no such model, it has no usable tokenizer, or the engine cannot serve
            it.
    """
    tokenizer = load_tokenizer(name)
    device = resolve_device(settings.deployment.device)
    model = load_model(name, dtype=resolve_dtype(settings.inference.dtype, device), device=device)
    engine = TransformersEngine(
        model,
        stop_ids(tokenizer, model),
        slots=settings.inference.max_batch,
        on_new_weights=settings.inference.on_new_weights,
    )
    return Student(tokenizer, engine, prompt_builder(name, model.config, settings))


def _on_vllm(settings: Settings) -> Student:
    tokenizer = load_tokenizer(settings.model.name)
    config, generation = load_configs(settings.model.name)
    configured = configure(settings, images=has_vision(config))
    from onstream.workers.generator.engines.vllm.engine import VllmEngine

    stops = stop_ids(tokenizer, SimpleNamespace(config=config, generation_config=generation))
    shapes = shapes_of(config)
    prompts = prompt_builder(settings.model.name, config, settings)
    tried = _tried(prompts, tokenizer, config)
    try:
        engine = VllmEngine(
            configured, stops, shapes, on_new_weights=settings.inference.on_new_weights, tried=tried
        )
    except UserError:
        raise
    except Exception as error:
        raise did_not_start(error, settings) from error
    return Student(tokenizer, engine, prompts)


def _on_servers(settings: Settings) -> Student:
    tokenizer = load_tokenizer(settings.model.name)
    config, generation = load_configs(settings.model.name)
    stops = stop_ids(tokenizer, SimpleNamespace(config=config, generation_config=generation))
    prompts = prompt_builder(settings.model.name, config, settings)
    tried = _tried(prompts, tokenizer, config)
    return Student(
        tokenizer, ServerEngine(settings, tokenizer, stops, config, tried=tried), prompts
    )


def _tried(
    prompts: PromptBuilder, tokenizer: Any, config: PretrainedConfig
) -> GenerationRequest | None:
    """A request with a picture, that vLLM is tried with at the start; None for a student that reads
    none.
    """
    if not has_vision(config):
        return None
    shown = {"type": "image_url", "image_url": {"url": grey_image(*TRIED).data_url}}
    messages: list[Message] = [{"role": "user", "content": [shown]}]
    prompt = prompts.build(
        render_prompt(tokenizer, messages), messages, prompts.images_of(messages)
    )
    return GenerationRequest(0, prompt.ids, max_tokens=1, seed=0, images=prompt.images)


def stop_ids(tokenizer: Any, model: Any) -> set[int]:
    """Every token that ends a turn, by the tokenizer, the configuration or the generation
    configuration, which may name several.

    A placeholder of images ends one too: there is no image to continue with, and as a last token it
    is only ever predicted.
    """
    config = model.config
    named = [
        tokenizer.eos_token_id,
        config.get_text_config().eos_token_id,
        getattr(model.generation_config, "eos_token_id", None),
    ]
    named += [getattr(config, "image_token_id", None), getattr(config, "video_token_id", None)]
    listed = [one if isinstance(one, list) else [one] for one in named]
    return {int(token) for tokens in listed for token in tokens if token is not None}
