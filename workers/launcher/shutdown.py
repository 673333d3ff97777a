"""The end of a run whose Redis ends with it: only when every worker knows that it is over."""

from __future__ import annotations

import time
from collections.abc import Callable

from onstream.pipeline.redis.run_state import RunState

POLL_S = 0.25
ALONE_S = 3.0
STILL_HERE_S = 10.0
MISSED_S = 60.0
"""A worker that was silent for so long, without having left, does not come back."""


def wait_until_alone(
    state: RunState,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
    *,
    alone_s: float = ALONE_S,
    still_here_s: float = STILL_HERE_S,
) -> None:
    """Wait until no worker was there for `alone_s`, or `stopped()`.

    Says whom it waits for every `still_here_s`. For a while and not at one moment, because a worker
    that was killed as the run ended is on its way back: without Redis it could not learn that there
    is nothing left to do.
    """
    alone_since = time.monotonic()
    told = alone_since
    while time.monotonic() - alone_since < alone_s and not stopped():
        if here := state.last_heartbeats(MISSED_S):
            alone_since = time.monotonic()
            if alone_since - told > still_here_s:
                told = alone_since
                names = ", ".join(heartbeat.worker for heartbeat in here)
                say(f"the run has ended; waiting for {names} to leave")
        time.sleep(POLL_S)
