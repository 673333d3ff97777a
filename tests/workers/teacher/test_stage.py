from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from onstream.pipeline.errors import UserError
from onstream.pipeline.images.feature_cache import no_images
from onstream.pipeline.loop import Worker
from onstream.pipeline.record_codec import (
    decode_work,
    encode,
    ids_array,
    ids_bytes,
    logprobs_array,
    logprobs_bytes,
    mask_bytes,
)
from onstream.pipeline.records import Rollout, Sample, Ticket, Tombstone
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.streams import Move, Out
from onstream.pipeline.stage import Delivery, Outcome
from onstream.settings import engines
from onstream.settings.root import Settings
from onstream.settings.sections.run import DeliverySettings
from onstream.workers.teacher.local_scorer import load_local
from onstream.workers.teacher.scorer import ScoreRequest, Scores
from onstream.workers.teacher.stage import ROOM, Teacher
from onstream.workers.tiny_models.fresh import ModelShape, write_fresh

BUS: Any = SimpleNamespace(images=SimpleNamespace(read=no_images))  # the stage itself moves nothing


class Recorder:
    """A teacher that gives every token −its id / 100, and notes what it was asked together."""

    name = "recorder"
    context_tokens = 64
    vocabulary_size = 128
    passes = 1

    def __init__(self) -> None:
        self.calls: list[list[ScoreRequest]] = []

    def prefetch_images(self, request: ScoreRequest) -> None:
        """It sees no images."""

    def image_problem(self, request: ScoreRequest) -> str | None:
        return "it is a recorder" if request.images else None

    def close(self) -> None:
        """Nothing to release."""

    def score(self, requests: Sequence[ScoreRequest], *, top_k: int) -> list[Scores]:
        self.calls.append(list(requests))
        return [Scores((-request.completion_ids / 100).astype(np.float32)) for request in requests]


def rollout(
    number: int,
    *,
    prompt: Sequence[int] = (5, 6),
    completion: Sequence[int] = (20, 30),
    group: int = 0,
    samples: int = 1,
) -> Rollout:
    sample = Sample(
        prompt_ids=ids_bytes(prompt),
        completion_ids=ids_bytes(completion),
        loss_mask=mask_bytes(np.ones(len(completion))),
        generator_logprobs=logprobs_bytes(np.zeros(len(completion))),
        version_spans=[],
        completion_text="",
    )
    return Rollout(
        number=number,
        group=group,
        group_size=8,
        index=group,
        messages=[],
        info={},
        samples=[sample] * samples,
        temperature=1.0,
        finish_reason="stop",
        route=["score", "train"],
    )


def delivered(*records: Rollout) -> list[Delivery]:
    return [
        Delivery(b"%d-0" % record.number, record.number, record, 100, 1, taken=1.0)
        for record in records
    ]


def stage_with(scorer: Recorder, **settings: Any) -> Teacher:
    teacher = Teacher(Settings.model_validate(settings), BUS, load=lambda _: scorer)
    teacher.setup()
    return teacher


def scored(outcome: Outcome) -> Rollout:
    assert isinstance(outcome.record, Rollout)
    return outcome.record


def test_a_rollout_gets_the_teachers_logprobs_and_its_name() -> None:
    (outcome,) = stage_with(Recorder()).handle(delivered(rollout(1)))
    record = scored(outcome)
    np.testing.assert_allclose(
        logprobs_array(record.samples[0].teacher_logprobs or b""), [-0.2, -0.3]
    )
    assert record.scored_by == "recorder"


def test_a_request_is_made_once_for_each_sample() -> None:
    prefetched = []

    class Prefetching(Recorder):
        def prefetch_images(self, request: ScoreRequest) -> None:
            prefetched.append(request)

    scorer = Prefetching()
    stage_with(scorer).handle(delivered(rollout(1, samples=2)))
    [asked] = scorer.calls
    assert list(map(id, asked)) == list(map(id, prefetched))


