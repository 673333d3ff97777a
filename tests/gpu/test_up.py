"""A short `onstream up` of the shipped models, all of whose workers compute on the device."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
STEPS = 4


def test_the_shipped_student_trains_under_the_shipped_teacher(
    tmp_path: Path, device: torch.device
) -> None:
    given = [
        f"run.dir={tmp_path}",
        "run.name=short",
        f"deployment.device={device.type}",
        "inference.engine=transformers",
        "teacher_inference.engine=transformers",
        "orchestrator.batch_size=32",
        f"trainer.max_steps={STEPS}",
        "eval.samples=0",
    ]
    if device.type == "cuda":
        given.append("deployment.share_gpus=true")
        shares = {"train": 0.3, "inference": 0.3, "teacher": 0.2}
        given += [f"deployment.gpu_memory_shares.{kind}={share}" for kind, share in shares.items()]
    options = [part for override in given for part in ("--set", override)]
    command = [sys.executable, "-P", "-m", "onstream", "up", "examples/reverse-text/onstream.toml"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environ = os.environ | {"PYTHONPATH": path}
    ended = subprocess.run(
        [*command, *options], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    lines = (tmp_path / "short" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == STEPS
    assert all(math.isfinite(row["loss"]) and row["teacher_kl"] is not None for row in rows)
