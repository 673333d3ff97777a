"""`onstream metrics`: the state of a run as a page that Prometheus reads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from redis.exceptions import RedisError

from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.bus import Bus, connect, redis_url
from onstream.pipeline.run_files.json_lines import GrowingRows
from onstream.settings.root import Settings
from onstream.workers.inspection.run_phase import read_run_files
from onstream.workers.inspection.status import status, status_of_files
from onstream.workers.launcher.disk_watch import free_bytes
from onstream.workers.monitoring import families
from onstream.workers.monitoring.step_totals import StepTotals

PATIENCE_S = 2.0
"""How long a scrape waits for a Redis that is away; Prometheus itself gives up after 10 s."""


class RunCollector(Collector):
    """What Prometheus is told of a run, read at each scrape from its Redis and its files.

    Where Redis is away, what it alone knows is left out. A Redis of the run's own that stands still
    is not started.
    """

    def __init__(self, settings: Settings) -> None:
        redis = settings.redis.model_copy(update={"connect_timeout": PATIENCE_S})
        self._settings = settings.model_copy(update={"redis": redis})
        self._steps = StepTotals(settings.run_dir / "metrics.jsonl")
        self._evaluations = GrowingRows(settings.run_dir / "evals.jsonl")
        self._newest_evaluation: dict[str, Any] = {}
        self._lock = threading.Lock()  # the server answers each request in a thread of its own

    def collect(self) -> Iterator[Metric]:
        """All metrics, as they are now."""
        with self._lock:
            found = list(self._collect())
        yield from found

    def _collect(self) -> Iterator[Metric]:
        yield from self._of_redis()
        self._steps.read()
        yield from families.of_steps(self._steps)
        _, evaluations = self._evaluations.read()
        self._newest_evaluation = (evaluations or [self._newest_evaluation])[-1]
        yield from families.of_evaluation(self._newest_evaluation)
        if self._settings.run_dir.exists():
            yield from families.of_disk(free_bytes(self._settings.run_dir))

    def _of_redis(self) -> list[Metric]:
        files = read_run_files(self._settings.run_dir)
        try:
            with self._bus() as bus:
                memory = bus.connection.ask("INFO", "memory")
                return [*families.of_state(status(bus, files)), *families.of_server(memory)]
        except (UserError, RedisError) as error:
            return list(families.of_state(status_of_files(files, str(error))))

    @contextmanager
    def _bus(self) -> Iterator[Bus]:
        settings = self._settings
        bus = connect(settings, redis_url(settings), consumer=f"metrics-{os.getpid()}")
        try:
            yield bus
        finally:
            bus.close()


class Exporter:
    """Serves the metrics of a run over HTTP, at any path, until it is closed."""

    def __init__(self, settings: Settings, host: str, port: int) -> None:
        """Begin to serve. With port 0 the system chooses one, which `port` then tells.

        Raises:
            UserError: the address cannot be had.
        """
        registry = CollectorRegistry()
        registry.register(RunCollector(settings))
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise UserError(
                f"http://{host}:{port}: {error}",
                expected="an address of this machine that nobody serves at",
                next_step="Choose another --port, or another --host.",
            ) from error
        self.port = self._server.server_port

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
