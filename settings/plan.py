"""The run's plan: the stages, workers and models that it takes, and the settings all must share.

The trainer writes it once to Redis and to the run directory; every other worker compares its own
with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from onstream.pipeline.errors import Exit, UserError
from onstream.settings.chat_templates import TEACHER_ARGUMENTS, own_teacher_arguments
from onstream.settings.decoding import UNDECODABLE
from onstream.settings.devices import device_of
from onstream.settings.engines import teacher_engine
from onstream.settings.fields import Setting, known_in, setting_named
from onstream.settings.paths import given_paths, with_absolute_paths
from onstream.settings.retired import RETIRED, is_default, says_nothing
from onstream.settings.root import Settings
from onstream.settings.route import (
    external_teacher,
    local_teacher,
    rollout_teacher,
    route_of,
    teachers_of,
)
from onstream.settings.stages import (
    FIRST,
    JOBS,
    KINDS_OF,
    STAGE_OF,
    StageName,
    StreamName,
    WorkerKind,
    stage_of,
    streams_of,
    teacher_of,
)
from onstream.settings.toml import shown

TEACHER_NAMES = ("teacher_inference.model.name", "orchestrator.teacher_model.model.name")


class NamedTeacher(msgspec.Struct, frozen=True):
    """A teacher of `[teachers]`: the kind of its workers, how many of them `onstream up` starts
    here, and its model.
    """

    kind: WorkerKind
    workers: int
    model: str


class Plan(msgspec.Struct, frozen=True):
    """What follows from the settings.

    `route` is what a rollout passes after it was generated, and ends in `train`. `workers` counts
    the processes that `onstream up` starts here, 0 for a kind that others bring. `teacher` is the
    model that scores beside the run, `external_teacher` the name of one that endpoints serve,
    `rollout_teacher` that of the one whose completions are trained on. `teacher_server` is how many
    GPUs the vLLM server takes that is started here to serve `teacher`, 1 on a CPU; 0 where none is.
    `student_servers` is how many vLLM servers are started here for the generator to ask.
    `teachers` are the names of those that score, where there are any by name, and `named_teachers`
    has those of `[teachers]`.
    `run_settings` are the settings of scope `run` by dotted name, of which those in `changeable`
    may change on resume. Paths are absolute; `given` has those that were not, as they were given:
    a worker on another machine may have the same files elsewhere.
    """

    run: str
    route: tuple[StageName, ...]
    workers: dict[WorkerKind, int]
    student: str
    teacher: str | None
    external_teacher: str | None
    rollout_teacher: str | None
    device: Literal["cpu", "cuda"]
    run_settings: dict[str, Any]
    changeable: tuple[str, ...]
    teacher_server: int = 0
    student_servers: int = 0
    given: dict[str, str] = {}
    teachers: tuple[str, ...] = ()
    named_teachers: dict[str, NamedTeacher] = {}

    def kinds(self, stage: StageName) -> list[WorkerKind]:
        """The kinds of worker that serve `stage` by this plan, but for teachers by name."""
        return [kind for kind in self.workers if STAGE_OF.get(kind) == stage]

    def consumers(self, stream: StreamName) -> Sequence[str]:
        """The kinds of worker that consume `stream` by this plan, as the command line names them.

        A teacher `math` has `teacher --name math` for its stream `score:math`.
        """
        name = teacher_of(stream)
        if name in self.named_teachers:
            return [kind_of_named(self.named_teachers[name].kind, name)]
        return self.kinds(stage_of(stream))

    @property
    def streams(self) -> tuple[StreamName, ...]:
        """The streams of the run's rollouts, in the order of the flow."""
        return streams_of((FIRST, *self.route), self.teachers)

    @property
    def worker_counts(self) -> dict[str, int]:
        """How many workers are started here, by what `onstream worker` is told to start one."""
        counts: list[tuple[str, int]] = [*self.workers.items()]
        for name, teacher in self.named_teachers.items():
            counts.append((kind_of_named(teacher.kind, name), teacher.workers))
        return dict(counts)

    @property
    def path_text(self) -> str:
        """The way of the run's rollouts, for people: `score:math or score:code` where teachers have
        names.
        """
        steps = [" or ".join(streams_of([stage], self.teachers)) for stage in (FIRST, *self.route)]
        return " → ".join(steps)

    def encode(self) -> bytes:
        """JSON, as Redis and `plan.json` hold it."""
        return msgspec.json.encode(self)

    @staticmethod
    def decode(data: bytes) -> Plan:
        """The plan in `data`.

        Raises:
            UserError: it is none, or one of another version of Onstream.
        """
        try:
            return msgspec.json.decode(data, type=Plan)
        except UNDECODABLE as error:
            raise UserError(
                f"the run's plan does not decode: {error}",
                expected="a plan of this version of Onstream",
                next_step="Use the version that started the run, or another run.name.",
                exit=Exit.REFUSED,
            ) from error


