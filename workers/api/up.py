"""`onstream.up`: a run from its start to its end, from Python."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onstream.pipeline import telemetry
from onstream.pipeline.errors import Exit, UserError
from onstream.settings.fields import known
from onstream.settings.load import load_settings
from onstream.settings.paths import with_absolute_paths
from onstream.settings.problems import variable_of
from onstream.settings.root import Settings
from onstream.settings.toml import toml_text
from onstream.workers.api.run import Run
from onstream.workers.launcher import launcher

if TYPE_CHECKING:
    from rich.console import Console


def up(settings: Settings, *, console: Console | None = None) -> Run:
    """Start a run on this machine and wait for its end, as `onstream up` does.

    Shows its progress on `console`, by default standard output. An interrupt (Ctrl-C, or a
    notebook's stop) ends it without loss, and the same call resumes it. For the main thread.

    Raises:
        UserError: something is wrong that shows before the first worker starts, or the run has
            failed; `exit` says how, as the command's exit code.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError(
            "onstream.up in another thread than the main one",
            expected="the main thread, which alone hears Ctrl-C",
            next_step="Call it there, or start `onstream up` as a process.",
        )
    settings = with_absolute_paths(settings)
    with tempfile.TemporaryDirectory(prefix="onstream-") as folder, telemetry.configured_apart():
        file = Path(folder) / "onstream.toml"
        file.write_text(toml_text(settings), encoding="utf-8")
        _refuse_what_workers_would_not_read(settings, file)
        code = launcher.up(settings, [file], [], console)
    if code is not Exit.OK:
        raise UserError(
            f"run {settings.run.name} ended with exit code {code:d}",
            expected="a run that trains to its end",
            next_step=f"What it printed says why, and so do the logs in {settings.run_dir}/logs.",
            exit=code,
        )
    return Run(settings)


def _refuse_what_workers_would_not_read(settings: Settings, file: Path) -> None:
    """Refuse settings that the run's processes would not read as they are here.

    They read `file`, which has no secrets, and the environment, which wins.

    Raises:
        UserError: it names the variables to set or unset.
    """
    theirs = load_settings([file])
    names = [name for name in known() if _value(settings, name) != _value(theirs, name)]
    if names:
        variables = ", ".join(map(variable_of, names))
        raise UserError(
            f"{', '.join(names)}, which the run's workers would read otherwise",
            expected="settings that agree with the environment, and secrets that are in it",
            next_step=f"Unset {variables} in the environment; of a secret, set it there.",
        )


def _value(settings: Settings, name: str) -> Any:
    """The value of a setting; None in a section that is unset or of another type."""
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part, None)
    return value
