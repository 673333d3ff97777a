"""`onstream worker jobs`: RQ's worker, with hard time limits, a drain, and heartbeats."""

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
from onstream.pipeline.processes import StopSignals
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.job_queue import (
    SERIALIZER,
    JobQueue,
    current_function,
    pin_use,
    queue_name,
)
from onstream.pipeline.redis.run_end import RunEnd
from onstream.pipeline.stage import Stats
from onstream.pipeline.telemetry import get_logger
from onstream.pipeline.weights.directory_store import pins, unpin
from onstream.settings.root import Settings
from onstream.workers.jobs import functions
from onstream.workers.jobs.functions import JobContext
from onstream.workers.jobs.process_tree import adopt_orphans, descendants, kill_below, reap

GRACE_S = 1.0
"""RQ's own limit comes so much earlier: a job that reacts to it can still say where it was."""
MONITORING_S = 5
MAINTENANCE_S = 30
"""With RQ's own values, the job of a killed worker would wait for ten minutes."""
BEAT_S = 1.0
DEQUEUE_S = 1
KILL_S = 0.5
JOBS = "jobs"
log = get_logger()


class JobsWorker(Worker):  # type: ignore[misc]  # RQ has no types
    """Runs one job after the other, each in a process of its own.

    At its time limit, or when it has ended, that process is killed with all it has started.

    Told to stop, the worker gives the job in hand `delivery.drain` seconds to finish. After that
    the job is killed and goes back to the queue, and the try does not count.
    """

    def __init__(self, settings: Settings, connection: Redis) -> None:
        self._run_dir = settings.run_dir
        self._drain_s = settings.delivery.drain
        self._drained = False
        self.done = 0
        self.failed = 0
        queue = Queue(queue_name(settings.run.name), connection=connection, serializer=SERIALIZER)
        super().__init__(
            [queue],
            name=f"jobs-{os.getpid()}-{uuid.uuid4().hex[:8]}",
            connection=connection,
            serializer=SERIALIZER,
            job_monitoring_interval=MONITORING_S,
            maintenance_interval=MAINTENANCE_S,
        )

    @property
    def dequeue_timeout(self) -> int:
        """How long one wait for a job takes, in seconds."""
        return DEQUEUE_S

    @property
    def current(self) -> str:
        """The description of the job in hand; empty while there is none."""
        execution = next(iter(self.executions.values()), None)
        if execution is None:
            return ""
        return str(execution.job.description or execution.job_id)

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Run `job`, and kill what is left of it afterwards."""
        _set_function(job)
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
        """Wait for the job's process. At its time limit, kill it with its descendants."""
        limit_s = float(job.timeout or Queue.DEFAULT_TIMEOUT) + GRACE_S
        timer = threading.Timer(limit_s, self._kill, ["its time limit"])
        timer.daemon = True
        timer.start()
        try:
            super().monitor_work_horse(job, queue, execution)
        finally:
            timer.cancel()

    def handle_work_horse_killed(self, job: Job, retpid: int, ret_val: int, rusage: Any) -> None:
        """Give the try back to a job that was killed by a drain: it did nothing wrong."""
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
        """Kill the job's process and all below it.

        Processes that it has orphaned are children of this worker by now; `execute_job` kills them
        when the job has ended.
        """
        if horse := self.horse_pid:
            log.warning("killing the job in hand", job=self.current, why=why)
            kill_below(horse, within_s=KILL_S)
            self.kill_horse(signal.SIGKILL)

    def _note_end(self, job: Job) -> None:
        """Count the job, and unpin the policy version that was kept for it."""
        status = str(job.get_status().value)
        log.info("job ended", job=job.description, status=status)
        self.done += status == "finished"
        self.failed += status == "failed"
        if status in ("finished", "failed", "stopped"):
            use = pin_use(str(job.meta.get("kind")), str(job.meta.get("key")))
            for version, kept_for in list(pins(self._run_dir)):
                if kept_for == use:
                    unpin(self._run_dir, version, use)


def _set_function(job: Job) -> None:
    """Let `job` call the function of its kind; one that is no job of Onstream calls `refuse`."""
    function = current_function(str(job.func_name))
    if function is None:
        job.args = (str(job.func_name),)
        job.func_name = "onstream.workers.jobs.functions.refuse"
    elif function != job.func_name:
        job.func_name = function


