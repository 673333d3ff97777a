"""Runs under `deployment.balance = "auto"` whose scorer sleeps.

The verifier is waited for, and uses no CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import living

EXAMPLE = Path(__file__).parents[2] / "examples" / "reverse-text"
STEPS = 100
SLEEPS = """
import fcntl
import time
from pathlib import Path

def score(completion, info):
    with open(__file__) as file:
        {in_turn}
        if not Path({awake!r}).exists():
            time.sleep(0.05)
    return 1.0
"""
ONE_AT_A_TIME = "fcntl.flock(file, fcntl.LOCK_EX)"


class Run:
    """`onstream up` in `directory`.

    Its scorer sleeps until there is a file `awake`; with `in_turn`, one scorer of all at a time.
    """

    def __init__(self, directory: Path, in_turn: str) -> None:
        self.directory = directory / "runs" / "reverse-text"
        self.awake = directory / "awake"
        self.output = directory / "output"
        scorer = SLEEPS.format(in_turn=in_turn, awake=str(self.awake))
        (directory / "scorer.py").write_text(scorer)
        overrides = [
            f"run.dir={directory / 'runs'}",
            f"model.name={EXAMPLE / 'student'}",
            f"teacher_inference.model.name={EXAMPLE / 'teacher'}",
            "task.scorer=scorer:score",
            "eval.samples=0",
            "orchestrator.batch_size=8",
            f"trainer.max_steps={STEPS}",
            "deployment.balance=auto",
        ]
        command = ["up", str(EXAMPLE / "onstream.toml")]
        command += [word for value in overrides for word in ("--set", value)]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "onstream", *command],
                cwd=directory,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, words: str) -> None:
        while words not in self.output.read_text():
            assert self.process.poll() is None, self.output.read_text()
            time.sleep(0.05)

    def to_the_end(self) -> dict[str, Any]:
        """The report of the run, which lost nothing."""
        self.awake.touch()
        assert self.process.wait() == 0, self.output.read_text()
        print(self.output.read_text())
        found = self.asked("audit")
        assert found["lost"] == found["duplicated"] == found["dead"] == 0
        assert found["trained"] == STEPS * 8
        report: dict[str, Any] = json.loads((self.directory / "report.json").read_text())
        assert report["steps"] == STEPS
        return report

    def asked(self, command: str, *options: str) -> dict[str, Any]:
        """What a command of `onstream` prints of the run."""
        words = [sys.executable, "-m", "onstream", command, str(self.directory), *options]
        printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        found: dict[str, Any] = json.loads(printed)
        return found


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    run = Run(tmp_path, request.param)
    yield run
    if run.process.poll() is None:
        run.process.kill()
        run.process.wait()


@pytest.mark.slow
@pytest.mark.rotates("a worker that is added", 0, 2)
@pytest.mark.parametrize("run", ["pass"], indirect=True)
def test_a_verifier_that_only_waits_gets_another_one_and_the_run_is_faster_for_it(
    run: Run,
) -> None:
    run.wait_for("for verify: verifier-1 is started")
    run.wait_for("2 verifiers: ")
    workers = run.asked("status", "--json")["workers"]
    assert sum(worker["stage"] == "verify" for worker in workers) >= 2
    first = run.to_the_end()["balance"][0]
    assert (first["stage"], first["workers"], first["kept"]) == ("verify", 2, True)
    assert first["before"] < first["after"]
    assert first["before"] < first["predicted"]


@pytest.mark.slow
@pytest.mark.rotates("a worker that is added", 1, 2)
@pytest.mark.parametrize("run", [ONE_AT_A_TIME], indirect=True)
def test_a_verifier_that_gives_nothing_leaves_again_and_nothing_of_it_is_lost(run: Run) -> None:
    run.wait_for("verifier-1 leaves again")
    while len(living(run.process.pid, " worker verifier ")) > 1:
        time.sleep(0.05)
    first = run.to_the_end()["balance"][0]
    assert (first["stage"], first["workers"], first["kept"]) == ("verify", 2, False)
