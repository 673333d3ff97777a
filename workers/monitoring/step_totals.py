"""What the steps of a run add up to, from its `metrics.jsonl` as it grows."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from onstream.pipeline.run_files.json_lines import GrowingRows
from onstream.workers.launcher.metric_rows import Row, number

COUNTED = ("rollouts", "tokens", "dropped_stale", "dropped_other", "dead", "unscored", "wait_s")
"""Fields that are added up as they are."""
PREFIXES = {"handling": "latency_", "queue": "queue_"}
"""How the fields begin that have the mean times of a step's rollouts, by stage."""


class StepTotals:
    """Sums over all steps, and the newest step's row; `read` takes in what was appended.

    `sums` has the fields of `COUNTED`, `waited_s` the seconds that the trainer waited by stage,
    `scored_by` the rollouts of each teacher. `times` has seconds and rollouts by what they were
    spent with (`handling`, `queue`) and stage.
    """

    def __init__(self, path: Path) -> None:
        self._file = GrowingRows(path)
        self._clear()

    def _clear(self) -> None:
        self.newest: dict[str, Any] = {}
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.waited_s: defaultdict[str, float] = defaultdict(float)
        self.scored_by: defaultdict[str, float] = defaultdict(float)
        self.times: dict[tuple[str, str], tuple[float, int]] = {}

    def read(self) -> None:
        """Take in the steps since the last call; from the first one on where a resume took some
        back.
        """
        void, rows = self._file.read()
        if void:
            self._clear()
        for row in rows:
            self._add(row)
            self.newest = row

    def _add(self, row: Row) -> None:
        rollouts = int(number(row, "rollouts") or 0)
        for name in COUNTED:
            self.sums[name] += number(row, name) or 0.0
        for stage, seconds in (row.get("waited_for") or {}).items():
            self.waited_s[stage] += seconds
        for teacher, share in (row.get("scored_by") or {}).items():
            self.scored_by[teacher] += share * rollouts
        for kind, prefix in PREFIXES.items():
            for name in row:
                if name.startswith(prefix) and (mean := number(row, name)) is not None:
                    stage = name.removeprefix(prefix).removesuffix("_s")
                    seconds, count = self.times.get((kind, stage), (0.0, 0))
                    self.times[kind, stage] = (seconds + mean * rollouts, count + rollouts)
