"""The command `onstream`: a module for each of its commands.

A command's module imports nothing heavy. It parses its arguments, loads and checks the settings,
and only then imports what does the work: `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from onstream.pipeline.errors import Exit, UserError
from onstream.workers.commands.audit import audit
from onstream.workers.commands.check import check
from onstream.workers.commands.data import data
from onstream.workers.commands.dead import dead
from onstream.workers.commands.evaluate import evaluate
from onstream.workers.commands.export import export
from onstream.workers.commands.fork import fork
from onstream.workers.commands.health import health
from onstream.workers.commands.init import init
from onstream.workers.commands.jobs import jobs
from onstream.workers.commands.metrics import metrics
from onstream.workers.commands.models import models
from onstream.workers.commands.replay import replay
from onstream.workers.commands.status import status
from onstream.workers.commands.student_server import student_server
from onstream.workers.commands.teacher_server import teacher_server
from onstream.workers.commands.up import up
from onstream.workers.commands.worker import worker

STOPPED = 130
"""The exit code after Ctrl-C, as shells have it."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onstream")
def cli() -> None:
    """On-policy distillation of small language models, as a pipeline over Redis Streams.

    FILES are TOML files; a later one wins. RUN is the directory or the name of a run: it stands
    for the settings that the run was started with, in place of FILES too.
    """


for command in (
    audit,
    check,
    data,
    dead,
    evaluate,
    export,
    fork,
    health,
    init,
    jobs,
    metrics,
    models,
    replay,
    status,
    student_server,
    teacher_server,
    up,
    worker,
):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command of `arguments` (by default the process's own) and exit with its code.

    A problem that the user can mend is told on standard error, without a traceback.
    """
    try:
        code = cli.main(arguments, prog_name="onstream", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        click.echo("stopped", err=True)
        sys.exit(STOPPED)
    except UserError as error:
        _tell(error)
    except ImportError as error:
        # Imported here: `--help` must not load what tells the extras.
        from onstream.settings.extras import missing_by_import

        missing = missing_by_import(error, f"`{_command(arguments)}`")
        if missing is None:
            raise
        _tell(missing)
    sys.exit(code or Exit.OK)


def _tell(error: UserError) -> NoReturn:
    click.echo(f"onstream: {error}", err=True)
    sys.exit(error.exit)


def _command(arguments: list[str] | None) -> str:
    """The command without its arguments: `onstream models make`."""
    words = ["onstream"]
    group: click.Command = cli
    for word in sys.argv[1:] if arguments is None else arguments:
        if not isinstance(group, click.Group) or word not in group.commands:
            break
        group = group.commands[word]
        words.append(word)
    return " ".join(words)
