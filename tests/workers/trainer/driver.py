"""A run around a real trainer and real streams, whose generator is this module: it answers tickets
as a test wants.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import (
    decode_work,
    encode,
    ids_bytes,
    logprobs_bytes,
    mask_bytes,
)
from onstream.pipeline.records import Rollout, Sample, Ticket, Timing, Tombstone, VersionSpan
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.streams import Move, Out
from onstream.settings.root import Settings
from onstream.workers.inspection.audit import audit, counted
from tests.waiting import LONGEST_S

if TYPE_CHECKING:
    from onstream.workers.trainer.trainer import Trainer

Answer = Callable[[Ticket, int], Rollout | Tombstone]
CLOCKS = (
    "time",
    "wait_s",
    "waited_for",
    "step_s",
    "publish_s",
    "publish_wait_s",
    "checkpoint_wait_s",
    "publish_bytes",
    "tokens_per_s",
    "elapsed_s",
    "rollouts_per_s",
)
"""Metrics that tell of the machine and of the moment; all others follow from the records."""


def rollout(ticket: Ticket, version: int, **changes: Any) -> Rollout:
    """What a generator at `version` and a teacher might make of `ticket`; the same whenever it is
    asked.
    """
    draw = np.random.default_rng(ticket.number)
    prompt = np.random.default_rng(ticket.index).integers(2, 48, 5)
    tokens = int(draw.integers(2, 7))
    sample = Sample(
        prompt_ids=ids_bytes(prompt),
        completion_ids=ids_bytes(draw.integers(2, 48, tokens)),
        loss_mask=mask_bytes(np.ones(tokens)),
        generator_logprobs=logprobs_bytes(-draw.random(tokens) * 4),
        version_spans=[VersionSpan(version, 0, tokens)],
        completion_text="some words",
        teacher_logprobs=logprobs_bytes(-draw.random(tokens) * 4),
    )
    now = time.time()
    fields: dict[str, Any] = {
        "number": ticket.number,
        "group": ticket.group,
        "group_size": ticket.group_size,
        "index": ticket.index,
        "messages": [{"role": "user", "content": "say some words"}],
        "info": {},
        "samples": [sample],
        "temperature": 1.0,
        "finish_reason": "stop",
        "route": ["train"],
        "timings": [
            Timing("generate", "g", now - 3, now - 2),
            Timing("verify", "v", now - 1.5, now - 1),
        ],
        "reward": float(draw.integers(0, 3)) / 2,
    }
    return Rollout(**{**fields, **changes})


def with_image(ticket: Ticket, version: int, **changes: Any) -> Rollout:
    """The same with a prompt that shows an image; the students here look at none."""
    made = rollout(ticket, version, **changes)
    made.samples[0].images = ["ab" * 32]
    return made


def dead(ticket: Ticket, version: int) -> Tombstone:
    return Tombstone(ticket.number, "verify", "the test killed it")


def killed(*_: object, **__: object) -> None:
    """Stands where a kill comes."""
    raise KeyboardInterrupt


class Gate:
    """Holds back what calls `passes` until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def open(self) -> None:
        self._open.set()

    def passes(self) -> None:
        self.reached.set()
        assert self._open.wait(LONGEST_S)


