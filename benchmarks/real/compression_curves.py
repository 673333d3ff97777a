"""The curves of a compression: held-out score, KL to the teacher and loss, step by step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onstream.workers.launcher.metric_rows import points

PANELS = {
    "held out, right (share)": ("evals.jsonl", "exact"),
    "reverse KL to the teacher (nats a token)": ("metrics.jsonl", "teacher_kl"),
    "reward of what is trained on": ("metrics.jsonl", "reward"),
}
"""Title of each panel: the file of a run and the field that it shows."""
COLOURS = ("#9aa5b1", "#1f4e79", "#c8553d", "#3d8c6c")
SMOOTHED_STEPS = 5


def draw(runs: Path, names: Sequence[str], file: Path) -> None:
    """Draw the runs `names` of the directory `runs` into `file`, by its suffix."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6))
    for axis, (title, (source, field)) in zip(
        figure.subplots(1, len(PANELS)), PANELS.items(), strict=True
    ):
        for name, colour in zip(names, COLOURS, strict=False):
            curve = curve_of(runs / name / source, field)
            if curve:
                axis.plot(*zip(*curve, strict=True), color=colour, linewidth=1.4, label=name)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.lines:
            axis.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "onstream"}):
        figure.savefig(file, metadata={"Date": None})


def curve_of(file: Path, field: str) -> list[tuple[int, float]]:
    """(step, value) of the lines of `file`; of a step's metric the mean of the last few."""
    if not file.exists():
        return []
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    if "version" in rows[0]:
        return sorted((row["version"], row[field]) for row in rows)
    return smoothed(list(points(rows, field)))


def smoothed(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Each value with those of up to four steps before it, as their mean.

    >>> smoothed([(1, 4.0), (2, 2.0)])
    [(1, 4.0), (2, 3.0)]
    """
    means = []
    for place, (step, _) in enumerate(curve):
        last = [value for _, value in curve[max(0, place + 1 - SMOOTHED_STEPS) : place + 1]]
        means.append((step, sum(last) / len(last)))
    return means