@dataclass(frozen=True)
class Difference:
    """A `run` setting that two plans hold different values of."""

    name: str
    ours: Any
    theirs: Any
    changeable: bool

    def __str__(self) -> str:
        ours = "retired" if self.name in RETIRED else f"here {shown(self.ours)}"
        return f"{self.name} ({ours}, the run has {shown(self.theirs)})"


def kind_of_named(kind: WorkerKind, teacher: str) -> str:
    """What `onstream worker` is told to start a worker of `kind` for the `teacher` of that name."""
    return f"{kind} --name {teacher}"


def make_plan(settings: Settings) -> Plan:
    """The plan that follows from `settings`."""
    given = given_paths(settings)
    local_given = local_teacher(settings)
    settings = with_absolute_paths(settings)
    route = route_of(settings)
    every = known_in(settings).values()
    shared = [setting for setting in every if _is_shared(setting, settings)]
    values = {setting.name: setting.value(settings) for setting in shared}
    local = local_teacher(settings)
    external = external_teacher(settings)
    if local or external:
        # One teacher, wherever it runs: a worker may join with endpoints of its own, or with a
        # model of its own.
        values |= dict.fromkeys(TEACHER_NAMES, external or local)
        values |= dict.fromkeys(TEACHER_ARGUMENTS, own_teacher_arguments(settings))
        if not external and local_given is not None and local_given != local:
            given |= dict.fromkeys(TEACHER_NAMES, local_given)
    workers = _workers(settings, route)
    teacher_server = _serves_teacher(settings) and workers["teacher-external"] > 0
    return Plan(
        run=settings.run.name,
        route=route,
        workers=workers,
        student=settings.model.name,
        teacher=local,
        external_teacher=external,
        rollout_teacher=rollout_teacher(settings),
        device=device_of(settings.deployment),
        run_settings=values,
        changeable=tuple(setting.name for setting in shared if setting.scope.changeable),
        teacher_server=_server_gpus(settings) if teacher_server else 0,
        student_servers=_student_servers(settings) if workers["generator"] else 0,
        given=given,
        teachers=teachers_of(settings),
        named_teachers={name: _named_teacher(settings, name) for name in settings.teachers},
    )


def _named_teacher(settings: Settings, name: str) -> NamedTeacher:
    teacher = settings.teachers[name]
    kind: WorkerKind = "teacher" if teacher.external is None else "teacher-external"
    deployment = settings.deployment
    stages = deployment.stages or ("score",)
    started_here = "score" in stages and kind not in deployment.started_elsewhere
    count = teacher.workers if started_here else 0
    if teacher.external is not None:
        return NamedTeacher(kind, count, teacher.external.model.name)
    model = teacher.local.model.name if teacher.local is not None else None
    return NamedTeacher(kind, count, model or settings.model.name)


def under_name(plan: Plan, run: str) -> Plan:
    """`plan` as that of the run `run`, whose directory was copied or renamed."""
    settings = {**plan.run_settings, "run.name": run}
    return msgspec.structs.replace(plan, run=run, run_settings=settings)


def with_given_paths(ours: Plan, theirs: Plan) -> Plan:
    """`ours` with the paths that `theirs` was given too, where both mean the same files."""
    known_there = {
        name: path for name, path in theirs.given.items() if _same_files(name, ours, theirs)
    }
    return msgspec.structs.replace(ours, given={**known_there, **ours.given})


def _is_shared(setting: Setting, settings: Settings) -> bool:
    """Whether all workers must agree on `setting`: of scope `run`, and one that the loss has."""
    return setting.scope.kind == "run" and (setting.applies(settings) or not setting.types)


def differences(ours: Plan, theirs: Plan) -> list[Difference]:
    """The `run` settings whose values differ, changeable ones included, in the plans' order."""
    found = []
    for name in dict.fromkeys([*ours.run_settings, *theirs.run_settings]):
        here = _value(name, ours)
        there = _value(name, theirs)
        gone = says_nothing(name, there) or _of_another_type(name, ours, theirs)
        # A section that is not there, and that the version which made the other plan did not have.
        gone = gone or (here is None and name not in theirs.run_settings)
        # The trainer puts the number in its place, which is then the plan's.
        gone = gone or (name == "trainer.optim.lr" and here == "auto")
        if here != there and not gone and not _same_files(name, ours, theirs):
            found.append(Difference(name, here, there, changeable=name in ours.changeable))
    return found


