"""What is done to a run, and when: drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from onstream.settings.stages import WorkerKind

Deed = Literal["kill", "kill redis", "fill redis", "empty redis", "stop trainer"]

LONG: dict[WorkerKind, int] = {"generator": 8, "verifier": 8, "teacher": 7, "trainer": 7, "jobs": 5}
SHORT: dict[WorkerKind, int] = {
    "generator": 2,
    "verifier": 2,
    "teacher": 1,
    "trainer": 2,
    "jobs": 1,
}
LONGEST_DELAY_S = 0.5
EARLY_SHARE = 0.2  # of the kills, those that come while the process starts


@dataclass(frozen=True)
class Blow:
    """`deed` is done `delay_s` after the run has come to `step`; a kill takes a worker of `kind`,
    as soon as there is one if `early`.
    """

    step: int
    deed: Deed
    kind: WorkerKind = "trainer"
    delay_s: float = 0.0
    early: bool = False


def schedule(
    seed: int, kills: Mapping[WorkerKind, int], redis_kills: int, *, empty: int, steps: int
) -> list[Blow]:
    """The blows of one run of `steps` steps, in their order: besides the kills, one full Redis and
    one stopped trainer.

    They are spread over the first nine tenths; the jobs worker's come early enough for its jobs to
    be done by the end.
    """
    draw = random.Random(seed)
    deeds: list[tuple[Deed, WorkerKind]] = [
        ("kill", kind) for kind, count in kills.items() for _ in range(count)
    ]
    deeds += [("kill redis", "trainer")] * redis_kills + [("empty redis", "trainer")] * empty
    deeds += [("fill redis", "trainer"), ("stop trainer", "trainer")]
    draw.shuffle(deeds)
    last = steps * 0.9
    at = sorted(1 + draw.random() * (last - 1) for _ in deeds)
    return [
        Blow(int(step), deed, kind, draw.random() * LONGEST_DELAY_S, draw.random() < EARLY_SHARE)
        for step, (deed, kind) in zip(at, deeds, strict=True)
    ]
