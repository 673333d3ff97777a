"""What became of every rollout that was ever issued.

It is proven from the ledger and the streams, and not from counters.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.dead_letters import dead_numbers
from onstream.pipeline.redis.run_state import LOOKS
from onstream.pipeline.run_files import recording
from onstream.pipeline.run_files.json_lines import read_rows
from onstream.pipeline.run_files.ledger import LEDGER, Ledger, Settled, ledger_differs
from onstream.pipeline.run_files.recording import JournalMark, RecordingError
from onstream.settings.decoding import UNDECODABLE
from onstream.settings.stages import StreamName

DROPPED = ("stale", "not_verified", "group_dead", "purged")


def audit(run_dir: Path, bus: Bus) -> dict[str, Any]:
    """The rollouts of a run by what became of them, written `run/17`.

    Only what was issued counts. `beyond` says, in sentences, what else the streams and the ledger
    hold, and where the ledger, its checkpoint and the metrics contradict one another; it is there
    only where there is something to say.

    issued = trained + dropped + dead + in_flight + lost. `dropped` has a list for each reason.
    `duplicated` are those that were settled twice or that two entries carry; it and `lost` should
    be empty.

    A rollout that has left Redis for the run's journal, and that no checkpoint has yet, is in
    flight.

    Exact when the run stands still. While it moves, a rollout on its way counts once all the same.
    """
    # The order matters while the run moves: what was issued first, then the streams in the order
    # of the flow, the journal, and the ledger last. So a rollout that moves on is met at least
    # once.
    issued = range(1, bus.state.issued() + 1)
    episodes = bus.state.numbers_of_episodes()
    streams = {stream: bus.state.numbers(stream) for stream in bus.keys.streams}
    in_journal = _in_journal(run_dir)
    dead = dead_numbers(bus, run_dir)
    in_two_entries = _in_two_entries(bus, streams)
    ledger = list(Ledger(run_dir / LEDGER).read())

    fates: dict[int, str] = {line.number: line.fate for line in ledger}
    in_streams = episodes.union(*streams.values())
    numbers: dict[str, list[int]] = {
        name: [] for name in ("trained", *DROPPED, "dead", "in_flight", "lost")
    }
    for number in issued:
        if number in fates:
            numbers[fates[number]].append(number)
        elif number in dead:
            numbers["dead"].append(number)
        elif number in in_streams or number in in_journal:
            numbers["in_flight"].append(number)
        else:
            numbers["lost"].append(number)
    # An entry of a settled rollout only waits for its acknowledgement.
    duplicated = _settled_twice(ledger) | (in_two_entries - fates.keys())
    problems = contradictions(run_dir, ledger, streams, bus.state.issued())
    problems += _beside_the_path(streams, bus.state.path())
    return {
        "issued": _names(bus.run, issued),
        "trained": _names(bus.run, numbers["trained"]),
        "dropped": {reason: _names(bus.run, numbers[reason]) for reason in DROPPED},
        "dead": _names(bus.run, numbers["dead"]),
        "in_flight": _names(bus.run, numbers["in_flight"]),
        "lost": _names(bus.run, numbers["lost"]),
        "duplicated": _names(bus.run, sorted(duplicated)),
        **({"beyond": problems} if problems else {}),
    }


def contradictions(
    run_dir: Path,
    ledger: Sequence[Settled],
    streams: Mapping[StreamName, Sequence[int]],
    issued: int,
) -> list[str]:
    """What cannot be true of a run that has issued the numbers 1 … `issued`, in sentences."""
    found = []
    for stage, numbers in streams.items():
        if count := sum(not 0 < number <= issued for number in numbers):
            found.append(f"the stream of {stage} has {count} entries of numbers never issued")
    if count := sum(not 0 < line.number <= issued for line in ledger):
        found.append(f"the ledger has {count} lines of numbers never issued")
    mark = _newest_mark(run_dir)
    if mark and ledger_differs(run_dir / LEDGER, mark.ledger_bytes, mark.ledger_digest):
        found.append(f"the ledger is not the one that the checkpoint of step {mark.step} remembers")
    trained = Counter(line.step for line in ledger if line.fate == "trained")
    rows = {row["step"]: row["rollouts"] for row in read_rows(run_dir / "metrics.jsonl")}
    last = max(trained, default=0)
    counted = sum(count for step, count in rows.items() if step <= last)
    if rows and counted != trained.total():
        found.append(
            f"the metrics count {counted:g} rollouts trained up to step {last}, "
            f"the ledger {trained.total()}"
        )
    return found


def _beside_the_path(
    streams: Mapping[StreamName, Sequence[int]], path: Sequence[StreamName]
) -> list[str]:
    """Entries in the streams of stages that no rollout of the run passes, so that nobody reads."""
    return [
        f"the stream of {stage} has {len(numbers)} entries, and rollouts of this run pass "
        f"{' → '.join(path)}"
        for stage, numbers in streams.items()
        if numbers and path and stage not in path
    ]


class LedgerMark(msgspec.Struct, frozen=True):
    """What a checkpoint remembers of the ledger, among the fields of its `trainer.json`."""

    sequence: int
    step: int
    ledger_bytes: int
    ledger_digest: str | None = None
    journal: JournalMark | None = None


def _in_journal(run_dir: Path) -> set[int]:
    """The numbers that a trainer would take again from the run's journal."""
    found = set[int]()
    mark = _newest_mark(run_dir)
    sources = [recording.read_records(run_dir / recording.UNSETTLED)]
    for folder in (recording.JOURNAL, recording.FOLDER):
        directory = run_dir / folder
        first = 0  # of a journal that began after the newest checkpoint
        if mark and mark.journal and mark.journal.folder == folder:
            first = mark.journal.first
        first = max(first, recording.begin(directory))
        sources.append(recording.records(directory, first))
    for source in sources:
        # A trainer takes what is before the damage, and issues the rest again.
        with contextlib.suppress(RecordingError, OSError):
            found.update(record.number for record in source)
    return found


