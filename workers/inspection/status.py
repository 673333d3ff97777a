"""`onstream status`: who works on a run, what waits where, and what went wrong last."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onstream.pipeline.command_line import command
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.keys import STAGES
from onstream.pipeline.redis.run_state import VERSION, PendingSummary, WorkerState
from onstream.pipeline.run_files.ledger import LEDGER, Ledger
from onstream.settings.plan import Plan
from onstream.settings.stages import StreamName
from onstream.workers.inspection.run_phase import Phase, RunFiles
from onstream.workers.inspection.run_snapshot import RunSnapshot, take_snapshot, waits
from onstream.workers.inspection.tables import add_row, plain_table

COPIED = (
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
"""What is shown of a worker's heartbeat as it is."""
NO_PLAN = "the run has no plan yet: no trainer has started"


def status(bus: Bus, files: RunFiles | None = None) -> dict[str, Any]:
    """The state of the run now, as JSON data.

    `files` is what its directory says. `backlog` counts the records of a stage that wait or are in
    hand. `waits` has sentences: what the run waits for; `next` has what to do, with commands.
    """
    data = bus.state.plan()
    plan = Plan.decode(data) if data else None
    route = list(plan.streams) if plan else list(STAGES)
    policy = bus.state.newest_policy()
    snapshot = take_snapshot(bus.state)
    pending = {stream: bus.state.pending_summary(stream) for stream in bus.keys.streams}
    images, image_bytes = bus.images.count()
    workers = _workers(bus, pending)
    alive = {worker["worker"] for worker in workers if worker["alive"]}
    phase = _phase(snapshot, plan, at_work=bool(alive), files=files)
    backlog = dict(snapshot.backlog)
    if files is not None and not alive:
        backlog["train"] = _unsettled(bus, files.directory)
    return {
        "run": bus.run,
        "version": VERSION,
        "phase": phase,
        "copied_from": files.copied_from if files else None,
        "step": files.step if files else None,
        "started": plan is not None,
        "finished": snapshot.finished,
        "route": route,
        "policy_version": policy.number if policy else None,
        "issued": bus.state.issued(),
        "dead": bus.state.dead_count(),
        "images": {"held": images, "bytes": image_bytes},
        "stages": {
            stage: _stage(snapshot, stage, backlog[stage], pending[stage], alive)
            for stage in bus.keys.streams
            if stage in route
        },
        "workers": [worker for worker in workers if worker["alive"]],
        "gone": [worker for worker in workers if not worker["alive"]],
        "last_dead": _last_dead(bus),
        "waits": _waits(snapshot, plan, files) if phase in ("running", "not started") else [],
        "next": next_steps(phase, files),
    }


def status_of_files(files: RunFiles, why: str) -> dict[str, Any]:
    """What can be said of a run whose Redis cannot be asked, for the reason `why`."""
    plan = files.plan
    return {
        "run": files.directory.name,
        "version": VERSION,
        "phase": files.phase,
        "copied_from": files.copied_from,
        "step": files.step,
        "started": plan is not None,
        "finished": files.phase == "finished",
        "route": list(plan.streams) if plan else list(STAGES),
        "policy_version": files.step,
        "redis": why,
        "next": next_steps(files.phase, files),
    }


def next_steps(phase: Phase, files: RunFiles | None) -> list[str]:
    """What to do with a run in `phase`, a sentence each."""
    if files is None:
        return []
    run = files.directory
    match phase:
        case "stopped":
            return [f"it goes on with `{command()} up {run}`"]
        case "copied":
            return [f"it goes on under its own name with `{command()} up {run}`"]
        case "finished":
            return [
                f"the trained model: `{command()} export {run} --out {run.name}-model`",
                f"more steps: `{command()} up {run} --set trainer.max_steps={2 * files.step}`",
            ]
    return []


def _phase(
    snapshot: RunSnapshot, plan: Plan | None, *, at_work: bool, files: RunFiles | None
) -> Phase:
    """Where the run stands: by Redis where that knows the run, else by its files."""
    if plan is None:
        return files.phase if files else "not started"
    if files is not None and files.launched:
        return "running"  # though it had ended before: its trainer may be about to reopen it
    if snapshot.finished:
        return "finished"
    return "running" if at_work else "stopped"


def _unsettled(bus: Bus, run_dir: Path) -> int:
    """How many entries of the trainer's stream a trainer would still have to consider.

    The others are settled, and wait to be acknowledged.
    """
    settled = {line.number for line in Ledger(run_dir / LEDGER).read()}
    return sum(number not in settled for number in bus.state.numbers("train"))


