"""docs/metrics.md has every field of a run's metrics, evaluations and report, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from onstream.workers.evaluation.greedy import evaluate
from onstream.workers.launcher.metric_docs import FILES, PAGE, text
from onstream.workers.launcher.report import USAGE, build
from onstream.workers.trainer.evaluations import METRICS as EVALUATION_METRICS
from tests.workers.trainer.driver import Run

DOCUMENTED = {
    file.name: {one.name: one.when for one in file.fields if "…" not in one.name} for file in FILES
}
EVALUATION = {"version": 0, "time": 1.0, "exact": 0.5, "reward": 0.4, "samples": 8, "unscored": 0}


def always(file: str) -> set[str]:
    return {name for name, when in DOCUMENTED[file].items() if not when}


def leaves(report: dict[str, Any], names: set[str]) -> Iterator[str]:
    """The fields of a report: those in a table that is documented by its parts are told apart."""
    for name, value in report.items():
        apart = isinstance(value, dict) and name not in names
        yield from (f"{name}.{inner}" for inner in value) if apart else [name]


def test_the_page_is_current() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == text(), "run: python -m onstream.workers.launcher.metric_docs"


def test_a_step_has_the_documented_fields_and_no_others(run: Callable[..., Run]) -> None:
    job = run()
    job.ready()
    job.until(1)
    assert set(job.rows()[0]) == always("metrics.jsonl")
    assert set(EVALUATION_METRICS) == set(DOCUMENTED["metrics.jsonl"]) - always("metrics.jsonl")


def test_a_report_has_the_documented_fields_and_no_others(run: Callable[..., Run]) -> None:
    job = run()
    job.ready()
    job.until(1)
    directory = job.trainer.directory.path
    evaluations = [EVALUATION, {**EVALUATION, "version": 1, "exact_swapped": 0.1}]
    lines = "".join(json.dumps(row) + "\n" for row in evaluations)
    (directory / "evals.jsonl").write_text(lines)
    usage: dict[str, Any] = {name: {"trainer": 1.0} for name in USAGE}
    report = build(directory, {**usage, "cores_busy": 0.5}, workers={"generate": 1})
    documented = set(DOCUMENTED["report.json"])
    assert set(leaves(report, documented)) == documented


def test_an_evaluation_has_the_documented_fields_and_no_others() -> None:
    told = set(EVALUATION) | {"seconds"}
    assert told == always("evals.jsonl")
    at_times = set(DOCUMENTED["evals.jsonl"]) - told
    assert at_times == {"exact_swapped", "samples_swapped", "turns", "tool_calls"}
    assert all(
        f"`{name}`" in (evaluate.__doc__ or "") for name in at_times | told - {"version", "time"}
    )


def test_every_file_that_a_trainer_leaves_is_on_the_page_of_files(run: Callable[..., Run]) -> None:
    job = run(trainer__record=True)
    job.ready()
    job.until(2)
    page = (PAGE.parent / "run-files.md").read_text(encoding="utf-8")
    left = [path.name + "/" * path.is_dir() for path in job.trainer.directory.path.iterdir()]
    assert {"recording/", "plan.json", "trained.jsonl"} <= set(left)
    assert [name for name in left if f"`{name}`" not in page] == []
