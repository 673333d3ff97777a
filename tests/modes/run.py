"""A whole run of a settings file, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.waiting import until

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "examples/reverse-text/teacher"
STUDENT = ROOT / "examples/reverse-text/student"
PAGE = ROOT / "tests/seed_page"


class Run:
    """A run of a settings file, with a second one on top that has nothing but the CPU pair and what
    makes it short.
    """

    def __init__(self, directory: Path, first: Path, *extra: str) -> None:
        self.directory = directory / "run"
        top = directory / "top.toml"
        top.write_text(
            f'[run]\nname = "run"\ndir = "{directory}"\n'
            f'[model]\nname = "{STUDENT}"\n'
            '[deployment]\ndevice = "cpu"\n'
        )
        sets = ["inference.sampling.max_completion=16", *extra]
        self.sets = [part for one in sets for part in ("--set", one)]
        self.files = [str(first), str(top)]

    def onstream(self, *arguments: str) -> str:
        command = [str(Path(sys.executable).with_name("onstream")), *arguments]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def up(self) -> str:
        return self.onstream("up", *self.files, *self.sets)

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """`onstream up` in the background; what it prints is what `said` returns."""
        command = [str(Path(sys.executable).with_name("onstream")), "up", *self.files, *self.sets]
        with (
            self.said_in.open("wb") as out,
            subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out) as up,
        ):
            try:
                yield up
            finally:
                up.terminate()

    @property
    def said_in(self) -> Path:
        return self.directory.parent / "said"

    def said(self) -> str:
        return self.said_in.read_text()

    def steps(self) -> int:
        metrics = self.directory / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_for(self, happens: Callable[[], bool]) -> None:
        until(happens, lambda: self.said()[-3000:])

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / name).read_text().splitlines()]

    def workers(self) -> set[str]:
        """Names of the workers that ran."""
        return {
            path.stem
            for path in (self.directory / "logs").glob("*-[0-9].log")
            if not path.stem.startswith("eval")
        }

    def audit(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.onstream("audit", str(self.directory)))
        return found
