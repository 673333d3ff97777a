"""What `onstream check` prints: the settings, the plan, warnings, and every problem."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape

from onstream.settings.engines import IN_PROCESS, teacher_engine
from onstream.settings.fields import known, known_in, without_login
from onstream.settings.load import Resolved
from onstream.settings.plan import Plan, make_plan
from onstream.settings.problems import SettingsProblem
from onstream.settings.record_sizes import record_sizes
from onstream.settings.root import Settings
from onstream.settings.route import external_teacher
from onstream.settings.rules import warnings_of
from onstream.settings.sections.client import EndpointSettings
from onstream.settings.toml import shown, shown_bytes


@dataclass(frozen=True)
class Findings:
    """What is known of the settings on this machine, beyond what they say by themselves.

    `problems` and `warnings` are those that the machine has with them, `memory` is what the trainer
    takes of its memory, `cost` what the run may cost, and `rate` the words for its learning rate.
    """

    problems: Sequence[SettingsProblem] = ()
    warnings: Sequence[str] = ()
    memory: Mapping[str, str] = field(default_factory=dict)
    cost: Mapping[str, str] = field(default_factory=dict)
    rate: str | None = None


def report(resolved: Resolved, here: Findings, console: Console, *, everything: bool) -> None:
    """Print all there is to say of `resolved`; with `everything`, settings at their defaults too.

    `here` is what this machine adds.
    """
    settings = resolved.settings
    if settings is not None:
        _print_settings(settings, resolved.origins, console, everything=everything)
        _print_plan(_plan_rows(make_plan(settings), settings, here.rate), console)
        _print_records(settings, console)
        _print_memory(here.memory, console)
        _print_cost(here.cost, console)
        _print_warnings([*warnings_of(settings), *here.warnings], console)
    _print_problems([*resolved.problems, *here.problems], console)


def as_data(resolved: Resolved, here: Findings, *, everything: bool) -> dict[str, Any]:
    """What `report` prints, as JSON data, with each problem in its parts.

    Of settings that leave nothing usable there are only the problems.
    """
    found: dict[str, Any] = {}
    if (settings := resolved.settings) is not None:
        sizes = record_sizes(settings)
        found = {
            "settings": {
                name: {"value": value, "origin": origin}
                for name, value, origin in _values(settings, resolved.origins, everything)
            },
            "plan": _plan_rows(make_plan(settings), settings, here.rate),
            "records": {
                name: getattr(sizes, name)
                for name in ("rollout_bytes", "batch_bytes", "window_bytes", "window")
            },
            "memory": dict(here.memory),
            "cost": dict(here.cost),
            "warnings": [*warnings_of(settings), *here.warnings],
        }
    problems = [*resolved.problems, *here.problems]
    return found | {"problems": [asdict(problem) for problem in problems]}


def _values(
    settings: Settings, origins: Mapping[str, str], everything: bool
) -> Iterator[tuple[str, Any, str]]:
    """Name, value and origin of each setting; of those that differ from the defaults only, unless
    `everything` is wanted.
    """
    for name, setting in known_in(settings).items():
        if setting.types and not setting.applies(settings):
            continue  # of another type of loss
        value = setting.value(settings)
        absent = value is None and name not in origins  # in a section that is not there
        if everything or (value != setting.default and not absent):
            yield name, value, origins.get(name, "default")


def _print_settings(
    settings: Settings, origins: Mapping[str, str], console: Console, *, everything: bool
) -> None:
    if everything:
        console.print("[bold]Settings[/bold]")
    else:
        console.print("[bold]Settings that differ from the defaults[/bold] (--all shows all)")
    values = list(_values(settings, origins, everything))
    for name, value, origin in values:
        value_text = f"[cyan]{escape(shown(value))}[/cyan]"
        _line(console, f"  {escape(name)} = {value_text}  [dim]{escape(origin)}[/dim]")
    if not values:
        _line(console, "  none")


def _plan_rows(plan: Plan, settings: Settings, rate: str | None) -> dict[str, str]:
    """What the settings lead to, in words; `rate` are those about the learning rate."""
    streams = [f"{{onstream:{plan.run}}}:stream:{stage}" for stage in plan.streams]
    rows = {
        "run": f"{plan.run} in {settings.run_dir.absolute()}",
        "route": plan.path_text,
        "workers": ", ".join(f"{kind} × {count}" for kind, count in plan.worker_counts.items()),
        "streams": ", ".join(streams),
        "student": f"{plan.student}{_student_servers(plan, settings)}",
        "teacher": "; ".join(_teachers(plan, settings)) or "none",
        **_judge(settings),
        "devices": _devices(plan, settings),
        "redis": "as redis.url says" if settings.redis.url else "started by onstream up",
    }
    if rate is not None:
        rows["rate"] = rate
    return rows


def _print_plan(rows: Mapping[str, str], console: Console) -> None:
    console.print("\n[bold]Plan[/bold]")
    for name, value in rows.items():
        _line(console, f"  {name:<8} {escape(value)}")


def _print_records(settings: Settings, console: Console) -> None:
    """What the records take at their longest, and the settings that follow where they are unset."""
    sizes = record_sizes(settings)
    tokens = f"{sizes.tokens:,} tokens of prompt, {sizes.tokens:,} of completion"
    console.print("\n[bold]Records[/bold] at their longest (by a formula: docs/delivery.md)")
    for name, count, words in (
        ("rollout", sizes.rollout_bytes, tokens + _top_k(settings, sizes.top_k)),
        ("batch", sizes.batch_bytes, "in Redis, which takes 30 % more than records"),
        ("window", sizes.window_bytes, f"{sizes.window:,} rollouts that may be under way"),
    ):
        _line(console, f"  {name:<8} {shown_bytes(count):>8}  {words}")
    for name, derived in sizes.derived.items():
        if known()[name].value(settings) is None:
            _line(console, f"  {name} is unset: {derived}")


def _top_k(settings: Settings, most: int) -> str:
    """The teacher's likeliest tokens in the records, for the end of a line."""
    if not most:
        return ""
    external = external_teacher(settings) is not None
    if settings.trainer.loss.teacher_top_k == "auto" and external:
        return f", top-k {most}, or what the teacher's endpoint gives"
    return f", top-k {most}"