def test_a_scorer_of_several_passes_is_given_the_tokens_of_all_of_them_at_once() -> None:
    sizes = []
    for passes in (1, 3):
        recorder = Recorder()
        recorder.passes = passes
        stage = stage_with(recorder, teacher_inference={"max_batch_tokens": 16})
        stage.handle(delivered(*(rollout(number, group=number) for number in range(12))))
        sizes.append(len(recorder.calls[0]))
    assert sizes == [4, 12]


def test_a_likely_token_that_the_student_does_not_know_is_a_dead_letter() -> None:
    class Wider(Recorder):
        def score(self, requests: Sequence[ScoreRequest], *, top_k: int) -> list[Scores]:
            (scores,) = super().score(requests, top_k=top_k)
            ids = np.array([[5], [128]], dtype=np.int32)
            return [Scores(scores.logprobs, ids, np.full((2, 1), -1, dtype=np.float32))]

    (outcome,) = stage_with(Wider()).handle(delivered(rollout(1)))
    assert outcome.dead == "the teacher finds token 128 likely, and the student knows 0 to 127"


def test_vllm_in_process_that_is_not_installed_is_said_with_how_to_install_it(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "vllm_importable", lambda: False)
    settings = {
        "model": {"name": str(model_dir)},
        "teacher_inference": {"engine": "vllm-in-process"},
    }
    with pytest.raises(UserError, match=r"and vLLM is not installed here.*\.\[vllm\]"):
        Teacher(Settings.model_validate(settings), BUS).setup()


def test_the_local_teacher_writes_k_alternatives_and_the_tail_into_every_sample(
    model_dir: Path,
) -> None:
    settings = {
        "model": {"name": str(model_dir)},
        "trainer": {"loss": {"teacher_tau": 1.0, "teacher_top_k": 4}},
    }
    teacher = Teacher(Settings.model_validate(settings), BUS)
    teacher.setup()
    (outcome,) = teacher.handle(delivered(rollout(1, completion=[20, 30, 3], samples=2)))
    for sample in scored(outcome).samples:
        assert logprobs_array(sample.teacher_logprobs or b"").shape == (3,)
        assert ids_array(sample.teacher_top_ids or b"").shape == (12,)
        mass = np.exp(logprobs_array(sample.teacher_top_logprobs or b"")).reshape(3, 4).sum(1)
        np.testing.assert_allclose(
            mass + np.exp(logprobs_array(sample.teacher_tail_logprobs or b"")), 1, atol=1e-5
        )


VIEW = {"teacher_prompt": {"template": "{prompt} {answer}"}}


def with_own_prompt(record: Rollout, *prompt: int) -> Rollout:
    for sample in record.samples:
        sample.teacher_prompt_ids = ids_bytes(prompt)
    return record


def test_a_completion_is_scored_behind_the_prompt_that_is_the_teachers_alone(
    model_dir: Path,
) -> None:
    settings = {
        "model": {"name": str(model_dir)},
        "task": VIEW,
        "inference": {"sampling": {"max_completion": 16}},
        "trainer": {"loss": {"teacher_tau": 1.0, "teacher_top_k": 0}},
    }
    teacher = Teacher(Settings.model_validate(settings), BUS)
    teacher.setup()
    views = {1: (9, 10, 11, 12), 2: (9, 10, 11, 12), 3: (40, 41)}
    records = [
        with_own_prompt(rollout(number, completion=[20 + number, 30, 3]), *view)
        for number, view in views.items()
    ]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for outcome in teacher.handle(delivered(*records)):
        [sample] = scored(outcome).samples
        read = [*views[outcome.delivery.number], *ids_array(sample.completion_ids).tolist()]
        with torch.no_grad():
            logprobs = model(torch.tensor([read])).logits[0, -4:-1].log_softmax(-1)
        np.testing.assert_allclose(
            logprobs_array(sample.teacher_logprobs or b""),
            logprobs[range(3), read[-3:]].numpy(),
            atol=1e-5,
        )
        assert ids_array(sample.prompt_ids).tolist() == [5, 6]


