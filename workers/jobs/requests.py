"""What `onstream jobs` does: shows the jobs of a run and what they returned, and asks for more."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from onstream.pipeline.command_line import command
from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.job_queue import JobQueue, ask_pinned
from onstream.settings.root import Settings
from onstream.workers.evaluation.versions import find_version
from onstream.workers.inspection.tables import add_row, plain_table
from onstream.workers.launcher.open_run import open_run

SHOWN = 120  # characters of a result


def listed(settings: Settings) -> list[dict[str, Any]]:
    """The jobs of the run as JSON data, the newest first."""
    with _run(settings) as (_, jobs):
        return [asdict(row) for row in jobs.rows()]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print what `listed` returned, for people."""
    table = plain_table("job", "state", "tries", "asked", "took", "result")
    for row in rows:
        add_row(table, *_cells(row))
    console.print(table if rows else Text("no jobs"))


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    asked = ""
    if row["asked"]:
        asked = time.strftime("%m-%d %H:%M:%S", time.localtime(row["asked"]))
    took = f"{row['seconds']:.1f} s" if row["seconds"] is not None else ""
    result = row["reason"] or _short(row["result"])
    return f"{row['kind']} {row['key']}", row["status"], row["tries"], asked, took, result


def _short(result: Any) -> str:
    """What a job returned, for people: without empty values and what the line says already."""
    if not isinstance(result, dict):
        return "" if result is None else str(result)
    parts = []
    for name, value in result.items():
        if value in (None, [], {}, 0) or name in ("version", "time", "seconds"):
            continue
        parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)[:SHOWN]


def ask_evaluation(settings: Settings, version: int | None) -> str:
    """Ask for an evaluation; returns a sentence for the user.

    Raises:
        UserError: the run has no such version.
    """
    _, version = find_version(settings, version)
    with _run(settings) as (bus, jobs):
        new = ask_pinned(
            jobs, settings.run_dir, "evaluate", version, str(version), version, again=True
        )
        at_once = f"eval {settings.run_dir} --version {version}"
        return _answer(settings, bus, new, f"the evaluation of version {version}", at_once)


def ask_export(
    settings: Settings, version: int | None, to: Path | None, dtype: str | None, *, upload: bool
) -> str:
    """Ask for an export; returns a sentence for the user.

    Raises:
        UserError: the run has no such version, or there is nowhere to export it to.
    """
    if to is None and not upload:
        raise UserError(
            "neither --to nor --upload",
            expected="where the export goes",
            next_step="Give --to DIR, or --upload, or both.",
        )
    _, version = find_version(settings, version)
    target = str(to.absolute()) if to else None
    key = _export_key(version, target, dtype, upload=upload)
    arguments = (version, target, dtype, upload)
    with _run(settings) as (bus, jobs):
        new = ask_pinned(jobs, settings.run_dir, "export", version, key, *arguments, again=True)
        at_once = f"export {settings.run_dir} --version {version} --out {target or 'DIR'}"
        return _answer(settings, bus, new, f"the export of version {version}", at_once)


def _export_key(version: int, target: str | None, dtype: str | None, *, upload: bool) -> str:
    """What tells one export from another, and names it in the list."""
    key = f"{version} {target or 'upload'}"
    if dtype:
        key += f" {dtype}"
    if target and upload:
        key += " + upload"
    return key


def ask_prune(settings: Settings) -> str:
    """Ask for pruning; returns a sentence for the user."""
    with _run(settings) as (bus, jobs):
        return _answer(settings, bus, jobs.ask("prune", "now", again=True), "pruning")


def _answer(settings: Settings, bus: Bus, new: bool, what: str, at_once: str = "") -> str:
    """What the user is told; `at_once` are arguments of `onstream` that do it without a job."""
    workers = bus.state.workers()
    if any(worker.stage == "jobs" for worker in workers):
        if new:
            return f"asked for {what}; `onstream jobs {settings.run_dir}` shows how it goes"
        return f"{what} is under way already"
    asked = f"asked for {what}" if new else f"{what} was asked for already"
    sentences = [f"{asked}, but no jobs worker is at work: it waits for one"]
    if workers:
        sentences.append(f"`{command()} worker jobs {settings.run_dir}` starts one")
    if at_once:
        sentences.append(f"`{command()} {at_once}` does it here and now")
    return "; ".join(sentences)


@contextlib.contextmanager
def _run(settings: Settings) -> Iterator[tuple[Bus, JobQueue]]:
    with (
        open_run(settings, purpose="jobs") as bus,
        JobQueue(bus.connection.url, settings.run.name, settings.jobs) as jobs,
    ):
        yield bus, jobs
