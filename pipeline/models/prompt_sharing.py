"""Finds out by trying whether a model's code can serve shared prompts and a head computed in
chunks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.attention import SHARED_PREFIX
from onstream.pipeline.models.loading import set_text_attention, text_config
from onstream.pipeline.models.logprobs import head_logits, head_of, hidden_states
from onstream.pipeline.models.packing import PackedRow, pack, share_prompts

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""Largest difference accepted, relative to the largest value: what is wrong is off by its own size.
"""


def prepare(model: PreTrainedModel) -> str | None:
    """Checks the model's head, and switches it to computing shared prompts once where that gives
    what single rows give.

    Returns None when shared prompts are on; otherwise the reason why not: `hidden_states` then
    takes padded rows, which are as right and slower.

    Raises:
        UserError: its logits are scaled, capped or otherwise more than its last hidden states times
            its output layer.
    """
    probe = _probe(text_config(model).vocab_size)
    _check_head(model, probe)
    before = text_config(model)._attn_implementation
    reason = _windowed(model) or _differs(model, probe)
    if reason:
        set_text_attention(model, before)
    return reason


def _probe(vocabulary: int) -> PackedRow:
    ids = np.random.default_rng(0).integers(0, vocabulary, 32)
    prompts = [ids[:7], ids[:7], ids[:7], ids[8:13]]
    completions = [ids[13:18], ids[18:20], ids[20:21], ids[21:28]]
    return pack(share_prompts(prompts, completions), max_tokens=64)[0]


@torch.no_grad()
def _check_head(model: PreTrainedModel, probe: PackedRow) -> None:
    group = probe.groups[0]
    row = torch.from_numpy(np.concatenate((group.prompt_ids, group.completions[0]))).to(
        model.device
    )[None]
    head = head_of(model)
    wanted = model(input_ids=row, use_cache=False).logits[0].float()
    got = head_logits(
        model.base_model(input_ids=row, use_cache=False).last_hidden_state[0],
        head.weight,
        head.bias,
    )
    capped = getattr(
        text_config(model), "final_logit_softcapping", None
    )  # a probe's small logits would not show it
    if capped or not _agree(got, wanted, model.dtype):
        raise UserError(
            f"the logits of {model.config.name_or_path} ({model.config.model_type}) are not a plain projection of its hidden states",
            expected="a model without logit scaling or soft-capping",
            next_step="Use a model of another family, such as Qwen, Llama or Mistral.",
        )


def _windowed(model: PreTrainedModel) -> str | None:
    """The reason where some layers' attention is not plain over the whole past, which a short probe
    would not show.
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
def _differs(model: PreTrainedModel, probe: PackedRow) -> str | None:
    """The reason where shared prompts do not give the hidden states that single rows give. Leaves
    the model switched.
    """
    wanted = hidden_states(model, probe)
    try:
        set_text_attention(model, SHARED_PREFIX)
        got = hidden_states(model, probe)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"its code takes no attention function: {' '.join(str(error).split())[:200]}"
    return (
        None
        if _agree(got, wanted, model.dtype)
        else f"its hidden states would differ by up to {(got - wanted).abs().max():.2g}"
    )


def _agree(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    return bool((got - wanted).abs().max() <= _TOLERANCE[dtype] * wanted.abs().max())
