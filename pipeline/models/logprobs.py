"""Hidden states of packed rows, and logprobs of given tokens, a chunk of positions at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.attention import SHARED_PREFIX, layout_of
from onstream.pipeline.models.loading import text_config
from onstream.pipeline.models.multimodal import (
    Features,
    image_tensors,
    packed_positions,
    padded_inputs,
)
from onstream.pipeline.models.packing import SharedPrefixRow

NO_IMAGES: Features = {}


@dataclass(frozen=True)
class TopLogprobs:
    """The k likeliest tokens of N positions, and all others together as a tail. Float32, nats."""

    ids: Tensor  # [N, k], likeliest first
    logprobs: Tensor  # [N, k]
    tail: Tensor  # [N]


@dataclass(frozen=True)
class TokenLogprobs:
    """The logprobs and entropies of N positions. Float32, nats."""

    sampled: Tensor  # [N], logprobs of the targets
    entropy: Tensor  # [N]
    top: TopLogprobs | None  # with top_k > 0


def hidden_states(
    model: PreTrainedModel, packed: SharedPrefixRow, features: Features = NO_IMAGES
) -> Tensor:
    """The last hidden states [N, H] that predict `packed.targets`, in their order.

    Shared prompts, and the images in them, are computed once where `prompt_sharing.prepare` has
    switched the model to it. Other models take one padded row a sequence. `features` holds the
    images that the prompts show.
    """
    if text_config(model)._attn_implementation != SHARED_PREFIX:
        return _padded_hidden_states(model, packed, features)
    row: Tensor = model.base_model(
        input_ids=torch.from_numpy(packed.input_ids).to(model.device)[None],
        position_ids=packed_positions(model, packed, features),
        use_cache=False,  # with a cache, packed rows are silently wrong, by nats
        layout=layout_of(packed, model.device),
        **image_tensors(model, packed.groups, features),
    ).last_hidden_state[0]
    return row.index_select(0, torch.from_numpy(packed.predicted_at).to(model.device))


def _padded_hidden_states(
    model: PreTrainedModel, packed: SharedPrefixRow, features: Features
) -> Tensor:
    """The same from rows padded on the right.

    There is no mask: the model is causal, so no position that is read sees the padding.
    """
    sequences = [(group, completion) for group in packed.groups for completion in group.completions]
    rows = [
        torch.cat((torch.from_numpy(group.prompt_ids), torch.from_numpy(completion[:-1])))
        for group, completion in sequences
    ]
    input_ids = pad_sequence(rows, batch_first=True).to(model.device)
    images = padded_inputs(model, input_ids, [group for group, _ in sequences], features)
    states = model.base_model(input_ids=input_ids, use_cache=False, **images).last_hidden_state
    return torch.cat(
        [
            states[row, len(group.prompt_ids) - 1 : len(rows[row])]
            for row, (group, _) in enumerate(sequences)
        ]
    )


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The model's output projection, [V, H].

    Raises:
        UserError: the model has no linear one.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"the output layer of {model.config.name_or_path} is a {type(head).__name__}",
            expected="a linear layer over the vocabulary",
            next_step="Use a causal language model of another family.",
        )
    return head


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Float32 logits [n, V] of `hidden` [n, H], multiplied in the precision of `hidden`."""
    if bias is not None:
        bias = bias.to(hidden.dtype)
    return nn.functional.linear(hidden, weight.to(hidden.dtype), bias).float()


def entropy_of(probabilities: Tensor, logits: Tensor, normaliser: Tensor) -> Tensor:
    """Entropy [n] of softmax(logits), without another [n, V] tensor.

    `probabilities` [n, V] are that softmax, `normaliser` [n] is the logsumexp of `logits` [n, V].
    """
    return normaliser - torch.bmm(probabilities[:, None, :], logits[:, :, None])[:, 0, 0]


@torch.no_grad()
def token_logprobs(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    chunk: int = 1024,
) -> TokenLogprobs:
    """Logprobs of `targets` [N] given `hidden` [N, H], at `temperature`.

    At most [chunk, V] logits exist at once. With `top_k` = k > 0 there are also the k likeliest
    tokens of each position and the tail: the logprob of all others together. The tail is summed
    over the other logits, since 1 − Σ of the k would round to 0 where the model is confident.

    Raises:
        ValueError: `top_k` leaves no tail.
    """
    if top_k >= head.out_features:
        raise ValueError(
            f"top_k is {top_k}; expected less than the vocabulary of {head.out_features}, "
            "so that a tail remains"
        )
    chunks = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    parts = [_chunk_logprobs(*part, head, temperature, top_k) for part in chunks]
    sampled, entropy, *top = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenLogprobs(sampled, entropy, TopLogprobs(*top) if top else None)


def _chunk_logprobs(
    hidden: Tensor, targets: Tensor, head: nn.Linear, temperature: float, top_k: int
) -> tuple[Tensor, ...]:
    """Sampled [n] and entropy [n]; with `top_k` also ids [n, k], logprobs [n, k] and tail [n]."""
    logits = head_logits(hidden, head.weight, head.bias)
    if temperature != 1.0:
        logits /= temperature
    normaliser = logits.logsumexp(-1)
    sampled = logits.gather(1, targets[:, None])[:, 0] - normaliser
    entropy = entropy_of(logits.softmax(-1), logits, normaliser)
    if not top_k:
        return sampled, entropy
    top = logits.topk(top_k, dim=-1)
    tail = logits.scatter_(1, top.indices, float("-inf")).logsumexp(-1) - normaliser
    return sampled, entropy, top.indices, top.values - normaliser[:, None], tail
