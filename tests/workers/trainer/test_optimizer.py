"""Moments in the host's memory: the same steps, and the same checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from onstream.settings.sections.trainer import OptimSettings, TrainerSettings
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.optimizer import HostStatesAdamW, new_optimizer
from tests.tiny import sequences, write_tiny

CPU = torch.device("cpu")
STEPS = 3


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("student"))


def learner(directory: Path, states: str) -> Learner:
    optim = {"lr": 1e-2, "weight_decay": 0.1, "states": states}
    settings = TrainerSettings.model_validate({"loss": {"type": "sft"}, "optim": optim})
    return Learner(directory, settings, CPU)


def samples() -> list[TrainSample]:
    return [
        TrainSample(
            prompt,
            completion,
            np.ones(len(completion), np.uint8),
            np.zeros(len(completion), np.float32),
        )
        for prompt, completion in zip(*sequences(3, 2, completion=(3, 7), seed=5), strict=True)
    ]


def steps(of: Learner) -> None:
    for _ in range(STEPS):
        of.step(samples(), 2 * STEPS)


def weights(of: Learner) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in of.model.state_dict().items()}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_moments_on_the_host_change_no_bit(student: Path) -> None:
    plain = learner(student, "device")
    on_host = learner(student, "host")
    for one in (plain, on_host):
        steps(one)
    assert isinstance(on_host._optimizer, HostStatesAdamW)
    assert_same_bits(weights(on_host), weights(plain))


@pytest.mark.parametrize(("first", "then"), [("device", "host"), ("host", "device")])
def test_a_trainer_goes_on_from_the_moments_that_the_other_kind_has_saved(
    student: Path, first: str, then: str, tmp_path: Path
) -> None:
    undisturbed = learner(student, first)
    steps(undisturbed)
    undisturbed.save_checkpoint(tmp_path)
    state = copy.deepcopy(undisturbed.state())
    resumed = learner(tmp_path, then)
    resumed.load_state(state)
    for one in (undisturbed, resumed):
        steps(one)
    assert_same_bits(weights(resumed), weights(undisturbed))


def test_a_weight_without_a_gradient_stays_and_has_no_moments() -> None:
    moved = torch.nn.Parameter(torch.ones(3))
    still = torch.nn.Parameter(torch.ones(3))
    optimizer = new_optimizer([moved, still], OptimSettings(states="host", weight_decay=0.5))
    moved.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(moved, torch.ones(3))
    assert torch.equal(still, torch.ones(3))
    assert list(optimizer.state_dict()["state"]) == [0]
