"""The worker that verifies rollouts: it has the task's scorer score each answer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING

from onstream.pipeline.records import StageName
from onstream.pipeline.stage import Delivery, Outcome, Stats, count_trouble
from onstream.settings.root import Settings
from onstream.workers.verifier.scorer_messages import Verdict
from onstream.workers.verifier.scorer_pool import final_answer, within_bounds, write_verdict
from onstream.workers.verifier.scorers import scorers_of
from onstream.workers.verifier.verification_jobs import SLOW_S, VerificationJobs

if TYPE_CHECKING:
    from onstream.pipeline.redis.bus import Bus

SLICE_S = 0.05
ZERO_REWARD_PARTS = ("timed_out", "crashed", "rollout_error")
"""The parts that say why a reward is 0 although the scorer gave none."""


class Verifier:
    """Takes rollouts, adds a reward or the reason why there is none, and sends them on.

    A rollout that ran past its time limit, ended its process or was refused by the scorer gets the
    reward 0 and a part that says so. One whose scorer failed, or gave a reward out of bounds, gets
    no reward, and `unscored` says why.
    """

    name: StageName = "verify"
    holds_entries = False

    def __init__(self, settings: Settings, bus: Bus) -> None:
        verification = settings.orchestrator.verification
        self._verification = verification
        self._in_jobs = verification.in_jobs
        self._jobs: VerificationJobs | None = None
        if self._in_jobs != "never":
            self._jobs = VerificationJobs(settings, bus, bus.connection.url)
        # A rollout that turns out to be slow here starts anew as a job, with its whole time.
        self._hands_over = self._in_jobs == "slow" and verification.timeout > SLOW_S
        self._scorers = scorers_of(settings, bus, timeout_s=SLOW_S if self._hands_over else None)
        self._in_hand: dict[int, Delivery] = {}
        self._keys = count()
        self.stats = Stats(numbers=dict.fromkeys(("unscored", *ZERO_REWARD_PARTS), 0.0))
        if self._jobs is not None:
            self.stats.set(in_jobs=0.0)

    def setup(self) -> None:
        """Start the scorer's processes, or check the judge's endpoints.

        Raises:
            UserError: the scorer cannot be imported, the task does not exist, or no judge answers.
        """
        self._scorers.start()

    @property
    def room(self) -> int:
        """How many more rollouts it takes in hand."""
        if self._jobs is None:
            return self._scorers.room
        if self._in_jobs == "always":
            return self._jobs.room
        return min(self._scorers.room, self._jobs.room)

    @property
    def busy(self) -> bool:
        """Whether scorers have rollouts."""
        return bool(self._in_hand)

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Hand out the new rollouts, and collect the verdicts that come within a moment."""
        for delivery in new:
            self._submit(delivery)
        outcomes = self._from_scorers()
        if self._jobs is not None:
            outcomes += self._from_jobs(self._jobs)
        return outcomes

    def close(self, *, finished: bool) -> None:
        """End the scorer processes. The loop gives back what they had; jobs go on."""
        self._scorers.close()
        self._in_hand.clear()
        if self._jobs is not None:
            self._jobs.close()

    def _submit(self, delivery: Delivery) -> None:
        rollout = delivery.rollout
        marked_slow = rollout.info.get("slow") is True
        if self._jobs is not None and (self._in_jobs == "always" or marked_slow):
            self._jobs.submit(delivery)
            return
        key = next(self._keys)
        self._in_hand[key] = delivery
        self._scorers.score(key, rollout.messages, final_answer(rollout), rollout.info)

    def _from_scorers(self) -> list[Outcome]:
        outcomes = []
        for key, verdict in self._scorers.collect(SLICE_S):
            delivery = self._in_hand.pop(key)
            if self._jobs is not None and self._hands_over and "timed_out" in verdict.parts:
                self._jobs.submit(delivery)
            else:
                outcomes.append(self._outcome(delivery, verdict))
        self.stats.detail = self._scorers.problem
        return outcomes

    def _from_jobs(self, jobs: VerificationJobs) -> list[Outcome]:
        outcomes = jobs.collect()
        self.stats.detail = self._scorers.problem or jobs.waits
        self.stats.set(in_jobs=len(jobs))
        return outcomes

    def _outcome(self, delivery: Delivery, verdict: Verdict) -> Outcome:
        rollout = delivery.rollout
        verdict = within_bounds(verdict, self._verification)
        write_verdict(rollout, verdict)
        if trouble := _trouble(verdict):
            count_trouble(
                self.stats,
                "a rollout could not be scored as usual",
                trouble,
                delivery.number,
                verdict.unscored,
            )
        return Outcome(delivery, rollout)


def _trouble(verdict: Verdict) -> str | None:
    """What went wrong in scoring, by the name of its count; None where nothing did."""
    if verdict.unscored is not None:
        return "unscored"
    return next((name for name in ZERO_REWARD_PARTS if name in verdict.parts), None)
