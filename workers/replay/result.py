"""Whether a replay came to what was recorded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from onstream.workers.trainer.durability.checkpoint import MANIFEST, OPTIMIZER

if TYPE_CHECKING:
    from onstream.workers.replay.player import ReplayedStep


class ReplayResult:
    """Counts the steps of a replay, `changed` of whose settings are not as recorded: then a
    difference is no fault.

    `first` is the first step whose weights differ; `missed` the first that the recorded run took
    where none was due here.
    """

    def __init__(self, changed: Mapping[str, Any]) -> None:
        self.changed = changed
        self.steps: list[int] = []
        self.first: int | None = None
        self.missed: int | None = None
        self.first_metrics: tuple[int, list[str]] | None = None
        self.other_files: list[str] | None = None
        self._checkpoint = ""

    def add(self, played: ReplayedStep) -> None:
        """Judge a step."""
        self.steps.append(played.step)
        if not played.same_weights and self.first is None:
            self.first = played.step
        if played.other_metrics and self.first_metrics is None:
            self.first_metrics = played.step, played.other_metrics

    def compare_checkpoints(self, ours: Path, theirs: Path) -> None:
        """Compare the weights and the optimizer's state in two checkpoints of the last step, by the
        digests in their manifests.
        """
        mine, recorded = (_digests(path) for path in (ours, theirs))
        self._checkpoint = theirs.name
        self.other_files = sorted(
            name for name in {*mine, *recorded} if mine.get(name) != recorded.get(name)
        )

    @property
    def equal(self) -> bool:
        """Whether all is as recorded so far."""
        return (
            self.first is None
            and self.missed is None
            and self.first_metrics is None
            and not self.other_files
        )

    @property
    def passes(self) -> bool:
        """Whether nothing differs that should not."""
        return self.equal or bool(self.changed)

    def lines(self) -> list[str]:
        """The verdict in words."""
        if not self.steps:
            return []
        what = f"steps {self.steps[0]} to {self.steps[-1]}"
        lines = [f"{what}: {self._weights()}; {self._metrics()}"]
        if self.missed is not None:
            lines.append(
                f"step {self.missed} was recorded at a place of the stream where no batch was complete here"
            )
        if self.other_files is not None:
            differ = (
                f"differs in {', '.join(self.other_files)}"
                if self.other_files
                else "has the same weights and optimizer state, byte for byte"
            )
            lines.append(f"the recorded run's checkpoint {self._checkpoint} {differ}")
        if self.changed and not self.equal:
            lines.append(f"differs by intent: {', '.join(self.changed)}")
        return lines

    def _weights(self) -> str:
        if self.first is None:
            return "the weights after each of them equal the recorded ones, bit for bit"
        return f"the weights differ from the recorded ones, first after step {self.first}"

    def _metrics(self) -> str:
        if self.first_metrics is None:
            return "so do the metrics" if self.first is None else "the metrics are the same"
        step, names = self.first_metrics
        return f"metrics differ, first in step {step}: {', '.join(names)}"


def _digests(checkpoint: Path) -> dict[str, str]:
    digests = msgspec.json.decode((checkpoint / MANIFEST).read_bytes(), type=dict[str, str])
    return {
        name: digest
        for name, digest in digests.items()
        if name.endswith(".safetensors") or name == OPTIMIZER
    }
