"""What a person reads of a replay: how far it is, a step's metrics, and the samples that had the
largest part in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from onstream.workers.launcher.progress import SHOWN, clock
from onstream.workers.trainer.batches.sample_rows import sample_row

if TYPE_CHECKING:
    from onstream.workers.replay.player import ReplayedStep
    from onstream.workers.replay.result import ReplayResult

FIGURES = ("loss_share", "loss", "mismatch_max", "reward", "staleness")
TEXT_SHOWN = 120  # characters of a completion


class Progress:
    """Says how far a replay is, at most every `interval_s` seconds. `last_step` is where it will
    end, if that is known.
    """

    def __init__(
        self, say: Callable[[str], None], last_step: int | None, interval_s: float
    ) -> None:
        self._say = say
        self._last_step = last_step
        self._interval_s = interval_s
        self._began = self._said = time.monotonic()
        self._steps = 0

    def show(self, played: ReplayedStep, verdict: ReplayResult) -> None:
        """Tell of the step just taken, if it is time."""
        self._steps += 1
        now = time.monotonic()
        if now - self._said < self._interval_s:
            return
        self._said = now
        parts = [f"step {played.step}" + (f"/{self._last_step}" if self._last_step else "")]
        parts += [
            f"{name} {played.row[name]:.4g}" for name in SHOWN if played.row.get(name) is not None
        ]
        parts.append(
            "as recorded"
            if verdict.equal
            else "differs by intent"
            if verdict.changed
            else "DIFFERS"
        )
        if self._last_step and self._last_step > played.step:
            parts.append(
                f"ETA {clock((now - self._began) / self._steps * (self._last_step - played.step))}"
            )
        self._say("  ".join(parts))


def replay_rows(played: ReplayedStep, run: str) -> Iterator[dict[str, Any]]:
    """One row for every rollout that the step trained on.

    Beside what `samples.jsonl` of a run has: `loss`, the sum over the rollout's tokens,
    `loss_share`, its part in the sum of absolute losses of the step, and `mismatch_max`, the
    largest |log ratio| of one of its tokens, in nats.
    """
    rollouts = [(chosen, rollout) for chosen in played.batch for rollout in chosen.rollouts]
    losses = []
    mismatches = []
    place = 0
    for _, rollout in rollouts:
        places = range(place, place := place + len(rollout.samples))
        losses.append(sum(played.per_sample.loss.get(at, 0.0) for at in places))
        mismatches.append(
            max(
                (
                    played.per_sample.mismatch_max[at]
                    for at in places
                    if at in played.per_sample.mismatch_max
                ),
                default=None,
            )
        )
    total = sum(map(abs, losses)) or 1.0
    for (chosen, rollout), loss, mismatch in zip(rollouts, losses, mismatches, strict=True):
        row = sample_row(rollout, run, played.step)
        yield {
            **row,
            "staleness": chosen.staleness,
            "loss": loss,
            "loss_share": abs(loss) / total,
            "mismatch_max": mismatch,
        }


def step_text(played: ReplayedStep, worst: int, run: str, *, compared: bool) -> str:
    """The metrics of a step, beside the recorded ones where they are `compared`, and the `worst`
    samples by their share in the loss.
    """
    recorded = played.recorded.metrics if played.recorded and compared else {}
    lines = [f"step {played.step}:"]
    for name, value in played.row.items():
        if value is not None and name != "step":
            other = (
                f"  (recorded: {_text(recorded[name])})"
                if name in recorded and recorded[name] != value
                else ""
            )
            lines.append(f"  {name:<24}{_text(value)}{other}")
    rows = sorted(replay_rows(played, run), key=lambda row: -row["loss_share"])[:worst]
    if rows:
        lines.append(
            f"the {len(rows)} samples with the largest part in its loss, of {played.row['rollouts']:g}:"
        )
    for row in rows:
        figures = [f"{name} {_text(row[name])}" for name in FIGURES if row[name] is not None]
        lines.append(f"  {row['uid']}  {'  '.join(figures)}")
        lines += [f"    {text[:TEXT_SHOWN]!r}" for text in row["completions"]]
    return "\n".join(lines)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
