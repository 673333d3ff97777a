"""The queue of jobs beside the training, on RQ: how jobs are asked for, and what is known of them.

RQ keeps its keys under `rq:`, apart from the run's. It has a client of its own here, since its
calls differ from those of the streams and fail on a Redis that is full. Arguments and results are
JSON.
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

from onstream.pipeline.weights.directory_store import pin, unpin
from onstream.settings.sections.jobs import JobsSettings

JobKind = Literal["evaluate", "export", "prune", "sweep", "verify"]
FUNCTIONS: dict[str, str] = {
    kind: f"onstream.workers.jobs.functions.{kind}" for kind in get_args(JobKind)
}
"""The function that a jobs worker calls for each kind. It calls no other, whatever Redis holds."""
FORMER_MODULE = "workers.jobs.tasks."
"""Where the functions were before there was one package: jobs queued then still name them."""
SERIALIZER = "json"
CALL_TIMEOUT_S = 5.0
OPEN = ("queued", "started", "scheduled", "deferred", "ready_to_enqueue", "created")
SHORT_LIVED: tuple[JobKind, ...] = ("sweep", "verify")
"""Kinds with many jobs, whose results nobody needs for long."""
SHORT_LIVED_S = 3600


@dataclass(frozen=True)
class JobRow:
    """What is known of one job.

    `result` is what it returned, `reason` is why it failed, and `tries` counts the tries that have
    begun.
    """

    kind: str
    key: str
    status: str
    tries: int
    asked: float | None
    """When it was asked for, in seconds since the epoch."""
    seconds: float | None
    """How long it took."""
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
        """Ask for the job `kind` of `key` (a step, say).

        Returns False where it was asked for before.

        With `again`, an earlier one that has ended does not count. `time_limit_s` stands in for
        `jobs.time_limit`.

        Raises:
            redis.RedisError: Redis is away, or full.
        """
        settings = self._settings
        job_id = _job_id(self.run, kind, key)
        kept_s = SHORT_LIVED_S if kind in SHORT_LIVED else settings.keep_results
        if again:
            self._delete_ended(job_id)
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

    def _delete_ended(self, job_id: str) -> None:
        for job in self._fetch([job_id]):
            if job.get_status().value not in OPEN:
                job.delete()

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
        ids = set(queue.get_job_ids())
        for registry in registries:
            ids.update(registry.get_job_ids(cleanup=False))
        rows = [_row(job) for job in self._fetch(ids)]
        return sorted(rows, key=lambda row: -(row.asked or 0.0))

    def _fetch(self, ids: Iterable[str]) -> list[Job]:
        """Those of `ids` that Redis knows."""
        found = Job.fetch_many(list(ids), connection=self._redis, serializer=SERIALIZER)
        return [job for job in found if job is not None]


def queue_name(run: str) -> str:
    """The name of the run's queue in RQ."""
    return f"onstream:{run}"


def current_function(name: str) -> str | None:
    """The function that a job calls which names `name`; None where it is no job of Onstream.

    >>> current_function("workers.jobs.tasks.verify")
    'onstream.workers.jobs.functions.verify'
    """
    if name in FUNCTIONS.values():
        return name
    if name.startswith(FORMER_MODULE):
        return FUNCTIONS.get(name.removeprefix(FORMER_MODULE))
    return None


def ask_pinned(
    jobs: JobQueue,
    run_dir: Path,
    kind: Literal["evaluate", "export"],
    version: int,
    key: str,
    *args: Any,
    again: bool = False,
) -> bool:
    """Ask for a job on a policy version; returns False where it was asked for before.

    The version stays on disk until the job has ended.

    Raises:
        redis.RedisError: Redis is away, or full.
    """
    use = pin_use(kind, key)
    # Pinned before the job exists: a worker may have taken it, and be done, before this returns.
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
    """The id of the job in RQ, which takes letters, digits, - and _ alone.

    A digest tells keys apart that differ in other characters.
    """
    digest = hashlib.blake2s(f"{run}/{key}".encode(), digest_size=6).hexdigest()
    readable = re.sub("[^A-Za-z0-9-]", "-", f"{run}-{kind}-{key}")[:100]
    return f"{readable}-{digest}"


def _row(job: Job) -> JobRow:
    latest = job.latest_result()
    failure = str(latest.exc_string).strip() if latest is not None and latest.exc_string else ""
    return JobRow(
        kind=str(job.meta.get("kind", job.func_name)),
        key=str(job.meta.get("key", "")),
        status=str(job.get_status(refresh=False).value),
        tries=int(job.meta.get("tries", 0)),
        asked=job.enqueued_at.timestamp() if job.enqueued_at else None,
        seconds=_seconds(job),
        result=latest.return_value if latest is not None and not latest.exc_string else None,
        reason=failure.splitlines()[-1] if failure else "",
    )


def _seconds(job: Job) -> float | None:
    if not job.started_at or not job.ended_at:
        return None
    return float((job.ended_at - job.started_at).total_seconds())
