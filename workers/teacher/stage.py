"""The worker that scores rollouts with a teacher in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from onstream.pipeline.record_codec import (
    FieldError,
    check_teacher,
    ids_array,
    ids_bytes,
    logprobs_bytes,
)
from onstream.pipeline.records import Sample
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.settings.engines import IN_PROCESS, teacher_engine
from onstream.settings.root import Settings
from onstream.settings.stages import StreamName
from onstream.workers.teacher.scorer import ScoreRequest, Scores, TokenScorer

ROOM = 256
"""Rollouts in hand at once: enough for the groups among them to be whole when they come from a busy
stream.
"""


@dataclass(frozen=True)
class RolloutToScore:
    """A rollout in hand, and what the teacher is asked about each of its samples."""

    delivery: Delivery
    requests: list[ScoreRequest]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompts."""
        return sum(len(request.prompt_ids) for request in self.requests)

    @property
    def completion_tokens(self) -> int:
        """Tokens of its completions."""
        return sum(len(request.completion_ids) for request in self.requests)


class Teacher:
    """Takes rollouts, adds the teacher's logprobs to their samples, and sends them on.

    A call scores about one forward pass of what is in hand, or as many as the scorer asks for,
    whole groups first, so that siblings share the computation of their prompt. Nothing waits for
    siblings that have not come. `name` is the stream that it consumes: a teacher's own, where that
    has a name.
    """

    name: StreamName = "score"
    holds_entries = False

    def __init__(
        self,
        settings: Settings,
        bus: Bus,
        load: Callable[[Settings], TokenScorer] | None = None,
        *,
        name: StreamName = name,
    ) -> None:
        self.name = name
        self.stats = Stats()
        self._settings = settings
        self._load = load or partial(_load_local, bus=bus)
        self._top_k = settings.trainer.loss.most_top_k
        # By group, in the order in which the groups came.
        self._in_hand: dict[int, list[RolloutToScore]] = {}

    def setup(self) -> None:
        """Load the teacher and compare it with the student.

        Raises:
            UserError: there is no such model, or it cannot score this student's tokens.
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
        """Score about one forward pass of what is in hand."""
        refused = []
        for delivery in new:
            rollout = RolloutToScore(delivery, list(map(request_of, delivery.rollout.samples)))
            reason = view_problem(delivery.rollout.samples, self._settings)
            if reason := reason or self._objection(rollout.requests):
                refused.append(Outcome(delivery, dead=reason))
            else:
                self._take(rollout)
        return refused + self._score(self._next_slice())

    def close(self, *, finished: bool) -> None:
        """Forget what is in hand; the loop gives it back."""
        self._in_hand.clear()
        self._scorer.close()

    def _objection(self, requests: Sequence[ScoreRequest]) -> str | None:
        """Why a rollout with these requests cannot be scored; None when it can."""
        for request in requests:
            reason = objection(
                request,
                self._scorer.name,
                context_tokens=self._scorer.context_tokens,
                vocabulary_size=self._scorer.vocabulary_size,
            )
            if reason:
                return reason
        return None

    def _take(self, rollout: RolloutToScore) -> None:
        for request in rollout.requests:
            self._scorer.prefetch_images(request)
        self._in_hand.setdefault(rollout.delivery.rollout.group, []).append(rollout)

    def _next_slice(self) -> list[RolloutToScore]:
        """The rollouts of about as many forward passes as the scorer takes, taken out of hand.

        Groups go in the order in which they came; at least one rollout is taken.
        """
        taken: list[RolloutToScore] = []
        tokens = 0
        budget = self._settings.teacher_inference.max_batch_tokens * self._scorer.passes
        for group in list(self._in_hand):
            members = self._in_hand[group]
            tokens += members[0].prompt_tokens
            while members and (not taken or tokens < budget):
                taken.append(members.pop(0))
                tokens += taken[-1].completion_tokens
            if members:
                break
            del self._in_hand[group]
        return taken

    def _score(self, rollouts: Sequence[RolloutToScore]) -> list[Outcome]:
        outcomes = []
        scorable = []
        for rollout in rollouts:
            if reason := self._image_problem(rollout.requests):
                dead = f"it would be scored without its images: {reason}"
                outcomes.append(Outcome(rollout.delivery, dead=dead))
            else:
                scorable.append(rollout)
        problems = self._add_scores(scorable)
        return outcomes + [
            Outcome(delivery, delivery.rollout, dead=problems.get(delivery.number))
            for delivery in (rollout.delivery for rollout in scorable)
        ]

    def _image_problem(self, requests: Sequence[ScoreRequest]) -> str | None:
        for request in requests:
            if reason := self._scorer.image_problem(request):
                return reason
        return None

    def _add_scores(self, rollouts: Sequence[RolloutToScore]) -> dict[int, str]:
        """Score `rollouts`; returns why one cannot be used, by number, of those that cannot."""
        problems = {}
        records = [rollout.delivery.rollout for rollout in rollouts]
        requests = [request for rollout in rollouts for request in rollout.requests]
        if requests:
            scored = self._scorer.score(requests, top_k=self._top_k)
            samples = [(record.number, sample) for record in records for sample in record.samples]
            for (number, sample), scores in zip(samples, scored, strict=True):
                write_scores(sample, scores)
                if problem := self._problem_with(sample, scores):
                    problems[number] = problem
        for record in records:
            record.scored_by = self._scorer.name
        return problems

    def _problem_with(self, sample: Sample, scores: Scores) -> str | None:
        """Why the `scores` that were written into `sample` cannot be trained on."""
        scorer = self._scorer
        return written_scores_problem(sample, scores, scorer.name, scorer.vocabulary_size)


def request_of(sample: Sample) -> ScoreRequest:
    """What a teacher is asked about `sample`: its completion, behind the teacher's own prompt where
    there is one.
    """
    prompt = sample.teacher_prompt_ids or sample.prompt_ids
    return ScoreRequest(ids_array(prompt), ids_array(sample.completion_ids), tuple(sample.images))


def view_problem(samples: Sequence[Sample], settings: Settings) -> str | None:
    """Why the prompts that a teacher is to read are not those of `settings`; None where they are.

    Scores behind another prompt would train on, unnoticed.
    """
    own = settings.task.teacher_prompt.differs
    if all((sample.teacher_prompt_ids is not None) == own for sample in samples):
        return None
    got = "lacks" if own else "has"
    return f"a sample {got} a prompt for the teacher alone; expected as task.teacher_prompt says"


def objection(
    request: ScoreRequest, teacher: str, *, context_tokens: int | None, vocabulary_size: int
) -> str | None:
    """Why the teacher of that name cannot score this; None when it can, by these limits."""
    prompt = len(request.prompt_ids)
    completion = len(request.completion_ids)
    if not prompt or not completion:
        return (
            f"a sample has {prompt} prompt and {completion} completion tokens; expected ≥ 1 of each"
        )
    tokens = prompt + completion
    if context_tokens is not None and tokens > context_tokens:
        return (
            f"a sample of {tokens} tokens is longer than the teacher's context of "
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


def scores_problem(scores: Scores, teacher: str, vocabulary_size: int) -> str | None:
    """Why the `scores` of the teacher of that name cannot be trained on; None where they can.

    The student knows `vocabulary_size` tokens.
    """
    sample = Sample(b"", b"", b"", b"", [], "")
    write_scores(sample, scores)
    return written_scores_problem(sample, scores, teacher, vocabulary_size)


def written_scores_problem(
    sample: Sample, scores: Scores, teacher: str, vocabulary_size: int
) -> str | None:
    """The same of `scores` that are in `sample` already."""
    if scores.top_ids is not None and scores.top_ids.max() >= vocabulary_size:
        return (
            f"the teacher finds token {scores.top_ids.max()} likely, "
            f"and the student knows 0 to {vocabulary_size - 1}"
        )
    try:
        check_teacher(sample, len(scores.logprobs))
    except FieldError as error:
        return f"the teacher {teacher!r}: {error}"
    return None


def write_scores(sample: Sample, scores: Scores) -> None:
    """Put `scores` into `sample`."""
    sample.teacher_logprobs = logprobs_bytes(scores.logprobs)
    if scores.top_ids is not None and scores.top_logprobs is not None:
        sample.teacher_top_ids = ids_bytes(scores.top_ids)
        sample.teacher_top_logprobs = logprobs_bytes(scores.top_logprobs)
    if scores.tail_logprobs is not None:
        sample.teacher_tail_logprobs = logprobs_bytes(scores.tail_logprobs)


def _load_local(settings: Settings, bus: Bus) -> TokenScorer:
    if teacher_engine(settings) == IN_PROCESS:
        from onstream.workers.teacher.vllm.startup import load_vllm  # imports torch

        return load_vllm(settings, bus.images.read)
    from onstream.workers.teacher.local_scorer import load_local  # imports torch

    return load_local(settings, bus.images.read)
