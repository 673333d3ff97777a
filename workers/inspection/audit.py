"""What became of every rollout that was ever issued, proven from the ledger and the streams and not
from counters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onstream.pipeline.records import StageName
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.dead_letters import dead_numbers
from onstream.pipeline.redis.keys import STAGES
from onstream.pipeline.run_files.ledger import Ledger

DROPPED = ("stale", "not_verified", "group_dead", "purged")


def audit(run_dir: Path, bus: Bus) -> dict[str, Any]:
    """Sets of uids: issued = trained + dropped + dead + in_flight + lost; and duplicated, which
    should be empty.

    Exact when the run stands still. While it moves, the count of issued is read first, then the
    streams in the order of the flow and the ledger last, so that a rollout on its way is met at
    least once; and it counts once.

    `dropped` holds a set for each reason.
    """
    issued = range(1, bus.state.issued() + 1)
    streams = {stage: bus.state.numbers(stage) for stage in STAGES}
    dead = dead_numbers(bus, run_dir)
    doubled = _doubled(bus, streams)
    ledger = list(Ledger(run_dir / "trained.jsonl").read())
    fates = {line.number: line.fate for line in ledger}
    under_way = {number for numbers in streams.values() for number in numbers}

    sets: dict[str, list[int]] = {
        name: [] for name in ("trained", *DROPPED, "dead", "in_flight", "lost")
    }
    for number in issued:
        sets[_class(number, fates.get(number), dead, under_way)].append(number)
    # A dead number that is purged has a line for each; anything else is written once.
    lines = Counter((line.number, line.fate == "purged") for line in ledger)
    settled_twice = [number for (number, _), times in lines.items() if times > 1]
    sets["duplicated"] = sorted(
        {*settled_twice, *(number for number in doubled if number not in fates)}
    )
    return _report(bus.run, issued, sets)


def counted(found: dict[str, Any]) -> dict[str, Any]:
    """How many uids each set of an audit has."""
    return {
        name: counted(members) if isinstance(members, dict) else len(members)
        for name, members in found.items()
    }


def _class(number: int, fate: str | None, dead: set[int], under_way: set[int]) -> str:
    if fate is not None:
        return fate
    if number in dead:
        return "dead"
    return "in_flight" if number in under_way else "lost"


def _doubled(bus: Bus, streams: dict[StageName, list[int]]) -> set[int]:
    """Numbers that two entries carry at once: in one stream, or in two where the earlier stream
    still has it on a second look.

    A record that moved on between two readings is in both of them, and that is no fault.
    """
    found = {
        number
        for numbers in streams.values()
        for number, entries in Counter(numbers).items()
        if entries > 1
    }
    later: set[int] = set()
    for stage in reversed(STAGES):
        suspects = later.intersection(streams[stage])
        if suspects:
            found |= suspects.intersection(bus.state.numbers(stage))
        later.update(streams[stage])
    return found


def _report(run: str, issued: Iterable[int], sets: dict[str, list[int]]) -> dict[str, Any]:
    uids = {
        name: [f"{run}/{number}" for number in numbers]
        for name, numbers in {"issued": list(issued), **sets}.items()
    }
    dropped = {reason: uids.pop(reason) for reason in DROPPED}
    return {
        "issued": uids["issued"],
        "trained": uids["trained"],
        "dropped": dropped,
        "dead": uids["dead"],
        "in_flight": uids["in_flight"],
        "lost": uids["lost"],
        "duplicated": uids["duplicated"],
    }
