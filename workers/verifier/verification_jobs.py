"""Slow verifications as jobs: the verifier keeps the entry's lease alive, and the job itself moves
the entry on when it has a verdict.

A job gets the id of an entry, not the rollout. It settles by the same fenced script as a verifier,
so one that runs twice, or whose verifier has died, does no harm: whoever is first moves the entry,
and the other finds it gone.
"""

from __future__ import annotations

import math
import time
from typing import Any

from redis.exceptions import RedisError

from onstream.pipeline.records import Rollout, decode_work, encode
from onstream.pipeline.redis.job_queue import OPEN, JobQueue, JobRow
from onstream.pipeline.redis.streams import Bus, Move, Out
from onstream.pipeline.stage import Delivery, Outcome, leave
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.workers.verifier.scorer_messages import Verdict
from onstream.workers.verifier.scorer_pool import ScorerPool

MOST = 64  # entries in hand for jobs
POLL_S = 0.25
START_S = 60  # for what a job does beside scoring: importing the scorer, above all
SLOW_S = 1.0

log = get_logger()


class VerificationJobs:
    """The entries of one verifier that jobs score. `close` it."""

    def __init__(self, settings: Settings, bus: Bus, url: str) -> None:
        self._bus = bus
        self._jobs = JobQueue(url, settings.run.name, settings.jobs)
        self._limit_s = math.ceil(settings.orchestrator.verification.timeout) + START_S
        self._in_hand: dict[bytes, Delivery] = {}
        self._next_poll = 0.0
        self.waits = ""  # for what, in words

    def __len__(self) -> int:
        return len(self._in_hand)

    @property
    def room(self) -> int:
        """How many more entries it takes."""
        return MOST - len(self._in_hand)

    def close(self) -> None:
        """Close the client. The jobs go on."""
        self._jobs.close()

    def submit(self, delivery: Delivery) -> None:
        """Ask for the job of `delivery`, at the next `collect`. One of a verifier that died is not
        asked for a second time.
        """
        self._in_hand[delivery.entry_id] = delivery
        self._next_poll = 0.0

    def collect(self) -> list[Outcome]:
        """What came of the jobs. Looked for now and then: nobody waits for it but this verifier's
        own count.
        """
        if not self._in_hand or time.monotonic() < self._next_poll:
            return []
        self._next_poll = time.monotonic() + POLL_S
        try:
            return self._look()
        except RedisError as error:
            log.warning("redis takes no jobs; verifications wait", error=str(error))
            return []

    def _look(self) -> list[Outcome]:
        known = self._jobs.find(
            "verify", map(_key, self._in_hand)
        )  # before the streams: a job that has ended has moved its entry
        mine = {row.id for row in self._bus.all_pending_rows("verify", self._bus.consumer)}
        outcomes = [
            self._outcome(delivery, known.get(_key(entry_id)), entry_id in mine)
            for entry_id, delivery in self._in_hand.items()
        ]
        found = [outcome for outcome in outcomes if outcome is not None]
        for outcome in found:
            del self._in_hand[outcome.delivery.entry_id]
        at_work = any(worker.stage == "jobs" for worker in self._bus.workers())
        self.waits = (
            f"{len(self)} verifications wait for a jobs worker (onstream worker jobs)"
            if self._in_hand and not at_work
            else ""
        )
        return found

    def _outcome(self, delivery: Delivery, job: JobRow | None, mine: bool) -> Outcome | None:
        """What came of `delivery`; asks for its job where there is none."""
        if not mine:
            return Outcome(delivery, elsewhere=True)
        if job is not None and job.status == "failed":
            return Outcome(delivery, dead=f"its verification failed as a job: {job.reason}")
        if job is None or job.status not in OPEN:
            key = _key(delivery.entry_id)
            self._jobs.ask("verify", key, key, again=True, time_limit_s=self._limit_s)
        return None


def _key(entry_id: bytes) -> str:
    return entry_id.decode()


def verify_entry(settings: Settings, bus: Bus, entry_id: str) -> dict[str, Any]:
    """The body of a job: score the rollout in the entry `entry_id` and move it on, unless somebody
    has.
    """
    taken = time.time()
    entry = bus.look_at("verify", entry_id.encode())
    if entry is None:
        return {"moved": False}
    rollout = decode_work(entry.payload)
    assert isinstance(rollout, Rollout), "a verifier has looked at it"
    write_verdict(rollout, _verdict(settings, rollout))
    leave(rollout, "verify", bus.consumer, taken)
    [moved] = bus.settle(
        "verify", [Move(entry.id, [Out(rollout.route[0], rollout.number, encode(rollout))])]
    )
    return {"moved": moved, "number": rollout.number, "reward": rollout.reward}


def _verdict(settings: Settings, rollout: Rollout) -> Verdict:
    """The verdict of a child of this process, which has the time and memory that a verifier's child
    has.
    """
    children = ScorerPool(settings, processes=1)
    children.start()
    try:
        children.submit(0, final_answer(rollout), rollout.info)
        while not (found := children.collect(1.0)):
            continue
        return found[0][1]
    finally:
        children.close()


def final_answer(rollout: Rollout) -> str:
    """What the scorer sees. Of several samples the last holds the final answer: it comes after
    every tool's.
    """
    return rollout.samples[-1].completion_text if rollout.samples else ""


def write_verdict(rollout: Rollout, verdict: Verdict) -> None:
    """Write `verdict` into `rollout`."""
    rollout.reward = verdict.reward
    rollout.reward_parts = verdict.parts
    rollout.unscored = verdict.unscored
