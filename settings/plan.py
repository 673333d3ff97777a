"""The run's plan: which stages rollouts pass, which workers and models that takes, and the settings all workers must share.

The trainer writes it once to Redis and to the run directory; every other worker compares its own with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from pipeline.errors import Exit, UserError
from settings.deployment import StageName
from settings.fields import known
from settings.root import Settings
from settings.text import shown

STAGES: tuple[StageName, ...] = ("generate", "verify", "score", "train")


class Plan(msgspec.Struct, frozen=True):
    """What follows from the settings.

    `route` is what a rollout passes after it was generated, and ends in `train`. `workers` counts the processes that
    `onstream up` starts here. `teacher` is None where no local model scores.
    `run_settings` are the settings of scope `run` by dotted name, of which those in `changeable` may change on resume.
    """

    run: str
    route: tuple[StageName, ...]
    workers: dict[StageName, int]
    student: str
    teacher: str | None
    device: Literal["cpu", "cuda"]
    run_settings: dict[str, Any]
    changeable: tuple[str, ...]

    @property
    def streams(self) -> tuple[StageName, ...]:
        """The stages that have a stream, in the order of the flow."""
        return ("generate", *self.route)

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
        except msgspec.DecodeError as error:
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
        return f"{self.name} (here {shown(self.ours)}, the run has {shown(self.theirs)})"


def make_plan(settings: Settings) -> Plan:
    """The plan that follows from `settings`."""
    route = route_of(settings)
    shared = {name: setting for name, setting in known().items() if setting.scope.kind == "run"}
    return Plan(
        run=settings.run.name,
        route=route,
        workers=_workers(settings, route),
        student=settings.model.name,
        teacher=teacher_model(settings) if "score" in route else None,
        device=device_of(settings),
        run_settings={name: setting.value(settings) for name, setting in shared.items()},
        changeable=tuple(name for name, setting in shared.items() if setting.scope.changeable),
    )


def differences(ours: Plan, theirs: Plan) -> list[Difference]:
    """The `run` settings whose values differ, changeable ones included, in the order of the sections."""
    names = [*ours.run_settings, *(name for name in theirs.run_settings if name not in ours.run_settings)]
    found = []
    for name in names:
        here, there = ours.run_settings.get(name), theirs.run_settings.get(name)
        if here != there:
            found.append(Difference(name, here, there, changeable=name in ours.changeable))
    return found


def refuse_differences(ours: Plan, theirs: Plan) -> None:
    """Do nothing where `ours` may take part in the run that has the plan `theirs`.

    Raises:
        UserError: with every `run` setting that differs and may not, and both its values.
    """
    fatal = [difference for difference in differences(ours, theirs) if not difference.changeable]
    if fatal:
        raise UserError(
            f"the settings differ from those that run {theirs.run!r} was started with: {'; '.join(map(str, fatal))}",
            expected="the run's own values",
            next_step="Give this process the run's settings, or start another run under another run.name.",
            exit=Exit.REFUSED,
        )


def route_of(settings: Settings) -> tuple[StageName, ...]:
    """The stages of a rollout after it was generated."""
    route: list[StageName] = []
    if verification_on(settings):
        route.append("verify")
    if teacher_on(settings):
        route.append("score")
    return (*route, "train")


def verification_on(settings: Settings) -> bool:
    """Whether rollouts are verified: what `orchestrator.verification.enabled` says, else whether a verifier is deployed."""
    enabled, stages = settings.orchestrator.verification.enabled, settings.deployment.stages
    if enabled is not None:
        return enabled
    return stages is None or "verify" in stages


def teacher_on(settings: Settings) -> bool:
    """Whether a teacher scores: with `teacher_tau` > 0 always, else where one is deployed or configured (metric only)."""
    if settings.trainer.loss.teacher_tau > 0:
        return True
    stages = settings.deployment.stages
    return teacher_configured(settings) if stages is None else "score" in stages


def teacher_configured(settings: Settings) -> bool:
    """Whether the settings say where the teacher's scores come from."""
    return settings.deployment.num_teacher_gpus is not None or settings.teacher_inference.model.name is not None


def teacher_model(settings: Settings) -> str:
    """The local teacher's model: its own, or the student's starting model."""
    return settings.teacher_inference.model.name or settings.model.name


def device_of(settings: Settings) -> Literal["cpu", "cuda"]:
    """Where models run. Finds GPUs by their device files, since asking torch would mean importing it."""
    if settings.deployment.device != "auto":
        return settings.deployment.device
    return "cuda" if any(Path("/dev").glob("nvidia[0-9]*")) else "cpu"


def _workers(settings: Settings, route: tuple[StageName, ...]) -> dict[StageName, int]:
    """Worker processes per stage that this deployment starts."""
    deployment = settings.deployment
    wanted: dict[StageName, int] = {
        "generate": deployment.generators,
        "verify": deployment.verifiers,
        "score": deployment.num_teacher_gpus or 1,
        "train": 1,
    }
    here = deployment.stages or STAGES
    return {stage: wanted[stage] if stage in here else 0 for stage in STAGES if stage == "generate" or stage in route}
