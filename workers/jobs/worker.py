"""`onstream worker jobs`: RQ's worker, with a time limit that holds, a drain that ends, and
heartbeats like every other worker's.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import uuid
from types import FrameType
from typing import Any

from redis import Redis
from redis.exceptions import RedisError, ResponseError
from rq import Queue, Worker
from rq.executions import Execution
from rq.job import Job

from onstream.pipeline.errors import Exit
from onstream.pipeline.redis.job_queue import FUNCTIONS, SERIALIZER, JobQueue, pin_use, queue_name
from onstream.pipeline.redis.streams import Bus
from onstream.pipeline.stage import Stats
from onstream.pipeline.telemetry import get_logger
from onstream.pipeline.weights.pins import pins, unpin
from onstream.settings.root import Settings
from onstream.workers.jobs import functions
from onstream.workers.jobs.functions import Context
from onstream.workers.jobs.process_tree import adopt_orphans, descendants, kill_below, reap

# RQ's own limit comes first, and gives a job that listens to it the chance to say where it was
GRACE_S = 1.0
MONITORING_S = 5
MAINTENANCE_S = 30
"""RQ's own values would leave the job of a killed worker alone for ten minutes."""
BEAT_S = 1.0
JOBS = "jobs"
log = get_logger()


class JobsWorker(Worker):  # type: ignore[misc]  # RQ says nothing of its types
    """Runs one job after the other, each in a process that is killed with all it has started: at
    its time limit, or when it has ended.

    Told to stop, it gives the job in hand `drain_s` to finish; past that the job is killed, and
    goes back to the queue without a try being counted.
    """

    def __init__(self, settings: Settings, connection: Redis) -> None:
        self._run_dir = settings.run_dir
        self._drain_s = settings.delivery.drain
        self._drained = False
        self.done = self.failed = 0
        super().__init__(
            [Queue(queue_name(settings.run.name), connection=connection, serializer=SERIALIZER)],
            name=f"jobs-{os.getpid()}-{uuid.uuid4().hex[:8]}",
            connection=connection,
            serializer=SERIALIZER,
            job_monitoring_interval=MONITORING_S,
            maintenance_interval=MAINTENANCE_S,
        )

    @property
    def dequeue_timeout(self) -> int:
        """How long one wait for a job takes, in seconds."""
        return 1

    @property
    def current(self) -> str:
        """The job in hand, in words; empty while there is none."""
        execution = next(iter(self.executions.values()), None)
        return execution.job.description or execution.job_id if execution is not None else ""

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run `job`, and see to it that nothing of it is left."""
        if job.func_name not in FUNCTIONS.values():
            job.args = (str(job.func_name),)
            job.func_name = "onstream.workers.jobs.functions.refuse"
        job.meta["tries"] = int(job.meta.get("tries", 0)) + 1
        job.save_meta()
        log.info("job begins", job=job.description, tries=job.meta["tries"])
        super().execute_job(job, queue)
        if not kill_below(os.getpid()):
            log.error(
                "processes that a job has started cannot be killed",
                job=job.description,
                processes=sorted(descendants(os.getpid())),
            )
        reap()
        self._note_end(job)

    def monitor_work_horse(self, job: Job, queue: Queue, execution: Execution) -> None:
        """Wait for the job's process; kill it with its descendants when it has not ended at its
        time limit.
        """
        timer = threading.Timer(
            float(job.timeout or Queue.DEFAULT_TIMEOUT) + GRACE_S, self._kill, ["its time limit"]
        )
        timer.daemon = True
        timer.start()
        try:
            super().monitor_work_horse(job, queue, execution)
        finally:
            timer.cancel()

    def handle_work_horse_killed(self, job: Job, retpid: int, ret_val: int, rusage: Any) -> None:
        """A job that a drain has killed did nothing wrong: that try does not count."""
        if self._drained:
            job.retries_left = (job.retries_left or 0) + 1

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Take no more jobs, and end within the drain time."""
        timer = threading.Timer(self._drain_s, self._drain)
        timer.daemon = True
        timer.start()
        super().request_stop(signum, frame)

    def _drain(self) -> None:
        self._drained = True
        self._kill("the worker stops")

    def _kill(self, why: str) -> None:
        """Kill the job's process and all below it. What it has orphaned is below this worker, and
        goes when the job has ended.
        """
        if horse := self.horse_pid:
            log.warning("killing the job in hand", job=self.current, why=why)
            kill_below(horse, within_s=0.5)
            self.kill_horse(signal.SIGKILL)

    def _note_end(self, job: Job) -> None:
        """Let go of the policy version that was kept for a job that is over."""
        status = str(job.get_status().value)
        log.info("job ended", job=job.description, status=status)
        self.done += status == "finished"
        self.failed += status == "failed"
        if status in ("finished", "failed", "stopped"):
            use = pin_use(str(job.meta.get("kind")), str(job.meta.get("key")))
            for version in [
                version for version, kept_for in pins(self._run_dir) if kept_for == use
            ]:
                unpin(self._run_dir, version, use)


