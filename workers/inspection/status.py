"""`onstream status`: who works on a run and what each holds, what waits where and for how long, and
what went wrong last.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.keys import STAGES
from onstream.pipeline.redis.run_state import VERSION, WorkerState
from onstream.settings.plan import Plan
from onstream.settings.stages import KINDS_OF
from onstream.workers.launcher.run_watcher import take, waits


def status(bus: Bus) -> dict[str, Any]:
    """The state of the run now, as JSON data. `waits` are sentences; `backlog` counts records
    waiting or in hand.
    """
    data = bus.state.plan()
    policy = bus.state.newest_policy()
    snapshot = take(bus.state)
    plan = Plan.decode(data) if data else None
    route = list(plan.streams) if plan else list(STAGES)
    kinds = {stage: plan.kinds(stage) for stage in plan.streams} if plan else KINDS_OF
    held = {stage: bus.state.pending_summary(stage) for stage in STAGES}
    holds = sum((Counter(held[stage].by_worker) for stage in STAGES), Counter[str]())
    images, image_bytes = bus.images.count()
    heard_of = [_worker(worker, holds[worker.worker]) for worker in bus.state.last_heartbeats()]
    return {
        "run": bus.run,
        "version": VERSION,
        "started": data is not None,
        "finished": snapshot.finished,
        "route": route,
        "policy_version": policy.number if policy else None,
        "issued": bus.state.issued(),
        "dead": bus.state.dead_count(),
        "images": {"held": images, "bytes": image_bytes},
        "stages": {
            stage: {
                "ready": stage in snapshot.ready,
                "backlog": snapshot.backlog[stage],
                "in_hand": held[stage].count,
                "oldest_in_hand_s": held[stage].oldest_s,
            }
            for stage in STAGES
            if stage in route
        },
        "workers": [worker for worker in heard_of if worker["alive"]],
        "gone": [worker for worker in heard_of if not worker["alive"]],
        "last_dead": _last_dead(bus),
        "waits": []
        if snapshot.finished
        else _waits(data is not None, waits(snapshot, route, {}, kinds)),
    }


def _last_dead(bus: Bus) -> dict[str, Any] | None:
    letter = bus.state.newest_dead_letter()
    if letter is None:
        return None
    return {
        "number": letter.number,
        "stage": letter.stage,
        "reason": letter.reason,
        "age_s": bus.connection.server_time() - letter.time,
    }


def _waits(started: bool, found: list[str]) -> list[str]:
    return found if started else ["the run has no plan yet: no trainer has started", *found]


def _worker(state: WorkerState, holds: int) -> dict[str, Any]:
    """A worker as JSON data. `holds` counts what Redis has pending with it, `in_hand` what it said
    itself.
    """
    names = (
        "worker",
        "stage",
        "host",
        "pid",
        "state",
        "version",
        "in_hand",
        "done",
        "dead",
        "detail",
        "numbers",
        "alive",
    )
    return {name: getattr(state, name) for name in names} | {
        "holds": holds,
        "heartbeat_age_s": round(state.age_s, 1),
        "error": state.error or None,
        "error_age_s": round(time.time() - state.error_time, 1) if state.error else None,
    }


def show(state: dict[str, Any], console: Console) -> None:
    """Print what `status` returned, for people."""
    where = "finished" if state["finished"] else "running" if state["started"] else "not started"
    version = state["policy_version"]
    _say(
        console,
        f"run {state['run']}: {where}, policy version {'none' if version is None else version}",
    )
    _say(
        console,
        f"route {' → '.join(state['route'])}; {state['issued']} rollouts issued, {state['dead']} dead letters",
    )
    if (images := state["images"])["held"]:
        _say(console, f"{images['held']} images held, {images['bytes'] / 1e6:.1f} MB")
    _say(console, "")
    stages = [
        [
            name,
            "yes" if row["ready"] else "no",
            row["backlog"],
            row["in_hand"],
            _seconds(row["oldest_in_hand_s"]),
        ]
        for name, row in state["stages"].items()
    ]
    console.print(_table(["stage", "ready", "backlog", "in hand", "oldest in hand"], stages))
    console.print(
        _table(
            ["worker", "state", "last heard", "holds", "policy", "done", "detail"],
            [_row(row) for row in state["workers"]],
        )
    )
    for sentence in (*_troubles(state), *(f"waits: {sentence}" for sentence in state["waits"])):
        _say(console, sentence)


def _row(worker: dict[str, Any]) -> list[Any]:
    policy = worker["numbers"].get("policy_version")
    names = (
        worker["worker"],
        worker["state"],
        _seconds(worker["heartbeat_age_s"]),
        worker["holds"],
    )
    return [*names, "" if policy is None else int(policy), worker["done"], worker["detail"]]


def _troubles(state: dict[str, Any]) -> list[str]:
    """What went wrong last, a sentence each."""
    found = [
        f"gone: {worker['worker']}, {worker['state']}, last heard of {_seconds(worker['heartbeat_age_s'])} ago, holds {worker['holds']}"
        f"{'; ' + worker['detail'] if worker['detail'] else ''}"
        for worker in state["gone"]
    ]
    wrong = [worker for worker in (*state["workers"], *state["gone"]) if worker["error"]]
    found += [
        f"last error of {worker['worker']}, {_seconds(worker['error_age_s'])} ago: {worker['error']}"
        for worker in sorted(wrong, key=lambda worker: worker["error_age_s"])
    ]
    if (dead := state["last_dead"]) is not None:
        found.append(
            f"last dead letter, {_seconds(dead['age_s'])} ago: {dead['number']} at {dead['stage']}: {dead['reason']}"
        )
    if others := {worker["version"] for worker in state["workers"]} - {state["version"]}:
        found.append(
            f"workers of another version of Onstream than {state['version']}: {', '.join(sorted(others))}"
        )
    return found


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"


def _table(head: list[str], rows: list[list[Any]]) -> Table:
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _say(console: Console, sentence: str) -> None:
    console.print(Text(sentence), soft_wrap=True)
