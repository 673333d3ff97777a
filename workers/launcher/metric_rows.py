"""The rows of `metrics.jsonl` and `evals.jsonl`: added up over steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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


def mean(rows: list[dict[str, Any]], name: str) -> float | None:
    """Mean of a metric over the steps that have it."""
    values = [value for _, value in points(rows, name)]
    return fmean(values) if values else None


def largest(rows: list[dict[str, Any]], name: str) -> float | None:
    """Largest value of a metric."""
    return max((value for _, value in points(rows, name)), default=None)