def _newest_mark(run_dir: Path) -> LedgerMark | None:
    """That of the newest checkpoint; read without the trainer's modules, which need torch."""
    marks = []
    for path in run_dir.glob("checkpoints/step-*/trainer.json"):
        # One that is pruned meanwhile, or torn, has no say.
        with contextlib.suppress(OSError, *UNDECODABLE):
            marks.append(msgspec.json.decode(path.read_bytes(), type=LedgerMark))
    return max(marks, key=lambda mark: mark.sequence, default=None)


def counted(found: dict[str, Any]) -> dict[str, Any]:
    """How many rollouts each list of an audit has; `beyond` as it is."""
    return {name: _count(name, members) for name, members in found.items()}


def _count(name: str, members: Any) -> Any:
    if isinstance(members, dict):
        return counted(members)
    return members if name == "beyond" else len(members)


def _settled_twice(ledger: Sequence[Settled]) -> set[int]:
    # A dead number that is purged has a line for each; anything else is written once.
    lines = Counter((line.number, line.fate == "purged") for line in ledger)
    return {number for (number, _), times in lines.items() if times > 1}


def _in_two_entries(bus: Bus, streams: Mapping[StreamName, Sequence[int]]) -> set[int]:
    """The numbers that two entries carry at once.

    They are in one stream, or in two on further looks as well. A record that moved on between the
    readings of two streams, or back, is in both of them, and that is no fault.
    """
    found: set[int] = set()
    for numbers in streams.values():
        entries = Counter(number for number in numbers if number)  # 0: it names none
        found.update(number for number, count in entries.items() if count > 1)
    in_later_streams: set[int] = set()
    order = tuple(streams)
    for stage in reversed(order):
        suspects = in_later_streams.intersection(streams[stage])
        for _ in range(LOOKS if suspects else 0):
            later = order[order.index(stage) + 1 :]
            suspects &= set(bus.state.numbers(stage))
            suspects &= {number for name in later for number in bus.state.numbers(name)}
        found |= suspects
        in_later_streams.update(streams[stage])
    return found


def _names(run: str, numbers: Iterable[int]) -> list[str]:
    return [f"{run}/{number}" for number in numbers]
