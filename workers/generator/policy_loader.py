"""Keeps an engine at the newest announced policy version."""

from __future__ import annotations

import time
from collections.abc import Callable

from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.weights import PolicyFetcher, WeightsError
from onstream.workers.generator.engines.base import Engine
from onstream.workers.generator.nccl_receiver import TransferReceiver

POLL_S = 0.02
RETRY_S = 0.5


class PolicyLoader:
    """Looks for a newer version every `POLL_S`, and loads it; retries every `RETRY_S`.

    Args:
        engine: is kept at the newest version.
        fetcher: gets the weights of a version.
        newest: gives the newest announced version, None before the first.
        clock: seconds.
        receiver: where the trainer sends weights from GPU to GPU, it has them before they are
            announced. What it missed is fetched.

    `problem` says, in words, why the newest version is not loaded; None where it is.
    """

    def __init__(
        self,
        engine: Engine,
        fetcher: PolicyFetcher,
        newest: Callable[[], PolicyVersion | None],
        clock: Callable[[], float] = time.monotonic,
        receiver: TransferReceiver | None = None,
    ) -> None:
        self._engine = engine
        self._fetcher = fetcher
        self._newest = newest
        self._clock = clock
        self._receiver = receiver
        self._next_look = float("-inf")
        self._loaded: PolicyVersion | None = None
        self._failing_since: float | None = None
        self.problem: str | None = "waits for the first policy version"

    @property
    def version(self) -> int:
        """The number of the version that the engine writes with; −1 before the first is loaded."""
        return -1 if self._loaded is None else self._engine.version

    @property
    def loaded(self) -> PolicyVersion | None:
        """The version loaded last. An engine that first finishes what runs may not use it yet."""
        return self._loaded

    @property
    def failing_s(self) -> float:
        """For how long the newest version could not be loaded."""
        return 0.0 if self._failing_since is None else self._clock() - self._failing_since

    def refresh(self) -> None:
        """Look for a newer version and load it.

        A lower number, or the same number with another digest, is loaded too: the trainer went back
        to a checkpoint.
        """
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + POLL_S
        self._load_newest(now)
        if self._receiver is not None:
            self._receiver.look()

    def _load_newest(self, now: float) -> None:
        newest = self._newest()
        if newest is None or newest == self._loaded:
            return
        try:
            self._load(newest)
        except WeightsError as error:
            self.problem = f"cannot load policy version {newest.number}: {error}"
            # If a newer one was announced meanwhile, its weights replaced these: load it at once.
            replaced = self._newest() != newest
            self._next_look = now if replaced else now + RETRY_S
            self._failing_since = self._failing_since or now
            return
        self._loaded = newest
        self.problem = None
        self._failing_since = None

    def _load(self, newest: PolicyVersion) -> None:
        """Load `newest`.

        Raises:
            WeightsError: its weights are not there, or cannot be loaded.
        """
        if self._receiver is not None and self._receiver.has(newest):
            self._receiver.load(newest)
            return
        try:
            self._engine.load(self._fetcher.fetch(newest))
        except WeightsError:
            if self._receiver is not None:
                self._receiver.request_file(newest)
            raise
