"""The worker that has rollouts scored by a teacher that runs elsewhere."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onstream.pipeline.errors import UserError
from onstream.pipeline.http import (
    EndpointPool,
    EndpointReply,
    EventLoopThread,
    RequestRefused,
    TokenBudget,
)
from onstream.pipeline.models.tokenizer import has_vision, load_configs
from onstream.pipeline.records import Sample, StageName
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.settings.root import Settings
from onstream.workers.teacher.external.endpoint import TeacherEndpoint
from onstream.workers.teacher.external.endpoint_check import SECTION, EndpointCheck
from onstream.workers.teacher.external.score_cache import ScoreCache
from onstream.workers.teacher.external.student_info import load_student_info
from onstream.workers.teacher.score_requests import objection, request_of, rollout_of, write
from onstream.workers.teacher.scorer import ScoreRequest, Scores

if TYPE_CHECKING:
    from onstream.workers.teacher.external.request_images import RequestImages

SLICE_S = 0.02
CACHED = "cache"
"""What `scored_by` says of scores that were kept from before."""
Scored = EndpointReply[Scores]


@dataclass
class Job:
    """A rollout in hand: a request and, in time, the scores for each of its samples."""

    delivery: Delivery
    requests: list[ScoreRequest]
    scored: dict[int, Scored] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """What sending the requests still without scores takes, the one token that each generates
        included.
        """
        return sum(
            request.tokens + 1 for at, request in enumerate(self.requests) if at not in self.scored
        )


Reply = tuple[
    bytes, int, Future[Scored]
]  # the entry, the sample of its rollout, and what came of it


class ExternalTeacher:
    """Takes rollouts, has their tokens scored over HTTP, many at once, and sends them on.

    Waits for replies, which a thread of its own collects. While no endpoint serves it keeps what it
    holds and takes no more, and `stats.detail` says what it waits for; past its budget of tokens
    the same.
    """

    name: StageName = "score"
    holds_entries = False

    def __init__(self, settings: Settings, bus: Bus) -> None:
        # All keys from the start: the heartbeat's thread reads this, and must not meet a dictionary
        # that grows.
        self.stats = Stats(
            numbers=dict.fromkeys(("in_flight", "endpoints", "cached", "tokens"), 0.0)
        )
        self._settings = settings
        self._bus = bus
        self._jobs: dict[bytes, Job] = {}
        self._unasked: deque[Job] = deque()  # those of _jobs that nothing was asked about yet
        self._replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._cache: ScoreCache | None = None
        self._sight: RequestImages | None = None

    def setup(self) -> None:
        """Ask every endpoint all that must hold before it may judge the student.

        Raises:
            UserError: none answers, or one that answers cannot be this run's teacher.
        """
        teacher = self._settings.orchestrator.teacher_model
        if teacher is None or not teacher.client.base_url or not teacher.model.name:
            raise UserError(
                f"no {SECTION} with a client.base_url and a model.name",
                expected="the address and the model of an external teacher",
                next_step=f'Set {SECTION}.client.base_url = ["http://…/v1"] and {SECTION}.model.name.',
            )
        self._teacher, self._student = teacher, load_student_info(self._settings)
        self._top_k = min(
            self._settings.trainer.loss.teacher_top_k, self._student.model.vocabulary_size - 1
        )
        self._background, self._check_endpoint = (
            EventLoopThread(),
            EndpointCheck(self._student, teacher, self._top_k),
        )
        self._pool = EndpointPool(
            teacher.client,
            TeacherEndpoint,
            model=teacher.model.name,
            section=SECTION,
            check=self._check_endpoint,
            conclusive=True,
        )
        self._budget = TokenBudget(
            self._bus.scores,
            self.name,
            teacher.client.max_tokens_per_run,
            f"{SECTION}.client.max_tokens_per_run",
        )
        try:
            # A run that was scored before waits for its teacher; one that begins is told of a wrong
            # address at once.
            self._background.run(self._pool.open(patient="score" in self._bus.state.ready_stages()))
        except BaseException:
            self._background.stop(self._pool.close)
            raise
        self._budget.open()
        self._sight = self._sight_of()
        self._tell()

    @property
    def room(self) -> int:
        """How many more rollouts it takes: a request for each of those that its endpoints may be
        sent at once.
        """
        if self._unasked or not self._budget.allows():
            return 0
        return max(0, self._pool.capacity - len(self._jobs))

    @property
    def busy(self) -> bool:
        """Whether replies may come soon."""
        return self._pool.serving > 0 and len(self._jobs) > len(self._unasked)

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Send what there is to send, and wait for replies for a moment."""
        outcomes = [
            Outcome(delivery, dead=reason)
            for delivery in new
            if (reason := self._objection(delivery))
        ]
        refused = {outcome.delivery.entry_id for outcome in outcomes}
        self._take([delivery for delivery in new if delivery.entry_id not in refused])
        outcomes += self._finished()
        self._send()
        outcomes += self._collect(wait_s=0.0 if outcomes or not self.busy else SLICE_S)
        self._tell()
        return outcomes

    def close(self, *, finished: bool) -> None:
        """Drop what is in flight; the loop gives it back."""
        self._background.stop(self._pool.close)
        if self._sight is not None:
            self._sight.close()
        self._jobs.clear()
        self._unasked.clear()

    def _sight_of(self) -> RequestImages | None:
        config, _ = load_configs(self._settings.model.name)
        if not has_vision(config):
            return None
        from onstream.workers.teacher.external.request_images import RequestImages  # imports torch

        return RequestImages(self._settings, config, self._bus.images.read)

    def _objection(self, delivery: Delivery) -> str | None:
        name = self._teacher.model.name
        size = self._student.model.vocabulary_size
        samples = rollout_of(delivery).samples
        if shown := sum(len(sample.images) for sample in samples):
            if self._sight is None:
                return f"it would be scored blind: its prompt shows {shown} images, and the student reads none"
            if reason := next(
                (reason for sample in samples if (reason := self._sight.objection(sample))), None
            ):
                return f"it would be scored blind: {reason}"
        reasons = (
            objection(sample, name, context_tokens=None, vocabulary_size=size) for sample in samples
        )
        return next((reason for reason in reasons if reason), None)

    def _take(self, deliveries: Sequence[Delivery]) -> None:
        """Take rollouts in hand, with the scores that are known of them."""
        jobs = [
            Job(delivery, [self._request_of(sample) for sample in rollout_of(delivery).samples])
            for delivery in deliveries
        ]
        requests = [request for job in jobs for request in job.requests]
        known = iter(self._known(requests))
        for job in jobs:
            found = {
                at: scores for at in range(len(job.requests)) if (scores := next(known)) is not None
            }
            job.scored = {at: Scored(scores, CACHED) for at, scores in found.items()}
            self.stats.numbers["cached"] += len(found)
            self._jobs[job.delivery.entry_id] = job
            if job.tokens:
                self._unasked.append(job)

    def _request_of(self, sample: Sample) -> ScoreRequest:
        return request_of(sample) if self._sight is None else self._sight.request_of(sample)

    def _known(self, requests: Sequence[ScoreRequest]) -> Sequence[Scores | None]:
        if self._cache is None and self._check_endpoint.reference is not None:
            self._cache = ScoreCache(
                self._bus.scores,
                self._settings.orchestrator.score_cache,
                teacher=self._teacher.model.name,
                top_k=self._top_k,
                probe=self._student.check_request,
                reference=self._check_endpoint.reference,
            )
        return [None] * len(requests) if self._cache is None else self._cache.find(requests)

    def _send(self) -> None:
        """Ask about every rollout that the budget allows."""
        while self._unasked and self._budget.allows(self._unasked[0].tokens):
            job = self._unasked.popleft()
            self._budget.spend(job.tokens)
            for at, request in enumerate(job.requests):
                if at not in job.scored:
                    self._ask(job.delivery.entry_id, at, request)
        self._budget.report()

    def _ask(self, entry_id: bytes, at: int, request: ScoreRequest) -> None:
        model = self._teacher.model.name
        top_k = self._top_k
        future = self._background.submit(
            self._pool.ask(lambda endpoint: endpoint.score(request, model, top_k))
        )
        future.add_done_callback(lambda done: self._replies.put((entry_id, at, done)))

    def _collect(self, wait_s: float) -> list[Outcome]:
        """The outcomes that the replies complete, after waiting up to `wait_s` for the first."""
        outcomes = []
        kept = []
        for entry_id, at, future in self._arrived(wait_s):
            if (job := self._jobs.get(entry_id)) is None:
                continue  # another sample of this rollout was refused
            try:
                job.scored[at] = future.result()
            except RequestRefused as refusal:
                outcomes.append(
                    Outcome(
                        self._jobs.pop(entry_id).delivery,
                        dead=f"the teacher {self._teacher.model.name!r}: {refusal}",
                    )
                )
                continue
            kept.append((job.requests[at], job.scored[at].answer))
        if self._cache is not None:
            self._cache.keep(kept)
        return outcomes + self._finished()

    def _arrived(self, wait_s: float) -> list[Reply]:
        replies: list[Reply] = []
        try:
            while True:
                replies.append(
                    self._replies.get(timeout=wait_s)
                    if wait_s and not replies
                    else self._replies.get_nowait()
                )
        except queue.Empty:
            return replies

    def _finished(self) -> list[Outcome]:
        """The rollouts in hand whose samples all have scores, taken out of hand."""
        done = [job for job in self._jobs.values() if len(job.scored) == len(job.requests)]
        return [self._outcome(self._jobs.pop(job.delivery.entry_id)) for job in done]

    def _outcome(self, job: Job) -> Outcome:
        rollout = rollout_of(job.delivery)
        size = self._student.model.vocabulary_size
        for at, sample in enumerate(rollout.samples):
            scores = job.scored[at].answer
            if scores.top_ids is not None and scores.top_ids.max() >= size:
                reason = f"the teacher finds token {scores.top_ids.max()} likely, and the student knows 0 to {size - 1}"
                return Outcome(job.delivery, dead=reason)
            write(sample, scores)
        rollout.scored_by = (
            ", ".join(sorted({scored.endpoint for scored in job.scored.values()})) or CACHED
        )
        return Outcome(job.delivery, rollout)

    def _tell(self) -> None:
        numbers = {
            "in_flight": self._pool.in_flight,
            "endpoints": self._pool.serving,
            "tokens": self._budget.own,
        }
        self.stats.numbers.update({name: float(number) for name, number in numbers.items()})
        self.stats.detail = self._pool.problem or self._budget.problem(
            self._unasked[0].tokens if self._unasked else 1
        )
