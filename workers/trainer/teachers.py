"""Teachers by name, as the trainer sees them: whose a problem is, and who is away."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from itertools import accumulate

from onstream.pipeline.redis.run_state import RunState
from onstream.pipeline.tasks import load_task
from onstream.pipeline.telemetry import get_logger
from onstream.settings.named_teachers import ROWS, teacher_weights
from onstream.settings.root import Settings
from onstream.settings.stages import score_stream

log = get_logger()

LOOK_S = 1.0


def teacher_choice(settings: Settings) -> Callable[[int], str] | None:
    """What gives the teacher of a problem by its index; None where no teacher has a name.

    The row's own, or else one drawn by the weights. It follows from the settings and the index
    alone, so that a problem that is asked again has the teacher that it had.

    Raises:
        UserError: the task cannot be loaded, or a row names no teacher of the run.
    """
    weights = teacher_weights(settings)
    if not weights:
        return None
    task = load_task(settings) if settings.task.name.startswith(ROWS) else None

    def choose(problem: int) -> str:
        named = task.train(problem).teacher if task is not None else None
        return named or drawn_teacher(weights, settings.run.seed, problem)

    return choose


def drawn_teacher(weights: Mapping[str, float], seed: int, problem: int) -> str:
    """A teacher drawn by `weights`, always the same for one `seed` and `problem`."""
    digest = hashlib.blake2b(f"{seed}/teacher/{problem}".encode(), digest_size=8).digest()
    drawn = int.from_bytes(digest, "little") / 2**64 * sum(weights.values())
    bounds = accumulate(weights.values())
    return next(name for name, bound in zip(weights, bounds, strict=True) if drawn < bound)


class AbsentTeachers:
    """Which teachers have no worker that takes rollouts, and what is parked for each.

    Where none has one, the run waits for them all, and nobody counts as absent. Redis is asked at
    most every `LOOK_S` seconds, and not at all where there is one teacher.
    """

    def __init__(self, state: RunState, teachers: tuple[str, ...]) -> None:
        self._state = state
        self._streams = [score_stream(teacher) for teacher in teachers]
        self._parked: dict[str, int] = {}
        self._next_look = 0.0

    def parked(self) -> Mapping[str, int]:
        """How many rollouts wait for each absent teacher, by the name of its stream."""
        if len(self._streams) > 1 and time.monotonic() >= self._next_look:
            self._look()
            self._next_look = time.monotonic() + LOOK_S
        return self._parked

    def _look(self) -> None:
        taking = {beat.stage for beat in self._state.workers() if beat.state != "starting"}
        absent = [stream for stream in self._streams if stream not in taking]
        if len(absent) == len(self._streams):
            absent = []
        backlog = self._state.backlog() if absent else {}
        for stream in set(absent) ^ set(self._parked):
            away = stream in absent
            log.warning(
                "a teacher is away: its rollouts wait, those of the others go on"
                if away
                else "a teacher is there again",
                stream=stream,
            )
        self._parked = {stream: backlog[stream] for stream in absent}
