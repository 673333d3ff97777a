"""Shows a run that goes on: a live panel on a terminal, now and then a status line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LONGEST_LINE = 159
"""Of a status where standard output is no terminal."""
RESULT_WIDTH = 50
"""Of a figure in the result, so that it fits a terminal of 80 columns beside its title."""
SHOWN = ("reward", "teacher_kl", "loss")


@dataclass(frozen=True)
class StageView:
    """One stage.

    `processes` live here, and `heartbeats` come from anywhere. `ready` says whether one of its
    workers has been ready once, `backlog` counts the records that wait for it, and `detail` is what
    a worker of it waits for.
    """

    name: str
    processes: int
    heartbeats: int
    ready: bool
    backlog: int
    detail: str = ""


@dataclass(frozen=True)
class RunView:
    """The run. `metrics` is the newest row of `metrics.jsonl`, empty before the first step."""

    step: int
    max_steps: int
    metrics: Mapping[str, Any] = field(default_factory=dict)
    rollouts_per_s: float | None = None
    eta_s: float | None = None
    stages: Sequence[StageView] = ()
    waits: Sequence[str] = ()


class Display:
    """Shows views of the run, and prints sentences that stay.

    On a terminal the last view stays at the bottom; elsewhere a view is a line or a few.
    """

    def __init__(self, run: str, console: Console, interval_s: float) -> None:
        self._run = run
        self._console = console
        self._interval_s = interval_s
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, refresh_per_second=8, transient=True)
        self._shown = float("-inf")
        self._last_lines: list[str] = []

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

    def show(self, view: RunView) -> None:
        """Show `view`: on a terminal now, elsewhere when a line is due and says anything new."""
        if self._live:
            self._live.update(panel(self._run, view))
            return
        if time.monotonic() - self._shown < self._interval_s:
            return
        self._shown = time.monotonic()
        lines = status_lines(view)
        if lines != self._last_lines:
            self._last_lines = lines
            for line in lines:
                self.say(line)


def status_lines(view: RunView) -> list[str]:
    """The run in a line, and what it waits for in others; none is longer than `LONGEST_LINE`."""
    parts = [f"step {view.step}/{view.max_steps}", *_figures(view)]
    if any(stage.backlog for stage in view.stages):
        parts.append(
            "backlog " + " ".join(f"{stage.name} {stage.backlog}" for stage in view.stages)
        )
    first, *more = filled(parts, LONGEST_LINE - 2)
    lines = [first, *(f"  {line}" for line in more)]
    for sentence in view.waits:
        lines += wrap(f"  waiting: {sentence}", LONGEST_LINE, subsequent_indent="    ")
    return lines


def panel(run: str, view: RunView) -> Group:
    """The run as a few lines: bar, figures, stages, and what it waits for."""
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(run, style="bold"),
        ProgressBar(total=max(view.max_steps, 1), completed=view.step, width=30),
        f"step {view.step}/{view.max_steps}",
    )
    lines: list[Any] = [bar]
    if figures := _figures(view):
        lines.append(_Figures(figures))
    lines.append(_stage_table(view.stages))
    lines += [Text(f"waiting: {sentence}", style="yellow") for sentence in view.waits]
    return Group(*lines)


class _Figures:
    """Figures in as few lines as the terminal's width allows, none broken in its middle."""

    def __init__(self, figures: Sequence[str]) -> None:
        self._figures = figures

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from map(Text, filled(self._figures, options.max_width))


def filled(parts: Sequence[str], width: int) -> list[str]:
    """`parts` in lines of up to `width` characters, where no single part is longer.

    >>> filled(["loss 1.5", "reward 0.75", "ETA 0:07"], 21)
    ['loss 1.5  reward 0.75', 'ETA 0:07']
    """
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return lines


def _stage_table(stages: Sequence[StageView]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
    for title in ("stage", "workers", "state"):
        table.add_column(title, no_wrap=True)
    table.add_column("backlog", justify="right", no_wrap=True)
    # It alone gives way in a narrow terminal.
    table.add_column("", overflow="ellipsis", no_wrap=True, ratio=1)
    for stage in stages:
        workers = max(stage.processes, stage.heartbeats)
        table.add_row(stage.name, str(workers), _state(stage), str(stage.backlog), stage.detail)
    return table


def _state(stage: StageView) -> str:
    if not (stage.processes or stage.heartbeats):
        return "absent"
    return "ready" if stage.ready else "starting"


def _figures(view: RunView) -> list[str]:
    metrics = view.metrics
    figures = [f"{name} {metrics[name]:.4g}" for name in SHOWN if metrics.get(name) is not None]
    if metrics.get("turns_mean", 1) > 1:
        figures.append(f"{metrics['turns_mean']:.1f} turns")
    if view.rollouts_per_s is not None:
        figures.append(f"{view.rollouts_per_s:.0f} rollouts/s")
    if metrics.get("staleness_mean") is not None:
        largest = metrics["staleness_max"]
        figures.append(f"staleness {metrics['staleness_mean']:.1f} (max {largest:.0f})")
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
    evaluation = report["eval"]
    rows = {
        "steps": str(report["steps"]),
        "seconds": f"{report['seconds']:.1f}",
        "rollouts": f"{report['rollouts']} ({_figure(report['rollouts_per_s'])} a second)",
        "eval (exact, held out)": _change(evaluation, "before", "after"),
    }
    if _differs(evaluation.get("reward"), evaluation):
        rows["eval (reward, held out)"] = _change(evaluation["reward"], "before", "after")
    if swapped := evaluation.get("swapped"):
        rows["eval (images swapped)"] = _change(swapped, "before", "after")
    rows["teacher_kl (nats a token)"] = _change(report["teacher_kl"], "first", "last")
    rows["reward"] = _change(report["reward"], "first", "last")
    if truncated := report.get("truncated_share"):
        rows["cut off at max_completion"] = f"{truncated:.1%}"
    if cpu_seconds := report.get("cpu_seconds"):
        seconds = [f"{kind} {used:.1f}" for kind, used in cpu_seconds.items()]
        rows["CPU seconds"] = "\n".join(filled(seconds, RESULT_WIDTH))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for title, figure in rows.items():
        table.add_row(title, figure)
    return table


def _differs(reward: Mapping[str, Any] | None, exact: Mapping[str, Any]) -> bool:
    """Whether held-out rewards tell more than the share of exact answers does."""
    return reward is not None and any(reward[at] != exact[at] for at in ("before", "after"))


def _change(figures: Mapping[str, Any], start: str, end: str) -> str:
    return f"{_figure(figures[start])} → {_figure(figures[end])}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
