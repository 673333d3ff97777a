"""Tries out whether a model's code allows shared prompts, and a head computed in chunks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.forward import SHARED_PREFIX, head_logits, head_of, hidden_states
from onstream.pipeline.models.loading import set_text_attention, text_config
from onstream.pipeline.models.packing import SharedPrefixRow, pack, share_prompts

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest difference accepted, relative to the largest value. Wrong results are off by far more."""


def prepare(model: PreTrainedModel) -> str | None:
    """Check the model's head, and let it compute shared prompts once if its results stay the same.

    Returns None when shared prompts are on, otherwise the reason why not. `hidden_states` then
    takes padded rows, which are as right and slower.

    Raises:
        UserError: its logits are scaled, capped or otherwise more than its last hidden states times
            its output layer.
    """
    row = _trial_row(text_config(model).vocab_size)
    _check_head(model, row)
    before = text_config(model)._attn_implementation
    reason = _limited_attention(model) or _difference(model, row)
    if reason:
        set_text_attention(model, before)
    return reason


def _trial_row(vocabulary: int) -> SharedPrefixRow:
    ids = np.random.default_rng(0).integers(0, vocabulary, 32)
    prompts = [ids[:7], ids[:7], ids[:7], ids[8:13]]
    completions = [ids[13:18], ids[18:20], ids[20:21], ids[21:28]]
    return pack(share_prompts(prompts, completions), max_tokens=64)[0]


@torch.no_grad()
def _check_head(model: PreTrainedModel, row: SharedPrefixRow) -> None:
    group = row.groups[0]
    sequence = torch.from_numpy(np.concatenate((group.prompt_ids, group.completions[0])))
    input_ids = sequence.to(model.device)[None]
    head = head_of(model)
    expected = model(input_ids=input_ids, use_cache=False).logits[0].float()
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0]
    found = head_logits(hidden, head.weight, head.bias)
    # The small logits of random tokens would not show a cap, so it is read from the configuration.
    capped = getattr(text_config(model), "final_logit_softcapping", None)
    if capped or not _agree(found, expected, model.dtype):
        name = f"{model.config.name_or_path} ({model.config.model_type})"
        raise UserError(
            f"the logits of {name} are not a plain projection of its hidden states",
            expected="a model without logit scaling or soft-capping",
            next_step="Use a model of another family, such as Qwen, Llama or Mistral.",
        )


def _limited_attention(model: PreTrainedModel) -> str | None:
    """The reason where some layers' attention is capped or does not see the whole past.

    A short row would not show it.
    """
    config = text_config(model)
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention scores are capped"
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"}:
        return f"it has layers of {', '.join(sorted(kinds - {'full_attention'}))}"
    window = getattr(config, "sliding_window", None)
    return f"its layers see {window} tokens back" if window and not kinds else None


@torch.no_grad()
def _difference(model: PreTrainedModel, row: SharedPrefixRow) -> str | None:
    """The reason where shared prompts do not give the hidden states that single rows give.

    Leaves the model switched to shared prompts.
    """
    expected = hidden_states(model, row)
    try:
        set_text_attention(model, SHARED_PREFIX)
        found = hidden_states(model, row)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"its code takes no attention function: {' '.join(str(error).split())[:200]}"
    if _agree(found, expected, model.dtype):
        return None
    return f"its hidden states would differ by up to {(found - expected).abs().max():.2g}"


def _agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    return bool((found - expected).abs().max() <= _TOLERANCE[dtype] * expected.abs().max())