def test_a_rollout_with_another_prompt_than_the_settings_say_is_a_dead_letter() -> None:
    outcomes = [
        *stage_with(Recorder(), task=VIEW).handle(delivered(rollout(1))),
        *stage_with(Recorder()).handle(delivered(with_own_prompt(rollout(2), 9))),
        *stage_with(Recorder(), task=VIEW).handle(delivered(with_own_prompt(rollout(3), 9))),
    ]
    expected = "a prompt for the teacher alone; expected as task.teacher_prompt says"
    assert [outcome.dead for outcome in outcomes] == [
        f"a sample lacks {expected}",
        f"a sample has {expected}",
        None,
    ]


@pytest.mark.parametrize(
    ("teacher_prompt", "words"),
    [
        ({"template": "{prompt}" + "x" * 500}, "reads up to .* and its context is 512"),
        ({"system": "Think."}, "refuses the teacher's prompt: no system role here"),
    ],
)
def test_a_prompt_that_the_teacher_cannot_read_is_refused_at_setup(
    tmp_path: Path, teacher_prompt: dict[str, str], words: str
) -> None:
    model = write_fresh(
        tmp_path / "model", ModelShape(hidden=32, layers=1, intermediate=32), seed=0
    )
    file = model / "chat_template.jinja"
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}"
    file.write_text(f"{refusal}{{% endif %}}{file.read_text()}")
    settings = {
        "model": {"name": str(model)},
        "task": {"teacher_prompt": teacher_prompt},
        "inference": {"sampling": {"max_completion": 16}},
    }
    with pytest.raises(UserError, match=words):
        Teacher(Settings.model_validate(settings), BUS).setup()


def test_a_rollout_whose_images_the_teacher_does_not_read_is_a_dead_letter() -> None:
    shown = rollout(1)
    plain = rollout(2)
    shown.samples[0].images = ["cat"]
    recorder = Recorder()
    dead, done = stage_with(recorder).handle(delivered(shown, plain))
    assert dead.dead == "it would be scored without its images: it is a recorder"
    assert scored(done).number == 2
    assert [len(call) for call in recorder.calls] == [1]


def test_siblings_that_arrive_apart_are_scored_in_one_forward_pass() -> None:
    scorer = Recorder()
    teacher = stage_with(scorer)
    outcomes = teacher.handle(
        delivered(rollout(1, group=0), rollout(9, group=1), rollout(2, group=0))
    )
    assert [scored(outcome).number for outcome in outcomes] == [1, 2, 9]
    assert len(scorer.calls) == 1


def test_a_call_scores_about_one_forward_pass_and_keeps_the_rest_for_the_next() -> None:
    scorer = Recorder()
    teacher = stage_with(scorer, teacher_inference={"max_batch_tokens": 16})
    first = teacher.handle(
        delivered(*(rollout(number, completion=[20] * 6, group=0) for number in range(1, 6)))
    )
    assert teacher.busy
    assert [scored(outcome).number for outcome in first] == [1, 2, 3] and teacher.room == ROOM - 2
    second = teacher.handle([])
    assert [scored(outcome).number for outcome in second] == [4, 5] and teacher.room == ROOM
    assert teacher.handle([]) == []


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            rollout(1, completion=[20] * 63),
            "a sample of 65 tokens is longer than the teacher's context of 64 (recorder)",
        ),
        (
            rollout(1, completion=[20, 128]),
            "token ids from 5 to 128; the teacher recorder knows 0 to 127",
        ),
        (rollout(1, completion=[]), "2 prompt and 0 completion tokens"),
    ],
)
def test_what_cannot_be_scored_is_a_dead_letter_with_the_reason_and_does_not_hold_up_the_others(
    record: Rollout, words: str
) -> None:
    dead, alive = stage_with(Recorder()).handle(delivered(record, rollout(2)))
    assert dead.record is None and dead.dead is not None
    assert words in dead.dead
    assert scored(alive).number == 2


def test_a_sample_exactly_as_long_as_the_context_is_scored() -> None:
    (outcome,) = stage_with(Recorder()).handle(delivered(rollout(1, completion=[20] * 62)))
    assert len(logprobs_array(scored(outcome).samples[0].teacher_logprobs or b"")) == 62


