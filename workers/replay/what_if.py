"""The settings of a replay: those of the recorded run, and what the replay changes in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onstream.pipeline.errors import UserError
from onstream.pipeline.run_files.recording import ResumeMark
from onstream.settings.fields import known
from onstream.settings.load import load_settings
from onstream.settings.root import Settings

ALLOWED = (
    "deployment.device",
    "deployment.threads",
    "checkpoint.keep_policies",
    "log.level",
    "log.format",
)
"""What a replay may change beside the settings of the trainer."""
WITHOUT_EFFECT = ("log.", "checkpoint.")
"""Settings that change neither weights nor metrics."""


class WhatIf:
    """The settings of a replay that writes to `out`.

    Args:
        settings_file: the settings that the recording was begun with.
        overrides: what the replay changes, each as `name=value`.

    Raises:
        UserError: a setting is one that a replay cannot change.
    """

    def __init__(self, settings_file: Path, out: Path, overrides: Sequence[str]) -> None:
        _refuse_other(overrides)
        self._settings_file = settings_file
        self._out = out
        self._overrides = overrides

    def settings_at(self, opened: ResumeMark) -> Settings:
        """The settings of a trainer that resumed as `opened` says, with what is changed."""
        return self._load(opened, self._overrides)

    def changed(self, opened: ResumeMark) -> dict[str, tuple[Any, Any]]:
        """What is changed: the recorded value and the replay's, by name.

        A setting that was set to its recorded value is not changed.
        """
        recorded = self._load(opened, ())
        ours = self.settings_at(opened)
        changed = {}
        for name in map(_name_of, self._overrides):
            if name not in known() or name.startswith(WITHOUT_EFFECT):
                continue
            values = (known()[name].value(recorded), known()[name].value(ours))
            if values[0] != values[1]:
                changed[name] = values
        return changed

    def _load(self, opened: ResumeMark, overrides: Sequence[str]) -> Settings:
        recorded = [f"{name}={json.dumps(value)}" for name, value in opened.settings.items()]
        own = [
            f"run.name={self._out.name}",
            f"run.dir={self._out.parent}",
            "trainer.record=false",
            "log.level=warning",
        ]
        # Nothing of the environment: it belongs to other runs.
        return load_settings([self._settings_file], [*recorded, *own, *overrides], environ={})


def _refuse_other(overrides: Sequence[str]) -> None:
    """A replay has the trainer alone: what the other workers would do is in the recording."""
    for name in map(_name_of, overrides):
        of_the_trainer = name.startswith("trainer.") and name != "trainer.record"
        if name in known() and name not in ALLOWED and not of_the_trainer:
            raise UserError(
                f"--set {name}",
                expected=f"a setting of the trainer (trainer.…), or {', '.join(ALLOWED)}",
                next_step="Leave it out: rollouts, batches and staleness are as recorded.",
            )


def _name_of(override: str) -> str:
    return override.partition("=")[0].strip()
