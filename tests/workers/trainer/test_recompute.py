"""Layers computed anew in the backward pass: the same bits, from far fewer bytes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.loading import load_model
from onstream.pipeline.models.recompute import outermost_layers, recompute_layers, recomputes
from onstream.settings.root import Settings
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.trainer.batches.train_samples import TrainSample
from onstream.workers.trainer.learner import Learner
from onstream.workers.trainer.training import learner_at
from tests.models.families import tiny_model
from tests.models.test_gradients import KINDS, a_batch, flat_gradient, written
from tests.saved_bytes import Qwen3Shape, saved_bytes, saved_bytes_per_token

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 8}


@pytest.mark.parametrize(
    "kind", ["packed", "padded", "window in some layers", "hybrid", "mixture of experts"]
)
def test_recomputed_layers_change_no_bit(tmp_path: Path, kind: str) -> None:
    family, changes = KINDS[kind]
    directory = written(tmp_path, family, changes)
    batch = a_batch(load_model(directory, dtype=torch.float32, device=CPU))

    plain = one_step(directory, batch, recompute=False)
    again = one_step(directory, batch, recompute=True)

    assert plain[0] == again[0]
    assert torch.equal(plain[1], again[1])
    assert plain[1].any()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_layers_with_an_adapter_change_no_bit(tmp_path: Path, dropout: float) -> None:
    directory = written(tmp_path, *KINDS["packed"])
    batch = a_batch(load_model(directory, dtype=torch.float32, device=CPU))
    lora = {**LORA, "dropout": dropout}

    plain = one_step(directory, batch, recompute=False, lora=lora)
    again = one_step(directory, batch, recompute=True, lora=lora)

    assert plain[0] == again[0]
    assert torch.equal(plain[1], again[1])
    assert plain[1].any()


def one_step(
    directory: Path,
    batch: list[TrainSample],
    *,
    recompute: bool,
    lora: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], Tensor]:
    """Metrics of a step, and its gradient before clipping, flat."""
    given = {"loss": {"teacher_tau": 0.5, "kl_tau": 0.0}, "microbatch": 100}
    settings = TrainerSettings.model_validate(given | ({"lora": lora} if lora else {}))
    learner = Learner(directory, settings, CPU, recompute=recompute)
    found: list[Tensor] = []

    def keep(max_steps: int) -> dict[str, float]:
        found.append(flat_gradient(learner.model))
        return {}

    learner._update = keep  # type: ignore[method-assign]
    torch.manual_seed(1)  # for dropout
    return learner.step(batch, 10), found[0]


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_a_recomputed_layer_keeps_its_input_alone(half: bool) -> None:
    shape = Qwen3Shape(hidden=64, intermediate=160, heads=4, key_value_heads=2, head=16)

    plain = saved_bytes_per_token(shape, half=half)
    again = saved_bytes_per_token(shape, half=half, recompute=True)

    print(f"bytes a token and layer: {plain:.0f}, recomputed {again:.0f}")
    assert again == 4 * shape.hidden
    assert plain > 10 * again


def test_the_layers_of_a_model_are_found_once_each() -> None:
    model = tiny_model("qwen3")
    assert [type(layer).__name__ for layer in outermost_layers(model)] == ["Qwen3DecoderLayer"] * 4


def test_a_model_without_such_layers_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"(?s)trainer\.recompute = .layer.*ctrl.*names no layers"):
        recompute_layers(tiny_model("ctrl"), draws_random=False)


@pytest.mark.parametrize(
    ("choice", "recomputed"), [("auto", False), ("none", False), ("layer", True)]
)
def test_on_a_cpu_layers_are_recomputed_only_where_that_is_asked_for(
    choice: str, recomputed: bool
) -> None:
    settings = Settings.model_validate({"trainer": {"recompute": choice}})
    assert recomputes(settings, "a model that is not read", CPU) is recomputed


def test_a_trainer_starts_with_the_layers_recomputed_that_its_settings_ask_for(
    tmp_path: Path,
) -> None:
    directory = written(tmp_path, *KINDS["packed"])
    kept = {}
    for choice in ("none", "layer"):
        settings = Settings.model_validate(
            {"model": {"name": str(directory)}, "trainer": {"recompute": choice}}
        )
        kept[choice] = saved_bytes(learner_at(settings, None).model, 64, half=False)
    assert kept["none"] > 8 * kept["layer"]


@pytest.mark.parametrize(("gpu_bytes", "recomputed"), [(1 << 40, False), (1 << 20, True)])
def test_on_a_gpu_auto_goes_by_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_bytes: int, recomputed: bool
) -> None:
    stub_of_a_gpu = SimpleNamespace(total_memory=gpu_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: stub_of_a_gpu)
    directory = written(tmp_path, *KINDS["packed"])
    assert recomputes(Settings(), directory, torch.device("cuda")) is recomputed
