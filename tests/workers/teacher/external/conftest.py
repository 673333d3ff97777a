from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onstream.pipeline.record_codec import ids_bytes, logprobs_bytes, mask_bytes
from onstream.pipeline.records import Rollout, Sample
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome
from onstream.settings.root import Settings
from onstream.workers.teacher.external import ExternalTeacher
from tests.table_teacher import TableTeacher
from tests.waiting import LONGEST_S

Servers = Callable[..., TableTeacher]
Configure = Callable[..., Settings]
Stages = Callable[[Settings], ExternalTeacher]


@pytest.fixture
def servers() -> Iterator[Servers]:
    """Starts servers with hand-written faults."""
    started: list[TableTeacher] = []

    def start(**how: Any) -> TableTeacher:
        started.append(TableTeacher(**how))
        started[-1].start()
        return started[-1]

    yield start
    for server in started:
        if not server.stopped.is_set():
            server.stop()


@pytest.fixture
def configure(model_dir: Path) -> Configure:
    """Settings of a run with the given servers as its teacher.

    Keywords are the client's settings, `top_k`, `temperature` and `score_cache`.
    """

    def make(
        *servers: TableTeacher,
        top_k: int | str = 0,
        score_cache: int = 0,
        max_completion: int = 16,
        temperature: float = 1.0,
        **client: Any,
    ) -> Settings:
        fast = {"breaker_pause": 0.05, "timeout": 5, "connect_timeout": 1}
        client = {"base_url": [server.base_url for server in servers], **fast, **client}
        return Settings.model_validate(
            {
                "model": {"name": str(model_dir)},
                "inference": {
                    "sampling": {"max_completion": max_completion, "temperature": temperature}
                },
                "trainer": {"loss": {"teacher_tau": 1.0, "teacher_top_k": top_k}},
                "orchestrator": {
                    "score_cache": score_cache,
                    "teacher_model": {"client": client, "model": {"name": "teacher"}},
                },
            }
        )

    return make


@pytest.fixture
def stages(bus: Bus) -> Iterator[Stages]:
    """Sets stages up, and closes them."""
    made: list[ExternalTeacher] = []

    def start(settings: Settings) -> ExternalTeacher:
        stage = ExternalTeacher(settings, bus)
        stage.setup()
        made.append(stage)
        return stage

    yield start
    for stage in made:
        stage.close(finished=True)


def rollout(
    number: int,
    *,
    prompt: Sequence[int] = (2, 5),
    completion: Sequence[int] | None = None,
    samples: int = 1,
) -> Rollout:
    completion = completion or [20 + number % 50, 30, 40, 3]
    sample = Sample(
        prompt_ids=ids_bytes(prompt),
        completion_ids=ids_bytes(completion),
        loss_mask=mask_bytes(np.ones(len(completion))),
        generator_logprobs=logprobs_bytes(np.zeros(len(completion))),
        version_spans=[],
        completion_text="",
    )
    many = [sample] + [
        Sample(*(getattr(sample, name) for name in sample.__struct_fields__))
        for _ in range(samples - 1)
    ]
    return Rollout(number, 0, 8, 0, [], {}, many, 1.0, "stop", ["score", "train"])


def delivered(*records: Rollout) -> list[Delivery]:
    return [
        Delivery(b"%d-0" % record.number, record.number, record, 100, 1, taken=1.0)
        for record in records
    ]


def work(
    stage: ExternalTeacher,
    new: Sequence[Delivery],
    *,
    count: int | None = None,
) -> list[Outcome]:
    """The outcomes of `new`, handed in as the loop does."""
    outcomes = []
    waiting = list(new)
    deadline = time.monotonic() + LONGEST_S
    while len(outcomes) < (len(new) if count is None else count):
        assert time.monotonic() < deadline, (
            f"{len(outcomes)} of {len(new)} outcomes; {stage.stats.detail}"
        )
        room = stage.room  # once: an endpoint may come back at any moment
        taken, waiting = waiting[:room], waiting[room:]
        outcomes += stage.handle(taken)
    return outcomes


def until(condition: Callable[[], Any], stage: ExternalTeacher) -> None:
    """Let `stage` work until `condition` holds."""
    deadline = time.monotonic() + LONGEST_S
    while not condition():
        assert time.monotonic() < deadline, stage.stats.detail
        assert stage.handle([]) == []
