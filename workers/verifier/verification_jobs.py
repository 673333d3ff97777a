"""Slow verifications as jobs.

The verifier keeps the entry's lease alive, and the job itself moves the entry on when it has a
verdict.

A job gets the id of an entry, not the rollout. It moves the entry by the same fenced script as a
verifier. So a job that runs twice, or whose verifier has died, does no harm: whoever comes first
moves the entry, and the other finds it gone.
"""

from __future__ import annotations

import math
import time
from typing import Any

from redis.exceptions import RedisError

from onstream.pipeline.record_codec import decode_work, encode
from onstream.pipeline.records import Rollout
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.job_queue import OPEN, JobQueue, JobRow
from onstream.pipeline.redis.streams import Move, Out
from onstream.pipeline.stage import Delivery, Outcome, complete_stage
from onstream.pipeline.telemetry import get_logger
from onstream.settings.root import Settings
from onstream.workers.verifier.scorer_messages import Verdict
from onstream.workers.verifier.scorer_pool import final_answer, within_bounds, write_verdict
from onstream.workers.verifier.scorers import scorers_of

MAX_IN_HAND = 64
POLL_S = 0.25
START_S = 60
"""Time for what a job does beside scoring, importing the scorer above all."""
SLOW_S = 1.0
"""With `in_jobs = "slow"`, what runs longer than this becomes a job."""

log = get_logger()


class VerificationJobs:
    """The entries of one verifier that jobs score. `close` it."""

    def __init__(self, settings: Settings, bus: Bus, url: str) -> None:
        self._bus = bus
        self._jobs = JobQueue(url, settings.run.name, settings.jobs)
        self._limit_s = math.ceil(settings.orchestrator.verification.timeout) + START_S
        self._in_hand: dict[bytes, Delivery] = {}
        self._next_poll = 0.0
        self.waits = ""  # what it waits for, for the status line

    def __len__(self) -> int:
        return len(self._in_hand)

    @property
    def room(self) -> int:
        """How many more entries it takes."""
        return MAX_IN_HAND - len(self._in_hand)

    def close(self) -> None:
        """Close the client. The jobs go on."""
        self._jobs.close()

    def submit(self, delivery: Delivery) -> None:
        """Take `delivery` in hand.

        The next `collect` asks for its job, unless a verifier that died has asked for it already.
        """
        self._in_hand[delivery.entry_id] = delivery
        self._next_poll = 0.0

    def collect(self) -> list[Outcome]:
        """The outcomes of the jobs that have ended, looked up every `POLL_S`.

        The entry has moved on by then, and only this verifier's count waits for it.
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
        # Before the streams are read: a job that has ended by now has moved its entry by then.
        known = self._jobs.find("verify", map(_key, self._in_hand))
        mine = {row.id for row in self._bus.streams.all_pending_rows("verify", self._bus.consumer)}
        found = []
        for entry_id, delivery in list(self._in_hand.items()):
            outcome = self._outcome(delivery, known.get(_key(entry_id)), entry_id in mine)
            if outcome is not None:
                found.append(outcome)
                del self._in_hand[entry_id]
        self.waits = self._waits_for()
        return found

    def _waits_for(self) -> str:
        if not self._in_hand or any(worker.stage == "jobs" for worker in self._bus.state.workers()):
            return ""
        return f"{len(self)} verifications wait for a jobs worker (onstream worker jobs)"

    def _outcome(self, delivery: Delivery, job: JobRow | None, mine: bool) -> Outcome | None:
        """The outcome of `delivery`, None while it waits. Asks for its job where there is none."""
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
    """Score the rollout in the entry `entry_id` and move it on, unless somebody has.

    This is the body of a job; it returns the job's result.
    """
    taken = time.time()
    entry = bus.streams.look_at("verify", entry_id.encode())
    if entry is None:
        return {"moved": False}
    rollout = decode_work(entry.payload)
    assert isinstance(rollout, Rollout), "a verifier has looked at it"
    verdict = _verdict(settings, bus, rollout)
    write_verdict(rollout, within_bounds(verdict, settings.orchestrator.verification))
    complete_stage(rollout, "verify", bus.consumer, taken)
    [moved] = bus.streams.move(
        "verify", [Move(entry.id, [Out(rollout.route[0], rollout.number, encode(rollout))])]
    )
    return {"moved": moved, "number": rollout.number, "reward": rollout.reward}


def _verdict(settings: Settings, bus: Bus, rollout: Rollout) -> Verdict:
    """The verdict of scorers of this job's own, within the verifier's limits."""
    scorers = scorers_of(settings, bus, processes=1)
    scorers.start()
    try:
        scorers.score(0, rollout.messages, final_answer(rollout), rollout.info)
        while not (found := scorers.collect(1.0)):
            continue
        return found[0][1]
    finally:
        scorers.close()
