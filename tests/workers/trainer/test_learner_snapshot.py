"""What a checkpoint holds of a learner is that of its step, whatever the learner does meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.learner_snapshot import LearnerSnapshot
from onstream.workers.trainer.training import OPTIMIZER
from tests.workers.trainer.test_learner import CPU, samples


def learner(model: Path, **changes: Any) -> Learner:
    return Learner(
        model, TrainerSettings.model_validate({"optim": {"lr": 1e-2, "warmup": 0}, **changes}), CPU
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != OPTIMIZER}


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"lora": {"rank": 4}}])
def test_a_copy_is_written_as_the_learner_was_when_it_was_made(
    model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    found = learner(model, **changes)
    if not changes:
        found.model.register_buffer("a_buffer", torch.arange(3.0))
    found.step(samples(found), max_steps=9)
    direct = tmp_path / "direct"
    found.save_checkpoint(direct)
    torch.save(found.state(), direct / OPTIMIZER)
    snapshot = LearnerSnapshot(found)
    snapshot.copy()
    found.step(samples(found), max_steps=9)
    torch.rand(1)
    copied = tmp_path / "copied"
    copied.mkdir()
    snapshot.write(copied)
    assert contents(copied) == contents(direct)
    wanted, got = (torch.load(path / OPTIMIZER, weights_only=True) for path in (direct, copied))
    assert got["steps"] == wanted["steps"] == 1
    assert torch.equal(got["rng"], wanted["rng"])
    moments = wanted["optimizer"]["state"]
    assert moments and got["optimizer"]["param_groups"] == wanted["optimizer"]["param_groups"]
    for number, state in moments.items():
        for name, value in state.items():
            assert torch.equal(got["optimizer"]["state"][number][name], value)


def test_its_size_is_that_of_the_weights_and_two_moments_of_each(model: Path) -> None:
    found = learner(model)
    found.step(samples(found), max_steps=9)
    trained = sum(weight.numel() for weight in found.model.parameters())
    beside = 4 * len(list(found.model.parameters())) + torch.get_rng_state().nbytes
    assert LearnerSnapshot(found).size_bytes == 12 * trained + beside
