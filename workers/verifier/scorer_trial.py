"""Tries the task's scorer on some problems, before a run depends on it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks.base import Problem
from onstream.settings.root import Settings
from onstream.workers.verifier.scorer_messages import Verdict
from onstream.workers.verifier.scorers import Scorers, scorers_of

WITHIN_S = 10.0
"""A scorer that needs longer is believed: the run itself stops where nothing can be trained on."""
WAIT_S = 0.5
ANSWERS = ("The answer is 42.", "")


def try_scorer(settings: Settings, problems: Sequence[Problem]) -> None:
    """Have the scorer score answers to `problems`, in a process that can be killed, as in the run.

    It may fail on some answers, which are made up but for the right one where it is known.

    Raises:
        UserError: it fails on all of them.
    """
    trials = [(answer, problem) for problem in problems for answer in _answers(problem)]
    scorers = scorers_of(settings, processes=1)
    scorers.start()
    try:
        for key, (answer, problem) in enumerate(trials):
            scorers.score(key, problem.messages, answer, problem.info)
        verdicts = _verdicts(scorers, len(trials))
    finally:
        scorers.close()
    failures = [verdict.unscored for verdict in verdicts if verdict.unscored is not None]
    if len(failures) == len(trials):
        raise UserError(
            f"the scorer failed on all {len(failures)} answers that it was tried on: {failures[0]}",
            expected="a function of a completion and its problem's info that returns a reward",
            next_step="Correct task.scorer, or set orchestrator.verification.enabled = false to "
            "train without rewards.",
        )


def _answers(problem: Problem) -> list[str]:
    answer = problem.info.get("answer")
    return [*ANSWERS] if answer is None else [str(answer), *ANSWERS]


def _verdicts(scorers: Scorers, count: int) -> list[Verdict]:
    """The verdicts up to the first that is no failure of the scorer."""
    verdicts: list[Verdict] = []
    deadline = time.monotonic() + WITHIN_S
    while len(verdicts) < count and time.monotonic() < deadline:
        verdicts += [verdict for _, verdict in scorers.collect(WAIT_S)]
        if any(verdict.unscored is None for verdict in verdicts):
            break
    return verdicts
