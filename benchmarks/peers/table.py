"""The table: medians with their spread, and what Onstream comes to of TRL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.kept_results import Result
from benchmarks.peers.sizes import Size

GIB = 2**30


@dataclass(frozen=True)
class Spread:
    """The median of some values, and the least and the largest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of no values."""
        if not values:
            return None
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Column:
    """A measured value: its key in a result, its title, and how it is shown."""

    key: str
    title: str
    show: Callable[[float], str]


def three_digits(value: float) -> str:
    """At least three digits, and no exponent: 0.0753, 5.47, 1,729."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


COLUMNS = (
    Column("rollouts_per_s", "rollouts/s", three_digits),
    Column("tokens_per_s", "tokens/s", three_digits),
    Column("cpu_s_per_rollout", "CPU ms a rollout", lambda value: three_digits(1000 * value)),
    Column("seconds_to_goal", "seconds to .95", lambda value: f"{value:.1f}"),
    Column("steps_to_goal", "steps to .95", lambda value: f"{value:g}"),
    Column("peak_bytes", "peak memory, GiB", lambda value: f"{value / GIB:.2f}"),
)


@dataclass(frozen=True)
class Rounds:
    """The rounds of one size: by contender, a result for each round, in their order."""

    size: Size
    results: Mapping[str, Sequence[Result]]

    def ratios(self, contender: str, base: str) -> dict[str, Spread | None]:
        """By column: `contender` over `base`, each round by itself."""
        rounds = list(zip(self.results[contender], self.results[base], strict=False))
        return {
            column.key: Spread.of(
                [
                    ours[column.key] / theirs[column.key]
                    for ours, theirs in rounds
                    if ours.get(column.key) and theirs.get(column.key)
                ]
            )
            for column in COLUMNS
        }

    def spreads(self, contender: str) -> dict[str, Spread | None]:
        """By column: the values of `contender` over its rounds; those it does not have left out."""
        return {
            column.key: Spread.of(
                [one[column.key] for one in self.results[contender] if one.get(column.key)]
            )
            for column in COLUMNS
        }

    def missed(self, contender: str) -> int:
        """In how many rounds the goal was looked for and not reached."""
        return sum(
            "steps_to_goal" in one and one["steps_to_goal"] is None
            for one in self.results[contender]
        )


def table_of(sizes: Sequence[Rounds]) -> Table:
    """One table of all sizes: the contenders, then what each of Onstream comes to of the first."""
    titles = [column.title for column in COLUMNS]
    table = Table("size", "", *titles, "timed steps", "rounds", show_lines=False)
    for rounds in sizes:
        names = list(rounds.results)
        for name in names:
            table.add_row(f"({rounds.size.name})", name, *_measured(rounds, name))
        for name in names[1:]:
            table.add_row("", f"{name} / {names[0]}", *_ratios(rounds.ratios(name, names[0])))
        table.add_section()
    return table


def as_json(sizes: Sequence[Rounds]) -> list[dict[str, Any]]:
    """The same as data: of each size the results, the spreads and the ratios."""
    return [
        {
            "size": rounds.size.name,
            "title": rounds.size.title,
            "results": rounds.results,
            "spreads": {name: _plain(rounds.spreads(name)) for name in rounds.results},
            "ratios": {
                f"{name} / {base}": _plain(rounds.ratios(name, base))
                for base, *others in [list(rounds.results)]
                for name in others
            },
        }
        for rounds in sizes
    ]


def _measured(rounds: Rounds, name: str) -> list[str]:
    spreads = rounds.spreads(name)
    cells = [shown(spreads[column.key], column.show) for column in COLUMNS]
    if missed := rounds.missed(name):
        place = [column.key for column in COLUMNS].index("steps_to_goal")
        cells[place] += f", not in {missed} of {len(rounds.results[name])} runs"
    steps = sorted({one["timed_steps"] for one in rounds.results[name]})
    return [*cells, ", ".join(map(str, steps)), str(len(rounds.results[name]))]


def _ratios(ratios: Mapping[str, Spread | None]) -> list[str]:
    cells = [shown(ratios[column.key], lambda value: f"{value:.2f}") for column in COLUMNS]
    return [*cells, "", ""]


def shown(spread: Spread | None, show: Callable[[float], str]) -> str:
    """The median, and the least and largest value; a dash where there is none."""
    if spread is None:
        return "–"
    return f"{show(spread.median)} ({show(spread.low)}–{show(spread.high)})"


def _plain(spreads: Mapping[str, Spread | None]) -> dict[str, dict[str, float] | None]:
    return {key: asdict(spread) if spread else None for key, spread in spreads.items()}
