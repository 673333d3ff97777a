"""A run whose generator shares no disk with the trainer.

Its weights come through Redis, as deltas.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = "examples/reverse-text/onstream.toml"
STEPS = 30


@pytest.fixture
def run(
    tmp_path: Path, redis_url: str, run_name: str
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All stages but the generator, in `here`, and a generator whose directory is `elsewhere`."""
    shared = [
        f"run.name={run_name}",
        f"redis.url={redis_url}",
        f"trainer.max_steps={STEPS}",
        "weights.transport=redis",
        "trainer.dtype=bfloat16",
        "trainer.optim.lr=5e-4",
        "eval.samples=128",
    ]
    overrides = {
        "up": [
            *shared,
            f"run.dir={tmp_path / 'here'}",
            'deployment.stages=["verify","score","train"]',
            "weights.full_every=10",
        ],
        "worker": [*shared, f"run.dir={tmp_path / 'elsewhere'}"],
    }
    words = {"up": ["up"], "worker": ["worker", "generator"]}
    processes = {}
    for name, values in overrides.items():
        command = [sys.executable, "-m", "onstream", *words[name], EXAMPLE]
        command += [word for value in values for word in ("--set", value)]
        with (tmp_path / name).open("w") as output:
            processes[name] = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True
            )
    yield processes
    for process in processes.values():
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_the_student_learns_and_nothing_of_the_run_directory_is_needed_where_it_generates(
    run: dict[str, subprocess.Popen[str]], tmp_path: Path, run_name: str
) -> None:
    assert run["up"].wait() == 0, (tmp_path / "up").read_text()
    assert run["worker"].wait(timeout=300) == 0, (tmp_path / "worker").read_text()
    here = tmp_path / "here" / run_name
    elsewhere = tmp_path / "elsewhere"
    assert not list(elsewhere.rglob("*.safetensors"))
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (here / "metrics.jsonl").read_text().splitlines()
    ]
    full_bytes = (here / "policies/000000/model.safetensors").stat().st_size
    assert [row["policy_version"] for row in rows] == list(range(1, STEPS + 1))
    assert all(0 < row["publish_bytes"] < full_bytes and 0 < row["delta_share"] < 1 for row in rows)
    report = json.loads((here / "report.json").read_text())
    print(
        f"{report['publish_bytes']:,.0f} bytes an update; a full set has {full_bytes:,}.",
        f"{report['delta_share']:.1%} of the weights changed.",
    )
    assert report["steps"] == STEPS
    assert report["eval"]["after"] > report["eval"]["before"] + 0.1
