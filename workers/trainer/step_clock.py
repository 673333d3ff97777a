"""How long the parts of a step take."""

from __future__ import annotations

import time


class StepClock:
    """Times the steps. Each is `start_step`, `learned`, `published`, `end_step`, in this order."""

    def __init__(self) -> None:
        now = time.monotonic()
        self._waiting_since = now
        self._last_step_ended = now
        self._started = now
        self._learned = now
        self._published = now

    def restart(self) -> None:
        """Count from now, as if a step had just ended."""
        self._waiting_since = time.monotonic()
        self._last_step_ended = self._waiting_since

    def start_waiting(self) -> None:
        """The trainer waits for data from now on; what it did before (a checkpoint) is no wait."""
        self._waiting_since = time.monotonic()

    def start_step(self) -> None:
        """A batch is there."""
        self._started = time.monotonic()

    def learned(self) -> None:
        """The optimizer has taken its step."""
        self._learned = time.monotonic()

    def published(self) -> None:
        """The new weights are announced."""
        self._published = time.monotonic()

    def end_step(self, *, rollouts: float, tokens: float) -> dict[str, float]:
        """The metrics of the step's time, by their names in metrics.jsonl."""
        now = time.monotonic()
        elapsed_s = now - self._last_step_ended
        metrics = {
            "wait_s": self._started - self._waiting_since,
            "step_s": self._published - self._started,
            "publish_s": self._published - self._learned,
            "tokens_per_s": tokens / (self._learned - self._started),
            "elapsed_s": elapsed_s,
            "rollouts_per_s": rollouts / elapsed_s,
        }
        self._waiting_since = now
        self._last_step_ended = now
        return metrics
