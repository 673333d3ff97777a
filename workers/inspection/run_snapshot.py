"""A run as Redis shows it at one moment, and what it waits for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onstream.pipeline.redis.run_end import RunEnd
from onstream.pipeline.redis.run_state import RunState
from onstream.settings.stages import KINDS_OF, WORK_STAGES, StreamName, stage_of

NEXT_WEIGHTS = "waits for policy version"
"""How the detail of a generator begins that waits as in every run: this does not hold it up."""
SILENT_S = 5.0
"""A worker writes a heartbeat every second. One that was silent for so long is gone."""


@dataclass(frozen=True)
class RunSnapshot:
    """The state of a run at `taken` (monotonic seconds), by stage.

    `version` is the newest policy's. `backlog` counts the records of each stage, and `in_hand`
    those of them that workers hold. `workers` has what each live worker says that it does;
    `taking` counts the workers of each stage that have finished starting. `unreachable` says why
    the snapshot is older than it should be.
    """

    taken: float = 0.0
    ready: frozenset[str] = frozenset()
    finished: bool = False
    version: int = 0
    backlog: Mapping[StreamName, int] = field(default_factory=dict)
    in_hand: Mapping[StreamName, int] = field(default_factory=dict)
    workers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    taking: Mapping[str, int] = field(default_factory=dict)
    unreachable: str = ""


def take_snapshot(state: RunState, run_end: RunEnd | None = None) -> RunSnapshot:
    """A snapshot of the run now; `run_end` decides whether it has ended, if given."""
    # Before the first question: what is read later may be younger than the snapshot says, and must
    # not be older. Who waits for the end of a run asks whether it was seen after a moment.
    taken = time.monotonic()
    heartbeats = state.workers(max_age_s=SILENT_S)
    workers: dict[str, list[str]] = {}
    for heartbeat in heartbeats:
        workers.setdefault(heartbeat.stage, []).append(heartbeat.detail)
    policy = state.newest_policy()
    return RunSnapshot(
        taken=taken,
        ready=frozenset(state.ready_stages()),
        finished=run_end.reached() if run_end else state.finished(),
        version=policy.number if policy else 0,
        backlog=state.backlog(),
        in_hand=state.pending_counts(),
        workers=workers,
        taking=Counter(beat.stage for beat in heartbeats if beat.state != "starting"),
    )


def waits(
    snapshot: RunSnapshot,
    stages: Sequence[StreamName],
    started: Mapping[StreamName, int],
    kinds: Mapping[Any, Sequence[str]] = KINDS_OF,
    worker_command: str = "onstream worker {kind}",
) -> list[str]:
    """What the run waits for, a sentence each.

    `started` counts the workers that the launcher itself runs, by stage. `kinds` are the workers
    that serve each stage; by default all that can. `worker_command` starts one of a kind.

    >>> waits(RunSnapshot(ready=frozenset({"verify"}), backlog={"verify": 7}), ["verify"], {})
    ['verify: 7 records wait and no worker takes them; start one with `onstream worker verifier`']
    """
    if snapshot.unreachable:
        return [snapshot.unreachable]
    found: dict[str, list[str]] = {}
    for stage in stages:
        commands = [f"`{worker_command.format(kind=kind)}`" for kind in kinds[stage]]
        if why := _wait(snapshot, stage, started.get(stage, 0), " or ".join(commands)):
            found.setdefault(why, []).append(stage)
    return [f"{', '.join(together)}: {why}" for why, together in found.items()]


def _wait(snapshot: RunSnapshot, stage: StreamName, started: int, commands: str) -> str:
    """Why `stage` keeps the run waiting; nothing if it does not. `commands` start a worker."""
    present = snapshot.workers.get(stage, ())
    backlog = snapshot.backlog.get(stage, 0)
    remedy = "one is starting" if started or present else f"start one with {commands}"
    if stage not in snapshot.taking and backlog:
        return f"{backlog} records wait and no worker takes them; {remedy}"
    detail = next((detail for detail in present if detail), "")
    if stage in snapshot.ready:
        # Every worker of the stage says that it waits for something, and there is work to do.
        stuck = stage_of(stage) in WORK_STAGES and backlog and all(present)
        return detail if stuck and not detail.startswith(NEXT_WEIGHTS) else ""
    if detail:
        return f"not ready: {detail}"
    if started or present:
        return "not ready: starting"
    return f"not ready: no worker; {remedy}"
