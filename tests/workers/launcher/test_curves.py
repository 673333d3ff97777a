"""What `curves.png` shows."""

from __future__ import annotations

from typing import Any

import pytest

from onstream.workers.launcher.curves import AT_MOST_IN_A_ROW, PANELS, curves, rows_of

EVALS = [{"version": 0, "exact": 0.5}, {"version": 40, "exact": 0.9}]


def rows(steps: int = 40) -> list[dict[str, Any]]:
    """Metrics of a run in which the low-variance estimate has two high peaks."""
    names = [name for lines in PANELS.values() for name, _, _ in lines]
    found: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = dict.fromkeys(names, 1.0 + 1.0 / step)
        row["teacher_kl_k3"] = 500.0 if step in (3, 17) else row["teacher_kl"]
        found.append({**row, "step": step})
    return found


def panels(figure: Any) -> dict[str, Any]:
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def test_length_truncation_and_gradient_norm_have_a_panel_each() -> None:
    assert {
        "completion (tokens)",
        "truncated completions (share)",
        "gradient norm, before clipping",
    } <= set(panels(curves(rows(), EVALS, "a run")))


def test_peaks_of_the_low_variance_estimate_do_not_press_the_other_flat() -> None:
    axis = panels(curves(rows(), EVALS, "a run"))["teacher_kl (nats per token)"]
    lowest, highest = axis.get_ylim()
    assert (lowest < 1, highest < 3) == (True, True)
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["sampled estimate", "low-variance estimate (peaks cut)"]


def test_no_legend_lies_over_the_curves() -> None:
    figure = curves(rows(), EVALS, "a run")
    renderer = figure.canvas.get_renderer()
    legends = [axis for axis in figure.axes if axis.get_legend()]
    assert len(legends) == 4
    for axis in legends:
        assert axis.get_legend().get_window_extent(renderer).y0 >= axis.bbox.y1


@pytest.mark.parametrize("count", range(1, len(PANELS) + 1))
def test_every_row_is_full_whatever_a_run_has_measured(count: int) -> None:
    layout = rows_of(count)
    assert sum(layout) == count
    assert min(layout) >= 1 and max(layout) <= AT_MOST_IN_A_ROW
    measured = list(PANELS.values())[:count]
    names = ["step", *(name for lines in measured for name, _, _ in lines)]
    figure = curves([{name: row[name] for name in names} for row in rows(4)], [], "a run")
    cells = [axis.get_subplotspec() for axis in figure.axes]
    covered = sum(len(cell.rowspan) * len(cell.colspan) for cell in cells)
    assert covered == len(layout) * 6


def test_one_step_and_no_evaluation_are_drawn_too() -> None:
    axis = panels(curves(rows(1), [], "a run"))["reward"]
    assert axis.get_xlim() == (0, 2)
