"""What a run came to: `report.json` and `curves.png`, from the files in its directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import fsum
from pathlib import Path
from typing import Any

import msgspec

from onstream.pipeline.run_files.json_lines import read_rows
from onstream.settings.stages import StageName
from onstream.workers.launcher.curves import draw
from onstream.workers.launcher.metric_rows import Row, largest, mean, number, points, waited_for
from onstream.workers.launcher.scaling_decision import Window, one_more_worker

LAST_STEPS = 10
EVALUATED = ("version", "exact", "exact_swapped")
USAGE = ("cpu_seconds", "cpu_seconds_startup", "cores_busy", "balance")


def build(
    run_dir: Path,
    usage: Mapping[str, Any] | None = None,
    dead_letters: Sequence[Mapping[str, Any]] | None = None,
    workers: Mapping[StageName, int] | None = None,
) -> dict[str, Any]:
    """Write `report.json` and `curves.png` into `run_dir` and return the report.

    `usage` holds the CPU seconds and the workers that were added, which only a launcher that saw
    the training knows, `dead_letters` how many there are of each stage and reason, and `workers`
    how many each stage has. Without them, what an earlier report says of them stays.
    """
    rows = read_rows(run_dir / "metrics.jsonl")
    evals = read_rows(run_dir / "evals.jsonl")
    report = summary(rows, evals) | _seen(run_dir, usage, dead_letters)
    if workers is not None and "cores_busy" in report:
        window = Window(report["rollouts_per_s"], report["waited_for"], report["cores_busy"])
        report["one_more_worker"] = one_more_worker(window, workers)
    text = msgspec.json.format(msgspec.json.encode(report), indent=2)
    temporary = run_dir / "report.json.tmp"
    temporary.write_bytes(text + b"\n")
    os.replace(temporary, run_dir / "report.json")
    if rows:
        draw(rows, evals, run_dir / "curves.png")
    return report


def of_files(run_dir: Path) -> dict[str, Any]:
    """The report of what the run's files hold now; nothing is written."""
    rows = read_rows(run_dir / "metrics.jsonl")
    evals = read_rows(run_dir / "evals.jsonl")
    return summary(rows, evals) | _seen(run_dir, None, None)


def _seen(
    run_dir: Path,
    usage: Mapping[str, Any] | None,
    dead_letters: Sequence[Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """What no file but an earlier report has."""
    path = run_dir / "report.json"
    earlier: dict[str, Any] = msgspec.json.decode(path.read_bytes()) if path.exists() else {}
    if usage is None:
        usage = {name: earlier[name] for name in (*USAGE, "one_more_worker") if name in earlier}
    if dead_letters is None:
        dead_letters = earlier.get("dead_letters", [])
    return {**usage, "dead_letters": dead_letters}


def summary(rows: list[dict[str, Any]], evals: list[dict[str, Any]]) -> dict[str, Any]:
    """The report of these metrics and evaluations.

    `seconds` is the wall-clock time of training, the sum over all steps. A step's time begins when
    the step before is done; for the first after a start, when all stages are ready and the first
    ticket is issued. Waiting, publishing and checkpoints count; start-up, and the time between an
    interruption and the resume, do not. `last` of a metric is the mean of the last 10 steps.
    `publish_bytes` is the mean size of an update; `delta_share` the mean share of weights that
    changed in a step, None without deltas. `dropped` and `dead` count the rollouts that no step
    trained on; `steps_without_gradient` the steps whose gradient was 0.
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
        "waited_for": waited_for(rows, seconds),
        "tokens": int(sum(number(row, "tokens") or 0 for row in rows)),
        "publish_bytes": mean(rows, "publish_bytes"),
        "delta_share": mean(rows, "delta_share"),
        "truncated_share": mean(rows, "truncated_share"),
        "unscored": _unscored(rows),
        "dropped": {
            "stale": _total(rows, "dropped_stale"),
            "other": _total(rows, "dropped_other"),
        },
        "dead": _total(rows, "dead"),
        "steps_without_gradient": sum(number(row, "grad_norm") == 0 for row in rows),
    }


def _unscored(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many trained rollouts have no reward, and the commonest reason of the last such step."""
    reasons = [row["unscored_reason"] for row in rows if row.get("unscored_reason")]
    return {
        "rollouts": _total(rows, "unscored"),
        "reason": reasons[-1] if reasons else None,
    }


def _total(rows: list[dict[str, Any]], name: str) -> int:
    return int(sum(number(row, name) or 0 for row in rows))


def evaluations(evals: list[dict[str, Any]]) -> dict[str, Any]:
    """Exact-match shares of the first policy (`before`) and of the last one evaluated (`after`).

    `swapped`, where that was asked for, has the shares of the same two where each prompt was shown
    another one's images. `reward` has their mean rewards.
    """
    last_of = {int(row["version"]): row for row in latest(evals)}
    before = last_of.get(0)
    after = last_of[max(last_of)] if last_of and max(last_of) > 0 else None
    return {
        "before": before and before["exact"],
        "after": after and after["exact"],
        "version": after and after["version"],
        "samples": (after or before or {}).get("samples"),
        **_change("swapped", "exact_swapped", before or {}, after or {}),
        **_change("reward", "reward", before or {}, after or {}),
    }


def _change(name: str, field: str, before: Row, after: Row) -> dict[str, Any]:
    """`field` of two evaluations, under `name`; nothing where neither has it."""
    values = {"before": before.get(field), "after": after.get(field)}
    return {name: values} if any(value is not None for value in values.values()) else {}


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
    """|trainer − generator| over the tokens of all steps, in nats, by the tokens' staleness.

    Of each staleness the mean, the largest, and the number of tokens.
    """
    found: dict[int, list[dict[str, float]]] = {}
    for row in rows:
        for staleness, mismatch in (row.get("mismatch_by_staleness") or {}).items():
            found.setdefault(int(staleness), []).append(mismatch)
    return {str(staleness): _together(found[staleness]) for staleness in sorted(found)}


def _together(mismatches: list[dict[str, float]]) -> dict[str, float]:
    """The mean over all tokens, and the largest, of the mismatches of several steps."""
    tokens = sum(one["tokens"] for one in mismatches)
    weighted = fsum(one["mean"] * one["tokens"] for one in mismatches)
    return {
        "mean": weighted / tokens,
        "max": max(one["max"] for one in mismatches),
        "tokens": tokens,
    }


def _share(rows: list[dict[str, Any]], name: str, whole: float) -> float | None:
    return sum(value for _, value in points(rows, name)) / whole if whole else None
