"""`onstream health`: the exit code that a container's health check goes by."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from onstream.pipeline.errors import Exit
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.keys import Keys
from onstream.pipeline.stage import Stats
from onstream.settings.root import Settings
from onstream.workers.inspection.health import health

HOST = socket.gethostname()


@pytest.fixture
def worker(redis_url: str, run_name: str) -> Iterator[Bus]:
    """A verifier of this machine, in the slot 0."""
    bus = Bus.connect(
        redis_url, run_name, consumer=f"verifier-{HOST}-0", block_s=0.2, connect_timeout_s=5
    )
    yield bus
    bus.close()


@pytest.fixture
def settings(redis_url: str, run_name: str) -> Settings:
    return Settings.model_validate({"run": {"name": run_name}, "redis": {"url": redis_url}})


def checks(settings: Settings, slot: str | None = None) -> tuple[Exit, Exit]:
    """Exit codes of readiness and liveness."""
    return tuple(health("verifier", settings, live=live, slot=slot).exit for live in (False, True))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("state", "ready", "live"),
    [
        ("starting", Exit.FAILED, Exit.OK),
        ("running", Exit.OK, Exit.OK),
        ("draining", Exit.FAILED, Exit.OK),
        ("failed", Exit.FAILED, Exit.FAILED),
    ],
)
def test_a_worker_is_ready_while_it_takes_records_and_lives_until_it_fails(
    worker: Bus, settings: Settings, state: str, ready: Exit, live: Exit
) -> None:
    worker.state.write_heartbeat("verify", Stats(), state=state)
    assert checks(settings) == checks(settings, "0") == (ready, live)


def move_heartbeat(worker: Bus, by_s: float) -> None:
    """Move the time of the last heartbeat."""
    key = Keys(worker.run).workers
    [beat] = worker.connection.client.hvals(key)
    stamp, _, rest = beat.partition(b" ")
    moved = str(float(stamp) + by_s).encode() + b" " + rest
    worker.connection.client.hset(key, worker.consumer, moved)


def test_a_worker_that_was_not_heard_of_lately_is_neither(worker: Bus, settings: Settings) -> None:
    assert checks(settings) == (Exit.FAILED, Exit.FAILED)
    worker.state.write_heartbeat("verify", Stats())
    move_heartbeat(worker, -31)
    assert checks(settings) == (Exit.FAILED, Exit.FAILED)


def test_workers_of_other_kinds_hosts_and_slots_do_not_count(
    worker: Bus, settings: Settings
) -> None:
    worker.state.write_heartbeat("verify", Stats())
    assert health("generator", settings, live=True).exit is Exit.FAILED
    assert checks(settings, "1") == (Exit.FAILED, Exit.FAILED)
    beat = worker.connection.client.hget(Keys(worker.run).workers, worker.consumer)
    worker.connection.client.hset(
        Keys(worker.run).workers,
        worker.consumer,
        beat.replace(f'"host":"{HOST}"'.encode(), b'"host":"elsewhere"'),
    )
    assert checks(settings) == (Exit.FAILED, Exit.FAILED)


def test_without_redis_a_worker_is_not_ready_but_a_restart_would_not_mend_that(
    settings: Settings,
) -> None:
    away = settings.model_copy(
        update={"redis": settings.redis.model_validate({"url": "redis://127.0.0.1:1/0"})}
    )
    assert checks(away) == (Exit.UNREACHABLE, Exit.OK)


def test_the_command_exits_by_it_and_loads_nothing_heavy(worker: Bus, redis_url: str) -> None:
    worker.state.write_heartbeat("verify", Stats(detail="scores answers"))
    move_heartbeat(worker, 3600)  # however long the command takes to start, that was just now
    command = ["health", "verifier", "--set", f"run.name={worker.run}"]
    environ = {**os.environ, "ONSTREAM_REDIS__URL": redis_url}
    done = subprocess.run(
        [sys.executable, "-m", "onstream", *command],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"verifier-{HOST}-0: running, heard of 0.0 s ago; scores answers\n"
    code = (
        f"import sys\nfrom onstream.workers.commands.cli import main\ntry:\n    main({command!r})\n"
        "except SystemExit:\n    print(sys.modules.keys() & {'torch', 'transformers', 'vllm'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\nset()\n")
