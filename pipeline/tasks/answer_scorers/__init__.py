"""Scorers that a settings file names: each compares the answer in a completion with the problem's.

A scorer runs in a process that is killed when it takes too long, so none has a clock of its own.
Text that a student wrote never makes one raise: it is wrong, or it is right. What raises is a
problem whose answer is not of the scorer's kind.
"""

from __future__ import annotations

from importlib import import_module

from onstream.pipeline.tasks.scorers import Scorer
from onstream.settings.extras import missing_by_import

ANSWER_SCORERS = {
    "math": "mathematics",
    "number": "number",
    "choice": "choice",
    "json-schema": "json_schema",
    "regex": "regex",
}
"""By `task.scorer`: the module here whose `score` it is."""
JUDGE = "judge"
"""By `task.scorer`: no function, but a model over HTTP (`orchestrator.judge_model`)."""


def answer_scorer(name: str) -> Scorer:
    """The scorer `name`, one of `ANSWER_SCORERS`.

    Raises:
        UserError: it needs a package that is not installed.
    """
    try:
        module = import_module(f"{__name__}.{ANSWER_SCORERS[name]}")
    except ImportError as error:
        if missing := missing_by_import(error, f"task.scorer = {name!r}"):
            raise missing from error
        raise
    scorer: Scorer = module.score
    return scorer
