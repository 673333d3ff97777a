"""Whether a run has ended, for a process that may have started before the run was resumed."""

from __future__ import annotations

import structlog

from onstream.pipeline.redis.run_state import RunState

log = structlog.get_logger(__name__)


class RunEnd:
    """Tells the end of a run of `max_steps` steps from an earlier end that is about to be undone.

    A run that had ended goes on when it is given more steps, but only its trainer reopens it. Its
    other workers may be up before that, and must not leave because of the earlier end. So an end
    that was there at the first look, with fewer steps than `max_steps`, does not count. Any later
    one does.
    """

    def __init__(self, state: RunState, max_steps: int = 0) -> None:
        self._state = state
        self._max_steps = max_steps
        self._looked = False
        self._earlier: int | None = None

    def reached(self) -> bool:
        """Whether the run has ended."""
        finished_by = self._state.finished_by()
        if not self._looked:
            self._first_look(finished_by)
            self._looked = True  # only now: the look may fail with Redis, and is repeated then
        if finished_by is None:
            self._earlier = None
        return finished_by is not None and finished_by != self._earlier

    def _first_look(self, finished_by: int | None) -> None:
        policy = self._state.newest_policy()
        if finished_by is None or policy is None or policy.number >= self._max_steps:
            return
        self._earlier = finished_by
        log.info(
            "the run had ended, and shall have more steps; waiting for its trainer to go on",
            ended_at_step=policy.number,
            max_steps=self._max_steps,
        )
