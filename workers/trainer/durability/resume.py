"""Resuming a run: who may be its trainer, and whether the settings fit."""

from __future__ import annotations

import time
from pathlib import Path

import structlog

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.keys import STAGES
from onstream.pipeline.redis.lease import Lease, while_it_may_expire
from onstream.pipeline.run_files.json_lines import JsonLines
from onstream.pipeline.run_files.ledger import LEDGER, Ledger
from onstream.pipeline.run_files.ownership import Ownership
from onstream.settings.plan import (
    Plan,
    differences,
    refuse_differences,
    under_name,
    with_given_paths,
)
from onstream.settings.root import Settings
from onstream.settings.sections.run import RunSettings
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.durability.acknowledgements import SettledNumbers
from onstream.workers.trainer.durability.checkpoint import TrainerState

log = structlog.get_logger(__name__)

PLAN = "plan.json"
CHANGES = "changes.jsonl"


def become_trainer(bus: Bus, ttl_s: float, files: Ownership) -> Lease:
    """Take the run's lease, and claim its `files`.

    The epoch of the lease is higher than that of every trainer before: Redis and the files refuse
    a lower one from now on. Waits as long as the lease of a dead trainer could still run.

    Raises:
        LeaseHeld: another trainer renews it.
        LeaseLost: another trainer was faster to claim the files.
    """
    return while_it_may_expire(lambda: bus.lease.acquire(ttl_s, files), ttl_s)


def agree_on_plan(
    bus: Bus, lease: Lease, ours: Plan, settings: Settings, state: TrainerState | None
) -> Plan:
    """Write our plan as the run's, after making sure that the run was started with it.

    `state` is that of the newest checkpoint, where there is one. Changeable settings that changed
    are recorded with its step. Returns the plan as it was written.

    Raises:
        UserError: the run exists and must not, or the reverse, or it was started with other
            settings, or its checkpoints are lost.
    """
    run_dir = settings.run_dir
    theirs = _plan_of_the_run(bus, run_dir)
    _refuse_resume(settings.run, run_dir, exists=theirs is not None or state is not None)
    if state is None and settings.run.resume != "restart":
        _refuse_restart(bus, run_dir)
    if theirs is not None:
        refuse_differences(ours, theirs)
        _refuse_route(bus, ours, theirs, state)
        _record_changes(run_dir, ours, theirs, state.step if state else 0)
        ours = with_given_paths(ours, theirs)
    bus.lease.write_plan(lease, ours.encode())
    bus.limits.note(path=ours.streams)
    fresh = run_dir / f"{PLAN}.new"
    fresh.write_bytes(ours.encode())
    fresh.rename(run_dir / PLAN)
    return ours


def _plan_of_the_run(bus: Bus, run_dir: Path) -> Plan | None:
    """The plan in Redis, else that in the run's directory, which may have been renamed since."""
    stored = bus.state.plan()
    if stored is not None:
        return Plan.decode(stored)
    if not (run_dir / PLAN).exists():
        return None
    written = Plan.decode((run_dir / PLAN).read_bytes())
    if written.run != bus.run:
        log.warning("the directory of the run was copied or renamed", was=written.run, now=bus.run)
    return under_name(written, bus.run)


def _refuse_resume(run: RunSettings, run_dir: Path, *, exists: bool) -> None:
    if run.resume == "never" and exists:
        raise UserError(
            f"run {run.name!r} exists in {run_dir} or in Redis, and run.resume = 'never'",
            expected="a run that does not exist yet",
            next_step="Choose another run.name, or set run.resume = 'auto' to go on with this one.",
            exit=Exit.REFUSED,
        )
    if run.resume == "must" and not exists:
        raise UserError(
            f"run {run.name!r} exists neither in {run_dir} nor in Redis, and run.resume = 'must'",
            expected="a run to go on with",
            next_step="Correct run.name or run.dir, or set run.resume = 'auto' to start it.",
            exit=Exit.REFUSED,
        )


def _refuse_restart(bus: Bus, run_dir: Path) -> None:
    """Refuse to begin a run at step 0 that has had a checkpoint, all of which are lost.

    A run that was killed before its first checkpoint goes on: all it has had is in Redis still.
    """
    folder = run_dir / checkpoint.FOLDER
    issued = bus.state.issued()
    lost = None
    if aside := checkpoint.torn(folder):
        kept = ", ".join(path.name for path in aside)
        lost = f"every checkpoint of run {bus.run!r} in {folder} is torn (kept as {kept})"
    elif issued and not (run_dir / PLAN).exists():
        lost = f"Redis has {issued} rollouts of run {bus.run!r}, and {run_dir} has nothing of it"
    elif Ledger(run_dir / LEDGER).size_bytes and not folder.exists():
        lost = f"{run_dir} has the ledger of run {bus.run!r} and no {checkpoint.FOLDER}/"
    if lost is not None:
        raise UserError(
            lost,
            expected="a whole checkpoint to go on from",
            next_step="Restore the run's directory, or correct run.dir. To begin again at step 0, "
            'set run.resume = "restart"; or choose another run.name.',
            exit=Exit.REFUSED,
        )


def _refuse_route(bus: Bus, ours: Plan, theirs: Plan, state: TrainerState | None) -> None:
    """Refuse another route: rollouts under way carry the old one."""
    if ours.route == theirs.route:
        return
    settled = SettledNumbers(state.settled if state else None)
    in_flight = len(
        {number for stage in STAGES for number in bus.state.numbers(stage) if number not in settled}
    )
    raise UserError(
        f"rollouts would go by {' → '.join(ours.route)}; "
        f"run {theirs.run!r} has {in_flight} in flight by {' → '.join(theirs.route)}",
        expected="the route that the run was started with",
        next_step="Use the same stages, verification and teacher as before, "
        "or start another run under another run.name.",
        exit=Exit.REFUSED,
    )


def _record_changes(run_dir: Path, ours: Plan, theirs: Plan, step: int) -> None:
    changes = [change for change in differences(ours, theirs) if change.changeable]
    if not changes:
        return
    lines = JsonLines(run_dir / CHANGES)
    for change in changes:
        lines.write(
            {
                "step": step,
                "time": time.time(),
                "name": change.name,
                "from": change.theirs,
                "to": change.ours,
            }
        )
        log.info(
            "setting changed on resume",
            name=change.name,
            was=change.theirs,
            now=change.ours,
            step=step,
        )
    lines.sync()
    lines.close()
