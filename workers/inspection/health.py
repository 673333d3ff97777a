"""`onstream health`: whether the worker of this machine lives, and whether it is at work, told by
an exit code.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

from onstream.pipeline.errors import Exit
from onstream.pipeline.redis.access import redis_url
from onstream.pipeline.redis.connection import OUTAGE, Connection
from onstream.pipeline.redis.run_state import RunState, WorkerState
from onstream.settings.root import Settings
from onstream.settings.stages import WorkerKind

PATIENCE_S = 1.0
LIVE_S = 30.0  # a worker that waits for Redis, or whose machine is busy, may miss some heartbeats
READY_S = 10.0


@dataclass(frozen=True)
class Health:
    """What a check found: the exit code, and why in words."""

    exit: Exit
    words: str


def health(kind: WorkerKind, settings: Settings, *, live: bool, slot: str | None = None) -> Health:
    """Look at the heartbeats of the workers of `kind` on this host, or of the one in `slot`.

    Ready: one of them has finished starting and takes records. Live: one of them was heard of
    lately, whatever it does; where Redis does not answer, a restart would not help, so that counts
    as live. A worker that is stuck in its work ends itself.

    Raises:
        UserError: no Redis is configured, and no `onstream up` runs one.
    """
    try:
        states = _states(kind, settings, slot)
    except OUTAGE as error:
        return Health(Exit.OK if live else Exit.UNREACHABLE, f"redis cannot be asked: {error}")
    if not states:
        return Health(Exit.FAILED, f"no {kind} on {socket.gethostname()} has been heard of")
    newest = min(states, key=lambda state: state.age_s)
    well = any(_lives(state) if live else _is_ready(state) for state in states)
    return Health(
        Exit.OK if well else Exit.FAILED,
        f"{newest.worker}: {newest.state}, heard of {newest.age_s:.1f} s ago; {newest.detail}",
    )


def _states(kind: WorkerKind, settings: Settings, slot: str | None) -> list[WorkerState]:
    url = redis_url(settings)
    connection = Connection(
        url, settings.run.name, consumer="health", block_s=PATIENCE_S, connect_timeout_s=PATIENCE_S
    )
    with contextlib.closing(connection):  # no Bus.connect: a check creates no streams
        name = f"{kind}-{socket.gethostname()}-"
        return [
            state
            for state in RunState(connection).last_heartbeats()
            if state.host == socket.gethostname()
            and (state.worker == name + slot if slot else state.worker.startswith(name))
        ]


def _lives(state: WorkerState) -> bool:
    return state.age_s <= LIVE_S and state.state != "failed"


def _is_ready(state: WorkerState) -> bool:
    return state.age_s <= READY_S and state.state == "running"