class Overseer(threading.Thread):
    """Says once a second that the worker lives, asks for sweeps, and ends the worker once the run
    has ended and no job is left.

    Consumes nothing; waits for its interval; is unblocked by `stop`; produces heartbeats, sweeps
    and one SIGTERM.
    """

    def __init__(self, settings: Settings, bus: Bus, jobs: JobQueue, worker: JobsWorker) -> None:
        super().__init__(name="overseer", daemon=True)
        self._settings = settings
        self._bus = bus
        self._jobs = jobs
        self.worker = worker
        self._stopping = threading.Event()
        self.finished = self._idle = False
        self.waits_for = JOBS

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self.join()

    def run(self) -> None:
        """The thread's life. An outage of Redis is waited out: the worker itself decides when it
        has lasted too long.
        """
        while not self._stopping.wait(BEAT_S):
            try:
                self._beat()
            except (RedisError, OSError) as error:
                log.warning("redis does not answer", error=str(error))

    def _beat(self) -> None:
        worker = self.worker
        stats = Stats(
            done=worker.done,
            dead=worker.failed,
            detail=worker.current or f"waits for {self.waits_for}",
        )
        self._bus.heartbeat("jobs", stats, in_hand=int(bool(worker.current)))
        if self._bus.finished():
            # Twice in a row: a job that is just being taken is, for a moment, neither waiting nor
            # under way.
            idle_before = self._idle
            self._idle = not worker.current and self._jobs.idle()
            if idle_before and self._idle:
                self.finished = True
                self._stopping.set()
                os.kill(os.getpid(), signal.SIGTERM)
        elif (interval_s := self._settings.jobs.sweep_interval) and self.waits_for == JOBS:
            # Every jobs worker asks for the sweep of this interval, and one of them is the first.
            self._jobs.ask("sweep", str(int(time.time() // interval_s)))


def run_jobs(settings: Settings, bus: Bus, url: str) -> Exit:
    """Do jobs until the run has ended and none is left, or until told to stop.

    Raises:
        UserError: Redis cannot be used.
    """
    functions.context = Context(settings, url)
    if sys.platform == "linux":
        adopt_orphans()
    connection = Redis.from_url(url)
    with JobQueue(url, settings.run.name, settings.jobs) as jobs:
        overseer = Overseer(settings, bus, jobs, JobsWorker(settings, connection))
        overseer.start()
        try:
            told = False
            while _ended_by_full_redis(overseer.worker, bus) and not (
                told := _told_before_room(bus, overseer)
            ):
                before = overseer.worker
                overseer.worker = JobsWorker(settings, connection)
                # which RQ does at its end, but not at the end that a full Redis makes
                before.unsubscribe()
                overseer.worker.done = before.done
                overseer.worker.failed = before.failed
        finally:
            overseer.stop()
            bus.leave()
            connection.close()
    stopped = told or overseer.finished or overseer.worker._shutdown_requested_date is not None
    return Exit.OK if stopped else Exit.UNREACHABLE


def _ended_by_full_redis(worker: JobsWorker, bus: Bus) -> bool:
    """Do jobs until told to stop; True where it was a full Redis that ended the worker: RQ cannot
    work on one.
    """
    try:
        worker.work(logging_level="WARNING")
    except ResponseError:
        if bus.has_room():
            raise
    return worker._shutdown_requested_date is None and not bus.has_room()


def _told_before_room(bus: Bus, overseer: Overseer) -> bool:
    """Wait until Redis has room again, saying so; whether the worker was told to stop meanwhile."""
    log.warning("redis is full; no jobs until it has room again")
    told = threading.Event()
    former = {
        number: signal.signal(number, lambda *_: told.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    overseer.waits_for = "room in Redis, which is full"
    try:
        while not bus.has_room() and not told.wait(BEAT_S):
            pass
    finally:
        overseer.waits_for = JOBS
        for number, handler in former.items():
            signal.signal(number, handler)
    return told.is_set()
