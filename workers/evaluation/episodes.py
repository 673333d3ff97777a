"""Plays whole episodes with a model, as a run does, but greedily and in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

from jinja2 import TemplateError
from msgspec.structs import replace

from onstream.pipeline.errors import UserError
from onstream.pipeline.records import Episode, Rollout, Ticket
from onstream.pipeline.tasks import Problem
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.workers.environment.episodes import (
    after_step,
    begun,
    held_out_seed,
    rollout_of,
    start_request,
    step_request,
)
from onstream.workers.environment.messages import Played
from onstream.workers.environment.pool import EnvironmentPool
from onstream.workers.generator.engines.base import Completion, GenerationRequest
from onstream.workers.generator.episode_turns import Turn, episode_turns
from onstream.workers.generator.student import Student

WAIT_S = 1.0

log = get_logger()


@dataclass(frozen=True)
class EndedEpisode:
    """An episode that was played to its end.

    `reward` is None where the environment failed, and `unscored` says why. `turns` are the model's,
    `tool_calls` those that were answered.
    """

    reward: float | None
    unscored: str | None = None
    turns: int = 0
    tool_calls: int = 0


def play_episodes(
    student: Student, settings: Settings, problems: Mapping[str, Problem]
) -> list[EndedEpisode]:
    """Play an episode on each of `problems`, which have names for messages; in their order.

    The environment plays in children that can be killed, as in a run: a step that hangs costs its
    episode, not the evaluation. Closes the student's engine.

    Raises:
        UserError: the environment cannot be loaded, the model's chat template does not render its
            episodes, or there is no room for the first turn of one.
    """
    pool = EnvironmentPool(settings)
    with contextlib.closing(student.engine):
        player = _Player(student, settings, problems, pool)
        pool.start()
        try:
            ended = player.play()
        finally:
            pool.close()
    if unscored := [one.unscored for one in ended if one.unscored]:
        log.warning("episodes without a reward", episodes=len(unscored), reason=unscored[0])
    return ended


class _Player:
    """The episodes that are played, each by its key: the place of its problem.

    An episode waits for the environment, or for the engine to write its turn.
    """

    def __init__(
        self,
        student: Student,
        settings: Settings,
        problems: Mapping[str, Problem],
        pool: EnvironmentPool,
    ) -> None:
        self._engine = student.engine
        self._turns = episode_turns(student, settings)
        self._max_turns = settings.task.max_turns
        self._names = list(problems)
        self._problems = list(problems.values())
        self._pool = pool
        self._stepping: dict[int, Episode] = {}
        self._writing: dict[int, Turn] = {}
        self._ended: dict[int, EndedEpisode] = {}

    def play(self) -> list[EndedEpisode]:
        """Play all of them to their ends."""
        for key, problem in enumerate(self._problems):
            self._pool.submit(key, start_request(problem, held_out_seed(key)))
        while len(self._ended) < len(self._problems):
            if self._engine.active:
                for completion in self._engine.step():
                    self._written(completion)
            for key, played in self._pool.collect(0 if self._engine.active else WAIT_S):
                self._played(key, played)
        return [self._ended[key] for key in range(len(self._problems))]

    def _written(self, completion: Completion) -> None:
        key = completion.key
        episode = self._turns.after(self._writing.pop(key), completion)
        self._stepping[key] = episode
        self._pool.submit(key, step_request(episode))

    def _played(self, key: int, played: Played) -> None:
        before = self._stepping.pop(key, None)
        if before is not None:
            self._go_on(key, after_step(before, played, self._max_turns), before.turns)
        elif trouble := played.fault or played.ended_by:
            reason = f"the environment could not start: {trouble}"
            self._ended[key] = EndedEpisode(None, reason)
        else:
            ticket = Ticket(key + 1, key, 1, key, 0, 0, ["act", "train"])
            self._go_on(key, begun(ticket, self._problems[key].info, played, temperature=0.0), 0)

    def _go_on(self, key: int, record: Episode | Rollout, turns: int) -> None:
        """Have the engine write the next turn, where the episode has one."""
        if isinstance(record, Rollout):
            calls = sum(message["role"] == "tool" for message in record.messages)
            self._ended[key] = EndedEpisode(record.reward, record.unscored, turns, calls)
            return
        try:
            turn = self._turns.next(record)
        except TemplateError as error:
            reason = f"the episode cannot be rendered: {error}"
            self._ended[key] = EndedEpisode(None, reason, turns)
            return
        if isinstance(turn, Turn):
            self._writing[key] = turn
            request = GenerationRequest(
                key, turn.prompt_ids, turn.max_tokens, seed=0, temperature=0.0
            )
            self._engine.add([request])
        elif turns:
            self._go_on(key, rollout_of(replace(record, bound=turn)), turns)
        else:
            raise UserError(
                f"{self._names[key]}: no room for a first turn: {turn}",
                expected="problems shorter than the student's context",
                next_step="Change `[task]`.",
            )
