"""What a run came to: `report.json` and `curves.png`, made from `metrics.jsonl` and `evals.jsonl`
of its directory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from math import fsum
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from onstream.settings.decoding import UNDECODABLE

Row = Mapping[str, Any]
LAST_STEPS = 10
EVALUATED = ("version", "exact", "exact_swapped")
USAGE = ("cpu_seconds", "cpu_seconds_startup")


def build(run_dir: Path, usage: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write `report.json` and `curves.png` into `run_dir` and return the report.

    `usage` is what only a launcher that saw the training knows (CPU seconds); it is put beside the
    rest, and without it what an earlier report says of it stays.
    """
    rows = read_rows(run_dir / "metrics.jsonl")
    evals = read_rows(run_dir / "evals.jsonl")
    report = summary(rows, evals) | dict(
        usage if usage is not None else _earlier_usage(run_dir / "report.json")
    )
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    temporary = run_dir / "report.json.tmp"
    temporary.write_bytes(text + b"\n")
    os.replace(temporary, run_dir / "report.json")
    if rows:
        draw(rows, evals, run_dir / "curves.png")
    return report


def _earlier_usage(path: Path) -> dict[str, Any]:
    earlier: dict[str, Any] = msgspec.json.decode(path.read_bytes()) if path.exists() else {}
    return {name: earlier[name] for name in USAGE if name in earlier}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, none if it does not exist. A last line that a kill cut short is
    left out.

    Raises:
        ValueError: another line than the last is not a JSON object.
    """
    if not path.exists():
        return []
    whole, _, _cut = path.read_bytes().rpartition(b"\n")
    try:
        return [
            msgspec.json.decode(line, type=dict[str, Any]) for line in whole.split(b"\n") if line
        ]
    except UNDECODABLE as error:
        raise ValueError(f"{path}: {error}") from error


def summary(rows: list[dict[str, Any]], evals: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of these metrics and evaluations.

    `seconds` is the wall-clock time of training: over all steps, the time since the step before was
    done or, for the first step after a start, since all stages were ready and the first ticket was
    issued. Waiting, publishing and checkpoints are in it; start-up, and the time between an
    interruption and the resume, are not. `last` of a metric is the mean of the last 10 steps.
    `publish_bytes` is the mean size of an update, `delta_share` that of the share of weights that
    changed in a step, None without deltas.
    """
    seconds = sum(value for _, value in points(rows, "elapsed_s"))
    rollouts = int(sum(number(row, "rollouts") or 0 for row in rows))
    return {
        "steps": int(rows[-1]["step"]) if rows else 0,
        "seconds": round(seconds, 3),
        "rollouts": rollouts,
        "rollouts_per_s": round(rollouts / seconds, 2) if seconds else None,
        "eval": evaluations(evals),
        "evals": [{name: row[name] for name in EVALUATED if name in row} for row in latest(evals)],
        "teacher_kl": first_and_last(rows, "teacher_kl"),
        "reward": first_and_last(rows, "reward"),
        "loss": first_and_last(rows, "loss"),
        "staleness": {"mean": mean(rows, "staleness_mean"), "max": largest(rows, "staleness_max")},
        "masked_share": mean(rows, "masked_share"),
        "mismatch_max": largest(rows, "mismatch_max"),
        "mismatch_by_staleness": mismatch_by_staleness(rows),
        "wait_share": _share(rows, "wait_s", seconds),
        "tokens": int(sum(number(row, "tokens") or 0 for row in rows)),
        "publish_bytes": mean(rows, "publish_bytes"),
        "delta_share": mean(rows, "delta_share"),
    }


def evaluations(evals: list[dict[str, Any]]) -> dict[str, Any]:
    """Exact-match shares of the first policy (`before`) and of the last one evaluated (`after`),
    and what they were taken on.

    `swapped` has the shares of the same two where each prompt was shown another one's images; it is
    there where that was asked.
    """
    last_of = {int(row["version"]): row for row in latest(evals)}
    before = last_of.get(0)
    after = last_of[max(last_of)] if last_of and max(last_of) > 0 else None
    return {
        "before": before and before["exact"],
        "after": after and after["exact"],
        "version": after and after["version"],
        "samples": (after or before or {}).get("samples"),
        **_swapped(before or {}, after or {}),
    }


def _swapped(before: Row, after: Row) -> dict[str, Any]:
    shares = {"before": before.get("exact_swapped"), "after": after.get("exact_swapped")}
    return {"swapped": shares} if any(share is not None for share in shares.values()) else {}


def latest(evals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last evaluation of each version, in the order of the versions."""
    return [row for _, row in sorted({int(row["version"]): row for row in evals}.items())]


def first_and_last(rows: list[dict[str, Any]], name: str) -> dict[str, float | None]:
    """The metric at the first step, and its mean over the last 10 steps."""
    return {
        "first": number(rows[0], name) if rows else None,
        "last": mean(rows[-LAST_STEPS:], name),
    }


def mismatch_by_staleness(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and largest |trainer − generator| over the tokens of all steps, in nats, by the tokens'
    staleness.
    """
    found: dict[int, list[dict[str, float]]] = {}
    for row in rows:
        for age, mismatch in (row.get("mismatch_by_staleness") or {}).items():
            found.setdefault(int(age), []).append(mismatch)
    return {
        str(age): {
            "mean": fsum(one["mean"] * one["tokens"] for one in found[age])
            / fsum(one["tokens"] for one in found[age]),
            "max": max(one["max"] for one in found[age]),
            "tokens": sum(one["tokens"] for one in found[age]),
        }
        for age in sorted(found)
    }


def number(row: Row, name: str) -> float | None:
    """A metric's value, or None where the step has none."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def mean(rows: list[dict[str, Any]], name: str) -> float | None:
    """Mean of a metric over the steps that have it."""
    values = [value for _, value in points(rows, name)]
    return fmean(values) if values else None


def largest(rows: list[dict[str, Any]], name: str) -> float | None:
    """Largest value of a metric."""
    return max((value for _, value in points(rows, name)), default=None)


def points(rows: list[dict[str, Any]], name: str) -> Iterator[tuple[int, float]]:
    """(step, value) of the steps that have the metric."""
    for row in rows:
        if (value := number(row, name)) is not None:
            yield int(row["step"]), value


def _share(rows: list[dict[str, Any]], name: str, whole: float) -> float | None:
    return sum(value for _, value in points(rows, name)) / whole if whole else None


INK = "#1f4e79"
QUIET = "#9aa5b1"
SECOND = "#c8553d"
# title -> the metrics drawn in it (name, label, colour), the first on top
PANELS: dict[str, tuple[tuple[str, str, str], ...]] = {
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
    """Draw the curves of the run's metrics into `path` (PNG), one panel for each subject that has
    values.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {
        title: lines
        for title, lines in PANELS.items()
        if any(list(points(rows, name)) for name, _, _ in lines)
    }
    columns = min(3, max(1, len(panels)))
    figure, axes = pyplot.subplots(
        math.ceil(len(panels) / columns) or 1,
        columns,
        figsize=(4.3 * columns, 3.1 * math.ceil(len(panels) / columns)),
        squeeze=False,
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


def _draw_panel(
    axis: Any, rows: list[dict[str, Any]], title: str, lines: tuple[tuple[str, str, str], ...]
) -> None:
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
