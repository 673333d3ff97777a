"""Where a run stands: running, stopped, finished, copied from another one, or not started."""

from __future__ import annotations

import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onstream.settings.plan import Plan
from onstream.workers.trainer.durability import checkpoint

Phase = Literal["not started", "running", "stopped", "finished", "copied"]


@dataclass(frozen=True)
class RunFiles:
    """What the directory of a run says by itself.

    `step` is that of the newest checkpoint, 0 where there is none. `launched` tells whether an
    `onstream up` runs it on this machine.
    """

    directory: Path
    plan: Plan | None
    step: int
    launched: bool

    @property
    def copied_from(self) -> str | None:
        """The run that this directory is a copy of; None where it is no copy."""
        if self.plan is None or self.plan.run == self.directory.name:
            return None
        return self.plan.run

    @property
    def max_steps(self) -> int:
        """The steps that the run was to have, when it was started last."""
        return int(self.plan.run_settings["trainer.max_steps"]) if self.plan else 0

    @property
    def phase(self) -> Phase:
        """Where the run stands, as far as files can tell."""
        if self.plan is None:
            return "running" if self.launched else "not started"
        if self.copied_from is not None:
            return "copied"
        if self.launched:
            return "running"
        return "finished" if self.step >= self.max_steps else "stopped"


def read_run_files(run_dir: Path) -> RunFiles:
    """What the directory of a run says.

    Raises:
        UserError: its plan is of another version of Onstream.
    """
    plan = run_dir / "plan.json"
    return RunFiles(
        run_dir,
        Plan.decode(plan.read_bytes()) if plan.exists() else None,
        max(checkpoint.by_step(run_dir / checkpoint.FOLDER), default=0),
        _launched(run_dir),
    )


def _launched(run_dir: Path) -> bool:
    """Whether a launcher holds the lock of the run, which the kernel releases when it dies."""
    path = run_dir / "launcher.pid"
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
