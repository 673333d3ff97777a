"""How the trainer has its policies evaluated: asked for every `eval.interval` steps, done
elsewhere, read when they are there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from onstream.pipeline.telemetry import get_logger
from onstream.pipeline.weights.pins import pinned
from onstream.settings.root import Settings

if TYPE_CHECKING:
    from onstream.pipeline.redis.job_queue import JobQueue

METRICS = ("eval_version", "eval_exact", "eval_reward")
log = get_logger()


class Evaluations:
    """Asks for evaluations and brings their results into the metrics.

    A failure to ask is said and costs that evaluation, never the step.
    """

    def __init__(self, settings: Settings, url: str, run_dir: Path) -> None:
        from onstream.pipeline.redis.job_queue import (
            JobQueue,  # brings RQ, which a run without evaluations needs not
        )

        self._jobs: JobQueue = JobQueue(url, settings.run.name, settings.jobs)
        self._interval = settings.eval.interval
        self._max_waiting = settings.jobs.max_waiting
        self._last = settings.trainer.max_steps  # what the run came to is evaluated in any case
        self._run_dir = run_dir
        self._results = run_dir / "evals.jsonl"
        self._read_bytes = self._results.stat().st_size if self._results.exists() else 0

    def ask(self, version: int) -> None:
        """Have `version` evaluated, if it is its turn. It stays on disk until it is."""
        from onstream.pipeline.redis.job_queue import ask_pinned

        if not version or version % self._interval:
            return
        waiting = pinned(self._run_dir) - {version}
        if len(waiting) >= self._max_waiting and version != self._last:
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
                "not evaluated: the job could not be asked for", version=version, error=str(error)
            )

    def ask_again(self, step: int) -> None:
        """Ask anew for what was waiting when the trainer before this one ended: Redis may have lost
        it. Known jobs are not repeated.
        """
        for version in sorted(pinned(self._run_dir)):
            if version <= step:
                self.ask(version)

    def arrived(self) -> dict[str, Any]:
        """The newest result since the last call, by the names of METRICS; each None where there is
        none.
        """
        found: dict[str, Any] = dict.fromkeys(METRICS)
        for row in self._new_rows():
            found = {
                "eval_version": row["version"],
                "eval_exact": row["exact"],
                "eval_reward": row["reward"],
            }
        return found

    def _new_rows(self) -> list[dict[str, Any]]:
        import msgspec

        if not self._results.exists():
            return []
        with self._results.open("rb") as file:
            file.seek(self._read_bytes)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read_bytes += len(whole) + len(end)
        return [msgspec.json.decode(line, type=dict[str, Any]) for line in whole.splitlines()]

    def close(self) -> None:
        """Close the client."""
        self._jobs.close()
