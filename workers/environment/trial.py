"""Tries the environment on some problems, before a run depends on it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks.base import Problem
from onstream.settings.root import Settings
from onstream.workers.environment.messages import Played, StartRequest
from onstream.workers.environment.pool import EnvironmentPool

WITHIN_S = 10.0
"""An environment that needs longer is believed."""
WAIT_S = 0.5


def try_environment(settings: Settings, problems: Sequence[Problem]) -> None:
    """Have the environment start an episode on each of `problems`, in a child as in the run.

    Raises:
        UserError: it cannot be imported, or it starts none of them.
    """
    pool = EnvironmentPool(settings, processes=1)
    pool.start()
    started: list[Played] = []
    try:
        for key, problem in enumerate(problems):
            pool.submit(key, StartRequest(problem.messages, problem.info, seed=key))
        deadline = time.monotonic() + WITHIN_S
        while len(started) < len(problems) and time.monotonic() < deadline:
            started += [played for _, played in pool.collect(WAIT_S)]
    finally:
        pool.close()
    failures = [played.fault or played.ended_by for played in started]
    if failures and all(failures):
        raise UserError(
            f"the environment started none of {len(failures)} episodes: {failures[0]}",
            expected="`start(problem, seed)` that returns a Started",
            next_step="Correct task.environment; docs/environments.md has an example.",
        )
