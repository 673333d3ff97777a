"""What `onstream check` prints: the resolved settings, the plan that follows from them, warnings,
and every problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape

from onstream.pipeline.errors import Exit
from onstream.settings.devices import gpus_found
from onstream.settings.engines import engine_problems
from onstream.settings.fields import known
from onstream.settings.gpus import gpu_problems
from onstream.settings.load import Resolved
from onstream.settings.plan import Plan, make_plan
from onstream.settings.problem import Problem
from onstream.settings.root import Settings
from onstream.settings.rules import warnings_of
from onstream.settings.text import shown


def report(resolved: Resolved, console: Console, *, everything: bool) -> Exit:
    """Print all there is to say of `resolved`; with `everything`, settings at their defaults too.

    Returns `Exit.USAGE` where there are problems.
    """
    problems = list(resolved.problems)
    if resolved.settings is not None:
        plan = make_plan(resolved.settings)
        problems += engine_problems(resolved.settings, plan) + gpu_problems(
            resolved.settings, plan, gpus_found()
        )
        _print_settings(resolved.settings, resolved.origins, console, everything=everything)
        _print_plan(plan, resolved.settings, console)
        _print_warnings(warnings_of(resolved.settings), console)
    _print_problems(problems, console)
    return Exit.USAGE if problems else Exit.OK


def _print_settings(
    settings: Settings, origins: Mapping[str, str], console: Console, *, everything: bool
) -> None:
    console.print(
        "[bold]Settings[/bold]"
        if everything
        else "[bold]Settings that differ from the defaults[/bold] (--all shows all)"
    )
    count = 0
    for name, setting in known().items():
        if setting.types and not setting.applies(settings):
            continue  # of another type of loss
        value = setting.value(settings)
        absent = value is None and name not in origins  # in a section that is not there
        if everything or (value != setting.default and not absent):
            origin = origins.get(name, "default")
            _line(
                console,
                f"  {escape(name)} = [cyan]{escape(shown(value))}[/cyan]  [dim]{escape(origin)}[/dim]",
            )
            count += 1
    if not count:
        _line(console, "  none")


def _print_plan(plan: Plan, settings: Settings, console: Console) -> None:
    console.print("\n[bold]Plan[/bold]")
    rows = [
        ("run", f"{plan.run} in {settings.run_dir}"),
        ("route", " → ".join(plan.streams)),
        ("workers", ", ".join(f"{kind} × {count}" for kind, count in plan.workers.items())),
        ("streams", ", ".join(f"{{onstream:{plan.run}}}:stream:{stage}" for stage in plan.streams)),
        ("student", f"{plan.student}{_servers(plan, settings)}"),
        ("teacher", _teacher(plan, settings)),
        ("devices", _devices(plan, settings)),
        ("redis", "as redis.url says" if settings.redis.url else "started by onstream up"),
    ]
    for name, value in rows:
        _line(console, f"  {name:<8} {escape(value)}")


def _teacher(plan: Plan, settings: Settings) -> str:
    """The teacher and where it runs; in hard distillation, who writes what is trained on."""
    where = [f"{plan.teacher} beside the run{_server(plan)}"] if plan.teacher else []
    for name, section, does in (
        (plan.external_teacher, settings.orchestrator.teacher_model, ""),
        (
            plan.rollout_teacher,
            settings.orchestrator.teacher_rollout_model,
            ", which writes what is trained on",
        ),
    ):
        if name is not None and section is not None:
            where.append(
                f"{name} at {', '.join(section.client.base_url) or 'endpoints that others bring'}{does}"
            )
    return "; ".join(where) or "none"


def _servers(plan: Plan, settings: Settings) -> str:
    """The servers that write for the engine `server`."""
    if plan.student_servers:
        return f" by {plan.student_servers} vLLM server{'s' if plan.student_servers > 1 else ''} started here"
    asked = settings.inference.engine == "server" and plan.rollout_teacher is None
    return (
        f" at {', '.join(settings.inference.client.base_url)}"
        if asked and settings.inference.client.base_url
        else ""
    )


def _server(plan: Plan) -> str:
    if not plan.teacher_server:
        return ""
    gpus = (
        f" on {plan.teacher_server} GPU{'s' if plan.teacher_server > 1 else ''}"
        if plan.device == "cuda"
        else ""
    )
    return f" by a vLLM server{gpus}"


def _devices(plan: Plan, settings: Settings) -> str:
    found = " (the GPUs found here)" if plan.device == "cuda" else " (no GPU found here)"
    return plan.device + (found if settings.deployment.device == "auto" else "")


def _print_warnings(warnings: Sequence[str], console: Console) -> None:
    if warnings:
        console.print("\n[bold yellow]Warnings[/bold yellow]")
    for warning in warnings:
        _line(console, f"  {escape(warning)}")


def _print_problems(problems: Sequence[Problem], console: Console) -> None:
    if not problems:
        console.print("\n[bold green]No problems.[/bold green]")
        return
    console.print(
        f"\n[bold red]{len(problems)} {'problem' if len(problems) == 1 else 'problems'}[/bold red]"
    )
    for problem in problems:
        _line(console, f"  {escape(str(problem))}")


def _line(console: Console, markup: str) -> None:
    # Soft-wrapped, so that a line stays one line where it is piped or grepped.
    console.print(markup, soft_wrap=True, highlight=False)
