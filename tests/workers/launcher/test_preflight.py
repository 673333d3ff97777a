"""What is refused before the first worker starts, each with a message that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from onstream.pipeline.errors import Exit, UserError
from onstream.settings.load import load_settings
from onstream.settings.plan import Plan, make_plan
from onstream.settings.root import Settings
from onstream.workers.launcher.model_files import check_model, parameters
from onstream.workers.launcher.preflight import (
    check_disk,
    check_files,
    check_resume,
)
from onstream.workers.launcher.single_launcher import only_launcher


def make_model(directory: Path, shape: tuple[int, ...] = (4, 8)) -> Path:
    """The files of a model, as far as the checks look at them."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    header = json.dumps(
        {
            "__metadata__": {"format": "pt"},
            "weight": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 64]},
        }
    ).encode()
    (directory / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(64)
    )
    return directory


def settings_of(tmp_path: Path, *overrides: str) -> Settings:
    model = tmp_path / "student"
    if not model.exists():
        make_model(model)
    return load_settings(
        overrides=[f"run.dir={tmp_path / 'runs'}", f"model.name={model}", *overrides], environ={}
    )


def test_a_whole_model_and_a_built_in_task_pass(tmp_path: Path) -> None:
    check_files(settings_of(tmp_path), teacher=str(make_model(tmp_path / "teacher")))
    assert not (tmp_path / "runs").exists()


def test_images_to_swap_are_looked_for_before_the_start(tmp_path: Path) -> None:
    check_files(
        settings_of(tmp_path, "task.name=colour-words", "eval.swap_images=true", "eval.samples=8"),
        teacher=None,
    )
    check_files(settings_of(tmp_path, "eval.swap_images=true", "eval.samples=0"), teacher=None)
    with pytest.raises(
        UserError, match=r"eval\.swap_images = true, and of 8 held-out problems 0 show images"
    ):
        check_files(settings_of(tmp_path, "eval.swap_images=true", "eval.samples=8"), teacher=None)


@pytest.mark.parametrize("name", ["./nothing", "no/such/directory"])
def test_a_missing_model_directory_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"no model directory {name}"):
        check_model(name, "model.name")


def test_a_missing_directory_beside_existing_ones_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "models" / "student")
    with pytest.raises(UserError, match="no model directory models/studnet"):
        check_model("models/studnet", "model.name")


def test_a_name_that_the_hub_cannot_know_is_refused() -> None:
    with pytest.raises(UserError, match="the Hugging Face hub gives no model"):
        check_model("not a name", "model.name")


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        ("config.json", "no file .*config.json"),
        ("model.safetensors", "has no weights"),
        ("tokenizer.json", "has no tokenizer"),
        ("tokenizer_config.json", "no file .*tokenizer_config.json"),
    ],
)
def test_a_model_that_lacks_a_file_is_refused(tmp_path: Path, lacking: str, words: str) -> None:
    model = make_model(tmp_path / "student")
    (model / lacking).unlink()
    with pytest.raises(UserError, match=words):
        check_model(str(model), "model.name")


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "student")
    (model / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="has no chat template"):
        check_model(str(model), "model.name")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert check_model(str(model), "model.name") == model


def test_a_configuration_that_is_not_json_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "student")
    (model / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json does not read as JSON"):
        check_model(str(model), "model.name")


def test_a_line_that_is_no_json_is_told_before_any_worker(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"data\.jsonl.*2"):
        check_files(
            settings_of(tmp_path, "task.name=jsonl", f"task.path={data}", "eval.samples=1"),
            teacher=None,
        )


def test_parameters_are_counted_from_the_headers(tmp_path: Path) -> None:
    assert parameters(make_model(tmp_path / "student", shape=(128, 64))) == 8192


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_weights_that_are_cut_short_are_refused(tmp_path: Path, size: int) -> None:
    model = make_model(tmp_path / "student")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(
        UserError, match=r"model\.safetensors has [\d,]+ bytes and is no whole safetensors file"
    ):
        check_model(str(model), "model.name")


def test_a_disk_without_room_for_the_checkpoints_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_model(tmp_path / "student", shape=(1 << 20,))
    settings = settings_of(tmp_path, "checkpoint.keep=2", "checkpoint.keep_policies=4")
    # 2^20 parameters: 3 checkpoints of 12 bytes each and 5 policies of 4, so 56 MiB
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 55 << 20))
    with pytest.raises(
        UserError, match=r"55 MiB free.*expected 56 MiB for 3 checkpoints and 5 policy versions"
    ):
        check_disk(settings, student)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 56 << 20))
    check_disk(settings, student)


def plans(tmp_path: Path, *theirs: str) -> tuple[Settings, Plan, Plan]:
    settings = settings_of(tmp_path)
    return settings, make_plan(settings), make_plan(settings_of(tmp_path, *theirs))


def test_the_same_settings_resume(tmp_path: Path) -> None:
    settings, ours, theirs = plans(tmp_path, "trainer.max_steps=7", "trainer.optim.lr=1e-3")
    check_resume(settings, ours, theirs, lambda: 0)
    check_resume(settings, ours, None, lambda: 0)


def test_a_run_that_exists_with_other_settings_is_refused_by_their_names(tmp_path: Path) -> None:
    settings, ours, theirs = plans(
        tmp_path, "run.seed=7", "orchestrator.group_size=4", "trainer.max_steps=7"
    )
    with pytest.raises(UserError, match=r"orchestrator\.group_size") as refused:
        check_resume(settings, ours, theirs, lambda: 0)
    assert "run.seed" in str(refused.value)
    assert "max_steps" not in str(refused.value)
    assert refused.value.exit == Exit.REFUSED


def test_a_resume_on_another_route_is_refused_with_the_rollouts_in_flight(tmp_path: Path) -> None:
    settings, ours, theirs = plans(
        tmp_path, "trainer.loss.teacher_tau=1", "deployment.num_teacher_gpus=1"
    )
    with pytest.raises(
        UserError,
        match="generate → verify → train, but run 'onstream' by generate → verify → score → train, "
        "with 31 rollouts in flight",
    ):
        check_resume(settings, ours, theirs, lambda: 31)


@pytest.mark.parametrize(
    ("resume", "exists", "words"), [("never", True, "exists"), ("must", False, "there is no run")]
)
def test_resume_never_and_must_are_kept(
    tmp_path: Path, resume: str, exists: bool, words: str
) -> None:
    settings = settings_of(tmp_path, f"run.resume={resume}")
    plan = make_plan(settings)
    with pytest.raises(UserError, match=words):
        check_resume(settings, plan, plan if exists else None, lambda: 0)


def test_a_second_launcher_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    with only_launcher(tmp_path / "run"):
        with (
            pytest.raises(UserError, match=rf"pid {os.getpid()}\) is running") as refused,
            only_launcher(tmp_path / "run"),
        ):
            pass
        assert refused.value.exit == Exit.REFUSED
    with only_launcher(tmp_path / "run"):
        assert (tmp_path / "run" / "launcher.pid").read_text() == str(os.getpid())


def test_the_launcher_imports_no_torch() -> None:
    program = (
        "import sys, onstream.workers.launcher.launcher, onstream.pipeline.tasks\n"
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    result: Any = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
