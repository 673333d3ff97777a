"""The command `onstream`. Every command parses and checks its settings first, and imports what it
needs after that.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from onstream.pipeline.errors import Exit, UserError
from onstream.settings.stages import KINDS, WorkerKind

if TYPE_CHECKING:
    from onstream.settings.root import Settings

Command = TypeVar("Command", bound=Callable[..., Any])


def sources(command: Command) -> Command:
    """Give `command` its settings' sources: FILES and `--set`."""
    option = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="NAME=VALUE",
        help="Override a setting: --set trainer.max_steps=20.",
    )
    return click.argument("files", nargs=-1, type=click.Path(path_type=Path))(option(command))


def looked_at(command: Command) -> Command:
    """Give `command` the run it looks at: a RUN, and `--set`."""
    option = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="NAME=VALUE",
        help="Override a setting of the run.",
    )
    return click.argument("run", type=click.Path(path_type=Path))(option(command))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onstream")
def cli() -> None:
    """On-policy distillation of small language models, as a pipeline over Redis Streams.

    FILES are TOML files, a later one winning; a run's directory or name stands for the settings it
    was started with.
    """


@cli.command()
@sources
def up(files: tuple[Path, ...], overrides: tuple[str, ...]) -> Exit:
    """Start Redis and the workers of the plan here, and see the run through."""
    settings = _settings(files, overrides)
    from onstream.workers.launcher.launcher import up

    return up(settings, files, overrides)


@cli.command()
@looked_at
@click.option(
    "--from-step",
    type=click.IntRange(min=1),
    help="The first step wanted: start from the newest checkpoint before it.",
)
@click.option("--stop-at", type=click.IntRange(min=1), help="The last step wanted.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The directory to make; by default RUN-replay beside the run's.",
)
@click.option(
    "--worst",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Show so many samples of the last step.",
)
def replay(
    run: Path,
    overrides: tuple[str, ...],
    from_step: int | None,
    stop_at: int | None,
    out: Path | None,
    worst: int,
) -> Exit:
    """Train a recorded run again, by its trainer alone, and tell whether it comes to the same
    weights.

    No other worker and no Redis is needed. Exits with 1, and names the first step that differs, if
    any does. A setting of the trainer that --set changes is a what-if: then a difference is no
    fault.
    """
    from onstream.workers.replay.replay import replay

    return replay(
        run, overrides, from_step=from_step, stop_at=stop_at, out=out, worst=worst, say=click.echo
    )


@cli.command()
@sources
@click.option("--all", "everything", is_flag=True, help="Print settings at their defaults too.")
def check(files: tuple[Path, ...], overrides: tuple[str, ...], everything: bool) -> Exit:
    """Print the resolved settings, the plan, and every problem at once."""
    from rich.console import Console

    from onstream.settings.check import report
    from onstream.settings.load import resolve

    return report(resolve(files, overrides), Console(), everything=everything)


@cli.command()
@click.argument("kind", type=click.Choice(KINDS), metavar="KIND")
@sources
@click.option(
    "--slot",
    metavar="NAME",
    help="The place among this machine's workers that it takes: a restart under the same name goes on with its records.",
)
@click.option(
    "--optional",
    is_flag=True,
    help="Leave with exit code 0, saying so, where the run has no place for this worker.",
)
def worker(
    kind: WorkerKind,
    files: tuple[Path, ...],
    overrides: tuple[str, ...],
    slot: str | None,
    optional: bool,
) -> Exit:
    """Run one worker against a running Redis.

    KIND is generator, verifier, teacher, teacher-external, trainer or jobs. A teacher scores with a
    model of its own, a teacher-external asks the endpoints of orchestrator.teacher_model; a run may
    have both. A jobs worker evaluates and exports beside the training.
    """
    settings = _settings(files, overrides)
    from onstream.settings.engines import student_engine
    from onstream.workers.runner import run_kind

    if kind == "generator" and student_engine(settings) == "vllm":
        from onstream.workers.launcher.die_with_parent import guard_group

        guard_group()  # vLLM's processes outlive a kill of the one that started them
    return run_kind(kind, settings, slot, optional=optional)


@cli.command()
@click.argument("kind", type=click.Choice(KINDS), metavar="KIND")
@sources
@click.option(
    "--live", is_flag=True, help="Ask only whether it lives: still starting is well, too."
)
@click.option(
    "--slot",
    metavar="NAME",
    help="The worker that was started with this --slot; by default any of KIND on this machine.",
)
def health(
    kind: WorkerKind,
    files: tuple[Path, ...],
    overrides: tuple[str, ...],
    live: bool,
    slot: str | None,
) -> Exit:
    """Exit with 0 if the worker of KIND on this machine is ready, and not otherwise: the health
    check of a container.
    """
    settings = _settings(files, overrides)
    from onstream.workers.inspection.health import health

    found = health(kind, settings, live=live, slot=slot)
    click.echo(found.words)
    return found.exit


