"""The operator's view of dead letters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.record_codec import encode, ids_bytes, logprobs_bytes, mask_bytes
from onstream.pipeline.records import Rollout, Sample, StageName, Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.dead_letters import FILE, spill_dead
from onstream.workers.inspection.dead_letters import ask_trainer, dead_by_reason, letters_of

SAMPLE = Sample(
    ids_bytes([1, 2]), ids_bytes([3]), mask_bytes([1]), logprobs_bytes([-0.5]), [], "words"
)


def add_dead_letter(
    bus: Bus, number: int, reason: str, payload: bytes | None = None, stage: str = "verify"
) -> None:
    if payload is None:
        payload = encode(Ticket(number, 0, 1, 0, 0, 0, ["train"]))
    fields = {
        "n": number,
        "b": payload,
        "stage": stage,
        "why": reason,
        "deliveries": 4,
        "worker": "w",
    }
    words = [part for field in fields.items() for part in field]
    bus.connection.ask("XADD", bus.keys.dead, "*", *words)


def requests_of(bus: Bus) -> list[tuple[str, int]]:
    return [(request.kind, request.number) for request in bus.requests.waiting()]


def test_letters_are_grouped_by_stage_and_by_reason_but_for_its_numbers(
    bus: Bus, tmp_path: Path
) -> None:
    for number, reason in ((1, "4 times in vain"), (2, "5 times in vain"), (3, "too long")):
        add_dead_letter(bus, number, reason)
    add_dead_letter(bus, 4, "too long", stage="generate")
    found = dead_by_reason(bus, tmp_path)
    assert [(group["stage"], group["reason"], group["uids"]) for group in found["reasons"]] == [
        ("verify", "4 times in vain", [f"{bus.run}/1", f"{bus.run}/2"]),
        ("verify", "too long", [f"{bus.run}/3"]),
        ("generate", "too long", [f"{bus.run}/4"]),
    ]


def test_spilled_letters_are_listed_with_those_in_redis(bus: Bus, tmp_path: Path) -> None:
    for number in range(1, 6):
        add_dead_letter(bus, number, "gave up")
    spill_dead(bus, tmp_path / FILE, keep=2)
    [group] = dead_by_reason(bus, tmp_path)["reasons"]
    assert sorted(group["uids"]) == [f"{bus.run}/{number}" for number in range(1, 6)]


def test_the_failing_record_is_readable_its_arrays_as_numbers(bus: Bus, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "say"}]
    info = {"answer": "a"}
    route: list[StageName] = ["verify", "train"]
    rollout = Rollout(7, 0, 1, 0, messages, info, [SAMPLE], 1.0, "stop", route)
    add_dead_letter(bus, 7, "gave up", encode(rollout))
    [letter] = letters_of(bus, tmp_path, f"{bus.run}/7")
    assert letter["stage"] == "verify"
    assert letter["reason"] == "gave up"
    assert letter["deliveries"] == 4
    assert letter["kind"] == "Rollout"
    sample = letter["record"]["samples"][0]
    assert sample["prompt_ids"] == [1, 2]
    assert sample["completion_ids"] == [3]
    assert sample["generator_logprobs"] == [-0.5]
    assert sample["teacher_logprobs"] is None
    assert json.loads(json.dumps(letter)) == letter


def test_bytes_that_are_no_record_are_shown_with_the_reason(bus: Bus, tmp_path: Path) -> None:
    add_dead_letter(bus, 0, "does not decode", b"\xff\x00rubbish")
    [letter] = letters_of(bus, tmp_path, "0")
    assert letter["record"] is None
    assert "do not decode" in letter["problem"]
    assert letter["first_bytes"].startswith("ff 00 72")


def test_letters_are_chosen_by_number_by_reason_or_all_at_once(bus: Bus, tmp_path: Path) -> None:
    for number, reason in ((1, "4 times in vain"), (2, "5 times in vain"), (3, "too long")):
        add_dead_letter(bus, number, reason)
    assert ask_trainer(bus, tmp_path, "requeue", ["3"], None, everything=False) == [f"{bus.run}/3"]
    ask_trainer(bus, tmp_path, "purge", [], "4 times in vain", everything=False)
    assert requests_of(bus) == [("requeue", 3), ("purge", 1), ("purge", 2)]
    assert len(ask_trainer(bus, tmp_path, "requeue", [], None, everything=True)) == 3


def test_what_has_no_number_can_be_purged_and_not_asked_for_anew(bus: Bus, tmp_path: Path) -> None:
    add_dead_letter(bus, 0, "does not decode", b"rubbish")
    assert ask_trainer(bus, tmp_path, "requeue", [], None, everything=True) == []
    assert ask_trainer(bus, tmp_path, "purge", [], None, everything=True) == [f"{bus.run}/0"]


@pytest.mark.parametrize(
    ("rollouts", "reason"), [([], None), (["1"], "gave up"), (["9"], None), (["other/1"], None)]
)
def test_a_choice_of_nothing_or_of_what_is_not_there_is_refused(
    bus: Bus, tmp_path: Path, rollouts: list[str], reason: str | None
) -> None:
    add_dead_letter(bus, 1, "gave up")
    with pytest.raises(UserError):
        ask_trainer(bus, tmp_path, "purge", rollouts, reason, everything=False)
    assert requests_of(bus) == []


def test_the_commands_print_what_they_found_and_say_that_no_trainer_is_there(
    bus: Bus, redis_url: str, tmp_path: Path
) -> None:
    add_dead_letter(bus, 1, "gave up")
    (tmp_path / bus.run).mkdir()
    (tmp_path / bus.run / "settings.toml").write_text(
        f'[run]\nname = "{bus.run}"\ndir = "{tmp_path}"\n'
    )

    def onstream(*arguments: str) -> str:
        redis = ["--set", f"redis.url={redis_url}"]
        command = [sys.executable, "-m", "onstream", "dead", *arguments, *redis]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    run_dir = str(tmp_path / bus.run)
    assert json.loads(onstream("list", run_dir, "--json"))["reasons"][0]["count"] == 1
    assert json.loads(onstream("show", run_dir, "1"))[0]["reason"] == "gave up"
    assert "no trainer is at work" in onstream("requeue", run_dir, "--all")
    assert requests_of(bus) == [("requeue", 1)]


def test_arrays_of_every_length_read_back(bus: Bus, tmp_path: Path) -> None:
    ids = np.arange(300, dtype=np.int32)
    long = Sample(ids_bytes(ids), b"", b"", b"", [], "")
    add_dead_letter(
        bus, 8, "gave up", encode(Rollout(8, 0, 1, 0, [], {}, [long], 1.0, "stop", ["train"]))
    )
    assert letters_of(bus, tmp_path, "8")[0]["record"]["samples"][0]["prompt_ids"] == ids.tolist()
