"""Loads tokenizers and causal language models, and says plainly why one cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from huggingface_hub import constants as hub_constants
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from pipeline.errors import UserError

DeviceSetting = Literal["auto", "cpu", "cuda"]
DtypeSetting = Literal["auto", "float32", "bfloat16"]
Loaded = TypeVar("Loaded")

_REASON_CHARACTERS = 300  # transformers' own errors run over a page


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
            next_step='Set deployment.device = "cpu", or check nvidia-smi and CUDA_VISIBLE_DEVICES.',
        )
    return torch.device("cuda" if found and setting != "cpu" else "cpu")


def resolve_dtype(setting: DtypeSetting, device: torch.device) -> torch.dtype:
    """The precision that a `dtype` setting means on `device`; `auto` is float32 on a CPU and bfloat16 on CUDA."""
    if setting == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if setting == "bfloat16" else torch.float32


def limit_gpu_memory(share: float) -> None:
    """Keep this process within `share` of its GPU's memory."""
    torch.cuda.set_per_process_memory_fraction(share)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model id or directory, with a chat template and an end-of-sequence token.

    Raises:
        UserError: there is none, or it lacks either.
    """
    tokenizer: PreTrainedTokenizerBase = _cached_first(name, "tokenizer", AutoTokenizer.from_pretrained)
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {name} has no chat template",
            expected="a chat_template in tokenizer_config.json, or chat_template.jinja beside it",
            next_step="Use the instruction-tuned variant of the model, or add a chat_template.jinja to its directory.",
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no end-of-sequence token",
            expected="eos_token in tokenizer_config.json",
            next_step="Name the token that ends a turn as eos_token; without it no completion can stop.",
        )
    return tokenizer


def load_model(name: str | Path, *, dtype: torch.dtype, device: torch.device, attention: str | None = None) -> PreTrainedModel:
    """A causal language model in evaluation mode, every weight of it read from the files.

    `attention` names an attention implementation of transformers, or one registered with it; sdpa by default.

    Raises:
        UserError: there is no such model, it is no causal language model, or its files lack weights.
    """

    def load(name: str, **where: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        loaded: tuple[PreTrainedModel, dict[str, Any]] = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=attention or "sdpa", output_loading_info=True, **where
        )
        return loaded

    model, info = _cached_first(name, "model", load)
    if missing := sorted(info["missing_keys"]):  # transformers would leave them random, with a warning
        raise UserError(
            f"the files of model {name} lack {len(missing)} of its weights, {missing[0]} first",
            expected="every weight that config.json asks for",
            next_step="Check that config.json belongs to these weights, and that the download is whole.",
        )
    return model.to(device).eval()


def _cached_first(name: str | Path, what: str, load: Callable[..., Loaded]) -> Loaded:
    """`load` from a directory or the local cache, and only then from the hub, so that what is here needs no network."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    name = str(name)
    if Path(name).is_dir() or hub_constants.HF_HUB_OFFLINE:
        attempts: list[dict[str, bool]] = [{"local_files_only": True}]
    elif name.startswith((".", "/", "~")):
        raise _not_usable(name, what, FileNotFoundError("no such directory"))
    else:
        attempts = [{"local_files_only": True}, {}]
    for where in attempts:
        try:
            return load(name, **where)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason: Exception = error
    raise _not_usable(name, what, reason) from reason


def _not_usable(name: str, what: str, reason: Exception) -> UserError:
    words = " ".join(str(reason).split())[:_REASON_CHARACTERS]
    return UserError(
        f"cannot load a {what} from {name}: {words}",
        expected="a directory in Hugging Face form, or the id of a public model",
        next_step="Check the spelling and the directory; a gated or private model needs `hf auth login` first.",
    )


def load_configs(name: str | Path) -> tuple[PretrainedConfig, GenerationConfig]:
    """A model's configuration and generation configuration, without its weights; the latter is empty where the model has none.

    Raises:
        UserError: there is no such model.
    """
    config: PretrainedConfig = _cached_first(name, "configuration", AutoConfig.from_pretrained)
    try:
        generation: GenerationConfig = _cached_first(name, "generation configuration", GenerationConfig.from_pretrained)
    except UserError:
        generation = GenerationConfig()
    return config, generation
