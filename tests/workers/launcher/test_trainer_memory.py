"""What `onstream check` prints of the trainer's memory, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onstream.pipeline.errors import UserError
from onstream.settings.devices import smallest_gpu_bytes
from onstream.settings.root import Settings
from onstream.workers.launcher import trainer_memory
from onstream.workers.launcher.trainer_memory import check_memory, memory_rows
from tests.pipeline.models.test_memory import QWEN3_4B
from tests.workers.launcher.test_preflight import check_all, make_model, settings_of

QWEN3_06B = QWEN3_4B | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
}
QWEN3_8B = QWEN3_4B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}
H100 = 81559
"""MiB, as nvidia-smi says."""


@pytest.fixture
def a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_for_nvidia_smi(tmp_path, monkeypatch, f"{H100}\n")


def stand_in_for_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, code: int = 0
) -> None:
    """A program of that name that tells of GPUs which are not there."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nprintf '{told}'\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def student(tmp_path: Path, config: dict[str, object], *overrides: str) -> Settings:
    """Settings whose student has this configuration, and no weights to count."""
    directory = make_model(tmp_path / "student")
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").unlink()
    return settings_of(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("told", "code", "expected"),
    [("81559\\n", 0, 81559 << 20), ("81559\\n24564\\n", 0, 24564 << 20), ("[N/A]\\n", 0, None)],
    ids=["one", "the smaller of two", "without a number"],
)
def test_the_memory_of_a_gpu_is_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, code: int, expected: int | None
) -> None:
    stand_in_for_nvidia_smi(tmp_path, monkeypatch, told, code)
    assert smallest_gpu_bytes() == expected


def test_without_nvidia_smi_no_gpu_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert smallest_gpu_bytes() is None


@pytest.mark.usefixtures("a_gpu")
def test_the_memory_of_4b_with_an_adapter_is_told_part_by_part(tmp_path: Path) -> None:
    settings = student(
        tmp_path,
        QWEN3_4B,
        "deployment.device=cuda",
        "trainer.lora.rank=16",
        "trainer.microbatch=16384",
    )
    rows = memory_rows(settings)
    assert list(rows)[-3:] == [
        "together",
        "published",
        "checkpoint",
    ]  # what is not on the GPU follows
    assert {name: told.strip() for name, told in rows.items()} == {
        "weights": "8.2 GB",
        "gradients": "132.1 MB",
        "optimizer": "264.2 MB",
        "activations": "9.2 GB  rows of 16,384 tokens, layers recomputed",
        "head": "2.5 GB  1,024 positions at once",
        "together": "20.3 GB  of the 85.5 GB of its GPU",
        "published": "8.0 GB  in the host's memory",
        "checkpoint": "396.4 MB  in the host's memory, while one is written",
    }


def test_on_a_cpu_the_memory_of_the_machine_is_told(tmp_path: Path) -> None:
    rows = memory_rows(student(tmp_path, QWEN3_06B))
    assert rows["together"].endswith("of this machine")
    assert rows["activations"].endswith("nothing recomputed")


def test_a_configuration_without_sizes_is_said_not_to_be_known(tmp_path: Path) -> None:
    assert memory_rows(student(tmp_path, {})) == {
        "together": "not known: the student's config.json does not say its sizes"
    }


def test_nothing_is_told_where_no_trainer_starts(tmp_path: Path) -> None:
    settings = student(
        tmp_path, QWEN3_06B, 'deployment.stages=["verify"]', "redis.url=redis://host/0"
    )
    assert memory_rows(settings) == {}


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("config", "overrides", "advice"),
    [
        (QWEN3_4B, ["trainer.lora.rank=16", "trainer.recompute=none"], 'recompute = "layer"'),
        (QWEN3_4B | {"num_hidden_layers": 44}, [], 'trainer.optim.states = "host"'),
        (QWEN3_8B, [], "trainer.lora.rank = 16"),
        (QWEN3_8B | {"num_hidden_layers": 400}, [], "Take a smaller student"),
    ],
    ids=["recompute", "states", "lora", "none"],
)
def test_a_trainer_that_cannot_fit_its_gpu_is_refused_with_what_would_make_it_fit(
    tmp_path: Path, config: dict[str, object], overrides: list[str], advice: str
) -> None:
    microbatch = "trainer.microbatch=16384"
    longest = "inference.sampling.max_completion=16384"
    settings = student(tmp_path, config, microbatch, longest, *overrides)
    with pytest.raises(UserError) as refused:
        check_memory(settings, "cuda")
    assert "of its GPU" in str(refused.value)
    assert advice in refused.value.next_step


@pytest.mark.usefixtures("a_gpu")
def test_what_fits_is_not_refused(tmp_path: Path) -> None:
    settings = student(tmp_path, QWEN3_06B, "trainer.microbatch=16384")
    check_memory(settings, "cuda")


@pytest.mark.usefixtures("a_gpu")
def test_a_share_of_a_gpu_is_all_that_a_trainer_may_take(tmp_path: Path) -> None:
    shares = '{"train": 0.1, "inference": 0.4, "teacher": 0.4}'
    settings = student(
        tmp_path,
        QWEN3_06B,
        "deployment.device=cuda",
        "deployment.share_gpus=true",
        f"deployment.gpu_memory_shares={shares}",
    )
    with pytest.raises(UserError, match=r"at most the 8\.6 GB of its GPU"):
        check_memory(settings, "cuda")


@pytest.mark.usefixtures("a_gpu")
def test_onstream_up_refuses_it_before_anything_starts(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "student")
    (directory / "config.json").write_text(json.dumps(QWEN3_8B))
    with pytest.raises(UserError, match=r"the trainer of .* takes about"):
        check_all(tmp_path, "deployment.device=cuda", "trainer.lora.rank=4096")


@pytest.mark.parametrize(
    ("gigabytes", "overrides", "advice"),
    [
        (80, [], "Set trainer.lora.rank = 16."),
        (8, [], "Take a smaller student, or a GPU."),
        (8, ["trainer.lora.rank=16"], "Take a smaller student, or a GPU."),
        (140, [], None),
    ],
)
def test_on_a_cpu_a_model_that_the_machine_cannot_hold_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gigabytes: int,
    overrides: list[str],
    advice: str | None,
) -> None:
    """8.19e9 parameters of 16 bytes: 131 GB; with an adapter 33."""
    monkeypatch.setattr(trainer_memory, "host_bytes", lambda: gigabytes * 10**9)
    settings = student(tmp_path, QWEN3_8B, *overrides)
    if advice is None:
        check_memory(settings, "cpu")
        return
    with pytest.raises(
        UserError, match="for weights, gradients and the optimizer alone"
    ) as refused:
        check_memory(settings, "cpu")
    assert refused.value.next_step == advice
