"""`onstream worker`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onstream.pipeline.errors import Exit
from onstream.settings.stages import WorkerKind
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
def worker(kind: WorkerKind, settings: Settings, slot: str | None, optional: bool) -> Exit:
    """Run one worker against a running Redis.

    KIND is generator, verifier, teacher, teacher-external, trainer or jobs. A teacher scores with a
    model of its own. A teacher-external asks the endpoints of orchestrator.teacher_model. A run may
    have both. A jobs worker evaluates and exports beside the training.
    """
    from onstream.settings.engines import starts_vllm
    from onstream.workers.runner import run_kind

    if starts_vllm(kind, settings):
        from onstream.workers.launcher.die_with_parent import guard_group

        guard_group()  # vLLM's processes outlive a kill of the one that started them
    return run_kind(kind, settings, slot, optional=optional)
