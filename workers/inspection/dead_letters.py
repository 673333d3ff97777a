"""`onstream dead`: the rollouts of a run that were given up, why, and what an operator asks the
trainer to do about them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onstream.pipeline.errors import UserError
from onstream.pipeline.records import (
    RecordError,
    Rollout,
    Sample,
    decode_work,
    ids_array,
    logprobs_array,
    mask_array,
)
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.dead_letters import all_letters
from onstream.pipeline.redis.operator_requests import Wish
from onstream.pipeline.redis.run_state import DeadLetter

NUMBERS_SHOWN = 8
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
}


def dead(bus: Bus, run_dir: Path) -> dict[str, Any]:
    """The dead letters of a run by stage and reason, as JSON data. Reasons that differ in numbers
    alone are one.

    `requeued` gives, by dead uid, the uid asked for in its place. `requests` counts what the
    trainer has not served yet.
    """
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for letter in all_letters(bus, run_dir):
        group = groups.setdefault((letter.stage, kind_of(letter.reason)), _group(letter))
        group["count"] += 1
        group["uids"].append(f"{bus.run}/{letter.number}")
    requeued = {
        f"{bus.run}/{old}": f"{bus.run}/{new}"
        for new, old in sorted(bus.requests.requeued().items())
    }
    rows = sorted(groups.values(), key=lambda group: -int(group["count"]))
    return {
        "run": bus.run,
        "reasons": rows,
        "requeued": requeued,
        "requests": sum(1 for _ in bus.requests.waiting()),
    }


def kind_of(reason: str) -> str:
    """`reason` without what differs from one record to the next.

    >>> kind_of("a prompt of 900 tokens; the context has 512")
    'a prompt of # tokens; the context has #'
    """
    return _DIGITS.sub("#", reason)


def show_list(found: dict[str, Any], console: Console) -> None:
    """Print what `dead` returned, for people."""
    total = sum(group["count"] for group in found["reasons"])
    console.print(
        Text(
            f"run {found['run']}: {total} dead letters; {found['requests']} requests wait for the trainer"
        ),
        soft_wrap=True,
    )
    table = Table("letters", "stage", "reason", "uids", box=None, pad_edge=False)
    for group in found["reasons"]:
        uids = [
            f"{uid} (now {found['requeued'][uid]})" if uid in found["requeued"] else uid
            for uid in group["uids"][:NUMBERS_SHOWN]
        ]
        more = ["…"] if group["count"] > NUMBERS_SHOWN else []
        table.add_row(
            *(
                Text(str(cell))
                for cell in (
                    group["count"],
                    group["stage"],
                    group["reason"],
                    ", ".join(uids + more),
                )
            )
        )
    console.print(table)


def show(bus: Bus, run_dir: Path, uid: str) -> list[dict[str, Any]]:
    """Everything about the dead letters of `uid` as JSON data: why, where, and the record itself.

    Raises:
        UserError: it has none.
    """
    number = number_of(bus.run, uid)
    found = [
        _readable(bus.run, letter)
        for letter in all_letters(bus, run_dir)
        if letter.number == number
    ]
    if not found:
        raise _no_letter(bus, uid)
    return found


def ask(
    bus: Bus,
    run_dir: Path,
    wish: Wish,
    uids: Sequence[str],
    reason: str | None,
    *,
    everything: bool,
) -> list[str]:
    """Ask the trainer to requeue or purge dead letters: those of `uids`, of a `reason` (or a part
    of one), or all.

    Returns the uids it was asked for.

    Raises:
        UserError: nothing was chosen, or there is no such dead letter.
    """
    if bool(uids) + bool(reason) + everything != 1:
        raise UserError(
            f"{len(uids)} uids, {'a' if reason else 'no'} --reason, {'' if everything else 'no '}--all",
            expected="one way to say which dead letters are meant",
            next_step="Give uids such as 17, or --reason TEXT, or --all.",
        )
    numbers = {number_of(bus.run, uid): uid for uid in uids}
    letters = list(_chosen(all_letters(bus, run_dir), numbers, reason, everything=everything))
    if missing := [
        uid
        for number, uid in numbers.items()
        if number not in {letter.number for letter in letters}
    ]:
        raise _no_letter(bus, ", ".join(missing))
    if wish == "requeue":
        letters = [
            letter
            for letter in {letter.number: letter for letter in letters}.values()
            if letter.number > 0
        ]
    for letter in letters:
        bus.requests.add(wish, letter.number, letter.entry_id)
    return [f"{bus.run}/{letter.number}" for letter in letters]


def number_of(run: str, uid: str) -> int:
    """The number in a uid, written `run/17` or `17`.

    Raises:
        UserError: it is none of this run.
    """
    text = uid.removeprefix(f"{run}/")
    if not text.isdigit():
        raise UserError(
            f"uid {uid!r}",
            expected=f"a uid of run {run}",
            next_step=f"Write it as {run}/17, or as 17.",
        )
    return int(text)


def _group(letter: DeadLetter) -> dict[str, Any]:
    return {"stage": letter.stage, "reason": letter.reason, "count": 0, "uids": []}


def _chosen(
    letters: Iterable[DeadLetter], numbers: Iterable[int], reason: str | None, *, everything: bool
) -> Iterator[DeadLetter]:
    wanted = set(numbers)
    for letter in letters:
        by_reason = reason is not None and (
            reason in letter.reason or kind_of(reason) == kind_of(letter.reason)
        )
        if everything or letter.number in wanted or by_reason:
            yield replace(letter, payload=b"")  # ten thousand payloads would take a lot of memory


def _readable(run: str, letter: DeadLetter) -> dict[str, Any]:
    entry = letter.entry_id.decode()
    died_s = int(entry.partition("-")[0]) / 1000  # Redis numbers entries by its clock
    head = {
        "uid": f"{run}/{letter.number}",
        "stage": letter.stage,
        "reason": letter.reason,
        "deliveries": letter.deliveries,
    }
    return {
        **head,
        "worker": letter.worker,
        "died": died_s,
        "entry": entry,
        "bytes": len(letter.payload),
        **_record(letter.payload),
    }


def _record(payload: bytes) -> dict[str, Any]:
    """The record in `payload`, its arrays as lists; of bytes that are none, the first of them."""
    try:
        record = decode_work(payload)
    except RecordError as error:
        return {
            "record": None,
            "problem": str(error),
            "first_bytes": payload[:BYTES_SHOWN].hex(" "),
        }
    fields = {name: getattr(record, name) for name in record.__struct_fields__}
    if isinstance(record, Rollout):
        fields["samples"] = [_sample(sample) for sample in record.samples]
    return {"kind": type(record).__name__, "record": msgspec.to_builtins(fields)}


def _sample(sample: Sample) -> dict[str, Any]:
    fields = {name: getattr(sample, name) for name in sample.__struct_fields__}
    arrays = {
        name: read(fields[name]).tolist()
        for name, read in _ARRAYS.items()
        if fields[name] is not None
    }
    return {**fields, **arrays}


def _no_letter(bus: Bus, uids: str) -> UserError:
    return UserError(
        f"no dead letter of {uids} in run {bus.run}",
        expected="the uid of one",
        next_step="`onstream dead list` shows which there are.",
    )
