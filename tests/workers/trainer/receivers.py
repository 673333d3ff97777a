"""Generators that receive, each in a process of its own; no GPU is there, so no weights move: only
what is said about them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Stats
from onstream.workers.generator.nccl_receiver import READING, READY, TransferReceiver
from tests.forkserver import context
from tests.waiting import LONGEST_S


class SaysSo:
    """Stands for an engine on GPUs. A transfer is done when the trainer asks next, or ends with the
    next of `ends`.

    `joined` has the ranks that it was given, one for each time.
    """

    def __init__(self, gpus: int, ends: Sequence[str] = ()) -> None:
        self.gpus = gpus
        self._ends = list(ends)
        self.joined: list[int] = []
        self.asked: list[str] = []
        self.loaded: list[tuple[int, str]] = []

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str:
        return "" if "w" in shapes else "another model"

    def ask_processes(self, method: str, *args: str) -> list[str]:
        self.asked.append(method)
        if method == "onstream_join":
            self.joined.append(json.loads(args[0])["rank_offset"])
        if method != "onstream_staged":
            return []
        end = self._ends[0] if self._ends else READY
        if end != READING:
            self._ends[:1] = []
        return [READY] * (self.gpus - 1) + [end]

    def load_received(self, number: int, digest: str) -> None:
        self.loaded.append((number, digest))


def generator(url: str, run: str, name: str, gpus: int, ends: Sequence[str], joined: Any) -> None:
    """A process that answers the trainer's calls until it is killed; `joined` is a queue of the
    ranks it is given.
    """
    bus = Bus.connect(url, run, consumer=name, block_s=0.2, connect_timeout_s=5)
    bus.state.write_heartbeat("generate", Stats())
    engine = SaysSo(gpus, ends)
    receiver = TransferReceiver(bus.transfer, engine, patience_s=5)
    joined.put((name, "up"))
    told = 0
    while True:
        receiver.look()
        for rank in engine.joined[told:]:
            joined.put((name, rank))
        told = len(engine.joined)
        bus.connection.server_time()


def start(
    url: str, bus: Bus, name: str, gpus: int, ends: Sequence[str], joined: Any
) -> BaseProcess:
    """Start a `generator` and wait until it receives."""
    process = context().Process(
        target=generator, args=(url, bus.run, name, gpus, ends, joined), daemon=True
    )
    process.start()
    assert joined.get(timeout=LONGEST_S) == (name, "up")
    return process
