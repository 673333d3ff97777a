"""The end of a run whose Redis ends with it: not before everybody has heard that it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

POLL_S = 0.25
ALONE_S = 3.0
STILL_HERE_S = 10.0
MISSED_S = 60.0
"""A worker that left without a word, and was not heard of for so long, does not come back."""


class Named(Protocol):
    """What is read of a worker's heartbeat."""

    @property
    def worker(self) -> str: ...


class Hears(Protocol):
    """What is asked of the bus."""

    def last_heartbeats(self, max_age_s: float) -> Sequence[Named]: ...


def wait_until_alone(
    bus: Hears,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
    *,
    alone_s: float = ALONE_S,
    still_here_s: float = STILL_HERE_S,
) -> None:
    """Wait until no worker was there for `alone_s`, or `stopped()`. Says who it waits for every
    `still_here_s`.

    A worker that was killed as the run ended is on its way back: without Redis it could not learn
    that there is nothing left to do.
    """
    told = alone_since = time.monotonic()
    while time.monotonic() - alone_since < alone_s and not stopped():
        if here := bus.last_heartbeats(MISSED_S):
            alone_since = time.monotonic()
            if alone_since - told > still_here_s:
                told = alone_since
                say(
                    f"the run has ended; waiting for {', '.join(beat.worker for beat in here)} to leave"
                )
        time.sleep(POLL_S)
