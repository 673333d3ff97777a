"""What the server of the teacher is started with; tests/vllm starts it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from onstream.pipeline.errors import UserError
from onstream.settings.load import load_settings
from onstream.settings.root import Settings
from onstream.workers.teacher import server_command
from onstream.workers.teacher.server_command import arguments, context_tokens, serve
from onstream.workers.tiny_models.fresh import ModelShape, write_fresh

TAU = "trainer.loss.teacher_tau=1"


def settings_of(*overrides: str) -> Settings:
    return load_settings(
        overrides=[
            TAU,
            "teacher_inference.engine=vllm",
            "deployment.num_teacher_gpus=2",
            *overrides,
        ],
        environ={},
    )


def value_of(flag: str, given: list[str]) -> str:
    return given[given.index(flag) + 1]


def test_on_gpus_it_is_one_server_over_all_of_them_under_the_teachers_name() -> None:
    given = arguments(
        settings_of(
            "deployment.device=cuda",
            "teacher_inference.model.name=org/big",
            "trainer.loss.teacher_top_k=32",
            'teacher_inference.extra_args=["--max-model-len", "99"]',
        ),
        port=8123,
        context=4096,
    )
    assert given == [
        *(
            "--model",
            "org/big",
            "--served-model-name",
            "org/big",
            "--host",
            "127.0.0.1",
            "--port",
            "8123",
        ),
        *(
            "--tensor-parallel-size",
            "2",
            "--max-model-len",
            "4096",
            "--dtype",
            "bfloat16",
            "--max-logprobs",
            "32",
        ),
        *("--enable-scale-out", "--max-model-len", "99"),
    ]


def test_on_a_shared_gpu_it_keeps_to_its_share() -> None:
    shares = [
        f"deployment.gpu_memory_shares.{role}=0.3" for role in ("train", "inference", "teacher")
    ]
    given = arguments(
        settings_of("deployment.device=cuda", "deployment.share_gpus=true", *shares), 1, 1
    )
    assert value_of("--gpu-memory-utilization", given) == "0.3"


def test_on_a_cpu_it_is_one_eager_server_in_float32(tmp_path: Path) -> None:
    given = arguments(
        settings_of("deployment.device=cpu", f"teacher_inference.model.name={tmp_path}"), 1, 1
    )
    assert value_of("--tensor-parallel-size", given) == "1"
    assert value_of("--dtype", given) == "float32"
    assert value_of("--max-logprobs", given) == "20"
    assert "--enforce-eager" in given and "--gpu-memory-utilization" not in given
    assert (
        value_of("--dtype", arguments(settings_of("teacher_inference.dtype=bfloat16"), 1, 1))
        == "bfloat16"
    )


def test_its_context_holds_the_longest_sample_twice_and_no_more_than_the_teacher(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = f"model.name={model_dir}"
    assert context_tokens(settings_of(student, "inference.sampling.max_completion=16")) == 512
    monkeypatch.setattr(server_command, "LEAST_CONTEXT", 64)
    short = context_tokens(settings_of(student, "inference.sampling.max_completion=16"))
    assert (
        context_tokens(settings_of(student, "inference.sampling.max_completion=26")) == short + 20
    )
    with pytest.raises(
        UserError, match="is 512 tokens; expected at least 513: a sample of up to 512 tokens"
    ):
        context_tokens(settings_of(student, "inference.sampling.max_completion=512"))


def test_a_teacher_of_another_vocabulary_is_refused_before_the_server_loads_it(
    model_dir: Path, tmp_path: Path
) -> None:
    other = write_fresh(tmp_path, ModelShape(hidden=32, layers=1, intermediate=64), seed=1)
    file = other / "tokenizer.json"
    file.write_text(
        file.read_text().replace('"a":', '"A-B":').replace('"b":', '"a":').replace('"A-B":', '"b":')
    )
    with pytest.raises(UserError, match="the vocabulary of the teacher"):
        serve(
            settings_of(
                f"model.name={model_dir}",
                f"teacher_inference.model.name={other}",
                "inference.sampling.max_completion=16",
            ),
            1,
        )


def test_what_the_environment_says_of_vllm_wins(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(
        os, "execve", lambda path, command, environ: became.append((command, environ))
    )
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    serve(
        settings_of(
            f"model.name={model_dir}",
            "inference.sampling.max_completion=16",
            "deployment.device=cpu",
        ),
        8123,
    )
    [(command, environ)] = became
    server = "vllm.entrypoints.openai.api_server"
    assert command[:4] == [sys.executable, "-P", "-m", server]
    assert environ["VLLM_CPU_KVCACHE_SPACE"] == "7"
    assert (environ["TORCHDYNAMO_DISABLE"], environ["VLLM_NO_USAGE_STATS"]) == ("1", "1")
