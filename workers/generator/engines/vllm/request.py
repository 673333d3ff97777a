"""A request on its way through vLLM, in process or behind a server, and what has been written."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.images.vllm_prompts import VllmPrompts
from onstream.pipeline.records import FinishReason, VersionSpan
from onstream.workers.generator.engines.base import Completion, GenerationRequest

if TYPE_CHECKING:
    from vllm.inputs.engine import EngineInput

ABORTED = "abort"
UNFILTERED = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
"""Said rather than left out: a server takes defaults from the model's generation_config.json."""
_FINISHED: tuple[FinishReason, ...] = get_args(FinishReason)


@dataclass
class VllmRequest:
    """A request and what vLLM has written of it.

    It is written in one part, or in several where updates aborted it in between.
    """

    request: GenerationRequest
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def prompt_ids(self) -> list[int]:
        """What the next part continues: the prompt and what has been written."""
        return [*self.request.prompt_ids.tolist(), *self.token_ids]

    def sampling_params(self, stop_ids: Collection[int]) -> dict[str, Any]:
        """The fields of vLLM's SamplingParams for the next part, as plain data."""
        return {
            "max_tokens": self.request.max_tokens - len(self.token_ids),
            "temperature": self.request.temperature,
            **UNFILTERED,
            "seed": self._seed(),
            "stop_token_ids": sorted(stop_ids),
            "ignore_eos": True,  # `stop_token_ids` are all there are
            "logprobs": 0,  # of the sampled token alone
            "detokenize": False,
        }

    def take(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        versions: Sequence[tuple[int, int, int]],
        finish_reason: str,
    ) -> None:
        """Add a part.

        Args:
            token_ids: [n].
            logprobs: [n], in nats.
            versions: (policy version, start, end) over the part's tokens.
            finish_reason: a rollout's, or `ABORTED`.

        Raises:
            RuntimeError: vLLM ended it for a reason that a rollout cannot have.
        """
        before = len(self.token_ids)
        self.token_ids += token_ids
        self.logprobs += logprobs
        for version, start, end in versions:
            self._add_span(version, before + start, before + end)
        if finish_reason in _FINISHED:
            self.finish_reason = finish_reason
        elif finish_reason != ABORTED:
            raise RuntimeError(
                f"vLLM ended request {self.request.key} for the reason {finish_reason!r}"
            )

    def completion(self) -> Completion:
        """The whole, once it is finished."""
        assert self.finish_reason is not None
        return Completion(
            key=self.request.key,
            token_ids=np.array(self.token_ids, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            finish_reason=self.finish_reason,
            version_spans=self.spans,
        )

    def _add_span(self, version: int, start: int, end: int) -> None:
        if self.spans and self.spans[-1].version == version:
            start = self.spans.pop().start
        if end > start:
            self.spans.append(VersionSpan(version, start, end))

    def _seed(self) -> int:
        """The request's own seed for the first part, and one that follows from it for a later part.

        The same seed would repeat the first part's draws.
        """
        if not self.token_ids:
            return self.request.seed & ((1 << 63) - 1)
        text = f"{self.request.seed}/{len(self.token_ids)}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


def input_of(request: VllmRequest, vllm_prompts: VllmPrompts, renderer: Any) -> EngineInput:
    """The prompt, its images and what has been written, as vLLM's own `renderer` makes them.

    Of an image in its cache vLLM sends its processes only the digest. So inputs must reach them in
    the order in which they are made, and none may be made while an update clears the caches.

    Raises:
        UserError: vLLM reads other tokens than the student's processor made.
    """
    asked = request.request
    prompt = vllm_prompts.prompt(asked.prompt_ids, asked.images, request.token_ids)
    [rendered] = renderer.render_cmpl([prompt])
    require_same_tokens(rendered["prompt_token_ids"], request)
    result: EngineInput = rendered
    return result


def fields_of(request: VllmRequest, vllm_prompts: VllmPrompts) -> dict[str, Any]:
    """The same as fields of a request to a server, whose answer tells what it read."""
    asked = request.request
    return vllm_prompts.fields(asked.prompt_ids, asked.images, request.token_ids)


def require_same_tokens(theirs: Sequence[int], request: VllmRequest) -> None:
    """Check that vLLM made the same tokens of a prompt with images as the student's processor.

    Raises:
        UserError: it made others.
    """
    ours = request.prompt_ids
    if list(theirs) == ours:
        return
    raise UserError(
        f"of a prompt with {len(request.request.images)} images vLLM makes {len(theirs)} tokens "
        f"that are not the {len(ours)} that the student's processor makes",
        expected="the same tokens: the trainer would see another prompt than was answered",
        next_step='Set inference.engine = "transformers".',
        exit=Exit.REFUSED,
    )
