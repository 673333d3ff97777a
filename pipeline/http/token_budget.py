"""The tokens that all workers of a stage may have endpoints read and write in one run, restarts
included.
"""

from __future__ import annotations

from typing import Protocol

from onstream.pipeline.records import StageName


class SpendingStore(Protocol):
    """What a budget asks of the bus."""

    def own_spent(self, stage: StageName) -> int: ...
    def report_spent(self, stage: StageName, tokens: int) -> int: ...


class TokenBudget:
    """`most` tokens for `stage`; None: no bound, and nothing is told to the others. `setting` is
    the name of the bound, for messages.

    `own` is what this worker, and former ones of its name, have spent; `spent` what all have, as
    far as they had told when this one told last. Several workers may together exceed the bound by
    what they have in flight.
    """

    def __init__(
        self, purse: SpendingStore, stage: StageName, most: int | None, setting: str
    ) -> None:
        self._purse = purse
        self._stage = stage
        self.most = most
        self._setting = setting
        self.own = self.spent = self._told = 0

    def open(self) -> None:
        """Take up what was spent before."""
        if self.most is not None:
            self.own = self._told = self._purse.own_spent(self._stage)
            self.spent = self._purse.report_spent(self._stage, self.own)

    def spend(self, tokens: int) -> None:
        """Count tokens. The others learn of them by `tell`."""
        self.own += tokens
        self.spent += tokens

    def tell(self) -> None:
        """Tell the other workers what was spent since the last time, and learn what they have."""
        if self.most is not None and self.own > self._told:
            self.spent = self._purse.report_spent(self._stage, self.own)
            self._told = self.own

    def allows(self, tokens: int = 1) -> bool:
        """Whether `tokens` more may be spent."""
        return self.most is None or self.spent + tokens <= self.most

    def problem(self, tokens: int = 1) -> str:
        """Why `tokens` more may not be spent, in words; empty where they may."""
        if self.most is None or self.allows(tokens):
            return ""
        return f"the budget is spent: {self.spent:,} of {self._setting} = {self.most:,} tokens; raise it and start this worker again"
