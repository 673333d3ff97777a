"""`onstream health`: whether a worker of this machine is alive, and whether it is at work."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

from onstream.pipeline.errors import Exit
from onstream.pipeline.redis.bus import redis_url
from onstream.pipeline.redis.connection import OUTAGE, Connection
from onstream.pipeline.redis.run_state import RunState, WorkerState
from onstream.settings.root import Settings
from onstream.settings.stages import WorkerKind

PATIENCE_S = 1.0
LIVE_S = 30.0
"""A worker that waits for Redis, or whose machine is busy, may miss some heartbeats."""
READY_S = 10.0


@dataclass(frozen=True)
class Health:
    """The result of a check: the exit code, and why in words."""

    exit: Exit
    message: str


def health(kind: WorkerKind, settings: Settings, *, live: bool, slot: str | None = None) -> Health:
    """Check the heartbeats of the workers of `kind` on this host, or of the one in `slot`.

    Ready: one of them has finished starting and takes records. Live: one of them was heard of
    lately, whatever it does. Where Redis does not answer, a restart would not help, so that counts
    as live. A worker that is stuck in its work ends itself.

    Raises:
        UserError: no Redis is configured, and no `onstream up` runs one.
    """
    try:
        states = _states(kind, settings, slot)
    except OUTAGE as error:
        code = Exit.OK if live else Exit.UNREACHABLE
        return Health(code, f"redis cannot be asked: {error}")
    if not states:
        return Health(Exit.FAILED, f"no {kind} on {socket.gethostname()} has been heard of")
    passes = _is_live if live else _is_ready
    code = Exit.OK if any(passes(state) for state in states) else Exit.FAILED
    newest = min(states, key=lambda state: state.age_s)
    heard = f"heard of {newest.age_s:.1f} s ago"
    return Health(code, f"{newest.worker}: {newest.state}, {heard}; {newest.detail}")


def _states(kind: WorkerKind, settings: Settings, slot: str | None) -> list[WorkerState]:
    connection = Connection(
        redis_url(settings),
        settings.run.name,
        consumer="health",
        block_s=PATIENCE_S,
        connect_timeout_s=PATIENCE_S,
    )
    with contextlib.closing(connection):  # no Bus.connect: a check creates no streams
        heartbeats = RunState(connection).last_heartbeats()
    host = socket.gethostname()
    here = [state for state in heartbeats if state.host == host]
    if slot:
        return [state for state in here if state.worker == f"{kind}-{host}-{slot}"]
    return [state for state in here if state.worker.startswith(f"{kind}-{host}-")]


def _is_live(state: WorkerState) -> bool:
    return state.age_s <= LIVE_S and state.state != "failed"


def _is_ready(state: WorkerState) -> bool:
    return state.age_s <= READY_S and state.state == "running"
