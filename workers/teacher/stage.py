"""The worker that scores rollouts: every token that the student wrote, under the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from onstream.pipeline.records import StageName
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome
from onstream.settings.root import Settings
from onstream.workers.teacher.score_requests import objection, request_of, rollout_of, write
from onstream.workers.teacher.scorer import TokenScorer

ROOM = 256
"""Rollouts in hand at once: enough that the groups among them are whole when they come from a busy
stream.
"""


class Teacher:
    """Takes rollouts, adds the teacher's logprobs to their samples, and sends them on.

    What is in hand is scored whole groups first come, up to a forward pass a call, so that siblings
    share the computation of their prompt. Nothing waits for siblings that have not come.
    """

    name: StageName = "score"
    holds_entries = False

    def __init__(
        self, settings: Settings, bus: Bus, load: Callable[[Settings], TokenScorer] | None = None
    ) -> None:
        self._settings = settings
        self._load = load or partial(_load_local, bus=bus)
        self._top_k = settings.trainer.loss.teacher_top_k
        self._in_hand: dict[
            int, list[Delivery]
        ] = {}  # by group, in the order of their first arrival

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
        refused = [
            Outcome(delivery, dead=reason)
            for delivery in new
            if (reason := self._objection(delivery))
        ]
        objected = {outcome.delivery.entry_id for outcome in refused}
        for delivery in new:
            if delivery.entry_id not in objected:
                for sample in rollout_of(delivery).samples:
                    self._scorer.prefetch_images(request_of(sample))
                self._in_hand.setdefault(_group(delivery), []).append(delivery)
        return refused + self._score(self._next_slice())

    def close(self, *, finished: bool) -> None:
        """Forget what is in hand; the loop gives it back."""
        self._in_hand.clear()
        self._scorer.close()

    def _objection(self, delivery: Delivery) -> str | None:
        """Why this rollout cannot be scored, in words; None when it can."""
        name = self._scorer.name
        context = self._scorer.context_tokens
        size = self._scorer.vocabulary_size
        reasons = (
            objection(sample, name, context_tokens=context, vocabulary_size=size)
            for sample in rollout_of(delivery).samples
        )
        return next((reason for reason in reasons if reason), None)

    def _next_slice(self) -> list[Delivery]:
        """Takes about one forward pass of rollouts out of hand, group by group, oldest group first;
        at least one rollout.
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
        seen = []
        for delivery in deliveries:
            reasons = (
                self._scorer.image_problem(request_of(sample))
                for sample in rollout_of(delivery).samples
            )
            if reason := next((reason for reason in reasons if reason), None):
                outcomes.append(Outcome(delivery, dead=f"it would be scored blind: {reason}"))
            else:
                seen.append(delivery)
        samples = [sample for delivery in seen for sample in rollout_of(delivery).samples]
        if samples:
            scored = self._scorer.score(
                [request_of(sample) for sample in samples], top_k=self._top_k
            )
            for sample, scores in zip(samples, scored, strict=True):
                write(sample, scores)
        for delivery in seen:
            rollout_of(delivery).scored_by = self._scorer.name
        return outcomes + [Outcome(delivery, rollout_of(delivery)) for delivery in seen]


def _load_local(settings: Settings, bus: Bus) -> TokenScorer:
    from onstream.workers.teacher.local_setup import (
        load_local,  # torch is imported by the worker that needs it alone
    )

    return load_local(settings, bus.images.read)


def _group(delivery: Delivery) -> int:
    return rollout_of(delivery).group


def _prompt_tokens(delivery: Delivery) -> int:
    return sum(len(sample.prompt_ids) for sample in rollout_of(delivery).samples) // 4


def _completion_tokens(delivery: Delivery) -> int:
    return sum(len(sample.completion_ids) for sample in rollout_of(delivery).samples) // 4
