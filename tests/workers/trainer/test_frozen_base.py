"""The frozen weights under an adapter are bfloat16 where that is what is computed in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from onstream.pipeline.models.loading import load_model
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.trainer import learner as learner_module
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.lora import write_merged
from tests.models.test_gradients import KINDS, a_batch, gradient_of_a_step
from tests.models.test_gradients import written as written_in_float32
from tests.tiny import write_tiny
from tests.workers.trainer.test_lora import samples

CPU = torch.device("cpu")


def adapted(directory: Path, **settings: Any) -> Learner:
    given = {
        "loss": {"type": "sft"},
        "optim": {"lr": 1e-2, "warmup": 0},
        "dtype": "bfloat16",
    } | settings
    return Learner(
        directory, TrainerSettings.model_validate(given | {"lora": {"rank": 4, "alpha": 8}}), CPU
    )


@pytest.fixture(params=["qwen3", "llama"], ids=["tied embeddings", "untied"])
def student(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model whose files are bfloat16, as they are as a rule."""
    return in_bfloat16(write_tiny(tmp_path / "student", request.param))


def in_bfloat16(directory: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    return directory


def test_a_frozen_base_takes_two_bytes_a_parameter(student: Path) -> None:
    model = adapted(student).model
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    matrices = [weight for weight in frozen if weight.ndim > 1]
    assert {weight.dtype for weight in matrices} == {torch.bfloat16}
    assert {weight.dtype for weight in frozen if weight.ndim == 1} == {torch.float32}
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    parameters = sum(weight.numel() for weight in frozen)
    assert sum(weight.nbytes for weight in frozen) < 2.04 * parameters


def test_a_base_that_is_computed_with_in_float32_stays_float32(student: Path) -> None:
    model = adapted(student, dtype="float32").model
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["packed", "padded", "hybrid", "scaled embeddings"])
def test_a_step_over_a_rounded_base_is_the_same_to_the_last_bit(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = KINDS.get(kind, ("gemma", {}))
    directory = in_bfloat16(written_in_float32(tmp_path, family, changes))
    batch = a_batch(load_model(directory, dtype=torch.float32, device=CPU))
    found = gradient(directory, batch)
    assert torch.equal(found, float32_gradient(directory, batch, monkeypatch))
    assert found.any()


@pytest.mark.filterwarnings(
    "ignore:The following .*_pattern keys:RuntimeWarning"
)  # peft's own names
@pytest.mark.parametrize("kind", ["files in float32", "mixture of experts"])
def test_a_base_that_loses_bits_changes_a_step_by_about_what_autocast_does(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = KINDS.get(kind, ("qwen3", {}))
    directory = written_in_float32(tmp_path, family, changes)
    batch = a_batch(load_model(directory, dtype=torch.float32, device=CPU))
    found = gradient(directory, batch)
    autocast = float32_gradient(directory, batch, monkeypatch)
    exact = gradient(directory, batch, dtype="float32")
    gap = float((found - autocast).norm() / exact.norm())
    of_autocast = float((autocast - exact).norm() / exact.norm())
    print(f"{kind}: rounded {gap:.1e}, autocast {of_autocast:.1e}")
    assert gap < 2 * of_autocast


def gradient(directory: Path, batch: list[TrainSample], **settings: Any) -> Tensor:
    """The adapter's gradient by a step, flat."""
    loss = {"teacher_tau": 0.5, "kl_tau": 0.0}
    learner = adapted(directory, loss=loss, microbatch=100, **settings)
    spread_adapter(learner.model)
    return gradient_of_a_step(learner, batch)


def spread_adapter(model: nn.Module) -> None:
    """An adapter that changes something: a fresh one has zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.normal_(0, 0.02)


def float32_gradient(
    directory: Path, batch: list[TrainSample], monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """The same over a base in float32, which autocast rounds for each product."""
    with monkeypatch.context() as patched:
        patched.setattr(learner_module, "round_frozen", lambda model: None)
        return gradient(directory, batch)


def test_what_is_published_is_the_base_with_the_adapter_added_in_float32(student: Path) -> None:
    learner = adapted(student)
    start = {name: weight.float() for name, weight in load_file(student / FILE).items()}
    for _ in range(3):
        learner.step(samples(), 3)
    published = learner.published_state()
    assert published.keys() == start.keys()
    changed = 0
    for name, layer in learner.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            whole = start[f"{name}.weight"] + layer.get_delta_weight("default")
            assert torch.equal(published.pop(f"{name}.weight"), whole.to(torch.bfloat16)), name
            changed += 1
    assert changed == 14
    assert all(torch.equal(weight, start[name].bfloat16()) for name, weight in published.items())


def test_a_saved_model_and_a_merged_checkpoint_are_float32_and_the_same(
    student: Path, tmp_path: Path
) -> None:
    learner = adapted(student)
    learner.step(samples(), 1)
    learner.save_model(tmp_path / "saved")
    learner.save_checkpoint(tmp_path / "checkpoint")
    write_merged(tmp_path / "checkpoint", tmp_path / "merged")
    saved = load_file(tmp_path / "saved" / FILE)
    merged = load_file(tmp_path / "merged" / FILE)
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    assert saved.keys() == merged.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-6)


def test_training_over_a_rounded_base_goes_on_from_a_checkpoint_to_the_same_bits(
    student: Path, tmp_path: Path
) -> None:
    undisturbed = adapted(student)
    undisturbed.step(samples(), 4)
    undisturbed.save_checkpoint(tmp_path / "checkpoint")
    state = copy.deepcopy(undisturbed.state())
    resumed = adapted(tmp_path / "checkpoint")
    resumed.load_state(state)
    for learner in (undisturbed, resumed):
        learner.step(samples(), 4)
    wanted = undisturbed.published_state()
    got = resumed.published_state()
    assert all(torch.equal(got[name], weight) for name, weight in wanted.items())


FILE = "model.safetensors"