@cli.command("teacher-server", hidden=True)
@sources
@click.option(
    "--port", type=click.IntRange(1, 65535), required=True, help="Where to listen on this machine."
)
def teacher_server(files: tuple[Path, ...], overrides: tuple[str, ...], port: int) -> None:
    """Become the vLLM server of the teacher beside the run; `onstream up` starts it."""
    settings = _settings(files, overrides)
    from onstream.workers.launcher.die_with_parent import guard_group

    guard_group()
    from onstream.workers.teacher.server_command import serve

    serve(settings, port)


@cli.command("student-server")
@sources
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
def student_server(
    files: tuple[Path, ...], overrides: tuple[str, ...], host: str, port: int
) -> None:
    """Become a vLLM server of the student, for a generator with inference.engine = "server".

    `onstream up` starts such servers itself where inference.client.base_url is unset; this is for
    servers on other machines.
    """
    settings = _settings(files, overrides)
    from onstream.workers.launcher.die_with_parent import guard_group

    guard_group()
    from onstream.workers.generator.engines.server.server_command import serve

    serve(settings, host, port)


@cli.command()
@sources
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(files: tuple[Path, ...], overrides: tuple[str, ...], as_json: bool) -> None:
    """Show the stages, backlog, workers and versions of a run, and what it waits for."""
    settings = _settings(files, overrides)
    from rich.console import Console

    from onstream.pipeline.redis.access import opened
    from onstream.workers.inspection.status import show
    from onstream.workers.inspection.status import status as state_of

    with opened(settings, purpose="status") as bus:
        state = state_of(bus)
    if as_json:
        click.echo(json.dumps(state, indent=2))
    else:
        show(state, Console())


@cli.command()
@looked_at
@click.option("--uids", is_flag=True, help="Print the uids themselves, not only how many they are.")
def audit(run: Path, overrides: tuple[str, ...], uids: bool) -> Exit:
    """Print, as JSON, what became of every rollout that was ever issued. Exits with 1 if any is
    lost or duplicated.
    """
    settings = _settings([run], overrides)
    from onstream.pipeline.redis.access import opened
    from onstream.workers.inspection.audit import audit, counted

    with opened(settings, purpose="audit") as bus:
        found = audit(settings.run_dir, bus)
    click.echo(json.dumps(found if uids else counted(found), indent=2))
    return Exit.FAILED if found["lost"] or found["duplicated"] else Exit.OK


@cli.command("eval")
@looked_at
@click.option(
    "--version",
    type=click.IntRange(min=0),
    help="The policy version; by default the newest on disk.",
)
def evaluate(run: Path, overrides: tuple[str, ...], version: int | None) -> None:
    """Answer the held-out prompts greedily with a policy version, and add the result to the run's
    evals.jsonl.
    """
    settings = _settings([run], overrides)
    from onstream.workers.evaluation.versions import evaluate_version

    click.echo(json.dumps(evaluate_version(settings, version)))


@cli.command()
@looked_at
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The directory to write."
)
@click.option(
    "--version",
    type=click.IntRange(min=0),
    help="The policy version; by default the newest on disk.",
)
def export(run: Path, overrides: tuple[str, ...], out: Path, version: int | None) -> None:
    """Write a policy version as a model directory that loads by itself; an adapter is merged."""
    settings = _settings([run], overrides)
    from onstream.workers.jobs.export import export

    click.echo(f"version {export(settings, version, out)} is in {out}")


@cli.group()
def dead() -> None:
    """Rollouts that were given up: look at them, ask for them anew, or purge them."""


