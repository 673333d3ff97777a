"""The lease of the run's trainer: who holds it, how one waits for it, and what ends it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.processes import is_gone
from onstream.pipeline.run_files.ownership import Ownership

T = TypeVar("T")
log = structlog.get_logger(__name__)

_POLL_S = 0.1


class LeaseHeld(UserError):
    """Another trainer has this run; `holder` says which."""

    def __init__(self, run: str, holder: str) -> None:
        self.holder = holder
        super().__init__(
            f"the run {run} has a trainer already: {holder}",
            expected="one trainer to a run",
            next_step="Stop that one, or choose another run.name.",
            exit=Exit.REFUSED,
        )


class DataLost(Exception):
    """Redis knows less than it was told: it was emptied, or a replica took its place too early."""


@dataclass
class Lease:
    """The right to be the run's trainer, on the run's `files` too where it has some.

    `epoch` rises when Redis has lost its data and the same trainer takes the lease again. Whoever
    changes it holds `changing`, so that the heartbeat does not renew the lease in between.
    """

    epoch: int
    holder: str
    ttl_s: float
    files: Ownership | None = None
    changing: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)


def while_it_may_expire(acquire: Callable[[], T], ttl_s: float) -> T:
    """What `acquire` returns; tried again as long as the lease of a dead trainer could still run.

    Raises:
        LeaseHeld: another trainer renews it.
    """
    deadline = time.monotonic() + ttl_s + 2 * _POLL_S
    told = False
    while True:
        try:
            return acquire()
        except LeaseHeld as held:
            if time.monotonic() > deadline:
                raise
            if not told:
                log.info(
                    "another trainer has this run; waiting to see whether it still lives",
                    holder=held.holder,
                    wait_s=ttl_s,
                )
                told = True
            time.sleep(_POLL_S)


def is_dead(holder: str) -> bool:
    """Whether `holder` was a process of this machine that is gone."""
    _, _, place = holder.rpartition(" on ")
    host, _, pid = place.partition(" pid ")
    return host == socket.gethostname() and pid.isdigit() and is_gone(int(pid))
