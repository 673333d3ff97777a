"""What can be known to be wrong before the first worker starts.

Reads files. Imports no torch, but for a loss of the user's own, and no transformers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from onstream.pipeline.errors import Exit, UserError
from onstream.settings.gpus import gpu_problems
from onstream.settings.plan import Plan, refuse_differences
from onstream.settings.problems import SettingsError
from onstream.settings.root import Settings
from onstream.settings.rules.engines import engine_problems
from onstream.settings.stages import SWITCHES
from onstream.workers.launcher.model_files import check_model, parameters

FLOAT32_BYTES = 4
TRAINED_BYTES = 3 * FLOAT32_BYTES
"""Of one parameter in a checkpoint: its master weight and AdamW's two moments."""


def check_gpus(settings: Settings, plan: Plan, gpus: Sequence[str]) -> None:
    """Check that the workers that start here find room on `gpus`, and vLLM where they need it.

    Raises:
        SettingsError: they do not.
    """
    if problems := engine_problems(settings, plan) + gpu_problems(settings, plan, gpus):
        raise SettingsError(problems)


def check_files(settings: Settings, teacher: str | None) -> None:
    """Check the models, the task and the disk that the run will need.

    Raises:
        UserError: something is missing or unfit.
    """
    student = check_model(settings.model.name, "model.name")
    if teacher is not None and teacher != settings.model.name:
        check_model(teacher, "teacher_inference.model.name")
    check_task(settings)
    check_loss(settings)
    check_disk(settings, student)


def check_task(settings: Settings) -> None:
    """Load the task and its scorer once, so that a wrong name, file or line is told here.

    Raises:
        UserError: the task cannot be used; the message names the file and line where there is one.
    """
    from onstream.pipeline.tasks import load_scorer, load_task
    from onstream.pipeline.tasks.swapped_images import swapped_problems

    task = load_task(settings)
    task.train(0)
    if settings.eval.samples and settings.eval.swap_images:
        swapped_problems(task)
    if settings.orchestrator.verification.enabled is not False:
        load_scorer(settings)


def check_loss(settings: Settings) -> None:
    """Import a loss of the user's own and try it out, so that what is wrong with it is told here.

    Raises:
        UserError: it cannot be imported, or does not work on a made-up batch.
    """
    if settings.trainer.loss.user_function is None:
        return
    from onstream.workers.trainer.losses import loss_function  # brings torch

    loss_function(settings.trainer.loss)


def check_disk(settings: Settings, student: Path) -> None:
    """Check that checkpoints and policies will fit on the disk, if the student's size is known.

    Raises:
        UserError: the disk of the run directory has less room.
    """
    # One more of each, while it is written.
    checkpoints = settings.checkpoint.keep + 1
    policies = settings.checkpoint.keep_policies + 1
    need_bytes = parameters(student) * (checkpoints * TRAINED_BYTES + policies * FLOAT32_BYTES)
    directory = settings.run.dir
    while not directory.exists():
        directory = directory.parent
    free_bytes = shutil.disk_usage(directory).free
    if free_bytes < need_bytes:
        raise UserError(
            f"{free_bytes / 2**20:,.0f} MiB free on the disk of {settings.run.dir}",
            expected=f"{need_bytes / 2**20:,.0f} MiB for {checkpoints} checkpoints and {policies} "
            "policy versions",
            next_step="Free space, set run.dir to another disk, or lower checkpoint.keep and "
            "checkpoint.keep_policies.",
        )


def check_resume(
    settings: Settings, ours: Plan, theirs: Plan | None, in_flight: Callable[[], int]
) -> None:
    """Check `run.resume` against the plan of the run that exists, or None where none does.

    `in_flight` counts the rollouts on their way; they keep the route that they were issued with.

    Raises:
        UserError: the run exists and shall not, or the reverse, or it exists with other settings.
    """
    run_dir = settings.run_dir
    if theirs is None and settings.run.resume == "must":
        raise UserError(
            f'run.resume = "must", but there is no run {run_dir}',
            expected="a run to resume",
            next_step='Check run.name and run.dir, or set run.resume = "auto".',
            exit=Exit.REFUSED,
        )
    if theirs is not None and settings.run.resume == "never":
        raise UserError(
            f'run.resume = "never", but the run {run_dir} exists',
            expected="a new run",
            next_step=f"Choose another run.name, or remove {run_dir}.",
            exit=Exit.REFUSED,
        )
    if theirs is not None:
        _refuse_other_route(ours, theirs, in_flight)
        refuse_differences(ours, theirs)


def _refuse_other_route(ours: Plan, theirs: Plan, in_flight: Callable[[], int]) -> None:
    if ours.route == theirs.route:
        return
    our_route = " → ".join(ours.streams)
    their_route = " → ".join(theirs.streams)
    raise UserError(
        f"the settings route rollouts by {our_route}, but run {theirs.run!r} by {their_route}, "
        f"with {in_flight()} rollouts in flight on that route",
        expected="the route that the run was started with",
        next_step=f"{_route_hint(ours, theirs)}, or choose another run.name for a new run.",
        exit=Exit.REFUSED,
    )


def _route_hint(ours: Plan, theirs: Plan) -> str:
    """What to set, where leaving a stage out of `deployment.stages` has turned it off."""
    changed = set(ours.route) ^ set(theirs.route)
    switches = [f"{name} as it was" for stage, name in SWITCHES.items() if stage in changed]
    return f"Set {' and '.join(switches)}"
