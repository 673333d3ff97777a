"""`onstream student-server`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onstream.workers.commands.options import with_settings

if TYPE_CHECKING:
    from onstream.settings.root import Settings


@click.command()
@with_settings
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Where to listen. Its routes that replace weights ask for no key.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=8000,
    show_default=True,
    help="Where to listen.",
)
def student_server(settings: Settings, host: str, port: int) -> None:
    """Run a vLLM server of the student.

    A generator with inference.engine = "server" uses the servers of inference.client.base_url. If
    that is unset, `onstream up` starts them; this command is for servers on other machines.
    """
    from onstream.workers.launcher.die_with_parent import guard_group

    guard_group()
    from onstream.workers.generator.engines.server.server_command import serve

    serve(settings, host, port)