def _stage(
    snapshot: RunSnapshot,
    stage: StreamName,
    backlog: int,
    pending: PendingSummary,
    alive: Set[str],
) -> dict[str, Any]:
    """One stage. Only what living workers have counts as in hand: the rest waits for one."""
    in_hand = sum(count for worker, count in pending.by_worker.items() if worker in alive)
    return {
        "ready": stage in snapshot.ready and bool(alive),
        "backlog": backlog,
        "in_hand": in_hand,
        "oldest_in_hand_s": pending.oldest_s if in_hand else None,
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


def _waits(snapshot: RunSnapshot, plan: Plan | None, files: RunFiles | None) -> list[str]:
    if plan is None:
        return [NO_PLAN]
    kinds = {stage: plan.consumers(stage) for stage in plan.streams}
    run = f" {files.directory}" if files else ""
    worker_command = f"{command()} worker {{kind}}{run}"
    return waits(snapshot, plan.streams, {}, kinds, worker_command)


def _workers(bus: Bus, pending: Mapping[StreamName, PendingSummary]) -> list[dict[str, Any]]:
    holds = Counter[str]()
    for summary in pending.values():
        holds.update(summary.by_worker)
    return [_worker(worker, holds[worker.worker]) for worker in bus.state.last_heartbeats()]


def _worker(state: WorkerState, holds: int) -> dict[str, Any]:
    """A worker as JSON data.

    `holds` counts the entries that Redis says are pending with it, `in_hand` those that the worker
    says it has.
    """
    worker = {name: getattr(state, name) for name in COPIED}
    worker["holds"] = holds
    worker["heartbeat_age_s"] = round(state.age_s, 1)
    worker["error"] = state.error or None
    worker["error_age_s"] = round(time.time() - state.error_time, 1) if state.error else None
    return worker


def show(state: dict[str, Any], console: Console) -> None:
    """Print what `status` or `status_of_files` returned, for people."""
    _say(console, _heading(state))
    if "redis" in state:
        _say(console, f"its Redis cannot be asked: {state['redis']}")
    else:
        _show_redis(state, console)
    for sentence in state["next"]:
        _say(console, sentence)


def _show_redis(state: dict[str, Any], console: Console) -> None:
    counts = f"{state['issued']} rollouts issued, {state['dead']} dead letters"
    _say(console, f"route {' → '.join(state['route'])}; {counts}")
    images = state["images"]
    if images["held"]:
        _say(console, f"{images['held']} images held, {images['bytes'] / 1e6:.1f} MB")
    _say(console, "")
    console.print(_stage_table(state["stages"]))
    if state["workers"]:
        console.print(_worker_table(state["workers"]))
    for sentence in _problems(state):
        _say(console, sentence)
    for sentence in state["waits"]:
        _say(console, f"waits: {sentence}")


def _heading(state: dict[str, Any]) -> str:
    phase = state["phase"]
    if phase == "copied":
        phase = f"copied from run {state['copied_from']}"
    version = state["policy_version"]
    if phase in ("stopped", "finished") and state["step"] is not None:
        phase += f" at step {state['step']}"
    return f"run {state['run']}: {phase}, policy version {'none' if version is None else version}"


def _stage_table(stages: dict[str, Any]) -> Table:
    table = plain_table("stage", "ready", "backlog", "in hand", "oldest in hand")
    for name, row in stages.items():
        ready = "yes" if row["ready"] else "no"
        oldest = row["oldest_in_hand_s"]
        add_row(table, name, ready, row["backlog"], row["in_hand"], _seconds(oldest))
    return table


def _worker_table(workers: Sequence[dict[str, Any]]) -> Table:
    table = plain_table("worker", "state", "last heard", "holds", "policy", "done", "detail")
    for row in workers:
        policy = row["numbers"].get("policy_version")
        add_row(
            table,
            row["worker"],
            row["state"],
            _seconds(row["heartbeat_age_s"]),
            row["holds"],
            "" if policy is None else int(policy),
            row["done"],
            row["detail"],
        )
    return table


def _problems(state: dict[str, Any]) -> Iterator[str]:
    """What went wrong last, a sentence each."""
    for worker in state["gone"]:
        yield _gone(worker)
    failed = [worker for worker in (*state["workers"], *state["gone"]) if worker["error"]]
    for worker in sorted(failed, key=lambda worker: worker["error_age_s"]):
        age = _seconds(worker["error_age_s"])
        yield f"last error of {worker['worker']}, {age} ago: {worker['error']}"
    if (dead := state["last_dead"]) is not None:
        letter = f"{dead['number']} at {dead['stage']}: {dead['reason']}"
        yield f"last dead letter, {_seconds(dead['age_s'])} ago: {letter}"
    others = {worker["version"] for worker in state["workers"]} - {state["version"]}
    if others:
        versions = ", ".join(sorted(others))
        yield f"workers of another version of Onstream than {state['version']}: {versions}"


def _gone(worker: dict[str, Any]) -> str:
    age = _seconds(worker["heartbeat_age_s"])
    sentence = f"gone: {worker['worker']}, {worker['state']}, last heard of {age} ago"
    sentence += f", holds {worker['holds']}"
    if worker["detail"]:
        sentence += f"; {worker['detail']}"
    return sentence


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f} s"


def _say(console: Console, sentence: str) -> None:
    console.print(Text(sentence), soft_wrap=True)
