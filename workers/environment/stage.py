"""The worker that plays the environment: it starts episodes, and answers the student's turns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING

from onstream.pipeline.records import Episode, StageName
from onstream.pipeline.stage import Delivery, Outcome, Stats, count_trouble
from onstream.pipeline.tasks import load_task
from onstream.settings.root import Settings
from onstream.workers.environment.episodes import (
    after_step,
    begun,
    episode_seed,
    rollout_of,
    start_request,
    step_request,
)
from onstream.workers.environment.messages import ENDINGS, Played, Request
from onstream.workers.environment.pool import EnvironmentPool

if TYPE_CHECKING:
    from onstream.pipeline.redis.bus import Bus

SLICE_S = 0.05
PROBLEMS_KEPT = 64
"""So that a group's is made once."""


class EnvironmentWorker:
    """Starts an episode for each ticket, and answers each turn of the student.

    - Consumes: tickets, and episodes whose turn the student has had.
    - Waits for: the children that play.
    - Is unblocked by: what they return, and their time limits.
    - Produces: episodes for the generator; rollouts, which are episodes that have ended.

    It holds nothing between two turns: all of an episode is in its record. An environment that is
    stopped ends its episode with the reward 0, and a part that says so; one that fails leaves the
    reward out, and `unscored` says why. An episode that it cannot start is a dead letter.
    """

    name: StageName = "act"
    holds_entries = False

    def __init__(self, settings: Settings, bus: Bus) -> None:
        self._settings = settings
        self._max_turns = settings.task.max_turns
        self._pool = EnvironmentPool(settings)
        self._in_hand: dict[int, Delivery] = {}
        self._keys = count()
        self.stats = Stats(numbers=dict.fromkeys(("turns", "unscored", *ENDINGS), 0.0))

    def setup(self) -> None:
        """Load the task, and start the children, which import the environment.

        Raises:
            UserError: there is no such task or environment.
        """
        self._problem = lru_cache(maxsize=PROBLEMS_KEPT)(load_task(self._settings).train)
        self._pool.start()

    @property
    def room(self) -> int:
        """How many more episodes it takes in hand."""
        return self._pool.room

    @property
    def busy(self) -> bool:
        """Whether children play."""
        return bool(self._in_hand)

    def handle(self, new: Sequence[Delivery]) -> list[Outcome]:
        """Hand out what is new, and collect what the children bring within a moment."""
        outcomes = []
        for delivery in new:
            record = delivery.record
            if isinstance(record, Episode) and record.bound is not None:
                outcomes.append(Outcome(delivery, rollout_of(record)))
            else:
                self._submit(delivery)
        for key, played in self._pool.collect(0 if outcomes else SLICE_S):
            outcomes.append(self._outcome(self._in_hand.pop(key), played))
        return outcomes

    def close(self, *, finished: bool) -> None:
        """End the children. The loop gives back what they had."""
        self._pool.close()
        self._in_hand.clear()

    def _submit(self, delivery: Delivery) -> None:
        key = next(self._keys)
        self._in_hand[key] = delivery
        self._pool.submit(key, self._request(delivery))

    def _request(self, delivery: Delivery) -> Request:
        record = delivery.record
        if isinstance(record, Episode):
            return step_request(record)
        index = delivery.ticket.index
        return start_request(self._problem(index), episode_seed(self._settings.run.seed, index))

    def _outcome(self, delivery: Delivery, played: Played) -> Outcome:
        trouble = "unscored" if played.fault is not None else played.ended_by
        if trouble:
            count_trouble(
                self.stats,
                "an environment did not play as usual",
                trouble,
                delivery.number,
                played.fault,
            )
        record = delivery.record
        if isinstance(record, Episode):
            self.stats.add("turns", 1)
            return Outcome(delivery, after_step(record, played, self._max_turns))
        if trouble:
            reason = played.fault or trouble
            return Outcome(delivery, dead=f"the environment could not start: {reason}")
        info = self._problem(delivery.ticket.index).info
        temperature = self._settings.inference.sampling.temperature
        return Outcome(delivery, begun(delivery.ticket, info, played, temperature))
