"""The task `reasoning-gym:<dataset>`: a data set of reasoning-gym, with its own scorer."""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from random import Random
from typing import Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.tasks.base import Draw
from onstream.pipeline.tasks.scorers import Scorer, answer_text
from onstream.settings.extras import missing_package
from onstream.settings.root import Settings

SIZE = 20_000
"""Problems are drawn from so many indices, unless `task.args.size` is set. A few data sets list all
their problems at the start, or accept no larger size.
"""

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def gym_draw(settings: Settings) -> Draw:
    """What draws the problems. `info` has a problem's index, by which the scorer finds the entry.

    Raises:
        UserError: reasoning-gym is not installed, has no such data set, or refuses its
            configuration.
    """
    dataset = _dataset(settings)

    def draw(random: Random) -> tuple[str, dict[str, Any]]:
        index = random.randrange(dataset.size)
        entry = dataset[index]
        return entry["question"], {"answer": entry["answer"], "index": index}

    return draw


def gym_scorer(settings: Settings) -> Scorer:
    """The data set's own scorer, which gets the text in `<answer>…</answer>`, or the answer.

    Raises:
        UserError: as `gym_draw`.
    """
    dataset = _dataset(settings)
    # The rollouts of a group ask for the same entry.
    entry = lru_cache(maxsize=256)(dataset.__getitem__)

    def score(completion: str, info: dict[str, Any]) -> float:
        return float(dataset.score_answer(given_answer(completion), entry(info["index"])))

    return score


def given_answer(completion: str) -> str:
    """The last `<answer>…</answer>` of a completion, or else all that follows its reasoning."""
    answer = answer_text(completion)
    tagged: list[str] = _TAGGED.findall(answer)
    return tagged[-1].strip() if tagged else answer


def _dataset(settings: Settings) -> Any:
    name = settings.task.name.removeprefix("reasoning-gym:")
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise missing_package("reasoning_gym", f"task.name = {settings.task.name}") from error
    import reasoning_gym  # noqa: F401  # importing the package registers its data sets

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)
        raise UserError(
            f"reasoning-gym has no data set {name!r}",
            expected=f"one of its names ({', '.join(near)})",
            next_step="Correct `task.name`.",
        )
    try:
        return create_dataset(name, **{"seed": 0, "size": SIZE, **settings.task.args})
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"`task.args` = {settings.task.args} of {settings.task.name}: {error}",
            expected="fields of the data set's configuration",
            next_step="Correct `task.args`.",
        ) from error
