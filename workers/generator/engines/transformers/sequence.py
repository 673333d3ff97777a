"""A request that is being written: its tokens so far, and the policy versions that wrote them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onstream.pipeline.records import FinishReason, VersionSpan
from onstream.workers.generator.engines.base import Completion, GenerationRequest

Integers = npt.NDArray[Any]
PromptKey = tuple[bytes, tuple[str, ...]]
"""A prompt as something to compare and hash: its ids, and the digests of its images."""


@dataclass
class SequenceState:
    """A request and what has been written of it.

    `spans` are (policy version, index of the first token that it wrote). `space` [3, P] places the
    prompt's tokens in time, height and width, where the model does so and the prompt has images.
    """

    request: GenerationRequest
    space: Integers | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    @property
    def prompt(self) -> PromptKey:
        """What is equal for sequences of the same prompt."""
        digests = tuple(image.file.digest for image in self.request.images)
        return self.request.prompt_ids.tobytes(), digests

    @property
    def shift(self) -> int:
        """The completion's positions minus its token counts; an image takes fewer positions."""
        if self.space is None:
            return 0
        positions = int(self.space.max()) + 1
        tokens: int = self.space.shape[1]
        return positions - tokens

    def finish_reason(self, stop: Collection[int]) -> FinishReason | None:
        """Why it ends with its last token; None: it goes on. Any of `stop` ends it."""
        if self.token_ids[-1] in stop:
            return "stop"
        return "length" if len(self.token_ids) >= self.request.max_tokens else None

    def completion(self, reason: FinishReason) -> Completion:
        """What is handed back."""
        ends = [start for _, start in self.spans[1:]] + [len(self.token_ids)]
        spans = [
            VersionSpan(version, start, end)
            for (version, start), end in zip(self.spans, ends, strict=True)
            if end > start
        ]
        return Completion(
            key=self.request.key,
            token_ids=np.array(self.token_ids, dtype=np.int32),
            logprobs=np.array(self.logprobs, dtype=np.float32),
            finish_reason=reason,
            version_spans=spans,
        )
