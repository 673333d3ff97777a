"""The children of an environment worker."""

from __future__ import annotations

from onstream.pipeline.child_processes.messages import Start
from onstream.pipeline.child_processes.pool import ChildPool
from onstream.settings.root import Settings
from onstream.workers.environment.messages import CRASHED, TIMED_OUT, Played, Request

LOADER = "onstream.workers.environment.player:load"


class EnvironmentPool(ChildPool[Request, Played]):
    """Calls the environment within the limits that scorers have, `orchestrator.verification`."""

    def __init__(self, settings: Settings, *, processes: int | None = None) -> None:
        """`processes` stands in for the setting."""
        verification = settings.orchestrator.verification
        super().__init__(
            _start_message(settings),
            reply_type=Played,
            timed_out=TIMED_OUT,
            crashed=CRASHED,
            timeout_s=verification.timeout,
            processes=processes or verification.processes,
        )


def _start_message(settings: Settings) -> Start:
    """What the fork server is told: the settings that an environment needs, and no secrets."""
    own = Settings(task=settings.task, run=settings.run)
    sections = own.model_dump_json(include={"task", "run"})
    max_memory_bytes = settings.orchestrator.verification.max_memory << 20
    return Start(LOADER, "environment", sections.encode(), max_memory_bytes)
