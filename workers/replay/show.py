"""What a person reads of a replay: how far it is, a step's metrics, and the samples with the
largest part in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from onstream.workers.launcher.progress import SHOWN, clock
from onstream.workers.trainer.metrics_files import sample_row

if TYPE_CHECKING:
    from onstream.workers.replay.player import ReplayedStep
    from onstream.workers.replay.result import ReplayResult

FIGURES = ("loss_share", "loss", "mismatch_max", "reward", "staleness")
TEXT_SHOWN = 120  # characters of a completion


class ReplayProgress:
    """Says how far a replay is, at most every `interval_s` seconds.

    `last_step` is where it will end, if that is known.
    """

    def __init__(
        self, say: Callable[[str], None], last_step: int | None, interval_s: float
    ) -> None:
        self._say = say
        self._last_step = last_step
        self._interval_s = interval_s
        self._began = time.monotonic()
        self._said = self._began
        self._steps = 0

    def show(self, step: ReplayedStep, result: ReplayResult) -> None:
        """Say something of the step just taken, if it is time."""
        self._steps += 1
        now = time.monotonic()
        if now - self._said < self._interval_s:
            return
        self._said = now
        last = f"/{self._last_step}" if self._last_step else ""
        parts = [f"step {step.number}{last}"]
        for name in SHOWN:
            if step.row.get(name) is not None:
                parts.append(f"{name} {step.row[name]:.4g}")
        parts.append(_comparison(result))
        if self._last_step and self._last_step > step.number:
            step_s = (now - self._began) / self._steps
            parts.append(f"ETA {clock(step_s * (self._last_step - step.number))}")
        self._say("  ".join(parts))


def _comparison(result: ReplayResult) -> str:
    if result.equal:
        return "as recorded"
    return "differs by intent" if result.changed else "DIFFERS"


def replay_rows(step: ReplayedStep, run: str) -> Iterator[dict[str, Any]]:
    """One row for every rollout that the step trained on.

    Beside what `samples.jsonl` of a run has: `loss`, the sum over the rollout's tokens,
    `loss_share`, its part in the sum of absolute losses of the step, and `mismatch_max`, the
    largest |log ratio| of one of its tokens, in nats.
    """
    rows = []
    place = 0  # of the rollout's first sample in the step
    for unit in step.batch:
        for rollout in unit.rollouts:
            samples = range(place, place + len(rollout.samples))
            place = samples.stop
            row = sample_row(rollout, run, step.number)
            row["staleness"] = unit.staleness
            row |= _losses(step, samples)
            rows.append(row)
    total = sum(abs(row["loss"]) for row in rows) or 1.0
    for row in rows:
        row["loss_share"] = abs(row["loss"]) / total
        yield row


def _losses(step: ReplayedStep, samples: range) -> dict[str, float | None]:
    """What a rollout, whose samples stand at the places `samples` of the step, came to."""
    losses = step.per_sample.loss
    mismatches = step.per_sample.mismatch_max
    return {
        "loss": sum(losses.get(at, 0.0) for at in samples),
        "mismatch_max": max((mismatches[at] for at in samples if at in mismatches), default=None),
    }


def step_text(step: ReplayedStep, worst: int, run: str, *, compared: bool) -> str:
    """The metrics of a step, and the `worst` samples by their share in its loss.

    Where it is `compared`, recorded metrics that differ stand beside its own.
    """
    recorded = step.recorded.metrics if step.recorded and compared else {}
    lines = [f"step {step.number}:"]
    for name, value in step.row.items():
        if value is not None and name != "step":
            lines.append(f"  {name:<24}{_text(value)}{_recorded_text(recorded, name, value)}")
    rows = sorted(replay_rows(step, run), key=lambda row: -row["loss_share"])[:worst]
    if rows:
        lines.append(
            f"the {len(rows)} samples with the largest part in its loss, "
            f"of {step.row['rollouts']:g}:"
        )
    for row in rows:
        figures = [f"{name} {_text(row[name])}" for name in FIGURES if row[name] is not None]
        lines.append(f"  {row['uid']}  {'  '.join(figures)}")
        lines += [f"    {text[:TEXT_SHOWN]!r}" for text in row["completions"]]
    return "\n".join(lines)


def _recorded_text(recorded: dict[str, Any], name: str, value: Any) -> str:
    if name not in recorded or recorded[name] == value:
        return ""
    return f"  (recorded: {_text(recorded[name])})"


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
