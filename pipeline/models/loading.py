"""Loads causal language models, and says why one cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.pickled import refuse_pickle
from onstream.pipeline.models.tokenizer import cached_first, has_vision

ADAPTER_CONFIG = "adapter_config.json"
DeviceSetting = Literal["auto", "cpu", "cuda"]
DtypeSetting = Literal["auto", "float32", "bfloat16"]


def resolve_device(setting: DeviceSetting) -> torch.device:
    """The device that `deployment.device` means here; `auto` is CUDA where a GPU is found.

    Raises:
        UserError: `cuda` is asked for where torch finds none.
    """
    found = torch.cuda.is_available()
    if setting == "cuda" and not found:
        raise UserError(
            'deployment.device = "cuda", but torch finds no CUDA device',
            expected="a visible GPU and a CUDA build of torch",
            next_step='Set deployment.device = "cpu", or look at nvidia-smi and '
            "CUDA_VISIBLE_DEVICES.",
        )
    return torch.device("cuda" if found and setting != "cpu" else "cpu")


def resolve_dtype(setting: DtypeSetting, device: torch.device) -> torch.dtype:
    """The precision that a `dtype` setting means on `device`.

    `auto` is float32 on a CPU and bfloat16 on CUDA.
    """
    if setting == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if setting == "bfloat16" else torch.float32


def limit_gpu_memory(share: float) -> None:
    """Keep this process within `share` of its GPU's memory."""
    torch.cuda.set_per_process_memory_fraction(share)


def load_model(name: str | Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal language model in evaluation mode, with or without a vision tower.

    Raises:
        UserError: there is no such model, it is no causal language model, its files lack weights,
            or its weights are in pickle.
    """

    def load(name: str, **where: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        config = AutoConfig.from_pretrained(base_of(name) or name, **where)
        family = AutoModelForImageTextToText if has_vision(config) else AutoModelForCausalLM

        def load_with(attention: str) -> tuple[PreTrainedModel, dict[str, Any]]:
            loaded: tuple[PreTrainedModel, dict[str, Any]] = family.from_pretrained(
                name,
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                use_safetensors=True,  # weights in pickle could run code while they are read
                **where,
            )
            return loaded

        if getattr(config.get_text_config(), "attn_logit_softcapping", None):
            return load_with("eager")  # Gemma 2: sdpa would leave the cap out without a word
        try:
            return load_with("sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            return load_with("eager")  # gpt-oss: its attention has sinks, which sdpa cannot have

    refuse_pickle(name)
    model, info = cached_first(name, "model", load)
    missing = sorted(info["missing_keys"])
    if missing:  # transformers leaves such weights random, with no more than a warning
        raise UserError(
            f"the files of model {name} lack {len(missing)} of its weights, {missing[0]} first",
            expected="every weight that config.json asks for",
            next_step="Check that config.json is of these weights, and that no file is missing.",
        )
    return model.to(device).eval()


def base_of(model: str | Path) -> str | None:
    """The name of the base model if `model` is a directory that holds an adapter, else None."""
    config = Path(model) / ADAPTER_CONFIG
    if not config.is_file():
        return None
    name: str = msgspec.json.decode(config.read_bytes())["base_model_name_or_path"]
    return name


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The configuration of the language model: a part of the whole's where it reads images."""
    config: PretrainedConfig = model.config.get_text_config()
    return config


def set_text_attention(model: PreTrainedModel, name: str) -> None:
    """Sets the language model's attention; a vision tower keeps its own."""
    model.set_attn_implementation({"text_config": name} if has_vision(model.config) else name)
