"""The worker that has rollouts scored by a teacher that runs elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onstream.pipeline.http import EndpointReply, RequestRefused, TokenBudget
from onstream.pipeline.models.tokenizer import has_vision, load_configs
from onstream.pipeline.records import Sample
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.settings.root import Settings
from onstream.settings.stages import StreamName
from onstream.workers.teacher.external.client import TeacherClient
from onstream.workers.teacher.external.endpoint import SECTION
from onstream.workers.teacher.external.score_cache import ScoreCache
from onstream.workers.teacher.scorer import ScoreRequest, Scores
from onstream.workers.teacher.stage import (
    objection,
    request_of,
    scores_problem,
    view_problem,
    write_scores,
)

if TYPE_CHECKING:
    from onstream.workers.teacher.request_images import RequestImages

SLICE_S = 0.02
CACHED = "cache"
"""What `scored_by` says of scores from the cache."""
ScoresFrom = EndpointReply[Scores]


@dataclass
class PendingRollout:
    """A rollout in hand: a request for each of its samples and, in time, the scores."""

    delivery: Delivery
    requests: list[ScoreRequest]
    scored: dict[int, ScoresFrom] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        """The places of the samples without scores."""
        return [at for at in range(len(self.requests)) if at not in self.scored]

    @property
    def tokens(self) -> int:
        """What the missing requests cost, with the one token that each has generated."""
        return sum(self.requests[at].tokens + 1 for at in self.missing)


class ExternalTeacher:
    """Takes rollouts, has their tokens scored over HTTP, many at once, and sends them on.

    Replies are collected by a thread of their own. While no endpoint serves, or the budget of
    tokens is spent, the worker keeps what it holds, takes no more, and says in `stats.detail` what
    it waits for.
    """

    name: StreamName = "score"
    holds_entries = False

    def __init__(self, settings: Settings, bus: Bus, *, name: StreamName = name) -> None:
        """`name` is the stream that it consumes: `score`, or one of a teacher by name."""
        self.name = name
        self._settings = settings
        self._bus = bus
        self._pending: dict[bytes, PendingRollout] = {}
        self._unsent: deque[PendingRollout] = deque()
        """Those of `_pending` that nothing was asked about yet."""
        self._cache: ScoreCache | None = None
        self._images: RequestImages | None = None
        # All keys from the start: the heartbeat's thread reads this, and must not meet a dictionary
        # that grows.
        self.stats = Stats(
            numbers=dict.fromkeys(("in_flight", "endpoints", "cached", "tokens"), 0.0)
        )

    def setup(self) -> None:
        """Check every endpoint against the student.

        Raises:
            UserError: none answers, or one that answers cannot be this run's teacher.
        """
        # A run that was scored before waits for its teacher. One that begins is told of a wrong
        # address at once.
        scored_before = self.name in self._bus.state.ready_stages()
        self._client = TeacherClient(self._settings, patient=scored_before)
        teacher = self._settings.orchestrator.teacher_model
        assert teacher is not None, "the client has checked it"
        setting = f"{SECTION}.client.max_tokens_per_run"
        most = teacher.client.max_tokens_per_run
        self._budget = TokenBudget(self._bus.scores, self.name, most, setting)
        self._budget.open()
        self._images = self._load_images()
        self._update_stats()

    @property
    def room(self) -> int:
        """How many more rollouts it takes: what its endpoints take at once, one request each."""
        if self._unsent or not self._budget.allows():
            return 0
        return max(0, self._client.pool.capacity - len(self._pending))

    @property
    def busy(self) -> bool:
        """Whether replies may come soon."""
        return self._client.pool.serving > 0 and len(self._pending) > len(self._unsent)

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Send what there is to send, and wait for replies for a moment."""
        outcomes = []
        accepted = []
        for delivery in new:
            if reason := self._objection(delivery):
                outcomes.append(Outcome(delivery, dead=reason))
            else:
                accepted.append(delivery)
        self._take(accepted)
        outcomes += self._finished()
        self._send()
        outcomes += self._collect(wait_s=0.0 if outcomes or not self.busy else SLICE_S)
        self._update_stats()
        return outcomes

    def close(self, *, finished: bool) -> None:
        """Drop what is in flight; the loop gives it back."""
        self._client.close()
        if self._images is not None:
            self._images.close()
        self._pending.clear()
        self._unsent.clear()

    def _load_images(self) -> RequestImages | None:
        config, _ = load_configs(self._settings.model.name)
        if not has_vision(config):
            return None
        from onstream.workers.teacher.request_images import RequestImages  # imports torch

        return RequestImages(self._settings, config, self._bus.images.read)

    def _objection(self, delivery: Delivery) -> str | None:
        """Why this rollout cannot be scored; None when it can."""
        teacher = self._client.name
        size = self._client.student.model.vocabulary_size
        if reason := view_problem(delivery.rollout.samples, self._settings):
            return reason
        for sample in delivery.rollout.samples:
            if reason := self._image_problem(sample):
                return f"it would be scored without its images: {reason}"
            request = request_of(sample)
            reason = objection(request, teacher, context_tokens=None, vocabulary_size=size)
            if reason:
                return reason
        return None

    def _image_problem(self, sample: Sample) -> str | None:
        if not sample.images:
            return None
        if self._images is None:
            return f"its prompt shows {len(sample.images)} images, and the student reads none"
        return self._images.problem_with(request_of(sample))

    def _take(self, deliveries: Sequence[Delivery]) -> None:
        """Take rollouts in hand, with the scores that the cache has of them."""
        taken = [self._pending_rollout(delivery) for delivery in deliveries]
        cached = iter(self._from_cache([request for each in taken for request in each.requests]))
        for pending in taken:
            for at in range(len(pending.requests)):
                scores = next(cached)
                if scores is not None:
                    pending.scored[at] = ScoresFrom(scores, CACHED)
            self.stats.add("cached", len(pending.scored))
            self._pending[pending.delivery.entry_id] = pending
            if pending.missing:
                self._unsent.append(pending)

    def _pending_rollout(self, delivery: Delivery) -> PendingRollout:
        requests = [request_of(sample) for sample in delivery.rollout.samples]
        if self._images is not None:
            requests = [self._images.with_fields(request) for request in requests]
        return PendingRollout(delivery, requests)

    def _from_cache(self, requests: Sequence[ScoreRequest]) -> Sequence[Scores | None]:
        if self._cache is None and self._client.reference is not None:
            self._cache = ScoreCache(
                self._bus.scores,
                self._settings.orchestrator.score_cache,
                teacher=self._client.name,
                check_request=self._client.student.check_request,
                reference=self._client.reference,
            )
        if self._cache is None:
            return [None] * len(requests)
        return self._cache.find(requests, self._client.top_k)

    def _send(self) -> None:
        """Ask about every rollout that the budget allows."""
        while self._unsent and self._budget.allows(self._unsent[0].tokens):
            pending = self._unsent.popleft()
            self._budget.spend(pending.tokens)
            for at in pending.missing:
                self._client.send(pending.delivery.entry_id, at, pending.requests[at])
        self._budget.report()

    def _collect(self, wait_s: float) -> list[Outcome]:
        """The outcomes that the replies complete, after waiting up to `wait_s` for the first."""
        outcomes = []
        scored = []
        size = self._client.student.model.vocabulary_size
        for reply in self._client.replies(wait_s):
            pending = self._pending.get(reply.entry_id)
            if pending is None:
                continue  # another sample of this rollout was refused
            try:
                scores = reply.future.result()
            except RequestRefused as refusal:
                del self._pending[reply.entry_id]
                reason = f"the teacher {self._client.name!r}: {refusal}"
                outcomes.append(Outcome(pending.delivery, dead=reason))
                continue
            pending.scored[reply.at] = scores
            if not scores_problem(scores.answer, self._client.name, size):
                scored.append((pending.requests[reply.at], scores.answer))
        if self._cache is not None:
            self._cache.keep(scored)
        return outcomes + self._finished()

    def _finished(self) -> list[Outcome]:
        """The outcomes of the rollouts whose samples all have scores, taken out of hand."""
        done = [pending for pending in self._pending.values() if not pending.missing]
        for pending in done:
            del self._pending[pending.delivery.entry_id]
        return [self._outcome(pending) for pending in done]

    def _outcome(self, pending: PendingRollout) -> Outcome:
        rollout = pending.delivery.rollout
        size = self._client.student.model.vocabulary_size
        for at, sample in enumerate(rollout.samples):
            scores = pending.scored[at].answer
            if problem := scores_problem(scores, self._client.name, size):
                return Outcome(pending.delivery, dead=problem)
            write_scores(sample, scores)
        endpoints = {scored.endpoint for scored in pending.scored.values()}
        rollout.scored_by = ", ".join(sorted(endpoints)) or CACHED
        return Outcome(pending.delivery, rollout)

    def _update_stats(self) -> None:
        pool = self._client.pool
        self.stats.set(in_flight=pool.in_flight, endpoints=pool.serving, tokens=self._budget.own)
        next_tokens = self._unsent[0].tokens if self._unsent else 1
        self.stats.detail = pool.problem or self._budget.problem(next_tokens)
