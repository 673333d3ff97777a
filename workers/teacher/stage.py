"""The worker that scores rollouts with a teacher in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from onstream.pipeline.records import Rollout, StageName
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.settings.root import Settings
from onstream.workers.teacher.scorer import TokenScorer, objection, request_of, write_scores

ROOM = 256
"""Rollouts in hand at once: enough for the groups among them to be whole when they come from a busy
stream.
"""
ID_BYTES = 4


class Teacher:
    """Takes rollouts, adds the teacher's logprobs to their samples, and sends them on.

    A call scores about one forward pass of what is in hand, whole groups first, so that siblings
    share the computation of their prompt. Nothing waits for siblings that have not come.
    """

    name: StageName = "score"
    holds_entries = False

    def __init__(
        self, settings: Settings, bus: Bus, load: Callable[[Settings], TokenScorer] | None = None
    ) -> None:
        self.stats = Stats()
        self._settings = settings
        self._load = load or partial(_load_local, bus=bus)
        self._top_k = settings.trainer.loss.teacher_top_k
        # By group, in the order in which the groups came.
        self._in_hand: dict[int, list[Delivery]] = {}

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
            if reason := self._objection(delivery):
                refused.append(Outcome(delivery, dead=reason))
            else:
                self._take(delivery)
        return refused + self._score(self._next_slice())

    def close(self, *, finished: bool) -> None:
        """Forget what is in hand; the loop gives it back."""
        self._in_hand.clear()
        self._scorer.close()

    def _objection(self, delivery: Delivery) -> str | None:
        """Why this rollout cannot be scored; None when it can."""
        for sample in delivery.rollout.samples:
            reason = objection(
                sample,
                self._scorer.name,
                context_tokens=self._scorer.context_tokens,
                vocabulary_size=self._scorer.vocabulary_size,
            )
            if reason:
                return reason
        return None

    def _take(self, delivery: Delivery) -> None:
        rollout = delivery.rollout
        for sample in rollout.samples:
            self._scorer.prefetch_images(request_of(sample))
        self._in_hand.setdefault(rollout.group, []).append(delivery)

    def _next_slice(self) -> list[Delivery]:
        """About one forward pass of rollouts, taken out of hand.

        Groups go in the order in which they came; at least one rollout is taken.
        """
        taken: list[Delivery] = []
        tokens = 0
        budget = self._settings.teacher_inference.max_batch_tokens
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
        outcomes = []
        scorable = []
        for delivery in deliveries:
            if reason := self._image_problem(delivery.rollout):
                dead = f"it would be scored without its images: {reason}"
                outcomes.append(Outcome(delivery, dead=dead))
            else:
                scorable.append(delivery)
        self._add_scores([delivery.rollout for delivery in scorable])
        return outcomes + [Outcome(delivery, delivery.rollout) for delivery in scorable]

    def _image_problem(self, rollout: Rollout) -> str | None:
        for sample in rollout.samples:
            if reason := self._scorer.image_problem(request_of(sample)):
                return reason
        return None

    def _add_scores(self, rollouts: Sequence[Rollout]) -> None:
        samples = [sample for rollout in rollouts for sample in rollout.samples]
        if samples:
            requests = [request_of(sample) for sample in samples]
            scored = self._scorer.score(requests, top_k=self._top_k)
            for sample, scores in zip(samples, scored, strict=True):
                write_scores(sample, scores)
        for rollout in rollouts:
            rollout.scored_by = self._scorer.name


def _load_local(settings: Settings, bus: Bus) -> TokenScorer:
    from onstream.workers.teacher.local_scorer import load_local  # imports torch

    return load_local(settings, bus.images.read)


def _prompt_tokens(delivery: Delivery) -> int:
    samples = delivery.rollout.samples
    return sum(len(sample.prompt_ids) for sample in samples) // ID_BYTES


def _completion_tokens(delivery: Delivery) -> int:
    samples = delivery.rollout.samples
    return sum(len(sample.completion_ids) for sample in samples) // ID_BYTES
