"""What a generator asks of an engine: token ids in, token ids with logprobs out, new weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from onstream.pipeline.errors import UserError
from onstream.pipeline.images import PromptImage
from onstream.pipeline.records import FinishReason, Ids, Logprobs, VersionSpan
from onstream.pipeline.weights import LoadedPolicy


class UnsupportedModel(UserError):
    """The engine does not take this model, or not with these settings. Nothing was started."""


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to write: at most `max_tokens` tokens after `prompt_ids`.

    Args:
        key: handed back with the completion.
        prompt_ids: [P], including the tokens of the `images`, which are in the prompt's order.
        max_tokens: the most tokens of the completion.
        seed: decides the draws alone, so the same request gives the same completion in whatever
            batch. (The batch does change the rounding of the forward pass, which can tip a draw
            that falls between two tokens.)
        temperature: of the distribution that is drawn from. 0 takes the likeliest token, whose
            logprob is then the model's own, at temperature 1.
        replica: which of the engine's copies of the model is to write it; None: any.
        images: the images of the prompt.
    """

    key: int
    prompt_ids: Ids
    max_tokens: int
    seed: int
    temperature: float = 1.0
    replica: int | None = None
    images: tuple[PromptImage, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A finished completion of C tokens, including the end-of-sequence token if it was written.

    `logprobs` [C], in nats, are those of the distribution that was drawn from.
    """

    key: int
    token_ids: Ids
    logprobs: Logprobs
    finish_reason: FinishReason
    version_spans: list[VersionSpan]


class Engine(Protocol):
    """Writes many completions at once. Not thread-safe: one thread adds, steps and loads."""

    @property
    def max_context(self) -> int | None:
        """The most tokens, prompt and completion together, that the model takes; None: no bound."""
        ...

    @property
    def slots(self) -> int:
        """How many completions are decoded at once; 0 while it can take none."""
        ...

    @property
    def problem(self) -> str:
        """What keeps it from decoding more, or any, in words; empty while all is well."""
        ...

    @property
    def replicas(self) -> int:
        """Copies of the model that share the requests, such as data-parallel ranks or servers."""
        ...

    @property
    def active(self) -> int:
        """Requests added and not yet handed back, decoding or waiting for a slot."""
        ...

    @property
    def version(self) -> int:
        """The policy version of the next step; 0, the starting student, before the first `load`."""
        ...

    def add(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue `requests`. Neighbours with the same prompt share its computation.

        Raises:
            ValueError: an empty prompt, no token to write, or more tokens than `max_context`.
        """
        ...

    def step(self) -> list[Completion]:
        """Write one token of every completion that has a slot; returns the finished ones."""
        ...

    def load(self, policy: LoadedPolicy) -> None:
        """Continue with these weights.

        An engine that first finishes what runs returns before it has: `version` tells when.

        Raises:
            WeightsError: the weights are not those of this model; the engine goes on with the ones
                that it has.
        """
        ...

    def close(self) -> None:
        """End what the engine started, above all its processes. It is not used again."""
        ...
