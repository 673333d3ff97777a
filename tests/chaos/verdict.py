"""What must hold after a run under blows, whoever was killed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tests.chaos.run import ChaosRun


def problems(run: ChaosRun) -> list[str]:
    """What does not hold, in words: by `onstream audit`, and by the ledger read apart from it."""
    found = run.audit()
    ledger = run.rows("trained.jsonl")
    dropped = sorted(
        {uid for uids in found["dropped"].values() for uid in uids} | set(found["dead"])
    )
    numbers = [row["number"] for row in ledger]
    trained = {row["number"] for row in ledger if row["fate"] == "trained"}
    issued = set(range(1, len(found["issued"]) + 1))
    steps = [row["step"] for row in run.rows("metrics.jsonl")]
    checks = {
        f"lost: {found['lost'][:10]}": not found["lost"],
        f"duplicated: {found['duplicated'][:10]}": not found["duplicated"],
        "a number has two lines in the ledger": len(numbers) == len(set(numbers)),
        "trained is not what was issued, less what was dropped": {
            uid(run, n) for n in issued - trained
        }
        == {*dropped, *found["in_flight"]},
        f"steps in the metrics: {steps}": steps == list(range(1, run.steps + 1)),
        "fewer rollouts were trained than the metrics say": len(trained)
        == sum(row["rollouts"] for row in run.rows("metrics.jsonl")),
        "the last version was not evaluated": run.exact() is not None,
    }
    return [words for words, holds in checks.items() if not holds]


def uid(run: ChaosRun, number: int) -> str:
    """The uid of `number`."""
    return f"{run.directory.name}/{number}"


def summary(run: ChaosRun) -> dict[str, Any]:
    """The audit's counts, the blows and the result."""
    found = run.audit()
    counts: dict[str, Any] = {name: len(uids) for name, uids in found.items() if name != "dropped"}
    counts["dropped"] = {reason: len(uids) for reason, uids in found["dropped"].items()}
    evaluations = Counter(row["version"] for row in run.rows("evals.jsonl"))
    return {
        "blows": dict(run.dealt),
        "audit": counts,
        "evaluated": dict(evaluations),
        "exact": run.exact(),
    }
