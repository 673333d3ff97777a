"""The worker that plays the environment: it starts episodes, and answers the student's turns."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING

from onstream.pipeline.records import Episode, Rollout, StageName
from onstream.pipeline.stage import Delivery, Outcome, Stats, count_trouble
from onstream.pipeline.tasks import load_task
from onstream.settings.root import Settings
from onstream.workers.environment.messages import (
    ENDINGS,
    Played,
    Request,
    StartRequest,
    StepRequest,
)
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
            return StepRequest(record.state, record.messages[-1])
        index = delivery.ticket.index
        problem = self._problem(index)
        return StartRequest(
            problem.messages, problem.info, episode_seed(self._settings.run.seed, index)
        )

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
        return Outcome(delivery, self._started(delivery, played))

    def _started(self, delivery: Delivery, played: Played) -> Episode:
        ticket = delivery.ticket
        return Episode(
            ticket=ticket,
            messages=played.messages,
            info=self._problem(ticket.index).info,
            tools=played.tools,
            state=played.state,
            temperature=self._settings.inference.sampling.temperature,
            route=["generate", *ticket.route],
        )


def after_step(episode: Episode, played: Played, max_turns: int) -> Episode | Rollout:
    """What becomes of `episode` after what was `played`: another turn, or its end.

    It ends where the environment says so, fails or was stopped; where the student's turn was cut
    off; and where it was the last of `max_turns`.
    """
    if played.fault is not None:
        return rollout_of(episode, unscored=f"the environment: {played.fault}")
    if played.ended_by:
        episode.reward = 0.0
        episode.reward_parts = {played.ended_by: 1.0}
        return rollout_of(episode)
    episode.reward += played.reward
    parts = episode.reward_parts
    episode.reward_parts = parts | {
        name: parts.get(name, 0.0) + value for name, value in played.parts.items()
    }
    if played.done or episode.finish_reason == "length":
        return rollout_of(episode)
    if episode.turns >= max_turns:
        episode.bound = "turns"
        return rollout_of(episode)
    episode.messages = [*episode.messages, *played.messages]
    episode.state = played.state
    episode.route = ["generate", *episode.route]
    return episode


def rollout_of(episode: Episode, *, unscored: str | None = None) -> Rollout:
    """The rollout that `episode` ends as.

    Its messages are what came before the student's last turn, whose text is in the last sample.
    Without a reward where the environment failed.
    """
    roles = [message["role"] for message in episode.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant")
    parts = episode.reward_parts
    if episode.bound:
        parts = {**parts, f"out_of_{episode.bound}": 1.0}
    ticket = episode.ticket
    return Rollout(
        number=ticket.number,
        group=ticket.group,
        group_size=ticket.group_size,
        index=ticket.index,
        messages=episode.messages[:last],
        info=episode.info,
        samples=episode.samples,
        temperature=episode.temperature,
        finish_reason="length" if episode.bound else episode.finish_reason,
        route=episode.route,
        timings=episode.timings,
        reward=None if unscored else episode.reward,
        reward_parts=parts,
        unscored=unscored,
    )


def episode_seed(run_seed: int, index: int) -> int:
    """63 bits for the episodes on problem `index`, the same for all members of a group."""
    digest = hashlib.blake2b(f"{run_seed}/episode/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
