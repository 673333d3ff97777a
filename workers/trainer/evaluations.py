"""Has policies evaluated: requests a job for each, and reads the results from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from redis.exceptions import RedisError

from onstream.pipeline.telemetry import get_logger
from onstream.pipeline.weights.directory_store import pinned
from onstream.settings.root import Settings

if TYPE_CHECKING:
    from onstream.pipeline.redis.job_queue import JobQueue

METRICS = ("eval_version", "eval_exact", "eval_reward")
log = get_logger()


class Evaluations:
    """Requests evaluations and brings their results into the metrics.

    A job that cannot be requested is a warning and costs that evaluation, never the step.
    """

    def __init__(self, settings: Settings, url: str, run_dir: Path) -> None:
        # Imports RQ, which a run without evaluations does not need.
        from onstream.pipeline.redis.job_queue import JobQueue

        self._jobs: JobQueue = JobQueue(url, settings.run.name, settings.jobs)
        self._interval = settings.eval.interval
        self._max_waiting = settings.jobs.max_waiting
        self._last_version = settings.trainer.max_steps
        self._run_dir = run_dir
        self._results = run_dir / "evals.jsonl"
        # Results that are there were in the metrics of the trainer before this one.
        self._read_bytes = self._results.stat().st_size if self._results.exists() else 0

    def request(self, version: int) -> None:
        """Have `version` evaluated, if it is its turn. It stays on disk until that is done.

        Where too many evaluations wait it is left out; the last version of the run never is.
        """
        from onstream.pipeline.redis.job_queue import ask_pinned

        if not version or version % self._interval:
            return
        waiting = pinned(self._run_dir) - {version}
        if len(waiting) >= self._max_waiting and version != self._last_version:
            log.warning(
                "not evaluated: too many evaluations wait",
                version=version,
                waiting=len(waiting),
                next_step="onstream worker jobs",
            )
            return
        try:
            ask_pinned(self._jobs, self._run_dir, "evaluate", version, str(version), version)
        except (RedisError, OSError) as error:
            log.warning(
                "not evaluated: the job could not be requested", version=version, error=str(error)
            )

    def request_again(self, step: int) -> None:
        """Request what the trainer before this one was waiting for: Redis may have lost it.

        A job that is known already is not repeated.
        """
        for version in sorted(pinned(self._run_dir)):
            if version <= step:
                self.request(version)

    def new_results(self) -> dict[str, Any]:
        """The newest result since the last call, by the names of METRICS; None for each of them
        where there is none.
        """
        result: dict[str, Any] = dict.fromkeys(METRICS)
        for row in self._new_rows():
            result = {
                "eval_version": row["version"],
                "eval_exact": row["exact"],
                "eval_reward": row["reward"],
            }
        return result

    def close(self) -> None:
        """Close the client."""
        self._jobs.close()

    def _new_rows(self) -> list[dict[str, Any]]:
        """Rows that were written since the last call; one without its end is left for the next."""
        if not self._results.exists():
            return []
        with self._results.open("rb") as file:
            file.seek(self._read_bytes)
            lines, end, _ = file.read().rpartition(b"\n")
        self._read_bytes += len(lines) + len(end)
        return [msgspec.json.decode(line, type=dict[str, Any]) for line in lines.splitlines()]
