"""Families in which the tokens of an image see one another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import ImageFile, PromptImage
from onstream.pipeline.models.forward import hidden_states
from onstream.pipeline.models.multimodal import ImageFeatures, token_kinds_argument
from onstream.pipeline.models.output_layer import head_of
from onstream.pipeline.models.packing import Ids, pack, share_prompts
from onstream.pipeline.models.prompt_sharing import prepare
from onstream.pipeline.weights import LoadedPolicy
from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.engines.transformers.engine import TransformersEngine
from tests.models.families import SIZES, spread, tiny_config

IMAGE = 90
IMAGE_TOKENS = 4
NAMES = ("one", "two")
TEXT = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size")} | {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 8,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def gemma3() -> PreTrainedModel:
    config = Gemma3Config(
        text_config=TEXT,
        vision_config=VISION,
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )
    torch.manual_seed(0)
    return spread(Gemma3ForConditionalGeneration(config))


def qwen3_5() -> PreTrainedModel:
    text = tiny_config("qwen3_5_text").to_dict() | {"head_dim": 16}
    text["rope_parameters"] |= {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
    config = Qwen3_5Config(
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
        },
        image_token_id=IMAGE,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    torch.manual_seed(0)
    return spread(Qwen3_5ForConditionalGeneration(config))


def patches(seed: int) -> ImageFeatures:
    """Four by four patches of two frames, as the processor of Qwen3.5 makes them of an image."""
    pixels = torch.rand(16, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(seed))
    tensors = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return ImageFeatures(np.full(IMAGE_TOKENS, IMAGE, dtype=np.int32), tensors)


def picture(seed: int) -> ImageFeatures:
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return ImageFeatures(np.full(IMAGE_TOKENS, IMAGE, dtype=np.int32), {"pixel_values": pixels})


def test_the_tokens_of_an_image_see_one_another_as_in_the_models_own_code() -> None:
    model = gemma3()
    features = {name: picture(seed) for seed, name in enumerate(NAMES)}
    prompts, completions, images = a_batch()
    expected = [
        plain(model, *one, features) for one in zip(prompts, completions, images, strict=True)
    ]
    assert "images see one another" in (prepare(model) or "")
    head = head_of(model)
    worst = 0.0
    with torch.no_grad():
        for packed in pack(share_prompts(prompts, completions, images), 1000):
            states = hidden_states(model, packed, features)
            logprobs = head.logits(states).log_softmax(-1)
            for at, found in zip(packed.sequences, logprobs.split(packed.lengths), strict=True):
                worst = max(worst, float((found - expected[at]).abs().max()))
    print(f"gemma3: largest difference {worst:.1e} nats")
    assert worst < 1e-4


def a_batch() -> tuple[list[Ids], list[Ids], list[tuple[str, ...]]]:
    """Groups over one image, over another, over none; completions of 2 and 21 tokens."""
    random = np.random.default_rng(1)
    shown = np.full(IMAGE_TOKENS, IMAGE)
    prompts, completions, images = [], [], []
    for name in ("one", "two", None):
        text = random.integers(3, 80, 12)
        prompt = np.concatenate((text[:3], shown, text[3:])) if name else text
        for tokens in (2, 21):
            prompts.append(prompt)
            completions.append(random.integers(3, 80, tokens))
            images.append((name,) if name else ())
    return prompts, completions, images


@torch.no_grad()
def plain(
    model: PreTrainedModel,
    prompt: Ids,
    completion: Ids,
    images: tuple[str, ...],
    features: dict[str, ImageFeatures],
) -> torch.Tensor:
    """Logprobs [C, V], by the model's own forward with what its processor would give it."""
    ids = torch.from_numpy(np.concatenate((prompt, completion)))[None]
    inputs: dict[str, Any] = {}
    if images:
        kinds = token_kinds_argument(model) or ""
        inputs = dict(features[images[0]].tensors) | {kinds: (ids == IMAGE).int()}
    logits = model(input_ids=ids, use_cache=False, **inputs).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize(
    ("make", "read", "words"),
    [
        (gemma3, picture, "the tokens of its images see one another"),
        (qwen3_5, patches, "it has layers of linear_attention"),
    ],
    ids=["gemma3", "qwen3.5"],
)
def test_what_the_generator_writes_about_images_is_what_the_models_own_code_says(
    make: Callable[[], PreTrainedModel], read: Callable[[int], ImageFeatures], words: str
) -> None:
    model = make()
    features = {name: read(seed) for seed, name in enumerate(NAMES)}
    engine = TransformersEngine(copy.deepcopy(model), (IMAGE, 91, 92, 93), slots=6)
    assert engine.own_cache_because == words
    prompts, _, images = a_batch()
    engine.add(
        [
            GenerationRequest(
                key,
                prompt.astype(np.int32),
                max_tokens=14,
                seed=key,
                images=tuple(
                    PromptImage(ImageFile(name.encode()), features[name]) for name in shown
                ),
            )
            for key, (prompt, shown) in enumerate(zip(prompts, images, strict=True))
        ]
    )
    written = [one for _ in range(5) for one in engine.step()]
    engine.load(LoadedPolicy.of(1, model.state_dict()))
    while engine.active:
        written += engine.step()
    assert len(written) == 6
    for one in written:
        read_back = np.append(one.token_ids[:-1], 3)  # the last may stand for an image, as an end
        logprobs = plain(model, prompts[one.key], read_back, images[one.key], features)
        expected = logprobs.gather(-1, torch.from_numpy(one.token_ids).long()[:, None])[:, 0]
        assert (expected - torch.from_numpy(one.logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize(("make", "read"), [(gemma3, picture), (qwen3_5, patches)])
def test_prompts_with_different_images_of_one_size_go_through_the_model_together(
    make: Callable[[], PreTrainedModel],
    read: Callable[[int], ImageFeatures],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make()
    engine = TransformersEngine(model, (), slots=8)
    shapes = []
    forward = model.forward

    def noting(**inputs: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", noting)
    prompts, _, images = a_batch()
    shown = {name: PromptImage(ImageFile(name.encode()), read(at)) for at, name in enumerate(NAMES)}
    engine.add(
        [
            GenerationRequest(
                key, prompt.astype(np.int32), 3, seed=key, images=tuple(shown[one] for one in names)
            )
            for key, (prompt, names) in enumerate(zip(prompts, images, strict=True))
        ]
    )
    while engine.active:
        engine.step()
    with_images, without = (2, 12 + IMAGE_TOKENS), (1, 12)
    assert shapes == [with_images, without, (6, 1), (6, 1)]


def test_a_model_whose_text_sees_what_follows_is_refused() -> None:
    text = {name: size for name, size in TEXT.items() if name != "sliding_window"}
    config = PaliGemmaConfig(
        text_config=text | {"model_type": "gemma", "layer_types": None},
        vision_config=VISION | {"model_type": "siglip_vision_model", "projection_dim": 32},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    torch.manual_seed(0)
    model = spread(PaliGemmaForConditionalGeneration(config))
    with pytest.raises(UserError, match="is not causal"):
        prepare(model)