def test_the_local_teacher_scores_a_sample_exactly_as_long_as_its_context(model_dir: Path) -> None:
    scorer = load_local(Settings.model_validate({"model": {"name": str(model_dir)}}))
    request = ScoreRequest(np.full(12, 20, dtype=np.int32), np.full(500, 30, dtype=np.int32))
    assert request.tokens == scorer.context_tokens
    assert np.isfinite(scorer.score([request], top_k=0)[0].logprobs).all()


def test_a_teacher_of_another_vocabulary_is_refused_at_setup(
    model_dir: Path, tmp_path: Path
) -> None:
    other = write_fresh(
        tmp_path / "other", ModelShape(hidden=32, layers=1, intermediate=32), seed=0
    )
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|reserved_0|>", "<|renamed|>"))
    settings = {
        "model": {"name": str(model_dir)},
        "teacher_inference": {"model": {"name": str(other)}},
    }
    teacher = Teacher(Settings.model_validate(settings), BUS)
    with pytest.raises(
        UserError,
        match=r"id 8 is '<\|reserved_0\|>' to the student and '<\|renamed\|>' to the teacher",
    ):
        teacher.setup()


def test_a_teacher_that_is_not_there_is_refused_by_name(model_dir: Path) -> None:
    settings = {
        "model": {"name": str(model_dir)},
        "teacher_inference": {"model": {"name": "./no-such-teacher"}},
    }
    with pytest.raises(UserError, match="no-such-teacher"):
        Teacher(Settings.model_validate(settings), BUS).setup()


class Absurd(Recorder):
    """A teacher that is out of its mind about the prompts that begin with 9."""

    def score(self, requests: Sequence[ScoreRequest], *, top_k: int) -> list[Scores]:
        scored = super().score(requests, top_k=top_k)
        for request, scores in zip(requests, scored, strict=True):
            if request.prompt_ids[0] == 9:
                scores.logprobs[0] = -3.4e38
        return scored


def test_a_rollout_that_got_absurd_scores_is_a_dead_letter_and_the_others_go_on() -> None:
    good, bad = stage_with(Absurd()).handle(delivered(rollout(1), rollout(2, prompt=(9, 6))))
    assert (good.dead, scored(good).number) == (None, 1)
    assert bad.dead == (
        "the teacher 'recorder': teacher_logprobs has the values -3.4e+38 to -0.3; "
        "expected -32768 to 0, in nats"
    )


def test_on_the_streams_a_scored_rollout_goes_to_the_trainer_and_one_too_long_becomes_a_tombstone(
    bus: Bus,
) -> None:
    lease = bus.lease.acquire(5)
    bus.lease.issue(
        lease,
        0,
        [Ticket(number, 0, 8, 0, 0, 0, ["score", "train"]) for number in (1, 2)],
        max_backlog=10,
    )
    written = [rollout(1), rollout(2, completion=[20] * 63)]
    moves = [
        Move(entry.id, [Out("score", r.number, encode(r))])
        for entry, r in zip(bus.streams.read("generate", 2), written, strict=True)
    ]
    assert bus.streams.move("generate", moves) == [True, True]
    worker = Worker(stage_with(Recorder()), bus, DeliverySettings(), block_s=0.2)
    while bus.state.backlog()["score"]:
        worker.turn()
    arrived = {
        record.number: record
        for record in (decode_work(entry.payload) for entry in bus.streams.read("train", 10))
    }
    alive = arrived[1]
    dead = arrived[2]
    assert (
        isinstance(alive, Rollout)
        and alive.route == ["train"]
        and alive.timings[-1].stage == "score"
    )
    np.testing.assert_allclose(
        logprobs_array(alive.samples[0].teacher_logprobs or b""), [-0.2, -0.3]
    )
    assert (
        isinstance(dead, Tombstone)
        and dead.stage == "score"
        and "longer than the teacher's context" in dead.reason
    )
    assert bus.state.dead_numbers() == [2]
