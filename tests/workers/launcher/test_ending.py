"""What is said when a run has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onstream.workers.launcher.ending import nothing_learnt, sentences
from onstream.workers.launcher.report import summary

RUN = Path("runs/demo")


def report(*rows: dict[str, Any], dead: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    numbered = [
        {"step": step, "rollouts": 64, "elapsed_s": 1.0, "grad_norm": 0.5, **row}
        for step, row in enumerate(rows, 1)
    ]
    return summary(numbered, []) | {"dead_letters": dead or []}


def test_a_run_without_trouble_has_finished_and_names_the_export() -> None:
    assert list(sentences(report({}, {}), RUN)) == [
        "finished after step 2",
        "the trained model as a directory: `onstream export runs/demo --out demo-model`",
    ]


def test_troubles_are_told_with_their_reasons_before_the_end() -> None:
    said = sentences(
        report(
            {
                "unscored": 64,
                "unscored_reason": "KeyError: 'solution' (my_scorer.py:7)",
                "truncated_share": 0.9,
                "dropped_stale": 4,
                "dropped_other": 8,
            },
            dead=[{"stage": "generate", "reason": "the prompt is too long", "count": 12}],
        ),
        RUN,
    )
    assert list(said)[:4] == [
        "unscored 64 of 64: KeyError: 'solution' (my_scorer.py:7)",
        "dead letters 12: the prompt is too long (`onstream dead list runs/demo`)",
        "dropped: 4 too stale, 8 that nothing could train",
        "90% of the completions were cut off: inference.sampling.max_completion is what they may "
        "have",
    ]


def test_a_run_that_taught_the_student_nothing_says_so_and_is_not_called_finished() -> None:
    assert list(sentences(report(), RUN)) == ["nothing was trained: no step was taken"]
    flat = report({"grad_norm": 0.0}, {"grad_norm": 0.0})
    [said] = sentences(flat, RUN)
    assert said.startswith("nothing was learnt: the gradient of every step was 0")
    assert nothing_learnt(report({"grad_norm": 0.0}, {})) is None


def waiting(predicted: float, cores_busy: float = 0.94) -> dict[str, Any]:
    waited_for = {"generate": 0.25, "score": 0.125, "train": 0.0625, "verify": 0.005}
    row = {"wait_s": 0.4425, "waited_for": waited_for}
    return report(row) | {"cores_busy": cores_busy, "one_more_worker": {"generate": predicted}}


def test_who_was_waited_for_is_told_and_what_another_worker_would_give() -> None:
    assert list(sentences(waiting(predicted=80.0), RUN))[:2] == [
        "the trainer waited 44% of the time: 25% for generate, 12% for score, 6% for its own work "
        "with the records",
        "one more worker for generate may give up to 80 rollouts a second (now 64): "
        "deployment.workers",
    ]


def test_where_the_cores_are_busy_another_worker_is_not_advised() -> None:
    assert list(sentences(waiting(predicted=66.0), RUN))[1] == (
        "the cores were 94% busy: more workers on this machine would hardly help"
    )


def test_where_neither_would_help_nothing_is_advised() -> None:
    assert list(sentences(waiting(predicted=66.0, cores_busy=0.5), RUN))[1] == (
        "finished after step 1"
    )


def test_little_waiting_is_not_told() -> None:
    [first, _] = sentences(report({"wait_s": 0.05, "waited_for": {"generate": 0.05}}), RUN)
    assert first == "finished after step 1"
