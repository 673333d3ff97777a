"""Models that leave a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.loading import load_model
from onstream.settings.root import Settings
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.jobs.export import export
from onstream.workers.trainer.learner import Learner
from tests.tiny import write_tiny

CPU = torch.device("cpu")


@pytest.fixture
def student(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "student")


@pytest.fixture
def settings(tmp_path: Path, student: Path) -> Settings:
    return Settings.model_validate(
        {"run": {"name": "run", "dir": str(tmp_path)}, "model": {"name": str(student)}}
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits  # type: ignore[no-any-return]


def adapted(student: Path, directory: Path) -> Learner:
    """A learner whose adapter changes the model, checkpointed in `directory`."""
    learner = Learner(student, TrainerSettings.model_validate({"lora": {"rank": 4}}), CPU)
    for name, weight in learner.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    learner.save_checkpoint(directory)
    return learner


def test_a_checkpoint_of_an_adapter_leaves_as_whole_weights(
    settings: Settings, student: Path, tmp_path: Path
) -> None:
    learner = adapted(student, settings.run_dir / "checkpoints" / "step-000005")
    assert export(settings, None, tmp_path / "out") == 5
    assert not list((tmp_path / "out").glob("adapter*"))
    learner.model.set_attn_implementation("sdpa")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(exported), logits(learner.model), atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_checkpoint_of_an_adapter_loads_for_evaluation(settings: Settings, student: Path) -> None:
    directory = settings.run_dir / "checkpoints" / "step-000005"
    learner = adapted(student, directory)
    learner.model.set_attn_implementation("sdpa")
    loaded = load_model(directory, dtype=torch.float32, device=CPU)
    torch.testing.assert_close(logits(loaded), logits(learner.model), atol=1e-4, rtol=1e-4)


def test_a_published_version_leaves_as_it_is_without_the_trainers_files(
    settings: Settings, student: Path, tmp_path: Path
) -> None:
    version = settings.run_dir / "policies" / "000003"
    write_tiny(version, seed=1)
    (version / "optimizer.pt").touch()
    assert export(settings, 3, tmp_path / "out") == 3
    assert not (tmp_path / "out" / "optimizer.pt").exists()
    wanted = load_file(version / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[name], weight) for name, weight in wanted.items())


def test_nothing_is_written_over(settings: Settings, student: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        export(settings, 0, student)
