"""The worker that verifies rollouts: the task's scorer judges each answer, in a child process that can be killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING

from pipeline.records import Rollout, StageName
from pipeline.stage import Delivery, Outcome, Stats
from pipeline.telemetry import get_logger
from settings.root import Settings
from workers.verifier.children import Children
from workers.verifier.wire import Verdict

if TYPE_CHECKING:
    from pipeline.streams import Bus

SLICE_S = 0.05
FORCED_ZERO = ("timed_out", "crashed", "rollout_error")

log = get_logger()


class Verifier:
    """Takes rollouts, adds a reward and its parts, or the reason why there is none, and sends them on.

    A rollout that ran past its time limit, ended its process or was refused by the scorer has the reward 0 and a part
    that says so. One whose scorer failed has no reward, and `unscored` says why.
    """

    name: StageName = "verify"
    holds_entries = False

    def __init__(self, settings: Settings, bus: Bus) -> None:
        self._trouble = Counter[str]()
        # All keys from the start: the heartbeat's thread reads this, and must not meet a dictionary that grows.
        self.stats = Stats(numbers=dict.fromkeys(("unscored", *FORCED_ZERO), 0.0))
        self._children = Children(settings)
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
        return self._children.room

    @property
    def busy(self) -> bool:
        """Whether rollouts are in hand."""
        return bool(self._in_hand)

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Hand out the new rollouts, and collect the verdicts that come within a moment."""
        for delivery in new:
            self._submit(delivery)
        return [self._outcome(self._in_hand.pop(key), verdict) for key, verdict in self._children.collect(SLICE_S)]

    def close(self, *, finished: bool) -> None:
        """End the children. The loop gives back what they had in hand."""
        self._children.close()
        self._in_hand.clear()

    def _submit(self, delivery: Delivery) -> None:
        rollout, key = _rollout(delivery), next(self._keys)
        self._in_hand[key] = delivery
        # Of several samples the last holds the final answer: it comes after every tool's.
        self._children.submit(key, rollout.samples[-1].completion_text if rollout.samples else "", rollout.info)

    def _outcome(self, delivery: Delivery, verdict: Verdict) -> Outcome:
        rollout = _rollout(delivery)
        rollout.reward, rollout.reward_parts, rollout.unscored = verdict.reward, verdict.parts, verdict.unscored
        trouble = "unscored" if verdict.unscored is not None else next((name for name in FORCED_ZERO if name in verdict.parts), None)
        if trouble is not None:
            self._note(trouble, delivery.number, verdict.unscored)
        return Outcome(delivery, rollout)

    def _note(self, trouble: str, number: int, reason: str | None) -> None:
        """Count it, and log the 1st, 2nd, 4th, 8th … of its kind: a scorer that always fails must not flood the log."""
        self._trouble[trouble] += 1
        self.stats.numbers[trouble] = times = self._trouble[trouble]
        if times & (times - 1) == 0:
            log.warning("a rollout could not be scored as usual", number=number, what=trouble, reason=reason, times=times)


def _rollout(delivery: Delivery) -> Rollout:
    assert isinstance(delivery.record, Rollout)
    return delivery.record
