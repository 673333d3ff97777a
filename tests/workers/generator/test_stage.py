"""Tickets become rollouts of the newest policy; what cannot be written says why."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from transformers import AutoTokenizer

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import decode_work, ids_array, logprobs_array, mask_array
from onstream.pipeline.records import PolicyVersion, Probe, Rollout, StageName, Ticket, VersionSpan
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.stage import Delivery
from onstream.pipeline.tasks import load_task
from onstream.pipeline.weights import publish
from onstream.settings.root import Settings
from onstream.settings.sections.inference import InferenceSettings
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.generator import policy_loader
from onstream.workers.generator.guard import tolerance_of
from onstream.workers.generator.stage import Generator
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.publication.policy_probe import prober

ROUTE: list[StageName] = ["verify", "train"]


class Announced:
    """Stands where the bus's newest policy is read; publishes real files."""

    def __init__(self, run_dir: Path, student_dir: Path) -> None:
        self.run_dir = run_dir
        self.student_dir = student_dir
        self.newest: PolicyVersion | None = None

    def publish(self, number: int, weights: dict[str, torch.Tensor] | None = None) -> PolicyVersion:
        state = weights or load_file(self.student_dir / "model.safetensors")
        self.newest = publish(self.run_dir, number, state, self.student_dir)
        return self.newest

    def __call__(self) -> PolicyVersion | None:
        return self.newest


def probe_of(student_dir: Path) -> Probe:
    """What a trainer of the student there says of it."""
    learner = Learner(student_dir, TrainerSettings(), torch.device("cpu"))
    return prober(learner, InferenceSettings()).ask()


def settings_of(student_dir: Path, tmp_path: Path, **inference: Any) -> Settings:
    sections = {
        "model": {"name": str(student_dir)},
        "run": {"dir": str(tmp_path), "name": "run"},
        "deployment": {"device": "cpu"},
        "inference": {
            "max_batch": 8,
            "prefetch": 4,
            "sampling": {"max_completion": 6},
            **inference,
        },
    }
    return Settings.model_validate(sections)


@pytest.fixture
def announced(tmp_path: Path, student_dir: Path) -> Announced:
    return Announced(tmp_path / "run", student_dir)


@pytest.fixture
def make(
    student_dir: Path,
    tmp_path: Path,
    bus: Bus,
    announced: Announced,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Generator]:
    """A stage that is set up; it looks for a new version at every step."""
    monkeypatch.setattr(policy_loader, "POLL_S", 0.0)
    monkeypatch.setattr(policy_loader, "RETRY_S", 0.0)

    def build(settings: Settings | None = None) -> Generator:
        stage = Generator(settings or settings_of(student_dir, tmp_path), bus, announced)
        stage.setup()
        return stage

    return build


def ticket(number: int, min_policy_version: int = 0, group_size: int = 4) -> Ticket:
    group = (number - 1) // group_size
    return Ticket(number, group, group_size, group, 1000 + number, min_policy_version, list(ROUTE))


def delivery(number: int, min_policy_version: int = 0) -> Delivery:
    return Delivery(b"%d-0" % number, number, ticket(number, min_policy_version), 50, 1, 1.0)


def finish(stage: Generator) -> dict[int, Rollout]:
    rollouts = {}
    while stage.busy:
        for outcome in stage.handle([]):
            assert isinstance(outcome.record, Rollout)
            rollouts[outcome.delivery.number] = outcome.record
    return rollouts


def test_a_ticket_becomes_a_rollout_with_all_that_the_next_stages_need(
    make: Callable[..., Generator],
    announced: Announced,
    student_dir: Path,
    tmp_path: Path,
    plain_logprobs: Callable[..., Any],
) -> None:
    announced.publish(5)
    stage = make()
    early = stage.handle([delivery(6)])
    rollout = finish(stage)[6]
    problem = load_task(settings_of(student_dir, tmp_path)).train(1)
    assert early == []
    assert (rollout.number, rollout.group, rollout.group_size, rollout.index) == (6, 1, 4, 1)
    assert (rollout.messages, rollout.info) == (problem.messages, problem.info)
    assert (rollout.route, rollout.temperature) == (ROUTE, 1.0)
    sample = rollout.samples[0]
    prompt = ids_array(sample.prompt_ids)
    completion = ids_array(sample.completion_ids)
    assert prompt.tolist()[:2] == [2, 5] and prompt.tolist()[-2:] == [
        2,
        6,
    ]  # <|im_start|><|user|> … <|im_start|><|assistant|>
    assert rollout.finish_reason == ("stop" if completion[-1] == 3 else "length")
    assert sample.version_spans == [VersionSpan(5, 0, len(completion))]
    assert mask_array(sample.loss_mask).tolist() == [1] * len(completion)
    plain = plain_logprobs(prompt, completion)[np.arange(len(completion)), completion]
    assert np.abs(plain - logprobs_array(sample.generator_logprobs)).max() < 1e-5


