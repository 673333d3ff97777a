"""A run as Python sees it: rows, the report, its state and its policies."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import onstream
from onstream.pipeline.errors import UserError
from onstream.settings.load import load_settings
from onstream.settings.root import Settings
from onstream.workers.api.run import Run
from tests.workers.inspection.test_status import made_run


def write_rows(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    overrides = [f"run.dir={tmp_path}", "run.name=demo"]
    return load_settings(overrides=overrides, environ={})


def test_to_import_the_package_loads_nothing_of_it_and_using_a_name_loads_no_torch() -> None:
    code = (
        "import sys, onstream\n"
        "print(sorted(name for name in sys.modules if name.startswith('onstream.')))\n"
        "onstream.up, onstream.Run, onstream.Settings, onstream.load_settings\n"
        "print(sorted({'torch', 'pandas', 'matplotlib', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_the_package_has_its_names_and_no_others() -> None:
    assert dir(onstream) == sorted(onstream.__all__)
    assert all(getattr(onstream, name) for name in onstream.__all__)
    assert onstream.Run is Run
    with pytest.raises(AttributeError, match="'onstream' has no attribute 'Runs'"):
        _ = onstream.Runs


def test_metrics_evaluations_and_samples_are_the_lines_of_their_files(settings: Settings) -> None:
    run = Run(settings)
    assert (run.metrics(), run.evaluations(), run.samples()) == ([], [], [])

    write_rows(run.directory / "metrics.jsonl", {"step": 1, "loss": 0.5}, {"step": 2, "loss": None})
    write_rows(run.directory / "evals.jsonl", {"version": 0, "exact": 0.25})
    write_rows(run.directory / "samples.jsonl", {"step": 1, "completions": ["ba"]})

    assert run.metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    assert run.evaluations() == [{"version": 0, "exact": 0.25}]
    assert run.samples() == [{"step": 1, "completions": ["ba"]}]


def test_rows_become_a_frame_where_pandas_is_installed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(settings)
    write_rows(run.directory / "metrics.jsonl", {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25})
    frame = run.metrics().frame()
    assert list(frame.columns) == ["step", "loss"]
    assert frame.set_index("step")["loss"].to_dict() == {1: 0.5, 2: 0.25}

    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it could not be found
    with pytest.raises(UserError, match="pip install pandas"):
        run.metrics().frame()


def test_the_report_of_a_run_that_still_trains_is_of_the_steps_so_far(settings: Settings) -> None:
    run = Run(settings)
    row = {"step": 1, "rollouts": 8, "elapsed_s": 2.0, "loss": 0.5}
    write_rows(run.directory / "metrics.jsonl", row)
    report = run.report()
    assert (report["steps"], report["rollouts_per_s"]) == (1, 4.0)
    assert not (run.directory / "report.json").exists()


def test_policies_are_the_directories_of_the_versions_that_are_kept(settings: Settings) -> None:
    run = Run(settings)
    assert run.policies() == {}
    for name in ("policies/000012", "policies/deltas", "checkpoints/step-000010"):
        (run.directory / name).mkdir(parents=True)
    assert run.policies() == {
        10: run.directory / "checkpoints/step-000010",
        12: run.directory / "policies/000012",
    }
    assert list(run.policies()) == [10, 12]


def test_a_run_is_found_by_its_directory_and_tells_its_state_audit_and_dead_letters(
    tmp_path: Path,
) -> None:
    made = made_run(tmp_path, steps=4)
    run = Run(made.run_dir)
    assert (run.name, run.directory) == ("demo", made.run_dir)
    assert repr(run) == f"Run('{made.run_dir}')"

    state = run.status()
    assert (state["phase"], state["step"], state["issued"]) == ("finished", 4, 2)
    assert run.audit()["trained"] == 2
    assert run.audit(uids=True)["trained"] == ["demo/1", "demo/2"]
    assert run.dead_letters()["reasons"] == []


def test_a_run_that_is_not_there_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*nowhere.*expected a TOML file, or the direct"):
        Run(tmp_path / "nowhere")
