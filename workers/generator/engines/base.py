"""What a generator asks of an engine: token ids in, token ids with their logprobs out, new weights
between two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from onstream.pipeline.images import PromptImage
from onstream.pipeline.records import FinishReason, Ids, Logprobs, VersionSpan
from onstream.pipeline.weights import LoadedPolicy


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from: the model's own, at `temperature`.

    Temperature 0 takes the likeliest token; its logprob is then the model's own, at temperature 1.
    """

    temperature: float = 1.0


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to write: at most `max_tokens` tokens after `prompt_ids`. `key` is handed back
    with the completion.

    `prompt_ids` holds the tokens of the `images`, which come in the order in which it shows them.

    `seed` alone decides the draws, so the same request gives the same completion in whatever
    company. (The company does change the rounding of the forward pass, which can tip a draw that
    falls on the edge between two tokens.)

    `replica` names which of the engine's copies of the model is to write it; None: any.
    """

    key: int
    prompt_ids: Ids
    max_tokens: int
    seed: int
    sampling: Sampling = Sampling()
    replica: int | None = None
    images: tuple[PromptImage, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A finished completion of C tokens, the end-of-sequence token included when it was written.

    `logprobs` [C], in nats, are of the distribution that was really sampled from.
    """

    key: int
    token_ids: Ids
    logprobs: Logprobs
    finish_reason: FinishReason
    version_spans: list[VersionSpan]


def require_possible(request: GenerationRequest, max_context: int | None) -> None:
    """Check that there is something to write, and that it fits.

    Raises:
        ValueError: an empty prompt, no token to write, or more tokens than `max_context`.
    """
    total = len(request.prompt_ids) + request.max_tokens
    if not len(request.prompt_ids) or request.max_tokens < 1:
        raise ValueError(
            f"request {request.key} has {len(request.prompt_ids)} prompt tokens and asks for {request.max_tokens}"
        )
    if max_context is not None and total > max_context:
        raise ValueError(
            f"request {request.key} may come to {total} tokens; the model takes {max_context}"
        )


class Engine(Protocol):
    """Writes completions, many at once. Not thread-safe: one thread adds, steps and loads."""

    @property
    def max_context(self) -> int | None:
        """The most tokens, prompt and completion together, that the model takes; None where it
        names no bound.
        """
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
        """Copies of the model that are loaded apart and share the requests, such as data-parallel
        ranks or servers.
        """
        ...

    @property
    def active(self) -> int:
        """Requests added and not yet handed back, whether they are being decoded or wait for a
        slot.
        """
        ...

    def add(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue `requests`. Neighbours with the same prompt share its computation.

        Raises:
            ValueError: an empty prompt, no token to write, or more tokens than `max_context`.
        """
        ...

    def step(self) -> list[Completion]:
        """Write one token of every completion that has a slot; returns those that are finished."""
        ...

    @property
    def version(self) -> int:
        """The policy version that the next step writes with; 0, the starting student, before the
        first `load`.
        """
        ...

    def load(self, policy: LoadedPolicy) -> None:
        """Continue under these weights. An engine that first finishes what runs returns before:
        `version` tells when.

        Raises:
            WeightsError: the weights are not those of this model; the engine goes on with what it
                had.
        """
        ...

    def close(self) -> None:
        """End what the engine started, processes above all; it is used no more."""
        ...
