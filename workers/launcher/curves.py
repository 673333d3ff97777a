"""The curves of a run: `curves.png`, a panel for each subject that has values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from onstream.workers.launcher.metric_rows import points

INK = "#1f4e79"
QUIET = "#9aa5b1"
SECOND = "#c8553d"
Lines = tuple[tuple[str, str, str], ...]
"""Metrics that are drawn in a panel (name, label, colour), the first on top."""

PANELS: dict[str, Lines] = {
    "reward": (("reward", "training rollouts", INK),),
    "teacher_kl (nats per token)": (
        ("teacher_kl", "sampled estimate", INK),
        ("teacher_kl_k3", "low-variance estimate", QUIET),
    ),
    "loss": (("loss", "loss", INK),),
    "rollouts/s": (("rollouts_per_s", "rollouts/s", INK),),
    "staleness (steps)": (("staleness_mean", "mean", INK), ("staleness_max", "max", QUIET)),
    "entropy (nats per token)": (("entropy", "entropy", INK),),
    "|trainer − generator| (nats)": (
        ("mismatch_fresh_mean", "same version, mean", INK),
        ("mismatch_fresh_max", "same version, max", SECOND),
        ("mismatch_mean", "all tokens, mean", QUIET),
    ),
}

FROM_ZERO = ("rollouts/s", "staleness (steps)")
LOGARITHMIC = ("|trainer − generator| (nats)",)


def draw(rows: list[dict[str, Any]], evals: list[dict[str, Any]], path: Path) -> None:
    """Draw the curves of `rows`, the run's metrics, and its evaluations into `path` (PNG)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {title: lines for title, lines in PANELS.items() if _has_values(rows, lines)}
    columns = min(3, max(1, len(panels)))
    height = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        height or 1, columns, figsize=(4.3 * columns, 3.1 * height), squeeze=False
    )
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(axis, rows, title, lines)
        if title == "reward":
            _draw_evaluations(axis, evals)
        _legend(axis)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(path.resolve().parent.name, fontsize=11, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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
    if title in LOGARITHMIC:
        axis.set_yscale("log", nonpositive="mask")
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


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
    if len(axis.get_lines()) > 1:
        axis.legend(fontsize=7, frameon=False)