class Run:
    """One run with a trainer at work. `crash` and `start` are a kill and a new process: nothing is
    closed in between.
    """

    def __init__(self, bus: Bus, model: Path, directory: Path, **changes: Any) -> None:
        self.bus = bus
        self.model = model
        self.directory = directory
        self.changes = changes
        self.trainers: list[Trainer] = []
        self.start()

    def settings(self, **changes: Any) -> Settings:
        given: dict[str, Any] = {
            "run": {"name": self.bus.run, "dir": str(self.directory), "seed": 5},
            "model": {"name": str(self.model)},
            "deployment": {"device": "cpu", "stages": ["generate", "verify", "train"]},
            "orchestrator": {"batch_size": 8, "group_size": 4, "max_off_policy_steps": 1},
            "trainer": {"max_steps": 6, "sample_interval": 2, "optim": {"lr": 1e-3, "warmup": 0}},
            "checkpoint": {"interval": 2},
            "delivery": {"lease": 0.5},
        }
        for name, value in {**self.changes, **changes}.items():
            section, _, key = name.partition("__")
            target = given.setdefault(section, {})
            *path, last = key.split("__")
            for part in path:
                target = target.setdefault(part, {})
            target[last] = value
        return Settings.model_validate(given)

    def start(self, **changes: Any) -> Trainer:
        """A new trainer process, which takes the run up."""
        # Here, so that who wants a record alone waits for no transformers.
        from onstream.workers.trainer.startup import trainer_stage

        settings = self.settings(**changes)
        stage = trainer_stage(settings, self.bus)
        self.worker = Worker(stage, self.bus, settings.delivery, block_s=0.01)
        stage.setup()
        self.trainer = stage.trainer
        self.trainers.append(self.trainer)
        return self.trainer

    def close_files(self) -> None:
        """What the kernel does for a killed process."""
        for trainer in self.trainers:
            trainer.metrics.close()
            trainer.recording.close()

    def ready(self) -> None:
        for stage in ("generate", "verify"):
            self.bus.state.mark_ready(stage)

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.worker.turn()

    def tickets(self, count: int = 10_000) -> list[Any]:
        """Entries of the tickets that nobody took yet, with their tickets."""
        return [
            (entry, decode_work(entry.payload))
            for entry in self.bus.streams.read("generate", count)
        ]

    def answer(self, make: Answer = rollout, count: int = 10_000) -> int:
        """Answer tickets with what `make` says, in their order, written by the newest policy;
        returns how many.
        """
        policy = self.bus.state.newest_policy()
        assert policy is not None
        moves = []
        for entry, ticket in self.tickets(count):
            record = make(ticket, policy.number)
            moves.append(Move(entry.id, [Out("train", ticket.number, encode(record))]))
        self.bus.streams.move("generate", moves)
        return len(moves)

    def until(self, step: int, make: Answer = rollout) -> None:
        """Answer and train until `step` steps are taken."""
        for _ in range(400):
            if self.trainer.step >= step:
                return
            self.answer(make, count=8)
            self.turn()
        raise AssertionError(
            f"step {self.trainer.step} of {step} after 400 turns: {self.trainer.stats.detail}"
        )

    def to_the_end(self, make: Answer = rollout) -> None:
        """Answer and train until the run has ended."""
        self.until(self.trainer.training.max_steps, make)
        self.turn(2)
        assert self.bus.state.finished()

    def rows(self, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for line in (self.trainer.directory.path / name).read_text().splitlines()
        ]

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.trainer.directory.path / "checkpoints").glob("*"))

    def announced(self) -> list[int]:
        return [policy.number for policy in self.bus.state.announced_policies()]

    def counts(self) -> dict[str, int]:
        """Sizes of the audit's sets, those that are not empty."""
        found = counted(audit(self.trainer.directory.path, self.bus))
        return {
            name: count
            for name, count in {**found, "dropped": sum(found["dropped"].values())}.items()
            if count
        }

    def lose_redis(self) -> None:
        """Every key of the run is gone, as after a restart without data."""
        db = self.bus.connection.client
        db.delete(*db.keys(f"{{onstream:{self.bus.run}}}:*"))


def digest(bus: Bus) -> str:
    """The digest of the newest weights."""
    policy = bus.state.newest_policy()
    assert policy is not None
    return policy.digest


@contextmanager
def twin_to_the_end(
    redis_url: str, run_name: str, model: Path, directory: Path, **changes: Any
) -> Iterator[Run]:
    """A run beside `run_name`, trained to its end, to which nothing happened."""
    bus = Bus.connect(
        redis_url, f"{run_name}-twin", consumer="tester", block_s=0.2, connect_timeout_s=5
    )
    job = Run(bus, model, directory, **changes)
    job.ready()
    job.to_the_end()
    yield job
    job.close_files()
    bus.close()
