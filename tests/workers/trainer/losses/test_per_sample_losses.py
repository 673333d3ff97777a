"""The losses of the samples add up to the step's own, and collecting them changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from onstream.pipeline.records import Rollout
from onstream.settings.sections.losses import RlLoss
from onstream.workers.trainer.batches.batch_builder import TrainableUnit
from onstream.workers.trainer.batches.train_samples import (
    SampleDecoder,
    TrainSample,
    training_samples,
)
from onstream.workers.trainer.losses.row_loss import PerSampleLosses
from onstream.workers.trainer.training import learner_at
from tests.workers.trainer.records import rollout
from tests.workers.trainer.test_training import settings


def units() -> list[TrainableUnit]:
    def group(first: int) -> tuple[Rollout, Rollout]:
        return rollout(first, group_size=2, versions=(0,) * 3, reward=1.0), rollout(
            first + 1, group_size=2, versions=(0,), reward=0.0
        )

    return [TrainableUnit(at, group(2 * at + 1), 0, {}, ()) for at in range(2)]


def samples_of_units() -> list[TrainSample]:
    decoder = SampleDecoder(group_size=2, check=lambda sample: None)
    for unit in units():
        assert [decoder.problem(record) for record in unit.rollouts] == [None, None]
    return training_samples(units(), decoder.samples, RlLoss(), version=0)


@pytest.mark.parametrize("microbatch", [8192, 16])
def test_the_samples_losses_add_up_to_the_loss_of_the_step(model: Path, microbatch: int) -> None:
    job = settings(model)
    trainer = job.trainer.model_copy(update={"microbatch": microbatch, "head_chunk": 2})
    job = job.model_copy(update={"trainer": trainer})
    samples = samples_of_units()
    plain = learner_at(job, None)
    collecting = learner_at(job, None)
    per_sample = PerSampleLosses()
    metrics = collecting.step(samples, 3, per_sample=per_sample)
    assert metrics == plain.step(samples, 3)
    assert sorted(per_sample.loss) == [0, 1, 2, 3]
    assert sum(per_sample.loss.values()) / metrics["tokens"] == pytest.approx(
        metrics["loss"], rel=1e-5
    )
    assert max(per_sample.mismatch_max.values()) == pytest.approx(metrics["mismatch_max"])


def test_supervised_samples_have_a_loss_and_no_mismatch(model: Path) -> None:
    per_sample = PerSampleLosses()
    job = settings(model, type="sft")
    samples = samples_of_units()
    samples[1].loss_mask[:] = 0
    learner_at(job, None).step(samples, 3, per_sample=per_sample)
    assert sorted(per_sample.loss) == [0, 2, 3] and per_sample.mismatch_max == {}
