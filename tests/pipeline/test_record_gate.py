"""The gate that every record passes at every stage: what is refused, and in which words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import (
    RecordError,
    decode_policy,
    decode_work,
    encode,
    ids_bytes,
    logprobs_bytes,
    read_number,
)
from onstream.pipeline.records import (
    Episode,
    PolicyVersion,
    Rollout,
    StageName,
    Ticket,
    Timing,
    Tombstone,
    VersionSpan,
)
from onstream.pipeline.redis.bus import Bus
from onstream.settings.plan import make_plan
from onstream.settings.root import Settings
from onstream.settings.sections.run import DeliverySettings
from tests.pipeline.stages import Passing, rollout, ticket

TOKENS = 4
STAGES: tuple[StageName, ...] = ("generate", "verify", "score", "train")


def whole() -> Rollout:
    """A rollout with a field of every kind."""
    made = rollout(ticket(1), tokens=TOKENS)
    [sample] = made.samples
    sample.teacher_logprobs = logprobs_bytes([-1.0] * TOKENS)
    sample.teacher_top_ids = ids_bytes([1, 2] * TOKENS)
    sample.teacher_top_logprobs = logprobs_bytes([math.log(0.6), math.log(0.3)] * TOKENS)
    sample.teacher_tail_logprobs = logprobs_bytes([math.log(0.1)] * TOKENS)
    sample.teacher_prompt_ids = ids_bytes([7, 8, 9])
    made.timings = [Timing("generate", "g", 1.0, 2.0)]
    made.reward = 1.0
    made.reward_parts = {"similarity": 0.5}
    return made


def of_rollout(**fields: Any) -> Callable[[Rollout], None]:
    def change(made: Rollout) -> None:
        for name, value in fields.items():
            setattr(made, name, value)

    return change


def of_sample(**fields: Any) -> Callable[[Rollout], None]:
    def change(made: Rollout) -> None:
        for name, value in fields.items():
            setattr(made.samples[0], name, value)

    return change


def logprobs(value: float) -> bytes:
    return logprobs_bytes([-1.0, value, -1.0, -1.0])


REFUSED = {
    "a number of 0": (of_rollout(number=0), "number: Expected `int` >= 1"),
    "a number beyond JSON": (of_rollout(number=2**60), "number: Expected `int` <= 90071992547409"),
    "a reward of NaN": (of_rollout(reward=math.nan), "reward: Expected `float` >="),
    "an infinite reward": (of_rollout(reward=math.inf), "reward: Expected `float` <="),
    "a part of NaN": (of_rollout(reward_parts={"a": math.nan}), "reward_parts: Expected `float`"),
    "temperature NaN": (of_rollout(temperature=math.nan), "temperature: Expected `float` >= 0.0"),
    "temperature 1e-300": (of_rollout(temperature=1e-300), "temperature 1e-300; expected 0, or"),
    "an endless timing": (
        of_rollout(timings=[Timing("generate", "g", 1.0, math.inf)]),
        "timings: Expected `float` <=",
    ),
    "a route by a teacher without a name": (
        of_rollout(route=["score:", "train"]),
        "the route is score: → train; expected",
    ),
    "a route that ends early": (of_rollout(route=["verify"]), "the route is verify; expected"),
    "no route": (of_rollout(route=[]), "route: Expected `array` of length >= 1"),
    "a route backwards": (of_rollout(route=["score", "verify", "train"]), "in the order of the"),
    "no samples": (of_rollout(samples=[]), "samples: Expected `array` of length >= 1"),
    "words that JSON cannot": (
        of_rollout(info={"a": {None: 1}}),
        "messages or info holds what JSON cannot",
    ),
    "an extension": (of_rollout(info={"a": msgspec.msgpack.Ext(5, b"x")}), "an extension of type"),
    "a version of −10¹²": (
        of_sample(version_spans=[VersionSpan(-(10**12), 0, 4)]),
        "samples: Expected `int` >= 0",
    ),
    "a span past the end": (
        of_sample(version_spans=[VersionSpan(0, 0, 5)]),
        "policy 0 wrote the tokens 0 to 5; expected spans one behind the other within 4",
    ),
    "spans that overlap": (
        of_sample(version_spans=[VersionSpan(0, 0, 3), VersionSpan(0, 2, 4)]),
        "spans one behind the other",
    ),
    "no prompt": (of_sample(prompt_ids=b""), "prompt_ids has 0 bytes"),
    "half an id": (of_sample(completion_ids=b"\0" * 15), "completion_ids has 15 bytes"),
    "a negative id": (of_sample(completion_ids=ids_bytes([1, -2, 3, 4])), "a token id below 0"),
    "a mask too short": (
        of_sample(loss_mask=b"\1\1\1"),
        "completion_ids has 16 bytes; expected 12",
    ),
    "masks of 255": (of_sample(loss_mask=b"\xff" * 4), "loss_mask has the byte 255; expected 0 or"),
    "masks all 0": (of_sample(loss_mask=b"\0" * 4), "no token is in a loss mask"),
    "a generator's 3e38": (
        of_sample(generator_logprobs=logprobs(3e38)),
        "generator_logprobs has the values -1 to 3e+38; expected -32768 to 0, in nats",
    ),
    "a generator's −3e38": (of_sample(generator_logprobs=logprobs(-3e38)), "values -3e+38 to -1"),
    "a generator's NaN": (of_sample(generator_logprobs=logprobs(math.nan)), "values nan to nan"),
    "a teacher's −3.4e38": (
        of_sample(teacher_logprobs=logprobs(-3.4e38)),
        "teacher_logprobs has the values -3.4e+38 to -1",
    ),
    "a teacher above 0": (of_sample(teacher_logprobs=logprobs(0.5)), "values -1 to 0.5"),
    "a teacher's logprobs too few": (
        of_sample(teacher_logprobs=logprobs_bytes([-1.0])),
        "teacher_logprobs has 4 bytes; expected 16",
    ),
    "alternatives of .99 each": (
        of_sample(teacher_top_logprobs=logprobs_bytes([math.log(0.99)] * 8)),
        "probabilities that add up to 2.080 to 2.080; expected 1, within 0.05",
    ),
    "alternatives of .99 each, no tail": (
        of_sample(
            teacher_top_logprobs=logprobs_bytes([math.log(0.99)] * 8), teacher_tail_logprobs=None
        ),
        "add up to 1.980 to 1.980; expected at most 1",
    ),
    "a tail that leaves a gap": (
        of_sample(teacher_tail_logprobs=logprobs_bytes([math.log(0.01)] * TOKENS)),
        "add up to 0.910 to 0.910; expected 1",
    ),
    "ids without logprobs": (of_sample(teacher_top_logprobs=None), "lack their ids or their"),
    "an empty prompt for the teacher": (
        of_sample(teacher_prompt_ids=b""),
        "teacher_prompt_ids has 0 bytes",
    ),
    "half an id for the teacher": (
        of_sample(teacher_prompt_ids=b"\0" * 7),
        "teacher_prompt_ids has 7 bytes",
    ),
    "a negative id for the teacher": (
        of_sample(teacher_prompt_ids=ids_bytes([1, -1])),
        "teacher_prompt_ids has a token id below 0",
    ),
    "a prompt for the teacher, and images": (
        of_sample(images=["0" * 64]),
        "teacher_prompt_ids beside 1 images; expected one without images",
    ),
    "an image by path": (of_sample(images=["../../../etc/passwd"]), "samples: Expected `str`"),
}


EPISODE_ROUTE: tuple[StageName, ...] = ("act", "train")


def whole_episode() -> Episode:
    """An episode after a turn, on its way to the environment."""
    asked = ticket(1, EPISODE_ROUTE)
    made = rollout(asked, tokens=TOKENS)
    return Episode(
        asked, made.messages, {}, [], b"\xc0", 1.0, list(EPISODE_ROUTE), made.samples, turns=1
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"state": b"x" * 65_537}, "state: Expected `bytes` of length <= 65536"),
        ({"turns": 0}, "1 samples of 0 turns"),
        ({"samples": []}, "0 samples of 1 turns"),
        ({"bound": "time"}, "bound: Invalid enum value 'time'"),
        ({"route": ["generate", "score", "act", "train"]}, "in the order of the flow"),
        ({"tools": [{"a": {None: 1}}]}, "messages, info or tools holds what JSON cannot"),
        ({"temperature": 1e-9}, "temperature 1e-09; expected 0, or 0.001 to 10"),
    ],
)
def test_a_field_of_an_episode_out_of_its_bounds_is_refused(
    fields: dict[str, Any], words: str
) -> None:
    assert decode_work(encode(whole_episode())) == whole_episode()
    with pytest.raises(RecordError, match=words):
        decode_work(encode(msgspec.structs.replace(whole_episode(), **fields)))


def test_the_samples_of_an_episode_are_checked_as_a_rollouts_are() -> None:
    made = whole_episode()
    made.samples[0].loss_mask = b"\xff" * TOKENS
    with pytest.raises(RecordError, match="episode 1: loss_mask has the byte 255"):
        decode_work(encode(made))


def test_tickets_of_episodes_go_to_the_environment_and_episodes_where_their_route_says(
    bus: Bus,
) -> None:
    issue(bus, 8)
    planned(bus, *EPISODE_ROUTE)
    put(bus, "act", 1, encode(ticket(1, EPISODE_ROUTE)))
    put(bus, "act", 2, encode(ticket(2)))
    put(bus, "generate", 3, encode(ticket(3, EPISODE_ROUTE)))
    made = whole_episode()
    for stage, route in (("act", ["act"]), ("generate", ["generate", "act"]), ("generate", [])):
        put(bus, stage, 1, encode(msgspec.structs.replace(made, route=[*route, "train"])))
    put(bus, "train", 1, encode(made))

    assert accepted(bus, "train") == []
    assert accepted(bus, "act") == [1, 1]
    assert accepted(bus, "generate") == [1]
    assert [letter.reason for letter in bus.state.dead_letters()] == [
        "an episode in the stream of train",
        "a ticket at act whose route goes on with verify → train",
        "a ticket at generate whose route goes on with act → train",
        "an episode at generate whose route goes on with train",
    ]


def test_a_whole_rollout_passes() -> None:
    assert decode_work(encode(whole())) == whole()


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_out_of_its_bounds_is_refused_by_name(name: str) -> None:
    change, words = REFUSED[name]
    made = whole()
    change(made)
    with pytest.raises(RecordError) as refusal:
        decode_work(encode(made))
    assert words in str(refusal.value)


@pytest.mark.parametrize("tokens", [4, 5000])
@pytest.mark.parametrize(
    ("value", "passes"),
    [
        (0.0, True),
        (1e-6, True),
        (-30000.0, True),
        (0.002, False),
        (-32769.0, False),
        (math.inf, False),
        (-math.inf, False),
        (math.nan, False),
        (-math.nan, False),
    ],
)
def test_a_logprob_is_judged_the_same_in_short_and_in_long_completions(
    value: float, passes: bool, tokens: int
) -> None:
    made = rollout(ticket(1), tokens=tokens)
    values = [-1.0] * tokens
    values[tokens // 2] = value
    made.samples[0].generator_logprobs = logprobs_bytes(values)
    if passes:
        assert decode_work(encode(made)) == made
    else:
        with pytest.raises(RecordError, match="expected -32768 to 0, in nats"):
            decode_work(encode(made))
    made.samples[0].completion_ids = ids_bytes([-1, *range(tokens - 1)])
    with pytest.raises(RecordError, match="completion_ids has a token id below 0"):
        decode_work(encode(made))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"route": ["verify"]}, "the route is verify; expected"),
        ({"seed": -1}, "seed: Expected `int` >= 0"),
        ({"index": -1}, "index: Expected `int` >= 0"),
        ({"group_size": 0}, "group_size: Expected `int` >= 1"),
        ({"min_policy_version": -1}, "min_policy_version: Expected `int` >= 0"),
    ],
)
def test_a_ticket_out_of_its_bounds_is_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecordError) as refusal:
        decode_work(encode(msgspec.structs.replace(ticket(1), **fields)))
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (b"17", 17),
        (b"9007199254740991", 2**53 - 1),
        (b"9007199254740992", 0),
        (b"9" * 30, 0),
        (b"9" * 5000, 0),
        (b"-1", 0),
        (b"abc", 0),
        (b"", 0),
    ],
)
def test_a_number_is_read_where_it_can_have_been_issued(text: bytes, number: int) -> None:
    assert read_number(text) == number


# In a stream -------------------------------------------------------------------------------------


def put(bus: Bus, stage: StageName, number: bytes | int, payload: bytes) -> None:
    bus.connection.ask("XADD", bus.keys.streams[stage], "*", "n", number, "b", payload)


def issue(bus: Bus, count: int, version: int = 3) -> None:
    lease = bus.lease.acquire(5)
    bus.lease.issue(lease, 0, [ticket(number) for number in range(1, count + 1)], 1000)
    bus.lease.announce(lease, PolicyVersion(version, "digest", "policies/000003", 1))
    bus.connection.ask("DEL", bus.keys.streams["generate"])
    bus.connection.create_groups()


def at(stage: StageName, number: int, version: int = 0) -> bytes:
    """A rollout as it comes to `stage`."""
    made = rollout(ticket(number))
    made.route = [name for name in STAGES[1:] if STAGES.index(name) >= STAGES.index(stage)]
    made.samples[0].version_spans = [VersionSpan(version, 0, 16)]
    return encode(made)


def accepted(bus: Bus, stage: StageName) -> list[int]:
    """The numbers that the gate lets through of all that waits for `stage`."""
    worker = Worker(Passing(stage), bus, DeliverySettings(), block_s=0.01)
    return [delivery.number for delivery in worker.accept(bus.streams.read(stage, 100))]


@pytest.mark.parametrize("stage", ["verify", "score", "train"])
def test_every_stage_refuses_what_was_never_issued_or_announced(bus: Bus, stage: StageName) -> None:
    issue(bus, 8)
    put(bus, stage, 1, at(stage, 1, version=3))
    put(bus, stage, 9, at(stage, 9))
    put(bus, stage, 2, at(stage, 2, version=20))
    put(bus, stage, b"9" * 30, at(stage, 3))
    put(bus, stage, b"9" * 5000, b"no record")
    put(bus, stage, 4, at("train" if stage == "verify" else "verify", 4))

    assert accepted(bus, stage) == [1]
    letters = {letter.number: letter.reason for letter in bus.state.dead_letters()}
    assert letters[2] == "policy version 20 was never announced; the newest is 3"
    assert letters[3] == "the entry has the number 0 and its record 3"
    assert "a rollout at" in letters[4]
    refused = [letter.reason for letter in bus.state.dead_letters() if not letter.number]
    assert refused[0] == "number 9 was never issued; the run has issued 1 to 8"
    assert "do not decode" in refused[1]
    tombstones = [entry.number for entry in bus.streams.read("train", 20) if entry.number != 1]
    assert sorted(tombstones) == [2, 3, 4]


def test_a_ticket_for_a_version_to_come_does_not_fill_the_generator(bus: Bus) -> None:
    issue(bus, 8)
    put(bus, "generate", 5, encode(msgspec.structs.replace(ticket(5), min_policy_version=10**12)))
    assert accepted(bus, "generate") == []
    [letter] = bus.state.dead_letters()
    assert letter.reason == "policy version 1000000000000 was never announced; the newest is 3"


def planned(bus: Bus, *route: StageName) -> None:
    settings = Settings.model_validate({"run": {"name": bus.run}})
    plan = msgspec.structs.replace(make_plan(settings), route=route)
    bus.connection.ask("SET", bus.keys.plan, plan.encode())


OFF_THE_ROUTE: list[tuple[StageName, tuple[StageName, ...], tuple[StageName, ...]]] = [
    # stage, the route that its record has to go, the run's
    ("generate", ("score", "train"), ("verify", "train")),  # nobody scores
    ("generate", ("train",), ("verify", "train")),  # nobody would verify it
    ("generate", ("verify", "score", "train"), ("verify", "train")),
    ("verify", ("verify", "score", "train"), ("verify", "train")),
    ("verify", ("verify", "train"), ("verify", "score", "train")),
]


@pytest.mark.parametrize(("stage", "route", "of_run"), OFF_THE_ROUTE)
def test_a_record_whose_route_is_not_the_runs_is_a_dead_letter_and_its_number_settles(
    bus: Bus, stage: StageName, route: tuple[StageName, ...], of_run: tuple[StageName, ...]
) -> None:
    issue(bus, 8)
    planned(bus, *of_run)
    for asked in (ticket(1, of_run), ticket(2, route)):
        record = asked if stage == "generate" else rollout(asked)
        put(bus, stage, asked.number, encode(record))
    assert accepted(bus, stage) == [1]
    [letter] = bus.state.dead_letters()
    passed = " → ".join(dict.fromkeys((stage, *route)))
    whole_path = " → ".join(("generate", *of_run))
    assert (letter.number, letter.reason) == (
        2,
        f"the route {passed}; rollouts of this run pass {whole_path}",
    )
    [tombstone] = bus.streams.read("train", 10)
    assert decode_work(tombstone.payload) == Tombstone(2, stage, letter.reason)


@pytest.mark.parametrize("plan", [None, b"\xc1 garbage"])
def test_where_redis_has_no_plan_no_route_is_refused_for_it(bus: Bus, plan: bytes | None) -> None:
    issue(bus, 8)
    if plan:
        bus.connection.ask("SET", bus.keys.plan, plan)
    put(bus, "generate", 1, encode(ticket(1, ("score", "train"))))
    assert accepted(bus, "generate") == [1]


def test_another_run_of_the_same_name_may_have_another_route(bus: Bus) -> None:
    issue(bus, 8)
    worker = Worker(Passing("generate"), bus, DeliverySettings(), block_s=0.01)
    routes: list[tuple[StageName, ...]] = [("verify", "train"), ("score", "train")]
    seen = []
    for number, route in enumerate(routes, start=1):
        planned(bus, *route)
        put(bus, "generate", number, encode(ticket(number, route)))
        seen += [delivery.number for delivery in worker.accept(bus.streams.read("generate", 100))]
    assert seen == [1, 2]


def test_a_worker_that_read_the_plan_at_its_start_does_not_ask_for_it_again(bus: Bus) -> None:
    issue(bus, 8)
    bus.limits.note(path=("generate", "verify", "train"))
    planned(bus, "score", "train")  # what it would hear if it asked
    put(bus, "generate", 1, encode(ticket(1, ("verify", "train"))))
    assert accepted(bus, "generate") == [1]


def test_a_version_that_a_replica_does_not_know_yet_is_the_trainers_to_judge(bus: Bus) -> None:
    issue(bus, 8)
    for stage in STAGES[1:]:
        put(bus, stage, 2, at(stage, 2, version=4))
    assert [accepted(bus, stage) for stage in STAGES[1:]] == [[2], [2], []]
    bus.limits.note(version=4)
    put(bus, "train", 2, at("train", 2, version=4))
    assert 2 in accepted(bus, "train")


def test_a_version_beyond_the_newest_is_refused_where_the_announcements_are_gone(bus: Bus) -> None:
    issue(bus, 8)
    bus.connection.ask("DEL", bus.keys.policies)
    put(bus, "train", 2, at("train", 2, version=4))
    assert accepted(bus, "train") == []


def test_a_policy_written_by_hand_makes_no_version_one_that_was_announced(bus: Bus) -> None:
    issue(bus, 8)
    forged = encode(PolicyVersion(10**6, "digest", "policies/000003", 1))
    bus.connection.ask("SET", bus.keys.policy, forged)
    bus.connection.ask("XADD", bus.keys.policies, "*", "b", forged)
    put(bus, "train", 2, at("train", 2, version=10**6))
    assert accepted(bus, "train") == []


def test_where_redis_has_forgotten_what_was_issued_nothing_is_refused_for_it(bus: Bus) -> None:
    put(bus, "verify", 9, at("verify", 9, version=7))
    assert (accepted(bus, "verify"), bus.state.dead_letters()) == ([9], [])


def test_a_tombstone_that_was_never_issued_settles_nothing(bus: Bus) -> None:
    issue(bus, 8)
    put(bus, "train", 9, encode(Tombstone(9, "verify", "forged")))
    assert accepted(bus, "train") == []
    [letter] = bus.state.dead_letters()
    assert letter.reason == "number 9 was never issued; the run has issued 1 to 8"
    assert bus.state.backlog()["train"] == 0


# Policies ----------------------------------------------------------------------------------------


def test_garbage_in_the_policys_key_is_passed_over_for_the_last_announcement(bus: Bus) -> None:
    issue(bus, 1)
    newest = bus.state.newest_policy()
    bus.connection.ask("SET", bus.keys.policy, b"\xc1 garbage")
    bus.connection.ask("XADD", bus.keys.policies, "*", "b", b"\xc1 garbage")
    assert newest is not None
    assert bus.state.newest_policy() == newest
    assert bus.state.announced_policies() == [newest]
    bus.connection.ask("DEL", bus.keys.policies)
    assert bus.state.newest_policy() is None


@pytest.mark.parametrize("number", [-1, 2**60])
def test_a_policy_version_out_of_its_bounds_is_refused(number: int) -> None:
    with pytest.raises(RecordError, match="do not decode as a policy/1"):
        decode_policy(encode(PolicyVersion(number, "digest", "path", 1)))


def test_a_record_of_the_version_before_is_still_read() -> None:
    """As onstream wrote it before records had bounds: the same tags, the same places."""
    fields = ["tombstone/1", 7, "verify", "given up"]
    assert decode_work(msgspec.msgpack.encode(fields)) == Tombstone(7, "verify", "given up")
    fields = ["ticket/1", 7, 1, 4, 1, 7, 0, ["verify", "train"]]
    asked = decode_work(msgspec.msgpack.encode(fields))
    assert isinstance(asked, Ticket) and asked.requeued_from is None
