"""How far trainer, teacher and generator are from a model's own forward, one sequence at a time."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.forward import hidden_states
from onstream.pipeline.models.output_layer import head_of
from onstream.pipeline.models.packing import Ids, pack, share_prompts
from onstream.pipeline.models.prompt_sharing import prepare
from onstream.pipeline.weights import LoadedPolicy
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.engines.transformers.engine import TransformersEngine
from tests.models.families import VOCABULARY

PROMPTS = (2, 40, 90, 230)
COMPLETIONS = (1, 7, 20, 50)
"""Tokens. Each prompt has a group of all the completions: long and short neighbours."""

RELOADS_AFTER = 12
"""Steps of the generator before it loads weights."""


class Refused(Exception):
    """It is refused, in words, before it starts."""


def sequences(seed: int = 3) -> tuple[list[Ids], list[Ids]]:
    """Prompts and completions, one of each for each sequence."""
    random = np.random.default_rng(seed)
    prompts = []
    completions = []
    for length in PROMPTS:
        prompt = random.integers(3, VOCABULARY, length)
        for tokens in COMPLETIONS:
            prompts.append(prompt)
            completions.append(random.integers(3, VOCABULARY, tokens))
    return prompts, completions


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, prompt: Ids, completion: Ids) -> Tensor:
    """The logprobs [C] of a completion, by the model's own forward over this sequence alone."""
    ids = torch.from_numpy(np.concatenate((prompt, completion)).astype(np.int64))[None]
    logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
    return logprobs[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None])[:, 0]


@torch.no_grad()
def scoring_gap(model: PreTrainedModel) -> float:
    """Of the forward pass that trainer and teacher share, in nats.

    Raises:
        Refused: the model is refused.
    """
    prompts, completions = sequences()
    expected = [plain_logprobs(model, *one) for one in zip(prompts, completions, strict=True)]
    try:
        prepare(model)
    except UserError as error:
        raise Refused(str(error)) from error
    head = head_of(model)
    worst = 0.0
    for packed in pack(share_prompts(prompts, completions), 2000):
        logits = head.logits(hidden_states(model, packed))
        targets = torch.from_numpy(packed.targets).long()
        found = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        for at, part in zip(packed.sequences, found.split(list(packed.lengths)), strict=True):
            worst = max(worst, float((part - expected[at]).abs().max()))
    return worst


def generator_gap(model: PreTrainedModel) -> float:
    """Of the built-in generator, in nats; `model` itself stays as it is.

    In the middle of the completions it loads weights, which are the same, and computes everything
    that runs anew.

    Raises:
        Refused: the model is refused.
    """
    prompts, completions = sequences()
    try:
        engine = TransformersEngine(copy.deepcopy(model), (), slots=8)
    except UserError as error:
        raise Refused(str(error)) from error
    engine.add(
        [
            GenerationRequest(key, prompt.astype(np.int32), max_tokens=len(completion), seed=key)
            for key, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
    )
    finished: list[Completion] = []
    for _ in range(RELOADS_AFTER):
        finished += engine.step()
    engine.load(LoadedPolicy.of(1, model.state_dict()))
    while engine.active:
        finished += engine.step()
    worst = 0.0
    for one in finished:
        expected = plain_logprobs(model, prompts[one.key], one.token_ids)
        worst = max(worst, float((expected - torch.from_numpy(one.logprobs)).abs().max()))
    return worst
