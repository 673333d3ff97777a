"""Tries out whether a model's code allows shared prompts, and a head computed in chunks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.forward import (
    SHARED_PREFIX,
    VARLEN,
    hidden_states,
    shares_prompts,
)
from onstream.pipeline.models.loading import set_text_attention, text_config
from onstream.pipeline.models.multimodal import images_see_themselves
from onstream.pipeline.models.output_layer import head_of
from onstream.pipeline.models.packing import SharedPrefixRow, pack, share_prompts
from onstream.pipeline.models.tokenizer import has_vision
from onstream.pipeline.models.trial import (
    ANOTHER_FAMILY,
    agree,
    alone,
    name_of,
    partial_attention,
    require_causal,
    row_dependent_positions,
    short_windows,
)
from onstream.pipeline.models.varlen import varlen_attention
from onstream.settings.sections.inference import AttentionSetting

TRIED_WEIGHTS = 2
"""Of which a trial compares gradients, besides the embedding: an adapter's two parts."""

AttentionInterface.register(VARLEN, varlen_attention)


def prepare(model: PreTrainedModel) -> str | None:
    """Check the model's head, and let it compute shared prompts once if its results stay the same.

    Returns None when shared prompts are on, otherwise the reason why not. `hidden_states` then
    takes padded rows, which are as right and slower.

    Raises:
        UserError: it is not causal, padded rows do not give what single rows give, or its logits
            are more than its last hidden states times its output layer, scaled or capped.
    """
    row = _trial_row(text_config(model).vocab_size)
    _check_head(model, row)
    before = text_config(model)._attn_implementation
    reason = _limited_attention(model)
    with short_windows(model):
        expected = _alone_hidden_states(model, row)
        _check_padded(model, row, expected)
        reason = reason or _difference(model, row, expected)
    if reason:
        set_text_attention(model, before)
    return reason


def choose_attention(
    model: PreTrainedModel,
    asked: AttentionSetting,
    dtype: torch.dtype,
    padded_because: str | None,
    setting: str = "trainer.attention",
) -> None:
    """Let packed rows be read as `asked`, in the precision that is computed in.

    By `sdpa` with masks, as `prepare` has left it, or by cumulative lengths: `varlen`. `auto` is
    the latter on CUDA in 16 bits, if hidden states and gradients are those of the masks.

    Args:
        model: as it is used. One without a weight to train is computed as it is, without gradients.
        asked: the value of `setting`.
        dtype: what is computed in, by autocast where it is trained and this is not float32.
        padded_because: what `prepare` has returned.
        setting: the name of the setting, for the message.

    Raises:
        UserError: `varlen` is asked for, and the model cannot be computed with it.
    """
    problem = padded_because
    kernel = model.device.type == "cuda" and dtype != torch.float32
    if not problem and (asked == "varlen" or (asked == "auto" and kernel)):
        problem = _varlen_problem(model, dtype)
    if problem and asked == "varlen":
        raise UserError(
            f'{setting} = "varlen" with {name_of(model)}: {problem}',
            expected="a model that computes shared prompts once by cumulative lengths",
            next_step=f'Leave {setting} out, or set it to "sdpa".',
        )


