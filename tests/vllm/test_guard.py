"""The guard over a real vLLM: updates that arrive whole pass, and the two faults that vLLM itself
does not notice are found.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.records import PolicyVersion
from onstream.pipeline.weights import LoadedPolicy
from onstream.settings.sections.inference import InferenceSettings
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.engines.vllm import startup
from onstream.workers.generator.guard import FLOAT32_TOLERANCE, Guard
from onstream.workers.generator.student import open_student
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.publication.policy_probe import prober
from tests.vllm.conftest import on_vllm

pytestmark = pytest.mark.slow
STEP = 1e-3  # the learning rate of the example


@pytest.fixture(scope="module")
def engine(student_dir: Path) -> Iterator[Any]:
    """A vLLM whose workers can be made to forget the head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "EXTENSION", "tests.vllm.faulty_extension.Forgetful")
        student = open_student(on_vllm(student_dir))
    yield student.engine
    student.engine.close()


class Trainer:
    """Takes steps, and publishes each to the engine and its guard, as trainer and generator do
    between them.
    """

    def __init__(self, engine: Any, student_dir: Path) -> None:
        settings = TrainerSettings.model_validate(
            {"loss": {"type": "sft"}, "optim": {"lr": STEP, "warmup": 0}}
        )
        self.engine = engine
        self.learner = Learner(student_dir, settings, torch.device("cpu"))
        self.prober = prober(self.learner, InferenceSettings())
        self.guard = Guard(engine, interval=1, tolerance=FLOAT32_TOLERANCE, family="qwen3")
        self.number = engine.version

    def publish(self) -> PolicyVersion:
        self.number += 1
        loaded = LoadedPolicy.of(
            self.number,
            {name: weight.clone() for name, weight in self.learner.published_state().items()},
        )
        self.engine.load(loaded)
        policy = PolicyVersion(self.number, loaded.digest, "", 0, probe=self.prober.ask())
        self.guard.look(policy)
        return policy

    def step(self) -> None:
        ids = np.random.default_rng(self.number).integers(8, 128, (16, 24)).astype(np.int32)
        mask = np.ones(12, np.uint8)
        zeros = np.zeros(12, np.float32)
        self.learner.step([TrainSample(row[:12], row[12:], mask, zeros) for row in ids], 10)

    def answers(self) -> list[Any]:
        """What is written until nothing is in hand and the last version is loaded; the guard has
        had its answers then.
        """
        written = []
        while self.engine.active or self.engine.version != self.number:
            written += self.guard.take(self.engine.step())
        return written


@pytest.fixture
def trainer(engine: Any, student_dir: Path) -> Iterator[Trainer]:
    yield Trainer(engine, student_dir)
    while engine.active:
        engine.step()
    engine.on_new_weights = "recompute"


def load(engine: Any, tokens: int) -> None:
    """Fill the engine's slots."""
    prompts = np.random.default_rng(0).integers(8, 128, (48, 40)).astype(np.int32)
    engine.add(
        [GenerationRequest(key, prompt, tokens, seed=key) for key, prompt in enumerate(prompts)]
    )


@pytest.mark.parametrize("mode", ["recompute", "wait", "abort"])
def test_updates_under_load_that_arrive_whole_pass(trainer: Trainer, mode: str) -> None:
    trainer.engine.on_new_weights = mode
    trainer.publish()
    trainer.answers()
    for _ in range(3):
        load(trainer.engine, 30)
        trainer.step()
        policy = trainer.publish()
        assert len(trainer.answers()) == 48
        trainer.guard.look(policy)  # an engine that waits turns to it only now
        trainer.answers()
        assert trainer.guard.checked == policy.number


def test_a_head_that_an_update_left_behind_is_found_after_one_step_of_training(
    trainer: Trainer,
) -> None:
    trainer.publish()
    trainer.answers()
    rpc = trainer.engine._background.run
    rpc(trainer.engine._llm.collective_rpc("forget_the_head", args=(True,)))
    try:
        trainer.step()
        policy = trainer.publish()
        with pytest.raises(
            UserError, match=f"under policy version {policy.number} the engine gives token"
        ) as caught:
            trainer.answers()
    finally:
        rpc(trainer.engine._llm.collective_rpc("forget_the_head", args=(False,)))
    print(f"head left behind: {caught.value.got}")
    assert caught.value.exit == Exit.REFUSED


def test_a_prefix_cache_that_outlives_an_update_is_found_after_one_step_of_training(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring prompts would not show it: vLLM reads no cache for those."""
    from onstream.workers.generator.engines.vllm import engine

    trainer.publish()
    trainer.answers()
    monkeypatch.setitem(engine.PAUSES, "recompute", ("keep", False))
    trainer.step()
    policy = trainer.publish()
    with pytest.raises(
        UserError, match=f"under policy version {policy.number} the engine gives token"
    ) as caught:
        trainer.answers()
    print(f"cache kept: {caught.value.got}")
