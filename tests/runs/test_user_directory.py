"""A directory of the user's own may hold modules with any names.

Our modules, and those of the libraries, are imported first. The user's scorer is found there all
the same, and imports its own modules. Onstream runs as it is installed here, from its wheel and as
an editable installation: the checkout has folders `settings`, `pipeline` and `workers` at its top.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.built_package import ROOT, build_editable, build_wheel, copy_checkout

EXAMPLE = "examples/jsonl/onstream.toml"
REWARD = 0.25
TRAPS = ("pipeline.py", "redis.py", "workers/__init__.py", "token.py", "types.py", "torch.py")
SCORER = """
from settings import REWARD

def score(completion, info):
    return REWARD
"""


@dataclass(frozen=True)
class Installation:
    """An interpreter that has Onstream, and what its environment has to hold for it."""

    python: Path
    environ: dict[str, str]


class UserDirectory:
    """A directory with the user's modules in it, and a run of the example there."""

    def __init__(self, path: Path, installed: Installation, redis_url: str, run_name: str) -> None:
        self.path = path
        self.python = installed.python
        self.run_dir = path / "runs" / run_name
        self.environ = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            **installed.environ,
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
            [self.python, "-P", "-m", "onstream", *words],
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


def from_wheel(tmp_path: Path) -> Installation:
    """This interpreter, with what a wheel of the checkout brings first on its path."""
    checkout = copy_checkout(tmp_path / "checkout")
    with zipfile.ZipFile(build_wheel(checkout, tmp_path / "wheel")) as wheel:
        wheel.extractall(tmp_path / "site-packages")
    return Installation(Path(sys.executable), {"PYTHONPATH": str(tmp_path / "site-packages")})


def editable(tmp_path: Path) -> Installation:
    """An environment with an editable installation of the checkout, and this one's libraries."""
    checkout = copy_checkout(tmp_path / "checkout")
    venv.create(tmp_path / "venv")
    [packages] = (tmp_path / "venv").glob("lib/python*/site-packages")
    with zipfile.ZipFile(build_editable(checkout, tmp_path / "wheel")) as wheel:
        wheel.extractall(packages)
    # As a folder of libraries alone: its own editable installation of Onstream does not count.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Installation(tmp_path / "venv" / "bin" / "python", {})


@pytest.fixture(
    params=[
        pytest.param(way, id=name, marks=pytest.mark.rotates("a way to install", place, 2))
        for place, (name, way) in enumerate({"wheel": from_wheel, "editable": editable}.items())
    ]
)
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Installation:
    """Onstream as a user installs it."""
    made: Installation = request.param(tmp_path)
    return made


@pytest.fixture
def directory(
    tmp_path: Path, installed: Installation, redis_url: str, run_name: str
) -> UserDirectory:
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


def test_the_module_is_started_where_the_users_modules_are_named_as_pythons(tmp_path: Path) -> None:
    for name in ("token.py", "types.py", "queue.py", "numpy.py"):
        (tmp_path / name).write_text("raise RuntimeError('a module of the user is in our way')\n")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "onstream", "check"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert "No problems." in done.stdout, done.stderr
