"""Scores a reversed text by how much of it is in place."""

import re
from difflib import SequenceMatcher
from typing import Any

TAGGED = re.compile(r"<reversed_text>(.*?)</reversed_text>", re.DOTALL)


def score(completion: str, info: dict[str, Any]) -> dict[str, float]:
    """The likeness, from 0 to 1, of the text in the tags and the right one, by matching blocks.

    Nothing without tags. `exact` is shown, and is no part of the reward.
    """
    tagged = TAGGED.findall(completion)
    given = tagged[-1].strip() if tagged else ""
    alike = SequenceMatcher(None, given, info["answer"], autojunk=False).ratio()
    return {"reward": alike, "exact": float(given == info["answer"])}
