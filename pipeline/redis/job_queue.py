"""The control plane: jobs beside the training, on RQ. How they are asked for, and what is known of
them.

RQ keeps its keys under `rq:`, apart from the run's, and has a client of its own here: its calls are
not those of the streams, and it does not work on a Redis that is full. What goes over it is JSON.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from redis import Redis
from rq import Queue, Retry
from rq.exceptions import DuplicateJobError
from rq.job import Job

from onstream.pipeline.weights.pins import pin, unpin
from onstream.settings.jobs import JobsSettings

JobKind = Literal["evaluate", "export", "prune", "sweep", "verify"]
FUNCTIONS: dict[str, str] = {
    kind: f"onstream.workers.jobs.functions.{kind}" for kind in get_args(JobKind)
}
"""What a jobs worker calls for each kind; it calls nothing else, whatever stands in Redis."""
SERIALIZER = "json"
CALL_TIMEOUT_S = 5.0
OPEN = ("queued", "started", "scheduled", "deferred", "ready_to_enqueue", "created")
PASSING: tuple[JobKind, ...] = (
    "sweep",
    "verify",
)  # of which there are many, and nobody looks at them for long
PASSING_KEPT_S = 3600


@dataclass(frozen=True)
class JobRow:
    """What is known of one job. `result` is what it returned, `reason` why it failed; `tries`
    counts those that began.
    """

    kind: str
    key: str
    status: str
    tries: int
    asked: float | None  # seconds since the epoch
    seconds: float | None
    result: Any
    reason: str


class JobQueue:
    """The jobs of one run. `close` it, or use it in a `with`."""

    def __init__(self, url: str, run: str, settings: JobsSettings) -> None:
        self.run = run
        self._settings = settings
        self._redis = Redis.from_url(
            url, socket_timeout=CALL_TIMEOUT_S, socket_connect_timeout=CALL_TIMEOUT_S
        )
        self.queue = Queue(
            queue_name(run),
            connection=self._redis,
            serializer=SERIALIZER,
            default_timeout=settings.time_limit,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the client."""
        self._redis.close()

    def ask(
        self,
        kind: JobKind,
        key: str,
        *args: Any,
        again: bool = False,
        time_limit_s: int | None = None,
    ) -> bool:
        """Ask for the job `kind` of `key` (a step, say), unless it was asked for before; returns
        whether it is new.

        `again` asks for it anew where the earlier one has ended. `time_limit_s` stands in for
        `jobs.time_limit`.

        Raises:
            redis.RedisError: Redis is away, or full.
        """
        settings = self._settings
        job_id = _job_id(self.run, kind, key)
        kept_s = PASSING_KEPT_S if kind in PASSING else settings.keep_results
        if (
            again
            and (earlier := self._fetch([job_id]))
            and earlier[0].get_status().value not in OPEN
        ):
            earlier[0].delete()
        try:
            self.queue.enqueue(
                FUNCTIONS[kind],
                args=args,
                job_id=job_id,
                unique=True,
                job_timeout=time_limit_s or settings.time_limit,
                result_ttl=kept_s,
                failure_ttl=kept_s,
                retry=Retry(settings.retries) if settings.retries else None,
                description=f"{kind} {key}",
                meta={"kind": kind, "key": key},
            )
        except DuplicateJobError:
            return False
        return True

    def is_open(self, kind: JobKind, key: str) -> bool:
        """Whether such a job waits or is under way."""
        found = self._fetch([_job_id(self.run, kind, key)])
        return bool(found) and found[0].get_status().value in OPEN

    def find(self, kind: JobKind, keys: Iterable[str]) -> dict[str, JobRow]:
        """What is known of the jobs of `keys`; those that Redis does not know are left out."""
        rows = (_row(job) for job in self._fetch([_job_id(self.run, kind, key) for key in keys]))
        return {row.key: row for row in rows}

    def idle(self) -> bool:
        """Whether no job of the run waits or is under way."""
        queue = self.queue
        return not len(queue) and not queue.started_job_registry.get_job_and_execution_ids(
            cleanup=False
        )

    def rows(self) -> list[JobRow]:
        """Every job that Redis still knows, the newest first."""
        queue = self.queue
        registries = (
            queue.started_job_registry,
            queue.finished_job_registry,
            queue.failed_job_registry,
            queue.scheduled_job_registry,
        )
        ids = {
            *queue.get_job_ids(),
            *(job_id for registry in registries for job_id in registry.get_job_ids(cleanup=False)),
        }
        return sorted((_row(job) for job in self._fetch(ids)), key=lambda row: -(row.asked or 0.0))

    def _fetch(self, ids: Any) -> list[Job]:
        return [
            job
            for job in Job.fetch_many(list(ids), connection=self._redis, serializer=SERIALIZER)
            if job is not None
        ]


def queue_name(run: str) -> str:
    """The name of the run's queue in RQ."""
    return f"onstream:{run}"


def ask_pinned(
    jobs: JobQueue,
    run_dir: Path,
    kind: Literal["evaluate", "export"],
    version: int,
    key: str,
    *args: Any,
    again: bool = False,
) -> bool:
    """Ask for a job on a policy version that stays on disk until the job has ended; returns whether
    it is new.

    Raises:
        redis.RedisError: Redis is away, or full.
    """
    use = pin_use(kind, key)
    # before the job exists: it may be over before this returns
    new_pin = pin(run_dir, version, use)
    needed = False
    try:
        asked = jobs.ask(kind, key, *args, again=again)
        needed = asked or jobs.is_open(kind, key)
    finally:
        if new_pin and not needed:
            unpin(run_dir, version, use)
    return asked


def pin_use(kind: str, key: str) -> str:
    """The name of a job's pin."""
    return f"{kind}-{hashlib.blake2s(key.encode(), digest_size=4).hexdigest()}"


def _job_id(run: str, kind: str, key: str) -> str:
    """RQ takes letters, digits, - and _ alone; the digest tells apart what looks the same without
    the rest.
    """
    digest = hashlib.blake2s(f"{run}/{key}".encode(), digest_size=6).hexdigest()
    return f"{re.sub('[^A-Za-z0-9-]', '-', f'{run}-{kind}-{key}')[:100]}-{digest}"


def _row(job: Job) -> JobRow:
    result = job.latest_result()
    took = (
        (job.ended_at - job.started_at).total_seconds() if job.ended_at and job.started_at else None
    )
    failed = result is not None and result.exc_string
    lines = str(result.exc_string).strip().splitlines() if failed and result is not None else []
    return JobRow(
        kind=str(job.meta.get("kind", job.func_name)),
        key=str(job.meta.get("key", "")),
        status=str(job.get_status(refresh=False).value),
        tries=int(job.meta.get("tries", 0)),
        asked=job.enqueued_at.timestamp() if job.enqueued_at else None,
        seconds=took,
        result=result.return_value if result is not None and not failed else None,
        reason=lines[-1] if lines else "",
    )
