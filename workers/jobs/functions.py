"""The jobs: `evaluate`, `export`, `prune`, `sweep` and `verify`.

Each runs in a process of its own, forked from a jobs worker that has set `context`. It returns JSON
data, which `onstream jobs` shows.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from rq import get_current_job

from onstream.pipeline import weights
from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.dead_letters import all_letters
from onstream.pipeline.redis.job_queue import JobQueue, pin_use
from onstream.pipeline.redis.keys import WORKING
from onstream.pipeline.redis.lease import LeaseHeld
from onstream.pipeline.run_files.json_lines import read_rows
from onstream.pipeline.run_files.ownership import Ownership
from onstream.pipeline.telemetry import get_logger
from onstream.pipeline.weights.directory_store import pinned, pins, unpin
from onstream.settings.plan import Plan, make_plan, refuse_differences
from onstream.settings.root import Settings
from onstream.workers.inspection.dead_letters import without_numbers
from onstream.workers.jobs.export import run_upload, write_export

P = ParamSpec("P")
T = TypeVar("T")
NICENESS = 10
DEAD_AFTER_LEASES = 10
PRUNING_TTL_S = 60.0
PINNING = ("queued", "started", "scheduled")
"""States of a job whose policy version must stay on disk."""
log = get_logger()


@dataclass(frozen=True)
class JobContext:
    """What jobs inherit from their worker. It holds secrets, so it is never in Redis."""

    settings: Settings
    url: str


context: JobContext | None = None


def job(function: Callable[P, T]) -> Callable[P, T]:
    """Makes `function` a job.

    It runs at low priority, and is not tried again after a `UserError`.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        os.nice(NICENESS)
        try:
            return function(*args, **kwargs)
        except UserError:
            if (current := get_current_job()) is not None:
                current.retries_left = 0
            raise

    return run


@job
def evaluate(version: int) -> dict[str, Any]:
    """Evaluate a policy version; returns its row in `evals.jsonl`, old or new."""
    settings = _context().settings
    for row in read_rows(settings.run_dir / "evals.jsonl"):
        if row["version"] == version:
            return row
    with _bus() as bus:
        _refuse_other_plan(settings, bus)
    from onstream.workers.evaluation.versions import evaluate_version

    return evaluate_version(settings, version)


@job
def export(version: int, to: str | None, dtype: str | None, upload: bool) -> dict[str, Any]:
    """Write a policy version to the directory `to` as Hugging Face files, cast to `dtype`.

    With `upload`, the command `jobs.upload` uploads it. Without `to`, it is in the run directory
    only while it is uploaded.
    """
    settings = _context().settings
    command = settings.jobs.upload
    if upload and command is None:
        raise UserError(
            "an upload, and no jobs.upload",
            expected="the command to upload with",
            next_step="Set jobs.upload for the jobs worker.",
        )
    out = Path(to) if to else settings.run_dir / "exports" / f"{version:06d}"
    with contextlib.ExitStack() as stack:
        if to is None:
            stack.callback(shutil.rmtree, out, ignore_errors=True)
        write_export(settings, version, out, dtype)
        uploaded = None
        if upload and command:
            uploaded = run_upload(command, out, settings.run.name, version)
    path = str(out) if to else None
    return {"version": version, "path": path, "dtype": dtype, "upload": uploaded}


@job
def prune() -> dict[str, Any]:
    """Remove pins of jobs that are gone, and old policies and checkpoints.

    The latter only where no trainer is at work.
    """
    settings = _context().settings
    removed: dict[str, Any] = {"pins": _drop_stale_pins(settings)}
    with _bus() as bus:
        try:
            # A trainer writes and prunes these directories itself.
            lease = bus.lease.acquire(PRUNING_TTL_S, Ownership(settings.run_dir))
        except LeaseHeld as held:
            return {**removed, "policies": [], "left_to": held.holder}
        try:
            with bus.lease.writing(lease):
                return {**removed, **_prune_directories(settings, bus)}
        finally:
            bus.lease.release(lease)


@job
def sweep() -> dict[str, Any]:
    """Forget dead consumers, drop pins of jobs that are gone, and count dead letters by reason."""
    settings = _context().settings
    with _bus() as bus:
        buried = sum(
            bus.streams.forget_dead_consumers(stage, settings.delivery.lease * DEAD_AFTER_LEASES)
            for stage in WORKING
        )
        dead = Counter(
            without_numbers(letter.reason) for letter in all_letters(bus, settings.run_dir)
        )
        backlog: dict[str, int] = {
            stage: count for stage, count in bus.state.backlog().items() if count
        }
    if dead:
        log.warning(
            "dead letters",
            count=dead.total(),
            reasons=dict(dead.most_common(5)),
            next_step="onstream dead list",
        )
    return {
        "consumers": buried,
        "pins": _drop_stale_pins(settings),
        "dead": dict(dead.most_common(20)),
        "backlog": backlog,
    }


@job
def verify(entry_id: str) -> dict[str, Any]:
    """Score the rollout in an entry of the stream `verify` and move it on, unless somebody has."""
    from onstream.workers.verifier.verification_jobs import verify_entry

    settings = _context().settings
    with _bus() as bus:
        _refuse_other_plan(settings, bus)
        return verify_entry(settings, bus, entry_id)


def refuse(name: str) -> None:
    """Fail: what runs in place of a function that is no job of Onstream."""
    raise UserError(
        f"a job that calls {name}",
        expected="one that Onstream asked for",
        next_step="Look who else writes to this Redis.",
    )


def _context() -> JobContext:
    if context is None:
        raise RuntimeError("a job outside a jobs worker")
    return context


@contextlib.contextmanager
def _bus() -> Iterator[Bus]:
    here = _context()
    redis = here.settings.redis
    bus = Bus.connect(
        here.url,
        here.settings.run.name,
        consumer=f"job-{os.getpid()}",
        block_s=redis.block,
        connect_timeout_s=redis.connect_timeout,
    )
    with contextlib.closing(bus):
        yield bus


def _refuse_other_plan(settings: Settings, bus: Bus) -> None:
    """Raise UserError where this worker's `run` settings are not the run's.

    Its evaluations would not compare with the others.
    """
    if (data := bus.state.plan()) is not None:
        refuse_differences(make_plan(settings), Plan.decode(data))


def _drop_stale_pins(settings: Settings) -> list[int]:
    """Drop pins whose job is neither waiting nor under way; returns their versions."""
    with JobQueue(_context().url, settings.run.name, settings.jobs) as jobs:
        rows = [row for row in jobs.rows() if row.status in PINNING]
    needed = {pin_use(row.kind, row.key) for row in rows}
    stale = sorted((version, use) for version, use in pins(settings.run_dir) if use not in needed)
    for version, use in stale:
        unpin(settings.run_dir, version, use)
    return [version for version, _ in stale]


def _prune_directories(settings: Settings, bus: Bus) -> dict[str, Any]:
    from onstream.workers.trainer.durability import checkpoint

    newest = bus.state.newest_policy()
    keep = {0, *pinned(settings.run_dir)}
    if newest is not None:
        keep.add(newest.number)
    directory = settings.run_dir / checkpoint.FOLDER
    before = {path.name for path in directory.glob("step-*")}
    checkpoint.prune(directory, settings.checkpoint.keep, settings.checkpoint.keep_every)
    after = {path.name for path in directory.glob("step-*")}
    return {
        "policies": weights.prune(settings.run_dir, settings.checkpoint.keep_policies, keep),
        "checkpoints": sorted(before - after),
    }
