"""The stages of a run, in the order of the flow: the one table that everything else follows from.

A new stage takes a row and its names here, a module of its own under `workers/`, and a line in
`settings/route.py` that says when rollouts pass it. The route, the plan, the loop, the launcher,
the keys in Redis, the count in `[deployment.workers]`, the metrics of its latency and the
deployment files follow.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

StageName = Literal["generate", "act", "verify", "score", "train"]
WorkerKind = Literal[
    "generator", "environment", "verifier", "teacher", "teacher-external", "trainer", "jobs"
]
RecordName = Literal["Ticket", "Episode", "Rollout", "Tombstone"]
StreamName = str
"""The name of a stream: that of its stage, or `score:<teacher>` of a teacher by name."""
# The names stand twice, here and in the table below, because mypy and msgspec read no table:
# tests/settings/test_stages.py holds them together.


@dataclass(frozen=True)
class WorkerSpec:
    """One kind of worker.

    `class_path` is `module:name` of its stage's class, or of a function that makes the stage. It is
    imported only in the worker's own process.
    `chat_class_path` takes its place in hard distillation, where completions come from an endpoint.
    `gpu_share` is the name of its share in `deployment.gpu_memory_shares`: only a kind that
    computes models has one, and it needs torch.
    `count` is the default of its count in `[deployment.workers]`, and `count_doc` what the docs say
    of it; a kind without `count_doc` has no count, and there is always one worker.
    """

    kind: WorkerKind
    class_path: str
    chat_class_path: str = ""
    gpu_share: str = ""
    count: int | None = 1
    count_doc: str = ""


@dataclass(frozen=True)
class StageSpec:
    """One stage: a stream, the workers that consume it, and the records that they take.

    `is_work` tells a stream that holds only work to do, so that its length is the exact backlog,
    which holds up new tickets. The trainer's also holds what waits for a checkpoint.
    `switch` is the setting that takes the stage off the route; nothing where it is always on it.
    """

    name: StageName
    takes: tuple[RecordName, ...]
    workers: tuple[WorkerSpec, ...]
    is_work: bool = True
    switch: str = ""


STAGES: tuple[StageSpec, ...] = (
    StageSpec(
        "generate",
        takes=("Ticket", "Episode"),
        workers=(
            WorkerSpec(
                "generator",
                "onstream.workers.generator.stage:Generator",
                chat_class_path="onstream.workers.generator.chat_stage:ChatGenerator",
                gpu_share="inference",
                count_doc="Workers that generate rollouts.",
            ),
        ),
    ),
    StageSpec(
        "act",
        takes=("Ticket", "Episode"),
        workers=(
            WorkerSpec(
                "environment",
                "onstream.workers.environment.stage:EnvironmentWorker",
                count_doc="Workers that play the environment of `task.environment`, where that is "
                "set.",
            ),
        ),
        switch="task.environment",
    ),
    StageSpec(
        "verify",
        takes=("Rollout",),
        workers=(
            WorkerSpec(
                "verifier",
                "onstream.workers.verifier.stage:Verifier",
                count_doc="Workers that score whole answers. 0 turns verification off, unless "
                "`orchestrator.verification.enabled` says so explicitly.",
            ),
        ),
        switch="orchestrator.verification.enabled",
    ),
    StageSpec(
        "score",
        takes=("Rollout",),
        workers=(
            WorkerSpec(
                "teacher",
                "onstream.workers.teacher.stage:Teacher",
                gpu_share="teacher",
                count=None,
                count_doc="Workers that hold the teacher's model. Unset: "
                "`deployment.num_teacher_gpus`, or 1. 0: there is no teacher beside the run, "
                "whatever `teacher_inference.model.name` says. One vLLM server takes the place of "
                "all of them.",
            ),
            WorkerSpec(
                "teacher-external",
                "onstream.workers.teacher.external:ExternalTeacher",
                count_doc="Workers that ask the endpoints of `orchestrator.teacher_model`, where "
                "that is set.",
            ),
        ),
        switch="the teacher's section",
    ),
    StageSpec(
        "train",
        takes=("Rollout", "Tombstone"),
        workers=(
            WorkerSpec(
                "trainer", "onstream.workers.trainer.startup:trainer_stage", gpu_share="train"
            ),
        ),
        is_work=False,
    ),
)

JOBS = WorkerSpec(
    "jobs",
    "onstream.workers.jobs.worker:run_jobs",
    count_doc="Workers for jobs, where `eval.interval` is set or `verification.in_jobs` asks for "
    "them.",
)
"""The workers that serve no stage: they evaluate, export and tidy up beside the training."""

WORKERS: dict[WorkerKind, WorkerSpec] = {
    worker.kind: worker for stage in STAGES for worker in stage.workers
}
"""The workers that serve a stage, by kind, in the order of the flow."""

KINDS: tuple[WorkerKind, ...] = (*WORKERS, JOBS.kind)
"""Every kind of worker."""

COUNTED: tuple[WorkerSpec, ...] = tuple(
    worker for worker in (*WORKERS.values(), JOBS) if worker.count_doc
)
"""The workers that `[deployment.workers]` counts."""

STAGE_NAMES: tuple[StageName, ...] = tuple(stage.name for stage in STAGES)
"""Every stage, in the order of the flow."""

FIRST: StageName = STAGE_NAMES[0]
"""The stage that writes: every rollout passes it."""

WORK_STAGES: tuple[StageName, ...] = tuple(stage.name for stage in STAGES if stage.is_work)
"""The stages whose streams hold only work to do."""

STAGE_OF: dict[WorkerKind, StageName] = {
    worker.kind: stage.name for stage in STAGES for worker in stage.workers
}
"""The stage that each kind of worker serves; `jobs` workers serve none."""

KINDS_OF: dict[StageName, tuple[WorkerKind, ...]] = {
    stage.name: tuple(worker.kind for worker in stage.workers) for stage in STAGES
}
"""The kinds of worker that serve each stage."""

COMPUTING: dict[WorkerKind, str] = {
    worker.kind: worker.gpu_share
    for stage in (STAGES[-1], *STAGES[:-1])
    for worker in stage.workers
    if worker.gpu_share
}
"""The kinds that compute models, and so import torch, by the names of their shares in
`deployment.gpu_memory_shares`. The trainer first: it gets the first GPU."""

START_ORDER: tuple[WorkerKind, ...] = tuple(
    sorted(KINDS, key=lambda kind: (kind not in COMPUTING, -KINDS.index(kind)))
)
"""The order in which a launcher starts them: those that load models take longest to be ready."""

SWITCHES: dict[StageName, str] = {stage.name: stage.switch for stage in STAGES if stage.switch}
"""The setting that takes a stage off the route, for those that are not always on it."""

EPISODE_STAGES: tuple[StageName, StageName] = (FIRST, "act")
"""The two stages between which episodes go back and forth."""

STATE_BYTES = 1 << 16
"""The bytes of the longest state that an environment may keep in an episode."""


TEACHER_NAME = "[a-z][a-z0-9-]{0,31}"
"""What the name of a teacher looks like."""
DEFAULT_TEACHER = "default"
"""The one of `[teacher_inference]` and `[orchestrator.teacher_model]`; its stream is `score`."""


def stage_of(stream: str) -> StageName:
    """The stage that the workers of `stream` serve.

    >>> stage_of("score:math"), stage_of("train")
    ('score', 'train')
    """
    return cast(StageName, stream.partition(":")[0])


def score_stream(teacher: str) -> str:
    """The name of the stream that the workers of `teacher` consume.

    >>> score_stream("math"), score_stream("default")
    ('score:math', 'score')
    """
    return "score" if teacher == DEFAULT_TEACHER else f"score:{teacher}"


def teacher_of(stream: str) -> str | None:
    """The teacher whose workers consume `stream`; None for a stream of another stage.

    >>> teacher_of("score:math"), teacher_of("score"), teacher_of("train")
    ('math', 'default', None)
    """
    stage, _, teacher = stream.partition(":")
    return (teacher or DEFAULT_TEACHER) if stage == "score" else None


def streams_of(route: Iterable[str], teachers: Sequence[str]) -> tuple[str, ...]:
    """The streams of the stages `route`; where there are `teachers` by name, one for each.

    >>> streams_of(["verify", "score", "train"], ["math", "code"])
    ('verify', 'score:math', 'score:code', 'train')
    """
    scoring = tuple(map(score_stream, teachers)) or ("score",)
    each = (scoring if stage == "score" else (stage,) for stage in route)
    return tuple(stream for streams in each for stream in streams)


@lru_cache(maxsize=1024)
def is_stream(name: str) -> bool:
    """Whether a stream can have `name`.

    >>> is_stream("train"), is_stream("score:math"), is_stream("score:"), is_stream("math")
    (True, True, False, False)
    """
    stage, _, teacher = name.partition(":")
    named = stage == "score" and re.fullmatch(TEACHER_NAME, teacher) is not None
    return name in STAGE_NAMES or named


@lru_cache(maxsize=1024)
def is_route(route: tuple[str, ...]) -> bool:
    """Whether `route` ends at the trainer, and names each stage once, in the order of the flow.

    For `score` it may name the stream of one teacher.

    >>> is_route(("verify", "score:math", "train")), is_route(("train", "verify"))
    (True, False)
    """
    places = [STAGE_NAMES.index(stage_of(name)) for name in route if is_stream(name)]
    rising = all(before < after for before, after in itertools.pairwise(places))
    return len(places) == len(route) and rising and route[-1:] == (STAGE_NAMES[-1],)


def takes_tickets(route: Sequence[str]) -> StageName:
    """The stage that the tickets of a run go to, by the `route` of its rollouts after `FIRST`.

    An environment has the first word in an episode.
    """
    return "act" if "act" in route else FIRST