class JobsMonitor(threading.Thread):
    """Sends heartbeats, asks for sweeps, and ends the worker after the run and its last job.

    Consumes nothing; waits for its interval; is unblocked by `stop`; produces heartbeats, sweeps
    and one SIGTERM.
    """

    def __init__(self, settings: Settings, bus: Bus, jobs: JobQueue, worker: JobsWorker) -> None:
        super().__init__(name="jobs-monitor", daemon=True)
        self._settings = settings
        self._bus = bus
        self._jobs = jobs
        self._run_end = RunEnd(bus.state, settings.trainer.max_steps)
        self.worker = worker
        self._stopping = threading.Event()
        self._idle = False
        self.finished = False
        self.waits_for = JOBS

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self.join()

    def run(self) -> None:
        """The thread's body.

        It outlasts an outage of Redis: the worker itself decides when that has lasted too long.
        """
        while not self._stopping.wait(BEAT_S):
            try:
                self._beat()
            except (RedisError, OSError) as error:
                log.warning("redis does not answer", error=str(error))

    def _beat(self) -> None:
        current = self.worker.current
        stats = Stats(
            done=self.worker.done,
            dead=self.worker.failed,
            detail=current or f"waits for {self.waits_for}",
        )
        self._bus.state.write_heartbeat("jobs", stats, in_hand=int(bool(current)))
        if self._run_end.reached():
            self._end_when_idle()
        elif self.waits_for == JOBS:
            self._ask_for_sweep()

    def _end_when_idle(self) -> None:
        # Idle twice in a row: a job that is just being taken is, for a moment, neither waiting nor
        # under way.
        idle_before = self._idle
        self._idle = not self.worker.current and self._jobs.idle()
        if idle_before and self._idle:
            self.finished = True
            self._stopping.set()
            os.kill(os.getpid(), signal.SIGTERM)

    def _ask_for_sweep(self) -> None:
        """Ask for this interval's sweep. Every jobs worker does, and the first is heard."""
        if interval_s := self._settings.jobs.sweep_interval:
            self._jobs.ask("sweep", str(int(time.time() // interval_s)))


def run_jobs(settings: Settings, bus: Bus, url: str) -> Exit:
    """Do jobs until the run has ended and none is left, or until told to stop.

    Raises:
        UserError: Redis cannot be used.
    """
    functions.context = JobContext(settings, url)
    if sys.platform == "linux":
        adopt_orphans()
    connection = Redis.from_url(url)
    with JobQueue(url, settings.run.name, settings.jobs) as jobs:
        monitor = JobsMonitor(settings, bus, jobs, JobsWorker(settings, connection))
        monitor.start()
        try:
            told = False
            while _ended_by_full_redis(monitor.worker, bus) and not (
                told := _told_before_room(bus, monitor)
            ):
                monitor.worker = _successor(monitor.worker, settings, connection)
        finally:
            monitor.stop()
            bus.state.remove_heartbeat()
            connection.close()
    stopped = told or monitor.finished or monitor.worker._shutdown_requested_date is not None
    return Exit.OK if stopped else Exit.UNREACHABLE


def _successor(worker: JobsWorker, settings: Settings, connection: Redis) -> JobsWorker:
    """Another worker in the place of one that a full Redis has ended."""
    new = JobsWorker(settings, connection)
    worker.unsubscribe()  # RQ does so at its normal end, but not at this one
    new.done = worker.done
    new.failed = worker.failed
    return new


def _ended_by_full_redis(worker: JobsWorker, bus: Bus) -> bool:
    """Do jobs until told to stop. True where a full Redis ended that: RQ cannot work on one."""
    try:
        worker.work(logging_level="WARNING")
    except ResponseError:
        if bus.connection.has_room():
            raise
    return worker._shutdown_requested_date is None and not bus.connection.has_room()


def _told_before_room(bus: Bus, monitor: JobsMonitor) -> bool:
    """Wait until Redis has room again. True where the worker was told to stop before that."""
    log.warning("redis is full; no jobs until it has room again")
    monitor.waits_for = "room in Redis, which is full"
    try:
        with StopSignals() as stop:
            while not bus.connection.has_room() and not stop.wait(BEAT_S):
                pass
    finally:
        monitor.waits_for = JOBS
    return stop.requests > 0
