"""What is published has the names that a model's files have, and comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from onstream.pipeline.models.weight_names import as_in_memory
from onstream.pipeline.models.weight_shapes import WeightShapes, shapes_of
from onstream.pipeline.weights import LoadedPolicy, WeightsError
from onstream.settings.sections.trainer import TrainerSettings
from onstream.workers.generator.engines.transformers.engine import TransformersEngine
from onstream.workers.tiny_models.character_tokenizer import character_tokenizer
from onstream.workers.trainer.learner import Learner
from tests.models.families import tiny_model

RENAMED = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.3.up_proj.weight",
    "ernie4_5_moe": "model.layers.1.mlp.moe_statics.e_score_correction_bias",
    "granitemoe": "model.layers.0.block_sparse_moe.input_linear.weight",
    "glm4_moe": "model.layers.1.mlp.experts.0.gate_proj.weight",
    "gpt_neox": "embed_out.weight",
}
"""A weight that the files of a family call otherwise than its model."""


@pytest.mark.parametrize("family", [*RENAMED, "qwen3", "gpt_oss"])
def test_weights_have_the_names_of_the_files_and_come_back_as_they_were(
    tmp_path: Path, family: str
) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    in_files = load_file(tmp_path / "model.safetensors")
    for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)):
        published = revert_weight_conversion(loaded, loaded.state_dict())
        assert set(in_files) <= set(published)
        assert all(torch.equal(published[name], weight) for name, weight in in_files.items())
        back = as_in_memory(loaded, published)
        state = loaded.state_dict()
        assert set(back) == set(state)
        assert all(torch.equal(back[name], weight) for name, weight in state.items())
    assert RENAMED.get(family, "lm_head.weight") in published


@pytest.mark.parametrize("family", ["mixtral", "ernie4_5_moe"])
def test_a_trainer_publishes_the_names_of_the_files_and_the_built_in_engine_loads_them(
    tmp_path: Path, family: str
) -> None:
    model = tiny_model(family, vocab_size=128)
    model.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    learner = Learner(tmp_path, TrainerSettings(), torch.device("cpu"))
    published = learner.published_state()
    assert set(load_file(tmp_path / "model.safetensors")) <= set(published)
    engine = TransformersEngine(changed(model), (), slots=2)
    engine.load(LoadedPolicy.of(1, published))
    for name, weight in engine._model.state_dict().items():
        assert torch.equal(weight, learner.model.state_dict()[name]), name


def changed(model: PreTrainedModel) -> PreTrainedModel:
    """Another model of the same configuration."""
    other = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa")
    return other.eval()


def test_weights_by_the_names_of_the_files_fit_and_one_that_is_missing_or_narrow_is_told() -> None:
    model = tiny_model("mixtral")
    given = {
        name: tuple(weight.shape)
        for name, weight in revert_weight_conversion(model, model.state_dict()).items()
    }
    for shapes in (WeightShapes.of(model), shapes_of(model.config)):
        assert shapes.misfit(given) == ""
        own = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        assert shapes.misfit(own) == "", "the names in memory are taken too"
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    narrow = given | {name: (32, 3)}
    assert "weights do not fit MixtralForCausalLM" in shapes.misfit(narrow)
    del narrow[name]
    assert "of another shape ['model.layers.1.mlp.experts.down_proj" in shapes.misfit(narrow)
    engine = TransformersEngine(changed(model), (), slots=2)
    weights = revert_weight_conversion(model, model.state_dict())
    del weights[name]
    with pytest.raises(WeightsError, match=r"of another shape .*experts.down_proj"):
        engine.load(LoadedPolicy.of(1, weights))
