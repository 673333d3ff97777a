"""A model or tokenizer that cannot be used is refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.loading import (
    load_model,
    resolve_device,
    resolve_dtype,
    text_config,
)
from onstream.pipeline.models.tokenizer import load_configs, load_tokenizer
from tests.models.exactness import scoring_gap
from tests.models.families import tiny_model as tiny_family
from tests.tiny import tiny_tokenizer, write_tiny

CPU = torch.device("cpu")


def test_a_directory_loads_whole_and_in_evaluation_mode(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path)
    model = load_model(directory, dtype=torch.bfloat16, device=CPU)
    assert (model.dtype, model.training) == (torch.bfloat16, False)
    assert load_tokenizer(directory).eos_token_id == 1


def test_configurations_load_without_weights_and_a_missing_generation_configuration_is_empty(
    tmp_path: Path,
) -> None:
    directory = write_tiny(tmp_path)
    (directory / "model.safetensors").unlink()
    assert [one.eos_token_id for one in load_configs(directory)] == [1, 1]
    (directory / "generation_config.json").unlink()
    config, generation = load_configs(directory)
    assert (config.eos_token_id, generation.eos_token_id) == (1, None)


@pytest.mark.parametrize(
    "load",
    [load_tokenizer, load_configs, lambda name: load_model(name, dtype=torch.float32, device=CPU)],
)
def test_a_missing_directory_is_named(load: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"from {tmp_path}/nowhere: no such directory"):
        load(tmp_path / "nowhere")  # type: ignore[operator]


def test_an_empty_directory_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load a model from"):
        load_model(tmp_path, dtype=torch.float32, device=CPU)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_of_sequence_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)


def test_missing_weights_are_refused_instead_of_drawn_at_random(tmp_path: Path) -> None:
    file = write_tiny(tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 of its weights, model\.norm\.weight first"):
        load_model(tmp_path, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    "load",
    [load_tokenizer, load_configs, lambda name: load_model(name, dtype=torch.float32, device=CPU)],
)
def test_code_that_comes_with_a_model_is_never_run_and_nobody_is_asked(
    load: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_tiny(tmp_path / "model")
    mark = tmp_path / "mark"
    (directory / "theirs.py").write_text(f"open({str(mark)!r}, 'w')\n")
    for name in ("config.json", "tokenizer_config.json"):
        fields = json.loads((directory / name).read_text())
        fields |= {"model_type": "theirs", "tokenizer_class": "Theirs"}
        classes = {name: f"theirs.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
        fields["auto_map"] = classes | {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}
        (directory / name).write_text(json.dumps(fields))
    monkeypatch.setattr("builtins.input", lambda *_: "y")

    with pytest.raises(UserError) as error:
        load(directory)

    assert "Python code that comes with it, which is not run" in str(error.value)
    assert not mark.exists()


def test_weights_in_pickle_are_refused_by_name(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path)
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"in pickle \(pytorch_model.bin\).*safetensors"):
        load_model(directory, dtype=torch.float32, device=CPU)


def test_a_truncated_weight_file_is_refused(tmp_path: Path) -> None:
    file = write_tiny(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load a model from"):
        load_model(tmp_path, dtype=torch.float32, device=CPU)


def test_what_is_saved_is_loaded_by_plain_transformers(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_tiny(tmp_path))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_is_refused_and_auto_is_the_cpu() -> None:
    assert resolve_device("auto") == CPU
    with pytest.raises(UserError, match="torch finds no CUDA device"):
        resolve_device("cuda")


def test_auto_precision_follows_the_device() -> None:
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16


def test_a_model_whose_attention_sdpa_cannot_compute_is_loaded_with_its_own(tmp_path: Path) -> None:
    written = tiny_family("gpt_oss")
    written.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    assert text_config(model)._attn_implementation == "eager"
    assert scoring_gap(model) < 1e-4
