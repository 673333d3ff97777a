"""`onstream teacher-server`, which `onstream up` starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onstream.workers.commands.options import with_settings

if TYPE_CHECKING:
    from onstream.settings.root import Settings


@click.command(hidden=True)
@with_settings
@click.option(
    "--port", type=click.IntRange(1, 65535), required=True, help="Where to listen on this machine."
)
def teacher_server(settings: Settings, port: int) -> None:
    """Run the vLLM server of the teacher in this process; `onstream up` starts it."""
    from onstream.workers.launcher.die_with_parent import guard_group

    guard_group()
    from onstream.workers.teacher.server_command import serve

    serve(settings, port)
