"""What is said when a run has ended: what did not go as it should, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onstream.pipeline.command_line import command

REASONS_SHOWN = 3
MANY_TRUNCATED = 0.1
MUCH_WAITING = 0.1
MUCH_FASTER = 1.05
BUSY = 0.9
DROPPED = {"stale": "too stale", "other": "that nothing could train"}
"""The words for rollouts that were dropped, by their names in the report."""


def sentences(report: Mapping[str, Any], run_dir: Path) -> Iterator[str]:
    """What `report` has that a person should know, and the commands that come next."""
    yield from _troubles(report, run_dir)
    yield from _waiting(report)
    if (nothing := nothing_learnt(report)) is not None:
        yield nothing
        return
    yield f"finished after step {report['steps']}"
    out = f"{run_dir.name}-model"
    yield f"the trained model as a directory: `{command()} export {run_dir} --out {out}`"


def nothing_learnt(report: Mapping[str, Any]) -> str | None:
    """Why the run taught the student nothing, in words; None where it did."""
    if not report["steps"]:
        return "nothing was trained: no step was taken"
    if report["steps_without_gradient"] == report["steps"]:
        return (
            "nothing was learnt: the gradient of every step was 0. Where only rewards teach, the "
            "rewards of each group were all the same"
        )
    return None


def _troubles(report: Mapping[str, Any], run_dir: Path) -> Iterator[str]:
    unscored = report["unscored"]
    if unscored["rollouts"]:
        yield f"unscored {unscored['rollouts']} of {report['rollouts']}: {unscored['reason']}"
    if dead := report["dead_letters"]:
        count = sum(group["count"] for group in dead)
        yield f"dead letters {count}: {_reasons(dead)} (`{command()} dead list {run_dir}`)"
    dropped = [f"{report['dropped'][name]} {word}" for name, word in DROPPED.items()]
    if any(report["dropped"].values()):
        yield f"dropped: {', '.join(dropped)}"
    share = report["truncated_share"]
    if share is not None and share >= MANY_TRUNCATED:
        yield (
            f"{share:.0%} of the completions were cut off: inference.sampling.max_completion is "
            "what they may have"
        )
    without = report["steps_without_gradient"]
    if 0 < without < report["steps"]:
        yield f"{without} of {report['steps']} steps had no gradient"


def _waiting(report: Mapping[str, Any]) -> Iterator[str]:
    """Which stage the trainer waited for, and what another worker of it would give."""
    waited = {stage: share for stage, share in report["waited_for"].items() if share >= 0.01}
    if sum(waited.values()) < MUCH_WAITING:
        return
    words = {"train": "its own work with the records"}
    shares = ", ".join(
        f"{share:.0%} for {words.get(stage, stage)}" for stage, share in waited.items()
    )
    yield f"the trainer waited {report['wait_share']:.0%} of the time: {shares}"
    predicted = report.get("one_more_worker")
    if not predicted:
        return
    stage = max(predicted, key=predicted.__getitem__)
    now = report["rollouts_per_s"]
    if predicted[stage] >= MUCH_FASTER * now:
        yield (
            f"one more worker for {stage} may give up to {predicted[stage]:.4g} rollouts a second "
            f"(now {now:.4g}): deployment.workers"
        )
    elif report["cores_busy"] >= BUSY:
        yield (
            f"the cores were {report['cores_busy']:.0%} busy: more workers on this machine would "
            "hardly help"
        )


def _reasons(dead: Sequence[Mapping[str, Any]]) -> str:
    shown = [f"{group['reason']}" for group in dead[:REASONS_SHOWN]]
    if len(dead) > REASONS_SHOWN:
        shown.append("…")
    return "; ".join(shown)
