from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest

from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import (
    decode_work,
    encode,
    ids_array,
    ids_bytes,
    logprobs_array,
)
from onstream.pipeline.records import Rollout
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.streams import Move, Out
from onstream.pipeline.stage import Outcome
from onstream.settings.sections.run import DeliverySettings
from onstream.settings.sections.task import TeacherPromptSettings
from onstream.workers.teacher.external.stage import CACHED
from tests.faulty_server import Answer, Asked, Fault, cut, drip, status
from tests.table_teacher import TableTeacher, wrong_ids
from tests.workers.teacher.external.conftest import (
    Configure,
    Servers,
    Stages,
    delivered,
    rollout,
    until,
    work,
)


def check(outcome: Outcome, server: TableTeacher) -> Rollout:
    """The outcome's rollout, every sample of it scored rightly."""
    record = outcome.record
    assert isinstance(record, Rollout), outcome.dead
    for sample in record.samples:
        expected = server.expected(
            ids_array(sample.prompt_ids).tolist(), ids_array(sample.completion_ids).tolist()
        )
        np.testing.assert_allclose(
            logprobs_array(sample.teacher_logprobs or b""), expected, rtol=1e-6
        )
    return record


def test_rollouts_are_scored_by_the_endpoint_that_they_name(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers()
    stage = stages(configure(server, top_k=4))
    for outcome in work(stage, delivered(*(rollout(number, samples=2) for number in range(1, 6)))):
        record = check(outcome, server)
        assert record.scored_by == server.base_url
        for sample in record.samples:
            assert (
                len(ids_array(sample.teacher_top_ids or b""))
                == len(logprobs_array(sample.teacher_top_logprobs or b""))
                == 4 * 4
            )
            assert sample.teacher_tail_logprobs is None
    assert stage.stats.detail == "" and stage.stats.numbers["tokens"] == 5 * 2 * 7


def test_many_requests_are_in_flight_at_once_and_never_more_than_allowed(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers()
    stage = stages(configure(server, max_in_flight=6))
    server.delay_s = 0.03
    server.hold_until_together(6)
    assert stage.room == 6
    work(stage, delivered(*(rollout(number, samples=2) for number in range(1, 31))))
    assert server.most_in_flight == 6


def test_load_goes_to_the_endpoint_with_less_in_flight(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    quick = servers()
    slow = servers()
    stage = stages(configure(quick, slow, max_in_flight=4))
    slow.delay_s = 0.2
    by = Counter(
        check(outcome, quick).scored_by
        for outcome in work(stage, delivered(*(rollout(number) for number in range(1, 41))))
    )
    assert by[quick.base_url] > 2 * by[slow.base_url] > 0


def test_an_endpoint_is_sent_the_prompt_that_is_the_teachers_alone(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers()
    settings = configure(server)
    task = settings.task.model_copy(
        update={"teacher_prompt": TeacherPromptSettings(template="{prompt} {answer}")}
    )
    stage = stages(settings.model_copy(update={"task": task}))
    record = rollout(1)
    record.samples[0].teacher_prompt_ids = ids_bytes([7, 8, 9])
    scored, refused = work(stage, delivered(record, rollout(2)))[::-1]
    assert refused.dead is not None and "lacks a prompt for the teacher alone" in refused.dead
    [sample] = record.samples
    expected = server.expected([7, 8, 9], ids_array(sample.completion_ids).tolist())
    assert scored.dead is None
    np.testing.assert_allclose(logprobs_array(sample.teacher_logprobs or b""), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "fault",
    [status(500), status(502), cut, drip, wrong_ids],
    ids=["500", "502", "cut", "drip", "wrong ids"],
)
def test_a_request_that_failed_is_sent_again(
    servers: Servers, configure: Configure, stages: Stages, fault: Fault
) -> None:
    server = servers()
    stage = stages(configure(server, timeout=2))
    server.faults.extend([fault] * 3)
    for outcome in work(stage, delivered(*(rollout(number) for number in range(1, 5)))):
        check(outcome, server)
    assert not server.faults


def test_one_rollout_refused_is_a_dead_letter_with_the_servers_words_and_the_others_go_on(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers()
    stage = stages(configure(server, max_in_flight=1))
    server.faults.append(status(422, "I do not score this"))
    refused, *others = work(
        stage, delivered(*(rollout(number, samples=2) for number in range(1, 4)))
    )
    assert (
        refused.dead
        == f"the teacher 'teacher': {server.base_url} refused it: 422 I do not score this"
    )
    assert [check(outcome, server).number for outcome in others] == [2, 3]


def of_tokens(logprob: float) -> Fault:
    """The right reply but for the logprobs of all tokens, which are `logprob`."""

    def fault(asked: Asked, right: Answer) -> Answer:
        body = right.body
        for position in body["prompt_logprobs"]:
            for entry in (position or {}).values():
                entry["logprob"] = logprob
        return Answer(body=body)

    return fault


@pytest.mark.parametrize("logprob", [0.5, -1e20])
def test_absurd_logprobs_are_asked_for_again(
    servers: Servers, configure: Configure, stages: Stages, logprob: float
) -> None:
    server = servers()
    stage = stages(configure(server, max_in_flight=1, top_k=4, score_cache=100))
    server.faults.append(of_tokens(logprob))
    for outcome in work(stage, delivered(rollout(1), rollout(2))):
        check(outcome, server)


def test_what_is_no_distribution_is_a_dead_letter_is_not_kept_and_the_others_go_on(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers(seed=33)
    settings = configure(server, max_in_flight=1, top_k=4, score_cache=100)
    stage = stages(settings)
    server.faults.append(of_tokens(-0.01))
    bad, good = work(stage, delivered(rollout(1), rollout(2)))
    words = "probabilities that add up to 3.960 to 3.960; expected at most 1, within 0.05"
    assert bad.dead is not None and words in bad.dead
    assert check(good, server).number == 2
    [again] = work(stages(settings), delivered(rollout(1)))
    assert check(again, server).scored_by == server.base_url, "the absurd scores were not kept"


@pytest.mark.parametrize("code", [401, 403, 404])
def test_a_status_about_the_endpoint_is_waited_out_and_told(
    servers: Servers, configure: Configure, stages: Stages, code: int
) -> None:
    server = servers()
    stage = stages(configure(server, max_retries=1, breaker_failures=2))
    server.forever = status(code, "not for you")
    assert stage.handle(delivered(*(rollout(number) for number in range(1, 5)))) == []
    until(
        lambda: stage.stats.detail.startswith(f"waiting for the teacher: {server.base_url}"), stage
    )
    assert f"{code} not for you" in stage.stats.detail and stage.room == 0
    server.forever = None
    outcomes = work(stage, [], count=4)
    assert sorted(check(outcome, server).number for outcome in outcomes) == [1, 2, 3, 4]


def test_a_sample_too_long_for_the_endpoint_is_a_dead_letter_and_is_not_sent(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers(max_model_len=256)
    stage = stages(configure(server))
    sent = len(server.scored)
    fits, exceeds = (
        rollout(number, completion=[20] * length) for number, length in ((1, 253), (2, 254))
    )
    first, second = work(stage, delivered(fits, exceeds))
    assert {first.dead, second.dead} == {
        None,
        f"the teacher 'teacher': {server.base_url} refused it: 256 tokens, "
        "and one that scoring takes, exceed its context of 256",
    }
    assert len(server.scored) == sent + 1


def test_a_sample_that_fails_while_others_are_scored_is_given_up_at_last(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers()
    stage = stages(
        configure(server, max_retries=0, max_in_flight=2, breaker_failures=1000, breaker_pause=0.1)
    )
    scores = server.scores

    def poisoned(path: str, asked: dict[str, list[int]]) -> object:
        if 99 in asked.get("token_ids", []):
            raise RuntimeError("engine died")
        return scores(path, asked)

    server.scores = poisoned  # type: ignore[method-assign]
    healthy = [rollout(number) for number in range(2, 200)]
    outcomes = stage.handle(delivered(rollout(1, completion=[99, 3])))
    while not any(outcome.dead for outcome in outcomes):
        outcomes += stage.handle(delivered(healthy.pop()) if stage.room else [])
    (dead,) = [outcome.dead for outcome in outcomes if outcome.dead]
    assert "failed 3 times while others were answered" in dead


def test_the_last_rollouts_of_all_are_given_up_too_where_the_server_scores_other_texts(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers()
    stage = stages(configure(server, max_retries=1, breaker_failures=2, breaker_pause=0.1))
    absurd = of_tokens(0.5)
    text = [99, 3]

    def of_one_text(asked: Asked, right: Answer) -> Answer:
        if asked.body is None or "token_ids" not in asked.body:
            return right
        return absurd(asked, right) if asked.body["token_ids"][-2:] == text else right

    server.forever = of_one_text
    last = [rollout(number, completion=text, samples=number) for number in (1, 2)]
    for outcome in work(stage, delivered(*last)):
        assert outcome.dead is not None
        assert "failed 6 times with no other request to be answered; last: " in outcome.dead
    (good,) = work(stage, delivered(rollout(3)))
    assert check(good, server).number == 3


def test_an_endpoint_that_dies_is_waited_for_and_nothing_is_lost(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers()
    stage = stages(configure(server, max_in_flight=4, breaker_failures=2, max_retries=1))
    server.stop()
    assert stage.handle(delivered(*(rollout(number) for number in range(1, 5)))) == []
    until(
        lambda: stage.stats.detail.startswith(
            f"waiting for the teacher: {server.base_url}: ConnectError"
        ),
        stage,
    )
    assert (stage.room, stage.busy) == (0, False)
    server.start()
    outcomes = work(stage, [], count=4)
    assert sorted(check(outcome, server).number for outcome in outcomes) == [1, 2, 3, 4]
    assert stage.stats.detail == "" and stage.room == 4


def test_while_one_endpoint_is_away_the_other_does_the_work(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    lasting = servers()
    leaving = servers()
    stage = stages(
        configure(lasting, leaving, breaker_failures=1, max_retries=0, breaker_pause=0.1)
    )
    leaving.stop()
    for outcome in work(stage, delivered(*(rollout(number) for number in range(1, 40)))):
        assert check(outcome, lasting).scored_by == lasting.base_url
    assert stage.stats.detail.startswith(f"1 of 2 endpoints are down: {leaving.base_url}")
    leaving.start()
    until(lambda: stage.stats.detail == "", stage)


def test_a_server_that_comes_back_with_other_weights_stays_away(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers()
    stage = stages(configure(server, breaker_failures=1, max_retries=0))
    server.stop()
    assert stage.handle(delivered(rollout(1))) == []
    until(lambda: "waiting for the teacher" in stage.stats.detail, stage)
    other = TableTeacher(seed=1, port=server.port)
    other.start()
    until(
        lambda: "nats a token away from what this teacher scored it first" in stage.stats.detail,
        stage,
    )
    other.stop()
    server.start()
    check(work(stage, [], count=1)[0], server)


def test_an_endpoint_that_asks_to_be_left_alone_is(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers()
    stage = stages(configure(server, max_retries=1))
    server.faults.append(status(429, retry_after="1"))
    started = time.monotonic()
    assert stage.handle(delivered(rollout(1))) == []
    until(lambda: "asked for a pause of another 1 s (Retry-After)" in stage.stats.detail, stage)
    check(work(stage, [], count=1)[0], server)
    assert time.monotonic() - started >= 1
    assert stage.stats.detail == ""


def test_requests_keep_to_the_budget_per_second(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    stage = stages(configure(servers(), requests_per_second=50))
    started = time.monotonic()
    work(stage, delivered(*(rollout(number) for number in range(1, 22))))
    assert time.monotonic() - started >= 0.4


def test_past_its_budget_of_tokens_the_worker_takes_no_more_and_says_so(
    servers: Servers, configure: Configure, stages: Stages, bus: Bus
) -> None:
    server = servers()
    settings = configure(
        server, max_tokens_per_run=20
    )  # a rollout takes 7: 2 of the prompt, 4, and one that is generated
    stage = stages(settings)
    sent = len(server.scored)
    outcomes = work(stage, delivered(*(rollout(number) for number in range(1, 5))), count=2)
    assert len(server.scored) - sent == len(outcomes) == 2
    setting = "orchestrator.teacher_model.client.max_tokens_per_run"
    assert stage.stats.detail.startswith(f"the budget is spent: 14 of {setting} = 20 tokens")
    assert (stage.room, stage.busy) == (0, False)
    for name in (bus.consumer, "another"):
        bus.connection.consumer = name
        restarted = stages(settings)
        assert restarted.handle(delivered(rollout(5))) == [], "a restart brings no new budget"
        assert restarted.room == 0 and restarted.stats.detail.startswith(
            "the budget is spent: 14 of"
        )


def test_a_replay_is_answered_from_what_was_kept(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    server = servers(seed=11)
    settings = configure(server, top_k=3, score_cache=100)
    (first,) = work(stages(settings), delivered(rollout(1, samples=2)))
    again = stages(settings)
    sent = len(server.scored)
    (second,) = work(again, delivered(rollout(1, samples=2)))
    assert len(server.scored) == sent
    record = check(first, server)
    replay = check(second, server)
    assert replay.scored_by == CACHED and again.stats.numbers["cached"] == 2
    assert [encode_sample(sample) for sample in record.samples] == [
        encode_sample(sample) for sample in replay.samples
    ]
    other = servers(seed=12)  # other weights under the same name
    (third,) = work(stages(configure(other, top_k=3, score_cache=100)), delivered(rollout(1)))
    assert check(third, other).scored_by == other.base_url


def test_scores_with_fewer_likeliest_tokens_are_not_taken_for_those_of_a_teacher_that_gives_more(
    servers: Servers, configure: Configure, stages: Stages
) -> None:
    settings = [
        configure(servers(seed=11, max_top_k=limit), top_k="auto", score_cache=100)
        for limit in (3, 20)
    ]
    for given, k in zip(settings, (3, 8), strict=True):
        (outcome,) = work(stages(given), delivered(rollout(1)))
        assert isinstance(outcome.record, Rollout)
        assert len(outcome.record.samples[0].teacher_top_ids or b"") == 4 * 4 * k


def encode_sample(sample: object) -> tuple[object, ...]:
    return tuple(
        getattr(sample, name)
        for name in ("teacher_logprobs", "teacher_top_ids", "teacher_top_logprobs")
    )


def test_under_the_loop_a_server_that_is_killed_in_the_middle_costs_nothing(
    servers: Servers, configure: Configure, stages: Stages, bus: Bus
) -> None:
    server = servers()
    stage = stages(configure(server, max_in_flight=4, breaker_failures=2))
    server.delay_s = 0.01
    feed(bus, range(1, 41))
    worker = Worker(stage, bus, DeliverySettings(), block_s=0.05)
    while bus.state.backlog()["train"] < 10:
        worker.turn()
    server.stop()
    while not stage.stats.detail.startswith("waiting for the teacher"):
        worker.turn()
    waiting = bus.state.backlog()
    assert waiting["score"] + waiting["train"] == 40 and waiting["train"] < 40
    for _ in range(20):
        worker.turn()
    assert bus.state.backlog() == waiting, "it takes no more and drops nothing"
    server.start()
    while bus.state.backlog()["train"] < 40:
        worker.turn()
    done = [decode_work(entry.payload) for entry in bus.streams.read("train", 64)]
    assert sorted(record.number for record in done) == list(range(1, 41))
    assert all(
        isinstance(record, Rollout) and record.scored_by == server.base_url for record in done
    )
    assert bus.state.dead_numbers() == []


def feed(bus: Bus, numbers: range) -> None:
    """Put rollouts into the stream of the teacher, by way of tickets."""
    from onstream.pipeline.records import Ticket

    lease = bus.lease.acquire(30)
    bus.lease.issue(
        lease, 0, [Ticket(number, 0, 8, 0, 0, 0, ["score", "train"]) for number in numbers], 1000
    )
    entries = bus.streams.read("generate", len(numbers))
    bus.streams.move(
        "generate",
        [
            Move(entry.id, [Out("score", entry.number, encode(rollout(entry.number)))])
            for entry in entries
        ],
    )
