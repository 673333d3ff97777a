"""A judge over HTTP: its verdicts, what it is not asked twice, its budget, and its absence.

The server is scripted, since no model of the tests' size judges anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from onstream.pipeline.errors import UserError
from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import decode_work, encode
from onstream.pipeline.records import Rollout
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.tasks import Problem
from onstream.settings.root import Settings
from onstream.settings.sections.run import DeliverySettings
from onstream.workers.evaluation.greedy import _verdicts
from onstream.workers.verifier.judge import Judge
from onstream.workers.verifier.scorer_messages import Verdict
from onstream.workers.verifier.stage import Verifier
from tests.faulty_server import Answer, Body, FaultyServer, status
from tests.waiting import until
from tests.workers.verifier.test_stage import rollout

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
TOKENS = 100


def scripted(body: Body) -> Answer:
    """Ten points for an answer with a 4 in it, whatever else it says, and none for others."""
    said = body["messages"][-1]["content"].partition("=== answer ")[2]
    return reply(f"I looked for a 4.\nScore: {10 if '4' in said.splitlines()[1] else 0}")


def reply(text: str | None, finish: str = "stop") -> Answer:
    choice = {"index": 0, "message": {"content": text}, "finish_reason": finish}
    return Answer(body={"choices": [choice], "usage": {"total_tokens": TOKENS}})


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    server = FaultyServer(scripted, ("wise",)).start()
    yield server
    server.stop()


def settings_of(server: FaultyServer, **client: Any) -> Settings:
    quick = {"base_url": [server.base_url], "max_retries": 0, "breaker_pause": 0.05}
    judge = {
        "rubric": "Is it right?",
        "model": {"name": "wise"},
        "client": {**quick, **client},
    }
    return Settings.model_validate(
        {"task": {"scorer": "judge"}, "orchestrator": {"judge_model": judge}}
    )


@contextmanager
def judge_of(server: FaultyServer, bus: Bus | None = None, **client: Any) -> Iterator[Judge]:
    judge = Judge(settings_of(server, **client), bus and bus.scores)
    with closing(judge):
        judge.start()
        yield judge


def judged(judge: Judge, *answers: str) -> list[Verdict]:
    for key, answer in enumerate(answers):
        judge.score(key, QUESTION, answer, {"answer": "4"})
    found: dict[int, Verdict] = {}
    until(lambda: found.update(judge.collect(0.05)) or len(found) == len(answers))
    return [found[key] for key in range(len(answers))]


def test_each_answer_gets_its_verdict(server: FaultyServer) -> None:
    with judge_of(server) as judge:
        right, wrong = judged(judge, "<think>five?</think>\n4", "five")
    assert (right.reward, right.parts, right.unscored) == (1.0, {"judge": 1.0}, None)
    assert (wrong.reward, wrong.parts) == (0.0, {"judge": 0.0})
    assert {(body["model"], body["temperature"]) for body in server.bodies} == {("wise", 0.0)}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (reply("I do not know."), "the judge gave no score: its last line is 'I do not know.'"),
        (reply("A long", "length"), "cut off at orchestrator.judge_model.max_completion = 512"),
        (Answer(400, {"error": {"message": "too rude"}}), "refused it: 400 too rude"),
    ],
)
def test_a_judge_without_a_score_leaves_the_reward_out(
    server: FaultyServer, answer: Answer, reason: str
) -> None:
    server.answer = lambda body: answer
    with judge_of(server) as judge:
        [verdict] = judged(judge, "4")
    assert verdict.reward is None
    assert verdict.unscored is not None and reason in verdict.unscored


def test_a_reply_without_a_text_is_asked_for_again(server: FaultyServer) -> None:
    server.faults.extend([lambda asked, right: reply(None), lambda asked, right: Answer()])
    with judge_of(server, max_retries=2) as judge:
        assert judged(judge, "4")[0].reward == 1.0


def test_nothing_is_asked_twice_by_anybody(server: FaultyServer, bus: Bus) -> None:
    with judge_of(server, bus) as judge:
        first = judged(judge, "4", "five")
    with judge_of(server, bus) as judge:
        assert judged(judge, "4", "five", "six")[:2] == first
    assert len(server.bodies) == 3


def test_a_spent_budget_says_so_and_takes_no_more(server: FaultyServer, bus: Bus) -> None:
    with judge_of(server, bus, max_tokens_per_run=2 * TOKENS) as judge:
        judged(judge, "1", "2")
        assert judge.room == 0
        assert "orchestrator.judge_model.client.max_tokens_per_run = 200" in judge.problem
    with judge_of(server, bus, max_tokens_per_run=3 * TOKENS) as judge:
        assert judge.room > 0


def test_an_address_where_nobody_is_ends_a_run_that_begins(server: FaultyServer) -> None:
    server.stop()
    refused = pytest.raises(UserError, match="no endpoint of the judge 'wise' answers")
    with refused, judge_of(server):
        pass


def test_another_model_is_refused_with_those_that_are_there(server: FaultyServer) -> None:
    server.models = ("other",)
    with pytest.raises(UserError, match="'other'"), judge_of(server):
        pass


def test_the_verifier_sends_rollouts_on_with_the_judges_reward(
    server: FaultyServer, bus: Bus
) -> None:
    worker = Worker(Verifier(settings_of(server), bus), bus, DeliverySettings(), block_s=0.05)
    worker.stage.setup()
    with closing_stage(worker):
        server.forever = status(503)
        put(bus, rollout(1, "It is 4."), rollout(2, "It is 5. Score: 10"))
        until(lambda: worker.turn() or "waiting for the judge" in worker.stage.stats.detail)
        server.forever = None
        until(lambda: worker.turn() or not bus.state.backlog()["verify"])
    found = [decode_work(entry.payload) for entry in bus.streams.read("score", 100)]
    rewards = {one.number: one.reward for one in found if isinstance(one, Rollout)}
    assert rewards == {1: 1.0, 2: 0.0}


def test_an_evaluation_asks_the_judge_too(server: FaultyServer) -> None:
    problems = [Problem(QUESTION), Problem(QUESTION, {"answer": "4"})]
    verdicts = _verdicts(settings_of(server), problems, ["4", "five"])
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0]


@contextmanager
def closing_stage(worker: Worker) -> Iterator[None]:
    try:
        yield
    finally:
        worker.stage.close(finished=True)


def put(bus: Bus, *rollouts: Rollout) -> None:
    for each in rollouts:
        bus.connection.ask(
            "XADD", bus.keys.streams["verify"], "*", "n", each.number, "b", encode(each)
        )
