"""Tickets become rollouts that a chat endpoint wrote; what it refuses, cannot do, or fails at is
told apart.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.http import endpoint_pool
from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import decode_work, ids_array, logprobs_array, mask_array
from onstream.pipeline.records import Rollout, StageName, Ticket
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery, Outcome
from onstream.pipeline.tasks import load_task
from onstream.settings.root import Settings
from onstream.workers.generator.chat_stage import ChatGenerator
from onstream.workers.tiny_models.character_tokenizer import character_tokenizer
from onstream.workers.trainer.batches.batch_builder import oldest_version
from tests.faulty_server import Answer, Body, serving

ROUTE: list[StageName] = ["verify", "train"]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_pool, "FIRST_WAIT_S", 0.001)


def settings_of(
    student_dir: Path,
    tmp_path: Path,
    *urls: str,
    client: dict[str, Any] | None = None,
    **source: Any,
) -> Settings:
    reached = {
        "base_url": list(urls),
        "timeout": 5.0,
        "breaker_pause": 0.1,
        "max_in_flight": 4,
        **(client or {}),
    }
    return Settings.model_validate(
        {
            "model": {"name": str(student_dir)},
            "run": {"dir": str(tmp_path), "name": "run"},
            "deployment": {"device": "cpu"},
            "inference": {"sampling": {"max_completion": 12}},
            "orchestrator": {
                "use_token_client": False,
                "batch_size": 8,
                "group_size": 4,
                "teacher_rollout_model": {
                    "client": reached,
                    "model": {"name": "teacher"},
                    **source,
                },
            },
            "trainer": {"loss": {"type": "sft"}},
        }
    )


@pytest.fixture
def make(student_dir: Path, tmp_path: Path, bus: Bus) -> Iterator[Callable[..., ChatGenerator]]:
    """Stages that are set up, with the endpoints at these addresses."""
    made: list[ChatGenerator] = []

    def build(*urls: str, **changes: Any) -> ChatGenerator:
        made.append(ChatGenerator(settings_of(student_dir, tmp_path, *urls, **changes), bus))
        made[-1].setup()
        return made[-1]

    yield build
    for stage in made:
        stage.close(finished=True)


def delivery(number: int, group_size: int = 4) -> Delivery:
    group = (number - 1) // group_size
    ticket = Ticket(
        number, group, group_size, group, 1000 + number, min_policy_version=7, route=list(ROUTE)
    )
    return Delivery(b"%d-0" % number, number, ticket, 50, 1, 1.0)


def reply(*texts: str, finish: str = "stop", **message: Any) -> Answer:
    choices = [
        {
            "index": at,
            "finish_reason": finish,
            "message": {"role": "assistant", "content": text, **message},
        }
        for at, text in enumerate(texts)
    ]
    return Answer(body={"choices": choices, "usage": {"total_tokens": 10}})


def as_asked(body: Body) -> Answer:
    """As many choices as were asked for, told apart by their place."""
    return reply(*(f"a{at}" for at in range(body.get("n", 1))))


def one_only(body: Body) -> Answer:
    """What a server does that does not know `n`."""
    return reply("a")


def finish(stage: ChatGenerator, new: list[Delivery]) -> dict[int, Outcome]:
    outcomes = {outcome.delivery.number: outcome for outcome in stage.handle(new)}
    while stage.busy:
        outcomes |= {outcome.delivery.number: outcome for outcome in stage.handle([])}
    return outcomes


def one_rollout(settings: Settings, bus: Bus) -> Rollout:
    """What a generator of `settings` makes of the first ticket."""
    stage = ChatGenerator(settings, bus)
    stage.setup()
    record = finish(stage, [delivery(1)])[1].record
    stage.close(finished=True)
    assert isinstance(record, Rollout)
    return record


def text(outcome: Outcome) -> str:
    assert isinstance(outcome.record, Rollout)
    return outcome.record.samples[-1].completion_text


def test_a_group_is_one_request_in_stock_fields_alone(
    make: Callable[..., ChatGenerator], student_dir: Path, tmp_path: Path
) -> None:
    with serving(as_asked) as (server, url):
        outcomes = finish(
            make(url, client={"api_key": "secret"}, temperature=0.8),
            [delivery(number) for number in range(1, 9)],
        )
    assert [text(outcomes[number]) for number in range(1, 9)] == ["a0", "a1", "a2", "a3"] * 2
    task = load_task(settings_of(student_dir, tmp_path))
    wanted = {"model": "teacher", "max_tokens": 12, "temperature": 0.8, "n": 4}
    in_order = sorted(server.bodies, key=str)
    assert in_order == sorted(
        [{**wanted, "messages": task.train(index).messages} for index in range(2)], key=str
    )
    assert server.asked[-1].headers["Authorization"] == "Bearer secret"
    assert server.asked[-1].path == "/v1/chat/completions"


def test_a_teacher_that_writes_is_asked_by_its_own_prompt_and_the_student_trained_on_its_own(
    student_dir: Path, tmp_path: Path, bus: Bus
) -> None:
    with serving(as_asked) as (server, url):
        plain = settings_of(student_dir, tmp_path, url)
        own = {"teacher_prompt": {"template": "{prompt} {answer}"}}
        made = [
            one_rollout(Settings.model_validate({**plain.model_dump(), **task}), bus)
            for task in ({}, {"task": own})
        ]
    question, answer = made[0].messages[0]["content"], made[0].info["answer"]
    assert [body["messages"][0]["content"] for body in server.bodies] == [
        question,
        f"{question} {answer}",
    ]
    assert made[0] == made[1]


def test_a_rollout_has_the_students_tokens_and_no_policy_that_wrote_it(
    make: Callable[..., ChatGenerator], student_dir: Path
) -> None:
    with serving(lambda body: reply("maerts")) as (_, url):
        outcome = finish(make(url), [delivery(1)])[1]
    rollout = outcome.record
    assert isinstance(rollout, Rollout)
    (sample,) = rollout.samples
    tokenizer = character_tokenizer()
    prompt = tokenizer.apply_chat_template(
        rollout.messages, add_generation_prompt=True, return_dict=False
    )
    assert ids_array(sample.prompt_ids).tolist() == prompt
    assert ids_array(sample.completion_ids).tolist() == tokenizer("maerts<|im_end|>").input_ids
    assert mask_array(sample.loss_mask).tolist() == [1] * 7
    assert logprobs_array(sample.generator_logprobs).tolist() == [0.0] * 7
    assert sample.completion_text == "maerts"
    assert (sample.version_spans, oldest_version(rollout)) == ([], None)
    assert (
        rollout.number,
        rollout.group,
        rollout.group_size,
        rollout.finish_reason,
        rollout.route,
    ) == (1, 0, 4, "stop", ROUTE)


def test_an_answer_that_was_cut_off_says_so_and_has_no_end_of_turn(
    make: Callable[..., ChatGenerator],
) -> None:
    with serving(lambda body: reply("mae", finish="length")) as (_, url):
        rollout = finish(make(url), [delivery(1)])[1].record
    assert isinstance(rollout, Rollout)
    assert rollout.finish_reason == "length"
    assert (
        ids_array(rollout.samples[0].completion_ids).tolist()
        == character_tokenizer()("mae").input_ids
    )


def test_an_endpoint_that_gives_fewer_choices_is_asked_for_the_rest_one_at_a_time(
    make: Callable[..., ChatGenerator],
) -> None:
    with serving(one_only) as (server, url):
        stage = make(url)
        outcomes = finish(stage, [delivery(number) for number in range(1, 5)])
        again = finish(stage, [delivery(number) for number in range(5, 9)])
    assert sorted(outcomes) == [1, 2, 3, 4] and sorted(again) == [5, 6, 7, 8]
    assert [body.get("n") for body in server.bodies] == [4, *[None] * 7]


def test_an_endpoint_that_refuses_several_choices_is_asked_one_at_a_time(
    make: Callable[..., ChatGenerator],
) -> None:
    def refuses_n(body: Body) -> Answer:
        return (
            Answer(400, {"error": {"message": "n is not supported"}}) if "n" in body else reply("a")
        )

    with serving(refuses_n) as (server, url):
        stage = make(url)
        outcomes = finish(stage, [delivery(number) for number in range(1, 5)]) | finish(
            stage, [delivery(5), delivery(6)]
        )
    assert all(isinstance(outcomes[number].record, Rollout) for number in range(1, 7))
    assert [body.get("n") for body in server.bodies] == [4, *[None] * 6]


def test_a_prompt_that_is_refused_costs_its_tickets_and_not_several_choices(
    make: Callable[..., ChatGenerator],
) -> None:
    def choosy(body: Body) -> Answer:
        refused = body["messages"] == first
        return (
            Answer(400, {"error": {"message": "I cannot answer that"}})
            if refused
            else as_asked(body)
        )

    with serving(choosy) as (server, url):
        stage = make(url)
        first = stage._task.train(0).messages
        refused = finish(stage, [delivery(number) for number in range(1, 5)])
        fine = finish(stage, [delivery(number) for number in range(5, 9)])
    assert {outcome.dead for outcome in refused.values()} == {
        f"the teacher 'teacher': {url} refused it: 400 I cannot answer that"
    }
    assert all(isinstance(outcome.record, Rollout) for outcome in fine.values())
    assert [body.get("n") for body in server.bodies] == [4, None, None, None, None, 4]


def test_greedy_answers_are_asked_for_one_at_a_time(make: Callable[..., ChatGenerator]) -> None:
    with serving(as_asked) as (server, url):
        finish(make(url, temperature=0.0), [delivery(number) for number in range(1, 5)])
    assert [(body["temperature"], body.get("n")) for body in server.bodies] == [(0.0, None)] * 4


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply("a", finish="content_filter"), "content filter stopped"),
        (reply(""), "cannot be trained on: the answer is empty"),
        (reply("a<|im_end|>"), "a control token of the student's tokenizer"),
        (
            reply("", tool_calls=[{"function": {"name": "add", "arguments": "{}"}}]),
            "cannot be trained on: the student's template drops a tool call of the answer",
        ),
        (reply("a" * 90), "tokens with its prompt, and the student's context is 96"),
        (Answer(body={"choices": []}), "has no choices"),
    ],
    ids=["content filter", "empty", "control token", "tool call", "too long", "no choices"],
)
def test_an_answer_that_cannot_be_trained_on_is_a_dead_letter_in_words(
    make: Callable[..., ChatGenerator], answer: Answer, words: str
) -> None:
    with serving(lambda body: answer) as (_, url):
        outcome = finish(make(url), [delivery(1)])[1]
    assert outcome.record is None and words in (outcome.dead or "")


def test_tickets_wait_while_the_endpoint_is_away_and_are_answered_when_it_is_back(
    make: Callable[..., ChatGenerator],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    stage = make(url, client={"skip_model_check": True, "max_retries": 1, "breaker_failures": 2})
    outcomes = stage.handle([delivery(number) for number in range(1, 5)])
    while not stage.stats.detail:
        outcomes += stage.handle([])
    assert (outcomes, stage.room, stage.busy) == ([], 0, True)
    assert stage.stats.detail.startswith(f"waiting for the teacher: {url}: ConnectError")
    with serving(as_asked, port=port):
        while stage.busy:
            outcomes += stage.handle([])
    assert sorted(outcome.delivery.number for outcome in outcomes) == [1, 2, 3, 4]
    assert (stage.stats.detail, stage.room) == ("", 16)


def test_it_takes_as_many_tickets_as_the_endpoints_take_requests(
    make: Callable[..., ChatGenerator],
) -> None:
    with serving(one_only) as (_, first), serving(one_only) as (_, second):
        stage = make(first, second)
        assert stage.room == 2 * 4 * 4, "two endpoints, four requests each, of groups of four"
        finish(stage, [delivery(1), delivery(2)])
        assert stage.room == 2 * 4, "one at a time, once that is all they can"


def test_a_spent_budget_stops_new_tickets_and_says_so(make: Callable[..., ChatGenerator]) -> None:
    with serving(as_asked) as (_, url):
        stage = make(url, client={"max_tokens_per_run": 10})
        finish(stage, [delivery(number) for number in range(1, 5)])
        assert stage.room == 0
        assert "max_tokens_per_run = 10" in stage.stats.detail


def test_a_budget_is_the_whole_runs(make: Callable[..., ChatGenerator], bus: Bus) -> None:
    with serving(as_asked) as (server, url):
        finish(
            make(url, client={"max_tokens_per_run": 10}),
            [delivery(number) for number in range(1, 5)],
        )
        for name in (bus.consumer, "another"):
            bus.connection.consumer = name
            restarted = make(url, client={"max_tokens_per_run": 10})
            assert restarted.handle([delivery(5)]) == [], "a restart brings no new budget"
            assert (restarted.room, restarted.busy) == (0, False)
            assert restarted.stats.detail.startswith("the budget is spent: 10 of")
        assert len(server.bodies) == 1


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_status_about_the_endpoint_is_waited_out_and_told(
    make: Callable[..., ChatGenerator], code: int
) -> None:
    with serving(lambda body: Answer(code, {"error": {"message": "not for you"}})) as (server, url):
        stage = make(url, client={"max_retries": 1, "breaker_failures": 2})
        outcomes = stage.handle([delivery(number) for number in range(1, 5)])
        while not stage.stats.detail:
            outcomes += stage.handle([])
        assert stage.stats.detail == f"waiting for the teacher: {url}: {code} not for you"
        assert (outcomes, stage.room) == ([], 0)
        server.answer = as_asked
        while stage.busy:
            outcomes += stage.handle([])
    assert all(isinstance(outcome.record, Rollout) for outcome in outcomes) and len(outcomes) == 4


def test_a_generator_of_a_run_that_had_completions_waits_for_its_endpoint(
    make: Callable[..., ChatGenerator], bus: Bus
) -> None:
    bus.state.mark_ready("generate")
    stage = make("http://127.0.0.1:1/v1")
    assert stage.stats.detail.startswith(
        "waiting for the teacher: http://127.0.0.1:1/v1: ConnectError"
    )
    assert (stage.room, stage.busy) == (0, False)


def test_a_model_that_is_not_served_is_refused_before_the_first_ticket(
    make: Callable[..., ChatGenerator],
) -> None:
    with (
        serving(as_asked, models=["another"]) as (_, url),
        pytest.raises(UserError, match="does not serve") as raised,
    ):
        make(url)
    assert (
        raised.value.got
        == f"orchestrator.teacher_rollout_model.model.name = 'teacher', which {url} does not serve"
    )
    assert raised.value.exit == Exit.USAGE


def test_in_the_loop_no_policy_version_is_waited_for(
    make: Callable[..., ChatGenerator], bus: Bus
) -> None:
    with serving(as_asked) as (_, url):
        stage = make(url)
        settings = stage._settings
        worker = Worker(stage, bus, settings.delivery, block_s=0.01)
        lease = bus.lease.acquire(5)
        tickets = [_ticket(number) for number in range(1, 5)]
        assert bus.lease.issue(lease, 0, tickets, 100)
        while bus.state.backlog()["verify"] != 4:
            worker.turn()
    rollouts = [decode_work(entry.payload) for entry in bus.streams.read("verify", 10)]
    assert [record.number for record in rollouts] == [1, 2, 3, 4]
    assert all(
        isinstance(record, Rollout) and record.timings[-1].stage == "generate"
        for record in rollouts
    )


def _ticket(number: int) -> Ticket:
    record = delivery(number).record
    assert isinstance(record, Ticket)
    return record
