"""The probe: prompts by which a generator checks that its engine computes the trainer's policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from onstream.pipeline.models.loading import text_config
from onstream.pipeline.models.logprobs import token_logprobs
from onstream.pipeline.models.trial import windows_of
from onstream.pipeline.record_codec import ids_bytes, logprobs_bytes
from onstream.pipeline.records import Probe
from onstream.workers.trainer import lora

if TYPE_CHECKING:
    from onstream.pipeline.records import Ids
    from onstream.settings.sections.inference import InferenceSettings
    from onstream.workers.trainer.learner import Learner

PROMPTS = 4
# Tokens in which the prompts differ. What comes before is computed once, by the trainer and by an
# engine that caches prefixes.
OWN = 4
# Tokens of a prompt that a window no longer shows to its last token.
BEYOND_WINDOW = 16
LONGEST = 1 << 17
"""Tokens of a prompt, where the model names no bound."""
# An engine's likeliest token is among the trainer's few likeliest, or the two do not agree.
TOP = 8


def prober(learner: Learner, inference: InferenceSettings) -> Prober:
    """The prober of `learner`, whose prompts the engine of `inference` takes."""
    bounds = (learner.context_tokens, inference.max_model_len)
    context = min((bound for bound in bounds if bound is not None), default=LONGEST)
    windows = (window for window in windows_of(text_config(learner.model)) if window < context)
    tokens = max([inference.guard.tokens, *(window + BEYOND_WINDOW for window in windows)])
    # One token less: the one that is asked for needs room too.
    return Prober(learner, min(tokens, context - 1))


class Prober:
    """Asks `learner` the same `PROMPTS` prompts each time.

    Each has `tokens` tokens; they differ in the last `OWN`.
    """

    def __init__(self, learner: Learner, tokens: int) -> None:
        self._learner = learner
        self._prompts = probe_prompts(learner.tokenizer, learner.vocabulary, tokens)
        asked = np.zeros(1, dtype=np.int32)  # the token that would come next, whichever
        shared = [prompt[:-OWN] for prompt in self._prompts]
        own = [np.append(prompt[-OWN:], asked) for prompt in self._prompts]
        self._rows = learner.pack(shared, own)

    def ask(self) -> Probe:
        """The likeliest next tokens under the weights as they are now.

        Changes neither the weights nor any random state.
        """
        learner = self._learner
        top = min(TOP, learner.vocabulary - 1)
        ids = np.empty((len(self._prompts), top), dtype=np.int32)
        logprobs = np.empty((len(self._prompts), top), dtype=np.float32)
        with torch.no_grad(), lora.without_dropout(learner.model):
            for packed in self._rows:
                last = torch.tensor(packed.lengths, device=learner.device).cumsum(0) - 1
                hidden = learner.hidden(packed)[last]
                found = token_logprobs(hidden, learner.head, torch.zeros_like(last), top_k=top).top
                assert found is not None
                rows = list(packed.sequences)
                ids[rows] = found.ids.cpu().numpy()
                logprobs[rows] = found.logprobs.cpu().numpy()
        return Probe(
            [ids_bytes(prompt) for prompt in self._prompts],
            ids_bytes(ids),
            logprobs_bytes(logprobs),
        )


def probe_prompts(tokenizer: Any, vocabulary: int, tokens: int) -> list[Ids]:
    """`PROMPTS` prompts of `tokens` random ordinary ids.

    A model is seldom sure after random ids, so a change of its weights shows. They are always the
    same for a tokenizer, so an engine that caches prompts finds them cached.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ordinary = [token for token in range(min(len(tokenizer), vocabulary)) if token not in special]
    random = np.random.default_rng(0)
    shared = random.choice(ordinary, tokens - OWN)
    own = random.choice(ordinary, (PROMPTS, OWN))
    return [np.concatenate((shared, end)).astype(np.int32) for end in own]
