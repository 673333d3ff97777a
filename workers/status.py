"""`onstream status`: who works on a run, what waits where, and for what."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.board import WorkerState
from pipeline.keys import STAGES
from pipeline.streams import Bus
from settings.plan import Plan
from workers.launcher.watch import KINDS_OF, take, waits


def status(bus: Bus) -> dict[str, Any]:
    """The state of the run now, as JSON data. `waits` are sentences; `backlog` counts records waiting or in hand."""
    data, policy, snapshot = bus.read_plan(), bus.newest_policy(), take(bus)
    plan = Plan.decode(data) if data else None
    route = list(plan.streams) if plan else list(STAGES)
    kinds = {stage: plan.kinds(stage) for stage in plan.streams} if plan else KINDS_OF
    workers, in_hand = bus.workers(), bus.pending_counts()
    return {
        "run": bus.run,
        "started": data is not None,
        "finished": snapshot.finished,
        "route": route,
        "policy_version": policy.number if policy else None,
        "issued": bus.issued(),
        "dead": bus.dead_count(),
        "stages": {
            stage: {"ready": stage in snapshot.ready, "backlog": snapshot.backlog[stage], "in_hand": in_hand[stage]}
            for stage in STAGES
            if stage in route
        },
        "workers": [_worker(worker) for worker in workers],
        "waits": [] if snapshot.finished else _waits(data is not None, waits(snapshot, route, {}, kinds)),
    }


def _waits(started: bool, found: list[str]) -> list[str]:
    return found if started else ["the run has no plan yet: no trainer has started", *found]


def _worker(worker: WorkerState) -> dict[str, Any]:
    names = ("worker", "stage", "host", "pid", "state", "in_hand", "done", "dead", "detail", "numbers")
    return {name: getattr(worker, name) for name in names} | {"heartbeat_age_s": round(worker.age_s, 1)}


def show(state: dict[str, Any], console: Console) -> None:
    """Print what `status` returned, for people."""
    where = "finished" if state["finished"] else "running" if state["started"] else "not started"
    version = state["policy_version"]
    _say(console, f"run {state['run']}: {where}, policy version {'none' if version is None else version}")
    _say(console, f"route {' → '.join(state['route'])}; {state['issued']} rollouts issued, {state['dead']} dead letters\n")
    stages = [[name, "yes" if row["ready"] else "no", row["backlog"], row["in_hand"]] for name, row in state["stages"].items()]
    console.print(_table(["stage", "ready", "backlog", "in hand"], stages))
    workers = [[row["worker"], row["state"], f"{row['heartbeat_age_s']:.1f} s", row["done"], row["detail"]] for row in state["workers"]]
    console.print(_table(["worker", "state", "last heard", "done", "detail"], workers))
    for sentence in state["waits"]:
        _say(console, f"waits: {sentence}")


def _table(head: list[str], rows: list[list[Any]]) -> Table:
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _say(console: Console, sentence: str) -> None:
    console.print(Text(sentence), soft_wrap=True)
