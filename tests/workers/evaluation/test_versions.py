"""Where the weights of a version are looked for."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from onstream.pipeline.errors import UserError
from onstream.settings.load import load_settings
from onstream.workers.evaluation.versions import find_version, show


def test_a_version_is_found_published_else_in_a_checkpoint_else_as_the_starting_student(
    tmp_path: Path,
) -> None:
    settings = load_settings(
        overrides=["run.name=r", f"run.dir={tmp_path}", "model.name=small"], environ={}
    )
    assert find_version(settings, None) == (Path("small"), 0)
    run = settings.run_dir
    for folder in (
        "policies/000007",
        "policies/.unfinished-000008",
        "checkpoints/step-000005",
        "checkpoints/step-000007",
    ):
        (run / folder).mkdir(parents=True)
    assert find_version(settings, None) == (run / "policies/000007", 7)
    assert find_version(settings, 5) == (run / "checkpoints/step-000005", 5)
    assert find_version(settings, 0) == (Path("small"), 0)
    (
        run / "checkpoints/step-000005.1"
    ).mkdir()  # a second one of its step: more records were settled, no step was taken
    assert find_version(settings, 5) == (run / "checkpoints/step-000005.1", 5)
    with pytest.raises(UserError, match=r"policy version 6 .* expected one that is kept: 0, 5, 7"):
        find_version(settings, 6)


def test_an_evaluation_reads_as_a_table_on_a_terminal() -> None:
    text = io.StringIO()
    row = {"version": 80, "time": 1.5, "exact": 0.98765, "reward": None, "samples": 256}
    show(row, "[demo]", Console(file=text, width=80))
    assert [line.split() for line in text.getvalue().splitlines()] == [
        ["run", "[demo]"],
        ["version", "80"],
        ["exact", "0.9877"],
        ["reward", "none"],
        ["samples", "256"],
    ]