def test_a_rollout_carries_what_the_teacher_reads_where_that_is_another_prompt(
    make: Callable[..., Generator], announced: Announced, student_dir: Path, tmp_path: Path
) -> None:
    announced.publish(0)
    own = {"teacher_prompt": {"system": "Think.", "template": "{prompt} {answer}"}}
    settings = settings_of(student_dir, tmp_path)
    viewed = Settings.model_validate({**settings.model_dump(), "task": own})
    rollouts = []
    for each in (settings, viewed):
        stage = make(each)
        stage.handle([delivery(6)])
        rollouts.append(finish(stage)[6])
    plain, other = rollouts
    assert plain.samples[0].teacher_prompt_ids is None
    ids = other.samples[0].teacher_prompt_ids
    assert ids is not None
    text = AutoTokenizer.from_pretrained(student_dir).decode(ids_array(ids))
    question, answer = plain.messages[0]["content"], plain.info["answer"]
    assert "Think." in text and f"<|user|>{question} {answer}<|im_end|>" in text
    assert text.endswith("<|im_start|><|assistant|>")
    other.samples[0].teacher_prompt_ids = None
    other.timings = plain.timings
    assert other == plain


def test_the_text_of_a_completion_has_no_special_tokens(
    make: Callable[..., Generator], announced: Announced
) -> None:
    announced.publish(0)
    stage = make()
    stage.handle([delivery(number) for number in range(1, 9)])
    for rollout in finish(stage).values():
        ids = ids_array(rollout.samples[0].completion_ids)
        assert len(rollout.samples[0].completion_text) == (ids >= 128 - 96).sum()


def test_no_ticket_is_taken_before_the_first_version_can_be_loaded(
    make: Callable[..., Generator], announced: Announced
) -> None:
    stage = make()
    assert (stage.room, stage.busy, stage.stats.detail) == (
        0,
        False,
        "waits for the first policy version",
    )
    announced.publish(0)
    assert stage.handle([]) == []
    assert (stage.room, stage.stats.detail) == (12, "")


def test_room_is_the_slots_and_the_prefetch_less_what_is_in_hand(
    make: Callable[..., Generator], announced: Announced
) -> None:
    announced.publish(0)
    stage = make()
    stage.handle([delivery(1), delivery(2), delivery(3, min_policy_version=9)])
    assert stage.room == 12 - 3


def test_a_ticket_waits_for_its_version_and_is_written_by_it(
    make: Callable[..., Generator], announced: Announced
) -> None:
    announced.publish(2)
    stage = make()
    assert stage.handle([delivery(1, min_policy_version=3)]) == []
    assert not stage.busy
    assert stage.stats.detail == "waits for policy version 3; 2 is the newest announced"
    announced.publish(3)
    stage.handle([])
    rollout = finish(stage)[1]
    assert rollout.samples[0].version_spans[0].version == 3
    assert stage.stats.detail == ""


def test_a_version_that_comes_in_the_middle_takes_over_and_the_spans_say_where(
    make: Callable[..., Generator],
    announced: Announced,
    other_weights: dict[str, torch.Tensor],
    plain_logprobs: Callable[..., Any],
) -> None:
    announced.publish(2)
    stage = make()
    done = stage.handle([delivery(number) for number in range(1, 5)])
    done += stage.handle([])
    announced.publish(3, other_weights)
    rollouts = finish(stage)
    assert len(done) + len(rollouts) == 4 and rollouts
    for rollout in rollouts.values():
        sample = rollout.samples[0]
        prompt = ids_array(sample.prompt_ids)
        completion = ids_array(sample.completion_ids)
        assert sample.version_spans == [VersionSpan(2, 0, 2), VersionSpan(3, 2, len(completion))]
        plain = plain_logprobs(prompt, completion, weights=other_weights)[
            np.arange(len(completion)), completion
        ]
        assert np.abs(plain - logprobs_array(sample.generator_logprobs))[2:].max() < 1e-5


def test_torn_weights_stop_new_tickets_but_not_what_is_being_written(
    make: Callable[..., Generator], announced: Announced
) -> None:
    announced.publish(2)
    stage = make()
    stage.handle([delivery(1)])
    torn = announced.publish(3)
    path = announced.run_dir / torn.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    rollouts = {outcome.delivery.number: outcome.record for outcome in stage.handle([])} | finish(
        stage
    )
    rollout = rollouts[1]
    assert isinstance(rollout, Rollout)
    assert [span.version for span in rollout.samples[0].version_spans] == [2]
    assert stage.room == 0
    assert stage.stats.detail.startswith("cannot load policy version 3: ")