def _print_memory(memory: Mapping[str, str], console: Console) -> None:
    if memory:
        console.print("\n[bold]Memory of the trainer[/bold] (by a formula: docs/memory.md)")
    for name, value in memory.items():
        _line(console, f"  {name:<11} {escape(value)}")


def _print_cost(cost: Mapping[str, str], console: Console) -> None:
    if cost:
        title = "\n[bold]Time on one H100[/bold], completions at their longest"
        console.print(f"{title} (by a formula: docs/cost.md)", soft_wrap=True)
    for name, value in cost.items():
        _line(console, f"  {name:<8} {escape(value)}")


def _teachers(plan: Plan, settings: Settings) -> Iterator[str]:
    """Each teacher and where it runs; in hard distillation, who writes what is trained on."""
    orchestrator = settings.orchestrator
    if plan.teacher:
        yield f"{plan.teacher} beside the run{_by_vllm(plan, settings)}"
    if plan.external_teacher is not None and orchestrator.teacher_model is not None:
        yield f"{plan.external_teacher} at {_addresses(orchestrator.teacher_model.client)}"
    for name, named in settings.teachers.items():
        external = named.external
        where = f"at {_addresses(external.client)}" if external else "in its workers"
        yield f"{name}: {plan.named_teachers[name].model} {where}"
    if plan.rollout_teacher is not None and orchestrator.teacher_rollout_model is not None:
        addresses = _addresses(orchestrator.teacher_rollout_model.client)
        yield f"{plan.rollout_teacher} at {addresses}, which writes what is trained on"


def _judge(settings: Settings) -> dict[str, str]:
    """The model that scores answers, where one does."""
    judge = settings.orchestrator.judge_model
    return {"judge": f"{judge.model.name} at {_addresses(judge.client)}"} if judge else {}


def _addresses(client: EndpointSettings) -> str:
    return ", ".join(without_login(client.base_url)) or "endpoints that other workers know"


def _student_servers(plan: Plan, settings: Settings) -> str:
    """The servers that write for the engine `server`, for the end of a line."""
    if plan.student_servers:
        return f" by {_counted(plan.student_servers, 'vLLM server')} started here"
    addresses = settings.inference.client.base_url
    asks_servers = settings.inference.engine == "server" and plan.rollout_teacher is None
    return f" at {', '.join(without_login(addresses))}" if asks_servers and addresses else ""


def _by_vllm(plan: Plan, settings: Settings) -> str:
    """How vLLM runs the teacher, if it does, for the end of a line."""
    if plan.workers.get("teacher") and teacher_engine(settings) == IN_PROCESS:
        return " by vLLM in its workers"
    if not plan.teacher_server:
        return ""
    gpus = f" on {_counted(plan.teacher_server, 'GPU')}" if plan.device == "cuda" else ""
    return f" by a vLLM server{gpus}"


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _devices(plan: Plan, settings: Settings) -> str:
    if settings.deployment.device != "auto":
        return plan.device
    found = "the GPUs found here" if plan.device == "cuda" else "no GPU found here"
    return f"{plan.device} ({found})"


def _print_warnings(warnings: Sequence[str], console: Console) -> None:
    if warnings:
        console.print("\n[bold yellow]Warnings[/bold yellow]")
    for warning in warnings:
        _line(console, f"  {escape(warning)}")


def _print_problems(problems: Sequence[SettingsProblem], console: Console) -> None:
    if not problems:
        console.print("\n[bold green]No problems.[/bold green]")
        return
    console.print(f"\n[bold red]{_counted(len(problems), 'problem')}[/bold red]")
    for problem in problems:
        _line(console, f"  {escape(str(problem))}")


def _line(console: Console, markup: str) -> None:
    # Not wrapped by rich: a line stays one line where it is piped or searched.
    console.print(markup, soft_wrap=True, highlight=False)
