"""What the teacher stage asks of whatever scores: token ids in, a logprob for every completion
token out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from onstream.pipeline.records import Ids, Logprobs


@dataclass(frozen=True)
class ScoreRequest:
    """One sample to be judged: P ≥ 1 prompt tokens and C completion tokens. `images` names those
    that the prompt shows, in order.

    `sent` is what vLLM's endpoints are sent in the place of the token ids, where there are images
    (`onstream.pipeline.images.vllm_prompts`).
    """

    prompt_ids: Ids  # [P]
    completion_ids: Ids  # [C]
    images: tuple[str, ...] = ()
    sent: Mapping[str, Any] | None = None

    @property
    def tokens(self) -> int:
        """P + C, the context that scoring needs: every completion token is predicted from those
        before it.
        """
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Scores:
    """The teacher's judgement of one completion, in nats at temperature 1.

    `top_ids` and `top_logprobs` are the teacher's k likeliest tokens of each position, likeliest
    first, and `tail_logprobs` is the logprob of everything else together, computed from all logits;
    None when k = 0. An endpoint gives no tail: then that alone is None, and the trainer computes it
    from the k.
    """

    logprobs: Logprobs  # [C]
    top_ids: Ids | None = None  # [C, k]
    top_logprobs: Logprobs | None = None  # [C, k]
    tail_logprobs: Logprobs | None = None  # [C]


class TokenScorer(Protocol):
    """A teacher. `name` is what a rollout's `scored_by` says; `context_tokens` is the longest
    sample it takes.
    """

    name: str
    context_tokens: int
    vocabulary_size: int

    def prefetch_images(self, request: ScoreRequest) -> None:
        """Begin with the images of a request that will be scored soon."""
        ...

    def image_problem(self, request: ScoreRequest) -> str | None:
        """Why the images of `request` cannot be judged, in words; None where it can be scored with
        all of them present.
        """
        ...

    def score(self, requests: Sequence[ScoreRequest], *, top_k: int) -> list[Scores]:
        """Scores of `requests`, in their order. Requests with equal prompts in one call share the
        prompt's computation.
        """
        ...

    def close(self) -> None:
        """Release everything."""
        ...
