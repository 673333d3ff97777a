"""A teacher that is the student: it must find every token exactly as likely as the student did, who
saw the pictures.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onstream.pipeline.redis.bus import Bus
from tests.vision.conftest import noise
from tests.vision.test_stages import GROUP, rollouts, shows
from tests.vllm.reference import CLOSE_NATS


def contents_with_pictures() -> list[Any]:
    """Of problems: each picture, all of them together, and none."""
    pictures = [noise(1), noise(2), noise(3, 48, 32)]
    contents = [shows(picture.data_url) for picture in pictures]
    return [*contents, shows(*(one.data_url for one in pictures)), "a"]


def require_own_scores(bus: Bus, problems: int) -> None:
    """Every rollout of `problems` has been scored as the student scored it."""
    scored = rollouts(bus, "train")
    assert bus.state.dead_letters() == [] and len(scored) == GROUP * problems
    gaps = []
    for rollout in scored:
        (sample,) = rollout.samples
        teacher = np.frombuffer(sample.teacher_logprobs or b"", "<f4")
        gaps.append(np.abs(np.frombuffer(sample.generator_logprobs, "<f4") - teacher).max())
        assert sample.teacher_top_ids is not None
    print(f"the teacher and the student differ by at most {max(gaps):.1e} nats")
    assert max(gaps) < CLOSE_NATS
