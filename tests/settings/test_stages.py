"""The stage table: it says each name once, and everything that stages need follows from it."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from onstream.pipeline.records import Episode, Rollout, Ticket, Tombstone
from onstream.pipeline.redis.keys import STAGES as STREAMS
from onstream.pipeline.redis.keys import WORKING
from onstream.pipeline.stage import TAKES
from onstream.settings.sections.deployment import GpuMemoryShares
from onstream.settings.stages import (
    COMPUTING,
    KINDS,
    KINDS_OF,
    STAGE_NAMES,
    STAGE_OF,
    STAGES,
    START_ORDER,
    WORKERS,
    RecordName,
    StageName,
    WorkerKind,
)
from onstream.workers.runner import stage_class


def test_the_names_for_the_type_checker_are_those_of_the_table() -> None:
    assert get_args(StageName) == STAGE_NAMES
    assert set(get_args(WorkerKind)) == set(KINDS)
    assert set(get_args(RecordName)) == {name for stage in STAGES for name in stage.takes}


def test_every_stage_has_its_own_workers() -> None:
    kinds = [worker.kind for stage in STAGES for worker in stage.workers]
    assert len(set(kinds)) == len(kinds)
    assert [STAGE_OF[kind] for stage in STAGES for kind in KINDS_OF[stage.name]] == [
        stage.name for stage in STAGES for _ in stage.workers
    ]


def test_the_streams_and_what_they_hold_follow_from_the_table() -> None:
    assert STREAMS == ("generate", "act", "verify", "score", "train")
    assert WORKING == ("generate", "act", "verify", "score")
    assert dict(TAKES) == {
        "generate": (Ticket, Episode),
        "act": (Ticket, Episode),
        "verify": (Rollout,),
        "score": (Rollout,),
        "train": (Rollout, Tombstone),
    }


def test_every_kind_is_started_the_slowest_first() -> None:
    assert sorted(START_ORDER) == sorted(KINDS)
    assert set(START_ORDER[: len(COMPUTING)]) == {"trainer", "teacher", "generator"}


def test_every_kind_that_computes_models_has_a_share_of_a_gpu() -> None:
    assert set(COMPUTING.values()) == set(GpuMemoryShares.model_fields)


@pytest.mark.parametrize("kind", list(WORKERS))
def test_every_class_in_the_table_is_a_stage_of_that_name(kind: WorkerKind) -> None:
    for path in filter(None, (WORKERS[kind].class_path, WORKERS[kind].chat_class_path)):
        made: object = stage_class(path)
        if not isinstance(made, type):
            made = get_type_hints(made)["return"]
        assert vars(made)["name"] == STAGE_OF[kind]
