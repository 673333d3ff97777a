"""The curves of a run: `curves.png`, a panel for each subject that has values."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import quantiles
from typing import Any

from onstream.workers.launcher.metric_rows import points

INK = "#1f4e79"
QUIET = "#9aa5b1"
SECOND = "#c8553d"
Lines = tuple[tuple[str, str, str], ...]
"""Metrics that are drawn in a panel (name, label, colour), the first on top."""

MISMATCH = "|trainer − generator| (nats)"
TEACHER_KL = "teacher_kl (nats per token)"
TRUNCATED = "truncated completions (share)"
PANELS: dict[str, Lines] = {
    "reward": (("reward", "training rollouts", INK),),
    TEACHER_KL: (
        ("teacher_kl", "sampled estimate", INK),
        ("teacher_kl_k3", "low-variance estimate", QUIET),
    ),
    "loss": (("loss", "loss", INK),),
    "completion (tokens)": (("completion_tokens_mean", "mean", INK),),
    TRUNCATED: (("truncated_share", "share", INK),),
    "gradient norm, before clipping": (("grad_norm", "norm", INK),),
    "entropy (nats per token)": (("entropy", "entropy", INK),),
    "rollouts/s": (("rollouts_per_s", "rollouts/s", INK),),
    "staleness (steps)": (("staleness_mean", "mean", INK), ("staleness_max", "max", QUIET)),
    MISMATCH: (
        ("mismatch_fresh_mean", "same version, mean", INK),
        ("mismatch_fresh_max", "same version, max", SECOND),
        ("mismatch_mean", "all tokens, mean", QUIET),
    ),
}

FROM_ZERO = ("rollouts/s", "staleness (steps)", "completion (tokens)", TRUNCATED)
LOGARITHMIC = (MISMATCH, "gradient norm, before clipping")
CUT = (TEACHER_KL,)
"""Panels whose height the first metric sets: rare peaks of the others would press it flat."""
MAY_BE_HIGHER = 1.15
AT_MOST_IN_A_ROW = 3
GRID_COLUMNS = 6
"""Divides by each number of panels in a row."""


def draw(rows: list[dict[str, Any]], evals: list[dict[str, Any]], path: Path) -> None:
    """Draw the curves of `rows`, the run's metrics, and its evaluations into `path` (PNG)."""
    figure = curves(rows, evals, path.resolve().parent.name)
    figure.savefig(path, dpi=110)


def curves(rows: list[dict[str, Any]], evals: list[dict[str, Any]], title: str) -> Any:
    """The curves as a figure of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {title: lines for title, lines in PANELS.items() if _has_values(rows, lines)}
    layout = rows_of(len(panels))
    figure = Figure(figsize=(4.5 * max(layout, default=1), 3.2 * max(1, len(layout))))
    FigureCanvasAgg(figure)
    for axis, (name, lines) in zip(_axes(figure, layout), panels.items(), strict=True):
        _draw_panel(axis, rows, name, lines)
        if name == "reward":
            _draw_evaluations(axis, evals)
        _legend(axis)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    return figure


def rows_of(count: int) -> list[int]:
    """How many of `count` panels stand in each row, so that no place is empty.

    >>> rows_of(10)
    [3, 3, 2, 2]
    """
    rows = math.ceil(count / AT_MOST_IN_A_ROW)
    return [count // rows + (row < count % rows) for row in range(rows)]


def _axes(figure: Any, layout: list[int]) -> list[Any]:
    """An axis for each panel; those of a row share its width."""
    grid = figure.add_gridspec(max(1, len(layout)), GRID_COLUMNS)
    axes = []
    for row, count in enumerate(layout):
        width = GRID_COLUMNS // count
        for column in range(count):
            axes.append(figure.add_subplot(grid[row, column * width : (column + 1) * width]))
    return axes


def _has_values(rows: list[dict[str, Any]], lines: Lines) -> bool:
    return any(list(points(rows, name)) for name, _, _ in lines)


def _draw_panel(axis: Any, rows: list[dict[str, Any]], title: str, lines: Lines) -> None:
    for name, label, colour in reversed(lines):
        steps_and_values = list(points(rows, name))
        if steps_and_values:
            steps, values = zip(*steps_and_values, strict=True)
            axis.plot(
                steps,
                values,
                color=colour,
                linewidth=1.4,
                label=label,
                marker="." if len(steps) < 3 else None,
            )
    axis.margins(y=0.12)
    if title in FROM_ZERO:
        axis.set_ylim(bottom=0)
    if title == TRUNCATED:
        axis.set_ylim(top=max(0.05, axis.get_ylim()[1]))
    if title in CUT:
        _cut(axis)
    if title in LOGARITHMIC:
        axis.set_yscale("log", nonpositive="mask")
    # Above the legend, which stands above the curves.
    axis.set_title(title, fontsize=9, loc="left", pad=18)
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(which="both", labelsize=8)
    if len({step for line in axis.get_lines() for step in line.get_xdata()}) == 1:
        axis.set_xlim(rows[0]["step"] - 1, rows[0]["step"] + 1)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _cut(axis: Any) -> None:
    """Fit the height to the metric on top, and to the usual values of the others."""
    *others, first = [list(line.get_ydata()) for line in axis.get_lines()]
    shown = list(first)
    for values in others:
        shown += quantiles(values, n=20)[1:-1] if len(values) > 1 else values
    highest = max(shown)
    margin = 0.12 * (highest - min(shown)) or 1.0
    if any(value > MAY_BE_HIGHER * highest + margin for values in others for value in values):
        axis.set_ylim(min(shown) - margin, highest + margin)
        for line in axis.get_lines()[:-1]:
            line.set_label(f"{line.get_label()} (peaks cut)")


def _draw_evaluations(axis: Any, evals: list[dict[str, Any]]) -> None:
    if not evals:
        return
    versions = [row["version"] for row in evals]
    shares = [row["exact"] for row in evals]
    axis.margins(x=0.12)
    axis.plot(
        versions,
        shares,
        color=SECOND,
        marker="o",
        linestyle="none",
        markersize=5,
        label="held out, exact",
        clip_on=False,
        zorder=3,
    )
    for version, share in zip(versions, shares, strict=True):
        axis.annotate(
            f"{share:.2f}",
            (version, share),
            textcoords="offset points",
            xytext=(5, 5),
            fontsize=8,
            color=SECOND,
        )


def _legend(axis: Any) -> None:
    lines = list(reversed(axis.get_lines()))
    if len(lines) > 1:
        axis.legend(
            handles=lines,
            fontsize=7,
            frameon=False,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(lines),
            borderaxespad=0,
            handlelength=1.2,
            columnspacing=1.0,
        )
