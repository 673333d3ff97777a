"""A directory of the user's own may hold modules with any names.

Our modules, and those of the libraries, are imported first. The user's scorer is found there all
the same, and imports its own modules. Onstream runs from its wheel here: the checkout has folders
`settings`, `pipeline` and `workers` at its top, which an installation has not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.built_package import ROOT, build_wheel, copy_checkout

EXAMPLE = "examples/jsonl/onstream.toml"
REWARD = 0.25
TRAPS = ("pipeline.py", "redis.py", "workers/__init__.py")
SCORER = """
from settings import REWARD

def score(completion, info):
    return REWARD
"""


class UserDirectory:
    """A directory with the user's modules in it, and a run of the example there."""

    def __init__(self, path: Path, installed: Path, redis_url: str, run_name: str) -> None:
        self.path = path
        self.run_dir = path / "runs" / run_name
        self.environ = {
            **os.environ,
            "PYTHONPATH": str(installed),
            "ONSTREAM_REDIS__URL": redis_url,
        }
        self.overrides = [
            f"run.name={run_name}",
            "task.scorer=scorer:score",
            "trainer.max_steps=2",
            "orchestrator.verification.enabled=true",
        ]
        (path / "examples").symlink_to(ROOT / "examples")
        (path / "workers").mkdir()
        for name in TRAPS:
            (path / name).write_text("raise RuntimeError('a module of the user is in our way')\n")
        (path / "settings.py").write_text(f"REWARD = {REWARD}\n")
        (path / "scorer.py").write_text(SCORER)

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start `onstream` here, as its script in the virtual environment does."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "onstream", *words],
            cwd=self.path,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_on_example(self, *words: str) -> subprocess.Popen[str]:
        """Start a command that takes the example's settings file."""
        settings = [part for value in self.overrides for part in ("--set", value)]
        return self.start(*words, EXAMPLE, *settings)

    def output(self, *words: str) -> str:
        """What `onstream` prints here about the run."""
        return finished(self.start(*words, str(self.run_dir)))


def finished(process: subprocess.Popen[str]) -> str:
    """The output of a process that ends well."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder that holds what a wheel of this checkout brings to `site-packages`."""
    checkout = copy_checkout(tmp_path / "checkout")
    with zipfile.ZipFile(build_wheel(checkout, tmp_path / "wheel")) as wheel:
        wheel.extractall(tmp_path / "site-packages")
    return tmp_path / "site-packages"


@pytest.fixture
def directory(tmp_path: Path, installed: Path, redis_url: str, run_name: str) -> UserDirectory:
    path = tmp_path / "home"
    path.mkdir()
    return UserDirectory(path, installed, redis_url, run_name)


@pytest.fixture
def verifier(directory: UserDirectory) -> Iterator[subprocess.Popen[str]]:
    """The verifier of the run, started by hand before anything else is there."""
    process = directory.start_on_example("worker", "verifier")
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_command_works_where_the_users_modules_are_named_as_ours(
    directory: UserDirectory, verifier: subprocess.Popen[str]
) -> None:
    assert "No problems." in finished(directory.start_on_example("check"))
    stages = 'deployment.stages=["generate", "score", "train"]'
    finished(directory.start_on_example("up", "--set", stages))
    finished(verifier)

    metrics = (directory.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["reward"] for line in metrics] == [REWARD] * 2
    status: dict[str, Any] = json.loads(directory.output("status", "--json"))
    assert status["finished"]
    audit: dict[str, Any] = json.loads(directory.output("audit"))
    assert (audit["trained"], audit["lost"], audit["duplicated"]) == (2 * 32, 0, 0)
    evaluated: dict[str, Any] = json.loads(directory.output("eval").splitlines()[-1])
    assert (evaluated["version"], evaluated["reward"]) == (2, REWARD)
