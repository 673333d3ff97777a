"""The token budget of a stage in one run, over all workers and restarts."""

from __future__ import annotations

from onstream.pipeline.redis.score_store import ScoreStore
from onstream.settings.stages import StreamName


class TokenBudget:
    """A bound of `most` tokens for `stage`. With None there is no bound, and nothing is reported.

    `own` is what this worker has spent, and former ones of its name. `spent` is what all workers
    have spent, as far as they had reported it when this one reported last. Together they may exceed
    the bound by what they have in flight. `setting` is the name of the bound, for messages.
    """

    def __init__(
        self, store: ScoreStore, stage: StreamName, most: int | None, setting: str
    ) -> None:
        self._store = store
        self._stage = stage
        self.most = most
        self._setting = setting
        self.own = 0
        self.spent = 0
        self._reported = 0

    def open(self) -> None:
        """Read what was spent before."""
        if self.most is not None:
            self.own = self._store.own_spent_tokens(self._stage)
            self._reported = self.own
            self.spent = self._store.report_spent_tokens(self._stage, self.own)

    def spend(self, tokens: int) -> None:
        """Count tokens. Other workers see them after `report`."""
        self.own += tokens
        self.spent += tokens

    def report(self) -> None:
        """Report what was spent since the last time, and read what the others have."""
        if self.most is not None and self.own > self._reported:
            self.spent = self._store.report_spent_tokens(self._stage, self.own)
            self._reported = self.own

    def allows(self, tokens: int = 1) -> bool:
        """Whether `tokens` more may be spent."""
        return self.most is None or self.spent + tokens <= self.most

    def problem(self, tokens: int = 1) -> str:
        """Why `tokens` more may not be spent; empty where they may."""
        if self.most is None or self.allows(tokens):
            return ""
        return (
            f"the budget is spent: {self.spent:,} of {self._setting} = {self.most:,} tokens; "
            "raise it and start this worker again"
        )