def test_tickets_do_not_wait_for_ever_with_a_generator_that_cannot_load_their_version(
    make: Callable[..., Generator], announced: Announced, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced.publish(2)
    stage = make()
    stage.handle([delivery(1, min_policy_version=3)])
    lost = announced.publish(3)
    (announced.run_dir / lost.path / "model.safetensors").unlink()
    assert stage.handle([]) == []
    began = time.monotonic()
    monkeypatch.setattr(stage._policies, "_clock", lambda: began + 601)
    with pytest.raises(
        UserError, match=r"cannot load policy version 3.*go to another generator"
    ) as raised:
        stage.handle([])
    assert raised.value.exit == Exit.UNREACHABLE


def test_a_prompt_that_leaves_no_room_is_a_dead_letter_in_words(
    make: Callable[..., Generator], announced: Announced, student_dir: Path, tmp_path: Path
) -> None:
    announced.publish(0)
    long = settings_of(student_dir, tmp_path).model_dump()
    long["task"]["args"] = {"min_length": 90, "max_length": 90}
    stage = make(Settings.model_validate(long))
    outcomes = stage.handle([delivery(1)])
    assert len(outcomes) == 1 and outcomes[0].record is None
    assert "tokens; the student's context is 96" in str(outcomes[0].dead)
    assert not stage.busy


def test_a_completion_never_runs_past_the_context(
    make: Callable[..., Generator], announced: Announced, student_dir: Path, tmp_path: Path
) -> None:
    announced.publish(0)
    stage = make(
        settings_of(student_dir, tmp_path, sampling={"max_completion": 500, "temperature": 0.7})
    )
    stage.handle([delivery(number) for number in range(1, 9)])
    for rollout in finish(stage).values():
        sample = rollout.samples[0]
        assert len(sample.prompt_ids + sample.completion_ids) // 4 <= 96
        assert rollout.temperature == 0.7


def test_the_same_ticket_gives_the_same_rollout_whatever_else_is_in_hand(
    make: Callable[..., Generator], announced: Announced
) -> None:
    announced.publish(0)
    alone = make()
    crowded = make()
    alone.handle([delivery(3)])
    crowded.handle([delivery(number) for number in (9, 2, 3, 4, 17)])
    ours = finish(alone)[3].samples[0]
    theirs = finish(crowded)[3].samples[0]
    assert (ours.completion_ids, ours.version_spans) == (
        theirs.completion_ids,
        theirs.version_spans,
    )
    assert (
        np.abs(
            logprobs_array(ours.generator_logprobs) - logprobs_array(theirs.generator_logprobs)
        ).max()
        < 1e-5
    )


def test_a_student_that_is_not_there_fails_at_setup(
    make: Callable[..., Generator], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="nowhere"):
        make(settings_of(tmp_path / "nowhere", tmp_path))


def test_through_real_streams_every_ticket_arrives_at_the_next_stage(
    bus: Bus, student_dir: Path, tmp_path: Path, announced: Announced
) -> None:
    settings = settings_of(student_dir, tmp_path)
    lease = bus.lease.acquire(30)
    bus.lease.announce(lease, announced.publish(0))
    assert bus.lease.issue(lease, 0, [ticket(number) for number in range(1, 41)], 1000)
    stage = Generator(settings, bus)
    worker = Worker(stage, bus, settings.delivery, 0.2)
    stage.setup()
    while len(bus.state.numbers("verify")) < 40:
        worker.turn()
    assert sorted(bus.state.numbers("verify")) == list(range(1, 41))
    assert bus.state.numbers("generate") == []
    first = decode_work(bus.streams.read("verify", 1)[0].payload)
    assert isinstance(first, Rollout)
    assert (first.route, [timing.stage for timing in first.timings]) == (ROUTE, ["generate"])


def test_a_generator_stops_before_it_hands_out_what_another_policy_than_the_announced_one_wrote(
    make: Callable[..., Generator],
    announced: Announced,
    student_dir: Path,
    other_weights: dict[str, torch.Tensor],
) -> None:
    probe = probe_of(student_dir)
    announced.newest = replace(announced.publish(3), probe=probe)
    stage = make()
    assert stage.busy and stage.stats.numbers["running"] == 4  # asked before the first ticket
    stage.handle([delivery(1)])
    assert set(finish(stage)) == {1}
    announced.newest = replace(announced.publish(13, other_weights), probe=probe)
    with pytest.raises(UserError, match="under policy version 13 the engine gives token"):
        stage.handle([delivery(2)])


@pytest.mark.parametrize(
    ("inference", "trainer", "expected"),
    [
        ({}, {}, 1e-3),
        ({"dtype": "bfloat16"}, {}, 0.3),
        ({}, {"dtype": "bfloat16"}, 0.3),
        ({"guard": {"tolerance": 2.5}}, {}, 2.5),
    ],
    ids=["float32 on both sides", "bfloat16 here", "bfloat16 at the trainer", "as set"],
)
def test_the_guard_tolerates_what_the_precisions_come_to(
    inference: dict[str, Any], trainer: dict[str, Any], expected: float
) -> None:
    sections = {"deployment": {"device": "cpu"}, "inference": inference, "trainer": trainer}
    assert tolerance_of(Settings.model_validate(sections)) == expected