def _varlen_problem(model: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """Switch from masks to cumulative lengths; the reason where they do not give the same."""
    row = _trial_row(text_config(model).vocab_size)
    try:
        expected = _states_and_gradients(model, row, dtype)
        set_text_attention(model, VARLEN)
        found = _states_and_gradients(model, row, dtype)
    except (ImportError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        set_text_attention(model, SHARED_PREFIX)
        return f"its kernel refuses: {' '.join(str(error).split())[:200]}"
    for one, other in zip(found, expected, strict=True):
        if not agree(one, other, dtype):
            set_text_attention(model, SHARED_PREFIX)
            return f"its results would differ by up to {(one - other).abs().max():.2g}"
    return None


def _states_and_gradients(
    model: PreTrainedModel, row: SharedPrefixRow, dtype: torch.dtype
) -> list[Tensor]:
    """The hidden states of `row`, and the gradients of a sum of them by the first trained weights.

    Each part of a state has its own factor in the sum: a norm leaves that of squares as it is.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad][:TRIED_WEIGHTS]
    if not trained:
        with torch.inference_mode():
            return [hidden_states(model, row).float()]
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        states = hidden_states(model, row).float()
    factors = torch.linspace(-1, 1, states.shape[-1], device=states.device)
    embedding = model.get_input_embeddings().weight
    if embedding.requires_grad:  # the first weights may be a vision tower's, without a part here
        trained.append(embedding)
    gradients = torch.autograd.grad((states * factors).sum(), trained, allow_unused=True)
    return [states.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _trial_row(vocabulary: int) -> SharedPrefixRow:
    """Sequences of 17 to 46 tokens: longer than a window of the trial.

    They are two groups, with a common start.
    """
    ids = np.random.default_rng(0).integers(0, vocabulary, 96)
    other = np.concatenate((ids[:10], ids[23:28]))
    prompts = [ids[:23], ids[:23], ids[:23], other]
    completions = [ids[28:51], ids[51:55], ids[55:56], ids[56:58]]
    return pack(share_prompts(prompts, completions), max_tokens=256, share_start=True)[0]


@torch.no_grad()
def _alone_hidden_states(model: PreTrainedModel, row: SharedPrefixRow) -> Tensor:
    """What `hidden_states` must give: from each sequence alone, by the model's own code."""
    states = []
    for group in row.groups:
        start = len(group.prompt_ids)
        for completion in group.completions:
            sequence = torch.from_numpy(np.concatenate((group.prompt_ids, completion)))
            states.append(alone(model, sequence)[start - 1 : -1])
    return torch.cat(states)


def _first_sequence(row: SharedPrefixRow) -> Tensor:
    group = row.groups[0]
    return torch.from_numpy(np.concatenate((group.prompt_ids, group.completions[0])))


@torch.no_grad()
def _check_padded(model: PreTrainedModel, row: SharedPrefixRow, expected: Tensor) -> None:
    require_causal(model, _first_sequence(row))
    found = hidden_states(model, row)
    if not agree(found, expected, model.dtype):
        raise UserError(
            f"the hidden states of {name_of(model)} differ by up to "
            f"{(found - expected).abs().max():.2g} between a padded batch and single sequences",
            expected="a model whose sequences do not change one another",
            next_step=ANOTHER_FAMILY,
        )


@torch.no_grad()
def _check_head(model: PreTrainedModel, row: SharedPrefixRow) -> None:
    sequence = _first_sequence(row)
    input_ids = sequence.to(model.device)[None]
    head = head_of(model)
    expected = model(input_ids=input_ids, use_cache=False).logits[0].float()
    hidden = alone(model, sequence)
    if hidden.shape[-1] != head.weight.shape[1]:
        raise _unknown_head(model)
    if not agree(head.logits(hidden), expected, model.dtype):
        raise _unknown_head(model)


def _unknown_head(model: PreTrainedModel) -> UserError:
    return UserError(
        f"the logits of {name_of(model)} are not a projection of its hidden states",
        expected="one linear layer, its logits scaled or capped at most",
        next_step=ANOTHER_FAMILY,
    )


def _limited_attention(model: PreTrainedModel) -> str | None:
    """The reason where some layers' attention is capped or does not see the whole past.

    A short row would not show it.
    """
    config = text_config(model)
    if reason := row_dependent_positions(config):
        return reason
    if has_vision(model.config) and images_see_themselves(model):
        return "the tokens of its images see one another"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention scores are capped"
    return partial_attention(config)


@torch.no_grad()
def _difference(model: PreTrainedModel, row: SharedPrefixRow, expected: Tensor) -> str | None:
    """The reason where shared prompts do not give the hidden states that single rows give.

    Leaves the model switched to shared prompts.
    """
    try:
        set_text_attention(model, SHARED_PREFIX)
        if not shares_prompts(model):
            return "its attention does not go through the AttentionInterface"
        found = hidden_states(model, row)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"its code takes no attention function: {' '.join(str(error).split())[:200]}"
    if agree(found, expected, model.dtype):
        return None
    return f"its hidden states would differ by up to {(found - expected).abs().max():.2g}"
