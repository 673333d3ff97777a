"""From a rollout's samples to requests for scores, and back."""

from __future__ import annotations

import numpy as np

from onstream.pipeline.records import Sample, ids_array, ids_bytes, logprobs_bytes
from onstream.workers.teacher.scorer import ScoreRequest, Scores


def request_of(sample: Sample) -> ScoreRequest:
    """What a teacher is asked about `sample`."""
    return ScoreRequest(
        ids_array(sample.prompt_ids), ids_array(sample.completion_ids), tuple(sample.images)
    )


def objection(
    sample: Sample, teacher: str, *, context_tokens: int | None, vocabulary_size: int
) -> str | None:
    """Why the teacher of that name cannot score `sample`; None when it can, by these limits."""
    request = request_of(sample)
    prompt = len(request.prompt_ids)
    completion = len(request.completion_ids)
    if not prompt or not completion:
        return (
            f"a sample has {prompt} prompt and {completion} completion tokens; expected ≥ 1 of each"
        )
    if context_tokens is not None and request.tokens > context_tokens:
        return (
            f"a sample of {request.tokens} tokens is longer than the teacher's context of "
            f"{context_tokens} ({teacher}); lower inference.sampling.max_completion or shorten the "
            "prompts"
        )
    ids = np.concatenate((request.prompt_ids, request.completion_ids))
    if ids.max() >= vocabulary_size or ids.min() < 0:
        return (
            f"token ids from {ids.min()} to {ids.max()}; "
            f"the teacher {teacher} knows 0 to {vocabulary_size - 1}"
        )
    return None


def write_scores(sample: Sample, scores: Scores) -> None:
    """Put `scores` into `sample`."""
    sample.teacher_logprobs = logprobs_bytes(scores.logprobs)
    if scores.top_ids is not None and scores.top_logprobs is not None:
        sample.teacher_top_ids = ids_bytes(scores.top_ids)
        sample.teacher_top_logprobs = logprobs_bytes(scores.top_logprobs)
    if scores.tail_logprobs is not None:
        sample.teacher_tail_logprobs = logprobs_bytes(scores.tail_logprobs)
