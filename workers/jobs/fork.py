"""Forks: a new run that goes on from a checkpoint of another one, which stays as it is."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from onstream.pipeline.errors import UserError
from onstream.pipeline.run_files.durable import digest_of
from onstream.pipeline.run_files.json_lines import JsonLines, cut
from onstream.pipeline.run_files.ledger import LEDGER
from onstream.settings.load import load_settings
from onstream.settings.paths import with_absolute_paths
from onstream.settings.plan import Plan, under_name
from onstream.settings.root import Settings
from onstream.settings.toml import toml_text
from onstream.workers.trainer.durability import checkpoint
from onstream.workers.trainer.durability.checkpoint import MANIFEST, OPTIMIZER, STATE, Checkpoint
from onstream.workers.trainer.durability.resume import CHANGES, PLAN

BY_STEP = ("metrics.jsonl", "samples.jsonl", CHANGES)
"""Files of JSON lines that each carry the step that they belong to."""


def fork(settings: Settings, name: str, step: int | None) -> tuple[Path, int]:
    """Make the run `name` beside that of `settings`, at its checkpoint of `step`, else its newest.

    What the checkpoint holds is copied: weights, optimizer, ledger, metrics. Rollouts on their way
    are not; the new run issues their numbers again. Returns its directory and the step.

    Raises:
        UserError: there is a run of that name, the name is none, or there is no such checkpoint.
    """
    run_dir = settings.run_dir
    target = run_dir.parent / name
    ours = _settings_of(settings, name)
    if target.exists():
        raise UserError(
            f"{target} exists",
            expected="the name of a new run",
            next_step="Choose another NAME, or remove it.",
        )
    found = _checkpoint(run_dir, step)
    unfinished = target.with_name(f".{name}.forking")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _copy_checkpoint(found, unfinished / checkpoint.FOLDER / f"step-{found.state.step:06d}")
    if problem := checkpoint.damage(found.path):
        shutil.rmtree(unfinished)
        raise UserError(
            f"{found.path}: {problem}",
            expected="a whole checkpoint",
            next_step="Choose another --at.",
        )
    _copy_files(run_dir, unfinished, found)
    plan = Plan.decode((run_dir / PLAN).read_bytes())
    (unfinished / PLAN).write_bytes(under_name(plan, name).encode())
    (unfinished / "settings.toml").write_text(toml_text(ours), encoding="utf-8")
    _note(unfinished / CHANGES, found.state.step, settings.run.name, name)
    unfinished.rename(target)
    return target, found.state.step


def _settings_of(settings: Settings, name: str) -> Settings:
    """The settings of the new run: those of the run, under another name.

    Raises:
        UserError: `name` is no name of a run.
    """
    load_settings(overrides=[f"run.name={name}"], environ={})
    run = settings.run.model_copy(update={"name": name, "resume": "auto"})
    return with_absolute_paths(settings.model_copy(update={"run": run}))


def _checkpoint(run_dir: Path, step: int | None) -> Checkpoint:
    usable = checkpoint.complete(run_dir / checkpoint.FOLDER)
    chosen = [found for found in usable if step is None or found.state.step == step]
    if chosen:
        return chosen[0]
    steps = ", ".join(str(found.state.step) for found in reversed(usable)) or "none"
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise UserError(
        f"{wanted} in {run_dir.absolute()}",
        expected=f"a step whose checkpoint is whole: {steps}",
        next_step="Choose one of those by --at. checkpoint.interval and checkpoint.keep say which "
        "are kept.",
    )


def _copy_checkpoint(found: Checkpoint, target: Path) -> None:
    """Copy `found`, less what it says of the journal, which stays with the run.

    Its large files are linked: a checkpoint is never written to.
    """
    shutil.copytree(found.path, target, copy_function=_link)
    manifest = msgspec.json.decode((target / MANIFEST).read_bytes(), type=dict[str, str])
    _write(target / STATE, replace(found.state, recorded=None, journal=None))
    _write(target / MANIFEST, manifest | {STATE: digest_of(target / STATE)})


def _copy_files(run_dir: Path, target: Path, found: Checkpoint) -> None:
    """Copy the files of the run as they were at the checkpoint `found`."""
    step = found.state.step
    kept: dict[str, Callable[[dict[str, Any]], bool]] = {
        **dict.fromkeys(BY_STEP, lambda row: bool(row["step"] <= step)),
        "evals.jsonl": lambda row: bool(row["version"] <= step),
    }
    for name, keep in kept.items():
        if (run_dir / name).exists():
            shutil.copyfile(run_dir / name, target / name)
            cut(target / name, keep)
    with (run_dir / LEDGER).open("rb") as file:
        (target / LEDGER).write_bytes(file.read(found.state.ledger_bytes))
    if (run_dir / "student").is_dir():
        shutil.copytree(run_dir / "student", target / "student")


def _note(path: Path, step: int, parent: str, name: str) -> None:
    lines = JsonLines(path)
    lines.write({"step": step, "time": time.time(), "name": "run.name", "from": parent, "to": name})
    lines.close()


def _write(path: Path, content: Any) -> None:
    """Write `content` as JSON in place of a file that may be linked to another run's."""
    path.unlink()
    path.write_bytes(msgspec.json.encode(content))


def _link(source: str, target: str) -> None:
    large = Path(source).name == OPTIMIZER or source.endswith(".safetensors")
    if not large:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