def _value(name: str, plan: Plan) -> Any:
    """The value of `name` in `plan`; its default in the plan of a version that did not have it."""
    setting = setting_named(name)
    default = setting.default if setting is not None else None
    return plan.run_settings.get(name, default)


def _same_files(name: str, ours: Plan, theirs: Plan) -> bool:
    """Whether both plans name the same path, as it was given or with where it was found.

    A plan of an earlier version has it as it was given alone: the end of where it was found.
    """
    found = ours.run_settings.get(name)
    named = theirs.run_settings.get(name)
    if name in ours.given or name in theirs.given:
        here = {found, ours.given.get(name)}
        there = {named, theirs.given.get(name)}
        return bool((here & there) - {None})
    if theirs.given or not isinstance(found, str) or not isinstance(named, str):
        return False
    return os.path.isabs(found) and found.endswith(f"/{named}")


def _of_another_type(name: str, ours: Plan, theirs: Plan) -> bool:
    """Whether one plan holds a setting at its default that the other's loss does not have.

    Plans of earlier versions hold the settings of `rl` beside `sft` as well.
    """
    setting = setting_named(name)
    if setting is None or not setting.types:
        return False
    values = [plan.run_settings[name] for plan in (ours, theirs) if name in plan.run_settings]
    return len(values) == 1 and is_default(name, values[0])


def refuse_differences(ours: Plan, theirs: Plan) -> None:
    """Do nothing where `ours` may take part in the run that has the plan `theirs`.

    Raises:
        UserError: with every `run` setting that differs and may not, and both its values.
    """
    fatal = [difference for difference in differences(ours, theirs) if not difference.changeable]
    if not fatal:
        return
    next_step = "Give this process the run's settings, or start another run under another run.name."
    if any(difference.name in RETIRED for difference in fatal):
        next_step = "Use the version that started the run, or start another run."
    raise UserError(
        f"the settings differ from those that run {theirs.run!r} was started with: "
        f"{'; '.join(map(str, fatal))}",
        expected="the run's own values",
        next_step=next_step,
        exit=Exit.REFUSED,
    )


def _serves_teacher(settings: Settings) -> bool:
    """Whether a vLLM server is started here for the teacher, instead of workers with its model."""
    return (
        local_teacher(settings) is not None
        and teacher_engine(settings) == "vllm"
        and "teacher" not in settings.deployment.started_elsewhere
    )


def _server_gpus(settings: Settings) -> int:
    """GPUs of the teacher's server; 1 on a CPU, where it is one process group."""
    if device_of(settings.deployment) == "cpu":
        return 1
    return settings.deployment.num_teacher_gpus or 1


def _student_servers(settings: Settings) -> int:
    """vLLM servers that have to be started here for the engine `server`.

    0 where it has addresses, or is not the engine that was asked for.
    """
    inference = settings.inference
    here = inference.engine == "server" and not inference.client.base_url
    if not here or rollout_teacher(settings) is not None:
        return 0
    each = 1
    if device_of(settings.deployment) == "cuda":
        each = inference.tensor_parallel_size * inference.data_parallel_size
    return (settings.deployment.num_infer_gpus or each) // each


def _workers(settings: Settings, route: tuple[StageName, ...]) -> dict[WorkerKind, int]:
    """Worker processes per kind that this deployment starts, 0 for those that others start."""
    deployment = settings.deployment
    here = deployment.stages or (FIRST, *route)
    workers: dict[WorkerKind, int] = {}
    for stage in (FIRST, *route):
        for kind in KINDS_OF[stage]:
            count = _count(settings, kind)
            if count is not None:
                started_here = stage in here and kind not in deployment.started_elsewhere
                workers[kind] = count if started_here else 0
    evaluates = bool(settings.eval.interval and settings.eval.samples)
    verifies = "verifier" in workers and settings.orchestrator.verification.in_jobs != "never"
    if evaluates or verifies:
        # Beside whoever asks for them: the trainer, or the verifiers.
        asked_here = (evaluates and "train" in here) or (verifies and workers["verifier"] > 0)
        started_here = asked_here and JOBS.kind not in deployment.started_elsewhere
        workers[JOBS.kind] = (_count(settings, JOBS.kind) or 0) if started_here else 0
    return workers


def _count(settings: Settings, kind: WorkerKind) -> int | None:
    """How many workers of `kind` the run has; None where it has no use for any."""
    served = _serves_teacher(settings)
    external = external_teacher(settings) is not None
    count = settings.deployment.workers.of(kind)
    if kind == "teacher":
        if local_teacher(settings) is None:
            return None
        if served:
            return 0
    if kind == "teacher-external":
        if not (external or served):
            return None
        # The last of them asks the server that is started here.
        return (count or 0) * external + served
    return settings.deployment.num_teacher_gpus or 1 if count is None else count
