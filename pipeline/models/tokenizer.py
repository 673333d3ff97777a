"""Loads a model's tokenizer and configuration. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import constants as hub_constants
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.chat_template import NO_TEMPLATE, unread_arguments, unread_warning
from onstream.pipeline.models.end_tokens import end_token_ids
from onstream.pipeline.telemetry import get_logger
from onstream.settings.sections.run import ModelSettings

log = get_logger()
Loaded = TypeVar("Loaded")

ATTENTION_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
"""What configurations call layers that keep keys and values."""
_REASON_CHARACTERS = 300  # transformers' own errors run over a page


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model id or directory, with a chat template and an end-of-sequence token.

    Raises:
        UserError: there is none, or it lacks either.
    """
    tokenizer = _load(name)
    _require_chat(tokenizer, name)
    return tokenizer


def load_student_tokenizer(name: str | Path, model: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer of a student, with the chat template and the end of turn that `model` says.

    Raises:
        UserError: there is none, or it lacks either, or not all of `model.end_tokens` are tokens.
    """
    tokenizer = _load(name)
    if model.chat_template is not None:
        tokenizer.chat_template = _template_of(model.chat_template)
    if model.end_tokens:
        first = end_token_ids(tokenizer, model.end_tokens)[0]
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    _require_chat(tokenizer, name)
    return tokenizer


def _load(name: str | Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = cached_first(
        name, "tokenizer", AutoTokenizer.from_pretrained
    )
    return tokenizer


def _template_of(named: str) -> Any:
    """The chat template that `model.chat_template` names: in a file, or of a model."""
    path = Path(named).expanduser()
    template = path.read_text(encoding="utf-8") if path.is_file() else _load(named).chat_template
    if not template:
        raise UserError(
            f"model.chat_template = {named!r}, which has no chat template itself",
            expected="a Jinja file, or a model with a chat template",
            next_step="Name the instruction-tuned variant of the student, or the teacher.",
        )
    return template


def _require_chat(tokenizer: PreTrainedTokenizerBase, name: str | Path) -> None:
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {name} has no chat template",
            expected="a chat_template in tokenizer_config.json, or chat_template.jinja beside it",
            next_step=NO_TEMPLATE,
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no end-of-sequence token",
            expected="eos_token in tokenizer_config.json",
            next_step="Name the token that ends a turn as eos_token, or in model.end_tokens for a "
            "student: without it no completion can stop.",
        )


def warn_of_unread_arguments(setting: str, tokenizer: Any, arguments: Mapping[str, Any]) -> None:
    """Log which of the `arguments` of `setting` the tokenizer's chat template does not read."""
    unread = unread_arguments(tokenizer.chat_template, arguments)
    if unread:
        log.warning(unread_warning(setting, tokenizer.name_or_path, unread))


def load_configs(name: str | Path) -> tuple[PretrainedConfig, GenerationConfig]:
    """A model's configuration and its generation configuration.

    The latter is empty where the model has none.

    Raises:
        UserError: there is no such model.
    """
    config: PretrainedConfig = cached_first(name, "configuration", AutoConfig.from_pretrained)
    try:
        generation: GenerationConfig = cached_first(
            name, "generation configuration", GenerationConfig.from_pretrained
        )
    except UserError:
        generation = GenerationConfig()
    return config, generation


def cached_first(name: str | Path, what: str, load: Callable[..., Loaded]) -> Loaded:
    """`load` from a directory or the local cache, and only then from the hub.

    So what is on this machine needs no network. Code that comes with a model is never run.

    Raises:
        UserError: there is no such model, or the hub does not give it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    name = str(name)
    if Path(name).is_dir() or hub_constants.HF_HUB_OFFLINE:
        attempts = [{"local_files_only": True}]
    elif name.startswith((".", "/", "~")):
        raise _not_usable(name, what, FileNotFoundError("no such directory"))
    else:
        attempts = [{"local_files_only": True}, {}]
    for where in attempts:
        try:
            # Unset, transformers asks on standard input whether to run a model's own code.
            return load(name, trust_remote_code=False, **where)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason: Exception = error
    if "trust_remote_code" in str(reason):
        raise _has_own_code(name, what) from reason
    raise _not_usable(name, what, reason) from reason


def _has_own_code(name: str, what: str) -> UserError:
    return UserError(
        f"the {what} of {name} is made by Python code that comes with it, which is not run",
        expected="a model of a family that transformers has itself",
        next_step="Use such a model, or a variant of this one without `auto_map` in its JSON "
        "files; see docs/security.md.",
    )


def _not_usable(name: str, what: str, reason: Exception) -> UserError:
    words = " ".join(str(reason).split())[:_REASON_CHARACTERS]
    return UserError(
        f"cannot load a {what} from {name}: {words}",
        expected="a directory in Hugging Face form, or the id of a public model",
        next_step="Check the name or the directory; a gated or private model needs "
        "`hf auth login` first.",
    )


def has_states(config: PretrainedConfig) -> bool:
    """Whether some layers of a model of this configuration keep a state, not keys and values.

    Linear attention, state spaces and convolutions do.
    """
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    return not set(kinds) <= ATTENTION_KINDS


def has_vision(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration reads images."""
    return getattr(config, "vision_config", None) is not None
