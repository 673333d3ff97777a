"""How a model is decoded: in how many rows, and from slots or its own cache, found by trying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.loading import set_text_attention, text_config
from onstream.pipeline.models.multimodal import images_see_themselves
from onstream.pipeline.models.tokenizer import has_vision
from onstream.pipeline.models.trial import partial_attention, short_windows
from onstream.settings.root import Settings
from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.engines.transformers.decoder import Decoder
from onstream.workers.generator.engines.transformers.decoding_step import SequenceState
from onstream.workers.generator.engines.transformers.own_cache_decoder import (
    OwnCacheDecoder,
    UnsupportedCache,
)
from onstream.workers.generator.engines.transformers.slot_decoder import (
    SlotDecoder,
    UnsupportedAttention,
)

ENOUGH_ON_CPU = 64
BUSY_HIDDEN = 256
PROMPTS = (23, 23, 5, 2)
COMPLETIONS = (5, 4, 8, 7)
"""Tokens of the trial's sequences. Prompts are longer than the short windows of a trial, and one is
shorter than a convolution; two are the same. The long ones end first, while others go on."""
FORGETS_AT = 3
"""Tokens after which the trial computes everything anew, as after an update."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest difference accepted, in nats. Wrong ways are off by far more."""
EXACT = {torch.float32: 1e-3, torch.bfloat16: 0.02}
NOISE = 4.0
"""Rows are padded where that adds nothing to the difference: beyond `EXACT`, in nats, no more than
`NOISE` times what rounding makes without padding."""
ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a model's code raises where it has no such way."""


def slots_for(settings: Settings, hidden: int, device: torch.device) -> int:
    """How many completions are decoded at once.

    A CPU decodes further rows of a wide model no faster, and computes each anew for new weights.
    """
    most = settings.inference.max_batch
    if device.type != "cpu" or hidden < BUSY_HIDDEN:
        return most
    return min(most, max(ENOUGH_ON_CPU, settings.orchestrator.batch_size))


@torch.inference_mode()
def choose_decoder(
    model: Any, slots: int, max_context: int | None, prefill_tokens: int
) -> tuple[Decoder, str | None]:
    """The fastest exact decoder of `model`; with it, why it is not that of slots, or None.

    Raises:
        UserError: none is exact.
    """
    limited = _limited_attention(model)
    with short_windows(model):
        not_by_slots = limited or _why_not_by_slots(model)
        if not_by_slots is None:
            return SlotDecoder(model, slots, max_context), None
        alone, padded = (
            _tried(model, partial(OwnCacheDecoder, model, prefill_tokens, pads=pads))
            for pads in (False, True)
        )
    if alone.problem is None:
        pads = padded.problem is None and padded.gap <= max(EXACT[model.dtype], NOISE * alone.gap)
        return OwnCacheDecoder(model, prefill_tokens, pads=pads), not_by_slots
    raise UserError(
        f"the generator cannot serve {type(model).__name__}: {not_by_slots}; "
        f"and through the model's own cache: {alone.problem}",
        expected="a model that writes what a plain forward pass over the whole sequence says",
        next_step='Set inference.engine = "vllm" if vLLM has the model, '
        "or choose another `model.name`.",
    )


def _limited_attention(model: Any) -> str | None:
    """The reason where some tokens see more or less than all before them."""
    if has_vision(model.config) and images_see_themselves(model):
        return "the tokens of its images see one another"
    return partial_attention(text_config(model))


def _why_not_by_slots(model: Any) -> str | None:
    before = text_config(model)._attn_implementation
    try:
        set_text_attention(model, before)
        return _tried(model, lambda: SlotDecoder(model, len(PROMPTS), None)).problem
    finally:
        set_text_attention(model, before)


@dataclass(frozen=True)
class Trial:
    """What came of trying a decoder.

    `problem` is the reason where it does not write what the model's plain forward says; `gap` is
    the largest difference between the two, in nats.
    """

    problem: str | None
    gap: float = np.inf


def _tried(model: Any, make: Callable[[], Decoder]) -> Trial:
    plain = text_config(model)._attn_implementation
    try:
        decoder = make()
        rows = _written_by(decoder, text_config(model).vocab_size)
    except (UnsupportedAttention, UnsupportedCache) as error:
        return Trial(str(error))
    except ERRORS as error:
        words = str(error).partition("\n")[0]
        return Trial(f"its code raises {type(error).__name__}: {words}")
    finally:
        set_text_attention(model, plain)
    if isinstance(decoder, SlotDecoder) and not decoder.reads_slots:
        return Trial("its attention does not go through the AttentionInterface")
    gap = max(_gap(model, row) for row in rows)
    if gap <= TOLERANCE[model.dtype]:
        return Trial(None, gap)
    return Trial(f"its logprobs differ by {gap:.2g} nats from those of a plain forward pass", gap)


def _written_by(decoder: Decoder, vocabulary: int) -> list[SequenceState]:
    """A few tokens after each prompt, whichever they are."""
    prompts = [np.arange(1, count + 1, dtype=np.int32) % vocabulary for count in PROMPTS]
    requests = [
        GenerationRequest(key, prompt, max_tokens, seed=key)
        for key, (prompt, max_tokens) in enumerate(zip(prompts, COMPLETIONS, strict=True))
    ]
    rows = [SequenceState(request) for request in requests]
    everything = list(rows)
    while rows:
        if len(rows[0].token_ids) == FORGETS_AT:
            decoder.forget()
        _write_one(decoder, rows)
        finished = [at for at, row in enumerate(rows) if row.finish_reason(()) is not None]
        rows = decoder.without(rows, finished)
    return everything


def _write_one(decoder: Decoder, rows: list[SequenceState]) -> None:
    """One token more for each of `rows`; those of one prompt get different ones."""
    likeliest = decoder.logits(rows).float().log_softmax(dim=-1).topk(len(PROMPTS))
    for row, ids, logprobs in zip(rows, likeliest.indices, likeliest.values, strict=True):
        rank = row.request.key
        row.token_ids.append(int(ids[rank]))
        row.logprobs.append(float(logprobs[rank]))


def _gap(model: Any, row: SequenceState) -> float:
    """The largest difference, in nats, between the row's logprobs and a plain forward pass."""
    prompt = row.request.prompt_ids
    tokens = np.concatenate([prompt, row.token_ids]).astype(np.int64)
    ids = torch.from_numpy(tokens).to(model.device)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs = logits.float().log_softmax(dim=-1)
    plain = logprobs.gather(-1, ids[len(prompt) :, None])[:, 0]
    return float((plain.cpu() - torch.tensor(row.logprobs)).abs().max())
