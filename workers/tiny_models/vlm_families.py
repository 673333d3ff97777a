"""Tiny vision-language models with random weights, of the families that tests and example train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    GenerationConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
)
from transformers.utils import logging as transformers_logging

from onstream.workers.tiny_models.character_tokenizer import (
    CONTEXT_TOKENS,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    VIDEO,
    VOCABULARY_SIZE,
    character_tokenizer,
)
from onstream.workers.tiny_models.fresh import ModelShape

VlmFamily = Literal["qwen2.5-vl", "qwen3-vl", "llava", "qwen3.5", "gemma3"]

PATCH = 8
"""Side of a patch in pixels. Four patches make a token in the Qwen families, one in LLaVA's."""
NOTHING_MORE: Mapping[str, Any] = {}
SIDE = 32
"""Side of the pictures in pixels."""
SIDE_TOKENS = SIDE // PATCH
GEMMA_TOKENS = {"boi_token": IMAGE_START, "image_token": IMAGE, "eoi_token": IMAGE_END}
GEMMA_WINDOW = 16
"""Tokens; a picture and the text around it are longer."""


def write_fresh_vlm(directory: Path, family: VlmFamily, shape: ModelShape, seed: int) -> Path:
    """Write a float32 model of `family` with its processor and tokenizer; returns `directory`.

    The weights are drawn by `seed`. The vision tower is as wide as the language model, and two
    layers deep.
    """
    transformers_logging.disable_progress_bar()
    tokenizer = character_tokenizer(images=True)
    config, processor = _MAKERS[family](shape, tokenizer)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    for weight in model.parameters():
        if weight.ndim > 1 and not weight.any():  # Gemma's projector: no image would matter
            torch.nn.init.normal_(weight, std=config.get_text_config().initializer_range)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def _text(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": CONTEXT_TOKENS,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _encoder(shape: ModelShape) -> dict[str, Any]:
    """A vision tower as CLIP and SigLIP configurations describe it."""
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    names = {
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": IMAGE_START,
        "vision_end_token_id": IMAGE_END,
    }
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def _qwen2_5(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> tuple[PretrainedConfig, Any]:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    tower = {"window_size": 4 * PATCH, "fullatt_block_indexes": [0, 1]}
    config = _qwen(Qwen2_5_VLConfig, tower, shape, tokenizer, interleaved=False)
    return config, _qwen_processor(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, tokenizer)


def _qwen3(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> tuple[PretrainedConfig, Any]:
    from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

    tower = {"num_position_embeddings": (SIDE // PATCH) ** 2, "deepstack_visual_indexes": [0]}
    config = _qwen(Qwen3VLConfig, tower, shape, tokenizer, interleaved=True)
    return config, _qwen_processor(Qwen3VLProcessor, Qwen3VLVideoProcessor, tokenizer)


def _qwen3_5(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> tuple[PretrainedConfig, Any]:
    """Layers of linear attention and of full attention, in turn."""
    from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

    config = _qwen(
        Qwen3_5Config,
        {"num_position_embeddings": (SIDE // PATCH) ** 2},
        shape,
        tokenizer,
        interleaved=True,
        text={
            "layer_types": (["linear_attention", "full_attention"] * shape.layers)[: shape.layers],
            "linear_num_key_heads": shape.key_value_heads,
            "linear_num_value_heads": shape.heads,
            "linear_key_head_dim": shape.head_dim,
            "linear_value_head_dim": shape.head_dim,
        },
    )
    return config, _qwen_processor(Qwen3VLProcessor, Qwen3VLVideoProcessor, tokenizer)


def _qwen(
    config: type[PretrainedConfig],
    tower: dict[str, Any],
    shape: ModelShape,
    tokenizer: PreTrainedTokenizerFast,
    *,
    interleaved: bool,
    text: Mapping[str, Any] = NOTHING_MORE,
) -> PretrainedConfig:
    """A Qwen model whose rotary frequencies are divided among time, height and width.

    They are divided `interleaved`, or in sections. vLLM reads which from the configuration;
    transformers has it in each family's code. `tower` holds what this family's vision tower adds,
    `text` what its language model does.
    """
    hidden = shape.hidden
    frequencies = shape.head_dim // 2
    in_space = frequencies * 3 // 8
    sections = [frequencies - 2 * in_space, in_space, in_space]
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections}
    if interleaved:
        rope["mrope_interleaved"] = True
    width = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "out_hidden_size": hidden}
    vision = {"depth": 2, "num_heads": 2, "patch_size": PATCH, **width}
    language = _text(shape, tokenizer) | {"rope_parameters": rope, **text}
    return config(
        text_config=language,
        vision_config=vision | tower,
        tie_word_embeddings=True,
        **_ids(tokenizer),
    )


def _qwen_processor(
    processor: type[Any], video_processor: type[Any], tokenizer: PreTrainedTokenizerFast
) -> Any:
    from transformers import Qwen2VLImageProcessor

    sizes = {"patch_size": PATCH, "merge_size": 2}
    images = Qwen2VLImageProcessor(
        size={"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 64 * PATCH**2}, **sizes
    )
    return processor(
        images, tokenizer, video_processor(**sizes), chat_template=tokenizer.chat_template
    )


def _llava(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> tuple[PretrainedConfig, Any]:
    from transformers import CLIPImageProcessor, LlavaProcessor

    config = LlavaConfig(
        text_config={"model_type": "qwen3", **_text(shape, tokenizer)},
        vision_config={"model_type": "clip_vision_model", **_encoder(shape)},
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
    )
    return config, processor


def _gemma3(shape: ModelShape, tokenizer: PreTrainedTokenizerFast) -> tuple[PretrainedConfig, Any]:
    """Layers with a window and full ones, in turn; the tokens of an image see one another.

    Its template shows an image by one token, which its processor replaces by all the others.
    """
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    tokens = SIDE_TOKENS**2
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in GEMMA_TOKENS.items()}
    config = Gemma3Config(
        text_config=_text(shape, tokenizer)
        | {
            "layer_types": (["sliding_attention", "full_attention"] * shape.layers)[: shape.layers],
            "sliding_window": GEMMA_WINDOW,
            "query_pre_attn_scalar": shape.head_dim,
        },
        vision_config=_encoder(shape),
        mm_tokens_per_image=tokens,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
        tie_word_embeddings=True,
    )
    named = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        model_max_length=CONTEXT_TOKENS,
        padding_side="left",
        extra_special_tokens=GEMMA_TOKENS,
    )
    named.chat_template = tokenizer.chat_template.replace(
        f"{IMAGE_START}{IMAGE}{IMAGE_END}", IMAGE_START
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE}),
        named,
        chat_template=named.chat_template,
        image_seq_length=tokens,
    )
    return config, processor


_MAKERS: dict[
    VlmFamily, Callable[[ModelShape, PreTrainedTokenizerFast], tuple[PretrainedConfig, Any]]
] = {
    "qwen2.5-vl": _qwen2_5,
    "qwen3-vl": _qwen3,
    "llava": _llava,
    "qwen3.5": _qwen3_5,
    "gemma3": _gemma3,
}
