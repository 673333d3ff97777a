"""Whether a replay comes to what was recorded, and what a person reads of it.

That is how far it is, a step's metrics, and the samples with the largest part in its loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from onstream.workers.launcher.progress import SHOWN, clock
from onstream.workers.trainer.durability.checkpoint import MANIFEST, OPTIMIZER
from onstream.workers.trainer.metrics_files import sample_row

if TYPE_CHECKING:
    from onstream.workers.replay.player import ReplayedStep

FIGURES = ("loss_share", "loss", "mismatch_max", "reward", "staleness")
TEXT_SHOWN = 120  # characters of a completion


class ReplayResult:
    """What a replay came to, step by step, beside the recorded run.

    `changed` are the settings that the replay changes: with any of them, a difference is no fault.
    `first_other_weights` is the first step whose weights differ, `first_other_metrics` the first
    whose metrics do, with their names. `missed` is the first recorded step that was not due here.
    """

    def __init__(self, changed: Mapping[str, Any]) -> None:
        self.changed = changed
        self.steps: list[int] = []
        self.first_other_weights: int | None = None
        self.first_other_metrics: tuple[int, list[str]] | None = None
        self.missed: int | None = None
        self.other_files: list[str] | None = None
        self._checkpoint = ""

    def add(self, step: ReplayedStep) -> None:
        """Compare a step with the recorded one."""
        self.steps.append(step.number)
        if not step.same_weights and self.first_other_weights is None:
            self.first_other_weights = step.number
        if step.other_metrics and self.first_other_metrics is None:
            self.first_other_metrics = step.number, step.other_metrics

    def compare_checkpoints(self, ours: Path, theirs: Path) -> None:
        """Compare two checkpoints of the last step, by the digests in their manifests.

        Only the weights and the optimizer's state count.
        """
        mine = _digests(ours)
        recorded = _digests(theirs)
        self._checkpoint = theirs.name
        names = sorted({*mine, *recorded})
        self.other_files = [name for name in names if mine.get(name) != recorded.get(name)]

    @property
    def equal(self) -> bool:
        """Whether all is as recorded so far."""
        return (
            self.first_other_weights is None
            and self.first_other_metrics is None
            and self.missed is None
            and not self.other_files
        )

    @property
    def passes(self) -> bool:
        """Whether nothing differs that should not."""
        return self.equal or bool(self.changed)

    def data(self) -> dict[str, Any]:
        """The result as JSON data."""
        other = self.first_other_metrics
        return {
            "steps": self.steps,
            "equal": self.equal,
            "changed": list(self.changed),
            "first_other_weights": self.first_other_weights,
            "first_other_metrics": other and {"step": other[0], "names": other[1]},
            "missed": self.missed,
            "other_files": self.other_files,
        }

    def lines(self) -> list[str]:
        """The result in words; nothing where no step was replayed."""
        if not self.steps:
            return []
        steps = f"steps {self.steps[0]} to {self.steps[-1]}"
        lines = [f"{steps}: {self._weights_text()}; {self._metrics_text()}"]
        if self.missed is not None:
            lines.append(
                f"step {self.missed} was recorded at a place of the stream "
                "where no batch was complete here"
            )
        if self.other_files is not None:
            lines.append(
                f"the recorded run's checkpoint {self._checkpoint} {self._checkpoint_text()}"
            )
        if self.changed and not self.equal:
            lines.append(f"differs by intent: {', '.join(self.changed)}")
        return lines

    def _weights_text(self) -> str:
        if self.first_other_weights is None:
            return "the weights after each of them equal the recorded ones, bit for bit"
        first = self.first_other_weights
        return f"the weights differ from the recorded ones, first after step {first}"

    def _metrics_text(self) -> str:
        if self.first_other_metrics is not None:
            step, names = self.first_other_metrics
            return f"metrics differ, first in step {step}: {', '.join(names)}"
        return (
            "so do the metrics" if self.first_other_weights is None else "the metrics are the same"
        )

    def _checkpoint_text(self) -> str:
        if self.other_files:
            return f"differs in {', '.join(self.other_files)}"
        return "has the same weights and optimizer state, byte for byte"


def _digests(checkpoint: Path) -> dict[str, str]:
    digests = msgspec.json.decode((checkpoint / MANIFEST).read_bytes(), type=dict[str, str])
    return {
        name: digest
        for name, digest in digests.items()
        if name.endswith(".safetensors") or name == OPTIMIZER
    }


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


def worst_rows(step: ReplayedStep, worst: int, run: str) -> list[dict[str, Any]]:
    """The rows of the `worst` rollouts of the step, by their share in its loss."""
    return sorted(replay_rows(step, run), key=lambda row: -row["loss_share"])[:worst]


def step_text(step: ReplayedStep, worst: int, run: str, *, compared: bool) -> str:
    """The metrics of a step, and the `worst` samples by their share in its loss.

    Where it is `compared`, recorded metrics that differ stand beside its own.
    """
    recorded = step.recorded.metrics if step.recorded and compared else {}
    lines = [f"step {step.number}:"]
    for name, value in step.row.items():
        if value is not None and name != "step":
            lines.append(f"  {name:<24}{figure_text(value)}{recorded_text(recorded, name, value)}")
    rows = worst_rows(step, worst, run)
    if rows:
        lines.append(
            f"the {len(rows)} samples with the largest part in its loss, "
            f"of {step.row['rollouts']:g}:"
        )
    for row in rows:
        figures = [f"{name} {figure_text(row[name])}" for name in FIGURES if row[name] is not None]
        lines.append(f"  {row['uid']}  {'  '.join(figures)}")
        lines += [f"    {text[:TEXT_SHOWN]!r}" for text in row["completions"]]
    return "\n".join(lines)


def recorded_text(recorded: dict[str, Any], name: str, value: Any) -> str:
    """The `recorded` value of a metric, for the end of a line, where it is not `value`."""
    if name not in recorded or recorded[name] == value:
        return ""
    return f"  (recorded: {figure_text(recorded[name])})"


def figure_text(value: Any) -> str:
    """A metric as a person reads it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
