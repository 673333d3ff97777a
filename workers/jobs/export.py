"""A policy version of a run as a model directory of its own: whole weights, whatever was trained."""

from __future__ import annotations

import shutil
from pathlib import Path

from onstream.pipeline.errors import UserError
from onstream.settings.root import Settings
from onstream.workers.evaluation.versions import find_version

NOT_THE_MODELS = ("optimizer.pt", "trainer.json", "manifest.json")


def export(settings: Settings, version: int | None, out: Path) -> int:
    """Write `version` (by default the newest on disk) to `out` as Hugging Face files, an adapter
    merged; returns its number.

    Raises:
        UserError: the run has no such version, `out` is there already, or the model cannot be
            loaded.
    """
    if out.exists():
        raise UserError(
            f"{out} exists",
            expected="a directory to be made",
            next_step="Choose another --out, or remove it.",
        )
    directory, version = find_version(settings, version)
    if not directory.is_dir():
        raise UserError(
            f"version {version} is the student's start {directory}, which the run keeps no copy of",
            expected="a version that was trained, or a student in a directory",
            next_step="Give --version.",
        )
    from onstream.pipeline.models.loading import base_of  # brings torch
    from onstream.workers.trainer.lora import write_merged

    if base_of(directory):
        write_merged(directory, out)
    else:
        shutil.copytree(directory, out, ignore=shutil.ignore_patterns(*NOT_THE_MODELS))
    return version
