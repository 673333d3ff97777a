"""Kill workers and the server again and again: no record is lost, and none goes on twice."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from redis import Redis

from onstream.pipeline.records import StageName
from onstream.pipeline.redis.bus import Bus
from onstream.workers.launcher.embedded_redis import EmbeddedRedis
from tests.forkserver import context
from tests.pipeline.crash_workers import LEASE_S, read_lines, work

RECORDS = 1600
SLOTS: dict[str, StageName] = {
    "generate-0": "generate",
    "generate-1": "generate",
    "verify-0": "verify",
    "verify-1": "verify",
    "train-0": "train",
}
BLOWS = [*["generate"] * 6, *["verify"] * 6, *["train"] * 3, *["server"] * 3, *["pause"] * 6]


class Crew:
    """The worker processes, by slot. Every other time, a slot is filled under its old name."""

    def __init__(self, start: Callable[[StageName, str], BaseProcess]) -> None:
        self._start = start
        self.killed = 0
        self.woken = 0
        self.sleepers: dict[str, threading.Timer] = {}
        self.processes = {slot: start(stage, slot) for slot, stage in SLOTS.items()}

    def slot(self, stage: str, dice: random.Random) -> str:
        return dice.choice(
            [slot for slot in SLOTS if slot.startswith(stage) and slot not in self.sleepers]
        )

    def kill(self, slot: str) -> None:
        """SIGKILL, and another process in its place."""
        process = self.processes[slot]
        assert process.pid is not None and process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        self.killed += 1
        name = slot if self.killed % 2 else f"{slot}-{self.killed}"
        self.processes[slot] = self._start(SLOTS[slot], name)

    def pause(self, dice: random.Random) -> None:
        """Let a process sleep past its lease, so that it wakes as one whose records are somebody
        else's; one of a stage at a time.
        """
        while not (
            stages := [
                stage
                for stage in ("generate", "verify")
                if not any(slot.startswith(stage) for slot in self.sleepers)
            ]
        ):
            time.sleep(0.01)
        slot = self.slot(dice.choice(stages), dice)
        pid = self.processes[slot].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        self.sleepers[slot] = threading.Timer(2.5 * LEASE_S, self._wake, (slot, pid))
        self.sleepers[slot].start()

    def _wake(self, slot: str, pid: int) -> None:
        os.kill(pid, signal.SIGCONT)
        del self.sleepers[slot]
        self.woken += 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path / "redis", max_memory_mb=256)
    start(server)
    yield server
    server.stop()


@pytest.fixture
def crew(server: EmbeddedRedis, tmp_path: Path, run_name: str) -> Iterator[Crew]:
    def start(stage: StageName, name: str) -> BaseProcess:
        process = context().Process(
            target=work, args=(stage, name, server.url, run_name, tmp_path / "ledger", RECORDS)
        )
        process.start()
        return process

    crew = Crew(start)
    yield crew
    for process in crew.processes.values():
        process.kill()
        process.join()


def start(server: EmbeddedRedis) -> None:
    """Start the server, so that its file has all that it answers for.

    While the disk is busy, `everysec` would keep writes back for up to two seconds. There is no
    trainer here that would issue again what a kill takes then.
    """
    with Redis.from_url(server.start()) as client:
        client.config_set("appendfsync", "always")


def kill_server(server: EmbeddedRedis) -> None:
    """SIGKILL the server and start it again on its data."""
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    while server.alive:
        time.sleep(0.001)
    start(server)


@pytest.mark.slow
def test_kills_of_workers_and_server_lose_nothing_and_double_nothing(
    server: EmbeddedRedis, crew: Crew, tmp_path: Path, run_name: str
) -> None:
    dice = random.Random(7)
    blows = dice.sample(BLOWS, len(BLOWS))
    for turn, blow in enumerate(blows):
        while len(read_lines(tmp_path / "ledger")) < RECORDS * (turn + 1) // (len(blows) + 2):
            time.sleep(0.002)
        if blow == "server":
            kill_server(server)
        elif blow == "pause":
            crew.pause(dice)
        else:
            crew.kill(crew.slot(blow, dice))
    for process in crew.processes.values():
        process.join(timeout=300)

    assert (crew.killed, crew.woken) == (15, 6)
    assert [process.exitcode for process in crew.processes.values()] == [0] * 5
    arrived = Counter(json.loads(line)[0] for line in read_lines(tmp_path / "ledger"))
    bus = Bus.connect(server.url, run_name, consumer="audit", block_s=0.1, connect_timeout_s=5)
    assert bus.state.issued() == RECORDS
    assert {number for number in range(1, RECORDS + 1) if number not in arrived} == set(), "lost"
    assert {number: count for number, count in arrived.items() if count > 1} == {}, "duplicated"
    assert bus.state.backlog() == {"generate": 0, "act": 0, "verify": 0, "score": 0, "train": 0}
    assert bus.state.dead_numbers() == []
    bus.close()
