"""The worker that scores rollouts: every token that the student wrote, under the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pipeline.records import Rollout, Sample, StageName, ids_array, ids_bytes, logprobs_bytes
from pipeline.stage import Delivery, Outcome
from pipeline.streams import Bus
from settings.root import Settings
from workers.teacher.scorer import Scorer, ScoreRequest, Scores

ROOM = 256
"""Rollouts in hand at once: enough that the groups among them are whole when they come from a busy stream."""


class Teacher:
    """Takes rollouts, adds the teacher's logprobs to their samples, and sends them on.

    What is in hand is scored whole groups first come, up to a forward pass a call, so that siblings share the
    computation of their prompt. Nothing waits for siblings that have not come.
    """

    name: StageName = "score"
    holds_entries = False

    def __init__(self, settings: Settings, bus: Bus, load: Callable[[Settings], Scorer] | None = None) -> None:
        self._settings = settings
        self._load = load or _load_local
        self._top_k = settings.trainer.loss.teacher_top_k
        self._in_hand: dict[int, list[Delivery]] = {}  # by group, in the order of their first arrival

    def setup(self) -> None:
        """Load the teacher and compare it with the student.

        Raises:
            UserError: there is no such model, or it cannot judge this student's tokens.
        """
        self._scorer = self._load(self._settings)

    @property
    def room(self) -> int:
        """How many more rollouts it takes in hand."""
        return max(0, ROOM - sum(map(len, self._in_hand.values())))

    @property
    def busy(self) -> bool:
        """Whether rollouts are in hand."""
        return bool(self._in_hand)

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Score up to about one forward pass of what is in hand."""
        refused = [Outcome(delivery, dead=reason) for delivery in new if (reason := self._objection(delivery))]
        objected = {outcome.delivery.entry_id for outcome in refused}
        for delivery in new:
            if delivery.entry_id not in objected:
                self._in_hand.setdefault(_group(delivery), []).append(delivery)
        return refused + self._score(self._next_slice())

    def close(self, *, finished: bool) -> None:
        """Forget what is in hand; the loop gives it back."""
        self._in_hand.clear()

    def _objection(self, delivery: Delivery) -> str | None:
        """Why this rollout cannot be scored, in words; None when it can."""
        reasons = (self._sample_objection(sample) for sample in _rollout(delivery).samples)
        return next((reason for reason in reasons if reason), None)

    def _sample_objection(self, sample: Sample) -> str | None:
        request, teacher = _request(sample), self._scorer
        if not len(request.prompt_ids) or not len(request.completion_ids):
            return (
                f"a sample has {len(request.prompt_ids)} prompt and {len(request.completion_ids)} completion tokens; expected ≥ 1 of each"
            )
        if request.tokens > teacher.context_tokens:
            return (
                f"a sample of {request.tokens} tokens is longer than the teacher's context of {teacher.context_tokens} "
                f"({teacher.name}); lower inference.sampling.max_completion or shorten the prompts"
            )
        ids = np.concatenate((request.prompt_ids, request.completion_ids))
        if ids.max() >= teacher.vocabulary_size or ids.min() < 0:
            return f"token ids from {ids.min()} to {ids.max()}; the teacher {teacher.name} knows 0 to {teacher.vocabulary_size - 1}"
        return None

    def _next_slice(self) -> list[Delivery]:
        """Takes about one forward pass of rollouts out of hand, group by group, oldest group first; at least one rollout."""
        taken: list[Delivery] = []
        tokens, budget = 0, self._settings.teacher_inference.max_batch_tokens
        for group in list(self._in_hand):
            members = self._in_hand[group]
            tokens += _prompt_tokens(members[0])
            while members and (not taken or tokens < budget):
                taken.append(members.pop(0))
                tokens += _completion_tokens(taken[-1])
            if members:
                break
            del self._in_hand[group]
        return taken

    def _score(self, deliveries: Sequence[Delivery]) -> list[Outcome]:
        samples = [sample for delivery in deliveries for sample in _rollout(delivery).samples]
        if samples:
            scored = self._scorer.score([_request(sample) for sample in samples], top_k=self._top_k)
            for sample, scores in zip(samples, scored, strict=True):
                _write(sample, scores)
        for delivery in deliveries:
            _rollout(delivery).scored_by = self._scorer.name
        return [Outcome(delivery, _rollout(delivery)) for delivery in deliveries]


def _load_local(settings: Settings) -> Scorer:
    from workers.teacher.setup import load_local  # torch is imported by the worker that needs it alone

    return load_local(settings)


def _rollout(delivery: Delivery) -> Rollout:
    assert isinstance(delivery.record, Rollout)
    return delivery.record


def _group(delivery: Delivery) -> int:
    return _rollout(delivery).group


def _request(sample: Sample) -> ScoreRequest:
    return ScoreRequest(ids_array(sample.prompt_ids), ids_array(sample.completion_ids))


def _prompt_tokens(delivery: Delivery) -> int:
    return sum(len(sample.prompt_ids) for sample in _rollout(delivery).samples) // 4


def _completion_tokens(delivery: Delivery) -> int:
    return sum(len(sample.completion_ids) for sample in _rollout(delivery).samples) // 4


def _write(sample: Sample, scores: Scores) -> None:
    sample.teacher_logprobs = logprobs_bytes(scores.logprobs)
    if scores.top_ids is not None and scores.top_logprobs is not None and scores.tail_logprobs is not None:
        sample.teacher_top_ids = ids_bytes(scores.top_ids)
        sample.teacher_top_logprobs = logprobs_bytes(scores.top_logprobs)
        sample.teacher_tail_logprobs = logprobs_bytes(scores.tail_logprobs)
