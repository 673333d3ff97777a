"""What vLLM is started with, where it is, and what is said where it is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from onstream.pipeline.errors import UserError
from onstream.pipeline.models.tokenizer import has_states
from onstream.settings import engines
from onstream.settings.problems import SettingsError
from onstream.settings.root import Settings
from onstream.workers.generator import student
from onstream.workers.generator.engines.base import UnsupportedModel
from onstream.workers.generator.engines.transformers.engine import TransformersEngine
from onstream.workers.generator.engines.vllm import startup
from onstream.workers.generator.engines.vllm.startup import arguments
from onstream.workers.generator.student import open_student
from onstream.workers.tiny_models.character_tokenizer import VOCABULARY_SIZE, character_tokenizer
from tests.models.families import tiny_config


def settings_of(student_dir: Path | str, device: str = "cpu", **inference: Any) -> Settings:
    sharing = (
        {"share_gpus": True, "gpu_memory_shares": {"inference": 0.3}} if device == "cuda" else {}
    )
    return Settings.model_validate(
        {
            "model": {"name": str(student_dir)},
            "deployment": {"device": device, **sharing},
            "inference": {"engine": "vllm", **inference},
        }
    )


def test_a_generator_that_is_to_use_vllm_where_it_is_not_installed_says_how_to_install_it(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "vllm_importable", lambda: False)
    with pytest.raises(
        SettingsError,
        match=r'inference.engine = "vllm", which is not installed here.*pip install '
        r"'\.\[vllm\]'",
    ):
        open_student(settings_of(student_dir))


def test_on_a_cpu_the_engine_is_transformers_unless_vllm_is_asked_for(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "vllm_importable", lambda: True)
    opened = open_student(settings_of(student_dir, engine="auto", max_batch=4))
    assert isinstance(opened.engine, TransformersEngine)


def test_a_model_that_vllm_does_not_take_is_left_to_transformers_unless_vllm_was_asked_for(
    student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(settings: Settings, *, images: bool, states: bool) -> Any:
        raise UnsupportedModel("vLLM does not take it", expected="another", next_step="Choose one.")

    monkeypatch.setattr(startup, "configure", refuse)
    monkeypatch.setattr(
        student, "student_engine", lambda settings: "vllm"
    )  # as on a machine with a GPU and vLLM
    assert isinstance(
        open_student(settings_of(student_dir, engine="auto", max_batch=4)).engine,
        TransformersEngine,
    )
    with pytest.raises(UserError, match="vLLM does not take it"):
        open_student(settings_of(student_dir))


def test_the_arguments_follow_from_the_settings_and_further_ones_win() -> None:
    given = arguments(
        settings_of(
            "hub/model",
            max_batch=8,
            max_model_len=1024,
            tensor_parallel_size=2,
            extra_args={"seed": 3},
        )
    )
    assert (given["model"], given["max_num_seqs"], given["max_model_len"], given["seed"]) == (
        "hub/model",
        8,
        1024,
        3,
    )
    assert (given["tensor_parallel_size"], given["data_parallel_size"], given["dtype"]) == (
        2,
        1,
        "float32",
    )
    assert (given["enforce_eager"], given["enable_chunked_prefill"], given["logprobs_mode"]) == (
        True,
        False,
        "processed_logprobs",
    )
    assert "distributed_executor_backend" not in given and "gpu_memory_utilization" not in given


def test_on_a_cpu_prefixes_are_not_kept_where_layers_keep_states() -> None:
    """vLLM refuses the one without prompts in parts, which its CPU build cannot have here."""
    given = arguments(settings_of("hub/model"), states=True)
    assert (given["enable_chunked_prefill"], given["enable_prefix_caching"]) == (False, False)
    assert "enable_prefix_caching" not in arguments(settings_of("hub/model"))
    assert "enable_prefix_caching" not in arguments(settings_of("hub/model", "cuda"), states=True)


def test_a_gated_delta_net_in_float32_on_a_cpu_is_refused_with_what_would_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config("qwen3_5_text", vocab_size=VOCABULARY_SIZE).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="CPU GDN attention requires BF16") as caught:
        open_student(settings_of(tmp_path))
    assert 'inference.dtype = "bfloat16"' in caught.value.expected
    monkeypatch.setattr(engines, "vllm_importable", lambda: False)
    with pytest.raises(UserError, match="which is not installed here"):
        open_student(settings_of(tmp_path, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("family", "states"),
    [("qwen3_5_text", True), ("nemotron_h", True), ("gemma3_text", False), ("llama", False)],
)
def test_which_families_keep_states_is_read_from_their_configuration(
    family: str, states: bool
) -> None:
    assert has_states(CONFIG_MAPPING[family]()) is states


def test_on_cuda_it_is_told_its_share_of_a_gpu_and_left_to_compile() -> None:
    given = arguments(settings_of("hub/model", "cuda"))
    assert (given["gpu_memory_utilization"], given["dtype"], given["enforce_eager"]) == (
        0.3,
        "bfloat16",
        False,
    )
    assert "enable_chunked_prefill" not in given
    assert (
        arguments(settings_of("hub/model", "cuda", gpu_memory_utilization=0.6))[
            "gpu_memory_utilization"
        ]
        == 0.6
    )


def test_old_keys_and_values_are_kept_for_what_runs_and_not_for_prompts_that_come_again() -> None:
    assert (
        arguments(settings_of("hub/model", on_new_weights="keep"))["enable_prefix_caching"] is False
    )
    assert "enable_prefix_caching" not in arguments(settings_of("hub/model"))


def test_a_directory_is_named_as_one(student_dir: Path) -> None:
    assert arguments(settings_of(os.path.relpath(student_dir)))["model"] == os.path.relpath(
        student_dir
    )
