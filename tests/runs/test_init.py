"""`onstream init`: what it writes runs as it is, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def onstream(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-m", "onstream", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_what_init_writes_is_checked_and_trains_as_it_is(tmp_path: Path) -> None:
    made = onstream("init", "my run", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-1] == "next: cd my run && onstream up onstream.toml"
    home = tmp_path / "my run"
    checked = onstream("check", "onstream.toml", cwd=home)
    assert "No problems." in checked.stdout, checked.stdout
    assert "Warnings" not in checked.stdout

    ran = onstream("up", "onstream.toml", "--set", "trainer.max_steps=2", cwd=home)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads((home / "runs" / "my-run" / "report.json").read_text())
    assert (report["steps"], report["rollouts"], report["eval"]["samples"]) == (2, 64, 8)
    assert report["unscored"]["rollouts"] == 0
    samples = (home / "runs" / "my-run" / "samples.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)["reward_parts"]) == {"right", "letters"} for line in samples)
