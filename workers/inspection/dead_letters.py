"""`onstream dead`: the rollouts of a run that were given up, and what operators ask about them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from onstream.pipeline.errors import UserError
from onstream.pipeline.record_codec import (
    RecordError,
    decode_unchecked,
    ids_array,
    logprobs_array,
    mask_array,
)
from onstream.pipeline.records import Episode, Rollout, Sample
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.dead_letters import all_letters
from onstream.pipeline.redis.operator_requests import RequestKind
from onstream.pipeline.redis.run_state import DeadLetter
from onstream.workers.inspection.tables import add_row, plain_table

ROLLOUTS_SHOWN = 8
BYTES_SHOWN = 256
_DIGITS = re.compile(r"\d+")
_ARRAYS: dict[str, Callable[[bytes], Any]] = {
    "prompt_ids": ids_array,
    "completion_ids": ids_array,
    "loss_mask": mask_array,
    "generator_logprobs": logprobs_array,
    "teacher_logprobs": logprobs_array,
    "teacher_top_ids": ids_array,
    "teacher_top_logprobs": logprobs_array,
    "teacher_tail_logprobs": logprobs_array,
    "teacher_prompt_ids": ids_array,
}


def dead_by_reason(bus: Bus, run_dir: Path) -> dict[str, Any]:
    """The dead letters of a run by stage and reason, as JSON data.

    Reasons that differ in numbers alone are one. `requeued` gives, by dead rollout, the one that
    was asked for in its place. `requests` counts what the trainer has not done yet.
    """
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for letter in all_letters(bus, run_dir):
        key = (letter.stage, without_numbers(letter.reason))
        if key not in groups:
            groups[key] = {"stage": letter.stage, "reason": letter.reason, "count": 0, "uids": []}
        groups[key]["count"] += 1
        groups[key]["uids"].append(f"{bus.run}/{letter.number}")
    requeued = {
        f"{bus.run}/{old}": f"{bus.run}/{new}"
        for new, old in sorted(bus.requests.requeued().items())
    }
    return {
        "run": bus.run,
        "reasons": sorted(groups.values(), key=lambda group: -int(group["count"])),
        "requeued": requeued,
        "requests": sum(1 for _ in bus.requests.waiting()),
    }


def without_numbers(reason: str) -> str:
    """`reason` without what differs from one record to the next.

    >>> without_numbers("a prompt of 900 tokens; the context has 512")
    'a prompt of # tokens; the context has #'
    """
    return _DIGITS.sub("#", reason)


def show_reasons(found: dict[str, Any], console: Console) -> None:
    """Print what `dead_by_reason` returned, for people."""
    total = sum(group["count"] for group in found["reasons"])
    requests = f"{found['requests']} requests wait for the trainer"
    heading = f"run {found['run']}: {total} dead letters; {requests}"
    console.print(Text(heading), soft_wrap=True)
    table = plain_table("letters", "stage", "reason", "rollouts")
    for group in found["reasons"]:
        rollouts = _rollouts(group["uids"], found["requeued"])
        add_row(table, group["count"], group["stage"], group["reason"], rollouts)
    console.print(table)


def _rollouts(uids: Sequence[str], requeued: Mapping[str, str]) -> str:
    shown = []
    for uid in uids[:ROLLOUTS_SHOWN]:
        shown.append(f"{uid} (now {requeued[uid]})" if uid in requeued else uid)
    if len(uids) > ROLLOUTS_SHOWN:
        shown.append("…")
    return ", ".join(shown)


def letters_of(bus: Bus, run_dir: Path, rollout: str) -> list[dict[str, Any]]:
    """The dead letters of a rollout, `17` or `run/17`, as JSON data with the record in them.

    Raises:
        UserError: it has none.
    """
    number = number_of(bus.run, rollout)
    letters = [letter for letter in all_letters(bus, run_dir) if letter.number == number]
    if not letters:
        raise _no_letter(bus, rollout)
    return [_readable(bus.run, letter) for letter in letters]


def ask_trainer(
    bus: Bus,
    run_dir: Path,
    kind: RequestKind,
    rollouts: Sequence[str],
    reason: str | None,
    *,
    everything: bool,
) -> list[str]:
    """Ask the trainer to requeue or purge dead letters.

    They are those of `rollouts` (`17` or `run/17`), of a `reason` or a part of one, or all. Returns
    the rollouts that the trainer is asked for, as `run/17`.

    Raises:
        UserError: not exactly one way to choose is used, or there is no such dead letter.
    """
    _require_one_choice(rollouts, reason, everything)
    numbers = {number_of(bus.run, rollout): rollout for rollout in rollouts}
    letters = [
        replace(letter, payload=b"")  # ten thousand payloads would take a lot of memory
        for letter in all_letters(bus, run_dir)
        if everything or letter.number in numbers or _has_reason(letter, reason)
    ]
    found = {letter.number for letter in letters}
    if missing := [rollout for number, rollout in numbers.items() if number not in found]:
        raise _no_letter(bus, ", ".join(missing))
    if kind == "requeue":
        letters = _once_each(letters)
    for letter in letters:
        bus.requests.add(kind, letter.number, letter.entry_id)
    return [f"{bus.run}/{letter.number}" for letter in letters]


def number_of(run: str, rollout: str) -> int:
    """The number of a rollout that is written `17` or `run/17`.

    Raises:
        UserError: it is not a rollout of this run.
    """
    text = rollout.removeprefix(f"{run}/")
    if not text.isdigit():
        raise UserError(
            f"rollout {rollout!r}",
            expected=f"the number of a rollout of run {run}",
            next_step=f"Write it as 17, or as {run}/17.",
        )
    return int(text)


def _require_one_choice(rollouts: Sequence[str], reason: str | None, everything: bool) -> None:
    given = []
    if rollouts:
        given.append(f"{len(rollouts)} numbers")
    if reason:
        given.append("--reason")
    if everything:
        given.append("--all")
    if len(given) != 1:
        raise UserError(
            " and ".join(given) or "no dead letters chosen",
            expected="one way to say which dead letters are meant",
            next_step="Give numbers such as 17, or --reason TEXT, or --all.",
        )


def _has_reason(letter: DeadLetter, reason: str | None) -> bool:
    if reason is None:
        return False
    return reason in letter.reason or without_numbers(reason) == without_numbers(letter.reason)


def _once_each(letters: Iterable[DeadLetter]) -> list[DeadLetter]:
    """The last letter of each rollout. Bytes that nobody could read are no rollout: number 0."""
    last = {letter.number: letter for letter in letters}
    return [letter for letter in last.values() if letter.number > 0]


def _readable(run: str, letter: DeadLetter) -> dict[str, Any]:
    return {
        "uid": f"{run}/{letter.number}",
        "stage": letter.stage,
        "reason": letter.reason,
        "deliveries": letter.deliveries,
        "worker": letter.worker,
        "died": letter.time,
        "entry": letter.entry_id.decode(),
        "bytes": len(letter.payload),
        **_record(letter.payload),
    }


def _record(payload: bytes) -> dict[str, Any]:
    """The record in `payload`, its arrays as lists; of bytes that are none, the first of them."""
    try:
        record = decode_unchecked(payload)
    except RecordError as error:
        first_bytes = payload[:BYTES_SHOWN].hex(" ")
        return {"record": None, "problem": str(error), "first_bytes": first_bytes}
    fields = {name: getattr(record, name) for name in record.__struct_fields__}
    if isinstance(record, Episode | Rollout):
        fields["samples"] = [_sample(sample) for sample in record.samples]
    return {"kind": type(record).__name__, "record": msgspec.to_builtins(fields)}


def _sample(sample: Sample) -> dict[str, Any]:
    fields = {name: getattr(sample, name) for name in sample.__struct_fields__}
    for name, read in _ARRAYS.items():
        if fields[name] is not None:
            fields[name] = read(fields[name]).tolist()
    return fields


def _no_letter(bus: Bus, rollouts: str) -> UserError:
    return UserError(
        f"no dead letter of {rollouts} in run {bus.run}",
        expected="the number of a rollout that has one",
        next_step="`onstream dead list` shows which there are.",
    )
