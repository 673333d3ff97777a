"""Keeps an engine at the newest announced policy version."""

from __future__ import annotations

import time
from collections.abc import Callable

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.weights import PolicyFetcher, WeightsError
from onstream.workers.generator.engines.base import Engine
from onstream.workers.generator.nccl_receiver import TransferReceiver

LOOK_S = 0.02
RETRY_S = 0.5


class PolicyLoader:
    """Looks for a newer version, at most every `LOOK_S`, and loads it; what cannot be loaded is
    tried again every `RETRY_S`.

    `newest` gives the newest announced version, None before the first, and `reader` its weights.
    Where the trainer sends them from GPU to GPU, `receiver` has them before they are announced;
    what it missed is read.
    """

    def __init__(
        self,
        engine: Engine,
        reader: PolicyFetcher,
        newest: Callable[[], PolicyVersion | None],
        clock: Callable[[], float] = time.monotonic,
        receiver: TransferReceiver | None = None,
    ) -> None:
        self._engine = engine
        self._reader = reader
        self._newest = newest
        self._clock = clock
        self._receiver = receiver
        self._next_look = float("-inf")
        self._loaded: PolicyVersion | None = None
        self._failing_since: float | None = None
        self.problem: str | None = "waits for the first policy version"

    @property
    def version(self) -> int:
        """The number of the version that the engine writes with; −1 before the first was loaded."""
        return -1 if self._loaded is None else self._engine.version

    @property
    def loaded(self) -> PolicyVersion | None:
        """What was loaded last; an engine that first finishes what runs may not write with it yet."""
        return self._loaded

    @property
    def failing_s(self) -> float:
        """For how long the newest version could not be loaded."""
        return 0.0 if self._failing_since is None else self._clock() - self._failing_since

    def refresh(self) -> None:
        """Look and load. Afterwards `problem` says, in words, why the newest version is not the
        loaded one, if it is not.

        A lower number, or the same with another digest, replaces what is loaded too: the trainer
        went back to a checkpoint.
        """
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_S
        self._take_up(now)
        if self._receiver is not None:
            self._receiver.look()

    def _take_up(self, now: float) -> None:
        newest = self._newest()
        if newest is None or newest == self._loaded:
            return
        try:
            self._load(newest)
        except WeightsError as error:
            self.problem = f"cannot load policy version {newest.number}: {error}"
            self._next_look = now + (
                RETRY_S if self._newest() == newest else 0
            )  # replaced while it was read: the newest one at once
            self._failing_since = self._failing_since or now
            return
        self._loaded = newest
        self.problem = None
        self._failing_since = None

    def _load(self, newest: PolicyVersion) -> None:
        """Load `newest`.

        Raises:
            WeightsError: it cannot be had, or not be loaded.
        """
        if self._receiver is None:
            return self._engine.load(self._reader.fetch(newest))
        if self._receiver.holds(newest):
            return self._receiver.load(newest)
        try:
            return self._engine.load(self._reader.fetch(newest))
        except WeightsError:
            self._receiver.want(newest)
            raise
