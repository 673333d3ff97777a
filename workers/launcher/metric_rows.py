"""The rows of `metrics.jsonl` and `evals.jsonl`: read, and added up over steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from onstream.settings.decoding import UNDECODABLE

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none if it does not exist.

    A last line that a kill cut short is left out.

    Raises:
        ValueError: another line than the last is not a JSON object.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    lines = [line for line in whole.split(b"\n") if line]
    try:
        return [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]
    except UNDECODABLE as error:
        raise ValueError(f"{path}: {error}") from error


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
