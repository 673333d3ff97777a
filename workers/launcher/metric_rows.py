"""The rows of `metrics.jsonl` and `evals.jsonl`: added up over steps."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]


def number(row: Row, name: str) -> float | None:
    """A metric's value, or None where the step has none."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def points(rows: list[dict[str, Any]], name: str) -> Iterator[tuple[int, float]]:
    """(step, value) of the steps that have the metric."""
    for row in rows:
        if (value := number(row, name)) is not None:
            yield int(row["step"]), value


def waited_for(rows: Iterable[Row], seconds: float) -> dict[str, float]:
    """Of `seconds`, the share that the trainer waited for each stage, the largest first."""
    waited: Counter[str] = Counter()
    for row in rows:
        waited.update(row.get("waited_for") or {})
    return {stage: spent / seconds for stage, spent in waited.most_common()} if seconds else {}


def mean(rows: list[dict[str, Any]], name: str) -> float | None:
    """Mean of a metric over the steps that have it."""
    values = [value for _, value in points(rows, name)]
    return fmean(values) if values else None


def largest(rows: list[dict[str, Any]], name: str) -> float | None:
    """Largest value of a metric."""
    return max((value for _, value in points(rows, name)), default=None)
