"""An engine that computes another policy than the trainer's is found out, whichever way it does; a
right one passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onstream.pipeline.errors import Exit, UserError
from onstream.pipeline.records import PolicyVersion, Probe, VersionSpan
from onstream.pipeline.weights import LoadedPolicy
from onstream.settings.sections.inference import InferenceSettings
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.generator.engines.base import GenerationRequest
from onstream.workers.generator.engines.transformers.engine import TransformersEngine
from onstream.workers.generator.guard import FLOAT32_TOLERANCE, Guard, compare
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.publication.policy_probe import PROMPTS, prober
from tests.workers.generator.conftest import random_student

IDS = np.array([7, 3, 5], dtype=np.int32)
LOGPROBS = np.array([-0.5, -1.0, -2.0], dtype=np.float32)


@pytest.mark.parametrize(
    ("token", "logprob", "trainer", "below", "difference"),
    [
        (7, -0.5, -0.5, False, 0.0),
        (7, -0.75, -0.5, False, 0.25),
        (3, -0.25, -1.0, False, 0.75),
        # to the engine, the trainer's choice cannot be likelier than its own: -0.5 to -0.875
        (3, -0.875, -1.0, False, 0.375),
        (9, -0.25, -2.0, True, 1.75),
        (9, -2.0, -2.0, True, 1.5),
    ],
)
def test_the_engines_likeliest_token_is_compared_with_the_trainers_few_likeliest(
    token: int, logprob: float, trainer: float, below: bool, difference: float
) -> None:
    found = compare(token, logprob, IDS, LOGPROBS)
    assert (found.trainer_logprob, found.below, found.difference) == (trainer, below, difference)


class Watched(TransformersEngine):
    """Notes what it is asked, and loads all weights but those that `skipped` names."""

    skipped: tuple[str, ...] = ()

    def __init__(self, model: Any, **options: Any) -> None:
        self.asked: list[GenerationRequest] = []
        super().__init__(model, (), **{"slots": 16, **options})
        self.asked.clear()

    def add(self, requests: Sequence[GenerationRequest]) -> None:
        self.asked += requests
        super().add(requests)

    def load(self, policy: LoadedPolicy) -> None:
        kept = {
            name: tensor.clone()
            for name, tensor in self._model.state_dict().items()
            if name in self.skipped
        }
        super().load(policy)
        for name, tensor in kept.items():
            self._model.state_dict()[name].copy_(tensor)


class Run:
    """A trainer's versions and the generator's side of them: an engine, and the guard over it."""

    def __init__(
        self,
        engine: TransformersEngine,
        learner: Learner,
        *,
        interval: int = 1,
        mixes: bool = False,
    ) -> None:
        self.engine = engine
        self.learner = learner
        self.guard = Guard(
            engine, interval=interval, tolerance=FLOAT32_TOLERANCE, family="qwen3", mixes=mixes
        )

    def load(
        self, number: int, weights: dict[str, torch.Tensor], *, probe: bool = True
    ) -> PolicyVersion:
        """Version `number` as the trainer has it, loaded by the engine and known to the guard."""
        self.learner.model.load_state_dict(weights, strict=False)
        probing = prober(self.learner, InferenceSettings())
        loaded = LoadedPolicy.of(number, self.learner.published_state())
        self.engine.load(loaded)
        policy = PolicyVersion(number, loaded.digest, "", 0, probe=probing.ask() if probe else None)
        self.guard.look(policy)
        return policy

    def finish(self) -> list[Any]:
        written = []
        while self.engine.active:
            written += self.guard.take(self.engine.step())
        return written


def weights_of(seed: int) -> dict[str, torch.Tensor]:
    return random_student(seed).state_dict()


@pytest.fixture
def learner(student_dir: Path) -> Learner:
    return Learner(student_dir, TrainerSettings(), torch.device("cpu"))


def test_an_engine_that_loads_what_was_published_passes_at_every_version(
    student: Any, learner: Learner
) -> None:
    run = Run(Watched(student), learner)
    for number in range(4):
        run.load(number, weights_of(number))
        assert run.finish() == []
    assert len(run.engine.asked) == 4 * PROMPTS  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "skipped",
    ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"],
)
def test_an_update_that_leaves_a_part_of_the_model_behind_stops_the_generator(
    student: Any, learner: Learner, skipped: str
) -> None:
    for parameter in student.parameters():
        parameter.data *= 1.01  # the norms, too, differ from the trainer's
    engine = Watched(student)
    engine.skipped = (skipped,)
    run = Run(engine, learner)
    run.load(7, weights_of(1))
    with pytest.raises(UserError, match="under policy version 7 the engine gives token") as caught:
        run.finish()
    assert caught.value.exit == Exit.REFUSED
    assert (
        "the trainer" in caught.value.got
        and "at most 0.001 (inference.guard.tolerance)" in caught.value.expected
    )


def test_after_the_first_version_one_in_so_many_is_asked_about(
    student: Any, learner: Learner
) -> None:
    engine = Watched(student)
    run = Run(engine, learner, interval=3)
    asked = []
    for number in (2, 3, 4, 5, 9, 10):
        run.load(number, weights_of(number))
        asked.append(len(engine.asked) // PROMPTS)
        run.finish()
    assert asked == [1, 1, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("number", "seed"),
    [(1, 1), (2, 5)],
    ids=["a lower number", "the same number with other weights"],
)
def test_a_version_that_replaces_what_was_loaded_is_asked_about_at_once(
    student: Any, learner: Learner, number: int, seed: int
) -> None:
    engine = Watched(student)
    run = Run(engine, learner, interval=100)
    run.load(2, weights_of(2))
    run.load(number, weights_of(seed))  # the answers to the first question are not there yet
    assert len(engine.asked) == 2 * PROMPTS
    assert run.finish() == []


def test_an_answer_is_judged_by_the_version_that_wrote_it(student: Any, learner: Learner) -> None:
    """The slots are taken, so that the probe waits while two newer versions come."""
    engine = Watched(student, slots=2)
    run = Run(engine, learner)
    engine.add(
        [GenerationRequest(key, np.arange(4, 9, dtype=np.int32), 6, seed=key) for key in (1, 2)]
    )
    for number in (1, 2, 3):
        engine.step()
        run.load(number, weights_of(number))
    assert len(run.finish()) == 2
    assert len(engine.asked) == 2 + PROMPTS


def test_where_versions_mix_in_a_prompt_an_answer_that_an_update_overtook_is_asked_for_anew(
    student: Any, learner: Learner
) -> None:
    engine = Watched(student)
    run = Run(engine, learner, interval=100, mixes=True)
    run.load(1, weights_of(1))
    run.load(2, weights_of(2))
    assert run.finish() == []
    assert len(engine.asked) == 2 * PROMPTS


def test_while_an_engine_finishes_what_runs_the_version_to_come_is_not_asked_about(
    student: Any, learner: Learner
) -> None:
    engine = Watched(student, on_new_weights="wait")
    run = Run(engine, learner)
    engine.add([GenerationRequest(1, np.arange(4, 9, dtype=np.int32), 3, seed=0)])
    engine.step()
    policy = run.load(4, weights_of(4))
    assert len(engine.asked) == 1
    while engine.version != 4:
        engine.step()
    run.guard.look(policy)
    assert len(engine.asked) == 1 + PROMPTS
    assert run.finish() == []


def test_a_token_that_is_said_to_be_of_a_version_before_the_loaded_one_stops_the_generator(
    student: Any, learner: Learner
) -> None:
    run = Run(Watched(student), learner)
    run.load(3, weights_of(3))
    (first, *_) = run.engine.step()
    with pytest.raises(UserError, match="policy version 2 wrote a token, after 3 had been loaded"):
        run.guard.take(
            [
                type(first)(
                    first.key,
                    first.token_ids,
                    first.logprobs,
                    first.finish_reason,
                    [VersionSpan(2, 0, 1)],
                )
            ]
        )


def test_every_replica_of_the_model_is_asked(student: Any, learner: Learner) -> None:
    class Two(Watched):
        replicas = 2

    engine = Two(student)
    run = Run(engine, learner)
    run.load(0, weights_of(0))
    assert [request.replica for request in engine.asked] == [0] * PROMPTS + [1] * PROMPTS
    assert run.finish() == []


def test_rollouts_pass_through_and_only_the_guards_own_are_taken_out(
    student: Any, learner: Learner
) -> None:
    run = Run(Watched(student), learner)
    run.load(0, weights_of(0))
    run.engine.add([GenerationRequest(5, np.arange(4, 9, dtype=np.int32), 3, seed=0)])
    assert [one.key for one in run.finish()] == [5]


def test_with_an_interval_of_0_the_first_version_is_asked_about_and_no_other(
    student: Any, learner: Learner
) -> None:
    engine = Watched(student)
    run = Run(engine, learner, interval=0)
    for number in range(3):
        run.load(number, weights_of(number))
        run.finish()
    assert len(engine.asked) == PROMPTS
    assert run.guard.checked == 0


def test_an_engine_that_is_wrong_before_any_update_stops_the_generator_whatever_the_interval(
    student: Any, learner: Learner
) -> None:
    engine = Watched(student)
    engine.skipped = tuple(student.state_dict())  # it goes on with what it started with
    run = Run(engine, learner, interval=0)
    run.load(0, weights_of(1))
    with pytest.raises(UserError, match="under policy version 0 the engine gives token") as caught:
        run.finish()
    assert "computes qwen3 models in another way" in caught.value.next_step


def test_nothing_is_asked_where_the_trainer_sent_no_probe(student: Any, learner: Learner) -> None:
    engine = Watched(student)
    Run(engine, learner).load(0, weights_of(0), probe=False)
    assert engine.asked == []


def test_a_probe_that_is_too_long_for_the_engine_says_what_to_set(
    student: Any, learner: Learner
) -> None:
    engine = Watched(student)
    too_long = Probe([np.arange(96, dtype="<i4").tobytes()], b"", b"")
    with pytest.raises(UserError, match="prompts of 96 tokens; this engine takes 96") as caught:
        Guard(engine, interval=1, tolerance=FLOAT32_TOLERANCE, family="qwen3").look(
            PolicyVersion(0, "", "", 0, probe=too_long)
        )
    assert "inference.guard.tokens to at most 95" in caught.value.next_step
