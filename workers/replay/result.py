"""Whether a replay comes to what was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from onstream.workers.trainer.durability.checkpoint import MANIFEST, OPTIMIZER

if TYPE_CHECKING:
    from onstream.workers.replay.player import ReplayedStep


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
