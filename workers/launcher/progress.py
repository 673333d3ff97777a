"""Shows a run that goes on: a live panel on a terminal, a status line every so often elsewhere. It
decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SHOWN = ("reward", "teacher_kl", "loss")


@dataclass(frozen=True)
class StageView:
    """One stage: processes alive here and heartbeats seen anywhere, whether it has been ready, the
    records in its stream.
    """

    name: str
    processes: int
    heartbeats: int
    ready: bool
    backlog: int
    detail: str = ""


@dataclass(frozen=True)
class View:
    """What is shown at one moment. `metrics` is the newest row of `metrics.jsonl`, empty before the
    first step.
    """

    step: int
    max_steps: int
    metrics: Mapping[str, Any] = field(default_factory=dict)
    rollouts_per_s: float | None = None
    eta_s: float | None = None
    stages: Sequence[StageView] = ()
    waits: Sequence[str] = ()


class Display:
    """Shows views and says sentences. On a terminal the last view stays at the bottom; elsewhere
    every view is a line.
    """

    def __init__(self, run: str, console: Console, interval_s: float) -> None:
        self._run = run
        self._console = console
        self._interval_s = interval_s
        self._live = (
            Live(console=console, refresh_per_second=8, transient=True)
            if console.is_terminal
            else None
        )
        self._shown = float("-inf")
        self._last_line = ""

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, sentence: str) -> None:
        """Print a sentence that stays."""
        self._console.print(Text(sentence), soft_wrap=True)

    def result(self, table: Table) -> None:
        """Print what the run came to."""
        self._console.print(table)

    def show(self, view: View) -> None:
        """Show `view` now on a terminal; elsewhere as a line, if it is time for one and it says
        anything new.
        """
        if self._live:
            self._live.update(panel(self._run, view))
            return
        if time.monotonic() - self._shown < self._interval_s:
            return
        self._shown = time.monotonic()
        line = status_line(view)
        if line != self._last_line:
            self._last_line = line
            self.say(line)


def status_line(view: View) -> str:
    """The run in one line, what it waits for last."""
    parts = [f"step {view.step}/{view.max_steps}", *_figures(view)]
    if any(stage.backlog for stage in view.stages):
        parts.append(
            "backlog " + " ".join(f"{stage.name} {stage.backlog}" for stage in view.stages)
        )
    if view.waits:
        parts.append(f"waiting: {'; '.join(view.waits)}")
    return "  ".join(parts)


def panel(run: str, view: View) -> Group:
    """The run as a few lines: bar, figures, stages, and what it waits for."""
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(run, style="bold"),
        ProgressBar(total=max(view.max_steps, 1), completed=view.step, width=40),
        f"step {view.step}/{view.max_steps}",
    )
    lines: list[Any] = [bar]
    if figures := _figures(view):
        lines.append(Text("  ".join(figures)))
    lines.append(_stage_table(view.stages))
    lines += [Text(f"waiting: {sentence}", style="yellow") for sentence in view.waits]
    return Group(*lines)


def _stage_table(stages: Sequence[StageView]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("stage", "workers", "state"):
        table.add_column(title)
    table.add_column("backlog", justify="right")
    table.add_column("", overflow="ellipsis", no_wrap=True)
    for stage in stages:
        state = (
            "absent"
            if not (stage.processes or stage.heartbeats)
            else "ready"
            if stage.ready
            else "starting"
        )
        table.add_row(
            stage.name,
            str(max(stage.processes, stage.heartbeats)),
            state,
            str(stage.backlog),
            stage.detail,
        )
    return table


def _figures(view: View) -> list[str]:
    figures = [
        f"{name} {view.metrics[name]:.4g}" for name in SHOWN if view.metrics.get(name) is not None
    ]
    if view.rollouts_per_s is not None:
        figures.append(f"{view.rollouts_per_s:.0f} rollouts/s")
    if view.metrics.get("staleness_mean") is not None:
        figures.append(
            f"staleness {view.metrics['staleness_mean']:.1f} (max {view.metrics['staleness_max']:.0f})"
        )
    if view.eta_s is not None:
        figures.append(f"ETA {clock(view.eta_s)}")
    return figures


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `3:04:05`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def result_table(report: Mapping[str, Any]) -> Table:
    """The few figures that a person asks for when a run has ended."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("steps", str(report["steps"]))
    table.add_row("seconds", f"{report['seconds']:.1f}")
    table.add_row(
        "rollouts", f"{report['rollouts']} ({_figure(report['rollouts_per_s'])} a second)"
    )
    table.add_row(
        "eval (exact, held out)",
        f"{_figure(report['eval']['before'])} → {_figure(report['eval']['after'])}",
    )
    if swapped := report["eval"].get("swapped"):
        table.add_row(
            "eval (images swapped)", f"{_figure(swapped['before'])} → {_figure(swapped['after'])}"
        )
    table.add_row(
        "teacher_kl (nats a token)",
        f"{_figure(report['teacher_kl']['first'])} → {_figure(report['teacher_kl']['last'])}",
    )
    table.add_row(
        "reward", f"{_figure(report['reward']['first'])} → {_figure(report['reward']['last'])}"
    )
    if cpu_seconds := report.get("cpu_seconds"):
        table.add_row(
            "CPU seconds",
            "  ".join(f"{kind} {seconds:.1f}" for kind, seconds in cpu_seconds.items()),
        )
    return table


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
