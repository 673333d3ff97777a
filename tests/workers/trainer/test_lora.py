"""An adapter is what is trained and checkpointed; generators and exports get whole weights."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.loading import ADAPTER_CONFIG, base_of
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.weights import LoadedPolicy, WeightSum
from onstream.settings.sections.run import ModelSettings
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.lora import write_merged
from tests.tiny import sequences, write_tiny
from tests.workers.trainer.driver import Run

CPU = torch.device("cpu")


def learner(
    directory: Path,
    dropout: float = 0.0,
    targets: list[str] | None = None,
    optimizer: str = "adamw",
) -> Learner:
    lora = {"rank": 4, "alpha": 8, "dropout": dropout, "target_modules": targets}
    optim = {"lr": 1e-2, "warmup": 0, "type": optimizer}
    return Learner(
        directory,
        TrainerSettings.model_validate({"loss": {"type": "sft"}, "optim": optim, "lora": lora}),
        CPU,
    )


@pytest.fixture(params=["qwen3", "llama"], ids=["tied embeddings", "untied"])
def student(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "student", request.param)


def samples() -> list[TrainSample]:
    made = []
    for prompt, completion in zip(*sequences(3, 2, completion=(3, 7), seed=5), strict=True):
        tokens = len(completion)
        made.append(
            TrainSample(prompt, completion, np.ones(tokens, np.uint8), np.zeros(tokens, np.float32))
        )
    return made


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits  # type: ignore[no-any-return]


def test_a_new_adapter_publishes_the_weights_that_it_started_from(student: Path) -> None:
    published = learner(student).published_state()
    start = load_file(student / "model.safetensors")
    assert published.keys() == start.keys()
    assert all(torch.equal(published[name], weight) for name, weight in start.items())


def test_steps_lower_the_loss_and_change_nothing_but_the_adapter(student: Path) -> None:
    adapted = learner(student)
    start = {name: weight.clone() for name, weight in adapted.model.state_dict().items()}
    losses = [adapted.step(samples(), 20)["loss"] for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    after = adapted.model.state_dict()
    base = [name for name in start if ".lora_" not in name]
    assert base and all(torch.equal(after[name], start[name]) for name in base)


def test_muon_takes_both_factors_of_an_adapter(student: Path) -> None:
    adapted = learner(student, optimizer="muon")
    losses = [adapted.step(samples(), 10)["loss"] for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]
    trained = [weight for weight in adapted.model.parameters() if weight.requires_grad]
    assert trained
    assert all(set(adapted._optimizer.state[weight]) == {"momentum_buffer"} for weight in trained)


def test_what_is_published_computes_what_the_trainer_computes(student: Path) -> None:
    adapted = learner(student)
    for _ in range(5):
        adapted.step(samples(), 5)
    whole = AutoModelForCausalLM.from_pretrained(student)
    _, unexpected = whole.load_state_dict(adapted.published_state(), strict=False)
    assert not unexpected
    adapted.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits(whole), logits(adapted.model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_merged_tensor_by_tensor_when_it_is_published(
    student: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    adapted = learner(student)
    for _ in range(3):
        adapted.step(samples(), 5)
    made: list[weakref.ref[torch.Tensor]] = []
    values = WeightSum.values

    def noted(weight: WeightSum) -> torch.Tensor:
        assert not any(one() is not None for one in made), "the sum before is gone"
        made.append(weakref.ref(total := values(weight)))
        return total

    wanted = {name: weight.to(dtype) for name, weight in adapted.published_state().items()}
    state = adapted.live_state()
    monkeypatch.setattr(WeightSum, "values", noted)
    published = LoadedPolicy.of(1, state, dtype).tensors()
    assert len(made) == sum(isinstance(one, WeightSum) for one in state.values()) > 2
    assert published.keys() == wanted.keys()
    assert all(torch.equal(published[name], weight) for name, weight in wanted.items())
    assert not any(weight.requires_grad for weight in published.values())


def test_an_exported_model_has_the_adapter_merged(student: Path, tmp_path: Path) -> None:
    adapted = learner(student)
    for _ in range(5):
        adapted.step(samples(), 5)
    adapted.save_model(tmp_path / "export")
    assert not (tmp_path / "export" / ADAPTER_CONFIG).exists()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    start = AutoModelForCausalLM.from_pretrained(student)
    adapted.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits(exported), logits(adapted.model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(exported), logits(start), atol=1e-2)


def test_a_checkpoint_holds_the_adapter_and_its_bases_name_and_training_goes_on_from_it(
    student: Path, tmp_path: Path
) -> None:
    adapted = learner(student)
    for _ in range(3):
        adapted.step(samples(), 6)
    adapted.save_checkpoint(tmp_path / "checkpoint")
    state = copy.deepcopy(adapted.state())
    assert base_of(tmp_path / "checkpoint") == str(student)
    saved = load_file(tmp_path / "checkpoint" / "adapter_model.safetensors")
    assert saved and all(".lora_" in name for name in saved)
    assert not (tmp_path / "checkpoint" / "model.safetensors").exists()

    resumed = learner(tmp_path / "checkpoint")
    resumed.load_state(state)
    for one in (adapted, resumed):
        for _ in range(3):
            one.step(samples(), 6)
    wanted = adapted.published_state()
    got = resumed.published_state()
    assert all(torch.equal(got[name], weight) for name, weight in wanted.items())


def test_a_killed_trainer_goes_on_from_the_adapters_checkpoint_to_the_same_bits(
    run: Callable[..., Run], redis_url: str, run_name: str, model: Path, tmp_path: Path
) -> None:
    twin = Bus.connect(
        redis_url, f"{run_name}-twin", consumer="tester", block_s=0.2, connect_timeout_s=5
    )
    undisturbed = Run(twin, model, tmp_path, trainer__lora={"rank": 4})
    job = run(trainer__lora={"rank": 4})
    for one in (undisturbed, job):
        one.ready()
    job.until(3)
    assert base_of(job.directory / job.bus.run / "checkpoints" / "step-000002") == str(model)
    assert job.start().step == 2
    for one in (undisturbed, job):
        one.to_the_end()
    ends = [bus.state.newest_policy() for bus in (twin, job.bus)]
    assert ends[0] is not None and ends[1] is not None and ends[0].digest == ends[1].digest
    undisturbed.close_files()
    twin.close()


def test_dropout_is_on_in_the_adapter_alone(student: Path) -> None:
    assert (
        learner(student).step(samples(), 5)["loss"] == learner(student).step(samples(), 5)["loss"]
    )
    dropped = learner(student, dropout=0.5)
    dropped.step(samples(), 5)
    losses = {dropped.step(samples(), 5)["loss"], learner(student).step(samples(), 5)["loss"]}
    assert len(losses) == 2
    assert not any(
        module.training for name, module in dropped.model.named_modules() if "lora" not in name
    )


@pytest.mark.parametrize("targets", [["nowhere"], ["lm_head"], ["q_proj", "embed_tokens"]])
def test_layers_that_cannot_be_adapted_are_refused_with_those_that_can(
    tmp_path: Path, targets: list[str]
) -> None:
    with pytest.raises(UserError, match="q_proj") as raised:
        learner(write_tiny(tmp_path / "student", "llama"), targets=targets)
    assert targets[-1] in raised.value.got
    assert "lm_head" not in raised.value.expected


def test_named_layers_alone_are_adapted(student: Path) -> None:
    adapted = learner(student, targets=["q_proj", "v_proj"])
    adapters = [name for name in adapted.model.state_dict() if ".lora_" in name]
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in adapters}
    assert layers == {"q_proj", "v_proj"}


def test_an_exported_adapter_of_a_base_student_ends_as_it_was_taught(tmp_path: Path) -> None:
    model = ModelSettings(end_tokens=("A",))
    lora = TrainerSettings.model_validate({"lora": {"rank": 4}})
    base = write_tiny(tmp_path / "base")
    Learner(base, lora, CPU, model).save_checkpoint(tmp_path / "checkpoint")
    resumed = Learner(tmp_path / "checkpoint", lora, CPU, model)
    assert resumed.tokenizer.eos_token == "A"
    write_merged(tmp_path / "checkpoint", tmp_path / "exported")
    exported = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert exported.eos_token == "A"
    ends = GenerationConfig.from_pretrained(tmp_path / "exported").eos_token_id
    assert ends == [exported.eos_token_id, 1], "its own end comes last"
