"""Records become samples, and broken ones are named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from onstream.pipeline.record_codec import ids_bytes, logprobs_bytes, mask_bytes
from onstream.pipeline.records import Rollout, Sample, Ticket, VersionSpan
from onstream.settings.sections.losses import RlLoss
from onstream.workers.trainer.batches.batch_builder import TrainableUnit
from onstream.workers.trainer.batches.train_samples import (
    SampleDecoder,
    TrainSample,
    training_samples,
)
from onstream.workers.trainer.metrics_files import sample_rows
from tests.workers.trainer.driver import rollout


def accept(sample: TrainSample) -> None:
    """A learner that takes everything."""


def samples_of(units: list[TrainableUnit], loss: RlLoss | None = None) -> list[TrainSample]:
    """The samples of `units` as version 2 trains on them."""
    decoder = SampleDecoder(group_size=4, check=accept)
    for record in (record for unit in units for record in unit.rollouts):
        assert decoder.problem(record) is None
    return training_samples(units, decoder.samples, loss or RlLoss(), version=2)


def untrainable(
    rollout: Rollout, *, group_size: int, check: Callable[[TrainSample], None]
) -> str | None:
    return SampleDecoder(group_size=group_size, check=check).problem(rollout)


def made(number: int = 6, **changes: Any) -> Rollout:
    return rollout(
        Ticket(number, (number - 1) // 4, 4, (number - 1) // 4, 0, 0, ["train"]), 2, **changes
    )


def test_every_field_arrives_as_an_array_of_its_shape() -> None:
    sample = Sample(
        prompt_ids=ids_bytes([7, 8]),
        completion_ids=ids_bytes([5, 6, 1]),
        loss_mask=mask_bytes([1, 0, 1]),
        generator_logprobs=logprobs_bytes([-0.5, 0, -1.5]),
        version_spans=[VersionSpan(2, 0, 3)],
        completion_text="x",
        teacher_logprobs=logprobs_bytes([-0.25, 0, -2]),
        teacher_top_ids=ids_bytes([1, 2, 3, 4, 5, 6]),
        teacher_top_logprobs=logprobs_bytes([-1, -2, -3, -4, -5, -6]),
        teacher_tail_logprobs=logprobs_bytes([-7, -8, -9]),
    )
    record = made(samples=[sample], temperature=0.5)
    (found,) = samples_of([TrainableUnit(1, (record,), 0, {}, ())])
    assert (found.prompt_ids.tolist(), found.completion_ids.tolist(), found.loss_mask.tolist()) == (
        [7, 8],
        [5, 6, 1],
        [1, 0, 1],
    )
    assert found.generator_logprobs.tolist() == [-0.5, 0, -1.5]
    assert found.teacher_top_ids is not None and found.teacher_top_ids.tolist() == [
        [1, 2],
        [3, 4],
        [5, 6],
    ]
    assert found.teacher_top_logprobs is not None and found.teacher_top_logprobs.tolist() == [
        [-1, -2],
        [-3, -4],
        [-5, -6],
    ]
    assert found.teacher_tail_logprobs is not None and found.teacher_tail_logprobs.tolist() == [
        -7,
        -8,
        -9,
    ]
    assert (found.group, found.temperature, found.advantage) == (1, 0.5, 0.0)
    assert found.staleness is not None and found.staleness.tolist() == [0, 0, 0]


def test_advantages_are_within_a_unit_and_every_sample_of_a_rollout_has_its_own() -> None:
    two = made(5, reward=1.0)
    two.samples = [*two.samples, *two.samples]
    units = [
        TrainableUnit(1, (two, made(6, reward=0.0)), 0, {}, ()),
        TrainableUnit(2, (made(9, reward=5.0),), 0, {}, ()),
    ]
    assert [sample.advantage for sample in samples_of(units)] == [
        0.5,
        0.5,
        -0.5,
        0.0,
    ]


def test_the_sampled_teacher_term_has_a_baseline_by_the_other_rollouts_alone() -> None:
    """Of tokens with p = 1/2 and a reverse KL of 1, 2 and 6; the first rollout has two samples."""
    half = math.log(0.5)
    records = []
    for number, kl in ((5, 1.0), (6, 2.0), (7, 6.0)):
        sample = Sample(
            prompt_ids=ids_bytes([7, 8]),
            completion_ids=ids_bytes([5, 6]),
            loss_mask=mask_bytes([1, 0]),
            generator_logprobs=logprobs_bytes([half, -9.0]),
            version_spans=[],
            completion_text="",
            teacher_logprobs=logprobs_bytes([half - kl, -1.0]),
        )
        records.append(made(number, samples=[sample, sample] if number == 5 else [sample]))
    units = [TrainableUnit(1, tuple(records), 0, {}, ())]
    auto = samples_of(units, RlLoss(teacher_tau=1.0, adv_tau=0.0))
    assert [one.teacher_baseline for one in auto] == pytest.approx(
        [4.0, 4.0, (2 * 1 + 6) / 3, (2 * 1 + 2) / 3], rel=1e-5
    )
    plain = samples_of(units, RlLoss(teacher_tau=1.0, adv_tau=0.0, teacher_top_k=0))
    assert [one.teacher_baseline for one in plain] == [0.0] * 4


def test_nothing_is_wrong_with_a_sound_rollout() -> None:
    assert untrainable(made(), group_size=4, check=accept) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group": 2}, "it says group 2 of 4; its number belongs to group 1 of 4"),
        ({"group_size": 8}, "it says group 1 of 8"),
        ({"samples": []}, "it has no samples"),
    ],
)
def test_a_rollout_that_contradicts_its_number_or_is_empty_is_refused(
    changes: dict[str, Any], words: str
) -> None:
    assert words in (untrainable(made(**changes), group_size=4, check=accept) or "")


def test_bytes_that_are_no_array_make_a_rollout_untrainable_and_nothing_crashes() -> None:
    record = made()
    record.samples[0].teacher_logprobs = b"odd"
    assert untrainable(record, group_size=4, check=accept)
    record = made()
    record.samples[0].teacher_top_ids = np.arange(5, dtype="<i4").tobytes() * 7
    assert untrainable(record, group_size=4, check=accept)


def test_what_the_learner_would_refuse_is_refused_in_its_words() -> None:
    def refuse(sample: TrainSample) -> None:
        raise ValueError("an id outside the vocabulary")

    assert untrainable(made(), group_size=4, check=refuse) == "an id outside the vocabulary"


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_decoded_ahead_is_refused_in_the_same_words_when_its_turn_comes(
    ahead: bool,
) -> None:
    decoder = SampleDecoder(group_size=4, check=accept, ahead=ahead)
    sound = made(6)
    odd = made(7)
    odd.samples[0].teacher_logprobs = b"odd"
    decoder.begin([sound, odd])
    assert decoder.problem(sound) is None
    assert "multiple of element size" in (decoder.problem(odd) or "")
    assert list(decoder.samples) == [6]
    decoder.forget(6)
    assert not decoder.samples
    decoder.close()


def test_a_rollout_that_comes_again_after_all_was_forgotten_is_decoded_anew() -> None:
    decoder = SampleDecoder(group_size=4, check=accept, ahead=True)
    decoder.begin([made(samples=[])])
    decoder.clear()
    assert decoder.problem(made()) is None
    decoder.close()


def test_an_excerpt_shows_a_person_what_was_asked_answered_and_thought_of_it() -> None:
    record = made(reward=0.5)
    (row, *rest) = sample_rows(
        [TrainableUnit(unit, (record,), 0, {}, ()) for unit in range(9)], "job", 12
    )
    assert len(rest) == 3
    assert (row["step"], row["uid"], row["reward"], row["policy_versions"]) == (
        12,
        "job/6",
        0.5,
        [2],
    )
    assert row["messages"] == [{"role": "user", "content": "say some words"}]
    generator = np.frombuffer(record.samples[0].generator_logprobs, "<f4").sum()
    assert row["generator_logprob"] == pytest.approx(float(generator))
    record.samples[0].teacher_logprobs = None
    assert (
        sample_rows([TrainableUnit(1, (record,), 0, {}, ())], "job", 12)[0]["teacher_logprob"]
        is None
    )
