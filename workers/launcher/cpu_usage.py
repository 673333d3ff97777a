"""CPU seconds of a run's processes, those until the first step apart."""

from __future__ import annotations

import resource
import time
from typing import Any

from onstream.pipeline.processes import usable_cores
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from onstream.workers.launcher.process_usage import process_cpu_seconds
from onstream.workers.launcher.processes import EVAL
from onstream.workers.launcher.run_watcher import MetricsTail
from onstream.workers.launcher.supervisor import Supervisor


class CpuUsage:
    """Tells the CPU seconds of start-up from those of training.

    Start-up ends with the first step that is taken in this launch; evaluations are no part of it.
    """

    def __init__(self, supervisor: Supervisor, redis: EmbeddedRedis | None) -> None:
        self._supervisor = supervisor
        self._redis = redis
        self._launched = time.time()
        self._startup_s: dict[str, float] = {}
        self._startup_ended = 0.0

    def look(self, metrics: MetricsTail) -> None:
        """Note the seconds of start-up once the first step has been taken."""
        if not self._startup_s and metrics.stepped_since(self._launched):
            self._startup_s = self._used()
            self._startup_s.pop(EVAL, None)
            self._startup_ended = time.monotonic()

    def total_s(self) -> float:
        """CPU seconds of all processes of the run so far."""
        return sum(self._used().values())

    def report(self) -> dict[str, Any] | None:
        """CPU seconds of each kind of process, as the report holds them, and the share of the time
        of this machine's cores that they are.

        None where no step was taken in this launch.
        """
        if not self._startup_s:
            return None
        used = {kind: s - self._startup_s.get(kind, 0.0) for kind, s in self._used().items()}
        cores_s = (time.monotonic() - self._startup_ended) * usable_cores()
        return {
            "cpu_seconds": _rounded(used),
            "cpu_seconds_startup": _rounded(self._startup_s),
            "cores_busy": round(sum(used.values()) / cores_s, 3),
        }

    def _used(self) -> dict[str, float]:
        used = self._supervisor.cpu_seconds()
        if self._redis is not None and self._redis.pid is not None:
            used["redis"] = process_cpu_seconds(self._redis.pid)
        own = resource.getrusage(resource.RUSAGE_SELF)
        used["launcher"] = own.ru_utime + own.ru_stime
        return used


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {kind: round(value, 2) for kind, value in seconds.items()}
