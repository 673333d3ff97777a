"""Exports by a job, and what the command line asks for and shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from onstream.pipeline.errors import UserError
from onstream.pipeline.redis.bus import Bus
from onstream.pipeline.redis.job_queue import JobQueue
from onstream.pipeline.weights.directory_store import pinned
from onstream.settings.root import Settings
from onstream.workers.commands.cli import cli
from onstream.workers.jobs import functions
from onstream.workers.jobs.functions import JobContext
from tests.tiny import write_tiny

COPY = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2]); print('copied', sys.argv[3])"


@pytest.fixture
def settings(bus: Bus, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A run with the policy version 3 on disk, and this process as its jobs worker."""
    upload = [sys.executable, "-c", COPY, "{path}", str(tmp_path / "bucket"), "{run}/{version}"]
    made = Settings.model_validate(
        {
            "run": {"name": bus.run, "dir": str(tmp_path)},
            "redis": {"url": redis_url},
            "jobs": {"upload": upload},
        }
    )
    write_tiny(made.run_dir / "policies" / "000003")
    text = f'[run]\nname = "{bus.run}"\ndir = "{tmp_path}"\n[redis]\nurl = "{redis_url}"\n'
    (made.run_dir / "settings.toml").write_text(text)
    monkeypatch.setattr(functions, "context", JobContext(made, redis_url))
    return made


def export(*arguments: Any) -> dict[str, Any]:
    """The job itself, without what makes its process give way to others."""
    return functions.export.__wrapped__(*arguments)  # type: ignore[attr-defined,no-any-return]


def onstream(*arguments: str) -> str:
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False, standalone_mode=False)
    return done.output


def test_an_export_is_a_model_directory_cast_as_asked(settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model"
    assert export(3, str(out), "bfloat16", False) == {
        "version": 3,
        "path": str(out),
        "dtype": "bfloat16",
        "upload": None,
    }
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16
    published = load_file(settings.run_dir / "policies" / "000003" / "model.safetensors")
    assert {tensor.dtype for tensor in published.values()} == {torch.float32}
    exported = load_file(out / "model.safetensors")
    assert all(torch.equal(exported[name], tensor.bfloat16()) for name, tensor in published.items())


def test_an_upload_runs_the_worker_s_command_and_leaves_nothing_behind(
    settings: Settings, tmp_path: Path
) -> None:
    assert export(3, None, None, True)["upload"] == f"copied {settings.run.name}/3"
    assert (tmp_path / "bucket" / "model.safetensors").exists()
    assert list((settings.run_dir / "exports").iterdir()) == []


def test_an_upload_that_fails_says_what_it_wrote(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    with pytest.raises(RuntimeError, match=r"(?s)jobs\.upload ended with 1: .*FileExistsError"):
        export(3, None, None, True)


def test_a_try_that_was_killed_leaves_no_half_export_in_the_way(
    settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").touch()
    export(3, str(tmp_path / "model"), None, False)
    assert not (tmp_path / "model" / "half").exists()
    with pytest.raises(UserError, match="exists"):
        export(3, str(tmp_path / "model"), None, False)


def test_what_the_command_line_asks_for_is_kept_and_listed(
    settings: Settings, redis_url: str, tmp_path: Path
) -> None:
    run = str(settings.run_dir)
    assert "asked for the export of version 3" in onstream(
        "jobs", "export", run, "--to", str(tmp_path / "model")
    )
    assert (
        "the export of version 3 was asked for already, but no jobs worker is at work"
        in onstream("jobs", "export", run, "--to", str(tmp_path / "model"))
    )
    assert "asked for the evaluation of version 3" in onstream(
        "jobs", "evaluate", run, "--version", "3"
    )
    assert "asked for pruning" in onstream("jobs", "prune", run)
    assert pinned(settings.run_dir) == {3}
    rows = json.loads(onstream("jobs", run, "--json"))
    assert sorted((row["kind"], row["status"]) for row in rows) == [
        ("evaluate", "queued"),
        ("export", "queued"),
        ("prune", "queued"),
    ]
    assert "evaluate 3" in onstream("jobs", "list", run)
    with JobQueue(redis_url, settings.run.name, settings.jobs) as jobs:
        assert not jobs.idle()


def test_an_export_to_nowhere_and_a_version_that_is_not_there_are_refused(
    settings: Settings,
) -> None:
    with pytest.raises(UserError, match="neither --to nor --upload"):
        onstream("jobs", "export", str(settings.run_dir))
    with pytest.raises(UserError, match="policy version 9"):
        onstream("jobs", "evaluate", str(settings.run_dir), "--version", "9")


def test_the_trainer_s_way_to_jobs_brings_no_tensor_library() -> None:
    code = (
        "import sys, onstream.pipeline.redis.job_queue, onstream.workers.jobs.worker\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
