"""What transformers says of tokens that vLLM wrote, under the weights that their spans name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from onstream.pipeline.weights import LoadedPolicy
from onstream.workers.generator.engines.base import Completion, GenerationRequest

CLOSE_NATS = 1e-4


def model_of(directory: Path) -> Any:
    """The model in `directory`, in float32."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def policy_of(number: int, model: Any) -> LoadedPolicy:
    """The weights of `model` as version `number`."""
    return LoadedPolicy.of(number, model.state_dict())


@torch.no_grad()
def logprobs(
    models: Mapping[int, Any], request: GenerationRequest, one: Completion, *, stale: bool = False
) -> Any:
    """[C], of each token of `one` by the model that its span names, in nats, at the request's
    temperature.

    With `stale`, a model takes the keys and values of what came before its span from those before
    it, as an engine does that keeps them; without, it computes all of them itself.
    """
    ids = torch.from_numpy(np.concatenate([request.prompt_ids, one.token_ids]).astype(np.int64))[
        None
    ]
    prompt = len(request.prompt_ids)
    cache = DynamicCache()
    found = []
    for span in one.version_spans:
        if not stale:
            cache = DynamicCache()
        fed = cache.get_seq_length()
        output = models[span.version](
            input_ids=ids[:, fed : prompt + span.end - 1], past_key_values=cache, use_cache=True
        )
        logits = output.logits[0, span.start - span.end :] / (request.temperature or 1.0)
        drawn = ids[0, prompt + span.start : prompt + span.end]
        found.append(logits.log_softmax(-1).gather(-1, drawn[:, None])[:, 0])
    return torch.cat(found).numpy()


def gaps(
    models: Mapping[int, Any], request: GenerationRequest, one: Completion, *, stale: bool = False
) -> Any:
    """[C], how far the engine's logprobs of `one` are from those of `logprobs`, in nats."""
    ends = [(span.start, span.end) for span in one.version_spans]
    assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])] and ends[-1][
        1
    ] == len(one.token_ids), ends
    return np.abs(logprobs(models, request, one, stale=stale) - one.logprobs)
