"""What can be known to be wrong before the first worker starts.

One list of checks, which `onstream check` prints and `onstream up` stops at. They read files.
They import no torch, but for a loss of the user's own, and no transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onstream.pipeline.errors import UserError, looked_in
from onstream.pipeline.import_path import search_modules_in
from onstream.settings.devices import gpus_found
from onstream.settings.extras import installed, missing_by_import, missing_package
from onstream.settings.gpus import gpu_problems
from onstream.settings.load import Resolved
from onstream.settings.plan import Plan, make_plan
from onstream.settings.problems import SettingsError, SettingsProblem
from onstream.settings.redis import TLS
from onstream.settings.root import Settings
from onstream.settings.route import rollout_teacher
from onstream.settings.rules.deployment import redis_warnings
from onstream.settings.rules.engines import engine_problems
from onstream.settings.stages import COMPUTING
from onstream.workers.launcher.disk_room import check_disk
from onstream.workers.launcher.model_files import (
    check_chat_template,
    check_model,
    context_tokens,
)
from onstream.workers.launcher.model_warnings import model_warnings
from onstream.workers.launcher.redis_binary import find_server
from onstream.workers.launcher.trainer_memory import check_memory
from onstream.workers.launcher.unacked_records import check_unacked

if TYPE_CHECKING:
    from onstream.pipeline.tasks import Problem

PROBLEMS_TRIED = 3


@dataclass(frozen=True)
class Subject:
    """What is checked. `ask_hub` lets a check ask the Hugging Face hub."""

    settings: Settings
    plan: Plan
    ask_hub: bool


@dataclass(frozen=True)
class Check:
    """One thing to look at. `sections` begin the names of the settings that it reads."""

    sections: tuple[str, ...]
    look: Callable[[Subject], None]


def find_problems(resolved: Resolved, *, online: bool) -> list[SettingsProblem]:
    """What is wrong with the settings on this machine; with `online`, with what they name too.

    A check is left out where the settings that it reads are wrong themselves.
    """
    if resolved.settings is None:
        return []
    subject = Subject(resolved.settings, make_plan(resolved.settings), ask_hub=online)
    wrong = [name for problem in resolved.problems for name in problem.names]
    found = _found(CHECKS, subject, wrong)
    if online:
        from onstream.workers.launcher.online_checks import endpoint_problems, redis_problems

        found += redis_problems(subject.settings)
        found += endpoint_problems(subject.settings, subject.plan)
    return found


def refuse_problems(settings: Settings, plan: Plan) -> None:
    """Check all that can be checked before the run's Redis is asked.

    Raises:
        SettingsError: carries every problem found.
    """
    if problems := _found(CHECKS, Subject(settings, plan, ask_hub=True)):
        raise SettingsError(problems)
    for warning in (*redis_warnings(settings), *model_warnings(settings)):
        print(f"onstream: {warning}", file=sys.stderr)


def _found(
    checks: Sequence[Check], subject: Subject, wrong: Sequence[str] = ()
) -> list[SettingsProblem]:
    """What `checks` find, each problem once; none of those that read the settings `wrong`."""
    usable = [
        check for check in checks if not any(name.startswith(check.sections) for name in wrong)
    ]
    return list(dict.fromkeys(problem for check in usable for problem in _look(check, subject)))


def _look(check: Check, subject: Subject) -> Iterator[SettingsProblem]:
    try:
        check.look(subject)
    except SettingsError as error:
        yield from error.problems
    except UserError as error:
        yield SettingsProblem((), error.got, error.expected, error.next_step)
    except ImportError as error:
        missing = missing_by_import(error, "onstream")
        if missing is None:
            raise
        # Whoever needs the package is named by `check_packages`.


def check_gpus(subject: Subject) -> None:
    """Check that the workers that start here find GPUs, and vLLM where they need it.

    Raises:
        SettingsError: they do not.
    """
    settings = subject.settings
    plan = subject.plan
    problems = engine_problems(settings, plan) + gpu_problems(settings, plan, gpus_found())
    if problems:
        raise SettingsError(problems)


def check_torch(subject: Subject) -> None:
    """Check that torch is installed where workers start that compute models.

    Raises:
        UserError: it is not.
    """
    kinds = [kind for kind in COMPUTING if subject.plan.workers.get(kind)]
    if kinds and not installed("torch"):
        raise missing_package("torch", f"workers ({', '.join(kinds)})")


def check_packages(subject: Subject) -> None:
    """Check that the packages of the trainer's work are installed, where one starts.

    Raises:
        UserError: one is not.
    """
    if not subject.plan.workers.get("trainer"):
        return
    if subject.settings.trainer.lora is not None and not installed("peft"):
        raise missing_package("peft", "trainer.lora")
    if subject.settings.trainer.optim.states == "8bit" and not installed("bitsandbytes"):
        raise missing_package("bitsandbytes", 'trainer.optim.states = "8bit"')
    if installed("torch") and not installed("matplotlib"):
        raise missing_package("matplotlib", "the curves of a run")


def check_redis(subject: Subject) -> None:
    """Check that there is an address of a Redis, with its files, or a Redis to start.

    Raises:
        UserError: neither, or a file is missing.
    """
    redis = subject.settings.redis
    if redis.url is None and not subject.plan.workers.get("trainer"):
        raise UserError(
            "no trainer is started here, and there is no redis.url",
            expected="the address of the Redis of the run that these workers join",
            next_step="Set redis.url (ONSTREAM_REDIS__URL), or let `train` into deployment.stages.",
        )
    if redis.url is None:
        find_server(redis.server_bin)
    for name in TLS:
        path: Path | None = getattr(redis, name)
        if path is not None and not path.is_file():
            raise UserError(
                f"redis.{name} = {path}{looked_in(path)}, which is no file",
                expected="a PEM file",
                next_step="Correct the path.",
            )


def check_student(subject: Subject) -> None:
    """Check the student's files, and the disk that its checkpoints need.

    Raises:
        UserError: something is missing or unfit.
    """
    settings = subject.settings
    template = settings.model.chat_template
    student = check_model(
        settings.model.name, "model.name", ask_hub=subject.ask_hub, own_template=template is None
    )
    if template is not None:
        check_chat_template(template, ask_hub=subject.ask_hub)
    if student is not None:
        check_completion(settings, student)
        check_disk(settings, student, subject.plan.device)


def check_completion(settings: Settings, student: Path) -> None:
    """Check that a completion may fit the student's context, where the student writes it.

    Raises:
        UserError: it can never.
    """
    if rollout_teacher(settings) is not None:
        return
    longest = settings.inference.sampling.max_completion
    context = context_tokens(student, "model.name")
    if context is not None and longest >= context:
        raise UserError(
            f"inference.sampling.max_completion = {longest}, and the context of {student} has "
            f"{context} tokens",
            expected="completions that leave room for a prompt",
            next_step=f"Set inference.sampling.max_completion below {context}.",
        )


def check_trainer_memory(subject: Subject) -> None:
    """Check that the trainer fits its GPU, where the sizes of both are known.

    Raises:
        UserError: it does not.
    """
    if subject.plan.workers.get("trainer"):
        check_memory(subject.settings, subject.plan.device)


def check_unacked_records(subject: Subject) -> None:
    """Check that a batch with images may wait for its checkpoint.

    Raises:
        UserError: there is no room for it.
    """
    if subject.plan.workers.get("trainer"):
        check_unacked(subject.settings)


def check_teacher(subject: Subject) -> None:
    """Check the files of the teachers beside the run.

    Raises:
        UserError: something is missing or unfit.
    """
    models = {"teacher_inference.model.name": subject.plan.teacher}
    for name, teacher in subject.plan.named_teachers.items():
        if teacher.workers and teacher.kind == "teacher":
            models[f"teachers.{name}.local.model.name"] = teacher.model
    for setting, model in models.items():
        if model is not None and model != subject.plan.student:
            check_model(model, setting, ask_hub=subject.ask_hub)


def check_task(subject: Subject) -> None:
    """Load the task once, so that a wrong name, file or line is told here.

    Raises:
        UserError: the task cannot be used; the message names the file and line where there is one.
    """
    from onstream.pipeline.tasks import is_on_hub, load_task
    from onstream.pipeline.tasks.swapped_images import swapped_problems

    settings = subject.settings
    if is_on_hub(settings) and not subject.ask_hub:
        if not installed("datasets"):
            raise missing_package("datasets", f"task.name = {settings.task.name}")
        return
    task = load_task(settings)
    task.train(0)
    if settings.eval.samples and settings.eval.swap_images:
        swapped_problems(task)


def check_teacher_prompt(subject: Subject) -> None:
    """Check what the teacher reads of the first problems, where that is a prompt of its own.

    Raises:
        UserError: the chat template refuses it, or it does not fit the teacher's context.
    """
    from onstream.workers.launcher.teacher_prompt import check_prompts

    settings = subject.settings
    teacher = subject.plan.teacher
    differs = settings.task.teacher_prompt.differs
    if differs and teacher is not None and (problems := _first_problems(subject)):
        check_prompts(settings, teacher, problems)


def check_scorer(subject: Subject) -> None:
    """Import the scorer, and try it on the first problems where rollouts will be verified.

    Raises:
        UserError: it cannot be imported, or not be used here, or it fails on every answer.
    """
    from onstream.pipeline.tasks import JUDGE, load_scorer
    from onstream.workers.verifier.scorer_trial import try_scorer

    settings = subject.settings
    # A judge is asked by the verifier when it starts, and by `--online`.
    if settings.orchestrator.verification.enabled is False or settings.task.scorer == JUDGE:
        return
    load_scorer(settings)
    if "verify" in subject.plan.streams and (problems := _first_problems(subject)):
        try_scorer(settings, problems)


def check_environment(subject: Subject) -> None:
    """Import the environment, where there is one, and start episodes on the first problems.

    Raises:
        UserError: it cannot be imported, or starts none of them.
    """
    from onstream.workers.environment.trial import try_environment

    settings = subject.settings
    if settings.task.environment is not None and (problems := _first_problems(subject)):
        try_environment(settings, problems)


def _first_problems(subject: Subject) -> list[Problem]:
    """The first problems to train on; none where they are on the hub, which may not be asked."""
    from onstream.pipeline.tasks import is_on_hub, load_task

    if is_on_hub(subject.settings) and not subject.ask_hub:
        return []
    task = load_task(subject.settings)
    return [task.train(index) for index in range(PROBLEMS_TRIED)]


def check_user_loss(subject: Subject) -> None:
    """Check the loss of the user's own.

    Raises:
        UserError: as `check_loss`.
    """
    search_modules_in(subject.settings.run.modules)
    check_loss(subject.settings)


def check_loss(settings: Settings) -> None:
    """Import a loss of the user's own and try it out, so that what is wrong with it is told here.

    Raises:
        UserError: it cannot be imported, or does not work on a made-up batch.
    """
    if settings.trainer.loss.user_function is None:
        return
    from onstream.workers.trainer.losses import loss_function  # brings torch

    loss_function(settings.trainer.loss)


CHECKS = (
    Check(("deployment", "inference", "teacher_inference"), check_gpus),
    Check(("deployment",), check_torch),
    Check(("deployment", "trainer.lora"), check_packages),
    Check(("deployment", "redis", "run"), check_redis),
    Check(
        ("model", "checkpoint", "run", "inference.sampling", "trainer", "deployment"), check_student
    ),
    Check(("deployment", "model", "trainer", "inference.sampling"), check_trainer_memory),
    Check(("checkpoint", "model", "trainer.loss", "orchestrator"), check_unacked_records),
    Check(("deployment", "model", "teacher_inference", "teachers", "trainer.loss"), check_teacher),
    Check(("task", "eval", "run", "teachers"), check_task),
    Check(("task", "eval", "run", "model", "teacher_inference"), check_teacher_prompt),
    Check(("task", "eval", "run", "orchestrator.verification"), check_scorer),
    Check(("task", "run", "orchestrator.verification"), check_environment),
    Check(("trainer.loss",), check_user_loss),
)
"""All of them, in the order of telling."""