@dead.command("list")
@looked_at
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def dead_list(run: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """List the dead letters by reason."""
    settings = _settings([run], overrides)
    from rich.console import Console

    from onstream.pipeline.redis.access import opened
    from onstream.workers.inspection.dead_letters import dead, show_list

    with opened(settings, purpose="dead") as bus:
        found = dead(bus, settings.run_dir)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        show_list(found, Console())


@dead.command("show")
@looked_at
@click.argument("uid")
def dead_show(run: Path, overrides: tuple[str, ...], uid: str) -> None:
    """Print the dead letter of UID (such as 17) as JSON, with the record that failed."""
    settings = _settings([run], overrides)
    from onstream.pipeline.redis.access import opened
    from onstream.workers.inspection.dead_letters import show

    with opened(settings, purpose="dead") as bus:
        click.echo(json.dumps(show(bus, settings.run_dir, uid), indent=2))


def chosen_letters(command: Command) -> Command:
    """Give `command` its ways to say which dead letters are meant."""
    command = click.option("--all", "everything", is_flag=True, help="Every dead letter.")(command)
    command = click.option("--reason", metavar="TEXT", help="Those whose reason holds TEXT.")(
        command
    )
    return click.argument("uids", nargs=-1)(command)


@dead.command("requeue")
@looked_at
@chosen_letters
def dead_requeue(
    run: Path,
    overrides: tuple[str, ...],
    uids: tuple[str, ...],
    reason: str | None,
    everything: bool,
) -> None:
    """Ask the trainer for new rollouts in place of dead ones, which stay dead."""
    _ask_trainer("requeue", run, overrides, uids, reason, everything)


@dead.command("purge")
@looked_at
@chosen_letters
def dead_purge(
    run: Path,
    overrides: tuple[str, ...],
    uids: tuple[str, ...],
    reason: str | None,
    everything: bool,
) -> None:
    """Ask the trainer to delete dead letters; the audit then counts their rollouts as
    dropped.purged.
    """
    _ask_trainer("purge", run, overrides, uids, reason, everything)


def _ask_trainer(
    wish: Literal["requeue", "purge"],
    run: Path,
    overrides: tuple[str, ...],
    uids: tuple[str, ...],
    reason: str | None,
    everything: bool,
) -> None:
    settings = _settings([run], overrides)
    from onstream.pipeline.redis.access import opened
    from onstream.workers.inspection.dead_letters import ask

    with opened(settings, purpose="dead") as bus:
        asked = ask(bus, settings.run_dir, wish, uids, reason, everything=everything)
        at_work = any(worker.stage == "train" for worker in bus.state.workers())
    click.echo(
        f"asked the trainer to {wish} {len(asked)}: {', '.join(asked[:20])}{', …' if len(asked) > 20 else ''}"
    )
    if not at_work:
        click.echo("no trainer is at work on this run: it does so when the run is resumed")


class ListByDefault(click.Group):
    """A group whose command `list` need not be named: `onstream jobs RUN` lists the jobs of RUN."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of `args`, or `list`."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["list", *args])


@cli.group(cls=ListByDefault)
def jobs() -> None:
    """Work beside the training: `onstream jobs RUN` shows what there is and what it came to."""


@jobs.command("list")
@looked_at
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def jobs_list(run: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """List the jobs of a run, the newest first."""
    settings = _settings([run], overrides)
    from rich.console import Console

    from onstream.workers.jobs.requests import listed, show

    rows = listed(settings)
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    else:
        show(rows, Console())


@jobs.command("evaluate")
@looked_at
@click.option(
    "--version",
    type=click.IntRange(min=0),
    help="The policy version; by default the newest on disk.",
)
def jobs_evaluate(run: Path, overrides: tuple[str, ...], version: int | None) -> None:
    """Ask for the evaluation of a policy version."""
    settings = _settings([run], overrides)
    from onstream.workers.jobs.requests import ask_evaluation

    click.echo(ask_evaluation(settings, version))


@jobs.command("export")
@looked_at
@click.option(
    "--version",
    type=click.IntRange(min=0),
    help="The policy version; by default the newest on disk.",
)
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    help="The directory to make, on the machine of the jobs worker.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Cast the weights; by default they stay as they are.",
)
@click.option("--upload", is_flag=True, help="Run the command of jobs.upload on it.")
def jobs_export(
    run: Path,
    overrides: tuple[str, ...],
    version: int | None,
    to: Path | None,
    dtype: str | None,
    upload: bool,
) -> None:
    """Ask for a policy version as a model directory, or for its upload."""
    settings = _settings([run], overrides)
    from onstream.workers.jobs.requests import ask_export

    click.echo(ask_export(settings, version, to, dtype, upload=upload))


@jobs.command("prune")
@looked_at
def jobs_prune(run: Path, overrides: tuple[str, ...]) -> None:
    """Ask for the removal of policies and checkpoints that nothing keeps."""
    settings = _settings([run], overrides)
    from onstream.workers.jobs.requests import ask_prune

    click.echo(ask_prune(settings))


@cli.group()
def models() -> None:
    """Small models for the examples."""


@models.command()
@click.argument("task")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory that gets teacher/ and student/.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Seed of weights and problems.",
)
@click.option("--only", type=click.Choice(["teacher", "student"]), help="Make only one of them.")
@click.option(
    "--family",
    default="llava",
    show_default=True,
    type=click.Choice(["llava", "qwen2.5-vl", "qwen3-vl"]),
    help="For pictures.",
)
def make(
    task: str, out: Path, seed: int, only: Literal["teacher", "student"] | None, family: Any
) -> None:
    """Make a teacher and a weaker student for TASK, by training on its ground truth."""
    from onstream.pipeline import telemetry
    from onstream.settings.run import LogSettings
    from onstream.workers.tiny_models.make import make

    telemetry.configure("models", "make", task, LogSettings())
    for made in make(task, out, seed, only, family):
        click.echo(
            f"{made.directory}: {made.exact:.1%} exact, {made.parameters:,} parameters, {made.steps} steps, {made.seconds:.0f} s"
        )


def _settings(files: tuple[Path, ...] | list[Path], overrides: tuple[str, ...]) -> Settings:
    from onstream.settings.load import load_settings

    return load_settings(files, overrides)


def main(arguments: list[str] | None = None) -> None:
    """Run the command of `arguments` (by default the process's own) and exit with its code.

    A problem that the user can mend is told on standard error, without a traceback.
    """
    tell = partial(click.echo, err=True)
    try:
        code = cli.main(arguments, prog_name="onstream", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        tell("stopped")
        sys.exit(130)
    except UserError as error:
        tell(f"onstream: {error}")
        sys.exit(error.exit)
    sys.exit(code or Exit.OK)
