"""The worker that verifies rollouts: the task's scorer judges each answer, in a child process that
can be killed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING

from onstream.pipeline.records import Rollout, StageName
from onstream.pipeline.stage import Delivery, Outcome, Stats
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.workers.verifier.scorer_messages import Verdict
from onstream.workers.verifier.scorer_pool import ScorerPool
from onstream.workers.verifier.verification_jobs import (
    SLOW_S,
    VerificationJobs,
    final_answer,
    write_verdict,
)

if TYPE_CHECKING:
    from onstream.pipeline.redis.streams import Bus

SLICE_S = 0.05
FORCED_ZERO = ("timed_out", "crashed", "rollout_error")

log = get_logger()


class Verifier:
    """Takes rollouts, adds a reward and its parts, or the reason why there is none, and sends them
    on.

    A rollout that ran past its time limit, ended its process or was refused by the scorer has the
    reward 0 and a part that says so. One whose scorer failed has no reward, and `unscored` says
    why.
    """

    name: StageName = "verify"
    holds_entries = False

    def __init__(self, settings: Settings, bus: Bus) -> None:
        self._trouble = Counter[str]()
        self._in_jobs = settings.orchestrator.verification.in_jobs
        self._jobs = VerificationJobs(settings, bus, bus.url) if self._in_jobs != "never" else None
        # All keys from the start: the heartbeat's thread reads this, and must not meet a dictionary
        # that grows.
        self.stats = Stats(
            numbers=dict.fromkeys(
                ("unscored", *FORCED_ZERO, *(["in_jobs"] if self._jobs is not None else [])), 0.0
            )
        )
        # In jobs a rollout starts anew with the whole time, when it has turned out to be slow here.
        self._hands_over = (
            self._in_jobs == "slow" and settings.orchestrator.verification.timeout > SLOW_S
        )
        self._children = ScorerPool(settings, timeout_s=SLOW_S if self._hands_over else None)
        self._in_hand: dict[int, Delivery] = {}
        self._keys = count()

    def setup(self) -> None:
        """Import the scorer and start the children.

        Raises:
            UserError: the scorer cannot be imported, or the task does not exist.
        """
        self._children.start()

    @property
    def room(self) -> int:
        """How many more rollouts it takes in hand."""
        if self._jobs is None:
            return self._children.room
        return (
            self._jobs.room
            if self._in_jobs == "always"
            else min(self._children.room, self._jobs.room)
        )

    @property
    def busy(self) -> bool:
        """Whether rollouts are in children's hands."""
        return bool(self._in_hand)

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Hand out the new rollouts, and collect the verdicts that come within a moment."""
        for delivery in new:
            if self._jobs is not None and (
                self._in_jobs == "always" or _rollout(delivery).info.get("slow") is True
            ):
                self._jobs.submit(delivery)
            else:
                self._submit(delivery)
        outcomes = []
        for key, verdict in self._children.collect(SLICE_S):
            delivery = self._in_hand.pop(key)
            if self._jobs is not None and self._hands_over and "timed_out" in verdict.parts:
                self._jobs.submit(delivery)
            else:
                outcomes.append(self._outcome(delivery, verdict))
        return outcomes + self._from_jobs()

    def close(self, *, finished: bool) -> None:
        """End the children. The loop gives back what they had in hand; jobs go on."""
        self._children.close()
        self._in_hand.clear()
        if self._jobs is not None:
            self._jobs.close()

    def _from_jobs(self) -> list[Outcome]:
        if self._jobs is None:
            return []
        outcomes = self._jobs.collect()
        self.stats.detail, self.stats.numbers["in_jobs"] = self._jobs.waits, len(self._jobs)
        return outcomes

    def _submit(self, delivery: Delivery) -> None:
        rollout = _rollout(delivery)
        key = next(self._keys)
        self._in_hand[key] = delivery
        self._children.submit(key, final_answer(rollout), rollout.info)

    def _outcome(self, delivery: Delivery, verdict: Verdict) -> Outcome:
        rollout = _rollout(delivery)
        write_verdict(rollout, verdict)
        trouble = (
            "unscored"
            if verdict.unscored is not None
            else next((name for name in FORCED_ZERO if name in verdict.parts), None)
        )
        if trouble is not None:
            self._note(trouble, delivery.number, verdict.unscored)
        return Outcome(delivery, rollout)

    def _note(self, trouble: str, number: int, reason: str | None) -> None:
        """Count it, and log the 1st, 2nd, 4th, 8th … of its kind: a scorer that always fails must
        not flood the log.
        """
        self._trouble[trouble] += 1
        self.stats.numbers[trouble] = times = self._trouble[trouble]
        if times & (times - 1) == 0:
            log.warning(
                "a rollout could not be scored as usual",
                number=number,
                what=trouble,
                reason=reason,
                times=times,
            )


def _rollout(delivery: Delivery) -> Rollout:
    assert isinstance(delivery.record, Rollout)
    return delivery.record
