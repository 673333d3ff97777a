"""`onstream up examples/tool-use/onstream.toml`: a student learns to use a tool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from onstream.settings.load import load_settings
from onstream.workers.evaluation.versions import evaluate_version
from tests.workers.evaluation.test_tool_use import EXAMPLE, WRONG

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 340 CPU seconds, which a busy machine may not give in ten minutes
@pytest.mark.rotates("a run of episodes, or of teachers by name", 0, 3)
def test_a_student_learns_to_use_the_tool_and_not_to_do_without(tmp_path: Path) -> None:
    settings = EXAMPLE / "onstream.toml"
    command = [sys.executable, "-m", "onstream", "up", str(settings)]
    done = subprocess.run(
        [*command, "--set", f"run.dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    directory = tmp_path / "tool-use"
    report = json.loads((directory / "report.json").read_text())
    assert report["eval"]["before"] <= 0.4
    assert report["eval"]["after"] >= 0.9
    [last] = [
        row
        for row in map(json.loads, (directory / "evals.jsonl").read_text().splitlines())
        if row["version"] == report["eval"]["version"]
    ]
    assert last["tool_calls"] == pytest.approx(2, abs=0.2)
    sets = [f"run.dir={tmp_path}", WRONG, "eval.samples=64"]
    assert evaluate_version(load_settings([settings], sets, environ={}), None)["exact"] < 0.05
