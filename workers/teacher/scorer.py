"""What scores for the teacher stage: what it is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from onstream.pipeline.records import Ids, Logprobs


@dataclass(frozen=True)
class ScoreRequest:
    """One sample to score: P ≥ 1 prompt tokens and C completion tokens.

    `images` are the digests of the prompt's images, in order. `image_fields` is what vLLM's servers
    are sent in place of the token ids where there are images, by
    `onstream.pipeline.images.vllm_prompts`.
    """

    prompt_ids: Ids  # [P]
    completion_ids: Ids  # [C]
    images: tuple[str, ...] = ()
    image_fields: Mapping[str, Any] | None = None

    @property
    def tokens(self) -> int:
        """P + C: the context that scoring needs."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Scores:
    """The teacher's logprobs of one completion, in nats at temperature 1.

    `top_ids` and `top_logprobs` are the teacher's k likeliest tokens of each position, likeliest
    first. `tail_logprobs` is the logprob of all other tokens together, computed from all logits.
    With k = 0 all three are None. An endpoint gives no tail: then `tail_logprobs` is None, and the
    trainer computes it from the k.
    """

    logprobs: Logprobs  # [C]
    top_ids: Ids | None = None  # [C, k]
    top_logprobs: Logprobs | None = None  # [C, k]
    tail_logprobs: Logprobs | None = None  # [C]


def sent_ids(request: ScoreRequest) -> list[int]:
    """The token ids of prompt and completion."""
    return [*request.prompt_ids.tolist(), *request.completion_ids.tolist()]


class TokenScorer(Protocol):
    """A teacher that scores in this process.

    `name` becomes a rollout's `scored_by`, and `context_tokens` is the longest sample it takes. A
    call should have the tokens of about `passes` forward passes.
    """

    name: str
    context_tokens: int
    vocabulary_size: int
    passes: int

    def prefetch_images(self, request: ScoreRequest) -> None:
        """Begin to process the images of a request that will be scored soon."""
        ...

    def image_problem(self, request: ScoreRequest) -> str | None:
        """Why `request` cannot be scored with all its images; None where it can."""
        ...

    def score(self, requests: Sequence[ScoreRequest], *, top_k: int) -> list[Scores]:
        """The scores of `requests`, in their order. Equal prompts in one call are computed once."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...
