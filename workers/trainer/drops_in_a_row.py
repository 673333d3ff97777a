"""Notices a run in which nothing can train: every rollout that comes is dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.records import Rollout, Tombstone
from onstream.pipeline.run_files.ledger import Fate, Settled
from onstream.settings.root import Settings

REASONS_SHOWN = 3
NEXT_STEPS: dict[Fate, str] = {
    "not_verified": "Correct the scorer (task.scorer) or, where completions are cut off, raise "
    "inference.sampling.max_completion",
    "stale": "Start more or faster generators, or raise orchestrator.max_off_policy_steps",
    "dead": "`onstream dead list RUN` lists the reasons; mend what they name",
    "group_dead": "`onstream dead list RUN` lists the reasons; mend what they name",
}
"""What to do about the commonest fate."""


class DropsInARow:
    """Counts the rollouts that were dropped since the last one that could train, and why.

    A whole answer that was scored and is not right counts as neither: `keep = "verified"` is there
    to leave such out, however many they are.
    """

    def __init__(self, settings: Settings) -> None:
        orchestrator = settings.orchestrator
        on_their_way = orchestrator.max_off_policy_steps * orchestrator.batch_size
        groups = orchestrator.max_dropped_groups
        self._most = groups * orchestrator.group_size + on_their_way if groups else None
        self._reasons: dict[int, str | None] = {}  # of numbers that have not settled
        self._dropped = Counter[tuple[Fate, str]]()

    def consider(self, records: Iterable[Rollout | Tombstone]) -> None:
        """Note what may become the reason of each of `records`, whose fates are open."""
        for record in records:
            self._reasons[record.number] = _reason(record)

    def settle(self, settled: Sequence[Settled], *, can_train: bool) -> None:
        """Count what has settled; `can_train` says that a rollout trains, or waits for a batch."""
        for line in settled:
            reason = self._reasons.pop(line.number, "")
            filtered_out = line.fate == "not_verified" and reason is None
            if line.fate != "trained" and not filtered_out:
                self._dropped[line.fate, reason or ""] += 1
        if can_train:
            self._dropped.clear()

    @property
    def problem(self) -> UserError | None:
        """What to stop the run with; None while it may go on."""
        count = self._dropped.total()
        if self._most is None or count < self._most:
            return None
        (fate, _), _ = self._dropped.most_common(1)[0]
        return UserError(
            f"none of the last {count} rollouts could be trained on: {self._in_words()}",
            expected="rollouts that can train",
            next_step=f"{NEXT_STEPS.get(fate, 'Mend that')}, and start the run again: it goes on. "
            "orchestrator.max_dropped_groups says how many groups may be dropped in a row.",
            exit=Exit.REFUSED,
        )

    def _in_words(self) -> str:
        words = []
        for (fate, reason), count in self._dropped.most_common(REASONS_SHOWN):
            words.append(f"{count} {fate} ({reason})" if reason else f"{count} {fate}")
        return ", ".join(words)


def _reason(record: Rollout | Tombstone) -> str | None:
    """Why `record` would be dropped; None where that would be no fault of the run."""
    if isinstance(record, Tombstone):
        return record.reason
    if record.unscored is not None:
        return f"unscored: {record.unscored}"
    if record.finish_reason == "length":
        return "completions cut off"
    return None
