"""`onstream worker`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onstream.pipeline.errors import Exit
from onstream.settings.stages import DEFAULT_TEACHER, KINDS_OF, WorkerKind
from onstream.workers.commands.options import with_settings, worker_kind_argument

if TYPE_CHECKING:
    from onstream.settings.root import Settings


@click.command()
@worker_kind_argument
@with_settings
@click.option(
    "--slot",
    metavar="NAME",
    help="A name for this worker on this machine. "
    "A restart under the same name goes on with the records that it held.",
)
@click.option(
    "--optional",
    is_flag=True,
    help="Exit with 0 and say so if the run has no place for this worker.",
)
@click.option(
    "--name",
    "teacher",
    metavar="TEACHER",
    default=DEFAULT_TEACHER,
    help="The teacher of [teachers] that a teacher or teacher-external scores for.",
)
def worker(
    kind: WorkerKind, settings: Settings, slot: str | None, optional: bool, teacher: str
) -> Exit:
    """Run one worker against a running Redis.

    KIND is generator, verifier, teacher, teacher-external, trainer or jobs. A teacher scores with a
    model of its own. A teacher-external asks the endpoints of orchestrator.teacher_model. A run may
    have both, and with --name several teachers. A jobs worker evaluates and exports beside the
    training.
    """
    from onstream.settings.engines import starts_vllm
    from onstream.settings.named_teachers import with_teacher
    from onstream.workers.runner import run_kind

    if teacher != DEFAULT_TEACHER and kind not in KINDS_OF["score"]:
        raise click.UsageError(f"--name is for {' and '.join(KINDS_OF['score'])}, not for {kind}")
    if starts_vllm(kind, with_teacher(settings, teacher)):
        from onstream.workers.launcher.die_with_parent import guard_group

        guard_group()  # vLLM's processes outlive a kill of the one that started them
    return run_kind(kind, settings, slot, optional=optional, teacher=teacher)
