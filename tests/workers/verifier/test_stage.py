"""The verifier as a worker, on a real Redis."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import decode_work, encode, ids_bytes, logprobs_bytes
from onstream.pipeline.records import Rollout, Sample
from onstream.pipeline.redis.bus import Bus
from onstream.settings.root import Settings
from onstream.settings.sections.run import DeliverySettings
from onstream.workers.verifier.stage import Verifier

MISBEHAVING = "tests.workers.verifier.misbehaving:score"


def rollout(number: int, text: str = "", *earlier: str, **info: Any) -> Rollout:
    samples = [
        Sample(ids_bytes([1]), ids_bytes([2]), b"\1", logprobs_bytes([-1]), [], completion)
        for completion in (*earlier, text)
    ]
    return Rollout(
        number,
        0,
        1,
        0,
        [{"role": "user", "content": "?"}],
        info,
        samples,
        1.0,
        "stop",
        ["verify", "score", "train"],
    )


def worker_of(bus: Bus, limits: dict[str, Any] | None = None, **task: Any) -> Worker:
    settings = Settings.model_validate(
        {"task": task, "orchestrator": {"verification": limits or {"timeout": 0.3}}}
    )
    return Worker(Verifier(settings, bus), bus, DeliverySettings(), block_s=0.05)


@pytest.fixture
def verify(bus: Bus) -> Iterator[Any]:
    """Puts rollouts into the verifier's stream, lets a worker verify them, and gives what reached
    the next stage, by number.
    """
    workers: list[Worker] = []

    def run(*rollouts: Rollout, **task: Any) -> dict[int, Rollout]:
        workers.append(worker_of(bus, **task))
        workers[-1].stage.setup()
        for each in rollouts:
            bus.connection.ask(
                "XADD", bus.keys.streams["verify"], "*", "n", each.number, "b", encode(each)
            )
        while bus.state.backlog()["verify"]:
            workers[-1].turn()
        scored = [decode_work(entry.payload) for entry in bus.streams.read("score", 100)]
        return {record.number: record for record in scored if isinstance(record, Rollout)}

    yield run
    for worker in workers:
        worker.stage.close(finished=True)


def test_each_rollout_goes_on_with_its_reward_and_all_else_as_it_was(verify: Any) -> None:
    right, wrong = verify(rollout(1, "cba", answer="cba"), rollout(2, "cbx", answer="cba")).values()
    assert (right.reward, right.reward_parts, right.unscored) == (1.0, {"similarity": 1.0}, None)
    assert (wrong.reward, wrong.reward_parts, wrong.unscored) == (0.0, {"similarity": 2 / 3}, None)
    assert right.route == ["score", "train"]
    assert [timing.stage for timing in right.timings] == ["verify"]
    assert (right.samples, right.info, right.messages) == (
        [*rollout(1, "cba").samples],
        {"answer": "cba"},
        rollout(1).messages,
    )


def test_of_several_samples_the_last_one_holds_the_answer(verify: Any) -> None:
    assert verify(rollout(1, "cba", "let me see", "a tool said so", answer="cba"))[1].reward == 1.0


def test_a_rollout_without_samples_is_a_dead_letter(verify: Any, bus: Bus) -> None:
    empty = rollout(1, answer="cba")
    empty.samples = []
    assert verify(empty) == {}
    [letter] = bus.state.dead_letters()
    assert (letter.number, letter.stage) == (1, "verify")
    assert "Expected `array` of length >= 1" in letter.reason


def test_the_records_tell_the_rollouts_fault_from_the_scorers(verify: Any) -> None:
    misdeeds = ["loop_forever", "leave", "blame_the_rollout", "raise_error"]
    verified = verify(
        *[rollout(number, do=misdeed) for number, misdeed in enumerate(misdeeds, start=1)],
        rollout(5),
        scorer=MISBEHAVING,
    )
    told = {
        number: (record.reward, record.reward_parts, record.unscored)
        for number, record in verified.items()
    }
    assert told == {
        1: (0.0, {"timed_out": 1.0}, None),
        2: (0.0, {"crashed": 1.0}, None),
        3: (0.0, {"rollout_error": 1.0}, None),
        4: (None, {}, told[4][2]),
        5: (1.0, {}, None),
    }
    assert told[4][2].startswith("KeyError: 'no such thing' (misbehaving.py:")


def test_an_absurd_reward_leaves_the_rollout_unscored_with_the_reason(verify: Any) -> None:
    told = verify(rollout(1, do="give", give=1e30), rollout(2), scorer=MISBEHAVING)
    assert (told[1].reward, told[2].reward) == (None, 1.0)
    assert told[1].unscored == (
        "the scorer gave the reward 1e+30; expected -10000 to 10000 "
        "(orchestrator.verification.min_reward and max_reward)"
    )


def test_the_heartbeat_counts_each_kind_of_trouble(bus: Bus) -> None:
    worker = worker_of(bus, scorer=MISBEHAVING)
    worker.stage.setup()
    for number in (1, 2, 3):
        bus.connection.ask(
            "XADD",
            bus.keys.streams["verify"],
            "*",
            "n",
            number,
            "b",
            encode(rollout(number, do="raise_error")),
        )
    while bus.state.backlog()["verify"]:
        worker.turn()
    worker.stage.close(finished=False)
    assert worker.state.stats.numbers == {
        "unscored": 3,
        "timed_out": 0,
        "crashed": 0,
        "rollout_error": 0,
    }


def test_a_scorer_that_cannot_be_imported_stops_the_worker_before_it_takes_anything(
    bus: Bus,
) -> None:
    with pytest.raises(UserError, match="no_such_module"):
        worker_of(bus, scorer="no_such_module:score").stage.setup()


def test_the_verifier_imports_no_tensor_library() -> None:
    script = (
        "import sys, onstream.pipeline.loop\n"
        "import onstream.workers.verifier.stage, onstream.pipeline.child_processes.fork_server\n"
        "print({'torch', 'transformers', 'datasets', 'reasoning_gym'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
        == "set()\n"
    )


def test_a_program_is_run_in_its_sandbox_and_an_endless_one_scores_0_with_the_reason(
    verify: Any,
) -> None:
    right = rollout(1, "print(input()[::-1])")
    endless = rollout(2, "while True: pass")
    for each in (right, endless):
        each.info = {"tests": [{"input": "abc", "output": "cba"}]}
    # A busy machine may take seconds to start the right one.
    long, short = ({"timeout": 60, "sandbox": {"wall": wall}} for wall in (30, 1))
    verdicts = verify(right, scorer="code", limits=long)
    verdicts |= verify(endless, scorer="code", limits=short)
    assert (verdicts[1].reward, verdicts[1].reward_parts) == (1.0, {"passed": 1.0})
    assert (verdicts[2].reward, verdicts[2].reward_parts) == (
        0.0,
        {"passed": 0.0, "program_timed_out": 1.0},
    )
