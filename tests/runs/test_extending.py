"""EXTENDING.md: the files of each section are written, its commands are run, and it does what it
says. A section that changes a file of ours gets a copy of the source to change.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.redis_servers import free_port

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "EXTENDING.md").read_text()
OURS = ("onstream", "settings", "pipeline", "workers")
PORT = "8123"  # on the page; the test takes a free one
BLOCK = re.compile(r"(?:^`([\w./-]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Section:
    """One example: its files by name, its changes to files of ours, and its commands."""

    files: dict[str, str] = field(default_factory=dict)
    diffs: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    @property
    def files_of_ours(self) -> set[str]:
        """The Python files in our source that the example adds or changes."""
        return {name for name in (*self.files, *self.diffs) if name.startswith(OURS)}


def sections() -> dict[str, Section]:
    """The sections of the page that hold an example, by heading."""
    found = {}
    for text in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        section = Section()
        for name, language, block in BLOCK.findall(text):
            if language == "console":
                section.commands += re.findall(r"^\$ (.+)$", block, re.MULTILINE)
            elif language == "diff":
                section.diffs[name] = block
            elif name:
                section.files[name] = block
        found[text.partition("\n")[0]] = section
    return found


SECTIONS = sections()


class Example:
    """A section written out, in a folder of its own."""

    def __init__(self, heading: str, folder: Path) -> None:
        self.section = SECTIONS[heading]
        self.folder = folder
        (folder / "examples").symlink_to(ROOT / "examples")
        self.source = ROOT
        if self.section.files_of_ours:
            self.source = folder
            for name in (*OURS, "docs", "deploy"):
                shutil.copytree(ROOT / name, folder / name, symlinks=True)
            for file in (*ROOT.glob("compose*.yaml"), ROOT / ".env.example"):
                shutil.copy(file, folder)
        for name, text in self.section.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        for name, diff in self.section.diffs.items():
            apply_diff(folder / name, diff)

    def run(self, command: str) -> str:
        """What a command of the section prints."""
        assert command in self.section.commands
        program, *arguments = command.split()
        argv = [sys.executable, "-m", "onstream"] if program == "onstream" else [sys.executable]
        result = subprocess.run(
            [*argv, *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.source), "COLUMNS": "200"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    @contextmanager
    def serving(self, command: str, port: int) -> Iterator[None]:
        """While a server runs that a command of the section starts in the background."""
        _, *arguments = command.split()
        server = subprocess.Popen([sys.executable, *arguments], cwd=self.folder)
        try:
            wait_for_port(port, server)
            yield
        finally:
            server.kill()
            server.wait()

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """The metrics of each step of a run."""
        lines = (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    """Until something listens there."""
    while True:
        assert server.poll() is None, "the server ended"
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.05)


def apply_diff(file: Path, diff: str) -> None:
    """Change `file`. Lines with `-` or ` ` must be in it once; those with `+` replace them."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE):
        lines = [line if line.strip() else " \n" for line in hunk.splitlines(keepends=True)]
        before = "".join(line[1:] for line in lines if line[0] in "- ")
        after = "".join(line[1:] for line in lines if line[0] in "+ ")
        text = file.read_text()
        assert text.count(before) == 1, f"these lines are not in {file.name} once:\n{before}"
        file.write_text(text.replace(before, after))


def test_the_table_counts_the_files_of_each_section() -> None:
    rows = re.findall(r"^\| \[.+?\]\(#(.+?)\) \|.*\| (\d+) \|$", PAGE, re.MULTILINE)
    counted = {
        heading.lower().replace(" ", "-"): len(section.files_of_ours)
        for heading, section in SECTIONS.items()
    }
    assert {anchor: int(count) for anchor, count in rows} == counted


def test_prompts_and_a_scorer(tmp_path: Path) -> None:
    example = Example("Prompts and a scorer", tmp_path)

    example.run("onstream up my_task.toml")

    steps = example.metrics("my-task")
    assert len(steps) == 3
    assert all(0 < step["reward"] <= 2 for step in steps)


def test_a_built_in_task(tmp_path: Path) -> None:
    example = Example("A built-in task", tmp_path)

    example.run(example.section.commands[0])

    samples = (tmp_path / "runs/reverse-text/samples.jsonl").read_text()
    assert "Count a: " in samples


def test_a_loss(tmp_path: Path) -> None:
    example = Example("A loss", tmp_path)

    example.run("onstream up my_loss.toml")

    steps = example.metrics("my-loss")
    assert len(steps) == 3
    assert all(0 <= step["custom_clipped"] <= 1 and step["teacher_kl"] > 0 for step in steps)


def test_a_teacher_protocol(tmp_path: Path) -> None:
    example = Example("A teacher protocol", tmp_path)
    serve, up = example.section.commands
    port = free_port()
    settings = tmp_path / "my_teacher.toml"
    settings.write_text(settings.read_text().replace(PORT, str(port)))

    with example.serving(serve.replace(PORT, str(port)).removesuffix(" &"), port):
        example.run(up)

    steps = example.metrics("my-teacher")
    assert len(steps) == 3
    assert all(step["teacher_kl"] > 0 for step in steps)
    assert [sum(step["scored_by"].values()) for step in steps] == [1.0] * 3


def test_a_stage(tmp_path: Path) -> None:
    example = Example("A stage", tmp_path)

    example.run(example.section.commands[0])

    steps = example.metrics("reverse-text")
    assert len(steps) == 3
    assert all(step["latency_shape_s"] > 0 for step in steps)
    assert '"length":-0.0' in (tmp_path / "runs/reverse-text/samples.jsonl").read_text()
    logs = {file.name for file in (tmp_path / "runs/reverse-text/logs").iterdir()}
    assert {"shaper-0.log", "shaper-1.log"} <= logs


def test_an_engine(tmp_path: Path) -> None:
    example = Example("An engine", tmp_path)

    example.run(example.section.commands[0])

    steps = example.metrics("reverse-text")
    assert len(steps) == 3
    assert all(step["mismatch_fresh_max"] < 1e-4 for step in steps)


def test_a_setting(tmp_path: Path) -> None:
    example = Example("A setting", tmp_path)
    up, docs = example.section.commands

    example.run(up)
    example.run(docs)

    assert len(example.metrics("reverse-text")) == 3
    settings = tomllib.loads((tmp_path / "runs/reverse-text/settings.toml").read_text())
    assert settings["trainer"]["optim"]["amsgrad"] is True
    assert "| `trainer.optim.amsgrad` | `false` |" in (tmp_path / "docs/settings.md").read_text()
