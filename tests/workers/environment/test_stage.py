"""The environment worker: episodes start, go on and end, whatever the environment does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import msgpack
from msgspec.structs import replace

from onstream.pipeline.errors import UserError
from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import decode_work, encode, ids_bytes, logprobs_bytes
from onstream.pipeline.records import Episode, Rollout, Sample, StageName, Ticket, VersionSpan
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome
from onstream.settings.root import Settings
from onstream.settings.sections.run import DeliverySettings
from onstream.workers.environment.stage import EnvironmentWorker
from onstream.workers.environment.trial import try_environment

ROUTE: list[StageName] = ["act", "score", "train"]
QUESTION = [{"role": "user", "content": "Where?"}]
Start = Callable[..., EnvironmentWorker]


def settings_of(tmp_path: Path, info: dict[str, Any]) -> Settings:
    problems = tmp_path / "problems.jsonl"
    problems.write_text(json.dumps({"prompt": "Where?", "answer": "", **info}) + "\n")
    return Settings.model_validate(
        {
            "task": {
                "name": "jsonl",
                "path": problems,
                "environment": "tests.workers.environment.games:Game",
                "max_turns": 3,
            },
            "eval": {"samples": 0},
            "orchestrator": {"verification": {"timeout": 0.5}},
        }
    )


@pytest.fixture
def start(tmp_path: Path, bus: Bus) -> Iterator[Start]:
    """Makes workers on one problem with an `info`, and closes them."""
    workers: list[EnvironmentWorker] = []

    def make(**info: Any) -> EnvironmentWorker:
        workers.append(EnvironmentWorker(settings_of(tmp_path, info), bus))
        workers[-1].setup()
        return workers[-1]

    yield make
    for worker in workers:
        worker.close(finished=True)


def ticket(number: int = 1) -> Ticket:
    return Ticket(number, (number - 1) // 4, 4, 0, 7, 0, ROUTE)


def handled(worker: EnvironmentWorker, record: Ticket | Episode) -> Outcome:
    """What the worker makes of one record."""
    outcomes = worker.handle([Delivery(b"1-0", record.number, record, 1, 1, 1.0)])
    while not outcomes:
        outcomes = worker.handle([])
    return outcomes[0]


def started(worker: EnvironmentWorker) -> Episode:
    record = handled(worker, ticket()).record
    assert isinstance(record, Episode)
    return record


def answered(episode: Episode, text: str, finish: Any = "stop") -> Episode:
    """The episode with a turn of the student, as a generator would send it on."""
    sample = Sample(
        ids_bytes([1]), ids_bytes([2]), b"\1", logprobs_bytes([-1]), [VersionSpan(0, 0, 1)], text
    )
    return replace(
        episode,
        messages=[*episode.messages, {"role": "assistant", "content": text}],
        samples=[sample],
        turns=episode.turns + 1,
        finish_reason=finish,
        route=episode.route[1:],
    )


def ended(worker: EnvironmentWorker, episode: Episode) -> Rollout:
    record = handled(worker, episode).record
    assert isinstance(record, Rollout)
    return record


def test_a_ticket_becomes_an_episode_that_has_all_that_any_worker_needs(start: Start) -> None:
    episode = started(start(turns=2))
    assert (episode.ticket, episode.messages) == (ticket(), QUESTION)
    assert (episode.route, episode.turns) == (["generate", *ROUTE], 0)
    assert [tool["function"]["name"] for tool in episode.tools] == ["tool"]
    assert msgpack.decode(episode.state)["turn"] == 0
    assert decode_work(encode(episode)) == episode


def test_another_worker_goes_on_where_one_left_off(start: Start) -> None:
    episode = decode_work(encode(answered(started(start(turns=2)), "Here")))
    assert isinstance(episode, Episode)
    again = handled(start(turns=2), episode).record
    assert isinstance(again, Episode)
    assert again.route == ["generate", *ROUTE]
    assert [message["content"] for message in again.messages] == ["Where?", "Here", "Here and?"]
    rollout = ended(start(turns=2), answered(again, "There"))
    assert [message["content"] for message in rollout.messages] == ["Where?", "Here", "Here and?"]
    assert rollout.samples[-1].completion_text == "There"
    assert (rollout.reward, rollout.reward_parts) == (0.5, {"turn": 2.0})
    assert (rollout.route, rollout.finish_reason) == (ROUTE, "stop")


def test_an_environment_that_never_ends_is_ended_by_the_bound_of_turns(start: Start) -> None:
    worker = start()
    record: Any = started(worker)
    while isinstance(record, Episode):
        record = handled(worker, answered(record, "on")).record
    assert (record.reward, record.reward_parts) == (0.75, {"turn": 3.0, "out_of_turns": 1.0})
    assert record.finish_reason == "length"


def test_a_turn_that_was_cut_off_is_the_last(start: Start) -> None:
    worker = start()
    rollout = ended(worker, answered(started(worker), "and so", "length"))
    assert (rollout.reward, rollout.finish_reason) == (0.25, "length")


@pytest.mark.parametrize("bound", ["tokens", "context"])
def test_an_episode_without_room_for_another_turn_ends_with_what_it_has(
    start: Start, bound: Any
) -> None:
    worker = start()
    episode = replace(answered(started(worker), "on"), bound=bound, reward=0.25)
    rollout = ended(worker, episode)
    assert (rollout.reward, rollout.reward_parts) == (0.25, {f"out_of_{bound}": 1.0})
    assert rollout.finish_reason == "length"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "KeyError: 'no such city' (games.py:"),
        ("exit", "SystemExit: 3"),
        ("wrong type", "TypeError: step returned a dict; expected a Stepped"),
        ("silence", "step gave no messages and did not end the episode"),
        ("speaks for the student", "expected a role of system, user or tool"),
        ("hoard", "the state has 10000"),
    ],
)
def test_an_environments_own_fault_leaves_the_reward_out(
    start: Start, how: str, reason: str
) -> None:
    worker = start(step=how)
    rollout = ended(worker, answered(started(worker), "on"))
    assert rollout.reward is None
    assert rollout.unscored is not None and reason in rollout.unscored
    assert worker.stats.numbers["unscored"] == 1


@pytest.mark.parametrize(
    ("how", "part"),
    [("hang", "timed_out"), ("die", "crashed"), ("rollout error", "rollout_error")],
)
def test_an_episode_whose_step_is_stopped_ends_with_nothing(
    start: Start, how: str, part: str
) -> None:
    worker = start(step=how)
    episode = replace(answered(started(worker), "on"), reward=0.5, reward_parts={"turn": 2.0})
    rollout = ended(worker, episode)
    assert (rollout.reward, rollout.reward_parts, rollout.unscored) == (0.0, {part: 1.0}, None)
    assert worker.stats.numbers[part] == 1
    assert isinstance(handled(start(), ticket()).record, Episode)  # and the next one is played


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "the environment could not start: KeyError: 'no such city'"),
        ("wrong type", "the environment could not start: TypeError: start returned a list"),
        ("die", "the environment could not start: crashed"),
    ],
)
def test_an_episode_that_cannot_start_is_a_dead_letter_with_the_reason(
    start: Start, tmp_path: Path, how: str, reason: str
) -> None:
    outcome = handled(start(start=how), ticket())
    assert outcome.record is None
    assert outcome.dead is not None and outcome.dead.startswith(reason)


def test_an_environment_that_starts_nothing_is_refused_before_a_run(tmp_path: Path) -> None:
    from onstream.pipeline.tasks import load_task

    settings = settings_of(tmp_path, {"start": "raise"})
    problem = load_task(settings).train(0)
    with pytest.raises(UserError, match="started none of 2 episodes: KeyError"):
        try_environment(settings, [problem, problem])
    try_environment(settings, [replace_info(problem, {})])


def replace_info(problem: Any, info: dict[str, Any]) -> Any:
    return type(problem)(problem.messages, info)


def test_through_real_streams_a_record_goes_back_and_forth(bus: Bus, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, {"turns": 2})
    stage = EnvironmentWorker(settings, bus)
    worker = Worker(stage, bus, DeliverySettings(), 0.05)
    lease = bus.lease.acquire(30)
    assert bus.lease.issue(lease, 0, [ticket(1), ticket(2)], 1000)
    assert bus.state.backlog()["act"] == 2
    stage.setup()
    for _ in range(2):
        while bus.state.backlog()["generate"] < 2:
            worker.turn()
        for entry in bus.streams.read("generate", 10):
            episode = decode_work(entry.payload)
            assert isinstance(episode, Episode)
            bus.connection.ask(
                "XADD",
                bus.keys.streams["act"],
                "*",
                "n",
                entry.number,
                "b",
                encode(answered(episode, "on")),
            )
            bus.connection.ask("XDEL", bus.keys.streams["generate"], entry.id)
    while bus.state.backlog()["score"] < 2:
        worker.turn()
    stage.close(finished=True)
    rollout = decode_work(bus.streams.read("score", 1)[0].payload)
    assert isinstance(rollout, Rollout)
    assert (rollout.number, rollout.route, rollout.reward) == (1, ["score", "train"], 0.5)
    assert bus.state.backlog()["act"] == 0
