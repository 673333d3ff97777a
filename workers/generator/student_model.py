"""The student without its weights: name, tokenizer, configuration, and how prompts are built."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onstream.pipeline.images import Message, grey_image
from onstream.pipeline.models.tokenizer import has_vision, load_configs, load_tokenizer
from onstream.pipeline.prompts import Prompt, PromptBuilder, prompt_builder, render_prompt
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import GenerationRequest

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

TEST_IMAGE = 64, 48
"""Width and height, in pixels, of the image that an engine is tested with."""


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

    @cached_property
    def stop_ids(self) -> set[int]:
        """Every token that ends a turn."""
        return stop_ids(self.tokenizer, self.config, self.generation_config)

    def prompt(self, messages: list[Message]) -> Prompt:
        """The conversation through the chat template, up to where the answer begins.

        Raises:
            ImageError: one of its images cannot be used.
        """
        images = self.prompts.images_of(messages)
        return self.prompts.build(render_prompt(self.tokenizer, messages), messages, images)

    def test_request(self) -> GenerationRequest | None:
        """A request with an image, to test an engine with; None for a student that reads none."""
        if not self.reads_images:
            return None
        part = {"type": "image_url", "image_url": {"url": grey_image(*TEST_IMAGE).data_url}}
        prompt = self.prompt([{"role": "user", "content": [part]}])
        return GenerationRequest(0, prompt.ids, max_tokens=1, seed=0, images=prompt.images)


def load_student_model(name: str | Path, settings: Settings) -> StudentModel:
    """The student `name`, a model id or directory.

    Raises:
        UserError: there is no such model, or it has no usable tokenizer or image processor.
    """
    tokenizer = load_tokenizer(name)
    config, generation_config = load_configs(name)
    prompts = prompt_builder(name, config, settings)
    return StudentModel(name, settings, tokenizer, config, generation_config, prompts)


def stop_ids(tokenizer: Any, config: Any, generation_config: Any) -> set[int]:
    """Every token that ends a turn, by the tokenizer or either configuration.

    A placeholder of images ends a turn too: there is no image to continue with. As the last token
    it is predicted, and never read.
    """
    named = [
        tokenizer.eos_token_id,
        config.get_text_config().eos_token_id,
        getattr(generation_config, "eos_token_id", None),
        getattr(config, "image_token_id", None),
        getattr(config, "video_token_id", None),
    ]
    stops = set[int]()
    for value in named:
        tokens = value if isinstance(value, list) else [value]  # a configuration may name several
        stops |= {int(token) for token in tokens if token is not None}
    return stops
